"""The cost of the training loop relative to a bare step, and of its input and checkpoints.

    python -m benchmarks.loop

For: three measurements of `train.run` on configs/defaults.py. First, the loop's time of an update
in its log, over that of a step written by hand: the same model and optax's AdamW, fed from memory,
without checks and with the loss as only scalar. Second, the input pipeline alone. Third, how long
the loop waits at a checkpoint. Not for: the parts of an update.
"""

import argparse
import contextlib
import io
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from benchmarks.timing import model_of
from ngc_jax.config import base
from ngc_jax.data.batches import Batch, train_batches
from ngc_jax.data.tokens import load_data
from ngc_jax.runtime.checkpoint import Checkpoints
from ngc_jax.runtime.metrics import read_rows
from ngc_jax.training.loop import run
from ngc_jax.training.step import init_state


def short(args: argparse.Namespace, home: pathlib.Path) -> ConfigDict:
    """The defaults for a few updates on this package's source: no other work until the last."""
    text = b"".join(
        path.read_bytes()
        for path in sorted(pathlib.Path(__file__).parent.parent.rglob("ngc_jax/*.py"))
    )
    (home / "text").mkdir()
    (home / "text" / "source.txt").write_bytes(text)
    config = base()
    config.data.path, config.data.cache_dir = str(home / "text"), str(home / "cache")
    config.model.width, config.model.hidden = args.width, 3 * args.width
    config.train.batch_size, config.train.steps, config.train.warmup_steps = (
        args.batch_size,
        args.updates,
        1,
    )
    config.train.log_every = max(1, args.updates // 10)
    config.eval.every = config.checkpoint.every_steps = args.updates
    config.eval.windows = 1
    config.stability.every = 0
    return config


def batches(config: ConfigDict) -> Iterator[Batch]:
    """The batches of a run."""
    windows = load_data(config.data).train
    return train_batches(
        windows,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start=0,
        stop=config.train.steps,
    )


def of_the_loop(config: ConfigDict, workdir: pathlib.Path) -> float:
    """Seconds of an update in the log of a whole run: the median without the first laps."""
    with contextlib.redirect_stdout(io.StringIO()):
        run(config, workdir)
    tokens = config.train.batch_size * config.data.context
    laps = [
        tokens / row["tokens_per_second"]
        for row in read_rows(workdir)
        if "tokens_per_second" in row
    ]
    return statistics.median(laps[2:])  # the first is one update, the second still warms up


def bare(config: ConfigDict) -> Callable[[], float]:
    """A function that trains with a step written by hand, for as many updates as the run, and
    returns the median seconds of an update.
    """
    model, train = model_of(config), config.train
    rates = optax.warmup_cosine_decay_schedule(
        0, train.learning_rate, train.warmup_steps, train.steps
    )
    adam = optax.adamw(rates, b1=train.b1, b2=train.b2, weight_decay=train.weight_decay)
    chain = optax.chain(optax.clip_by_global_norm(train.clip_norm), adam)

    def loss(params: Any, batch: Batch) -> jax.Array:
        logits, _ = model.apply(params, batch)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.maximum(batch.targets, 0)
        ).mean()

    def step(params: Any, memory: Any, batch: Batch) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, memory = chain.update(grads, memory, params)
        return optax.apply_updates(params, updates), memory, value

    params = jax.jit(model.init)(jax.random.key(0))
    memory = chain.init(params)
    fed = [jax.device_put(batch) for batch in batches(config)]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, memory, fed[0]).compile()

    def lap(part: list[Batch]) -> float:
        nonlocal params, memory
        began = time.perf_counter()
        for batch in part:
            params, memory, value = compiled(params, memory, batch)
        jax.block_until_ready(value)
        return (time.perf_counter() - began) / len(part)

    size = train.log_every
    return lambda: statistics.median(lap(fed[at : at + size]) for at in range(size, len(fed), size))


def of_the_input(config: ConfigDict) -> float:
    """Seconds of a batch, without training."""
    ahead = batches(config)
    next(ahead)
    began = time.perf_counter()
    read = sum(1 for _ in ahead)
    return (time.perf_counter() - began) / read


def of_a_save(config: ConfigDict, home: pathlib.Path, saves: int = 5) -> tuple[float, float]:
    """Median seconds that the loop waits for a save, and until the save is on disk and sealed."""
    state = jax.jit(lambda: init_state(model_of(config), config.train, 0))()
    jax.block_until_ready(state)
    checkpoints = Checkpoints(home)
    waits, wholes = [], []
    for step in range(saves):
        began = time.perf_counter()
        checkpoints.save(step, state, {})
        waits.append(time.perf_counter() - began)
        checkpoints.wait()
        wholes.append(time.perf_counter() - began)
    checkpoints.close()
    return statistics.median(waits[1:]), statistics.median(wholes[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--updates", type=int, default=50, help="of a run, at least 30")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder)
        config = short(args, home)
        by_hand = bare(config)
        by_hand()
        pairs = [(by_hand(), of_the_loop(config, home / str(pair))) for pair in range(args.pairs)]
        plain, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        device = jax.devices()[0].device_kind
        print(f"jax {jax.__version__}, {device}; the defaults at width {args.width}")
        print(f"update: bare step {1e3 * plain:.1f} ms, our loop {1e3 * ours:.1f} ms")
        print(f"ratio, median of {len(pairs)} pairs: {ratio:.3f}")
        tokens, read = config.train.batch_size * config.data.context, of_the_input(config)
        print(
            f"input alone: {tokens / read:,.0f} tokens/s, {ours / read:.0f} times the loop's rate"
        )
        wait, whole = of_a_save(config, home / "saves")
        print(f"save: the loop waits {1e3 * wait:.0f} ms, {wait / ours:.2f} updates")
        print(f"save: sealed after {1e3 * whole:.0f} ms")


if __name__ == "__main__":
    main()
