"EigenTracker against dense eigenvalues in double precision: along a training run, through crossings and jumps, at the edges, and what it refuses and leaves alone."
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from test_spectra import Peak, planted

from lal.core.device import generator, seeded
from lal.curvature.chain import height
from lal.curvature.hessian_operator import FiniteDifferenceOperator, HessianOperator
from lal.curvature.lanczos import NotConverged, eigsh
from lal.curvature.operators import FunctionOperator, MatrixOperator
from lal.curvature.params import loss_function, params_of
from lal.curvature.tracker import EigenTracker
from lal.hooks.rows import from_checkpoint, to_checkpoint

F64 = torch.float64
ENDS = ("LA", "SA", "LM", "both")


def most_wanted(values, k, which):
    "Of all eigenvalues, in the order of an update."
    if which == "both":
        return torch.cat([most_wanted(values, k, end) for end in ("LA", "SA")])
    return values[height(values, which).argsort(descending=True, stable=True)][:k]


def assert_right(found, A, k, which, tol):
    "Eigenvalues and residuals to tol · max|λ| of the dense matrix, orthonormal vectors, residuals that are what they say."
    values, A = torch.linalg.eigvalsh(A.double()), A.double()
    scale, unit = float(values.abs().max()), torch.finfo(found.eigenvectors.dtype).eps
    rounding, expected = 100 * unit * math.sqrt(len(A)) * scale, most_wanted(values, k, which)
    got = found.eigenvalues
    if which == "LM":  # ±λ tie
        got, expected = got.abs(), expected.abs()
    assert found.converged and (got - expected).abs().max() <= tol * scale + rounding
    X = found.eigenvectors.double()
    assert X.shape == (len(A), len(expected))
    overlap, ends = (X.T @ X - torch.eye(X.shape[1], dtype=F64)).abs(), torch.arange(X.shape[1]) // k
    inside = ends[:, None] == ends
    assert overlap[inside].max() <= 100 * unit * math.sqrt(len(A))
    if which == "both":  # of two solves: |xᵀy| ≤ (‖r_x‖ + ‖r_y‖) / |λ_x − λ_y|
        gap = (found.eigenvalues[:, None] - found.eigenvalues).abs()
        assert (overlap * gap)[~inside].max() <= 2 * tol * scale + rounding
    measured = torch.linalg.vector_norm(A @ X - X * found.eigenvalues, dim=0)
    assert (measured <= tol * scale + rounding).all()
    assert torch.allclose(measured, found.residuals, rtol=0.05, atol=rounding)


def network(dtype=F64):
    with seeded(0, "init"):
        model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    rng = generator(0, "data")
    return model.to(dtype), torch.randn(200, 10, generator=rng).to(dtype), torch.randint(5, (200,), generator=rng)


@pytest.fixture(scope="module")
def recorded():
    "The dense Hessian at 25 log points of a training run, 205 parameters, four steps of Adam apart."
    model, x, y = network()
    optimizer, points = torch.optim.Adam(model.parameters(), lr=1e-2), []
    f = loss_function(model, x, y)
    for step in range(97):
        if step % 4 == 0:
            A = HessianOperator(f, params_of(model), vectorize=True) @ torch.eye(205, dtype=F64)
            points.append((A + A.T) / 2)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return points


@pytest.mark.parametrize("which", ENDS)
def test_along_a_training_run(recorded, which):
    "Three at an end, at every log point."
    tracker = EigenTracker(3, which)
    for A in recorded:
        assert_right(tracker.update(A), A, 3, which, tracker.tol)


def basis(n, seed=0, drift=0.0):
    "Orthonormal columns, turned by `drift` from where they were."
    X, Y = torch.randn(2, n, n, dtype=F64, generator=generator(seed, "data"))
    return torch.linalg.qr(X + drift * Y).Q


def matrix(values, Q):
    values = torch.as_tensor(values, dtype=F64)
    A = (Q * values) @ Q.T
    return MatrixOperator((A + A.T) / 2)


BULK = torch.linspace(-0.4, 0.4, 56, dtype=F64).tolist()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("which", ENDS)
def test_a_crossing_at_the_edge(k, which):
    "The k-th and the next change places while no eigenvector moves: seen at each update, between two looks too."
    sign = -1 if which == "SA" else 1
    for seed in range(3):
        tracker, Q = EigenTracker(k, which, 1e-8, look_every=100), basis(60, seed)
        for t in np.linspace(0, 1, 21):
            values = sign * torch.tensor([4.0, 3.5, *BULK, -3.0, -3.3], dtype=F64)
            values[1:3] = torch.tensor([3.5, 3.2], dtype=F64) * sign
            values[k - 1], values[k] = sign * (3.1 - 0.5 * t), sign * (2.6 + 0.5 * t)
            values[: k - 1] = sign * torch.arange(4.0, 4.0 + k - 1, dtype=F64)
            op = matrix(values, Q)
            assert_right(tracker.update(op), op.matrix, k, which, 1e-8)


@pytest.mark.parametrize("which", ENDS)
def test_a_jump_that_turns_everything(which):
    "Right at once."
    tracker = EigenTracker(3, which, 1e-6, look_every=100)
    for t in range(8):
        op = matrix([5.0, 4.0, *BULK, -3.0, -3.5], basis(60, t // 4, 0.01 * t))
        assert_right(tracker.update(op), op.matrix, 3, which, 1e-6)


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("look_every", [1, 4])
def test_a_hidden_jump(which, look_every):
    "A value from the bulk to the top, in a direction that nothing has to do with: found by the next look."
    Q, values = basis(60), torch.tensor([5.0, 4.0, *BULK, -4.5, -5.5], dtype=F64)
    for late in range(1, 5):
        tracker, right = EigenTracker(2, which, 1e-6, look_every=look_every), []
        for t in range(12):
            values[30] = (-9.0 if which == "SA" else 9.0) if t >= late else 0.0
            op = matrix(values, Q)
            found, expected = tracker.update(op), most_wanted(torch.linalg.eigvalsh(op.matrix), 2, which)
            right.append(bool((found.eigenvalues - expected).abs().max() <= 1e-5))
        assert all(right[:late]) and all(right[late + look_every - 1 :])


@pytest.mark.parametrize("which", ["LA", "LM", "both"])
def test_the_tolerance_follows_a_spectrum_that_shrinks(which):
    "It is a share of max|λ| now, not of what it was at the last solve."
    tracker = EigenTracker(2, which, 1e-4)
    for t in range(8):
        A = 0.5**t * drifting(t).matrix
        found = tracker.update(A)
        wrong = torch.linalg.vector_norm(A @ found.eigenvectors - found.eigenvectors * found.eigenvalues, dim=0)
        assert found.converged and wrong.max() <= 1.01e-4 * torch.linalg.eigvalsh(A).abs().max()


@pytest.mark.parametrize("which", ENDS)
def test_half_of_the_products(which):
    "On a matrix that rotates smoothly, with decaying values at both ends: at most half of what new solves take, looks included."
    decay = 4 * 0.8 ** torch.arange(20, dtype=F64)
    values = torch.cat([decay, torch.linspace(-0.02, 0.02, 160, dtype=F64), -0.8 * decay])
    tracker, spent, anew = EigenTracker(2, which), 0, 0
    for t in range(31):
        op = matrix(values, basis(200, 0, 0.002 * t))
        found = tracker.update(op)
        if t:
            spent += found.products
            anew += sum(eigsh(op, 2, end).products for end in tracker.ends)
    assert 2 * spent <= anew, (spent, anew)
    assert_right(found, op.matrix, 2, which, 1e-4)


def drifting(t, n=60):
    return matrix([5.0, 4.0, *torch.linspace(-0.4, 0.4, n - 4).tolist(), -3.0, -3.5], basis(n, 0, 0.02 * t))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", [through_a_file, lambda s: from_checkpoint(through_a_file(to_checkpoint(s, "tracker"))), lambda s: s])
@pytest.mark.parametrize("which", ENDS)
def test_a_checkpoint(way, which):
    "Before the first update, after a solve, after warm ones and across a look: the same bits afterwards."
    for before in (0, 1, 2, 5):
        one, other = (EigenTracker(2, which, look_every=3) for _ in range(2))
        for t in range(before):
            one.update(drifting(t))
        other.load_state_dict(way(one.state_dict()))
        for t in range(before, before + 4):
            ours, theirs = (tracker.update(drifting(t)) for tracker in (one, other))
            assert all(torch.equal(*pair) for pair in zip(ours[:3], theirs[:3])) and ours[3:] == theirs[3:]


def test_a_state_stays_what_it_was():
    "Later updates of the tracker, and what is done to a result, change no state taken before."
    tracker = EigenTracker(2)
    tracker.update(drifting(0))
    tracker.update(drifting(1))
    state = tracker.state_dict()
    kept = through_a_file(state)
    tracker.update(drifting(2)).eigenvectors.zero_()
    assert torch.equal(state["block"], kept["block"]) and torch.equal(state["memory"][0], kept["memory"][0])
    other = EigenTracker(2)
    other.load_state_dict(kept)
    other.update(drifting(2))
    ours, theirs = (each.update(drifting(3)) for each in (tracker, other))
    assert torch.equal(ours.eigenvectors, theirs.eigenvectors)


def test_same_seed_same_bits():
    def last(seed):
        tracker = EigenTracker(2, seed=seed, look_every=2)
        return [tracker.update(drifting(t)) for t in range(5)][-1]

    one, two, other = last(0), last(0), last(1)
    assert torch.equal(one.eigenvectors, two.eigenvectors) and one.products == two.products
    assert not torch.equal(one.eigenvectors, other.eigenvectors)


def test_randomness_untouched():
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    tracker = EigenTracker(2, look_every=2)
    for t in range(4):
        tracker.update(drifting(t))
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()


@pytest.mark.parametrize("k", [1, 5, 12])
@pytest.mark.parametrize("which", ["LA", "both"])
def test_memory(k, which):
    "m + 3k + 1 vectors between updates, and 6m + 10k new ones during one; 2k for k at both ends."
    n, ends, m = 40_000, 2 if which == "both" else 1, max(40, 4 * k)
    tracker, values = EigenTracker(k, which, look_every=3), torch.zeros(n)
    values[:200] = 0.9 ** torch.arange(200)
    values[200:400] = -0.9 ** (0.5 + torch.arange(200))
    held = 4 * n * (m + ends * (3 * k + 1))
    for t in range(4):
        D = values * (1 + 0.05 * t * torch.rand(n, generator=generator(0, "data")))
        with Peak() as peak:
            tracker.update(FunctionOperator(lambda v: D * v, n))
        tensors = [tracker.block, *tracker.past, tracker.memory.U]
        assert sum(x.numel() for x in tensors) * 4 <= held
        assert peak.most <= 4 * n * (6 * m + 10 * k * ends) + 2**18


SMALL = {
    "one": [-4.0],
    "two": [2.0, -1.0],
    "few": [5.0, 4.0, 3.0, 1.0, 0.5, 0.0, -1.0, -2.0],
    "fifteen": [1.0 / i for i in range(1, 16)],
    "sixfold": [*[5.0] * 6, *[3.0] * 6, *[1.0] * 6, *[-2.0] * 3, 0.5],
    "zero": [0.0] * 30,
    "identity": [2.0] * 30,
    "negative": [-3.0] * 9,
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_few_values_and_repeated_ones(name, which):
    "Any k, all of them too; fixed, turning a little, then altogether; every look and no look."
    values = SMALL[name]
    n = len(values)
    for k in sorted({1, min(3, n), max(1, n // 2), max(1, n - 1), n}):
        for look_every in (1, 3):
            tracker = EigenTracker(k, which, 1e-9, look_every=look_every)
            for seed, drift in ((0, 0), (0, 0), (0, 0.01), (0, 0.02), (1, 0), (1, 0.001)):
                op = matrix(values, basis(n, seed, drift))
                assert_right(tracker.update(op), op.matrix, k, which, 1e-9)


@pytest.mark.parametrize("which", ENDS)
def test_in_single_precision(which):
    tracker = EigenTracker(3, which, look_every=3)
    for t in range(8):
        op = MatrixOperator(drifting(t).matrix.float())
        assert_right(tracker.update(op), op.matrix, 3, which, tracker.tol)


class Counted(FunctionOperator):
    "Counts its products."

    def __init__(self, A):
        def product(v):
            self.made += 1
            return A @ v

        self.made = 0
        super().__init__(product, len(A), A.dtype)


@pytest.mark.parametrize("which", ENDS)
def test_products(which):
    "They are what was made, and at most the last solve's, those of a look and those of another solve."
    for limit in (20, 60, 1000):
        tracker = EigenTracker(2, which, 1e-5, look_every=2, max_products=limit)
        for t in range(12):
            last, warm = tracker.solved, tracker.block is not None
            op = Counted(drifting(t + 5 * (t // 4)).matrix)
            found = tracker.update(op, on_fail="return")
            ends = len(tracker.ends)
            assert found.products == op.made
            assert op.made <= limit * ends + warm * (max(last, 6 * ends) + limit * ends)


def test_not_converged():
    "The exception has what was found; the next update begins anew."
    uniform = planted(np.linspace(-1, 1, 200))
    for which in ENDS:
        tracker = EigenTracker(4, which, 1e-8, max_products=60)
        with pytest.raises(NotConverged, match="raise max_products") as caught:
            tracker.update(uniform)
        result = caught.value.result
        assert not result.converged and result.products <= 60 * len(tracker.ends) and "\n" not in str(caught.value)
        back = EigenTracker(4, which, 1e-8, max_products=60).update(uniform, on_fail="return")
        assert torch.equal(back.eigenvalues, result.eigenvalues)
        op = drifting(0, 30)  # of another size
        assert_right(tracker.update(op), op.matrix, 4, which, 1e-8)


def test_noise_ends_in_a_result_or_a_message():
    "A finite difference along a run in float32, and a matrix that noise makes asymmetric: right to what is asked, or not converged."
    model, x, y = network(torch.float32)
    optimizer, f = torch.optim.Adam(model.parameters(), lr=1e-2), loss_function(model, x, y)
    trackers, told = {(tol, end): EigenTracker(2, end, tol, max_products=200) for tol in (1e-2, 1e-6) for end in ("LA", "both")}, []
    for _ in range(5):
        exact = HessianOperator(f, params_of(model, F64))
        for (tol, end), tracker in trackers.items():
            found = tracker.update(FiniteDifferenceOperator(f, params_of(model), epsilon=1e-2), on_fail="return")
            told.append((tol, found.converged))
            if tol > 1e-3:
                X = found.eigenvectors.T.double().contiguous()
                wrong = torch.stack([(exact @ v - value * v).norm() for v, value in zip(X, found.eigenvalues)])
                assert found.converged and wrong.max() <= 3 * tol * found.eigenvalues.abs().max()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert not any(converged for tol, converged in told if tol < 1e-3)


@pytest.mark.parametrize("which, k, n", [("LA", 3, 80), ("both", 3, 80), ("LM", 2, 3), ("SA", 5, 5), ("LA", 30, 41), ("both", 3, 7)])
def test_an_operator_that_loses_its_symmetry(which, k, n):
    noise = 1e-3 * torch.randn(n, n, dtype=F64, generator=generator(0, "data"))
    A, tracker = planted(torch.linspace(1, 2, n)).matrix, EigenTracker(k, which, 1e-6)
    tracker.update(A)
    with pytest.raises(NotConverged):
        tracker.update(FunctionOperator(lambda v: (A + noise) @ v, n, F64))
    assert tracker.update(A).converged


@pytest.mark.parametrize("which, k, n", [("both", 1, 2), ("both", 3, 6), ("both", 20, 40)])
def test_all_values_of_an_operator_that_loses_its_symmetry(which, k, n):
    test_an_operator_that_loses_its_symmetry(which, k, n)


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("name", ["zero", "identity", "sixfold"])
def test_both_ends_are_orthonormal(name, k):
    "Also where the ends meet in one eigenvalue; each update."
    values = SMALL[name]
    k = min(k, len(values) // 2)
    tracker = EigenTracker(k, "both", 1e-9, look_every=2)
    for seed in (0, 0, 0, 1):
        op = matrix(values, basis(len(values), seed))
        found = tracker.update(op)
        assert_right(found, op.matrix, k, "both", 1e-9)
        X = found.eigenvectors
        assert (X.T @ X - torch.eye(2 * k, dtype=F64)).abs().max() <= 1e-12


def test_a_look_at_the_edge_of_a_crowd():
    "With a look at each update nothing is missed, where the smallest values are a thousandth of the largest and close together."
    for seed in (2, 19):
        rng = generator(seed, "data")
        v0, v1 = ((2 * torch.randn(90, dtype=F64, generator=rng)).exp() for _ in range(2))
        tracker = EigenTracker(4, "both", 1e-5, look_every=1, seed=seed)
        for t in range(3):
            A = matrix(v0 + 0.05 * t * v1, basis(90, seed, 0.05 * t)).matrix
            found, values = tracker.update(A), torch.linalg.eigvalsh(A)
            assert (found.eigenvalues - most_wanted(values, 4, "both")).abs().max() <= 2e-5 * values[-1]


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda w: w * math.nan, "not finite"),
        (lambda w: w * math.inf, "not finite"),
        (lambda w: w.long(), "no vector like it"),
        (lambda w: w.float(), "no vector like it"),
    ],
    ids=["nan", "inf", "long", "float"],
)
def test_products_of_the_wrong_kind(spoil, says, late):
    "In a warm update, from its first product on or later, as in a solve."
    A, calls = drifting(1).matrix, []
    tracker = EigenTracker(2)
    tracker.update(drifting(0))
    with pytest.raises(ValueError, match=says):
        tracker.update(FunctionOperator(lambda v: (calls.append(1), spoil(A @ v) if len(calls) > late else A @ v)[1], 60, F64))
    assert_right(tracker.update(A), A, 2, "LA", tracker.tol)


def test_products_that_require_gradients():
    "Nothing of them stays in a result or in the state."
    w, tracker = torch.ones((), dtype=F64, requires_grad=True), EigenTracker(2)
    for t in range(3):
        A = drifting(t).matrix
        found = tracker.update(FunctionOperator(lambda v: w * (A @ v), 60, F64))
        kept = [found.eigenvalues, found.eigenvectors, found.residuals, tracker.block, tracker.memory.U, tracker.memory.values]
        assert not any(x.requires_grad for x in kept)


@pytest.mark.parametrize("made, says", [(dict(k=None), "k = None"), (dict(k="3"), "k = '3'"), (dict(seed="a"), "seed = 'a'"), (dict(look_every=True), "look_every = True")], ids=str)
def test_refused_by_type(made, says):
    with pytest.raises(ValueError, match=says):
        EigenTracker(**made).update(torch.eye(4))


@pytest.mark.parametrize(
    "made, updated, says",
    [
        (dict(k=0), {}, "k = 0"),
        (dict(k=81), {}, "k = 81"),
        (dict(k=41, which="both"), {}, "k = 41 at both ends"),
        (dict(k=2.5), {}, "k = 2.5"),
        (dict(k=True), {}, "k = True"),
        (dict(which="SM"), {}, "which = 'SM'"),
        (dict(tol=0.0), {}, "tol = 0.0"),
        (dict(max_products=0), {}, "max_products = 0"),
        (dict(look_every=0), {}, "look_every = 0"),
        (dict(look_every=2.0), {}, "look_every = 2.0"),
        ({}, dict(on_fail="ignore"), "on_fail = 'ignore'"),
        ({}, dict(op=torch.ones(2, 3)), "not symmetric"),
        ({}, dict(op=[[1.0]]), "neither an operator nor a matrix"),
        ({}, dict(op=FunctionOperator(lambda v: v * math.nan, 4)), "not finite"),
    ],
    ids=str,
)
def test_refused(made, updated, says):
    with pytest.raises(ValueError, match=says) as caught:
        EigenTracker(**made).update(**{"op": planted(np.linspace(0, 1, 80)), **updated})
    assert "\n" not in str(caught.value)


def test_refused_later():
    "Another operator than before, and the state of another tracker; the tracker goes on as if nothing had been asked."
    tracker, other = EigenTracker(2), EigenTracker(2)
    for each in (tracker, other):
        each.update(drifting(0))
    for op in (torch.eye(3, dtype=F64), drifting(0).matrix.float()):
        with pytest.raises(ValueError, match="begin a new EigenTracker"):
            tracker.update(op)
    with pytest.raises(ValueError, match="the state is of a tracker made with"):
        EigenTracker(3).load_state_dict(tracker.state_dict())
    ours, theirs = (each.update(drifting(1)) for each in (tracker, other))
    assert torch.equal(ours.eigenvectors, theirs.eigenvectors)
