"""Training for iteration: how many rounds an update has, which of them gradients go through, and
when it is judged.

For: reading `config.iteration`, the draw of an update's rounds, the weights of its read-outs, and
what it costs. Not for: the loop itself (`core/communicate.py`), or rounds of a trained model
(`evaluate.py`).

What is drawn follows from seed and update alone, so that a run that goes on draws what it would
have drawn.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from ngc_jax.core.communicate import undisturbed
from ngc_jax.count import forward_flops
from ngc_jax.data.tasks import both_ways
from ngc_jax.nn.decoder import Decoder

Array = jax.Array
# (params, tokens [B, T], segments) -> logits [..., B, T, V], and what else
Apply = Callable[..., tuple[Array, Any]]
DRAWS = ("fixed", "uniform", "lognormal_poisson", "marked")
SIGMA = 0.5  # of the log of the Poisson's rate: Geiping et al. 2025, arXiv 2502.05171


def lognormal_poisson(mean: float, low: int, high: int) -> np.ndarray:
    """Shares [high - low + 1] of r = 1 + Poisson(e^tau), tau normal with spread SIGMA, cut to [low,
    high]; sum is 1.

    Before it is cut r has this mean, above 1: Geiping et al. call mean - 1 r-bar. What lies beyond
    an end counts to it.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    rates = np.exp(math.log(mean - 1) - SIGMA**2 / 2 + SIGMA * nodes)
    # low, ... rounds
    at_most = special.pdtr(np.arange(low, high)[:, None] - 1, rates) @ weights / weights.sum()
    return np.diff(np.concatenate([[0.0], at_most, [1.0]]))


@dataclasses.dataclass(frozen=True)
class Iteration:
    """How the loop is run in an update; holds no arrays. Axes: S read-outs, B examples."""

    model: Decoder
    low: int  # fewest rounds
    shares: tuple[float, ...]  # of updates that have low, low + 1, ... rounds
    backprop: int  # last rounds that gradients go through, from 1 to most
    every: int  # rounds between read-outs, >= 1; 0: the last round alone is read out
    weight: float  # of a read-out before the last round, whose own is 1
    seed: int
    noise: float = 0.0  # added to the state after each round, as a share of its size
    # the token whose occurrences are an example's rounds; None: they are drawn
    mark: int | None = None

    @property
    def most(self) -> int:
        """Rounds that no update exceeds."""
        return self.low + len(self.shares) - 1

    def draw(self, step: Array) -> Array:
        """The rounds of the update after `step` updates: [] int32."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        return self.low + jax.random.categorical(key, jnp.log(jnp.array(self.shares))).astype(
            jnp.int32
        )

    def apply(self, rounds: Array, key: Array | None = None) -> Apply:
        """`model.apply` for training with these rounds, [] or one for each example, [B]; `key` is
        of the noise.

        It returns logits [S, B, T, V] and the weights [S, B] of the S read-outs, which sum to one
        for each example.
        """

        def apply(params: Any, tokens: Array, segments: Array | None = None) -> tuple[Array, Array]:
            own = rounds
            if self.mark is not None:
                own, segments = marks(tokens, self.mark, self.low, self.most)
            logits, made = self.model.iterate(
                params,
                tokens,
                segments,
                rounds=own,
                backprop=self.backprop,
                most=self.most,
                every=self.every,
                disturb=noise(self.noise, key) if self.noise else undisturbed,
            )
            last = jnp.arange(made.shape[0])[:, None] == made.shape[0] - 1
            # nothing to judge before round 1
            weights = jnp.where(last, 1.0, jnp.where(made > 0, self.weight, 0.0))
            return logits, weights / jnp.sum(weights, axis=0)

        return apply

    def flops(self, params: Any, tokens: Any) -> float:
        """FLOPs of the matrix products of an update, mean over the draw, for tokens [B, T].

        By the usual convention the backward pass is twice the forward pass of what has gradients,
        and recomputation is not counted. The last `backprop` rounds count in full, since they are
        computed also where an example rests.
        """
        one, two = (forward_flops(self.model.at(rounds).apply, params, tokens) for rounds in (1, 2))
        # The program's loop of rounds before the last ones is of unknown length, and its body is
        # counted once.
        inside = (two - one) * (self.backprop < self.most)
        counted = forward_flops(self.apply(jnp.int32(self.most), jax.random.key(0)), params, tokens)
        before = np.maximum(np.arange(self.low, self.most + 1) - self.backprop, 0) @ self.shares
        return 3 * (counted - inside) + float(before) * (two - one)


def noise(size: float, key: Array | None) -> Callable[[Array, Array], Array]:
    """What adds a normal number to each number of a state after a round, `size` times its token's
    root mean square.
    """
    assert key is not None

    def disturb(x: Array, left: Array) -> Array:
        length = jax.lax.stop_gradient(jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True)))
        return x + size * length * jax.random.normal(
            jax.random.fold_in(key, left), x.shape, x.dtype
        )

    return disturb


def marks(tokens: Array, mark: int, low: int, high: int) -> tuple[Array, Array]:
    """How often a token occurs in each example of tokens [B, T], low to high: [B]; and how often up
    to each: [B, T].

    The second serves as segments: marks are said to the loop, and no token looks back across one.
    So many marks are to a model what few are.
    """
    return jnp.clip(jnp.sum(tokens == mark, axis=1), low, high), jnp.cumsum(tokens == mark, axis=1)


def marked(model: Decoder | None, config: Any) -> Apply | None:
    """What stands for `model.apply` where each example has as many rounds as marks; None where no
    config asks for it.

    More than iteration.high too: that bounds training. It returns logits, and rounds [B, T].
    """
    i = config.iteration
    if model is None or i.rounds != "marked":
        return None

    def apply(params: Any, tokens: Array, segments: Array | None = None) -> tuple[Array, Array]:
        rounds, segments = marks(tokens, i.mark, i.low, tokens.shape[1])
        logits, _ = model.iterate(params, tokens, segments, rounds=rounds, backprop=1)
        return logits[-1], jnp.broadcast_to(rounds[:, None], tokens.shape)

    return apply


def make_iteration(model: Decoder, config: Any) -> Iteration | None:
    """What a run's config asks for; None where each update has `model.rounds` rounds, as
    `model.apply` does.
    """
    i = config.iteration
    low, high, shares = i.low, i.high, np.ones(1)
    if i.rounds == "fixed":
        low = high = config.model.rounds
    if i.rounds == "marked":
        shares = np.eye(high - low + 1)[-1]  # for what is counted: as many as may be
    if i.rounds == "uniform":
        shares = np.full(high - low + 1, 1 / (high - low + 1))
    if i.rounds == "lognormal_poisson":
        shares = lognormal_poisson(i.mean, low, high)
    backprop, every = i.backprop or high, i.supervise_every
    if i.rounds == "fixed" and backprop == high and not every and not i.noise:
        return None
    mark, weight = i.mark if i.rounds == "marked" else None, i.supervise_weight
    return Iteration(
        model, low, tuple(shares.tolist()), backprop, every, weight, config.seed, i.noise, mark
    )


def check(config: Any, need: Callable[[bool, str, str], None]) -> None:
    """The part of `config.validate` that is about `config.iteration`; need(holds, field, what it
    must be) refuses.
    """
    i, m = config.iteration, config.model
    need(i.rounds in DRAWS, "iteration.rounds", "one of " + ", ".join(map(repr, DRAWS)))
    loop = m.kind == "decoder" and m.core > 0
    for field, value, none in (
        ("iteration.rounds", i.rounds, "fixed"),
        ("iteration.backprop", i.backprop, 0),
        ("iteration.supervise_every", i.supervise_every, 0),
        ("iteration.noise", i.noise, 0),
        ("model.route", m.route, "state"),
        ("model.state_activation", m.state_activation, "none"),
    ):
        need(
            loop or value == none, field, f"{none!r} where the model has no loop (model.kind, core)"
        )
    unmarked = i.rounds != "marked" or not both_ways(config.data.task)
    need(
        unmarked,
        "iteration.rounds",
        f"another where data.task={config.data.task!r} is seen both ways, across marks",
    )
    most, of = m.rounds, f"model.rounds={m.rounds}"
    if i.rounds != "fixed":
        most, of = i.high, f"iteration.high={i.high}"
        need(i.low >= 1, "iteration.low", "1 or more")
        need(
            i.low <= i.high,
            "iteration.low",
            f"at most iteration.high={i.high}, for instance {max(1, i.high // 2)}",
        )
    need(i.noise >= 0, "iteration.noise", "0 or more, for instance 0.1")
    need(i.mark >= 0, "iteration.mark", "a token: 0 or more")
    need(i.mean > 1, "iteration.mean", "above 1, for instance 4.0")
    need(0 <= i.backprop <= most, "iteration.backprop", f"from 1 to {of}, or 0 for all rounds")
    driven = "0 where model.drive=False: rounds without a gradient would leave all before the loop untrained"
    need(m.drive or i.backprop in (0, most), "iteration.backprop", driven)
    judged = max(i.backprop or most, 1)
    within = (
        f"0, or below the {judged} rounds that gradients go through, for instance {judged // 2}"
    )
    need(0 <= i.supervise_every < judged, "iteration.supervise_every", within)
    need(i.supervise_weight > 0, "iteration.supervise_weight", "above 0, for instance 1.0")
