"""Models of others as ours: the same logits, and the same bits when written back."""

import json
import pathlib

import jax
import numpy as np
import pytest
from conftest import ROOT

import ngc_jax
from ngc_jax.config import base, make_model, reset_unread, validate
from ngc_jax.convert.names import fields_of, read_params
from ngc_jax.convert.pretrained import export, import_pretrained
from ngc_jax.convert.source import Lazy, Source, open_source, write_safetensors
from ngc_jax.data.batches import Batch
from ngc_jax.runtime.errors import UserError

GOLDEN = sorted((ROOT / "tests" / "golden").glob("pretrained_*.npz"))


def golden(path):
    """Config, tensors, tokens [B, T] and logits [B, T, V] of a tiny model, made by its authors."""
    held = dict(np.load(path))
    config = json.loads(str(held.pop("config")))
    tokens, logits = held.pop("tokens"), held.pop("logits")
    return config, held, tokens, logits


def modelled(config, tensors):
    """Our model of a checkpoint, and its parameters."""
    ours = base()
    for name, value in fields_of(config).items():
        section, _, field = name.partition(".")
        ours[section][field] = value
    reset_unread(ours)
    validate(ours)
    model = make_model(ours, ours.data.vocab_size)
    lazy = {n: Lazy(t.shape, t.dtype, lambda t=t: t) for n, t in tensors.items()}
    source = Source(pathlib.Path("golden"), config, lazy, "", "")
    return model, read_params(source, jax.eval_shape(model.init, jax.random.key(0)))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem.partition("_")[2])
def test_logits_are_those_of_the_authors(path):
    config, tensors, tokens, logits = golden(path)
    model, params = modelled(config, tensors)
    found = jax.jit(lambda p, x: model.apply(p, Batch(x))[0])(params, tokens)
    np.testing.assert_allclose(found, logits, atol=1e-5)
    half = tokens.shape[1] // 2
    cache = model.init_cache(len(tokens), tokens.shape[1])
    decode = jax.jit(model.decode)
    first, cache = decode(params, tokens[:, :half], cache, np.int32(0))
    second, cache = decode(params, tokens[:, half:], cache, np.int32(half))
    np.testing.assert_allclose(np.concatenate([first, second], 1), logits, atol=1e-5)
