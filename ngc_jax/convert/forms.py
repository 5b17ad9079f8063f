"""Forms of a compressed matrix beside low rank: blocks inside groups, ports, single synapses.

For: alternatives at a given number of parameters, each the least output error tr(D C D^T) that a
few sweeps find. Not for: low rank alone (`methods.py`), measuring C. All is NumPy in float64.
"""

import dataclasses

import numpy as np
import scipy.linalg

from ngc_jax.convert.methods import RIDGE, Problem, measured, svd_llm, whiten

Array = np.ndarray
SWEEPS = 5
INDEX = 0.5  # parameters that we charge for the place of a single synapse


@dataclasses.dataclass(frozen=True)
class Form:
    """A matrix of some form: `weight` [m, n]; its states; its numbers; the error of each sweep."""

    weight: Array
    states: dict[str, Array]
    parameters: float
    errors: list[float]


def blocks_and_rank(
    weight: Array, inputs: Array, groups: int, rank: int, sweeps: int = SWEEPS, ridge: float = RIDGE
) -> Form:
    """A dense block inside each group plus low rank: W = post pre^T + blockdiag(block).

    block [G, m / G, n / G], post [m, r], pre [n, r]; m n / G + r (m + n) numbers. In turn each part
    is the best for what the other leaves, so the error never rises: the blocks solve a regression
    on their own group's inputs, E_g C[:, g] C_gg^-1; the rest is `svd_llm`. Ours.

    Raises: ValueError if groups do not divide m and n, or as `Problem`.
    """
    weight, gram = _ready(weight, inputs, ridge)
    rows, columns = _groups(weight, groups, groups)
    block = np.zeros((groups, len(rows[0]), len(columns[0])))
    errors = []
    for _ in range(sweeps):
        dense = scipy.linalg.block_diag(*block)
        post, pre = svd_llm(Problem(weight - dense, gram), ridge=0.0).factors(rank)
        left = weight - post @ pre.T
        for g, (row, column) in enumerate(zip(rows, columns, strict=True)):
            inside = gram[np.ix_(column, column)]
            block[g] = _regression(left[row] @ gram[:, column], inside)
        full = post @ pre.T + scipy.linalg.block_diag(*block)
        errors.append(measured(weight - full, gram))
    states = {"block": block, "post": post, "pre": pre}
    return Form(full, states, block.size + post.size + pre.size, errors)


def ports(
    weight: Array,
    inputs: Array,
    groups: tuple[int, int],
    dim: int,
    sweeps: int = SWEEPS,
    ridge: float = RIDGE,
) -> Form:
    """Ports of p numbers between groups: W[gj, hi] = sum_p R[g, j, h, p] S[h, i, g, p].

    `groups` are (of outputs, of inputs). R [G_out, m / G_out, G_in, p] and S [G_in, n / G_in,
    G_out, p] are the states of the addressed rule; p (G_in m + G_out n) numbers. A Gauss-Seidel
    sweep replaces one sending group after the other: the best rank-p block given the others is
    [D C_hh^-1/2]_p C_hh^-1/2, D = E_g C[:, h] + W_gh C_hh with E what is left, so the error never
    rises. Sweeps begin from no blocks, which suits few ports, and from those of W, which suits
    many; the better end is returned. Ours.

    Raises: ValueError if groups do not divide m and n, or as `Problem`.
    """
    weight, gram = _ready(weight, inputs, ridge)
    ends = [
        _sweep_ports(weight, gram, groups, dim, sweeps, start)
        for start in (np.zeros_like(weight), weight)
    ]
    return min(ends, key=lambda end: end.errors[-1])


def _sweep_ports(
    weight: Array, gram: Array, groups: tuple[int, int], dim: int, sweeps: int, start: Array
) -> Form:
    rows, columns = _groups(weight, *groups)
    m, n = len(rows[0]), len(columns[0])
    post, pre = np.zeros((groups[0], m, groups[1], dim)), np.zeros((groups[1], n, groups[0], dim))
    kept = min(dim, m, n)
    roots = [whiten(gram[np.ix_(column, column)])[1] for column in columns]
    full, errors = start.copy(), []
    for _ in range(sweeps):
        for h, (column, root) in enumerate(zip(columns, roots, strict=True)):
            full[:, column] = 0.0
            aim = (weight - full) @ gram[:, column] @ root
            u, s, vt = np.linalg.svd(aim.reshape(groups[0], m, n), full_matrices=False)
            post[:, :, h, :kept] = u[..., :kept] * s[:, None, :kept]
            pre[h, :, :, :kept] = np.einsum("ia,gpa->igp", root, vt[:, :kept])
            full[:, column] = np.einsum("gjp,igp->gji", post[:, :, h], pre[h]).reshape(-1, n)
        errors.append(measured(weight - full, gram))
    return Form(full, {"post": post, "pre": pre}, post.size + pre.size, errors)


def dealt(inputs: Array, groups: int) -> Array:
    """A rotation Q [n, n] of the inputs, x = Q z, that deals principal components to groups.

    Like cards, the largest first: component i belongs to group i mod G, so that every group has
    large and small ones. Use: `ports` of W Q on Q^T C Q, where a residual stream may be rotated.
    """
    vectors = scipy.linalg.eigh(inputs)[1][:, ::-1]
    return vectors[:, np.concatenate([np.arange(g, len(vectors), groups) for g in range(groups)])]


def rank_and_synapses(
    weight: Array,
    inputs: Array,
    rank: int,
    synapses: int,
    sweeps: int = SWEEPS,
    ridge: float = RIDGE,
) -> Form:
    """Low rank plus single synapses: W = post pre^T + sparse, `synapses` of its numbers not 0.

    In turn: low rank of W - sparse by `svd_llm`; places of the largest |left_ji| C_ii^1/2; values
    there by regression on all of C, row by row. The error may rise when places change: the best
    sweep is kept, `errors` lists all. r (m + n) + (1 + `INDEX`) synapses numbers. After OATS
    (arXiv 2409.13652), which thresholds and truncates under the diagonal of C.
    """
    weight, gram = _ready(weight, inputs, ridge)
    scale, sparse = np.sqrt(np.diag(gram)), np.zeros_like(weight)
    best: tuple[float, Array, Array, Array] | None = None
    errors = []
    for _ in range(sweeps):
        post, pre = svd_llm(Problem(weight - sparse, gram), ridge=0.0).factors(rank)
        left = weight - post @ pre.T
        order = np.argsort(-np.abs(left * scale), axis=None, kind="stable")[:synapses]
        there = np.zeros_like(weight, bool)
        there.flat[order] = True
        sparse, heard = np.zeros_like(weight), left @ gram
        for j in np.flatnonzero(there.any(axis=1)):
            at = np.flatnonzero(there[j])
            sparse[j, at] = _regression(heard[j, at], gram[np.ix_(at, at)])
        errors.append(measured(left - sparse, gram))
        if best is None or errors[-1] < best[0]:
            best = errors[-1], post, pre, sparse
    if best is None:
        raise ValueError(f"sweeps={sweeps}: must be at least 1")
    _, post, pre, sparse = best
    numbers = post.size + pre.size + (1 + INDEX) * min(synapses, weight.size)
    return Form(
        post @ pre.T + sparse, {"post": post, "pre": pre, "sparse": sparse}, numbers, errors
    )


def split_budget(
    size: tuple[int, int], kept: float, share: float, led: bool = False
) -> tuple[int, int]:
    """(rank, synapses) for `kept` of the m n numbers, of which `share` go to the low-rank part.

    With `led` a rank is counted r (m + n - r), else r (m + n). What the rank leaves over goes to
    the synapses.
    """
    m, n = size
    ranks = np.arange(min(m, n) + 1)
    costs = ranks * (m + n - ranks) if led else ranks * (m + n)
    rank = int(ranks[costs <= share * kept * m * n + 1e-6][-1])
    return rank, int((kept * m * n - costs[rank] + 1e-6) // (1 + INDEX))


def _ready(weight: Array, inputs: Array, ridge: float) -> tuple[Array, Array]:
    """W and C with its ridge, float64."""
    problem = Problem(weight, inputs)
    root, _ = whiten(problem.need("inputs", "a form"), ridge, "inputs")
    return problem.weight, root @ root


def _groups(weight: Array, outputs: int, inputs: int) -> tuple[list[Array], list[Array]]:
    """The rows of each group of outputs, and the columns of each group of inputs."""
    m, n = weight.shape
    if m % outputs or n % inputs:
        raise ValueError(f"groups={outputs, inputs}: must divide the outputs and inputs {m, n}")
    return np.split(np.arange(m), outputs), np.split(np.arange(n), inputs)


def _regression(heard: Array, gram: Array) -> Array:
    """heard [..., i] gram^-1 of a Gram that is positive definite."""
    return np.linalg.solve(gram, heard.T).T
