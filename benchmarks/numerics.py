"""Does this device compute what float64 on its host computes? `python -m benchmarks.numerics`

For: float32 on the device, at its default precision (TF32 on some GPUs) and at the highest:
`transmit` of each rule against x @ W.T, and an update's loss and gradient in both forms. Also, in
bfloat16, fused attention where the device has it. Exit code 1 if an error is above its limit. The
references are the same functions in float64, in which norms, softmax and logits of a model remain
float32. Not for: whether the mathematics is right (`tests/`).
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import model_of
from ngc_jax.config import base
from ngc_jax.core import attention
from ngc_jax.core.rules import RULES, transmit, weights
from ngc_jax.data.batches import Batch
from ngc_jax.training.step import losses

Tree = Any
IN_BFLOAT16 = 2e-2
LIMITS = {"highest": 1e-5, "default": 1e-2}  # largest |found - reference| / |reference|


def in_float64(function: Callable[..., Tree], *args: Tree) -> Tree:
    """The result for float64 arguments on the host's processor, as NumPy arrays."""
    wide = jax.tree.map(
        lambda a: np.asarray(a, np.float64) if np.issubdtype(a.dtype, np.floating) else a, args
    )
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, jax.jit(function)(*wide))


def error(found: Tree, reference: Tree) -> float:
    """|found - reference| / |reference|, norms over all arrays of a tree."""

    def flat(tree: Tree) -> np.ndarray:
        leaves = [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)]
        return np.concatenate(leaves)

    a, b = flat(found), flat(reference)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def cases() -> dict[str, tuple[Callable[..., Tree], Callable[..., Tree], tuple[Tree, ...]]]:
    """By name: the function for the device, the reference, and their arguments (NumPy)."""
    found: dict[str, Any] = {}
    for name, rule in RULES.items():
        init = jax.jit(partial(rule.init, groups=8, n_in=256, n_out=384, dim=4))
        pre, post = init(jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), (64, 256))
        acts = lambda x, pre, post, name=name: transmit(name, x, pre, post)  # noqa: E731
        found[name] = (
            acts,
            lambda x, pre, post, name=name: x @ weights(name, pre, post).T,
            (x, pre, post),
        )
    batch = Batch(*jax.random.randint(jax.random.key(2), (2, 4, 64), 0, 256))
    for form in ("weights", "signals"):
        config = base()
        config.model.form = form
        config.data.context = 64
        model = model_of(config)

        def gradient(params: Tree, batch: Batch, model: Any = model) -> Tree:
            def loss(params: Tree) -> jax.Array:
                return losses(model, params, batch, params["embed"].dtype)[0].mean()

            return jax.value_and_grad(loss)(params)

        params = jax.jit(model.init)(jax.random.key(3))
        found[f"loss and gradient, {form}"] = (gradient, gradient, (params, batch))
    return {name: (a, b, jax.tree.map(np.asarray, args)) for name, (a, b, args) in found.items()}


def one_kernel() -> float | None:
    """The error of fused attention and its gradients in bfloat16; None without such a kernel."""
    heads = jax.random.normal(jax.random.key(4), (3, 4, 256, 8, 64)).astype(jnp.bfloat16)
    if not attention.fused(heads[0]):
        return None

    def written(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        places = jnp.arange(query.shape[1])
        return attention.mix(
            attention.attention_weights(
                query, key, attention.attention_mask(places, places, len(places))
            ),
            value,
        )

    def outcome(attend: Callable[..., jax.Array], heads: jax.Array) -> Tree:
        return attend(*heads), jax.grad(lambda heads: jnp.sum(jnp.sin(attend(*heads))))(heads)

    found = jax.jit(partial(outcome, attention.attend_fused))(heads)
    return error(found, in_float64(partial(outcome, written), heads.astype(jnp.float32)))


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}: relative errors of float32 against float64\n")
    heads = " | ".join(f"{precision}, at most {limit:g}" for precision, limit in LIMITS.items())
    print(f"| computation | {heads} |")
    print("| --- " * (1 + len(LIMITS)) + "|")
    sound = True
    for name, (function, reference, args) in cases().items():
        wanted, errors = in_float64(reference, *args), []
        for precision, limit in LIMITS.items():
            with jax.default_matmul_precision(precision):
                errors.append(error(jax.jit(function)(*args), wanted))
            sound = sound and errors[-1] <= limit
        print(f"| {name} | " + " | ".join(f"{e:.1e}" for e in errors) + " |", flush=True)
    attended = one_kernel()
    if attended is not None:
        print(f"\nfused attention, bfloat16, at most {IN_BFLOAT16:g}: {attended:.1e}")
        sound = sound and attended <= IN_BFLOAT16
    if not sound:
        sys.exit("error: above the limit")


if __name__ == "__main__":
    main()
