"Summaries of a spectrum and of subspaces: their bounds and symmetries on any input, oracles, and one clear error for bad ones."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from lal.core.device import generator
from lal.curvature.summaries import (alignment, condition_number, negative_mass, participation_ratio, positive_condition_number, principal_angles, span,
                                     spectral_gap, stable_rank, summarise)
from scipy.linalg import subspace_angles
from scipy.stats import beta, kstest

F64 = torch.float64
ROUNDING = 2.0**-53
quick = settings(max_examples=100, deadline=None, derandomize=True)
spectra = arrays(np.float64, st.integers(1, 12), elements=st.floats(-1e3, 1e3, allow_subnormal=False)).map(torch.from_numpy)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=dtype, generator=generator(seed, "test"))


@quick
@given(spectra)
def test_bounds_hold_for_any_spectrum(values):
    n, found = len(values), summarise(values)
    if not values.any():
        assert found["condition_number"] == math.inf
        assert all(math.isnan(found[k]) for k in ("positive_condition_number", "participation_ratio", "stable_rank", "negative_mass"))
        return
    slack = 1 + 4 * n * ROUNDING
    assert 1 / slack <= found["stable_rank"] <= found["participation_ratio"] * slack
    assert found["participation_ratio"] <= n * slack
    assert 0 <= found["negative_mass"] <= 1
    assert found["condition_number"] >= 1
    assert math.isnan(found["positive_condition_number"]) == bool((values <= 0).all()) or found["positive_condition_number"] >= 1
    assert math.isnan(found["spectral_gap"]) if n == 1 else found["spectral_gap"] >= 0


@quick
@given(spectra, st.floats(1e-150, 1e150), st.randoms(use_true_random=False))
def test_scale_and_order_do_not_matter(values, factor, random):
    order = list(range(len(values)))
    random.shuffle(order)
    scaled = values[order] * factor
    if (scaled == 0).sum() != (values == 0).sum() or scaled.abs().max() < 1e-290:
        return
    for name, value in summarise(values).items():
        expected = value * factor if name == "spectral_gap" else value
        got = summarise(scaled)[name]
        if name in ("condition_number", "positive_condition_number") and got != expected:
            sizes = values.abs()[values != 0] / values.abs().max()  # one entry on the threshold may fall to either side
            assert math.isnan(got) and math.isnan(expected) or math.isclose(got, expected, rel_tol=1e-9) or \
                ((sizes / (len(values) * ROUNDING) - 1).abs() < 1e-6).any()
        else:
            assert np.isclose(got, expected, rtol=1e-9, atol=1e-12 * factor * float(values.abs().max()), equal_nan=True), name


@quick
@given(spectra)
def test_negation_swaps_the_signs(values):
    if values.any():
        assert math.isclose(negative_mass(values) + negative_mass(-values), 1, rel_tol=1e-12)
        for same in (condition_number, participation_ratio, stable_rank):
            assert same(values) == same(-values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_threshold_is_that_of_the_dtype(dtype):
    u = torch.finfo(dtype).eps / 2
    above, below = (torch.tensor([1.0, 2.0 * f * u], dtype=dtype) for f in (1.5, 0.5))
    assert math.isclose(condition_number(above), 1 / (3 * u), rel_tol=1e-2) and condition_number(below) == math.inf
    assert positive_condition_number(above) > 1 and positive_condition_number(below) == 1


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_low_rank_matrices(rank):
    B = torch.zeros(8, 8, dtype=F64)
    B[range(rank), range(rank)] = 2.0
    Q = torch.linalg.qr(randn(8, 8)).Q
    values = torch.linalg.eigvalsh(Q @ B @ Q.T)
    assert condition_number(values) == math.inf
    assert math.isclose(participation_ratio(values), rank, rel_tol=1e-12) and math.isclose(stable_rank(values), rank, rel_tol=1e-12)
    assert math.isclose(spectral_gap(values, rank), 2, rel_tol=1e-12)


BAD = [
    (lambda: summarise([1.0]), "eigenvalues is a list"),
    (lambda: summarise(torch.ones(0)), "n ≥ 1"),
    (lambda: summarise(torch.ones(())), "and is []"),
    (lambda: summarise(torch.eye(2)), "and is [2, 2]"),
    (lambda: condition_number(torch.tensor([1, 2])), "torch.int64"),
    (lambda: condition_number(torch.ones(2, dtype=torch.cfloat)), "torch.complex64"),
    *((lambda f=f: f(torch.tensor([1.0, torch.nan])), "not finite") for f in
      (condition_number, positive_condition_number, participation_ratio, stable_rank, negative_mass, spectral_gap, summarise)),
    (lambda: stable_rank(torch.tensor([1.0, -torch.inf])), "not finite"),
    (lambda: spectral_gap(torch.ones(4), 4), "k = 1 to 3"),
    (lambda: spectral_gap(torch.ones(4), 0), "k = 0"),
    (lambda: spectral_gap(torch.ones(4), 1.0), "k = 1.0"),
    (lambda: spectral_gap(torch.ones(4), True), "k = True"),
    (lambda: spectral_gap(torch.ones(1)), "two or more"),
    (lambda: alignment(torch.ones(3), torch.ones(4)), "vectors has 3 rows and basis 4"),
    (lambda: alignment(torch.ones(0), torch.ones(0)), "vectors must be [n] or [n, m]"),
    (lambda: alignment(torch.ones(3), torch.ones(3, 0)), "basis must be [n] or [n, m]"),
    (lambda: alignment(torch.ones(3), torch.ones(3, 1, 1)), "[3, 1, 1]"),
    (lambda: alignment(torch.ones(3), []), "basis must be a tensor"),
    (lambda: alignment("v", torch.ones(3)), "vectors must be a tensor"),
    (lambda: alignment([torch.ones(3), torch.ones(2)], torch.ones(3)), "[2] and [3]"),
    (lambda: alignment({"a": torch.ones(3)}, {"b": torch.ones(3)}), "only another has b"),
    (lambda: alignment({"a": torch.ones(3)}, {"a": torch.ones(1, 3)}), "a is [3]"),
    (lambda: alignment(torch.ones(3).long(), torch.ones(3)), "torch.int64"),
    (lambda: alignment(torch.ones(3) / 0, torch.ones(3)), "vectors holds numbers that are not finite"),
    (lambda: alignment(torch.ones(3), torch.ones(3) / 0), "basis holds numbers that are not finite"),
    (lambda: principal_angles(torch.ones(3), torch.zeros(3)), "spans nothing"),
    (lambda: principal_angles(torch.ones(3), torch.ones(2)), "A has 3 rows and B 2"),
]


@pytest.mark.parametrize("act, words", BAD, ids=[f"{i}: {words}" for i, (_, words) in enumerate(BAD)])
def test_bad_input_is_one_clear_error(act, words):
    with pytest.raises(ValueError) as caught:
        act()
    assert words in str(caught.value) and "\n" not in str(caught.value)


@quick
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), st.integers(0, 99))
def test_alignment_is_a_share_and_ignores_how_the_span_is_given(n, k, m, seed):
    V, B = randn(n, m, seed=seed), randn(n, k, seed=seed + 100)
    found = alignment(V, B)
    Q = np.linalg.qr(B.numpy())[0]
    expected = np.linalg.norm(Q.T @ V.numpy()) ** 2 / np.linalg.norm(V.numpy()) ** 2
    assert math.isclose(found.value, expected, rel_tol=1e-9) and 0 <= found.value <= 1
    assert found.null == min(n, k) / n and 0 <= found.chance <= 1
    scaled = B * torch.logspace(-30, 30, k, dtype=F64)
    for same in (alignment(3e9 * V, scaled), alignment(list(V.T), list(B.T)), alignment(V, torch.cat([B, B[:, :1]], 1)),
                 alignment(V, torch.cat([torch.zeros(n, 1, dtype=F64), B], 1))):
        assert np.allclose(same, found, rtol=1e-6, atol=1e-9)
    if k >= n:
        assert found.value > 1 - 1e-12 and found.chance == 1 and found.spread == 0


def test_the_null_of_one_vector_is_the_beta_distribution():
    n, k = 12, 3
    drawn = [alignment(randn(n, seed=s), torch.eye(n, k, dtype=F64)) for s in range(2000)]
    assert kstest([a.value for a in drawn], beta(k / 2, (n - k) / 2).cdf).pvalue > 1e-6  # how often a true null may fail
    assert kstest([a.chance for a in drawn], "uniform").pvalue > 1e-6
    for a in drawn[:20]:
        assert math.isclose(a.chance, beta(k / 2, (n - k) / 2).sf(a.value), rel_tol=1e-9)
        assert math.isclose(a.spread, beta(k / 2, (n - k) / 2).std(), rel_tol=1e-12)


@pytest.mark.parametrize("m", [1, 2, 5, 8, 20])
def test_the_spread_of_several_vectors(m):
    n, k, draws = 8, 3, 40_000
    V = randn(n, m, seed=m) * torch.logspace(0, -1, m, dtype=F64)
    Q = torch.linalg.qr(randn(draws, n, k, seed=7)).Q
    inside = (Q.mT @ V).square().sum((1, 2)) / V.square().sum()
    found = alignment(V, Q[0])
    assert abs(float(inside.mean()) - found.null) < 5 * found.spread / draws**0.5
    assert abs(float(inside.std()) / found.spread - 1) < 5 / draws**0.5  # known to 1/√(2·draws) of itself, if normal


def test_vectors_in_every_form():
    v = {"w": randn(2, 3, seed=1), "b": randn(4, seed=2)}
    flat = torch.cat([v["w"].reshape(-1), v["b"]])
    basis = [{"b": randn(4, seed=s), "w": randn(2, 3, seed=s + 9)} for s in (3, 4)]  # in another order
    matrix = torch.stack([torch.cat([b["w"].reshape(-1), b["b"]]) for b in basis], 1)
    assert np.allclose(alignment(v, basis), alignment(flat, matrix))
    assert torch.allclose(principal_angles(v, basis), principal_angles(flat, matrix))
    assert torch.allclose(span(basis).abs().sum(), span(torch.stack([torch.cat([b["b"], b["w"].reshape(-1)]) for b in basis], 1)).abs().sum())


def test_float32_noise_is_no_direction():
    for seed in range(20):
        v = randn(100_000, seed=seed, dtype=torch.float32)
        assert span(torch.stack([v, 2.3 * v, v / 7], 1)).shape == (100_000, 1)
        w = v + 1e-4 * randn(100_000, seed=seed + 50, dtype=torch.float32)
        assert span(torch.stack([v, w], 1)).shape == (100_000, 2)


@quick
@given(st.integers(2, 10), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_angles_agree_with_scipy(n, k, l, seed):
    A, B = randn(n, min(k, n), seed=seed), randn(n, min(l, n), seed=seed + 100)
    ours, theirs = principal_angles(A, B), subspace_angles(A.numpy(), B.numpy())[::-1]
    assert np.allclose(ours, theirs, rtol=0, atol=1e-7)  # SciPy's error where small and large angles mix
    assert torch.allclose(ours, principal_angles(B, A), rtol=0, atol=1e-14) and (ours[1:] >= ours[:-1] - 1e-15).all()
    cosines = torch.from_numpy(np.cos(np.asarray(ours)))
    overlap = alignment(torch.from_numpy(np.linalg.qr(B.numpy())[0]), A).value * min(l, n)
    assert math.isclose(overlap, float(cosines.square().sum()), rel_tol=1e-9, abs_tol=1e-12)


@quick
@given(st.lists(st.floats(-14, math.log10(math.pi / 2) - 1e-3), min_size=1, max_size=5), st.integers(0, 99))
def test_small_angles_keep_their_digits(powers, seed):
    angles = torch.tensor(sorted(10.0**p for p in powers), dtype=F64)
    k = len(angles)
    A = torch.eye(2 * k + 1, k, dtype=F64)
    turned = torch.cat([angles.cos().diag(), angles.sin().diag(), torch.zeros(1, k, dtype=F64)])
    frame = torch.linalg.qr(randn(k, k, seed=seed)).Q
    assert torch.allclose(principal_angles(A, turned @ frame), angles, rtol=1e-12, atol=1e-15)


def test_nothing_random_moves_and_nothing_is_changed():
    before, v, B = torch.get_rng_state(), randn(5), randn(5, 2)
    copies = v.clone(), B.clone()
    alignment(v, B), principal_angles(v, B), summarise(v)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(v, copies[0]) and torch.equal(B, copies[1])
