"""From states to weights: the table of rules, and using a rule by its name.

For: to `transmit` a signal by a rule, or look at its `weights`. Not for: what each rule is
(`signal.py`, `addressed.py`, `generated.py`). Every neuron has *states*: `pre`, with which it
sends, and `post`, with which it receives; a weight is W[j, i] = mu(post[j], pre[i]). Under *signal
rules* W is a sum of products and never formed: senders emit a signal of few numbers and receivers
read it. *Generated rules* make W whole, then multiply.
Axes: n_in, n_out neurons on either side; h, g the sending and the receiving group, G of each; i, j
a neuron in its group, n = n_in / G and m = n_out / G of them; r, p numbers of a state, of a port.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.core.rules import addressed, generated, signal
from ngc_jax.core.rules.base import Rule, SignalRule, States, numbers_of

Array = jax.Array
# An activation is z -> z gate(z): y = W(x) x, *transient* weights; as a layer, CoLA (2502.10940).
GATES: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.sigmoid,
    "gelu": lambda drive: jax.scipy.stats.norm.cdf(drive),  # imported when it is used
    "relu": lambda z: (z > 0).astype(z.dtype),
}

RULES: dict[str, Rule] = {
    "addressed": addressed.Addressed(),
    "broadcast": signal.Broadcast(),
    "leaders": signal.Leaders(),
    "metric": signal.Metric(),
    "metric_diagonal": signal.MetricDiagonal(),
    "metric_scalar": signal.MetricScalar(),
    "tanh": generated.Tanh(),
    "shift": generated.Shift(),
    "riemannian": generated.Riemannian(),
    "distance": generated.Distance(),
    "within": signal.Within(),
    "block": signal.Block(),
}


def rules_between_groups() -> tuple[str, ...]:
    """The values of `model.rule`, as they are now."""
    return (*(name for name, rule in RULES.items() if not rule.inside), "none", "dense")


def rules_with_delays() -> tuple[str, ...]:
    """The values of `model.rule` under which something may be late: not what "leaders" say."""
    able = (n for n, rule in RULES.items() if isinstance(rule, SignalRule) and not rule.inside)
    return (*(name for name in able if name != "leaders"), "dense")


def transmit(
    rule: str | Rule, x: Array, pre: States, post: States, activation: str | None = None
) -> Array:
    """What the receivers get: y [..., n_out] for x [..., n_in]. No signal rule forms its weights.

    `rule`: a name, or a rule; `activation`, of the signal: a name of `GATES`. Raises KeyError for
    an unknown one; ValueError where x, pre and post do not fit, or a rule with it has no signal.
    """
    found = named(rule)
    _check(found, pre, post, x)
    if activation is None and not isinstance(found, SignalRule):
        return x @ found.weights(pre, post).T
    return signal_rule(rule).receive(emit(rule, x, pre, activation), post)


def emit(rule: str | Rule, x: Array, pre: States, activation: str | None = None) -> Array:
    """The signal after the activation, as in `transmit`."""
    _check(named(rule), pre, (), x)
    return activate(signal_rule(rule).send(x, pre), activation)


def activate(z: Array, activation: str | None) -> Array:
    """z gate(z) with an entry of `GATES`, z where it is None. Raises KeyError for another name."""
    return z if activation is None else z * _entry("activation", activation, GATES)(z)


def weights(
    rule: str | Rule, pre: States, post: States, x: Any = None, activation: str | None = None
) -> Array:
    """The weights that `transmit` acts with: W [n_out, n_in], `y == x @ W.T` to rounding.

    With an activation, W(x) is the transient weight of a single token x [n_in]. Errors as there.
    """
    if activation is None:
        _check(named(rule), pre, post)
        return named(rule).weights(pre, post)
    gated = signal_rule(rule)
    if x is None or x.ndim != 1:
        raise ValueError(f"activation={activation!r}: weights depend on x, give it as [n_in]")
    _check(gated, pre, post, x)
    opened = _entry("activation", activation, GATES)(gated.send(x, pre))
    return gated.receive(opened * gated.send(jnp.eye(len(x)), pre), post).T


def named(rule: str | Rule) -> Rule:
    """The rule of that name; a rule is itself. Raises KeyError, with all names, for another one."""
    return _entry("rule", rule, RULES) if isinstance(rule, str) else rule


def _entry(field: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        raise KeyError(f"{field}={name!r}: must be one of {', '.join(table)}")
    return table[name]


def _check(rule: Rule, pre: States, post: States, x: Array | None = None) -> None:
    """Refuses what a product would broadcast: one number a group, or the states of one group."""
    sides = [numbers_of(side).shape[0] for side in (pre, post) if not isinstance(side, tuple)]
    if rule.grouped and len(set(sides)) > 1:
        raise ValueError(f"pre, post: of {sides[0]} and {sides[1]} groups; must be of equally many")
    if x is None or not sides:
        return
    if isinstance(pre, tuple):
        n_in = jax.eval_shape(rule.weights, pre, post).shape[1]
    else:
        n_in = rule.senders(pre)
    if x.shape[-1:] != (n_in,):
        raise ValueError(f"x: shape {[*x.shape]}; must be [..., {n_in}], a number for each sender")


def signal_rule(rule: str | Rule) -> SignalRule:
    """`named`, if it sends a signal. Raises KeyError, or ValueError for a rule without one."""
    found = named(rule)
    if not isinstance(found, SignalRule):
        takes = ", ".join(name for name, one in RULES.items() if isinstance(one, SignalRule))
        raise ValueError(f"rule={rule!r}: sends no signal to activate; those that do: {takes}")
    return found


def activation_gain(activation: str | None) -> float:
    """1 / rms of z gate(z) for z ~ N(0, 1): restores unit variance after an activation."""
    if activation is None:
        return 1.0
    points, mass = np.polynomial.hermite_e.hermegauss(101)
    with jax.ensure_compile_time_eval():
        opened = np.asarray(_entry("activation", activation, GATES)(jnp.float32(points)))
    return float(((points * opened) ** 2 @ mass / mass.sum()) ** -0.5)
