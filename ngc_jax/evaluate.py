"""Held-out loss of a model. As a command: `python -m ngc_jax.evaluate --workdir=DIR`, over the whole held-out text.

`--rounds=8` runs the loop for another number of rounds than the config says; `--rounds=settled` until a round moves no
token's state by `--tolerance` of its length, for `--cap` rounds at most, and says how many rounds that were.

For: turning batches of held-out windows into nats per token, bits per byte and stability measures. Not for: what one
batch is worth (`steps.py`), or what is measured of stability (`stability/watch.py`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from ngc_jax import mesh as meshes
from ngc_jax.atomic import Path
from ngc_jax.data.batches import Windows, held_out_batches
from ngc_jax.data.tokens import Tokens, load_tokens
from ngc_jax.errors import UserError
from ngc_jax.iteration import Apply
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel
from ngc_jax.stability.watch import make_watch
from ngc_jax.steps import make_eval_step
from ngc_jax.workdir import Trained, command, open_trained, parser, rounds


def compile_eval(
    model: LanguageModel, config: Any, mesh: Mesh, tokens: Tokens, settle: Apply | None = None
) -> Callable[..., Any]:
    """The jitted evaluation of one batch for a config, on a mesh; `settle`, if given, for `model.apply`."""
    tokenizer, isolate = tokens.tokenizer, config.data.isolate_documents
    step = make_eval_step(model, config.train, tokenizer.mark, tokenizer.lengths, isolate, settle)
    return jax.jit(meshes.on(mesh, step), out_shardings=meshes.whole(mesh))


def held_out(
    step: Callable[..., Any],
    params: Any,
    config: Any,
    mesh: Mesh,
    tokens: Tokens,
    limit: int,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """{"loss": nats per token, "bits_per_byte": ...} on `limit` windows (0 = all); "rounds" per token if they settle.

    Bits per byte divide by the bytes of the text, whatever the tokens are, and so compare over tokenizers. `between` is
    called before each batch, and may raise to abandon all.
    """
    batches = held_out_batches(
        Windows(tokens.validation, config.data.context),
        batch_size=config.eval.batch_size,
        limit=limit,
        rows=meshes.local_rows(mesh, config.eval.batch_size),
    )
    total: dict[str, float] = {}
    for windows, real in batches:
        between()
        sums = step(params, meshes.put_rows(mesh, windows), meshes.put_rows(mesh, real))
        for name, value in jax.device_get(sums).items():
            total[name] = total.get(name, 0.0) + float(value)
    bits = total["nats"] / math.log(2)
    rounds = {"rounds": total["rounds"] / total["tokens"]} if "rounds" in total else {}
    return {"loss": total["nats"] / total["tokens"], "bits_per_byte": bits / total["bytes"], **rounds}


def compile_watch(model: Decoder, config: Any, mesh: Mesh, tokens: Tokens) -> Callable[[Any], dict[str, float]]:
    """The stability measures of `config.stability` on held-out text: params -> {"stability/...": value}."""
    parts = mesh.size // mesh.shape["group"]
    wanted = -(-config.stability.tokens // (config.data.context * parts)) * parts
    batches = held_out_batches(
        Windows(tokens.validation, config.data.context),
        batch_size=wanted,
        limit=wanted,
        rows=meshes.local_rows(mesh, wanted),
    )
    windows = meshes.put_rows(mesh, next(iter(batches))[0])
    # It runs seldom: at optimization level 1 it compiles several times faster.
    options = {"xla_backend_optimization_level": 1}
    watch = meshes.on(mesh, make_watch(model, config.stability))
    step = jax.jit(watch, out_shardings=meshes.whole(mesh), compiler_options=options)
    return lambda params: {name: float(value) for name, value in jax.device_get(step(params, windows)).items()}


def tokens_of(trained: Trained, workdir: Path) -> Tokens:
    """The text that a run was trained on, and its held-out part. Raises UserError where this is another text by now."""
    tokens = load_tokens(trained.config.data)
    if trained.meta["data"] != tokens.fingerprint:
        raise UserError(
            f"this is not the text that {workdir} was trained on: fingerprint {tokens.fingerprint[:16]}, "
            f"trained on {trained.meta['data'][:16]} (another Python version, or changed files at data.path)"
        )
    return tokens


def main() -> None:
    """Print the held-out loss of a checkpoint."""
    arguments = parser(__doc__)
    arguments.add_argument("--windows", type=int, default=0, help="held-out windows; default 0: all")
    arguments.add_argument("--rounds", help="of the loop: a number, or 'settled'; default: model.rounds")
    arguments.add_argument("--tolerance", type=float, default=0.01, help="of 'settled', > 0: |change| / |state|")
    arguments.add_argument("--cap", type=int, default=64, help="of 'settled', >= 1: rounds at most")
    args = arguments.parse_args()
    if args.windows < 0:
        raise UserError(f"--windows={args.windows}: must be 1 or more, or 0 for all")
    if args.tolerance <= 0:
        raise UserError(f"--tolerance={args.tolerance}: must be above 0, for instance 0.01")
    if args.cap < 1:
        raise UserError(f"--cap={args.cap}: must be 1 or more, for instance 64")
    trained = open_trained(args.workdir, args.step)
    config, model, settle = trained.config, trained.model, None
    if args.rounds == "settled":
        settle = partial(trained.looped.settle, tolerance=args.tolerance, cap=args.cap)
    elif args.rounds is not None:
        model = trained.looped.at(rounds(args.rounds))
    tokens = tokens_of(trained, args.workdir)
    mesh = meshes.single()
    step = compile_eval(model, config, mesh, tokens, settle)
    result = held_out(step, trained.params, config, mesh, tokens, args.windows)
    if isinstance(model, Decoder) and settle is None:  # what is watched is a loop of a fixed number of rounds
        result |= compile_watch(model, config, mesh, tokens)(trained.params)
    print(f"{args.workdir}, step {trained.step}, held out from {tokens.summary}")
    for name, value in result.items():
        print(f"{name:40} {value:.6f}")


if __name__ == "__main__":
    command(main)
