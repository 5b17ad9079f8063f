"""The config of a run: sections of fields put together, checked, and read from a file.

For: `base()`, which config files start from, `validate`, `make_model`, and the configs of
`configs/`. Not for: the fields, which stand in the `settings.py` of `data`, `nn` and `training`.
"""

import difflib
import importlib.util
import pathlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from ngc_jax.data.settings import DATA
from ngc_jax.nn.settings import MODEL, kind_of, model_shape
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import check_fields, check_unread, refusals
from ngc_jax.training.settings import (
    CHECKPOINT,
    EVAL,
    ITERATION,
    MESH,
    REWIRE,
    RUN,
    STABILITY,
    TRAIN,
)

if TYPE_CHECKING:
    from ngc_jax.nn.model import LanguageModel

__all__ = ["base", "make_model", "model_shape", "named", "reset_unread", "validate"]

SECTIONS = (RUN, DATA, MODEL, REWIRE, ITERATION, TRAIN, EVAL, CHECKPOINT, MESH, STABILITY)
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def base() -> ConfigDict:
    """Every field at its default, as in `configs/defaults.py`."""
    config = RUN.defaults()
    for section in SECTIONS[1:]:
        config[section.name] = section.defaults()
    return config


def validate(config: ConfigDict) -> None:
    """Refuses what cannot run, and fields that nothing reads.

    Raises UserError with the field, its value, and a value that works.
    """
    check_fields(config, SECTIONS)
    check_unread(config, SECTIONS)
    for section in SECTIONS:
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
    path, known = pathlib.Path(given), config_names()
    if path.is_file():
        return path
    if given.removesuffix(".py") in known:
        return CONFIGS / f"{given.removesuffix('.py')}.py"
    near = difflib.get_close_matches(path.stem, known, 1)
    hint = "".join(f". Did you mean {name!r}?" for name in near)
    raise UserError(
        f"there is no config {given!r}: give a file, or one of {', '.join(known)}{hint}"
    )


def named(name: str) -> ConfigDict:
    """The config of a file, or of a name in `configs/`. Raises UserError where there is none."""
    config: ConfigDict = module_at(config_path(name)).get_config()
    return config


def module_at(path: pathlib.Path) -> ModuleType:
    """The module of a file that need not be in a package. Raises FileNotFoundError."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
