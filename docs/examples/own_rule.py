"""A rule: python launch.py --config=ngc_tiny --extend=own_rule.py --config.model.rule=mine"""

from ngc_jax.core.rules import RULES, Rule
from ngc_jax.core.rules.base import normal


class Directions(Rule):  # W[j, i] = R[j] . S[i] / |S[i]|
    grouped = False  # states are [neurons, numbers], without an axis of groups

    def init(self, key, groups, n_in, n_out, dim):
        states = normal(key, (n_in + n_out, dim), fan_in=1)
        return states[:n_in], self.rescale(states[:n_in], states[n_in:])

    def weights(self, pre, post):
        return post @ (pre / (pre**2).sum(axis=1, keepdims=True) ** 0.5).T


RULES["mine"] = Directions()
