"""The optimizer: its schedule, its optax chain, and learning rates by kind of parameter.

For: all between a gradient and an update, by the run's own step, which a skipped update does not
shift. Not for: gradients, or their guard. `info`: records (`core/params.py`) of what is trained.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from ngc_jax.core.params import ParamInfo

Array = jax.Array
Tree = Any


def schedule(config: Any, step: Array) -> Array:
    """Share of the peak learning rate at a step (0 = first update): warm-up, "cosine" or "wsd"."""
    t, done = config, step.astype(jnp.float32) - config.warmup_steps
    if t.schedule == "cosine":
        shape = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done / (t.steps - t.warmup_steps), 0, 1)))
    else:
        decay = max(1.0, t.decay_fraction * t.steps)
        shape = jnp.clip((t.steps - step) / decay, 0, 1)
    warm = (step + 1) / (t.warmup_steps + 1)
    return jnp.minimum(warm, 1.0) * (t.final_fraction + (1 - t.final_fraction) * shape)


def stable_updates(config: Any) -> int:
    """Updates of 'wsd' up to its decay, which a longer run makes too, to the bit; else 0."""
    if config.schedule != "wsd":
        return 0
    return int(config.steps - max(1.0, config.decay_fraction * config.steps)) + 1


def make_optimizer(config: Any, info: Tree) -> optax.GradientTransformation:
    """Gradient -> direction: clip, AdamW or Muon, decay decoupled and of matrices and states."""
    direction = adam = optax.scale_by_adam(b1=config.b1, b2=config.b2)
    if config.optimizer == "muon":
        axes = lambda params: map_kept(_matrix_axes, params, info)  # noqa: E731
        # To AdamW's usual size, 0.2 per entry (arXiv 2502.16982, 2.2).
        scale = lambda u: u * (0.2 / jnp.sqrt(jnp.mean(jnp.square(u)) + 1e-12))  # noqa: E731
        scaled = optax.stateless(lambda updates, params: jax.tree.map(scale, updates))
        muon = optax.chain(scale_by_muon(weight_dimension_numbers=axes), scaled)
        chosen = {"state": muon, "matrix": muon, "embedding": adam, "scale": adam}
        labels = jax.tree.map(  # of a rule's states, biases and gains are scales
            lambda one: "scale" if one.kind == "state" and one.matrix is None else one.kind, info
        )
        direction = optax.partition(chosen, labels)
    decayed = jax.tree.map(lambda one: one.weighs, info)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), direction, decay)


def held(config: Any, params: Tree, info: Tree) -> Tree:
    """Parameters of which no gradient reaches those whose learning rate is 0, nor is clipped by."""
    moves = lambda one: one.kind == "state" or config.learning_rate > 0  # noqa: E731
    return jax.tree.map(lambda p, one: p if moves(one) else jax.lax.stop_gradient(p), params, info)


def apply(config: Any, params: Tree, direction: Tree, step: Array, info: Tree) -> Tree:
    """New parameters: states at their learning rate, all others at theirs."""
    share = schedule(config, step)

    def move(p: Array, d: Array, info: ParamInfo) -> Array:
        peak = config.state_learning_rate if info.kind == "state" else config.learning_rate
        return p - peak * share * d

    return jax.tree.map(move, params, direction, info)


def map_like_params(function: Callable[[Tree], Tree], memory: Tree, params: Tree) -> Tree:
    """function(tree) for each tree in the optimizer's memory that is parallel to the parameters."""

    def parallel(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == params.keys()

    visit = lambda node: function(node) if parallel(node) else node  # noqa: E731
    return jax.tree.map(visit, memory, is_leaf=parallel)


def map_kept(function: Callable[..., Any], node: Tree, info: Tree) -> Tree:
    """function(leaf, record) for the leaves of a tree that optax may have masked in part."""
    masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731
    each = lambda leaf, one: leaf if masked(leaf) else function(leaf, one)  # noqa: E731
    return jax.tree.map(each, node, info, is_leaf=masked)


def _matrix_axes(_: Array, info: ParamInfo) -> MuonDimensionNumbers:
    """The axes that make a matrix; those before them (stages, fan, groups) are a batch of them."""
    first = len(info.axes) + (info.matrix or -1)
    return MuonDimensionNumbers((first,), tuple(range(first + 1, len(info.axes))))
