"""Forms of a dense model beside low rank: ports, blocks inside groups, single synapses.

For: `fit_form`, and each form of one matrix in closed form. Not for: low rank alone (`convert.py`).
All take the metric of `methods.ngc`: a change D of W [m, n] costs tr(Gamma D C D^T) / 2 nats per
token. NumPy in float64. Groups divide m and n.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ngc_jax.convert.calibrate import Sums, problems
from ngc_jax.convert.convert import Fit, Fitted, allot, decompose
from ngc_jax.convert.methods import FORMS, Problem, Root, both_sides, in_metric, whiten
from ngc_jax.convert.ranks import led, uniform
from ngc_jax.convert.rotation import rotated
from ngc_jax.nn.ranks import MEMBERS, Joined
from ngc_jax.nn.shape import ModelShape
from ngc_jax.runtime.fields import refusals
from ngc_jax.training.load import Trained

Array = np.ndarray
SWEEPS, STEPS = 5, 8  # of one part after the other; of conjugate gradients in a sweep
INDEX = 0.5  # numbers that we charge for the place of a single synapse


class Metric(NamedTuple):
    """W [m, n], Gamma [m, m] and C [n, n] with their ridges, and the roots of these."""

    weight: Array
    grads: Array
    inputs: Array
    out: Root
    into: Root

    def loss(self, made: Array) -> float:
        """Predicted nats per token with a matrix in place of W."""
        return float(np.square(self.out[0] @ (self.weight - made) @ self.into[0]).sum()) / 2


class Form(NamedTuple):
    """The states of a matrix, what they make, and their numbers."""

    made: Array  # [m, n]
    post: Array
    pre: Array
    rank: int  # or the numbers of a port
    numbers: dict[str, float]  # "factored" and "led", as `Fit` counts
    beside: dict[str, Any]  # post states of the parts beside low rank, by name
    singles: int = 0


def metric(problem: Problem) -> Metric:
    """What `methods.ngc` knows of a matrix. Raises ValueError where that is missing."""
    out, into = both_sides(problem)
    return Metric(problem.weight, out[0] @ out[0], into[0] @ into[0], out, into)


def ports(seen: Metric, budget: float, groups: int, sweeps: int = SWEEPS) -> Form:
    """Ports of p numbers between groups: W[gj, hi] = sum_p R[g, j, h, p] S[h, i, g, p].

    R and S are the states of rule "addressed"; p G (m + n) numbers. A Gauss-Seidel sweep replaces
    one block after the other: the best of rank p given the others is L_g^-1 [L_g^-1 D L_h^-1]_p
    L_h^-1, D = (Gamma E C)_gh with E what the others leave, L_g and L_h the roots of Gamma_gg and
    C_hh. So the loss never rises. Sweeps begin from no blocks, which suits few ports, and from
    those of W, which suits many; the better end is returned. Ours.
    """
    (m, n), split = seen.weight.shape, range(groups)
    dim = int(budget + 1e-6) // (groups * (m + n))
    rows, columns = ([slice(g * s // groups, (g + 1) * s // groups) for g in split] for s in (m, n))
    outs = [whiten(seen.grads[row, row])[1] for row in rows]
    ins = [whiten(seen.inputs[column, column])[1] for column in columns]
    kept, ends = min(dim, m // groups, n // groups), []
    for start in (np.zeros((m, n)), seen.weight):
        full, post = start.copy(), np.zeros((groups, m // groups, groups, dim))
        pre = np.zeros((groups, n // groups, groups, dim))
        for _ in range(sweeps):
            for h, column in enumerate(columns):
                left = (seen.weight - full) @ seen.inputs[:, column]
                for g, row in enumerate(rows):
                    left[row] += full[row, column] @ seen.inputs[column, column]
                    aim = outs[g] @ (seen.grads[row] @ left) @ ins[h]
                    u, s, vt = np.linalg.svd(aim, full_matrices=False)
                    post[g, :, h, :kept] = outs[g] @ (u * s)[:, :kept]
                    pre[h, :, g, :kept] = ins[h] @ vt[:kept].T
                    full[row, column] = post[g, :, h] @ pre[h, :, g].T
                    left[row] -= full[row, column] @ seen.inputs[column, column]
        ends.append(Form(full, post, pre, dim, _counts(post.size + pre.size), {}))
    return min(ends, key=lambda end: seen.loss(end.made))


def blocks(seen: Metric, budget: float, groups: int, sweeps: int = SWEEPS) -> Form:
    """A dense block inside each group beside low rank; m n / G numbers, and those of the rank."""
    m, n = seen.weight.shape
    inside = np.kron(np.eye(groups, dtype=bool), np.ones((m // groups, n // groups), bool))
    rank = _rank(m, n, budget - m * n / groups)
    post, pre, beside = _summed(seen, rank, lambda left: inside, sweeps)
    parted = beside.reshape(groups, m // groups, groups, n // groups)
    states = {"intra_block": np.stack([parted[g, :, g] for g in range(groups)])}
    numbers = _counts(m * n / groups, m, n, rank)
    return Form(post @ pre.T + beside, post, pre, rank, numbers, states)


def synapses(seen: Metric, budget: float, share: float, sweeps: int = SWEEPS) -> Form:
    """Single synapses, a `share` of the budget, beside low rank; 1 + `INDEX` numbers each.

    Places are those of the largest Gamma_jj C_ii left_ji^2. After OATS (arXiv 2409.13652), which
    thresholds and truncates under the diagonal of C.
    """
    m, n = seen.weight.shape
    rank = _rank(m, n, (1 - share) * budget)
    count = max(0, int((budget - led(m, n, rank) + 1e-6) // (1 + INDEX)))
    scale = np.outer(np.diag(seen.grads), np.diag(seen.inputs))

    def largest(left: Array) -> Array:
        there = np.zeros((m, n), bool)
        there.flat[np.argsort(-scale * np.square(left), axis=None, kind="stable")[:count]] = True
        return there

    post, pre, beside = _summed(seen, rank, largest, sweeps)
    at = np.flatnonzero(beside).astype(np.int32)
    states = {"single_synapses": {"state": beside.flat[at], "at": at}} if len(at) else {}
    numbers = _counts((1 + INDEX) * len(at), m, n, rank)
    return Form(post @ pre.T + beside, post, pre, rank, numbers, states, len(at))


def _rank(m: int, n: int, budget: float) -> int:
    """The greatest rank within a budget, counted by leaders; 1 at least, and below the full one."""
    return min(max(uniform([(m, n)], budget / (m * n), led)[0], 1), min(m, n) - 1)


def _counts(more: float, m: int = 0, n: int = 0, rank: int = 0) -> dict[str, float]:
    return {"factored": more + rank * (m + n), "led": more + led(m, n, rank)}


def _summed(
    seen: Metric, rank: int, places: Callable[[Array], Array], sweeps: int
) -> tuple[Array, Array, Array]:
    """W = post pre^T + beside, which is 0 but where places(W - post pre^T) [m, n] says.

    In turn: low rank of W - beside as `ngc` cuts it, then the numbers at these places. The loss may
    rise where places change: the best sweep is returned.
    """
    beside, best = np.zeros_like(seen.weight), (math.inf, *(np.zeros(0),) * 3)
    for _ in range(sweeps):
        post, pre = in_metric(seen.weight - beside, seen.out, seen.into).factors(rank)
        left = seen.weight - post @ pre.T
        beside = _numbers_at(places(left), left, seen, beside)
        loss = seen.loss(seen.weight - left + beside)
        best = (loss, post, pre, beside) if loss < best[0] else best
    return best[1:]


def _numbers_at(there: Array, left: Array, seen: Metric, start: Array) -> Array:
    """Numbers at `there` that lower the loss of `left`, by conjugate gradients from `start`."""
    found = np.where(there, start, 0.0)
    ease = there / np.outer(np.diag(seen.grads), np.diag(seen.inputs))
    slope = seen.grads @ (left - found) @ seen.inputs
    step = ease * slope
    size = np.vdot(slope, step)
    for _ in range(STEPS):
        pushed = seen.grads @ step @ seen.inputs
        if not size > 1e-24 * np.vdot(left, seen.grads @ left @ seen.inputs):
            break
        along = size / np.vdot(step, pushed)
        found, slope = found + along * step, slope - along * pushed
        before, size = size, np.vdot(slope, ease * slope)
        step = ease * slope + size / before * step
    return found


def fit_form(
    trained: Trained, means: Sums, form: str, kept: float, groups: int = 0, share: float = 0.4
) -> tuple[Trained, Fit]:
    """A dense model, and its matrices in a form of `FORMS` beside low rank.

    The model is the one given; for ports its stream is rotated. Each matrix keeps a share `kept` of
    its numbers; with synapses, `share` of them, as many as the price of `ngc` gives it. Raises
    UserError for other values, and for groups that do not fit all matrices.
    """
    need = refusals({"form": form, "kept": kept, "groups": groups, "share": share})
    need(form in FORMS[1:], "form", f"one of {', '.join(FORMS[1:])}")
    need(0 < share < 1, "share", "above 0 and below 1, for instance 0.4")
    shape = trained.decoder.shape
    if form == "synapses":
        need(0 < kept < 1, "kept", "above 0 and below 1, for instance 0.8")
        priced = allot(decompose(trained, means, "ngc"), "ngc", kept).stages
        given = [{one.joined.members[0]: _spent(one) for one in stage} for stage in priced]
        fields: dict[str, Any] = {}
    else:
        least = _least(form, shape)
        need(bool(least), "form", "another one: no number of groups fits all matrices")
        need(groups in least, "groups", f"one of {', '.join(map(str, least))} where form={form!r}")
        wants = f"below 1, and {least[groups]:.2f} or more where groups={groups}"
        need(least[groups] <= kept < 1, "kept", wants)
        given = [{name: kept * m * n for name, (m, n) in shape.sizes.items()}] * shape.depth
        fields = {"groups": groups, "p_intra": shape.width // groups}
    if form == "ports":
        need(not shape.gates, "form", "another one for a model of model.gates=True")
        trained, means = rotated(trained, means, groups)
        fields = {"groups": groups, "rule": "addressed"}
    found, numbers, lost = list[list[Fitted]](), Counter[str](), 0.0
    make: Any = {"ports": ports, "blocks": blocks, "synapses": synapses}[form]
    for stage, budget in zip(problems(trained.decoder, trained.params, means), given, strict=True):
        found.append([])
        for member in MEMBERS:
            weight, whole = stage[member].weight, stage[member].weight.size
            numbers["dense"] += whole
            one = Form(
                weight, weight[:, :0], weight[:0].T, 0, {"factored": whole, "led": whole}, {}
            )
            if budget[member] < whole:
                seen = metric(stage[member])
                one = make(seen, budget[member], share if form == "synapses" else groups)
                lost += seen.loss(one.made)
            numbers.update(one.numbers)
            joined = Joined((member,), one.rank, one.singles)
            made = one.made.astype(np.float32)
            found[-1].append(Fitted(joined, made, one.post, one.pre, one.beside))
    counted = "factored" if form == "ports" else "led"
    told = {name: round(count) for name, count in numbers.items()}
    return trained, Fit(found, counted, lost, told, fields)


def _spent(one: Fitted) -> float:
    m, n = one.made.shape
    return led(m, n, one.joined.rank) if one.joined.rank else m * n


def _least(form: str, shape: ModelShape) -> dict[int, float]:
    """Numbers of groups that divide all sides of matrices and go with the heads, each with the
    share of numbers, below 1, from which on every matrix has a rank, or ports.
    """
    sizes = [*shape.sizes.values()]
    common = math.gcd(*(side for size in sizes for side in size))
    fits = [g for g in range(2, common + 1) if common % g == 0]
    found = {}
    for g in (g for g in fits if shape.heads % g == 0 or g % shape.heads == 0):
        one = [(g * (m + n) if form == "ports" else m * n / g + m + n) / (m * n) for m, n in sizes]
        found[g] = math.ceil(100 * max(one)) / 100
    return {g: share for g, share in found.items() if share < 1}
