"""Compression in closed form: the methods agree with formulas written out here, with measured
errors and with brute force; leaders, and ranks.
"""

import itertools

import numpy as np
import pytest
from scipy.linalg import hadamard

from ngc_jax.convert.forms import blocks, metric, ports, synapses
from ngc_jax.convert.leaders import leaders
from ngc_jax.convert.methods import (
    METHODS,
    RECIPES,
    Problem,
    aa_svd,
    basis_sharing,
    io_svd,
    mpifa,
    ngc,
    stacked,
    svd_llm,
    whiten,
)
from ngc_jax.convert.ranks import COUNTS, by_price, factored, greedy, led, partition, spent, uniform
from ngc_jax.convert.rotation import dealt
from ngc_jax.core.rules import weights


def measured(difference, inputs, grads=None):
    """The error of D = W - W_r [m, n]: tr(D C D^T), or tr(Gamma D C D^T) / 2 nats per token."""
    heard = difference @ inputs
    if grads is None:
        return float((heard * difference).sum())
    return float((heard * (grads @ difference)).sum()) / 2


def published_start(weight, inputs):
    """(post, pre) of full rank, U and W^T U, U the eigenvectors of W C W^T: NGC's release."""
    heard = weight @ inputs @ weight.T
    u = np.linalg.eigh((heard + heard.T) / 2)[1][:, ::-1][:, : min(weight.shape)]
    return u, weight.T @ u


def speak(x, lead, rest, order):
    """y [..., m] of x [..., n] by what `leaders` returns."""
    signal = x @ lead.T
    return np.concatenate([signal, signal @ rest.T], axis=-1)[..., order]


M, N = 14, 11


def gram(rng, size, tokens=200, decay=0.7):
    """The Gram of vectors with a long-tailed spectrum and an own basis."""
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    seen = rng.normal(size=(tokens, size)) * decay ** np.arange(size) @ basis.T
    return seen.T @ seen / tokens


def problem(seed=0, m=M, n=N, **more):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(m, n))
    return Problem(weight, gram(rng, n), gram(rng, m), **more)


def cut(decomposition, rank):
    return decomposition.post(rank) @ decomposition.pre(rank).T


def best(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


# -- the methods ------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4, 9, 11])
def test_published_formulas(rank):
    p = problem(fisher=np.arange(1.0, M + 1), magnitudes=np.arange(1.0, N + 1))
    w, lower = p.weight, np.linalg.cholesky(p.inputs)
    heard = np.linalg.cholesky(p.grads)
    d, s = np.sqrt(p.fisher)[:, None], np.sqrt(p.magnitudes)
    inverse = np.linalg.inv
    wanted = {
        "svd": best(w, rank),
        "fwsvd": best(d * w, rank) / d,
        "asvd": best(w * s, rank) / s,
        "svd_llm": best(w @ lower, rank) @ inverse(lower),
        "ngc": inverse(heard).T @ best(heard.T @ w @ lower, rank) @ inverse(lower),
    }
    plain = {"svd_llm": {"ridge": 0.0}, "ngc": {"ridge": 0.0, "ridge_grads": 0.0}}
    for name, matrix in wanted.items():
        found = cut(METHODS[name](p, **plain.get(name, {})), rank)
        np.testing.assert_allclose(found, matrix, atol=1e-8, err_msg=name)


def test_three_names_of_one_optimum():
    # NGC's published start, whitened SVD of the stack, Basis Sharing's basis and coefficients.
    layers = [problem(seed) for seed in (1, 2)]
    both = stacked(*layers)
    summed = layers[0].inputs + layers[1].inputs
    s = np.linalg.cholesky(summed).T  # S^T S is the summed Gram
    u, sigma, vt = np.linalg.svd(s @ both.weight.T)
    for rank in (1, 5, 10):
        basis = np.linalg.inv(s) @ u[:, :rank] * sigma[:rank]
        shared = (basis @ vt[:rank]).T
        post, pre = published_start(both.weight, both.inputs)
        np.testing.assert_allclose(post[:, :rank] @ pre[:, :rank].T, shared, atol=1e-10)
        for found in (svd_llm(both, ridge=0.0), basis_sharing(*layers, ridge=0.0)):
            np.testing.assert_allclose(cut(found, rank), shared, atol=1e-10)


def test_the_predicted_loss_is_the_measured_one():
    p = problem(shifted=problem(1).inputs, gradient=problem(2).weight)
    one, two = svd_llm(p, ridge=0.0), ngc(p, ridge=0.0, ridge_grads=0.0)
    for rank in range(N):
        for found, grads in ((one, None), (two, p.grads)):
            error = measured(p.weight - cut(found, rank), p.inputs, grads)
            assert found.loss(rank) == pytest.approx(error, rel=1e-6)
    # written out, and in nats
    rng, error = np.random.default_rng(3), p.weight - cut(two, 4)
    x = rng.normal(size=(400_000, N)) @ np.linalg.cholesky(p.inputs).T
    g = rng.normal(size=(400_000, M)) @ np.linalg.cholesky(p.grads).T
    changes = np.einsum("tj,tj->t", g, x @ error.T) ** 2 / 2
    assert two.loss(4) == pytest.approx(changes.mean(), rel=0.03)
    assert list(two.loss(np.arange(N + 1))) == sorted(two.tail, reverse=True)
    assert two.loss(N) == 0


def test_signals_are_white():
    p = problem()
    for found in (svd_llm(p, ridge=0.0), ngc(p, ridge=0.0)):
        pre = found.pre(6)
        np.testing.assert_allclose(pre.T @ p.inputs @ pre, np.eye(6), atol=1e-8)


@pytest.mark.parametrize("sided", ["one", "two"])
def test_nothing_of_the_same_rank_is_better(sided):
    p = problem()
    grads = np.eye(M) if sided == "one" else p.grads
    found = svd_llm(p, ridge=0.0) if sided == "one" else ngc(p, ridge=0.0, ridge_grads=0.0)
    rng, rank = np.random.default_rng(4), 3
    least = measured(p.weight - cut(found, rank), p.inputs, grads)
    reached = []
    for _ in range(200):  # alternating least squares from random starts
        pre = rng.normal(size=(N, rank))
        for _ in range(30):
            spoken = p.inputs @ pre
            post = np.linalg.solve(pre.T @ spoken, (p.weight @ spoken).T).T
            pre = np.linalg.solve(post.T @ grads @ post, post.T @ grads @ p.weight).T
        reached.append(measured(p.weight - post @ pre.T, p.inputs, grads))
    assert min(reached) >= least * (1 - 1e-9)
    assert min(reached) == pytest.approx(least, rel=1e-4)  # the search does find it
    post, pre = found.factors(rank)
    for scale in (1e-3, 1e-1):
        near = (post + scale * rng.normal(size=post.shape)) @ (pre + scale * pre[::-1]).T
        assert measured(p.weight - near, p.inputs, grads) > least


def test_a_refit_is_the_best_for_its_layer():
    layers = [problem(seed) for seed in (1, 2)]
    plain, refit = basis_sharing(*layers), basis_sharing(*layers, refit=True)
    rank = 5
    for at, layer in enumerate(layers):
        rows = slice(M * at, M * (at + 1))
        before, after = (layer.weight - cut(d, rank)[rows] for d in (plain, refit))
        assert measured(after, layer.inputs) < 0.99 * measured(before, layer.inputs)
        # no error is left that the shared signal could tell
        assert abs(after @ layer.inputs @ refit.pre(rank)).max() < 1e-9
    np.testing.assert_array_equal(plain.pre(rank), refit.pre(rank))


def test_the_shifted_flow():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, N)) @ rng.normal(size=(N, N))
    y = x + rng.normal(size=x.shape)  # what earlier compressed layers give
    dense, shifted, cross = x.T @ x / 500, y.T @ y / 500, x.T @ y / 500
    p = Problem(rng.normal(size=(M, N)), dense, shifted=shifted, cross=cross)

    def error(found, rank, mix):
        aim = mix * x @ p.weight.T + (1 - mix) * y @ p.weight.T
        return ((aim - y @ cut(found, rank).T) ** 2).sum() / 500

    for mix, rank in itertools.product((0.0, 0.25, 1.0), (2, 6)):
        optimum = error(aa_svd(p, ridge=0.0, mix=mix), rank, mix)
        fitted = error(mpifa(p, ridge=0.0, mix=mix), rank, mix)
        assert optimum * (1 - 1e-9) <= fitted < error(svd_llm(p, ridge=0.0), rank, mix)
    # no shift: nothing changes
    still = Problem(p.weight, dense, shifted=dense, cross=dense)
    for found in (mpifa(still), aa_svd(still), mpifa(Problem(p.weight, dense))):
        np.testing.assert_allclose(cut(found, 4), cut(svd_llm(still), 4), atol=1e-4)


def test_first_order_losses_order_the_components():
    p = problem(gradient=problem(5).weight)
    plain, found = ngc(p), io_svd(p)
    losses = [
        abs((plain.posts[:, [i]] @ plain.pres[:, [i]].T * p.gradient).sum()) for i in range(N)
    ]
    np.testing.assert_allclose(-np.diff(found.tail), sorted(losses, reverse=True), atol=1e-10)
    np.testing.assert_allclose(cut(found, N), p.weight, atol=1e-8)


def test_problems_with_a_shared_input_are_one():
    # key and value read the same x: stacked rows, the same Gram, the Gram of outputs in two blocks
    key, value = problem(0), problem(1, m=6)
    value = Problem(value.weight, key.inputs, value.grads)
    found = ngc(key, value, ridge=0.0, ridge_grads=0.0)
    for rank in range(1, N):
        error = np.concatenate([key.weight, value.weight]) - cut(found, rank)
        parts = zip(np.split(error, [M]), (key.grads, value.grads), strict=True)
        apart = [measured(part, key.inputs, grads) for part, grads in parts]
        assert found.loss(rank) == pytest.approx(sum(apart), rel=1e-6)
    assert found.tail[:-1].shape == (N,)


def test_scales_of_the_grams_change_nothing():
    p = problem(magnitudes=np.ones(N), fisher=np.ones(M))
    q = Problem(
        p.weight * 7,
        p.inputs * 1e6,
        p.grads * 1e-9,
        fisher=p.fisher * 5,
        magnitudes=p.magnitudes * 3,
    )
    for name, method in METHODS.items():
        if name != "aa_svd":
            np.testing.assert_allclose(
                7 * cut(method(p), 5), cut(method(q), 5), atol=1e-7, err_msg=name
            )
    assert ngc(q).tail[3] == pytest.approx(ngc(p).tail[3] * 49e-3, rel=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_grams_of_few_tokens(tokens, ridge):
    rng = np.random.default_rng(6)
    x, g = rng.normal(size=(tokens, N)), rng.normal(size=(tokens, M))
    x[:, 3] = 0.0  # an input that is never there
    p = Problem(rng.normal(size=(M, N)), x.T @ x, g.T @ g)
    for name, method in METHODS.items():
        if name in ("aa_svd", "svd"):
            continue
        found = method(p, ridge=ridge) if name not in ("asvd", "fwsvd") else method(p)
        assert np.isfinite(found.posts).all()
        assert np.isfinite(found.pres).all()
        error = p.weight - cut(found, min(tokens, N))
        # as many numbers as there were tokens hear all that the Gram knows
        if name in ("svd_llm", "basis_sharing"):
            assert measured(error, p.inputs) <= 1e-4 * measured(p.weight, p.inputs)
        np.testing.assert_allclose(cut(found, N), p.weight, atol=1e-5, err_msg=name)
    if tokens == 0:
        assert ngc(p).tail.max() < 1e-20  # a dead matrix is not worth a parameter


def test_a_whitening_is_a_root_and_its_inverse():
    rng = np.random.default_rng(7)
    for matrix in (gram(rng, 9), gram(rng, 9, tokens=4), np.ones((5, 5)), np.arange(4.0)):
        root, inverse = whiten(matrix, ridge=1e-3)
        full = np.diag(matrix) if matrix.ndim == 1 else matrix
        root, inverse = (np.diag(a) if a.ndim == 1 else a for a in (root, inverse))
        ridged = full + 1e-3 * np.trace(full) / len(full) * np.eye(len(full))
        np.testing.assert_allclose(root @ root.T, ridged, atol=1e-12)
        np.testing.assert_allclose(root @ inverse, np.eye(len(full)), atol=1e-10)


def test_what_is_wrong_is_named():
    p = problem()
    with pytest.raises(ValueError, match=r"inputs: shape \(3, 3\), must be \(11, 11\)"):
        Problem(p.weight, np.eye(3))
    with pytest.raises(ValueError, match="weight: shape"):
        Problem(np.ones(4))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="grads: has NaN"):
            Problem(p.weight, p.inputs, np.full((M, M), bad))
    with pytest.raises(ValueError, match=r"inputs: eigenvalue .* is no Gram"):
        svd_llm(Problem(p.weight, -p.inputs))
    with pytest.raises(ValueError, match="grads=None: two-sided whitening needs it"):
        ngc(Problem(p.weight, p.inputs))
    with pytest.raises(ValueError, match="cross=None: mpifa"):
        mpifa(Problem(p.weight, p.inputs, shifted=p.inputs))
    with pytest.raises(ValueError, match="rank=12: 0 to 11"):
        svd_llm(p).post(12)
    with pytest.raises(ValueError, match="rank=12: leaders need a rank of at most 11"):
        leaders(np.ones((M, 12)), np.ones((N, 12)))
    assert set(RECIPES) == set(METHODS)


# -- leaders ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(14, 11), (11, 14), (12, 12), (36, 6)])
def test_leaders_say_what_the_factors_say(m, n):
    p = problem(m=m, n=n)
    x = np.random.default_rng(8).normal(size=(2, 5, n))
    for rank in range(min(m, n) + 1):
        found = ngc(p)
        lead, rest, order = leaders(found.post(rank), found.pre(rank))
        assert lead.size + rest.size == led(m, n, rank)
        assert order.dtype == np.int32
        np.testing.assert_allclose(
            speak(x, lead, rest, order), x @ cut(found, rank).T, atol=1e-8 * np.abs(p.weight).max()
        )
        assert np.abs(rest).max(initial=0) <= 2
    np.testing.assert_allclose(speak(np.eye(n), lead, rest, order).T, p.weight, atol=1e-8)
    if m <= n:  # all neurons lead: the dense layer as it stands
        np.testing.assert_array_equal(order, np.arange(m))
        np.testing.assert_allclose(lead, p.weight, atol=1e-8)


def test_leaders_change_places_where_pivots_are_bad():
    # Kahan's matrix beside columns that make its rows orthogonal: to pivots it looks well.
    size, c = 8, 0.4
    upper = np.eye(size, size + 1) - c * np.triu(np.ones((size, size + 1)), 1)
    kahan = np.sqrt(1 - c**2) ** np.arange(size)[:, None] * upper
    kahan *= 1 - 1e-3 * np.arange(size + 1)  # no ties
    rows = kahan @ kahan.T
    values, vectors = np.linalg.eigh(np.linalg.eigvalsh(rows)[-1] * np.eye(size) - rows)
    filled = (vectors * np.sqrt(values.clip(0))) @ vectors.T @ hadamard(32)[:size] / np.sqrt(32)
    post, pre = np.concatenate([kahan, filled], axis=1).T, np.eye(size)
    assert np.abs(leaders(post, pre, swaps=0)[1]).max() > 4
    lead, rest, order = leaders(post, pre)
    assert np.abs(rest).max() <= 1.5
    np.testing.assert_allclose(speak(np.eye(size), lead, rest, order), post.T, atol=1e-9)


def test_leaders_of_a_map_of_lower_rank_than_given():
    rng = np.random.default_rng(9)
    post, pre = rng.normal(size=(M, 5)), rng.normal(size=(N, 5))
    post[:, 3:] = 0.0
    lead, rest, order = leaders(post, pre)
    np.testing.assert_allclose(speak(np.eye(N), lead, rest, order).T, post @ pre.T, atol=1e-10)


# -- ranks ------------------------------------------------------------------------------------

SIZES = [(12, 8), (8, 8), (8, 20), (30, 9)]


def tails_of(sizes, seed=0):
    return [ngc(problem(seed + i, m, n)).tail for i, (m, n) in enumerate(sizes)]


def total(tails, ranks):
    return sum(tail[r] for tail, r in zip(tails, ranks, strict=True))


def test_counts():
    assert (factored(30, 9, 4), led(30, 9, 4)) == (156, 140)
    assert led(30, 9, 9) == 270
    assert spent([9, 3], [(30, 9), (8, 8)], factored) == 270 + 48
    # the dimension of the set of rank-r matrices, by the rank of its tangent space
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(6, 2)), rng.normal(size=(5, 2))
    tangent = [np.outer(e, b[:, k]).ravel() for e in np.eye(6) for k in range(2)]
    tangent += [np.outer(a[:, k], e).ravel() for e in np.eye(5) for k in range(2)]
    assert np.linalg.matrix_rank(tangent) == led(6, 5, 2)


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("kept", [0.05, 0.3, 0.55, 0.8, 0.97, 1.0])
def test_budgets_are_met_from_below(count, kept):
    tails = tails_of(SIZES)
    budget = kept * sum(m * n for m, n in SIZES)
    allotted = {
        "uniform": uniform(SIZES, kept, count),
        "greedy": greedy(tails, SIZES, kept, count),
        "price": by_price(tails, SIZES, kept, count),
    }
    for name, ranks in allotted.items():
        assert spent(ranks, SIZES, count) <= budget + 1e-9, name
    # one more rank of any matrix would not fit
    ranks = allotted["price"]
    for i, (m, n) in enumerate(SIZES):
        if ranks[i] < min(m, n):
            more = [r + (i == j) for j, r in enumerate(ranks)]
            step = spent(more, SIZES, count) - spent(ranks, SIZES, count)
            assert budget - spent(ranks, SIZES, count) < max(step, m + n) + 1e-9
    assert total(tails, ranks) <= total(tails, allotted["uniform"])
    assert total(tails, ranks) <= total(tails, allotted["greedy"])
    if kept == 1:
        assert ranks == [min(size) for size in SIZES]


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_by_price_is_as_good_as_brute_force(count):
    sizes, same = [(4, 5)] * 3, 0
    for seed, kept in itertools.product(range(12), (0.3, 0.5, 0.7, 0.85)):
        tails = [tail * 3.0**i for i, tail in enumerate(tails_of(sizes, 3 * seed))]
        fitting = (
            ranks
            for ranks in itertools.product(range(5), repeat=3)
            if spent(ranks, sizes, count) <= kept * 60
        )
        least = min(total(tails, ranks) for ranks in fitting)
        same += total(tails, by_price(tails, sizes, kept, count)) == pytest.approx(least, rel=1e-12)
    assert same == 48


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_no_allocation_is_much_better_than_by_price(count):
    # The dual bound: for any price no ranks within the budget do better.
    sizes = [(24, 16), (16, 16), (16, 36)] * 8
    tails = [tail * (1 + i) for i, tail in enumerate(tails_of(sizes))]
    kept = 0.6
    budget = kept * sum(m * n for m, n in sizes)
    bounds = []
    for price in np.geomspace(1e-9, 1, 200) * max(tail[0] for tail in tails):
        bound = -price * budget
        for tail, (m, n) in zip(tails, sizes, strict=True):
            cost = np.minimum(count(m, n, np.arange(len(tail))), m * n)
            bound += (tail + price * cost).min()
        bounds.append(bound)
    assert total(tails, by_price(tails, sizes, kept, count)) <= 1.02 * max(bounds)


def test_partitions_are_chosen_at_one_price():
    # Stage 0: two matrices that read the same input through the same three directions share a
    # signal. Stage 1: they read different directions and stay apart.
    rng = np.random.default_rng(10)
    inputs = np.eye(16)
    stages = []
    for at in range(2):
        basis = rng.normal(size=(16, 6))
        pair = [
            Problem(rng.normal(size=(12, 3)) @ basis[:, 3 * i * at :][:, :3].T, inputs, np.eye(12))
            for i in range(2)
        ]
        alone = [(ngc(one).tail, (12, 16)) for one in pair]
        together = [(ngc(*pair).tail, (24, 16))]
        stages.append([alone, together])
    taken, ranks = partition(stages, 0.45, factored)
    assert taken == [1, 0]
    assert ranks == [3, 3, 3]
    with pytest.raises(ValueError, match=r"stages\[0\]: candidates"):
        partition([[stages[0][0], stages[0][0][:1]]], 0.5)
    with pytest.raises(ValueError, match="kept=0"):
        partition(stages, 0)


# -- forms ------------------------------------------------------------------------------------


def test_forms_are_what_their_states_say():
    seen = metric(problem(m=24, n=20))
    found = ports(seen, 360, 4)
    assert found.post.shape == (4, 6, 4, 2)
    assert found.numbers == {"factored": 352, "led": 352}
    np.testing.assert_allclose(weights("addressed", found.pre, found.post), found.made, atol=1e-5)
    found = blocks(seen, 330, 4)
    apart = (found.made - found.post @ found.pre.T).reshape(4, 6, 4, 5)
    block = found.beside["intra_block"]
    for g, h in itertools.product(range(4), repeat=2):
        np.testing.assert_allclose(apart[g, :, h], block[g] if g == h else 0, atol=1e-12)
    assert found.numbers["led"] == 120 + led(24, 20, found.rank) <= 330
    found = synapses(seen, 330, 0.4)
    apart, single = found.made - found.post @ found.pre.T, found.beside["single_synapses"]
    np.testing.assert_allclose(apart.flat[single["at"]], single["state"], atol=1e-12)
    assert found.singles == np.count_nonzero(np.abs(apart) > 1e-12) == len(single["at"])
    assert found.numbers["led"] == 1.5 * found.singles + led(24, 20, found.rank) <= 330
    # ports of full rank: the matrix itself
    np.testing.assert_allclose(ports(seen, 4 * 5 * 44, 4).made, seen.weight, atol=1e-6)


def test_forms_lose_less_with_more_sweeps_and_with_more_numbers():
    seen = metric(problem(m=24, n=20))
    for made, how, budgets in (
        (ports, 4, (176, 352, 528)),
        (blocks, 4, (180, 240, 360)),
        (synapses, 0.4, (120, 240, 360)),
    ):
        losses = [seen.loss(made(seen, budget, how).made) for budget in budgets]
        assert np.diff(losses).max() < 0, made
        losses = [seen.loss(made(seen, budgets[1], how, sweeps=n).made) for n in (1, 2, 4, 8)]
        assert np.diff(losses).max() <= 1e-9 * losses[0], made


def test_synapses_pay_where_a_matrix_has_them():
    rng = np.random.default_rng(11)
    spikes = np.where(rng.random((24, 20)) < 0.08, 3 * rng.normal(size=(24, 20)), 0)
    weight = rng.normal(size=(24, 3)) @ rng.normal(size=(3, 20)) + spikes
    seen = metric(Problem(weight, gram(rng, 20, decay=0.9), gram(rng, 24, decay=0.9)))
    alone = ngc(Problem(weight, seen.inputs, seen.grads)).tail[uniform([(24, 20)], 0.5, led)[0]]
    assert seen.loss(synapses(seen, 240, 0.4, sweeps=10).made) < 0.3 * alone


def test_dealt_components_give_all_groups_the_same_share():
    p = problem(m=24, n=20)
    rotation = dealt(p.inputs, 4)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(20), atol=1e-12)
    shares = np.diag(rotation.T @ p.inputs @ rotation).reshape(4, 5).sum(1)
    largest = np.linalg.eigvalsh(p.inputs)[::-1]
    np.testing.assert_allclose(shares, [largest[g::4].sum() for g in range(4)])
