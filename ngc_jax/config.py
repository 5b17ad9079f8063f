"""The config of a run: sections of fields put together, checked, and read from a file.

For: `base()`, which config files start from, `validate`, `make_model`, and the configs of
`configs/`. Not for: the fields, which stand in the `settings.py` of `data`, `nn` and `training`.
"""

import difflib
import os
import pathlib
import runpy
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

import ngc_jax.training.settings as training
from ngc_jax.data.settings import DATA
from ngc_jax.nn.settings import MODEL, kind_of, model_shape
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import check_fields, check_unread, refusals
from ngc_jax.runtime.files import ROOT, expand

if TYPE_CHECKING:
    from ngc_jax.nn.model import LanguageModel

__all__ = ["base", "make_model", "model_shape", "named", "reset_unread", "validate"]

SECTIONS = [training.RUN, DATA, MODEL, training.REWIRE, training.ITERATION, training.TRAIN]
SECTIONS += [training.EVAL, training.CHECKPOINT, training.MESH, training.STABILITY]
CONFIGS = ROOT / "configs"


def base() -> ConfigDict:
    """Every field at its default, as in `configs/defaults.py`."""
    config = training.RUN.defaults()
    for section in SECTIONS[1:]:
        config[section.name] = section.defaults()
    return config


def validate(config: ConfigDict, here: bool = True) -> None:
    """Refuses what cannot run, `here`: on the devices of this machine, and fields nobody reads.

    Raises UserError with the field, its value, and a value that works.
    """
    check_fields(config, SECTIONS)
    check_unread(config, SECTIONS)
    for section in SECTIONS:
        if here or section.name != "mesh":
            section.check(config, refusals(config))


def reset_unread(config: ConfigDict) -> dict[str, Any]:
    """Sets fields that nothing reads to their defaults; returns those that change, {path: default}.

    For a config made from another one, such as the dense counterpart of a model.
    """
    reset = {}
    for section in SECTIONS:
        for path, (field, _) in section.strays(config).items():
            section.of(config)[field.name] = reset[path] = field.default
    return reset


def make_model(config: ConfigDict, vocab: int) -> "LanguageModel":
    """The model that a config asks for, for a vocabulary. Raises UserError for an unknown kind."""
    return kind_of(config).make(config, vocab)


def config_names() -> list[str]:
    """The configs of `configs/`, by name."""
    return sorted(file.stem for file in CONFIGS.glob("*.py"))


def config_path(given: str) -> pathlib.Path:
    """The file of a config: a path, or the name of one in `configs/`.

    Raises UserError, with the names that there are.
    """
    path, name, known = expand(given), given.removesuffix(".py"), config_names()
    there = os.path.isfile(path)  # which does not raise, as of a name that is too long
    if there or name in known:
        return path if there else CONFIGS / f"{name}.py"
    near = difflib.get_close_matches(path.stem, known, 1)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    wants = f"give a file, or one of {', '.join(known)}{hint}"
    raise UserError(f"there is no config {given!r}: {wants}")


def named(name: str) -> ConfigDict:
    """The config of a file, or of a name in `configs/`. Raises UserError where there is none."""
    config: ConfigDict = runpy.run_path(str(config_path(name)))["get_config"]()
    return config
