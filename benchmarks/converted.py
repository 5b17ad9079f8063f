"""Converted models against dense ones in time: a prompt read, and a token decoded.

    python -m benchmarks.converted --kept=0.8,0.6,0.4

For: ratios dense / converted in the same code, for the shape of SmolLM2-135M by default, with
leaders of one share in each matrix and weights drawn at random. Not for: the quality of what
conversion keeps (`experiments/posthoc.py`).
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.timing import model_of, paired
from ngc_jax.config import base, reset_unread, validate
from ngc_jax.convert.ranks import led, spent, uniform
from ngc_jax.nn.ranks import Joined, write

PROMPT = 512  # tokens, also of the cache
TOKENS = 8  # decoded by a call
SMOLLM2 = {"width": 576, "hidden": 1536, "heads": 9, "kv_heads": 3, "prelude": 30, "tied": True}


def dense_config(stages: int) -> ConfigDict:
    """The shape of SmolLM2-135M, with so many stages."""
    config = base()
    config.model.update(SMOLLM2 | {"prelude": stages, "core": 0, "coda": 0, "groups": 1})
    config.model.update({"rule": "dense", "qk_norm": False, "remat": "none"})
    config.data.update({"tokenizer": "given", "vocab_size": 49_152, "context": PROMPT})
    reset_unread(config)
    validate(config)
    return config


def converted(dense: ConfigDict, kept: float) -> tuple[ConfigDict, float]:
    """The same shape in leaders that keep this share of each matrix, and the share in all."""
    sizes = model_of(dense).shape.sizes
    shapes = list(sizes.values())
    ranks = uniform(shapes, kept, led)
    stage = [Joined((name,), rank) for name, rank in zip(sizes, ranks, strict=True)]
    config = dense.copy_and_resolve_references()
    config.model.update({"rule": "leaders", "p_intra": 0, "form": "signals"})
    config.model.ranks = write([stage] * dense.model.prelude)
    reset_unread(config)
    validate(config)
    return config, spent(ranks, shapes, led) / sum(a * b for a, b in shapes)


def programs(config: ConfigDict) -> tuple[Callable[[], jax.Array], Callable[[], jax.Array]]:
    """Functions that read a prompt, and that decode TOKENS at its end, as `generate` does."""
    model = model_of(config)
    params = jax.jit(lambda: model.unstack(model.init(jax.random.key(0))))()
    tokens = jax.random.randint(jax.random.key(1), (1, PROMPT), 0, config.data.vocab_size)
    given = (params, tokens, model.init_cache(1, PROMPT))

    def read(params: Any, tokens: jax.Array, cache: Any) -> jax.Array:
        return model.decode(params, tokens, cache, jnp.int32(0), last=True)[0]

    def decode(params: Any, tokens: jax.Array, cache: Any) -> jax.Array:
        def step(carry: tuple[jax.Array, Any], at: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
            token, cache = carry
            logits, cache = model.decode(params, token, cache, at)
            return (jnp.argmax(logits, axis=-1), cache), None

        places = jnp.arange(PROMPT - TOKENS, PROMPT)
        return jax.lax.scan(step, (tokens[:, :1], cache), places)[0][0]

    one, other = (jax.jit(function).lower(*given).compile() for function in (read, decode))
    return partial(one, *given), partial(other, *given)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kept", default="0.8,0.6,0.4", help="shares, with commas")
    parser.add_argument("--stages", type=int, default=SMOLLM2["prelude"])
    parser.add_argument("--pairs", type=int, default=9)
    args = parser.parse_args()
    dense = dense_config(args.stages)
    prompt, token = programs(dense)
    print(f"| kept | prompt of {PROMPT}: dense / converted | ms | token: dense / converted | ms |")
    print("| --- | --- | --- | --- | --- |")
    for share in map(float, args.kept.split(",")):
        config, real = converted(dense, share)
        read, decode = programs(config)
        one = paired(read, prompt, pairs=args.pairs)
        other = paired(decode, token, pairs=args.pairs)
        row = [
            f"{of.ratio:.2f} | {of.other * 1e3:.0f} / {of.plain * 1e3:.0f}" for of in (one, other)
        ]
        print(f"| {real:.3f} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
