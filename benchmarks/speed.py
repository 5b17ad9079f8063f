"""NGC against dense in time: an update, and one token of generated text, at each width.

    python -m benchmarks.speed --widths=256,512,1024

For: ratios dense / NGC for models of the same width, stages and heads, in both forms; above 1 NGC
is faster. NGC has as many ports as give it SHARE of dense's parameters in matrices; at that share
ngc_small reaches the loss of dense_small (experiments/results/match_dense.md). Not for: the quality
of these models.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.timing import Paired, model_of, paired, update_of, zeros_of
from ngc_jax.config import base, validate
from ngc_jax.count import forward_flops, peak
from ngc_jax.training.match_size import cost

SHARE = 0.32  # fraction of dense's parameters in matrices
TOKENS = 20  # decoded in one timing


class Row(NamedTuple):
    """One NGC model beside the dense model."""

    share: float  # fraction of dense's parameters in matrices
    flops: tuple[float, float]  # of an update: dense, NGC
    update: Paired  # NGC is `plain`
    token: Paired


def models(width: int, groups: int, args: argparse.Namespace) -> tuple[ConfigDict, ConfigDict]:
    """The configs of the dense model, and of the NGC model with SHARE of its parameters."""
    dense = base()
    dense.model.update(
        rule="dense", width=width, hidden=3 * width, p_intra=width, groups=groups, heads=groups
    )
    dense.model.update(prelude=args.stages, core=0, coda=0, rounds=1)
    dense.data.context, dense.train.batch_size = args.context, args.batch_size
    dense.train.compute_dtype = args.dtype
    ngc = dense.copy_and_resolve_references()
    ngc.model.rule = "addressed"
    costs = []
    for ngc.model.p_inter in (1, 2):
        costs.append(cost(ngc))
    # each further number in a port costs as much as the second
    more = (SHARE * cost(dense) - costs[0]) / (costs[1] - costs[0])
    ngc.model.p_inter = max(1, 1 + round(more))
    validate(ngc)
    return dense, ngc


def decoding(config: ConfigDict) -> Callable[[], jax.Array]:
    """A function that decodes TOKENS tokens of one text, each at the last position of the cache."""
    model = model_of(config)
    dtype = jnp.dtype(config.train.compute_dtype)
    params = jax.jit(
        lambda: model.unstack(
            jax.tree.map(lambda p: p.astype(dtype), model.init(jax.random.key(0)))
        )
    )()
    step = jax.jit(model.decode, donate_argnums=2)
    token, cache = jnp.zeros((1, 1), jnp.int32), model.init_cache(1, config.data.context, dtype)
    position = jnp.int32(config.data.context - 1)

    def decode() -> jax.Array:
        nonlocal cache
        for _ in range(TOKENS):
            logits, cache = step(params, token, cache, position)
        return logits

    return decode


def flops(config: ConfigDict) -> float:
    """FLOPs of the matrix products of an update."""
    model = model_of(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return 3 * forward_flops(model.apply, params, jax.eval_shape(lambda: zeros_of(config)))


def rows(dense: ConfigDict, ngc: ConfigDict, pairs: int) -> dict[str, Row]:
    """The row of each form: "weights", "signals"."""
    batch = zeros_of(dense)
    # decoding is the same in both forms
    token = paired(decoding(ngc), decoding(dense), pairs=pairs)
    of_dense, found = update_of(dense), {}
    for form in ("weights", "signals"):
        ngc.model.form = form
        update = paired(update_of(ngc), of_dense, batch, pairs=pairs)
        found[form] = Row(cost(ngc) / cost(dense), (flops(dense), flops(ngc)), update, token)
    return found


def used(flops: float, seconds: float, dtype: str) -> str:
    """Model FLOPs utilization (arXiv 2204.02311, appendix B), "-" for an unknown peak."""
    most = peak(dtype)
    return f"{flops / seconds / most:.1%}" if most else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--widths", default="256,512,1024", help="separated by commas")
    parser.add_argument("--groups", type=int, default=8, help="groups, and heads, of every model")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--pairs", type=int, default=9, help="pairs in each median")
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    tokens = f"{args.batch_size} x {args.context} tokens"
    print(f"jax {jax.__version__}, {device}; {args.stages} stages, {tokens}, {args.dtype}")
    print(f"medians of {args.pairs} pairs, timed in turn; ratios above 1: NGC is faster\n")
    heads = ["width", "groups x port", "fraction of matrices", "form", "GFLOPs dense, NGC"]
    heads += ["ms dense, NGC", "update dense / NGC", "MFU dense, NGC"]
    heads += ["us per token dense, NGC", "token dense / NGC"]
    print(f"| {' | '.join(heads)} |")
    print("| --- " * 10 + "|")
    for width in map(int, args.widths.split(",")):
        dense, ngc = models(width, args.groups, args)
        for form, row in rows(dense, ngc, args.pairs).items():
            (plain, ours), update, token = row.flops, row.update, row.token
            used_by = used(plain, update.other, args.dtype), used(ours, update.plain, args.dtype)
            cells = [
                f"{width}",
                f"{args.groups} x {ngc.model.p_inter}",
                f"{row.share:.3f}",
                form,
                f"{plain / 1e9:.1f}, {ours / 1e9:.1f}",
                f"{1e3 * update.other:.1f}, {1e3 * update.plain:.1f}",
                f"{update.ratio:.2f}",
                ", ".join(used_by),
                f"{1e6 * token.other / TOKENS:.0f}, {1e6 * token.plain / TOKENS:.0f}",
                f"{token.ratio:.2f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
