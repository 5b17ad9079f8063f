"""Compressing a pretrained linear map y = W x in closed form: one function a published method.

For: the factors of one matrix, or of several that share a signal, at any rank. Not for: choosing
ranks (`ranks.py`), or measuring the Grams (`calibrate.py`).

All is NumPy in float64. C = E[x x^T] and Gamma = E[g g^T], g = dL/dy of one token, are Grams.
Docstrings write [A]_r for the best rank-r approximation of A in the Frobenius norm.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy  # scipy.linalg is imported where it is used

Array = np.ndarray
Root = tuple[Array, Array]  # L and its inverse: square, or vectors that are diagonals
RIDGE, RIDGE_GRADS = 1e-6, 1e-2  # shares of the mean eigenvalue: of C, of Gamma
NOTHING = 1e-30  # an eigenvalue in place of 0: its inverse root is a float32
# the ways to write a matrix in fewer numbers that `forms.py` has, and that of the methods here
FORMS = ("low_rank", "ports", "blocks", "synapses")
SHARED_IN_DEPTH = ("query", "key", "value", "gate", "up")  # by Basis Sharing; "out", "down" not


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is known about one matrix; a method says what it needs. Becomes float64.

    weight W [m, n]; inputs C [n, n]; grads Gamma [m, m]; fisher [m], the row sums of the expected
    squared gradient of W; magnitudes [n], the means of |x_i|; shifted [n, n] = E[x' x'^T] of the
    inputs x' that earlier compressed layers give; cross [n, n] = E[x x'^T]; gradient [m, n] =
    E[dL/dW].

    Raises: ValueError, which names the field, for a wrong shape, NaN or infinity.
    """

    weight: Array
    inputs: Array | None = None
    grads: Array | None = None
    fisher: Array | None = None
    magnitudes: Array | None = None
    shifted: Array | None = None
    cross: Array | None = None
    gradient: Array | None = None

    def __post_init__(self) -> None:
        m, n = np.shape(self.weight) if np.ndim(self.weight) == 2 else (-1, -1)
        shapes = {"weight": (m, n), "grads": (m, m), "fisher": (m,), "magnitudes": (n,)}
        shapes |= {"gradient": (m, n)}
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if given is not None:
                told = checked(given, shapes.get(field.name, (n, n)), field.name)
                object.__setattr__(self, field.name, told)

    def need(self, name: str, method: str) -> Array:
        """The field `name`. Raises: ValueError if it is not there."""
        given = getattr(self, name)
        if given is None:
            raise ValueError(f"{name}=None: {method} needs it")
        return given


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """A method's answer for one matrix, from which any rank r <= k = min(m, n) can be cut.

    W_r = post(r) pre(r)^T. `tail` [k + 1] is the predicted loss of keeping r, in the unit of the
    method: nats per token where it knows Gamma, else energy of the output (unit of its metric).
    A signal x pre(r) is white on the Gram that the method knows. `refit` gets the factors of a cut
    and returns better ones; `tail` is then that of the cut before.
    """

    posts: Array
    pres: Array
    tail: Array
    refit: Callable[[Array, Array], tuple[Array, Array]] | None = None

    def factors(self, rank: int) -> tuple[Array, Array]:
        """(post [m, r], pre [n, r]). Raises: ValueError for a rank outside 0 .. k."""
        if not 0 <= rank < len(self.tail):
            raise ValueError(f"rank={rank}: 0 to {len(self.tail) - 1} are possible")
        post, pre = self.posts[:, :rank], self.pres[:, :rank]
        return self.refit(post, pre) if self.refit and rank else (post, pre)

    def post(self, rank: int) -> Array:
        return self.factors(rank)[0]

    def pre(self, rank: int) -> Array:
        return self.factors(rank)[1]

    def loss(self, rank: int | Array) -> Any:
        """The predicted loss of keeping `rank`, a number or an array of them."""
        return self.tail[rank]


def checked(array: Any, shape: tuple[int, ...], name: str) -> Array:
    """`array` in float64. Raises: ValueError, with `name`, for another shape, NaN or infinity."""
    told = np.asarray(array, np.float64)
    if told.shape != shape:
        raise ValueError(f"{name}: shape {told.shape}, must be {shape}")
    if not np.isfinite(told).all():
        raise ValueError(f"{name}: has NaN or infinite numbers")
    return told


def whiten(gram: Any, ridge: float = 0.0, name: str = "gram") -> Root:
    """(L, L^-1) with L L^T = gram + ridge * its mean eigenvalue * I; L symmetric [n, n].

    A vector [n] is a diagonal Gram, and then so are L and L^-1. Singular Grams have a root too:
    eigenvalues are at least n times the rounding error of the largest one, so L L^-1 = I always.
    L of a Gram of zeros is next to 0. The Gram times s gives L times sqrt(s).

    Raises: ValueError, with `name`, for a Gram that is not square, finite and semidefinite.
    """
    size = np.shape(gram)[0] if np.ndim(gram) else -1
    gram = checked(gram, (size,) * min(max(np.ndim(gram), 1), 2), name)
    values, vectors = (gram, None) if gram.ndim == 1 else scipy.linalg.eigh((gram + gram.T) / 2)
    top = values.max(initial=0.0)
    if values.min(initial=0.0) < -1e-4 * top or (top == 0 and values.any()):
        raise ValueError(f"{name}: eigenvalue {values.min():.3g} < 0 beside {top:.3g}, is no Gram")
    values = values.clip(0) + ridge * max(values.mean(), 0.0)
    root = np.sqrt(values.clip(max(size * np.finfo(float).eps * values.max(initial=0.0), NOTHING)))
    if vectors is None:
        return root, 1 / root
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def stacked(*problems: Problem) -> Problem:
    """Several problems as one with a shared signal: outputs stacked, statistics of inputs averaged.

    The members read the same x, or inputs of one meaning (neighbouring layers). grads becomes
    block-diagonal; who knows the Gram of all outputs makes the `Problem` of the stack directly.
    """
    if len(problems) == 1:
        return problems[0]
    merge: dict[str, Callable[[list[Array]], Array]] = {
        "weight": np.concatenate,
        "gradient": np.concatenate,
        "fisher": np.concatenate,
        "grads": lambda grams: scipy.linalg.block_diag(*grams),
    }
    told: dict[str, Any] = {}
    for field in dataclasses.fields(Problem):
        each = [getattr(problem, field.name) for problem in problems]
        if all(one is not None for one in each):
            told[field.name] = merge.get(field.name, lambda all_: np.mean(all_, axis=0))(each)
    return Problem(**told)


def svd(*problems: Problem) -> Decomposition:
    """[W]_r. Needs nothing but weights."""
    return in_metric(stacked(*problems).weight, None, None)


def fwsvd(*problems: Problem) -> Decomposition:
    """D^-1 [D W]_r, D_jj^2 = sum_i E[(dL/dW_ji)^2] = `fisher`. Source: arXiv 2207.00112.

    Without `fisher` it takes Gamma_jj tr(C), which is the same if g_j and |x| are independent.
    """
    problem = stacked(*problems)
    fisher = problem.fisher
    if fisher is None:
        grads = problem.need("grads", "fwsvd without fisher")
        fisher = np.diag(grads) * np.trace(problem.need("inputs", "fwsvd without fisher"))
    return in_metric(problem.weight, whiten(fisher, name="fisher"), None)


def asvd(*problems: Problem, alpha: float = 0.5) -> Decomposition:
    """[W S]_r S^-1, S = diag(E|x_i|^alpha). Source: arXiv 2312.05821, without its rank search.

    Without `magnitudes` it takes the root of the diagonal of C, proportional for Gaussian inputs.
    """
    problem = stacked(*problems)
    means = problem.magnitudes
    if means is None:
        means = np.sqrt(np.diag(problem.need("inputs", "asvd without magnitudes")))
    return in_metric(problem.weight, None, whiten(means ** (2 * alpha), name="magnitudes"))


def svd_llm(*problems: Problem, ridge: float = RIDGE) -> Decomposition:
    """[W L]_r L^-1, L L^T = C: the least output error of rank r. Source: arXiv 2403.07378.

    It takes the symmetric root in place of a Cholesky factor: W_r is the same (2503.12340).
    """
    problem = stacked(*problems)
    inputs = problem.need("inputs", "svd_llm")
    return in_metric(problem.weight, None, whiten(inputs, ridge, "inputs"))


def basis_sharing(*problems: Problem, ridge: float = RIDGE, refit: bool = False) -> Decomposition:
    """`svd_llm` of stacked layers and their summed Gram. Source: arXiv 2410.03765.

    The paper pairs layers l, l + 1, of the matrices `SHARED_IN_DEPTH`. `refit` gives each layer the
    best coefficients for the basis B = pre(r) on its own Gram, V = W C B (B^T C B)^-1, of `shifted`
    inputs if there are any; the paper does it from 30% removed on.
    """
    plain = svd_llm(*problems, ridge=ridge)
    if not refit:
        return plain

    def one(problem: Problem, pre: Array) -> Array:
        shifted = problem.shifted
        gram = problem.need("inputs", "basis_sharing") if shifted is None else shifted
        return _heard(problem.weight @ gram, gram, pre)

    def own(_: Array, pre: Array) -> tuple[Array, Array]:
        return np.concatenate([one(problem, pre) for problem in problems]), pre

    return dataclasses.replace(plain, refit=own)


def io_svd(
    *problems: Problem, ridge: float = RIDGE, ridge_grads: float = RIDGE_GRADS
) -> Decomposition:
    """Two-sided whitening, components in the order of their first-order loss. arXiv 2605.15626.

    W_r = L_G^-1 [L_G W L_C]_r L_C^-1. With `gradient` a component s u v^T is worth
    |s u^T L_G^-1 E[dL/dW] L_C^-1 v| nats, without it s^2 / 2. The paper makes Gamma of the second
    order of the KL over the top tokens; ours is that of labels sampled from the model.
    """
    plain = ngc(*problems, ridge=ridge, ridge_grads=ridge_grads)
    gradient = stacked(*problems).gradient
    if gradient is None:
        return plain
    worth = np.abs(np.einsum("jr,jr->r", plain.posts, gradient @ plain.pres))
    order = np.argsort(-worth, kind="stable")
    return Decomposition(plain.posts[:, order], plain.pres[:, order], _tail(worth[order]))


def ngc(
    *problems: Problem, ridge: float = RIDGE, ridge_grads: float = RIDGE_GRADS
) -> Decomposition:
    """L_G^-1 [L_G W L_C]_r L_C^-1, L_G^2 = Gamma, L_C^2 = C: the least predicted loss of rank r.

    A dropped component costs s^2 / 2 nats per token, the second order of the loss with a Fisher
    matrix Gamma x C (K-FAC). Ours: `leaders` and ranks by price go with it. The metric is that of
    GFWSVD (arXiv 2505.17974) and IO-SVD.
    """
    problem = stacked(*problems)
    return in_metric(problem.weight, *both_sides(problem, ridge, ridge_grads), worth=0.5)


def both_sides(
    problem: Problem, ridge: float = RIDGE, ridge_grads: float = RIDGE_GRADS
) -> tuple[Root, Root]:
    """The roots of Gamma and of C, with their ridges. Raises ValueError where one is missing."""
    out = whiten(problem.need("grads", "two-sided whitening"), ridge_grads, "grads")
    return out, whiten(problem.need("inputs", "two-sided whitening"), ridge, "inputs")


def aa_svd(*problems: Problem, ridge: float = RIDGE, mix: float = 1.0) -> Decomposition:
    """[Y L^-1]_r L^-1, L^2 = C' = `shifted`: rank r that makes of x' what W makes of x.

    Y = W (mix E[x x'^T] + (1 - mix) C'). The best rank r for that aim; `tail` leaves out what no
    matrix can reach. The ridge draws to W. Source: arXiv 2604.02119, objective 4, for mix = 1.
    """
    problem = stacked(*problems)
    best, root = _fitted(problem, _aim(problem, mix, "aa_svd"), ridge)
    return in_metric(best, None, root)


def mpifa(*problems: Problem, ridge: float = RIDGE, mix: float = 0.25) -> Decomposition:
    """`svd_llm`, then both factors fitted to a mix of the dense and the shifted flow.

    With Y of `aa_svd`: post = Y pre (pre^T C' pre)^-1, then pre^T = post^+ (Y + a W) (C' + a I)^-1,
    a = ridge times the mean eigenvalue of C'. Without `shifted` it is `svd_llm`. Its pivot rows are
    `leaders`. Source: arXiv 2501.19090, as its code has it (two steps).
    """
    plain, problem = svd_llm(*problems, ridge=ridge), stacked(*problems)
    if problem.shifted is None:
        return plain
    aim, shifted = _aim(problem, mix, "mpifa"), problem.shifted
    best = _fitted(problem, aim, ridge)[0]

    def both(post: Array, pre: Array) -> tuple[Array, Array]:
        post = _heard(aim, shifted, pre)
        return post, np.linalg.lstsq(post, best, rcond=None)[0].T

    return dataclasses.replace(plain, refit=both)


METHODS: dict[str, Callable[..., Decomposition]] = {
    "svd": svd,
    "fwsvd": fwsvd,
    "asvd": asvd,
    "svd_llm": svd_llm,
    "basis_sharing": basis_sharing,
    "io_svd": io_svd,
    "aa_svd": aa_svd,
    "mpifa": mpifa,
    "ngc": ngc,
}
# What goes with a method: how ranks are given, and how a rank is counted (names of `ranks.py`).
RECIPES = dict.fromkeys(METHODS, ("uniform", "factored"))
RECIPES |= {"io_svd": ("greedy", "factored"), "mpifa": ("uniform", "led"), "ngc": ("price", "led")}


def in_metric(
    weight: Array, out: Root | None, into: Root | None, worth: float = 1.0
) -> Decomposition:
    """The best of each rank where a change D of W costs worth |L_out D L_in|^2; None is I."""
    (heard, to_post), (spoken, to_pre) = out or (None, None), into or (None, None)
    seen = _times(heard, _times(spoken, weight.T).T)
    try:
        u, s, vt = scipy.linalg.svd(seen, full_matrices=False)
    except np.linalg.LinAlgError:  # the quick driver may fail to converge, this one does not
        u, s, vt = scipy.linalg.svd(seen, full_matrices=False, lapack_driver="gesvd")
    return Decomposition(_times(to_post, u) * s, _times(to_pre, vt.T), _tail(worth * s**2))


def _times(root: Array | None, matrix: Array) -> Array:
    if root is None:
        return matrix
    return root[:, None] * matrix if root.ndim == 1 else root @ matrix


def _tail(worths: Array) -> Array:
    """[k] worths of components -> [k + 1] losses of keeping the first r, summed from the least."""
    return np.append(np.cumsum(worths[::-1])[::-1], 0.0)


def _aim(problem: Problem, mix: float, method: str) -> Array:
    """Y [m, n]: the correlation of the aimed output with the shifted inputs."""
    shifted = problem.need("shifted", method)
    cross = problem.need("cross", f"{method} with mix={mix}") if mix else 0.0
    return problem.weight @ (mix * cross + (1 - mix) * shifted)


def _fitted(problem: Problem, aim: Array, ridge: float) -> tuple[Array, Root]:
    """The matrix of full rank that is best for an aim, and the root of the shifted inputs."""
    shifted = problem.need("shifted", "the shifted flow")
    root = whiten(shifted, ridge, "shifted")
    small = ridge * np.trace(shifted) / len(shifted)
    return (aim + small * problem.weight) @ root[1] @ root[1], root


def _heard(aim: Array, gram: Array, pre: Array) -> Array:
    """The post [m, r] of least error for a given pre: aim pre (pre^T gram pre)^-1."""
    return np.linalg.lstsq(pre.T @ gram @ pre, (aim @ pre).T, rcond=None)[0].T
