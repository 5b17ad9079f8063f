"""What a run begins from and learns of: the parameters of another run, and a teacher.

For: `train.init_from` and `train.teacher`: opened, made to fit a vocabulary, or refused. Not for:
what a teacher teaches (`imitation.py`), or a run that goes on in its own directory (`longer.py`).
"""

import dataclasses
from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ngc_jax.core.params import ParamInfo
from ngc_jax.data.byte_pairs import BPE
from ngc_jax.data.tokenizer import Bytes, Ids, Symbols, Tokenizer, given_in
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.model import LanguageModel
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import Path
from ngc_jax.training.workdir import at_step

if TYPE_CHECKING:
    from ngc_jax.training.load import Trained

Array = jax.Array
LISTED = 6  # shapes that differ, in a message


def opened(config: ConfigDict, field: str, mesh: Mesh) -> "Trained | None":
    """The run that a field of `config.train` names, if any, on a mesh. Raises UserError."""
    from ngc_jax.training.load import load  # which trains by these files

    try:
        return load(*at_step(config.train[field]), mesh=mesh) if config.train[field] else None
    except UserError as error:
        raise UserError(f"train.{field}={config.train[field]!r}: {error}") from error


def tokenizer_of(config: ConfigDict, given: "Trained | None", workdir: Path) -> BPE | None:
    """The tokenizer that a run takes over; None: one of its own. Raises UserError."""
    if given is None:
        return given_in(workdir, config)
    ours, own = (_kind(c) for c in (config, given.config))
    if ours == own and isinstance(given.tokenizer, BPE):
        return given.tokenizer
    return given_in(given.workdir, config)


def fitted(
    begun: "Trained", model: LanguageModel, tokenizer: Tokenizer, config: ConfigDict, mesh: Mesh
) -> "tuple[Trained, str]":
    """A run whose parameters are a model's, and what is to be said of it.

    Its tokens keep their rows, wherever they are numbered now; rows of others are drawn, as those
    of a new run. Raises UserError where parameters, but for these rows, differ in shape.
    """
    info, drawn = model.param_info(), partial(model.init, jax.random.key(config.seed))
    wanted, rows = jax.eval_shape(drawn), _rows(begun, tokenizer, config)
    _check_shapes(begun, wanted, info)
    told = f"beginning with the parameters of {begun.workdir}, {begun.told}"
    if len(rows) != begun.tokenizer.vocab or np.any(rows != np.arange(len(rows))):

        def grown(params: Any) -> Any:
            def one(old: Array, new: Array, info: ParamInfo) -> Array:
                if info.kind != "embedding":
                    return old
                along = [1] * new.ndim
                along[_tokens(info)] = len(rows)
                kept = jnp.take(old, np.maximum(rows, 0), axis=_tokens(info))
                return jnp.where((rows >= 0).reshape(along), kept, new)

            return jax.tree.map(one, params, drawn(), info)

        place = meshes.shardings(jax.tree.map(partial(meshes.abstract_param, mesh), wanted, info))
        params = jax.jit(meshes.with_mesh(mesh, grown), out_shardings=place)(begun.params)
        begun = dataclasses.replace(begun, params=params)
        told += f"; {np.sum(rows < 0)} of {len(rows)} tokens are new: drawn by seed={config.seed}"
    was, now = begun.config.data.context, config.data.context
    if now > was and not config.model.attend:
        told += f"; data.context={now} is longer than {was} there: later positions may be new to it"
    return dataclasses.replace(begun, model=model), told


def check_teacher(
    teacher: "Trained", tokenizer: Tokenizer, config: ConfigDict, begun: "Trained | None"
) -> None:
    """Refuses a teacher of other tokens, or whose stages cannot be compared. Raises UserError."""
    if _names(teacher.tokenizer) != _names(tokenizer):
        _refuse_tokens(teacher, config, "must read the same tokens as this run")
    if config.train.imitate == "outputs":
        return
    shapes = (teacher.decoder.shape, config.model)
    own, ours = ((m.width, m.prelude + m.coda, m.core) for m in shapes)
    if own != ours:
        wants = f"must have (width, prelude + coda, core) = {ours} in config.model, not {own}"
        where = f"where train.imitate={config.train.imitate!r}; 'outputs' takes any"
        raise UserError(f"train.teacher={str(teacher.workdir)!r}: {wants}, {where}")
    table = teacher.params["embed"]
    if begun and jnp.linalg.norm(begun.params["embed"] - table) > jnp.linalg.norm(table):
        wants = "'outputs' where train.init_from has another basis of the stream, as --form=ports"
        raise UserError(f"train.imitate={config.train.imitate!r}: must be {wants}")


def put_params(mesh: Mesh, one: "Trained") -> Any:
    """The parameters of a run, laid out on a mesh."""
    place = partial(meshes.abstract_param, mesh)
    placed = meshes.shardings(jax.tree.map(place, one.params, one.model.param_info()))
    return jax.tree.map(jax.device_put, one.params, placed)


def _names(tokenizer: Tokenizer) -> list[Hashable]:
    """What each token is, however it is numbered: its spelling; a mark; or nothing but a number."""
    if isinstance(tokenizer, Symbols):
        return [*tokenizer.symbols]
    if isinstance(tokenizer, Ids):
        return [*range(tokenizer.vocab)]
    spelt = [*map(bytes, np.arange(256, dtype=np.uint8)[:, None]), b""]
    spelt = spelt if isinstance(tokenizer, Bytes) else tokenizer.spelling
    return [word or ("mark" if i == tokenizer.mark else i) for i, word in enumerate(spelt)]


def _rows(begun: "Trained", tokenizer: Tokenizer, config: ConfigDict) -> np.ndarray:
    """The row in `begun` of each token, -1 where it has none. UserError where it has more."""
    old, new = _names(begun.tokenizer), _names(tokenizer)
    if lost := len({*old} - {*new}):
        of = f"must read the same tokens as this run, or fewer; {lost} of {len(old)} are none of it"
        _refuse_tokens(begun, config, of)
    first = {name: row for row, name in reversed([*enumerate(old)])}
    same = (old[i : i + 1] == [name] for i, name in enumerate(new))  # some may be spelt alike
    found = enumerate(zip(new, same, strict=True))
    return np.array([i if alike else first.get(name, -1) for i, (name, alike) in found])


def _kind(config: ConfigDict) -> tuple[Any, ...]:
    return config.data.task, config.data.tokenizer, config.data.vocab_size


def _refuse_tokens(one: "Trained", config: ConfigDict, wants: str) -> None:
    kinds = f"(task, tokenizer, vocab_size) = {_kind(one.config)}, this run {_kind(config)}"
    raise UserError(f"{one.workdir} reads {kinds}: {wants}")


def _tokens(info: ParamInfo) -> int:
    """The axis of an embedding that counts tokens."""
    return info.axes.index("vocab") if "vocab" in info.axes else 0


def _check_shapes(begun: "Trained", wanted: Any, info: Any) -> None:
    found, ours, records = (flatten_dict(t, sep="/") for t in (begun.params, wanted, info))

    def sizes(tree: Any, name: str) -> list[int] | None:
        shape = [*tree[name].shape] if name in tree else None
        one = records.get(name)
        if shape and one is not None and one.kind == "embedding":
            del shape[_tokens(one)]  # whose rows may be others
        return shape

    pairs = {name: (sizes(found, name), sizes(ours, name)) for name in sorted({*found, *ours})}
    differ = [name for name, (was, now) in pairs.items() if was != now]
    differ.sort(key=lambda name: None in pairs[name])  # those that are in both come first
    apart = ["{} {} -> {}".format(name, *(s or "none" for s in pairs[name])) for name in differ]
    if apart:
        more = f"; and {len(apart) - LISTED} more" if len(apart) > LISTED else ""
        listed = f"{'; '.join(apart[:LISTED])}{more}"
        wants = "must have the parameters of config.model, so give the model's fields as there, or"
        wants = f"{wants} --config=stored:DIR; its shapes -> those of this run"
        raise UserError(f"train.init_from={str(begun.workdir)!r}: {wants}: {listed}")
