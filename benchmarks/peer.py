"""An update of our models against one of nanoGPT's, and against its matrix products alone.

    python -m benchmarks.peer --nanogpt=PATH/model.py --widths=128,512

For: dense, and NGC in both forms, as it is in ngc_small and with the FLOPs of dense, beside GPT of
nanoGPT's own file (MIT; not ours, not here) with as many layers, heads, channels, tokens and
outputs. PyTorch must be installed. Each model is timed in turn with nanoGPT, on the cores that this
process may use, in float32. Not for: quality.
"""

import argparse
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.timing import model_of, paired, update_of, zeros_of
from ngc_jax.config import named
from ngc_jax.count import forward_flops
from ngc_jax.runtime.allocation import keep_freed
from ngc_jax.training.match_size import prepare

VOCAB = 257  # bytes
SIDE = 1024  # of the product that tells how fast this machine multiplies


def dense_of(width: int) -> ConfigDict:
    """dense_small at another width."""
    config = named("dense_small")
    config.model.width, config.model.hidden = width, 3 * width
    return config


def ours(width: int) -> Iterator[tuple[str, ConfigDict]]:
    """The configs, and what they are called."""
    dense, small = dense_of(width), named("dense_small")
    yield "dense", dense
    scale, share = width / small.model.width, flops(dense) / flops(small)
    for size in ("as ngc_small", "FLOPs of dense"):
        for form in ("weights", "signals"):
            config = named("ngc_small")
            config.model.form = form
            if size == "as ngc_small":
                config.model.width = round(config.model.width * scale / 8) * 8
                config.model.hidden = round(config.model.hidden * scale / 8) * 8
            else:
                config.model.width, config.model.hidden = width, 3 * width
                config.model.match = f"dense_small:{share:g}:flops"
            prepare(config)
            yield f"NGC, {size}, {form}", config


def flops(config: ConfigDict) -> float:
    """FLOPs of the matrix products of an update, in the form that runs."""
    model = model_of(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return 3 * forward_flops(model.apply, params, jax.eval_shape(lambda: zeros_of(config)))


def theirs(path: str, config: ConfigDict) -> tuple[Callable[[Any], Any], float]:
    """An update of nanoGPT's model of a dense config's shape, and the FLOPs of its products."""
    import torch

    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape = {"n_layer": config.model.prelude, "n_head": config.model.heads, "vocab_size": VOCAB}
    shape |= {"n_embd": config.model.width, "block_size": config.data.context, "dropout": 0.0}
    model = file.GPT(file.GPTConfig(**shape, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    tokens = torch.zeros((config.train.batch_size, config.data.context), dtype=torch.long)

    def update(_: Any) -> int:
        _, loss = model(tokens, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return 0

    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    matrices -= model.transformer.wpe.weight.numel()
    read = config.data.context * config.model.width * config.model.prelude * 2  # attention's
    return update, 6.0 * tokens.numel() * (matrices + read)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nanogpt", required=True, help="model.py of karpathy/nanoGPT")
    parser.add_argument("--widths", default="128", help="of dense and nanoGPT, separated by commas")
    parser.add_argument("--pairs", type=int, default=9, help="pairs in each median")
    args = parser.parse_args()
    keep_freed()  # as training does
    square = jnp.ones((SIDE, SIDE))
    multiply = jax.jit(jnp.dot)
    cores = len(os.sched_getaffinity(0))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {cores} cores, float32")
    print(f"medians of {args.pairs} pairs; products alone: FLOPs at the rate of a product of side")
    print(f"{SIDE} in the same pairs\n")
    heads = ["width", "model", "GFLOPs", "ms", "time / nanoGPT's", "time / its products alone"]
    print(f"| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|", flush=True)
    for width in map(int, args.widths.split(",")):
        for name, config in ours(width):
            if name == "dense":
                peer, of_peer = theirs(args.nanogpt, config)
                rate = paired(lambda _: multiply(square, square), peer, None, pairs=args.pairs)
                alone = of_peer / (2 * SIDE**3) / rate.ratio
                row = [width, "nanoGPT", f"{of_peer / 1e9:.1f}", f"{1e3 * rate.other:.0f}", "1"]
                print(f"| {' | '.join(map(str, [*row, f'{1 / alone:.2f}']))} |", flush=True)
            update = update_of(config)
            beside = paired(peer, update, zeros_of(config), pairs=args.pairs)
            rate = paired(lambda _: multiply(square, square), update, zeros_of(config))
            alone = rate.ratio * 2 * SIDE**3 / flops(config)
            row = [width, name, f"{flops(config) / 1e9:.1f}", f"{1e3 * beside.other:.0f}"]
            row += [f"{beside.ratio:.2f}", f"{alone:.2f}"]
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
