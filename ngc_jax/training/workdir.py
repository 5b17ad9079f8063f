"""The work directory: what lies where, who may use it, and opening a trained model from it.

For: the contract DIR/{config.json, tokenizer.json, metrics.jsonl, checkpoints/, tensorboard/,
card.md}, `damaged/` beside them where a checkpoint had to be set aside, hang.txt where it hung,
profile/ where it was traced. Not for: writing rows or checkpoints.
"""

import argparse
import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ngc_jax.config import base, make_model
from ngc_jax.data.tokens import Tokenizer, load_tokenizer, save_tokenizer
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel, Params
from ngc_jax.runtime import multihost as processes
from ngc_jax.runtime.checkpoint import Checkpoints
from ngc_jax.runtime.errors import UserError, fail
from ngc_jax.runtime.files import Path, in_bucket, write_durably
from ngc_jax.training.rewiring import pruned
from ngc_jax.training.step import TrainState, init_state


def claim(workdir: Path, config: ConfigDict, tokenizer: Tokenizer) -> None:
    """Make the work directory this run's own. Raises UserError if it cannot be written or is
    another run's.

    Of many processes the first does it, and all of them must see it.
    """
    with processes.agreed():
        if processes.first():
            _claim(workdir, config, tokenizer)
    with processes.agreed():
        if not (workdir / "config.json").exists():
            shared = "give a directory on a file system that all processes share"
            raise UserError(
                f"--workdir={workdir}, as process 0 has made it, is not to be seen here: {shared}"
            )


def _claim(workdir: Path, config: ConfigDict, tokenizer: Tokenizer) -> None:
    try:
        if (workdir / "config.json").exists():
            changed = differences(read_config(workdir).to_dict(), config.to_dict())
            if changed:
                raise UserError(
                    f"--workdir={workdir} holds a run of another config ({'; '.join(changed)}): "
                    "give another --workdir, or the config that it was made with"
                )
        elif workdir.exists() and (
            not workdir.is_dir() or any(not _ours(path) for path in workdir.iterdir())
        ):
            raise UserError(
                f"--workdir={workdir} is there already and is no run's: give another, or empty it"
            )
        else:
            workdir.mkdir(parents=True, exist_ok=True)
            save_tokenizer(tokenizer, workdir)
        # Last, for it is what makes the directory a run's.
        write_durably(
            workdir / "config.json", json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n"
        )
    except (OSError, ImportError) as error:  # ImportError: a bucket's package is missing
        raise UserError(
            f"--workdir={workdir} cannot be written ({error}): give a directory that can"
        ) from error


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keep other trainers out of a work directory while the block runs. Raises UserError where one
    is in it.

    Held by a lock on the directory, which goes when its process does, however that ends; of many
    processes the first holds it. A directory that has nothing in it at the end is removed. Buckets,
    and some file systems, have no locks.
    """
    with processes.agreed():
        handle = _lock(workdir) if processes.first() and not in_bucket(workdir) else None
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                os.rmdir(workdir)
            os.close(handle)


def _lock(workdir: Path) -> int | None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = os.open(workdir, os.O_RDONLY)
    except OSError:  # `claim` says what is wrong with it
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(
            f"--workdir={workdir} is in use by another process: wait for it, or give another"
        ) from error
    except OSError:
        pass  # a file system without locks
    return handle


def in_use(workdir: Path) -> bool:
    """Whether a trainer is in a work directory."""
    if not workdir.exists():
        return False
    try:
        # not `hold`, which asks jax for its devices: who only asks must not take them
        handle = _lock(workdir)
    except UserError:
        return True
    if handle is not None:
        os.close(handle)
    return False


def _ours(path: Path) -> bool:
    """Whether `claim` may have left this, killed before it came to its end."""
    return path.name == "tokenizer.json" or path.name.startswith(
        (".config.json", ".tokenizer.json")
    )


def workdir_of(config_file: str) -> str:
    """The default work directory, runs/<config name>, for a config file given as PATH or
    PATH:ARGUMENT.
    """
    return f"runs/{epath.Path(config_file.partition(':')[0]).stem}"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Fields of two configs that make two different runs, as "field: old -> new".

    How often a run is logged, evaluated and saved, and on what devices, may change while it goes
    on.
    """
    free = {
        "eval",
        "checkpoint",
        "mesh",
        "data.cache_dir",
        "data.tfds_data_dir",
        "train.log_every",
        "train.profile",
    }
    free |= {"train.hang_minutes", "train.hang_exit"}
    free |= {f"stability.{name}" for name in ("every", "measures", "tokens", "rounds")}

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        leaves: dict[str, Any] = {}
        for name, value in tree.items():
            path = prefix + name
            if path not in free:
                leaves |= flat(value, path + ".") if isinstance(value, dict) else {path: value}
        return leaves

    a, b = flat(old), flat(new)
    return [
        f"{k}: {a.get(k, 'absent')!r} -> {b.get(k, 'absent')!r}"
        for k in sorted(a | b)
        if a.get(k) != b.get(k)
    ]


def read_config(workdir: Path) -> ConfigDict:
    """The config of a run. Raises UserError if there is none."""
    try:
        stored = json.loads((workdir / "config.json").read_text())
        # a run of an older version gets the defaults of the fields that it did not know
        config = base()
        config.update(stored)
    except FileNotFoundError as error:
        raise UserError(f"--workdir={workdir} holds no run: no config.json in it") from error
    except (OSError, ImportError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{workdir / 'config.json'} cannot be read: {error}") from error
    return config


class Trained(NamedTuple):
    """A model as it was after `step` updates: the model and what it takes, and the state of the run
    that it is from.
    """

    config: ConfigDict
    model: LanguageModel
    params: Params
    tokenizer: Tokenizer
    step: int
    state: TrainState
    meta: dict[str, Any]

    @property
    def decoder(self) -> Decoder:
        """The model, where its stages are asked for. Raises UserError for one that has none."""
        if not isinstance(self.model, Decoder):
            raise UserError(
                f"model.kind={self.config.model.kind!r} has no stages to measure; 'decoder' has"
            )
        return self.model

    @property
    def looped(self) -> Decoder:
        """The model, where a number of rounds is asked for. Raises UserError for one that has no
        loop.
        """
        if not self.decoder.shape.core:
            raise UserError(
                "--rounds: the model has no loop (model.core=0), so there is nothing to repeat"
            )
        return self.decoder


def open_trained(workdir: Path, step: int | None = None) -> Trained:
    """Read the newest sound checkpoint, or that of `step`. Changes nothing. Raises UserError."""
    config = read_config(workdir)
    tokenizer = load_tokenizer(workdir)
    model = make_model(config, tokenizer.vocab)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        wanted, faults = (step, {}) if step is not None else checkpoints.newest_sound()
        for bad, damage in faults.items():
            print(f"checkpoint {bad} is passed over: {damage}", file=sys.stderr)
        steps = checkpoints.steps()
        if wanted is None or wanted not in steps:
            named = "no sound checkpoint" if wanted is None else f"no checkpoint {wanted}"
            raise UserError(f"--workdir={workdir} holds {named}; there are: {steps or 'none'}")
        fault = checkpoints.fault(wanted)
        if fault is not None:
            raise UserError(f"checkpoint {wanted} in {workdir} is not sound: {fault}")
        read = checkpoints.restore(wanted, jax.tree.map(_here, abstract_state(model, config)))
    finally:
        checkpoints.close()
    model, params = pruned(model, read.state.params, config, wanted)
    return Trained(config, model, params, tokenizer, wanted, read.state, read.meta)


def abstract_state(model: LanguageModel, config: ConfigDict) -> TrainState:
    """Shapes and dtypes of a run's state; nothing is allocated."""
    return jax.eval_shape(lambda: init_state(model, config.train, 0))


def _here(leaf: Any) -> jax.ShapeDtypeStruct:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every command on a work directory takes."""
    arguments = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    arguments.add_argument(
        "--workdir", type=epath.Path, required=True, help="work directory of a run"
    )
    arguments.add_argument(
        "--step", type=int, help="checkpoint to read; default: the newest sound one"
    )
    return arguments


def rounds(text: str) -> int:
    """A number of rounds as it is written on a command line. Raises UserError."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--rounds={text}: must be 1 or more, for instance 8")
    return int(text)


def command(main: Callable[[], None]) -> None:
    """Run a command; a UserError becomes one line and exit code 2."""
    logging.set_verbosity(logging.ERROR)
    try:
        main()
    except UserError as error:
        fail(2, error)
    except BrokenPipeError:
        sys.exit(1)
