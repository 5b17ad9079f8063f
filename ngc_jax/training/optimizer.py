"""The optimizer: what each parameter is to it (a state, a matrix, the rest), its schedule, and its
optax chain.

For: everything between a gradient and an update. Not for: gradients, or the guard against bad ones
(`steps.py`).

Learning rates are applied to the chain's output as a function of the run's own step, not of
counters inside the optimizer, so that a skipped update cannot shift the schedule.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from ngc_jax.core.rules import RULES

Array = jax.Array
Tree = Any
_GROUPED = [name for name, rule in RULES.items() if rule.grouped]


def kind(path: tuple[Any, ...]) -> str:
    """What the leaf at a tree path is: "state", "matrix", "embedding", "scale" (norms, leak,
    drive), or "wiring".

    A wiring says who hears whom; it is no parameter, and no optimizer sees it.
    """
    names = [str(getattr(key, "key", key)) for key in path]
    if names[-1] == "hears":
        return "wiring"
    # whatever a rule keeps there: what neurons share goes with their states
    if "pre" in names or "post" in names:
        return "state"
    if names[-1] == "weight":
        return "matrix"
    return "embedding" if names[-1] in ("embed", "unembed") else "scale"


def kinds(params: Tree) -> Tree:
    """The kind of each parameter, as a tree."""
    return jax.tree_util.tree_map_with_path(lambda path, _: kind(path), params)


def schedule(config: Any, step: Array) -> Array:
    """Share of the peak learning rate at a step (0 = first update): warm-up, then "cosine" or
    "wsd".
    """
    t = config
    done = step.astype(jnp.float32) - t.warmup_steps
    left = t.steps - t.warmup_steps
    if t.schedule == "cosine":
        shape = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done / left, 0, 1)))
    else:
        decay = max(1.0, t.decay_fraction * t.steps)
        shape = jnp.clip((t.steps - step) / decay, 0, 1)
    warm = (step + 1) / (t.warmup_steps + 1)
    return jnp.minimum(warm, 1.0) * (t.final_fraction + (1 - t.final_fraction) * shape)


def optimizer(config: Any) -> optax.GradientTransformation:
    """Gradient -> direction, before the learning rate: clip, AdamW or Muon, decoupled decay of
    matrices and states.

    Norm scales, leak, drive and embeddings are not decayed.
    """
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2)
    if config.optimizer == "muon":
        muon = optax.chain(scale_by_muon(weight_dimension_numbers=_matrix_axes), _match_adam_rms())
        chosen = {"state": muon, "matrix": muon, "embedding": adam, "scale": adam}
        direction = optax.partition(chosen, _directions)
    else:
        direction = adam
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(
            config.weight_decay,
            mask=lambda p: jax.tree.map(lambda k: k in ("state", "matrix"), kinds(p)),
        ),
    )


def apply(config: Any, params: Tree, direction: Tree, step: Array) -> Tree:
    """New parameters: each kind at its own learning rate."""
    share = schedule(config, step)

    def move(path: tuple[Any, ...], p: Array, d: Array) -> Array:
        peak = config.state_learning_rate if kind(path) == "state" else config.learning_rate
        return p - peak * share * d

    return jax.tree_util.tree_map_with_path(move, params, direction)


def _directions(params: Tree) -> Tree:
    """Kinds as they are for Muon: of what a rule keeps, biases and gains are no matrices and go
    with the scales.
    """

    def label(path: tuple[Any, ...], p: Array) -> str:
        is_matrix = path[-1].key in ("pre", "post", "state", "map")
        return "scale" if kind(path) == "state" and not is_matrix else kind(path)

    return jax.tree_util.tree_map_with_path(label, params)


def _matrix_axes(params: Tree) -> Tree:
    """Which axes of a parameter make a matrix for Muon; stages, fan and groups are a batch of them.

    States are [stage, fan, group, neuron, partner, port], with as many trailing axes as the rule
    has; of maps and of other matrices it is the last two axes.
    """

    def axes(path: tuple[Any, ...], p: Array) -> MuonDimensionNumbers:
        if path[-1].key in ("map", "weight"):
            return MuonDimensionNumbers((p.ndim - 2,), (p.ndim - 1,))
        first = 3 if any(key.key.partition("_")[2] in _GROUPED for key in path) else 2
        return MuonDimensionNumbers((first,), tuple(range(first + 1, p.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)


def _match_adam_rms() -> optax.GradientTransformation:
    """Scale Muon's orthogonal directions to AdamW's usual size, 0.2 per entry (arXiv 2502.16982,
    section 2.2).
    """

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        return jax.tree.map(
            lambda u: u * (0.2 / jnp.sqrt(jnp.mean(jnp.square(u)) + 1e-12)), updates
        ), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
