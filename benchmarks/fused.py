"""Is a kernel that makes weights tile by tile, inside the product, faster than XLA?

    python -m benchmarks.fused

For: the `distance` rule, in which each weight needs work of its own. XLA makes W once, writes it
and reads it. The kernel keeps W on the chip, but makes it again for every tile of tokens, so it can
only be faster for few tokens. If it is, on a GPU, it gets a place in `core/`. It has no gradient,
and no GPU has run it yet: a CPU interprets it, and only its error is measured. Not for: models.
"""

import argparse
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from benchmarks.timing import paired
from ngc_jax.core.rules import RULES, transmit

Array = jax.Array


def product(
    x: Array, pre: Array, post: dict[str, Array], tile: int = 64, interpret: bool = False
) -> Array:
    """`transmit("distance", x, pre, post)` for x [N, n_in]: [N, n_out].

    tile: divides N, n_in and n_out; on a GPU a power of two, at least 16. Raises ValueError for
    other sizes.
    """
    (tokens, n_in), (n_out, states) = x.shape, post["state"].shape
    if any(size % tile for size in (tokens, n_in, n_out)):
        raise ValueError(
            f"tile={tile}: must divide the {tokens} tokens and the {n_in} and {n_out} neurons"
        )

    def kernel(x_ref: Any, pre_ref: Any, post_ref: Any, gain_ref: Any, y_ref: Any) -> None:
        def add(k: Array, total: Array) -> Array:
            senders, weights = pl.ds(k * tile, tile), jnp.zeros((tile, tile), jnp.float32)
            for h in range(states):
                square = jnp.square(pre_ref[senders, h][:, None] - post_ref[:, h][None, :])
                weights += gain_ref[h] * (1 - 4.5 * square) * jnp.exp(-2 * square)
            return total + x_ref[:, senders] @ weights.astype(x.dtype)

        total = jax.lax.fori_loop(0, n_in // tile, add, jnp.zeros((tile, tile), jnp.float32))
        y_ref[...] = (total * n_in**-0.5).astype(x.dtype)

    return pl.pallas_call(
        kernel,
        grid=(tokens // tile, n_out // tile),
        in_specs=[
            pl.BlockSpec((tile, n_in), lambda t, o: (t, 0)),
            pl.BlockSpec((n_in, states), lambda t, o: (0, 0)),
            pl.BlockSpec((tile, states), lambda t, o: (o, 0)),
            pl.BlockSpec((states,), lambda t, o: (0,)),
        ],
        out_specs=pl.BlockSpec((tile, tile), lambda t, o: (t, o)),
        out_shape=jax.ShapeDtypeStruct((tokens, n_out), x.dtype),
        # Triton loads only the parts of a block that are used
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(x, pre, post["state"], post["gain"])


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    on_cpu = jax.default_backend() == "cpu"
    n, counts = (128, (64,)) if on_cpu else (1024, (64, 1024, 16384))
    init = jax.jit(partial(RULES["distance"].init, groups=1, n_in=n, n_out=n, dim=4))
    pre, post = init(jax.random.key(0))
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}; distance, {n} to {n} neurons, states of 4, float32\n")
    print("| tokens | relative difference | us XLA, kernel | XLA / kernel |")
    print("| --- | --- | --- | --- |")
    for count in counts:
        x = jax.random.normal(jax.random.key(1), (count, n))
        ours = jax.jit(partial(product, interpret=on_cpu))
        theirs = jax.jit(partial(transmit, "distance"))
        wanted = theirs(x, pre, post)
        apart = float(jnp.linalg.norm(ours(x, pre, post) - wanted) / jnp.linalg.norm(wanted))
        times = None if on_cpu else paired(ours, theirs, x, pre, post, calls=20)
        seconds = (
            f"{1e6 * times.other:.0f}, {1e6 * times.plain:.0f} | {times.ratio:.2f}"
            if times
            else "- | -"
        )
        print(f"| {count} | {apart:.1e} | {seconds} |", flush=True)
        if not math.isfinite(apart) or apart > 1e-2:
            raise SystemExit("error: above the limit of 1e-2")


if __name__ == "__main__":
    main()
