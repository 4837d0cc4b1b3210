"Traces and densities on random symmetric matrices with planted spectra: within their own intervals, wherever they are computed, and nothing moved."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lal.core.device import generator, rng_states, seeded
from lal.curvature.density import lanczos_quadrature, log_det, share_interval, spectral_density
from lal.curvature.hessian_operator import FiniteDifferenceOperator, HessianOperator
from lal.curvature.operators import FunctionOperator, MatrixOperator
from lal.curvature.traces import METHODS, Estimate, diagonal_estimate, frobenius, trace

F64, SURE = torch.float64, 1 - 1e-5  # an interval this wide fails for a reason
repeatable = settings(derandomize=True, deadline=None, max_examples=100)

eigenvalue = st.one_of(st.just(0.0), st.floats(-3, 3).map(lambda x: round(x, 3)), st.sampled_from([1.0, -1.0, 1e-6, 10.0]))
spectrum = st.builds(lambda few, times: torch.tensor(few, dtype=F64).repeat(times), st.lists(eigenvalue, min_size=1, max_size=12), st.integers(1, 6))
seeds = st.integers(0, 10**6)


def planted(eigenvalues, seed=0, dtype=F64):
    "A symmetric matrix with these eigenvalues and random eigenvectors."
    n = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator(seed, "data"))).Q
    A = (Q * eigenvalues) @ Q.T
    return ((A + A.T) / 2).to(dtype)


def holds(e: Estimate, truth, scale=1.0):
    "Is the truth in the interval, but for rounding in sums of numbers of this size?"
    slack = 1e-7 * float(scale) + 1e-12
    return all(e.low - slack <= x <= e.high + slack for x in (float(truth), e.estimate)) and not e.standard_error < 0


@pytest.mark.parametrize("method", METHODS)
@repeatable
@given(spectrum, seeds, st.integers(10, 40))
def test_trace_within_its_interval(method, eigenvalues, seed, probes):
    A = planted(eigenvalues, seed)
    e = trace(A, probes, method, seed, SURE)
    assert holds(e, eigenvalues.sum(), eigenvalues.abs().sum())
    assert e.products == min(probes, len(A)) and (e.probes == 0) == (probes >= len(A))
    assert e.probes or math.isclose(e.estimate, float(A.trace()), abs_tol=1e-12)


@repeatable
@given(spectrum, seeds, st.integers(10, 40), st.integers(1, 30))
def test_frobenius_within_its_interval_also_of_rectangles(eigenvalues, seed, probes, rows):
    for A in (planted(eigenvalues, seed), planted(eigenvalues, seed)[:rows]):
        assert holds(frobenius(A, probes, seed, SURE), A.norm(), eigenvalues.abs().sum())


@repeatable
@given(spectrum, seeds, st.integers(2, 100))
def test_diagonal_within_its_standard_errors(eigenvalues, seed, probes):
    A = planted(eigenvalues, seed)
    found, error = diagonal_estimate(A, probes, seed)
    if probes >= len(A):
        assert torch.equal(found, A.diagonal()) and not error.any()
    elif probes >= 10:
        assert ((found - A.diagonal()).abs() <= 8 * error + 1e-9).double().mean() > 0.95


@repeatable
@given(spectrum, seeds, st.integers(1, 8), st.integers(2, 90))
def test_density_and_masses(eigenvalues, seed, probes, steps):
    A, n = planted(eigenvalues, seed), len(eigenvalues)
    d = spectral_density(A, probes, steps, seed, confidence=SURE)
    assert torch.isfinite(torch.stack([d.density, d.low, d.high])).all()
    assert abs(float(torch.trapezoid(d.density, d.grid)) - 1) < 1e-12
    slack = 1e-9 * d.density.max()
    assert (d.low <= d.density + slack).all() and (d.density <= d.high + slack).all() and (d.low >= 0).all()
    assert torch.allclose(d.weights.sum(1), torch.ones(probes, dtype=F64)) and d.products <= probes * min(steps, n)
    assert d.nodes.shape == d.weights.shape == (probes, steps) and 0 <= d.bias <= 2
    size = float(eigenvalues.abs().max())
    assert d.nodes.min() >= eigenvalues.min() - 1e-9 * size and d.nodes.max() <= eigenvalues.max() + 1e-9 * size
    share = d.negative_mass()
    assert 0 <= share.low <= share.estimate + 1e-12 and share.estimate <= share.high + 1e-12 <= 1 + 1e-9
    whole = d.mass(-math.inf, math.inf)
    assert math.isclose(whole.low, 1, rel_tol=1e-9) and math.isclose(whole.high, 1, rel_tol=1e-9)
    if steps >= 2 * len(eigenvalues.unique()):  # the quadrature is exact, and its half is
        truth = d.smoothed(eigenvalues)
        assert d.bias < 1e-6
        if n < 5 or probes < 3:
            return  # too few for the band's approximation, as the page says
        seen = truth > 1e-3 * truth.max()
        assert ((d.low <= truth * (1 + 1e-5)) & (truth <= d.high * (1 + 1e-5)))[seen].all()
        for end in (-1.5, 0.5, 2.0):
            k = torch.erfc((end - eigenvalues) / (d.sigma * math.sqrt(2))) / 2
            assert holds(d.mass(end, math.inf), k.mean())


@repeatable
@given(spectrum, seeds, st.integers(2, 8), st.floats(0.01, 3))
def test_log_det_within_its_interval_or_refused(eigenvalues, seed, probes, above):
    A, lowest = planted(eigenvalues, seed), float(eigenvalues.min())
    shift = above - lowest
    truth = (eigenvalues + shift).log()
    assert holds(log_det(A, shift, probes, 60, seed, SURE), truth.sum(), 10 * len(A))
    with pytest.raises(ValueError, match="not positive definite"):
        log_det(A, -lowest - above, probes, 60, seed)


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_one_distinct_eigenvalue_leaves_nothing_to_chance(n):
    for value in (2.5, 0.0, -1e-6):
        for dtype in (F64, torch.float32):
            A = value * torch.eye(n, dtype=dtype)
            d = spectral_density(A, probes=3)
            truth = d.smoothed(torch.full((n,), value))
            for y in (d.density, d.low, d.high):
                assert torch.allclose(y, truth, rtol=1e-3, atol=1e-5 * float(truth.max()))
            assert float(d.negative_mass()) == (value < 0)
            assert math.isclose(float(trace(A)), n * value, rel_tol=1e-6) and trace(A).standard_error < 1e-6 * n
            assert math.isclose(float(log_det(A, 1.0)), n * math.log1p(value), rel_tol=1e-5, abs_tol=1e-7 * n)


def test_equal_samples_are_no_certainty_while_they_are_few():
    swap = torch.zeros(50, 50, dtype=F64)
    swap[0, 1] = swap[1, 0] = 1.0  # samples are 2 or −2
    for probes in (2, 3, 6):
        for found in ([trace(swap, probes, seed=s) for s in range(40)], [trace(swap.float(), probes, seed=s) for s in range(40)]):
            assert any(abs(float(e)) == 2 for e in found) and all(e.standard_error > 0 and e.low < 0 < e.high for e in found)
    assert trace(torch.eye(50), 2).standard_error == pytest.approx(50**0.5) and trace(torch.eye(50), 12).standard_error == 0
    assert trace(torch.eye(50), 12, confidence=0.99).standard_error > 0
    found, error = diagonal_estimate(swap, 2)
    assert ((found != 0) <= (error > 0)).all() and (found.abs() <= 2 * error + 1e-12).all()
    assert not diagonal_estimate(torch.eye(50), 6)[1].any() and diagonal_estimate(torch.eye(50), 5)[1].all()


def test_the_norm_from_few_probes_is_held_as_often_as_it_says():
    eigenvalues = torch.cat([torch.ones(3, dtype=F64), torch.zeros(97, dtype=F64)])
    for probes in (2, 3, 5):
        held = sum(e.low <= 3**0.5 <= e.high for e in (frobenius(eigenvalues.diag(), probes, seed) for seed in range(400)))
        assert held >= 0.9 * 400, probes


def test_a_negative_mass_that_no_node_saw_is_not_known_to_be_none():
    eigenvalues = torch.cat([torch.full((10,), -1e-4, dtype=F64), torch.linspace(0.1, 1, 90, dtype=F64)])
    truth, op = 1e-3 / float(eigenvalues.abs().sum()), MatrixOperator(eigenvalues.diag())
    for seed in range(20):
        d = spectral_density(op, probes=1, steps=3, seed=seed)
        up, down = d.negative_mass(), spectral_density(-eigenvalues.diag(), 1, 3, seed).negative_mass()
        assert (float(up), float(down)) == (0, 1) and math.isnan(up.standard_error) and "± unknown" in repr(up)
        assert up.low == 0 < truth < up.high < 1 and down.high == 1 > 1 - truth > down.low > 0
        none, past = d.mass(5, 6), d.mass(-9, 9)
        assert (float(none), float(past)) == (0, 1) and math.isnan(none.standard_error) and math.isnan(past.standard_error)
        assert 0 == none.low < none.high < 1 and 0 < past.low < past.high == 1
    for exhausted in (spectral_density(torch.eye(9), 1, 3), spectral_density(eigenvalues[10:20].diag(), 1, 10)):
        assert exhausted.negative_mass().high == 0 and exhausted.negative_mass().standard_error == 0


def test_the_same_in_float32():
    eigenvalues = torch.cat([torch.linspace(-0.1, 0.2, 90, dtype=F64), torch.linspace(1, 3, 10, dtype=F64)])
    A = planted(eigenvalues)
    for measure in (trace, lambda A: trace(A, method="hutch++"), frobenius, lambda A: log_det(A, 0.5)):
        one, two = measure(A), measure(A.float())
        assert math.isclose(one.estimate, two.estimate, rel_tol=1e-4) and math.isclose(one.low, two.low, rel_tol=1e-3)
    one, two = spectral_density(A, sigma=0.04), spectral_density(A.float(), sigma=0.04)
    assert two.density.dtype == F64 and math.isclose(one.mass(0.5, 4).low, two.mass(0.5, 4).low, rel_tol=1e-3)
    assert abs(float(torch.trapezoid(two.density, two.grid)) - 1) < 1e-12
    assert (one.smoothed(eigenvalues) - one.density).abs().max() < 3 and abs(float(one.negative_mass()) - float(two.negative_mass())) < 1e-4


def test_every_symmetric_operator_will_do():
    theta = torch.randn(60, dtype=F64, generator=generator(0, "theta"))
    f = lambda t: (t**4).sum() / 12 + (t[1:] * t[:-1]).sum() ** 2 / 50
    exact, differences = HessianOperator(f, theta), FiniteDifferenceOperator(f, theta, "central")
    dense = exact.to_dense().requires_grad_()
    live = FunctionOperator(lambda v: dense @ v, 60, F64)
    for measure in (trace, frobenius, spectral_density, lambda op: log_det(op, 20.0), lambda op: trace(op, method="hutch++")):
        one, two, three = (measure(op) for op in (exact, differences, live))
        if isinstance(one, Estimate):
            assert math.isclose(one.estimate, two.estimate, rel_tol=1e-5) and math.isclose(one.estimate, three.estimate, rel_tol=1e-9)
        else:
            assert (one.mass(0, 1).estimate - two.mass(0, 1).estimate) < 1e-4 and not three.density.requires_grad


def test_probes_depend_on_the_seed_alone_and_nothing_is_moved():
    A = planted(torch.linspace(-1, 2, 40, dtype=F64))
    before = rng_states()
    measures = (trace, lambda A, **k: trace(A, 20, "hutch++", **k), frobenius, lambda A, **k: log_det(A, 2.0, **k))
    first = [m(A, seed=3) for m in measures]
    with seeded(1, "elsewhere"):
        again = [m(A, seed=3) for m in measures]
    assert again == first and [m(A, seed=3) for m in measures] == first and all(m(A, seed=4) != e for m, e in zip(measures, first))
    diagonal_estimate(A), spectral_density(A), lanczos_quadrature(A), [m(A) for m in measures]
    assert all(torch.equal(before[name], after) for name, after in rng_states().items())
    assert trace(A, 20).estimate != trace(A, 21).estimate
    nodes, weights = lanczos_quadrature(A, 5, 10)
    more, _ = lanczos_quadrature(A, 8, 10)
    assert torch.equal(nodes, more[:5]) and not torch.equal(nodes[0], nodes[1])


def test_the_share_interval_is_a_test_turned_round():
    from scipy.stats import beta

    for share in (1e-5, 0.01, 0.3, 0.999):
        for freedom in (0.6, 20.0, 5e4):
            low, high = share_interval(share, freedom, 0.9)
            for end, tail in ((low, 0.95), (high, 0.05)):
                if 1e-6 / freedom < end < 1 - 1e-9:
                    assert math.isclose(beta.cdf(share, freedom * end, freedom * (1 - end)), tail, abs_tol=1e-6)
    assert [float(x) for x in share_interval(0.0, 10, 0.9)] == [0, 0] and [float(x) for x in share_interval(1.0, 10, 0.9)] == [1, 1]


SQUARE, WIDE = torch.eye(50), torch.ones(3, 50)
LOPSIDED = torch.ones(50, 50).triu()
NAN = FunctionOperator(lambda v: v * torch.nan, 50)
BAD = [  # what is asked, and words the error must say
    (lambda: trace(WIDE), "not square"),
    (lambda: trace(LOPSIDED), "not symmetric"),
    (lambda: trace(SQUARE, 1), "fewer than 2"),
    (lambda: trace(SQUARE, 3, "hutch++"), "fewer than 4"),
    (lambda: trace(SQUARE, 0), "probes = 0"),
    (lambda: trace(SQUARE, "30"), "probes = 30"),
    (lambda: trace(SQUARE, True), "probes = True"),
    (lambda: trace(SQUARE, 30.0), "probes = 30.0"),
    (lambda: trace(SQUARE, method="exact"), "hutchinson, hutch++"),
    (lambda: trace(SQUARE, confidence=1.0), "confidence = 1.0"),
    (lambda: trace(SQUARE, confidence=95), "confidence = 95"),
    (lambda: trace(SQUARE, seed=-1), "seed = -1"),
    (lambda: trace(NAN), "not finite"),
    (lambda: trace(NAN, method="hutch++"), "not finite"),
    (lambda: trace(torch.eye(3).long()), "torch.int64"),
    (lambda: trace(None), "neither an operator nor a matrix"),
    (lambda: frobenius(SQUARE, 1), "fewer than 2"),
    (lambda: frobenius(NAN), "not finite"),
    (lambda: diagonal_estimate(WIDE), "not square"),
    (lambda: diagonal_estimate(SQUARE, 1), "fewer than 2"),
    (lambda: diagonal_estimate(NAN), "not finite"),
    (lambda: spectral_density(WIDE), "not square"),
    (lambda: spectral_density(LOPSIDED), "not symmetric"),
    (lambda: spectral_density(SQUARE, 0), "probes = 0"),
    (lambda: spectral_density(SQUARE, steps=1), "steps = 1"),
    (lambda: spectral_density(SQUARE, steps=2.5), "steps = 2.5"),
    (lambda: spectral_density(SQUARE, sigma=-1), "sigma = -1"),
    (lambda: spectral_density(SQUARE, sigma=math.nan), "sigma = nan"),
    (lambda: spectral_density(SQUARE, points=3), "points = 3"),
    (lambda: spectral_density(planted(torch.arange(50.0)), sigma=1e-5), "larger sigma"),
    (lambda: spectral_density(NAN), "not finite"),
    (lambda: spectral_density(SQUARE, confidence=0), "confidence = 0"),
    (lambda: spectral_density(SQUARE).mass(1, 0), "not an interval"),
    (lambda: spectral_density(SQUARE).mass(math.nan, 0), "not an interval"),
    (lambda: lanczos_quadrature(SQUARE, seed=-1), "seed = -1"),
    (lambda: log_det(SQUARE, -1.0), "not positive definite"),
    (lambda: log_det(SQUARE, math.nan), "shift = nan"),
    (lambda: log_det(MatrixOperator(WIDE), 1.0), "not square"),
]


@pytest.mark.parametrize("act, words", BAD, ids=[words for _, words in BAD])
def test_bad_input_is_one_clear_error(act, words):
    with pytest.raises(ValueError) as error:
        act()
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_the_same_probes():
    A = planted(torch.linspace(-1, 2, 100, dtype=F64))
    state = torch.cuda.get_rng_state()
    for measure in (trace, lambda A: trace(A, method="hutch++"), frobenius, lambda A: log_det(A, 2.0)):
        assert math.isclose(measure(A).estimate, measure(A.cuda()).estimate, rel_tol=1e-9)
    assert diagonal_estimate(A.cuda())[0].is_cuda
    one, two = spectral_density(A), spectral_density(A.cuda())
    assert torch.allclose(one.density, two.density, rtol=1e-6, atol=1e-9) and not two.density.is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), state)
