"""Does compile time grow with rounds or depth? `python -m benchmarks.compile_time`

For: the train step of the default model, compiled at 4 and 64 rounds, and at 2 and 32 core stages.
The two are compiled in turn, so that changes in the machine's speed affect both; the output has
medians and their ratio. Not for: run time.
"""

import argparse
import os
import statistics
import time

os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax

from ngc_jax.config import base, model_shape
from ngc_jax.data.batches import token_batch
from ngc_jax.data.tokenizer import Bytes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.training.step import init_state, make_train_step


def seconds(**fields: int) -> float:
    """Seconds to trace and compile one train step, with empty caches of JAX."""
    config = base()
    config.model.update(fields)
    model = Decoder(model_shape(config, Bytes.vocab))
    batch = token_batch(config.train.batch_size, config.data.context)
    like = jax.eval_shape(lambda: init_state(model, config.train, 0))
    jax.clear_caches()
    began = time.perf_counter()
    jax.jit(make_train_step(model, config.train)).lower(like, batch).compile()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    seconds()  # the first compilation of a process costs more
    for few, many in (({"rounds": 4}, {"rounds": 64}), ({"core": 2}, {"core": 32})):
        pairs = [(seconds(**few), seconds(**many)) for _ in range(args.repeats)]
        a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(y / x for x, y in pairs)
        print(
            f"{few}: {a:.2f} s   {many}: {b:.2f} s   "
            f"ratio, median of {args.repeats} pairs: {ratio:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
