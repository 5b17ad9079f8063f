"""The work directory: what lies where, who may use it, and the config kept in it.

For: DIR/{config.json, tokenizer.json, metrics.jsonl, checkpoints/, card.md}, tensorboard/, damaged/
(checkpoints set aside), hang.txt (stacks), profile/, wandb/. Not for: rows, checkpoints, `load.py`.
"""

import contextlib
import datetime
import fcntl
import itertools
import json
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import flax
import jax
import optax
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ngc_jax.config import SECTIONS, base, reset_unread, validate
from ngc_jax.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from ngc_jax.runtime import fields, files, multihost
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import Path, in_bucket, place, read, read_json, sync, write_durably

# Settings of jax that change numbers, and that a user's environment may set.
NUMERIC = ["default_matmul_precision", "default_prng_impl", "threefry_partitionable"]
NUMERIC += ["random_seed_offset", "debug_nans", "optimization_level", "softmax_custom_jvp"]
NUMERIC += ["exec_time_optimization_effort", "memory_fitting_effort"]
NUMERIC += ["allow_f16_reductions", "high_dynamic_range_gumbel", "compiler_enable_remat_pass"]
# That is, of the compilers and libraries beneath it.
BENEATH = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "TF_CUDNN_DETERMINISTIC")
LARGEST = 1 << 20  # bytes of a config
# Fields that may change while a run continues: of logging, evaluation, saving, and devices.
# Where a text lies is free as well: a fingerprint says whether it is the same.
FREE = {"eval", "checkpoint", "mesh", "data.cache_dir", "data.tfds_data_dir"}
FREE |= {"data.path", "data.validation_path", "data.tokenizer_path"}
LOGGED = ("log_every", "patience", "trackers", "profile", "hang_minutes", "hang_exit")
FREE |= {f"train.{name}" for name in LOGGED}
FREE |= {f"stability.{name}" for name in ("every", "measures", "tokens", "rounds")}


def workdir_of(config_file: str) -> str:
    """The default work directory, runs/<config name>, of a config FILE or FILE:ARGUMENT."""
    return f"runs/{epath.Path(config_file.partition(':')[0]).stem}"


def at_step(given: str) -> tuple[Path, int | None]:
    """The work directory, and the step if it is given, of DIR or DIR:STEP."""
    home, _, step = given.rpartition(":")
    if home and step.isdecimal() and not (place(given) / "config.json").exists():
        return place(home), int(step)
    return place(given), None


def claim(workdir: Path, config: ConfigDict, tokenizer: Tokenizer, text: str = "") -> None:
    """Makes the work directory this run's own; UserError if it is another's, or unwritable."""
    here = f"--workdir={workdir}"
    with multihost.agreed():
        try:
            if multihost.first():
                _claim(workdir, config, tokenizer, text)
        except (OSError, ImportError) as error:  # ImportError: a bucket's package is missing
            raise UserError(f"{here} cannot be written ({error}): give one that can") from error
    with multihost.agreed():
        if not (workdir / "config.json").exists():
            shared = "give one on a file system that all processes share"
            raise UserError(f"{here}: made by process 0, but not seen by this one: {shared}")


def _claim(workdir: Path, config: ConfigDict, tokenizer: Tokenizer, text: str) -> None:
    here = f"--workdir={workdir}"
    inside = list(workdir.iterdir()) if workdir.is_dir() else []
    for path in () if in_bucket(workdir) else inside:
        if os.path.islink(path):
            raise UserError(f"{path} is a link, which a run does not follow: remove it")
    # What a claim that was killed may have left.
    begun = (".config.json", ".tokenizer.json", files.HOLDER, f".{files.HOLDER}")
    left = [path for path in inside if path.name == "tokenizer.json" or path.name.startswith(begun)]
    if (workdir / "config.json").exists():
        stored = read_config(workdir)
        changed = differences(stored.to_dict(), config.to_dict())
        more = [one.partition(":")[0] for one in changed] == ["train.steps"]
        longer = more and config.train.steps > stored.train.steps
        if changed and not longer:
            unlike = f"{here} holds a run of another config ({'; '.join(changed)})"
            wants = "give another --workdir, or the config it was made with"
            raise UserError(f"{unlike}: {wants}" + ", or more updates" * more)
        own = getattr(load_tokenizer(workdir, config.data), "serialised", "")
        if own != getattr(tokenizer, "serialised", ""):
            unlike = f"{here} holds a run of another tokenizer, so the text has changed"
            raise UserError(f"{unlike}: give the same text, or another --workdir")
        if longer:
            from ngc_jax.training.longer import lengthen  # which opens checkpoints

            lengthen(workdir, stored, config, text)
    elif workdir.is_file() or left != inside:
        raise UserError(f"{here} exists and holds no run: give another, or empty it")
    else:
        workdir.mkdir(parents=True, exist_ok=True)
        if not in_bucket(workdir):
            sync(workdir.parent)
        save_tokenizer(tokenizer, workdir)
        write_config(workdir, config)  # last, since it is what makes the directory a run's


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Keeps the config of a run, also with other values of FREE, once its data are known."""
    text = json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n"
    write_durably(workdir / "config.json", text)


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keeps other trainers out of a work directory; UserError where one holds it.

    The first process locks the directory, until it ends, and a file in it says who. Buckets have no
    locks; where a file system has none, that is said. An empty directory is removed at the end.
    """
    with multihost.agreed():
        handle = _lock(workdir) if multihost.first() and not in_bucket(workdir) else None
        if handle is not None:
            since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            who = f"process {os.getpid()} on {socket.gethostname()} since {since}"
            with contextlib.suppress(OSError):  # `claim` says what is wrong with it
                write_durably(workdir / files.HOLDER, who)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                (workdir / files.HOLDER).unlink(missing_ok=True)
                os.rmdir(workdir)
            os.close(handle)


def in_use(workdir: Path) -> bool:
    """Whether a trainer holds a work directory. Leaves jax's devices alone."""
    try:
        handle = _lock(workdir) if workdir.exists() else None
    except UserError:
        return True
    if handle is not None:
        os.close(handle)
    return False


def _lock(workdir: Path) -> int | None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = os.open(workdir, os.O_RDONLY)
    except OSError:  # `claim` says what is wrong with it
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        here, holder = f"--workdir={workdir}", "a process that is not named"
        with contextlib.suppress(OSError, ValueError):
            holder = read(workdir / files.HOLDER, 1000).decode()
        if isinstance(error, BlockingIOError):
            os.close(handle)
            told = f"{here} is in use by {holder}: wait for it, or give another"
            raise UserError(told) from error
        alone = f"see to it that no other process trains in it; the last one was {holder}"
        print(f"{here} cannot be locked ({error}): {alone}")
    return handle


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Fields outside of FREE in which two configs differ, as "field: old -> new"."""
    a, b = (flatten_dict(config, sep=".") for config in (old, new))
    changed = sorted(name for name in a | b if not _free(name) and a.get(name) != b.get(name))
    return [f"{n}: {a.get(n, 'absent')!r} -> {b.get(n, 'absent')!r}" for n in changed]


def identity(config: ConfigDict) -> dict[str, Any]:
    """What a checkpoint keeps of its config, as JSON: what is not FREE."""
    values = json.loads(json.dumps(flatten_dict(config.to_dict(), sep=".")))
    return {name: values[name] for name in values if not _free(name)}


def comparable(config: ConfigDict) -> dict[str, Any]:
    """The part of `identity` in which a checkpoint must be as its run: updates may have grown."""
    return {name: value for name, value in identity(config).items() if name != "train.steps"}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    own = sys.modules["ngc_jax"]  # loaded before all of its parts, which stand below it
    return {module.__name__: module.__version__ for module in (own, jax, flax, optax)}


def surroundings() -> dict[str, Any]:
    """What can change the last bits of a run that goes on elsewhere, for a checkpoint to keep."""
    cores = {"cores": len(os.sched_getaffinity(0))} if jax.default_backend() == "cpu" else {}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    asked = {name: os.environ.get(name, "") for name in BENEATH}
    # "": another version of jax, which has no such setting
    asked |= {f"jax_{name}": str(getattr(jax.config, f"jax_{name}", "")) for name in NUMERIC}
    return {**versions(), "devices": devices, **cores, **asked}


def _free(name: str) -> bool:
    return bool({name, name.partition(".")[0]} & FREE)


def read_config(workdir: Path) -> ConfigDict:
    """The config of a run; what is newer or unread has its default. Raises UserError."""
    path, config = workdir / "config.json", base()
    try:
        stored = read_json(path, LARGEST)
        parts = [part if isinstance(part, dict) else {"": part} for part in stored.values()]
        for value in itertools.chain(*(part.values() for part in parts)):
            most = 2**32 if isinstance(value, int) else float("inf")
            if isinstance(value, int | float) and not abs(value) < most:
                raise ValueError(f"{value!r:.40} is out of range")
        config.update(stored)
    except FileNotFoundError as error:
        raise UserError(f"--workdir={workdir} holds no run: no config.json in it") from error
    except (OSError, ImportError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for section in SECTIONS:
        for field in section.fields:
            value, known = section.of(config)[field.name], field.options()
            if known and value not in known:
                told = f"{workdir} was trained with {section.path(field.name)}={value!r}"
                give = "give the file that registers it by --extend=FILE.py, or import it first"
                raise UserError(f"{told}, which is not registered here: {give}")
    try:
        fields.check_fields(config, SECTIONS)
        reset_unread(config)  # as older versions let stand
        validate(config, here=False)  # a run of many devices is opened by one
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config
