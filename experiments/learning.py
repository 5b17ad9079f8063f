"""What training changed in a decoder: the ranks of its weights, the distance that its parameters
moved, the rotation of its tangent kernel.

For: `rich_or_lazy.py`, which compares a trained model with itself at initialization. Not for: the
measures of one array or one function (`experiments.tangent_kernel.py`).
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.tangent_kernel import effective_rank, movement, tangent_kernel
from ngc_jax.analysis.stability import of_synapses
from ngc_jax.core.rules import weights
from ngc_jax.data.batches import Batch
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel

Array = jax.Array
Params = dict[str, Any]


def generated(model: Decoder, params: Params) -> dict[str, dict[str, np.ndarray]]:
    """All weights, {stage: {"query": W [n_out, n_in], ...}}; under a message activation, those of
    open gates.
    """
    return of_synapses(
        model, params, lambda parts: reduce(jnp.add, (weights(*part) for part in parts))
    )


def effective_ranks(model: Decoder, params: Params) -> dict[str, dict[str, float]]:
    """The effective rank of each weight matrix, {stage: {"query": rank, ...}}."""
    found = generated(model, params)
    return {
        stage: {name: float(effective_rank(jnp.asarray(w))) for name, w in of.items()}
        for stage, of in found.items()
    }


def movements(model: LanguageModel, before: Params, after: Params) -> dict[str, float]:
    """|after - before| / |before| of the parameters of each kind (`ParamInfo`), {"state": ...}."""
    kinds = {path: info.kind for path, info in flatten_dict(model.param_info()).items()}
    old, new = flatten_dict(before), flatten_dict(after)
    chosen = {
        kind: [path for path, of in kinds.items() if of == kind]
        for kind in dict.fromkeys(kinds.values())
    }
    return {
        kind: float(movement([old[p] for p in at], [new[p] for p in at]))
        for kind, at in chosen.items()
    }


def logit_kernel(
    model: LanguageModel, params: Params, batch: Batch, *, projections: int = 4
) -> Array:
    """The tangent kernel of the logits z over states and matrices, between windows [B, T]: an
    estimate of K [B, B].

    K[a, b] = sum over t, v of <dz[a, t, v], dz[b, t, v]>, d the gradient. With u random signs [T,
    V], the tangent kernel of sum over t, v of u z has K as its mean over u; the estimate is the
    mean over some u, the same in each call, so that two kernels of a model differ by what it
    learned. (An alignment of two such estimates is not unbiased, being no linear function of them.)
    Gradients are by states and matrices alone, as arXiv 2310.08513 takes them by the weights whose
    rank it sets.
    """
    held, info = flatten_dict(params), flatten_dict(model.param_info())
    trained = {path: leaf for path, leaf in held.items() if info[path].weighs}

    def one(key: Array) -> Array:
        signs = jax.random.rademacher(key, (batch.inputs.shape[1], model.shape.vocab), jnp.float32)

        def projected(trained: Params, window: Array) -> Array:
            params = unflatten_dict(held | trained)
            return jnp.vdot(signs, model.apply(params, Batch(window[None]))[0])

        return tangent_kernel(projected, trained, batch.inputs)

    return jnp.mean(jax.lax.map(one, jax.random.split(jax.random.key(0), projections)), axis=0)
