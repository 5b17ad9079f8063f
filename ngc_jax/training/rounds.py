"""Training for iteration: the rounds of an update, which of them have gradients, and their losses.

For: `config.iteration`, the draw of an update's rounds, the weights of its read-outs, its FLOPs.
Not for: the loop (`core/communicate.py`), or rounds of a trained model (`evaluation.py`).
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # scipy.special is imported where it is used

from ngc_jax.count import forward_flops
from ngc_jax.data.batches import Batch
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel

Array = jax.Array
Apply = Callable[..., tuple[Array, Any]]  # (params, batch) -> logits [..., B, T, V]; and more
SIGMA = 0.5  # of the log of the Poisson's rate: Geiping et al. 2025, arXiv 2502.05171


def lognormal_poisson(mean: float, low: int, high: int) -> np.ndarray:
    """Shares [high - low + 1], sum 1, of r = 1 + Poisson(e^tau), tau normal with spread SIGMA.

    r has this mean, above 1, before it is cut to [low, high]; Geiping et al. call mean - 1 r-bar.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    rates = np.exp(math.log(mean - 1) - SIGMA**2 / 2 + SIGMA * nodes)
    at_most = scipy.special.pdtr(np.arange(low, high)[:, None] - 1, rates) @ weights / weights.sum()
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
    mark: int | None = None  # token whose occurrences are an example's rounds; None: drawn

    @property
    def most(self) -> int:
        """Rounds that no update exceeds."""
        return self.low + len(self.shares) - 1

    def draw(self, step: Array) -> Array:
        """The rounds of the update after `step` updates: [] int32."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        more = jax.random.categorical(key, jnp.log(jnp.array(self.shares)))
        return self.low + more.astype(jnp.int32)

    def apply(self, rounds: Array, key: Any = None) -> Apply:
        """`model.apply` with rounds [] or [B]: logits [S, B, T, V] and weights [S, B] of sum 1."""
        noise = partial(disturb, self.noise, key) if self.noise else None

        def apply(params: Any, batch: Batch) -> tuple[Array, Array]:
            own = rounds
            if self.mark is not None:
                own = jnp.clip(jnp.sum(batch.inputs == self.mark, axis=1), self.low, self.most)
            how: dict[str, Any] = {"rounds": own, "most": self.most, "backprop": self.backprop}
            how |= {"every": self.every, "disturb": noise}
            logits, made = self.model.iterate(params, batch, **how)
            last = jnp.arange(made.shape[0])[:, None] == made.shape[0] - 1
            # Before round 1 there is nothing to judge.
            weights = jnp.where(last, 1.0, jnp.where(made > 0, self.weight, 0.0))
            return logits, weights / jnp.sum(weights, axis=0)

        return apply

    def flops(self, params: Any, batch: Any) -> float:
        """FLOPs of an update's matrix products, mean over the draw; gradients cost two forwards."""
        one, two = (forward_flops(self.model.at(rounds).apply, params, batch) for rounds in (1, 2))
        # The loop of rounds before the last ones has no known length: its body is counted once.
        inside = (two - one) * (self.backprop < self.most)
        apply = self.apply(jnp.int32(self.most), jax.random.key(0))
        before = np.maximum(np.arange(self.low, self.most + 1) - self.backprop, 0) @ self.shares
        counted = forward_flops(apply, params, batch)
        return 3 * (counted - inside) + float(before) * (two - one)


def disturb(size: float, key: Array, x: Array, left: Array) -> Array:
    """A state after a round, and normal numbers, `size` times its token's root mean square."""
    length = jax.lax.stop_gradient(jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True)))
    drawn = jax.random.normal(jax.random.fold_in(key, left), x.shape, x.dtype)
    return x + size * length * drawn


def mark_of(config: Any) -> int | None:
    """The token, if any, whose occurrences are an example's rounds; no token sees across one."""
    return int(config.iteration.mark) if config.iteration.rounds == "marked" else None


def marked(model: LanguageModel, config: Any) -> Apply | None:
    """`model.apply`, and rounds [B, T], where an example has as many rounds as marks; else None."""
    mark, low = mark_of(config), config.iteration.low
    if not isinstance(model, Decoder) or mark is None:
        return None

    def apply(params: Any, batch: Batch) -> tuple[Array, Array]:
        tokens = batch.inputs
        rounds = jnp.clip(jnp.sum(tokens == mark, axis=1), low, tokens.shape[1])
        logits, _ = model.iterate(params, batch, rounds=rounds, backprop=1)
        return logits[-1], jnp.broadcast_to(rounds[:, None], tokens.shape)

    return apply


def make_iteration(model: LanguageModel, config: Any) -> Iteration | None:
    """What a config asks for; None where each update runs the model as `model.apply` does."""
    if not isinstance(model, Decoder):
        return None
    i = config.iteration
    low, high = (config.model.rounds,) * 2 if i.rounds == "fixed" else (i.low, i.high)
    backprop, every, count = i.backprop or high, i.supervise_every, high - low + 1
    if i.rounds == "fixed" and backprop == high and not every and not i.noise:
        return None
    shares = np.eye(count)[-1]  # 'fixed'; 'marked': for what is counted, as many as may be
    if i.rounds == "uniform":
        shares = np.full(count, 1 / count)
    if i.rounds == "lognormal_poisson":
        shares = lognormal_poisson(i.mean, low, high)
    drawn = (low, tuple(shares.tolist()), backprop, every, i.supervise_weight)
    return Iteration(model, *drawn, config.seed, i.noise, mark_of(config))
