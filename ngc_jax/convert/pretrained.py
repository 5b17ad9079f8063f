"""Pretrained checkpoints as work directories, and work directories as checkpoints to publish.

For: `import_pretrained`, `export`, and `begin`, which makes a work directory of parameters. Not
for: files (`source.py`), what their fields and names mean (`config_json.py`, `names.py`), or other
forms of weights (`convert.py`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ngc_jax.config import base, make_model, reset_unread, validate
from ngc_jax.convert.config_json import config_of, fields_of
from ngc_jax.convert.names import read_params, tensors_of
from ngc_jax.convert.source import Lazy, open_source, unwritten, write_safetensors
from ngc_jax.data.tokenizer import Tokenizer, open_given, published, specially
from ngc_jax.nn.model import LanguageModel
from ngc_jax.nn.params import partition
from ngc_jax.runtime import checkpoint, fields, files
from ngc_jax.runtime.errors import UserError
from ngc_jax.training.load import Trained
from ngc_jax.training.optimizer import map_like_params
from ngc_jax.training.step import TrainState, init_state
from ngc_jax.training.workdir import claim, hold, identity, versions

CONTEXT = 512  # tokens of a window, where the model was made for more


def import_pretrained(
    source: str,
    workdir: files.Path,
    context: int = 0,
    compute_dtype: str = "float32",
    special_tokens: str = "",
) -> None:
    """Makes a work directory of a folder of safetensors, or a GGUF file, as its step 0.

    context: of `data.context`; 0: 512, or what the model was made for if that is less.
    compute_dtype: of `train.compute_dtype`; the parameters are in float32, as read.
    special_tokens: of `data.special_tokens`. Raises UserError for what is not read exactly, and for
    a directory that is not empty.
    """
    found = open_source(source)
    told = fields_of(found.config)
    longest = told["data.context"]
    wants = f"from 1 to {longest}, for which {source} was made"
    need = fields.refusals({"context": context})
    need(0 <= context <= longest, "context", wants)
    config = base()
    told |= {"data.context": context or min(longest, CONTEXT)}
    told |= {"train.compute_dtype": compute_dtype, "data.special_tokens": special_tokens}
    config.update_from_flattened_dict(told)
    tokenizer = open_given(found.tokenizer, config.data.vocab_size, found.path)
    reset_unread(config)
    validate(config)
    tokenizer = specially(tokenizer, config.data)
    model = make_model(config, tokenizer.vocab)
    params = read_params(found, jax.eval_shape(model.init, jax.random.key(0)))
    begin(workdir, config, tokenizer, params, f"{found.path.name}, SHA-256 {found.sha256}")


def begin(
    workdir: files.Path, config: ConfigDict, tokenizer: Tokenizer, params: Any, origin: str
) -> None:
    """Makes a work directory whose run stands at step 0 with these parameters.

    params: a tree like the model's. Raises UserError where the directory is in use or has anything
    in it, SaveFailed on a full disk.
    """
    home = epath.Path(workdir)
    with hold(home):
        if (home / "config.json").exists():
            raise UserError(f"--workdir={workdir} holds a run: give another, or empty it")
        config.train.ema = 0.0  # of updates, of which there are none
        claim(home, config, tokenizer)
        model = make_model(config, tokenizer.vocab)
        state = _begun(model, config, jax.tree.map(jax.device_put, params))
        meta = checkpoint.META | {"versions": versions(), "origin": origin}
        with checkpoint.Checkpoints(home / "checkpoints", config.checkpoint.keep) as checkpoints:
            checkpoints.save(0, state, meta | {"config": identity(config)})


def _begun(model: LanguageModel, config: ConfigDict, params: Any) -> TrainState:
    """`init_state` of these parameters, to the bit, whose moments of gradients take no memory."""
    info, abstract = model.param_info(), jax.eval_shape(lambda: params)
    trained = partition(info, info)[0]

    def begin() -> TrainState:
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
        return init_state(model, config.train, config.seed, blank)

    def rest() -> TrainState:
        state, drop = begin(), lambda moments: jax.tree.map(lambda _: None, moments)
        kept = map_like_params(drop, state.optimizer, trained)
        return dataclasses.replace(state, params=None, optimizer=kept)

    def fill(like: Any, made: Any) -> Any:
        return jax.device_put(unwritten(like.shape, like.dtype)) if made is None else made

    state = jax.jit(rest)()
    memory = jax.tree.map(fill, jax.eval_shape(begin).optimizer, state.optimizer)
    return dataclasses.replace(state, params=params, optimizer=memory)


def export(trained: Trained, folder: str, dtype: str = "float32") -> None:
    """Writes a folder of safetensors, under the published names, that transformers opens.

    Of a converted model it writes the factors, which `import_pretrained` alone reads. Raises
    UserError for a model without published names, such as one with a loop, and for that of a task.
    """
    tokenizer, more = published(trained.tokenizer, trained.config.data.task)
    config, params = trained.config, trained.params
    told = flatten_dict(config.to_dict(), sep=".") | {"data.vocab_size": trained.tokenizer.vocab}
    tensors = {name: _as(array, dtype) for name, array in tensors_of(params).items()}
    about = config_of(told) | {"torch_dtype": dtype}
    write_safetensors(folder, tensors, about, tokenizer, more=more)


def _as(array: np.ndarray, dtype: str) -> Lazy:
    """A tensor that is rounded to a dtype when it is written; whole numbers stay."""
    to = np.dtype(dtype) if array.dtype == np.float32 else array.dtype
    return Lazy(array.shape, to, lambda: array.astype(to, copy=False))
