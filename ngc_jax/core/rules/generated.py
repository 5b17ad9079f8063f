"""The generated rules: a nonlinear interaction of two states, so W is made before it acts.

For: `tanh`, `shift`, `riemannian`, `distance`, and single synapses, which save parameters, not
FLOPs. Not for: rules that never form W (`signal.py`), or using one (`__init__.py`, whose axes these
are). States start as N(0, 1), and gains, after a factor of n_in^(-1/2), where the W drawn has mean
square 1 / n_in.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.core.params import ParamInfo
from ngc_jax.core.rules.base import Rule, Sides, States, normal

Array = jax.Array
SHIFTS = (0, 2, 4)  # of `shift`; the first is the product as it is
ROLLS = 6  # of `riemannian`
FEATURES = 4  # of `tanh`, for each number of a state


class GeneratedRule(Rule):
    """A rule that makes W whole, and has one set of states for all neurons."""

    grouped = False
    amplitude: tuple[str, ...] = ("gain",)


class Tanh(GeneratedRule):
    """W = n_in^(-1/2) tanh(R P + b) diag(a) tanh(S P' + b')^T: states widened to f features.

    pre {"state": S [n_in, r], "map": P' [r, f], "bias": b' [f]}, post {"state": R [n_out, r],
    "map": P [r, f], "bias": b [f], "gain": a [f]}. r (n_in + n_out) + 8 r^2 + 12 r parameters.
    FLOPs: 2 f n_in n_out + 2 r f (n_in + n_out) to make W, 2 n_in n_out per token. Rank up to f.
    Source: ours. P and P' start as the same four reflections, times 0.5 to 1.5, so that all
    directions of a state are heard equally; a with a sign for each: straight parts cancel in part.
    """

    def init(self, key: Array, groups: int, n_in: int, n_out: int, dim: int) -> Sides:
        send, widen, receive = jax.random.split(key, 3)
        across = jax.random.normal(widen, (FEATURES, dim))
        across = across / jnp.linalg.norm(across, axis=1, keepdims=True)
        reflected = jnp.eye(dim) - 2 * across[:, :, None] * across[:, None, :]
        steep = jnp.linspace(0.5, 1.5, FEATURES)[:, None, None]
        wide = jnp.concatenate(list(steep * reflected), axis=1)
        both = {"map": wide, "bias": jnp.zeros(FEATURES * dim)}
        gain = jnp.repeat(jnp.tile(jnp.array([1.0, -1.0]), FEATURES // 2), dim)
        post = both | {"state": normal(receive, (n_out, dim), 1), "gain": gain}
        pre = both | {"state": normal(send, (n_in, dim), 1)}
        return pre, self.rescale(pre, post)

    def weights(self, pre: States, post: States) -> Array:
        sent, heard = (jnp.tanh(side["state"] @ side["map"] + side["bias"]) for side in (pre, post))
        return (heard * (post["gain"] * len(sent) ** -0.5)) @ sent.T


class Shift(GeneratedRule):
    """W = n_in^(-1/2) (c_0 q_0 + c_2 tanh(q_2) + c_4 tanh(q_4)), products with shifted states.

    q_k is R roll_k(S)^T / sqrt(r), and roll_k moves the numbers of a state k places round. pre S
    [n_in, r], post {"state": R [n_out, r], "gain": c [3]}, at start as 0.5 : 1 : -1 (with equal
    signs, short states make nearly one direction of W). r (n_in + n_out) + 3 parameters. FLOPs: 6 r
    and 2 tanh for each weight to make W, 2 n_in n_out per token. Full rank mostly. Source: ours.
    """

    def init(self, key: Array, groups: int, n_in: int, n_out: int, dim: int) -> Sides:
        send, receive = jax.random.split(key)
        pre, gain = normal(send, (n_in, dim), 1), jnp.array([0.5, 1.0, -1.0])
        return pre, self.rescale(pre, {"state": normal(receive, (n_out, dim), 1), "gain": gain})

    def weights(self, pre: States, post: States) -> Array:
        read = post["state"] * pre.shape[1] ** -0.5
        straight, *shifted = (read @ jnp.roll(pre, k, axis=1).T for k in SHIFTS)
        c = post["gain"] * len(pre) ** -0.5
        return c[0] * straight + c[1] * jnp.tanh(shifted[0]) + c[2] * jnp.tanh(shifted[1])


class Riemannian(GeneratedRule):
    """W = n_in^(-1/2) (c + v . sum_{k<6} tanh(A_k S[i] + b_k + A_k roll_k(R[j]))).

    h is r, or r + 1 where r is odd. pre S [n_in, r], post {"state": R [n_out, r], "map": A [6, h,
    r], "bias": b [6, h], "gain": v [h], "offset": c []}. r (n_in + n_out) + 6 h r + 7 h + 1
    parameters. FLOPs to make W: 12 h r (n_in + n_out), then 6 h tanh and 18 h for each weight; 2
    n_in n_out per token. Full rank in general. Source: after RieM (Pei et al., ICML 2024); its
    start is ours: tanh of a sum is mostly a sum, two directions of W, so features start in pairs
    that share A, with b = 1 and -1 and v of opposite sign: bumps, whose mean c takes away.
    """

    amplitude = ("gain", "offset")

    def init(self, key: Array, groups: int, n_in: int, n_out: int, dim: int) -> Sides:
        send, project, receive = jax.random.split(key, 3)
        pairs = (dim + 1) // 2
        sign = jnp.tile(jnp.array([1.0, -1.0]), pairs)
        post = {
            "state": normal(receive, (n_out, dim), 1),
            "map": jnp.repeat(normal(project, (ROLLS, pairs, dim), dim / 4), 2, axis=1),
            "bias": jnp.tile(sign, (ROLLS, 1)),
            "gain": sign,
            "offset": jnp.zeros(()),
        }
        pre = normal(send, (n_in, dim), 1)
        mean = jnp.mean(self.weights(pre, post)) * n_in**0.5
        return pre, self.rescale(pre, post | {"offset": -mean})

    def weights(self, pre: States, post: States) -> Array:
        rolled = jnp.stack([jnp.roll(post["state"], k, axis=1) for k in range(ROLLS)])
        heard = jnp.einsum("khr,kjr->khj", post["map"], rolled) + post["bias"][..., None]
        sent = jnp.einsum("khr,ir->khi", post["map"], pre)
        gain = jnp.broadcast_to(post["gain"], heard.shape[:2])
        flat = (a.reshape(-1, *a.shape[2:]) for a in (heard, sent, gain))
        return (post["offset"] + _sum_over_features(jnp.tanh, *flat)) * len(pre) ** -0.5


class Distance(GeneratedRule):
    """W[j, i] = n_in^(-1/2) sum_h w_h phi(|S[i, h] - R[j, h]|), phi(d) = (1 - 4.5 d^2) exp(-2 d^2).

    pre S [n_in, r], post {"state": R [n_out, r], "gain": w [r]}. r (n_in + n_out + 1) parameters.
    FLOPs to make W: r exp and 8 r for each weight; 2 n_in n_out per token. Full rank in general.
    Source: after DyN (Pei and Wang, ICML 2023); phi, of mean 0 over the places at start, is ours.
    """

    def init(self, key: Array, groups: int, n_in: int, n_out: int, dim: int) -> Sides:
        send, receive = jax.random.split(key)
        post = {"state": normal(receive, (n_out, dim), 1), "gain": jnp.ones(dim)}
        pre = normal(send, (n_in, dim), 1)
        return pre, self.rescale(pre, post)

    def weights(self, pre: States, post: States) -> Array:
        def phi(d: Array) -> Array:
            square = jnp.square(d)
            return (1 - 4.5 * square) * jnp.exp(-2 * square)

        return _sum_over_features(phi, post["state"].T, -pre.T, post["gain"]) * len(pre) ** -0.5


@dataclasses.dataclass(frozen=True)
class Singles(Rule):
    """W is 0 but at k places: single synapses, each from one neuron to one neuron.

    pre (), post {"state": c [k], "at": int32 [k], of W[j, i] n_in j + i}. k parameters, and k
    places, which are not trained and at the start lie evenly. FLOPs: 2 n_in n_out per token. Not in
    `RULES`: a place is worth its number where a trained matrix chose it.
    """

    n_in: int
    n_out: int
    grouped = False
    amplitude = ("state",)

    def init(self, key: Array, groups: int, n_in: int, n_out: int, dim: int) -> Sides:
        at = jnp.array(np.arange(dim) * (n_in * n_out) // dim, jnp.int32)
        return (), {"state": normal(key, (dim,), dim / n_out), "at": at}

    def weights(self, pre: States, post: States) -> Array:
        flat, known = jnp.zeros(self.n_out * self.n_in, post["state"].dtype), post["at"]
        # Not `set`, whose gradient asks which of two wrote last.
        flat = flat.at[known].add(post["state"], unique_indices=True, indices_are_sorted=True)
        return flat.reshape(self.n_out, self.n_in)

    def info(self, pre: States, post: States) -> tuple[Any, Any]:
        whole = {"state": ParamInfo("state", (None,), side="post")}
        return (), whole | {"at": ParamInfo("wiring", (None,), side="post")}


def _sum_over_features(
    function: Callable[[Array], Array], heard: Array, sent: Array, gain: Array
) -> Array:
    """sum_f gain[f] function(heard[f, j] + sent[f, i]): [n_out, n_in]."""

    @jax.checkpoint  # and one at a time: memory does not grow by n_in n_out for each
    def term(heard: Array, sent: Array, gain: Array) -> Array:
        return gain * function(heard[:, None] + sent)

    def add(total: Array, feature: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + term(*feature), None

    start = jnp.zeros((heard.shape[1], sent.shape[1]), jnp.result_type(heard, sent, gain))
    return jax.lax.scan(add, start, (heard, sent, gain))[0]
