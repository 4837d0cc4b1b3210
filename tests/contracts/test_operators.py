"Operators against dense matrices in double precision, on every face they have, and what they refuse and leave alone."
import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, jacfwd, jacrev

from lal.core.device import generator, seeded
from lal.modular.models import BaselineMLP, GrokTransformer
from lal.modular.task import Task, encode, examples
from lal.curvature.gauss_newton import FisherOperator, GaussNewtonOperator, JacobianOperator, outputs_function
from lal.curvature.hessian_operator import FiniteDifferenceOperator, HessianOperator
from lal.curvature.hvp import gradient, hvp
from lal.curvature.operators import FunctionOperator, MatrixOperator, ScaledOperator, SumOperator, as_operator
from lal.curvature.params import flatten, loss_function, params_of, unflatten

F64 = torch.float64
TASK = Task(5)
EVERY = examples(TASK)


def random(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=F64, generator=generator(seed, "data")).to(dtype)


def network(Model, **sizes):
    with seeded(0, "init"):
        model = Model(TASK, **sizes)
    return model, encode(EVERY, model.encoding), EVERY.y, params_of(model, F64)


NETWORKS = {  # an identity needs no large network: 173, 316 and 333 parameters (with width 2 layer normalisation has no derivative to speak of)
    "perceptron": network(BaselineMLP, hidden_dim=7, n_layers=2),
    "transformer": network(GrokTransformer, hidden_dim=4, n_layers=1, n_heads=2),
    "tied transformer": network(GrokTransformer, hidden_dim=3, n_layers=2, n_heads=3, tie_embeddings=True),
}


def dense_hessian(f, params):
    return jacfwd(grad(lambda t: f(unflatten(t, params))))(flatten(params))


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    model, x, y, params = NETWORKS[request.param]
    f = loss_function(model, x, y)
    h = outputs_function(model, x)
    theta = flatten(params)
    assert len(theta) <= 400
    J = jacrev(lambda t: h(unflatten(t, params)))(theta).flatten(0, 1)
    p = h(params).softmax(-1)
    inner = torch.block_diag(*(q.diag() - torch.outer(q, q) for q in p)) / len(y)
    chosen = -(p.log().gather(1, y[:, None]))[:, 0]
    rows = torch.stack([jacrev(lambda t, i=i: loss_function(model, x[i : i + 1], y[i : i + 1])(unflatten(t, params)))(theta) for i in range(len(y))])
    assert torch.allclose(chosen.mean(), f(params))
    return {
        "params": params,
        "operators": {
            "hessian": HessianOperator(f, params),
            "hessian rebuilt": HessianOperator(f, params, keep_graph=False),
            "hessian by vmap": HessianOperator(f, params, vectorize=True),
            "gauss-newton": GaussNewtonOperator(h, lambda z: F.cross_entropy(z, y), params),
            "fisher": FisherOperator.empirical(h, params, y),
            "jacobian": JacobianOperator(h, params),
            "jacobian rebuilt": JacobianOperator(h, params, keep_graph=False),
            "jacobian, transposed": JacobianOperator(h, params).T,
        },
        "dense": {
            "hessian": dense_hessian(f, params),
            "gauss-newton": J.T @ inner @ J,
            "fisher": rows.T @ rows / len(y),
            "jacobian": J,
            "jacobian, transposed": J.T,
        },
    }


NAMES = ["hessian", "hessian rebuilt", "hessian by vmap", "gauss-newton", "fisher", "jacobian", "jacobian rebuilt", "jacobian, transposed"]


def reference(case, name):
    return case["dense"].get(name, case["dense"].get(name.split(" ")[0]))


def near(a, b, tolerance=1e-10):
    return float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("name", NAMES)
def test_products(case, name):
    op, A = case["operators"][name], reference(case, name)
    assert op.shape == tuple(A.shape)
    v, V, u = random(A.shape[1]), random(A.shape[1], 5, seed=1), random(A.shape[0], seed=2)
    assert near(op @ v, A @ v) and near(op @ V, A @ V) and near(op.T @ u, A.T @ u)
    assert near(op @ V[:, :1], A @ V[:, :1]) and (op @ V[:, :0]).shape == (A.shape[0], 0)
    assert near(op @ V.T.contiguous().T, A @ V), "whatever the strides"
    assert not (op @ v).requires_grad


@pytest.mark.parametrize("name", ["hessian", "gauss-newton", "fisher", "jacobian"])
def test_written_out(case, name):
    op, A = case["operators"][name], reference(case, name)
    assert near(op.to_dense(), A)
    if A.shape[0] == A.shape[1]:
        assert near(op.diagonal(), A.diagonal())


@pytest.mark.parametrize("name", ["hessian", "gauss-newton", "fisher", "jacobian"])
def test_restricted(case, name):
    op, A, params = case["operators"][name], reference(case, name), case["params"]
    first, last = list(params)[0], list(params)[-1]
    modules = {k.split(".")[0] for k in params}
    for names in (first, last, [last, first], *modules):
        asked = [names] if isinstance(names, str) else names
        here = flatten({k: torch.full_like(t, any(k == a or k.startswith(a + ".") for a in asked)) for k, t in params.items()}).bool()
        expected = A[:, here] if name == "jacobian" else A[here][:, here]
        assert near(op.restrict(names).to_dense(), expected), names


@pytest.mark.parametrize("name", ["hessian", "gauss-newton", "fisher"])
def test_dicts(case, name):
    op, A, params = case["operators"][name], reference(case, name), case["params"]
    v = unflatten(random(A.shape[1]), params)
    turned = dict(reversed(v.items()))
    product = op @ turned
    assert list(product) == list(params) and near(flatten(product), A @ flatten(v))
    assert all(torch.equal(op.unflatten(flatten(v))[k], t) for k, t in v.items())


@pytest.mark.parametrize("name", ["hessian", "gauss-newton", "fisher", "jacobian"])
def test_scipy(case, name):
    op, A = case["operators"][name].to_scipy(), reference(case, name).numpy()
    v, V, u = (random(*s).numpy() for s in ((A.shape[1],), (A.shape[1], 3), (A.shape[0],)))
    assert np.allclose(op @ v, A @ v) and np.allclose(op @ V, A @ V) and np.allclose(op.rmatvec(u), A.T @ u)
    assert op.dtype == np.float64


@pytest.mark.parametrize("scheme, bound", [("forward", 1e-5), ("central", 1e-8)])
def test_differences(case, scheme, bound):
    exact = case["operators"]["hessian"]
    op = FiniteDifferenceOperator(exact.f, case["params"], scheme)
    v, V = random(exact.shape[1]), random(exact.shape[1], 3)
    assert near(op @ v, exact @ v, bound) and near(op @ V, exact @ V, bound)
    assert near(op @ (1e6 * v), 1e6 * (exact @ v), bound)
    assert not (op @ torch.zeros_like(v)).any()
    own = hvp(exact.f, case["params"], unflatten(v, case["params"]), scheme)
    assert near(op @ v, flatten(own), 1e-7)
    name = list(case["params"])[-1]
    assert near(op.restrict(name).to_dense(), exact.restrict(name).to_dense(), bound)


@pytest.mark.parametrize("dtype, epsilon, bound", [(torch.float32, None, 1e-5), (torch.float32, 1e-3, 0.05), (F64, 1e-6, 1e-4)])
def test_differences_in_any_dtype(dtype, epsilon, bound):
    model, x, y, params = NETWORKS["perceptron"]
    f, here = loss_function(model, x, y), {k: t.to(dtype) for k, t in params.items()}
    op = FiniteDifferenceOperator(f, here, epsilon=epsilon)
    v = random(op.shape[1], dtype=dtype)
    found = op @ v
    assert found.dtype == dtype
    assert near(found.double(), HessianOperator(f, params) @ v.double(), bound)


def test_gradient_is_kept(case):
    op = case["operators"]["hessian"]
    assert torch.equal(op.gradient, flatten(gradient(op.f, case["params"])))


def test_sampled_fisher_is_unbiased():
    model, x, y, params = NETWORKS["perceptron"]
    h = outputs_function(model, x)
    G = GaussNewtonOperator(h, lambda z: F.cross_entropy(z, y), params).to_dense()
    drawn = torch.stack([FisherOperator.sampled(h, params, 10, seed).diagonal() for seed in range(12)])
    exact = G.diagonal()
    for found, true in ((drawn.sum(1), exact.sum()), *zip(drawn.T, exact)):  # the trace, and every entry
        t = (found.mean() - true) / (found.std() / 12**0.5)
        assert not found.std() or abs(t) < 15  # Student's t with 11 degrees of freedom: once in 80 million times
    one, two = (FisherOperator.sampled(h, params, 4, 0) @ flatten(params) for _ in range(2))
    assert torch.equal(one, two)


# sums, scales and plain matrices


def batches(keep_graph, sizes=(10, 10, 5)):
    model, x, y, params = NETWORKS["perceptron"]
    parts = torch.arange(25).split(sizes)
    operators = [HessianOperator(loss_function(model, x[i], y[i]), params, keep_graph) for i in parts]
    return SumOperator(operators, [len(i) / 25 for i in parts])


def test_minibatches_are_the_whole():
    model, x, y, params = NETWORKS["perceptron"]
    whole = HessianOperator(loss_function(model, x, y), params)
    v, V = random(whole.shape[1]), random(whole.shape[1], 3)
    for keep in (True, False):
        assert near(batches(keep) @ v, whole @ v) and near(batches(keep) @ V, whole @ V)
    assert torch.equal(batches(True) @ v, batches(True) @ v)
    assert torch.equal(batches(True) @ v, batches(False) @ v), "same bits, graph kept or not"
    assert near(batches(True).diagonal(), whole.diagonal())
    assert near(flatten(batches(True) @ unflatten(v, params)), whole @ v)


def test_the_order_of_a_sum_is_that_given():
    terms = [MatrixOperator(torch.full((1, 1), t)) for t in (1e8, 1.0, -1e8)]
    one = torch.ones(1)
    assert (SumOperator(terms) @ one).item() == (torch.tensor(1e8) + 1.0 - 1e8).item()
    assert (SumOperator([terms[0], terms[2], terms[1]]) @ one).item() == 1.0


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 12), st.integers(0, 1000), st.lists(st.floats(-3, 3), min_size=1, max_size=4))
def test_algebra(n, seed, weights):
    matrices = [random(n, n, seed=seed + i) for i in range(len(weights))]
    matrices = [A + A.T for A in matrices]
    s, v, V = random(n, seed=seed + 9), random(n, seed=seed + 10), random(n, 3, seed=seed + 11)
    total = SumOperator([as_operator(A) for A in matrices], weights)
    dense = sum(w * A for w, A in zip(weights, matrices))
    scaled = ScaledOperator(total, s)
    expected = s[:, None] * dense * s
    for op, A in ((total, dense), (scaled, expected)):
        assert torch.allclose(op @ v, A @ v) and torch.allclose(op @ V, A @ V)
        assert torch.allclose(op.to_dense(), A) and torch.allclose(op.diagonal(), A.diagonal())
        assert op.symmetric and torch.allclose(torch.dot(s, op @ v), torch.dot(op @ s, v))


def test_matrices():
    A = random(3, 5)
    op = MatrixOperator(A)
    assert not op.symmetric and op.T.shape == (5, 3) and torch.equal(op.T.to_dense(), A.T)
    assert MatrixOperator(A @ A.T).symmetric and as_operator(op) is op
    assert torch.equal(FunctionOperator(lambda v: 3 * v, 4, F64).to_dense(), 3 * torch.eye(4, dtype=F64))


# two arguments


def energy(x, c, s):
    return ((x - c.tanh().sum()) ** 2 / s).exp().log1p().sum() + (c**2).sum()


def test_each_argument_has_its_own_hessian():
    at = {"x": random(4), "c": random(3, seed=1), "s": torch.tensor(2.0, dtype=F64)}
    H = {
        "x": HessianOperator(lambda x: energy(x, at["c"], at["s"]), at["x"]),
        "c": HessianOperator(lambda c: energy(at["x"], c, at["s"]), at["c"]),
        "s": HessianOperator(lambda s: energy(at["x"], at["c"], s), at["s"]),
    }
    for i, (name, op) in enumerate(H.items()):
        oracle = jacfwd(grad(energy, argnums=i), argnums=i)(*at.values()).reshape(op.shape)
        assert near(op.to_dense(), oracle)
    assert H["x"].shape != H["c"].shape != H["s"].shape
    joint = HessianOperator(lambda p: energy(**p), at)
    for name, op in H.items():
        assert near(joint.restrict(name).to_dense(), op.to_dense())
    assert joint.to_dense()[:4, 4:].abs().max() > 1e-3, "and the mixed block is not zero"


def test_the_same_shape_in_two_arguments():
    "Where sizes can't tell them apart, the matrices do."
    a, b = random(3), random(3, seed=1)

    def f(a, b):
        return (a**2 * b).sum() + (b**4).sum()

    in_a = HessianOperator(lambda t: f(t, b), a).to_dense()
    in_b = HessianOperator(lambda t: f(a, t), b).to_dense()
    assert torch.allclose(in_a, (2 * b).diag()) and torch.allclose(in_b, (12 * b**2).diag())
    assert not torch.allclose(in_a, in_b)


# what is left alone, and what is refused


def test_nothing_is_moved():
    model, x, y, _ = NETWORKS["perceptron"]
    before = {k: t.clone() for k, t in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    params = dict(model.named_parameters())
    f, h = loss_function(model, x, y), outputs_function(model, x)
    v = random(sum(t.numel() for t in params.values()), dtype=torch.float32)
    for op in (
        HessianOperator(f, params),
        FiniteDifferenceOperator(f, params),
        GaussNewtonOperator(h, lambda z: F.cross_entropy(z, y), params),
        FisherOperator.empirical(h, params, y),
        FisherOperator.sampled(h, params),
    ):
        op @ v, op.restrict("output") @ v[-40:]
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()


def test_the_point_does_not_move_with_the_model():
    with seeded(0, "init"):
        model = BaselineMLP(TASK, 8, 1)
    x, y = encode(EVERY, "onehot"), EVERY.y
    op = HessianOperator(loss_function(model, x, y), dict(model.named_parameters()))
    v = random(op.shape[1], dtype=torch.float32)
    before = op @ v
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert torch.equal(op @ v, before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_under_any_mode(context):
    model, x, y, params = NETWORKS["perceptron"]
    f, h = loss_function(model, x, y), outputs_function(model, x)
    v = random(sum(t.numel() for t in params.values()))
    plain = [HessianOperator(f, params) @ v, FiniteDifferenceOperator(f, params) @ v, JacobianOperator(h, params) @ v]
    with context():
        inside = [HessianOperator(f, params) @ v, FiniteDifferenceOperator(f, params) @ v, JacobianOperator(h, params) @ v]
    assert all(torch.equal(a, b) for a, b in zip(plain, inside))


def test_unused_and_linear_parameters():
    point = {"used": random(2), "linear": random(2), "unused": random(2)}

    def f(p):
        return (p["used"] ** 3).sum() + p["linear"].sum()

    expected = torch.cat([6 * point["used"], torch.zeros(4, dtype=F64)]).diag()
    for op in (HessianOperator(f, point), HessianOperator(f, point, vectorize=True), HessianOperator(f, point, keep_graph=False)):
        assert torch.allclose(op.to_dense(), expected)
    assert not HessianOperator(lambda p: p["linear"].sum(), point).to_dense().any()
    J = JacobianOperator(lambda p: p["used"] * 2, point)
    assert torch.allclose(J.to_dense(), torch.cat([2 * torch.eye(2), torch.zeros(2, 4)], 1).double())


def smooth(t):
    return (t**4).sum()


SYM, RECT = MatrixOperator(torch.eye(3)), MatrixOperator(torch.ones(2, 3))
POINT = torch.ones(3)
BAD = {
    "not a scalar": (lambda: HessianOperator(lambda t: t**2, POINT), "scalar"),
    "no dependence": (lambda: HessianOperator(lambda t: POINT.sum(), POINT), "does not depend"),
    "integers": (lambda: HessianOperator(smooth, POINT.long()), "int64"),
    "empty": (lambda: HessianOperator(lambda p: 0, {}), "no parameters"),
    "dropout": (lambda: HessianOperator(lambda t: F.dropout(t**2).sum(), POINT), r"model.eval\(\)"),
    "dropout in h": (lambda: JacobianOperator(lambda t: F.dropout(t**2), POINT), r"model.eval\(\)"),
    "dropout by differences": (lambda: FiniteDifferenceOperator(lambda t: F.dropout(t**2).sum(), POINT), r"model.eval\(\)"),
    "not finite": (lambda: HessianOperator(lambda t: (t - 1).sqrt().sum(), POINT), "not finite"),
    "h not finite": (lambda: JacobianOperator(lambda t: t / 0, POINT), "not finite"),
    "h no tensor": (lambda: JacobianOperator(lambda t: 3.0, POINT), "returned float"),
    "h no dependence": (lambda: JacobianOperator(lambda t: POINT, POINT), "does not depend"),
    "length": (lambda: HessianOperator(smooth, POINT) @ torch.ones(4), r"\[4\]"),
    "dims": (lambda: SYM @ torch.ones(3, 1, 1), r"\[3, 1, 1\]"),
    "dtype": (lambda: SYM @ torch.ones(3, dtype=F64), "float64"),
    "list": (lambda: SYM @ [1.0, 2.0, 3.0], "list"),
    "device": (lambda: SYM @ torch.ones(3, device="meta"), "meta"),
    "dict for a matrix": (lambda: SYM @ {"a": POINT}, "no parameter names"),
    "dict with wrong names": (lambda: HessianOperator(lambda p: smooth(p["a"]), {"a": POINT}) @ {"b": POINT}, "only params has a"),
    "names to unflatten": (lambda: SYM.unflatten(POINT), "no parameters"),
    "a wrong name": (lambda: HessianOperator(lambda p: smooth(p["weight"]), {"weight": POINT}).restrict("wieght"), "did you mean 'weight'"),
    "no names": (lambda: HessianOperator(lambda p: smooth(p["a"]), {"a": POINT}).restrict([]), "no names"),
    "scheme": (lambda: FiniteDifferenceOperator(smooth, POINT, "backward"), "forward, central"),
    "epsilon": (lambda: FiniteDifferenceOperator(smooth, POINT, epsilon=-1.0), "epsilon = -1.0"),
    "too short a step": (lambda: FiniteDifferenceOperator(smooth, POINT, epsilon=1e-12), "changes no parameter"),
    "float32 only": (lambda: FiniteDifferenceOperator(lambda t: ((POINT.diag() @ t) ** 2).sum(), POINT), "can't be evaluated in torch.float64"),
    "diagonal of a rectangle": (lambda: RECT.diagonal(), "not square"),
    "matrix of three dimensions": (lambda: MatrixOperator(torch.ones(2, 2, 2)), "two dimensions"),
    "infinite matrix": (lambda: MatrixOperator(torch.full((2, 2), math.inf)), "not finite"),
    "nothing to add": (lambda: SumOperator([]), "needs an operator"),
    "weights": (lambda: SumOperator([SYM], [1.0, 2.0]), "2 weights for 1"),
    "different shapes": (lambda: SumOperator([SYM, RECT]), "can't be added"),
    "different dtypes": (lambda: SumOperator([SYM, MatrixOperator(torch.eye(3).double())]), "can't be added"),
    "scale": (lambda: ScaledOperator(SYM, torch.ones(2)), r"\[2\]"),
    "scale of a rectangle": (lambda: ScaledOperator(RECT, POINT), "not symmetric"),
    "a product of another length": (lambda: FunctionOperator(lambda v: v[:2], 3) @ POINT, "must be"),
    "losses of a mean": (lambda: FisherOperator(smooth, POINT), "one loss an example"),
    "no answers": (lambda: FisherOperator.sampled(lambda t: t[None], POINT, 0), "samples = 0"),
}


@pytest.mark.parametrize("label", BAD)
def test_one_clear_error(label):
    act, says = BAD[label]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=says) as caught:
        act()
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_differentiates_once_only():
    q = random(1, 1, 4, 8, dtype=torch.float32)

    def fused(t):
        return F.scaled_dot_product_attention(t, t, t).square().sum()

    def plain(t):
        return ((t @ t.mT / 8**0.5).softmax(-1) @ t).square().sum()

    exact = HessianOperator(plain, q.double()) @ q.flatten().double()
    assert near((FiniteDifferenceOperator(fused, q, "central", 1e-2) @ q.flatten()).double(), exact, 1e-2)
    for keep in (True, False):
        assert near(HessianOperator(fused, q.double(), keep) @ q.flatten().double(), exact)
    f = lambda t: torch.cdist(t[0, 0], t[0, 0] + 1).sum()
    with pytest.raises(ValueError, match="_cdist_backward.* use scheme = forward or central of hvp, or FiniteDifferenceOperator"):
        HessianOperator(f, q)


class Sine(torch.autograd.Function):
    "A sine with a second derivative that is off by a factor, and not symmetric."
    @staticmethod
    def forward(ctx, t):
        ctx.save_for_backward(t)
        return t.sin()

    @staticmethod
    def backward(ctx, g):
        return Cosine.apply(ctx.saved_tensors[0], g)


class Cosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, g):
        ctx.save_for_backward(t, g)
        return t.cos() * g

    @staticmethod
    def backward(ctx, h):
        t, g = ctx.saved_tensors
        return -t.sin() * g * h, t.cos() * h / 2


def two_layers(p, act=Sine.apply):
    return (act((EVERY.y[:, None] - p["a"]).tanh() @ p["b"]) @ p["b"].T).square().mean()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_a_false_second_derivative_is_noticed_once(dtype):
    params = {"a": random(1, 4, dtype=dtype), "b": random(4, 3, seed=1, dtype=dtype)}
    with pytest.raises(ValueError, match="the second derivative of an operation in f is wrong: uᵀHv and vᵀHu differ by .* or use FiniteDifferenceOperator$"):
        HessianOperator(two_layers, params)
    state = torch.get_rng_state()
    unchecked = HessianOperator(two_layers, params, check=False)
    for op in (unchecked.restrict("b"), copy.deepcopy(unchecked), HessianOperator(lambda p: two_layers(p, torch.sin), params)):
        assert (op @ torch.ones(op.shape[1], dtype=dtype)).isfinite().all()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_look_at_the_symmetry_is_two_products_and_none_later(monkeypatch):
    count = []
    monkeypatch.setattr(HessianOperator, "product", lambda self, v, product=HessianOperator.product: count.append(1) or product(self, v))
    op = HessianOperator(lambda p: two_layers(p, torch.sin), {"a": random(1, 4), "b": random(4, 3)})
    op.restrict("a"), copy.deepcopy(op)
    assert len(count) == 2


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("loss", [1e-2, 1e-5, 1e-8, 1e-12, 1e-15])
def test_rounding_after_memorising_is_no_false_second_derivative(dtype, loss):
    "Logits that are right by a margin of −log(loss), as after long training."
    right = F.one_hot(EVERY.y, 5).to(F64)
    margin = -math.log(loss)
    for seed in range(5):
        params = {"a": torch.eye(5, dtype=F64) * margin + 0.1 * random(5, 5, seed=seed), "b": random(5, 5, seed=seed + 10) * 0.1}
        f = lambda p: F.cross_entropy((right.to(p["a"].dtype) @ p["a"]) + (right.to(p["a"].dtype) @ p["b"]).tanh() @ p["a"], EVERY.y)
        op = HessianOperator(f, {k: t.to(dtype) for k, t in params.items()})
        assert op.shape == (50, 50)


def test_data_changed_in_place():
    data = torch.ones(3)
    op = HessianOperator(lambda t: ((t * data) ** 2).sum(), torch.ones(3))
    data.add_(1)
    with pytest.raises(ValueError, match="build it anew"):
        op @ torch.ones(3)


def test_errors_of_f_are_its_own():
    def broken(t):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        HessianOperator(broken, POINT)


@pytest.mark.parametrize("module", ["operators", "hessian_operator", "gauss_newton", "chain", "lanczos", "traces", "density", "summaries", "edges", "sensitivity"])
def test_modules_stand_alone(module):
    "Every name a module uses is its own or imported, not its notebook's."
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--select", "F821", f"lal/curvature/{module}.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_batch_norm_in_training_is_a_function_of_params():
    "Buffers are not changed, so a second product sees the same f."
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x, y = random(10, 3), torch.arange(10) % 2
    op = HessianOperator(loss_function(model, x, y), params_of(model))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    v = random(op.shape[1])
    assert torch.equal(op @ v, op @ v)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def cubic(p):
    return (p["a"] ** 3).sum()


def test_copies_multiply_like_the_original(tmp_path):
    import copy
    import pickle

    point = {"a": random(3)}
    for op in (HessianOperator(cubic, point), FiniteDifferenceOperator(cubic, point)):
        v = random(3, seed=1)
        expected = op @ v
        for other in (copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
            assert torch.equal(other @ v, expected) and torch.equal(other @ v, expected)


def test_jacobians_leave_buffers_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    J = JacobianOperator(outputs_function(model, random(10, 3, dtype=torch.float32)), params_of(model))
    J @ torch.ones(J.shape[1])
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_sums_know_their_parameters():
    a, b = random(2), random(1, seed=1)

    def f(p):
        return (p["a"] ** 3).sum() + (p["b"] ** 3).sum()

    one = HessianOperator(f, {"a": a, "b": b})
    with pytest.raises(ValueError, match="other orders"):
        SumOperator([one, HessianOperator(f, {"b": b, "a": a})])
    with pytest.raises(ValueError, match="names or shapes differ"):
        SumOperator([one, HessianOperator(lambda p: f({"a": p["a"], "b": p["c"]}), {"a": a, "c": b})])
    damped = SumOperator([MatrixOperator(torch.eye(3, dtype=F64)), one])
    v = {"a": random(2, seed=2), "b": random(1, seed=3)}
    assert near(flatten(damped @ v), flatten(v) + one @ flatten(v))
    scaled = ScaledOperator(one, {"a": 2 * torch.ones(2, dtype=F64), "b": torch.ones(1, dtype=F64)})
    assert near(scaled.restrict("a").to_dense(), 4 * one.restrict("a").to_dense())


def test_differences_refuse_what_changes_nothing():
    big = torch.tensor([1.0, 1e10], dtype=F64)
    op = FiniteDifferenceOperator(lambda t: t[0] ** 3 + t[1] ** 2 / 2, big)
    assert near(op @ torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([6.0, 0.0], dtype=F64), 1e-5)
    with pytest.raises(ValueError, match="changes no parameter"):
        op @ torch.tensor([0.0, 1.0], dtype=F64)


def test_functions_that_write_into_what_they_get():
    def f(p):
        value = cubic(p)
        with torch.no_grad():
            p["a"].data.mul_(2)
        return value

    point = {"a": random(3)}
    v = random(3, seed=1)
    expected = 6 * point["a"] * v
    op = FiniteDifferenceOperator(lambda p: cubic({"a": p["a"] * 1}), point)
    assert near(op @ v, expected, 1e-6)
    before = point["a"].clone()
    try:
        FiniteDifferenceOperator(f, point)
    except (ValueError, RuntimeError):
        pass
    assert torch.equal(point["a"], before)


def test_more_refusals():
    with pytest.raises(ValueError, match=r"\[n\]"):
        ScaledOperator(SYM, torch.ones(3, 3))
    with pytest.raises(ValueError, match="no parameters to restrict"):
        SYM.restrict("a")
    with pytest.raises(ValueError, match="no numbers"):
        HessianOperator(lambda t: t.sum(), torch.zeros(0))
    with pytest.raises(ValueError, match="classes from 0"):
        FisherOperator.empirical(lambda t: t[None], POINT, torch.tensor([-100]))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        FisherOperator.sampled(lambda t: F.dropout(t)[None], POINT)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="not finite"):
        FisherOperator.sampled(lambda t: t[None] * math.inf, POINT)
