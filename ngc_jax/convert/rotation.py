"""The stream of a dense model in another basis: the same outputs from rotated channels.

For: `rotated`, which gives each group of channels its share of the stream's large and small
principal components. An RMS norm without a scale commutes with a rotation (arXiv 2401.15024), so
scales go into the matrices that read. Not for: neurons of heads and of the MLP, which have a basis
of their own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # scipy.linalg is imported where it is used

from ngc_jax.config import make_model
from ngc_jax.convert.calibrate import Sums
from ngc_jax.nn import stacks
from ngc_jax.training.load import Trained

Array = np.ndarray
NORMS = {"query": "attention_norm", "key": "attention_norm", "gate": "exchange_norm"}


def dealt(inputs: Array, groups: int) -> Array:
    """A rotation Q [n, n], x = Q z, that deals the principal components of a Gram to groups.

    Like cards, the largest first: component i belongs to group i mod G.
    """
    vectors = scipy.linalg.eigh(inputs)[1][:, ::-1]
    return vectors[:, np.concatenate([np.arange(g, len(vectors), groups) for g in range(groups)])]


def rotated(trained: Trained, means: Sums, groups: int) -> tuple[Trained, Sums]:
    """A dense model without a loop whose stream is rotated by `dealt`, and the Grams of it.

    The scales of all norms of the stream are 1 after this, and so a tied head is no longer tied.
    """
    shape, params = trained.decoder.shape, jax.device_get(trained.params)
    stack, senders = stacks.join_stages(shape, params)
    stack = jax.tree.map(np.asarray, stack)
    reads = {name: NORMS[fan[0]] for name, fan in shape.fans().items() if fan[0] in NORMS}
    plain = {}  # the Grams [L, D, D] of what the norms give before their scales
    for name, norm in reads.items():
        scale = np.asarray(stack[norm]["scale"], np.float64)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        plain[name] = means["inputs"][name] * inverse[:, :, None] * inverse[:, None, :]
    turn = dealt(sum(gram.sum(axis=0) for gram in plain.values()), groups)
    made, inputs, grads = dict[str, Any](), dict(means["inputs"]), dict(means["grads"])
    for name, fan in shape.fans().items():
        weight = stack[name]["dense_block"]["weight"]  # [L, fan, 1, m, n]
        if name in reads:
            scale = stack[reads[name]]["scale"]
            weight = (weight * scale[:, None, None, None]) @ turn
            made[reads[name]] = {"scale": np.ones_like(scale)}
            inputs[name] = turn.T @ plain[name] @ turn
        else:
            weight = turn.T @ weight
            grads |= {member: turn.T @ grads[member] @ turn for member in fan}
        made[name] = {"dense_block": {"weight": weight}}
    head = params.get("unembed", params["embed"].T)
    ends = {"embed": params["embed"] @ turn, "norm": {"scale": np.ones(shape.width)}}
    ends["unembed"] = turn.T @ (params["norm"]["scale"][:, None] * head)
    params = stacks.split_stages(shape, params | ends, stack | made, senders)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    config = trained.config.copy_and_resolve_references()
    config.model.tied = False
    model = make_model(config, shape.vocab)
    turned = dataclasses.replace(trained, config=config, model=model, params=params)
    return turned, {"inputs": inputs, "grads": grads}
