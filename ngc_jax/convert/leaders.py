"""Leaders: r neurons of a rank-r map speak their own outputs, and the others listen to them.

For: a low-rank map with r (m + n - r) numbers in place of r (m + n). Not for: finding the low-rank
map (`methods.py`).
"""

import numpy as np
import scipy  # scipy.linalg is imported where it is used

from ngc_jax.convert.methods import checked

Array = np.ndarray
BOUND, SWAPS = 2.0, 100


def leaders(
    post: Array, pre: Array, bound: float = BOUND, swaps: int = SWAPS
) -> tuple[Array, Array, Array]:
    """(lead S [r, n], rest K [m - r, r], order [m], int32) of W_r = post [m, r] pre [n, r]^T.

    With z = x S^T the outputs are concat([z, z K^T])[..., order]: a leader's post state is one-hot.
    Leaders are the pivots of a QR with column pivoting of an orthonormal basis of the outputs. Then
    a leader and a listener change places while max |K| > `bound`, at most `swaps` times; each
    change multiplies the volume of the leaders' rows by max |K|, so it ends. S = post_lead pre^T,
    K = Q_rest Q_lead^-1. With r = m all neurons are leaders, in their order.

    Raises: ValueError for shapes that do not fit, r > min(m, n), NaN or infinity. Sources: pivot
    rows, arXiv 2501.19090 (PIFA); exchanges, Gu and Eisenstat 1996 (strong rank-revealing QR).
    """
    m, r = np.shape(post)
    n = np.shape(pre)[0]
    post, pre = checked(post, (m, r), "post"), checked(pre, (n, r), "pre")
    if r > min(m, n):
        raise ValueError(f"rank={r}: leaders need a rank of at most {min(m, n)}")
    if r == 0:
        return np.zeros((0, n)), np.zeros((m, 0)), np.arange(m, dtype=np.int32)
    basis = np.linalg.qr(post)[0]
    pivots = scipy.linalg.qr(basis.T, mode="r", pivoting=True)[1]
    lead, rest = np.sort(pivots[:r]), np.sort(pivots[r:])
    heard = _heard(basis, lead, rest)
    for _ in range(swaps):
        if np.abs(heard).max(initial=0.0) <= bound:
            break
        listener, leader = np.unravel_index(np.abs(heard).argmax(), heard.shape)
        lead[leader], rest[listener] = rest[listener], lead[leader]
        lead, rest = np.sort(lead), np.sort(rest)
        heard = _heard(basis, lead, rest)
    order = np.argsort(np.concatenate([lead, rest])).astype(np.int32)
    return post[lead] @ pre.T, heard, order


def _heard(basis: Array, lead: Array, rest: Array) -> Array:
    return np.linalg.solve(basis[lead].T, basis[rest].T).T
