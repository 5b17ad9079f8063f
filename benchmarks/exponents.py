"""The cost of exponents: time and memory relative to plain forward passes of the same step.

    python -m benchmarks.exponents

For: the ratios in docs/stability.md. Each is the median of pairs, forward and exponents in turn,
because machines are shared and change speed. Not for: correctness (`tests/test_lyapunov.py`).
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import paired
from ngc_jax.analysis import rounds_step
from ngc_jax.config import base, model_shape
from ngc_jax.data.batches import Batch
from ngc_jax.data.tokenizer import Bytes
from ngc_jax.dynamics.lyapunov import leading_exponent, lyapunov_spectrum
from ngc_jax.nn.decoder import Decoder
from ngc_jax.training.stability_metrics import make_watch
from ngc_jax.training.step import init_state, make_train_step

Array = jax.Array
STEPS = 32


def forward(step: Callable[[Any, Any], Any], x: Array) -> Array:
    return jax.lax.scan(lambda x, _: (step(x, None), None), x, length=STEPS)[0]


def systems() -> dict[str, tuple[Callable[[Any, Any], Any], Array]]:
    """A dense recurrent network with 64 states at once, and the loop of configs/defaults.py with 4
    sequences.
    """
    w = jax.random.normal(jax.random.key(0), (512, 512)) / 512**0.5
    start = jax.random.normal(jax.random.key(1), (64, 512))
    config = base()
    model = Decoder(model_shape(config, 257))
    params = jax.jit(model.init)(jax.random.key(2))
    tokens = jax.random.randint(jax.random.key(3), (4, config.data.context), 0, 257)
    step, entered = rounds_step(model, params, Batch(tokens))
    return {
        "recurrent, 64 x 512": (lambda x, u: jnp.tanh(x @ w), start),
        "rounds of the defaults": (step, entered),
    }


def watching() -> float:
    """The time of the stability measures of configs/defaults.py, as a fraction of the updates
    between two measurements.
    """
    config = base()
    model = Decoder(model_shape(config, Bytes.vocab))
    state = jax.jit(lambda: init_state(model, config.train, 0))()
    update = jax.jit(make_train_step(model, config.train))
    watch = jax.jit(make_watch(model, config.stability))
    length = config.data.context
    shape = (2, config.train.batch_size, length)
    batch = Batch(*jax.random.randint(jax.random.key(1), shape, 0, 256))
    rows = -(-config.stability.tokens // config.data.context)
    held_out = jax.random.randint(jax.random.key(2), (rows, length), 0, 256)
    times = paired(
        lambda: update(state, batch)[1]["train/loss"], lambda: watch(state.params, Batch(held_out))
    ).ratio
    return times / config.stability.every


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}; times as multiples of {STEPS} forward steps")
    for name, (step, x) in systems().items():
        plain = jax.jit(lambda x, step=step: forward(step, x))
        found = [
            ("leading", 2.2, jax.jit(lambda x, step=step: leading_exponent(step, x, steps=STEPS)))
        ]
        for k in (4, 8):
            spectrum = jax.jit(
                lambda x, step=step, k=k: lyapunov_spectrum(step, x, steps=STEPS, k=k)
            )
            found.append((f"k = {k}", k + 1.5, spectrum))
        for label, allowed, other in found:
            times = paired(plain, other, x).ratio
            print(f"{name:22} {label:8} {times:6.2f}   (goal: at most {allowed})", flush=True)
        sizes = []
        for steps in (64, 1024):
            spectrum = jax.jit(
                lambda x, step=step, steps=steps: lyapunov_spectrum(step, x, steps=steps, k=4)
            )
            memory = spectrum.lower(x).compile().memory_analysis()
            assert memory is not None, "this backend does not report the memory of programs"
            sizes.append(memory.temp_size_in_bytes)
        print(f"{name:22} temporary memory, 1,024 steps over 64: {sizes[1] / sizes[0]:.3f}")
    print(f"measures of the defaults: {watching():.2%} of the time of updates (goal: under 2%)")


if __name__ == "__main__":
    main()
