"""What all tests share: a small text, small configs, and commands run as a user would run them."""

import os
import pathlib
import random
import signal
import subprocess
import sys
from importlib.metadata import version
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
# Processes that tests start compile the same programs again and again: let them share.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["JAX_PLATFORMS"] = "cpu"
# A shell starts what it runs in the background with Ctrl-C ignored, nohup with SIGHUP ignored, and
# processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# What is tested is what programs do, and compiling them is most of the time. (CI's main job runs as
# a user's does.)
QUICK = "--xla_backend_optimization_level=0"
# its older code generator takes half the time; later ones know no other
if version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
# XLA's CPU backend forgets the order of collectives in a program that it reads from the compilation
# cache, and so several devices in one process may wait for each other for ever; scheduled like this
# they do not.
QUICK += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from ngc_jax.config import base  # noqa: E402
from ngc_jax.data import NOTHING  # noqa: E402
from ngc_jax.data.batches import Batch, next_token_targets, segments_of  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that at the end no core waits for another."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


WORDS = [
    "group",
    "state",
    "signal",
    "round",
    "port",
    "weight",
    "drive",
    "neuron",
    "token",
    "core",
    "leak",
    "send",
    "read",
    "rule",
]


def make_text(size: int, seed: int = 0) -> str:
    """Lines of words from a fixed generator: the same on every Python."""
    words = random.Random(seed)
    lines, length = [], 0
    while length < size:
        lines.append(" ".join(words.choice(WORDS) for _ in range(words.randint(3, 9))))
        length += len(lines[-1]) + 1
    return "\n".join(lines) + "\n"


def batch_of(tokens: np.ndarray, mark: int = NOTHING, boundary: int | None = None) -> Batch:
    """The batch of rows of tokens [B, T + 1], as `Windows` makes its examples."""
    tokens = np.asarray(tokens)
    segments = segments_of(tokens[:, :-1], boundary)
    return Batch(tokens[:, :-1], next_token_targets(tokens, mark), segments)


def shaken(tree: Any, seed: int = 7) -> Any:
    """Parameters a little away from the special values of their start (zeros, ones, equal leaks):
    each matters. Wirings stay.
    """
    # not jax.random, which would compile a program for each shape
    draw = np.random.default_rng(seed)

    def one(p: Any) -> Any:
        if np.issubdtype(p.dtype, np.integer):
            return p
        return jax.device_put(np.float32(p + 0.1 * draw.standard_normal(p.shape)))

    return jax.tree.map(one, tree)


def drawn(model: Any) -> Any:
    """Parameters of ordinary sizes, none at the special values of its start.

    From NumPy: a program that draws them takes as long to compile as the model.
    """
    draw = np.random.default_rng(7)

    def one(leaf: Any, info: Any) -> jax.Array:
        values = draw.standard_normal(leaf.shape)
        if info.kind == "scale":
            values = 1 + 0.1 * values
        elif info.matrix is not None:
            values = values * leaf.shape[info.matrix] ** -0.5
        return jax.device_put(values.astype(leaf.dtype))

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(one, shapes, model.param_info())


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(make_text(60_000))
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("cache")


TINY = {
    "data.context": 16,
    "model.width": 16,
    "model.hidden": 32,
    "model.groups": 4,
    "model.heads": 2,
    "model.prelude": 0,  # the loop alone: each stack of stages is one more thing to compile
    "model.coda": 0,
    "train.steps": 30,
    "train.batch_size": 8,
    "train.warmup_steps": 3,
    "train.log_every": 1,
    "eval.every": 10,
    "eval.windows": 16,
    "eval.batch_size": 8,
    "checkpoint.every_steps": 5,
    "stability.every": 10,
    "stability.tokens": 64,
    "stability.rounds": 3,
}
WHOLE = {**TINY, "model.prelude": 1, "model.coda": 1}


@pytest.fixture
def tiny(text: pathlib.Path, cache: pathlib.Path) -> ConfigDict:
    """A run of seconds."""
    config = base()
    config.update_from_flattened_dict(TINY)
    config.data.path, config.data.cache_dir = str(text), str(cache)
    return config


@pytest.fixture
def tiny_flags(text: pathlib.Path, cache: pathlib.Path) -> list[str]:
    """The same run on a command line, but for what it would measure of stability, which is most of
    what it compiles.
    """
    fields = {**TINY, "stability.every": 0, "data.path": text, "data.cache_dir": cache}
    return [
        "--config=configs/ngc_tiny.py",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def launch(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run launch.py to its end."""
    return python("launch.py", *args, **environment)


def python(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository's root."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(autouse=True)
def nothing_outlives_its_test(monkeypatch):
    """Kills what a test has started and, since it failed, not ended."""
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args: Any, **more: Any):
            super().__init__(*args, **more)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    yield
    for process in started:
        if process.poll() is None:
            process.kill()
