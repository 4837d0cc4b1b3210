"Sensitivity to inputs and weights: oracles by dense derivatives and NumPy, and nothing moved, changed or left behind."
import math

import pytest
import torch
import torch.nn.functional as F
from lal.core.device import generator, seeded
from lal.modular.models import BaselineMLP, GrokTransformer
from lal.modular.task import Task, encode, examples
from lal.curvature.hvp import gradient
from lal.curvature.hessian_operator import HessianOperator
from lal.curvature.params import flatten, loss_function, params_of
from lal.curvature.sensitivity import (example_gradient_norms, example_loss, fisher_trace, gradient_norm, input_function,
                                       input_hessian_trace, jacobian_norm, weight_hessian_trace)
from torch import nn
from torch.func import grad, jacfwd

F64 = torch.float64
TASK = Task(5)
EVERY = examples(TASK)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=generator(seed, "test"))


def built(Model, task=TASK, dtype=F64, **sizes):
    with seeded(0, "init"):
        return Model(task, **sizes).to(dtype)


MODELS = {
    "perceptron": built(BaselineMLP, hidden_dim=12, n_layers=2),
    "transformer": built(GrokTransformer, hidden_dim=8, n_layers=2, n_heads=2),
    "tied": built(GrokTransformer, hidden_dim=8, n_layers=1, n_heads=2, tie_embeddings=True),
}
LAYERS = [("perceptron", None), ("perceptron", "hidden.0"), ("perceptron", "hidden.1"), ("perceptron", "output"), ("transformer", None),
          ("transformer", "blocks.0"), ("transformer", "blocks.1"), ("transformer", "blocks.0.attention"), ("transformer", "blocks.1.up"),
          ("transformer", "norm"), ("tied", None), ("tied", "blocks.0"), ("tied", "norm")]
each_layer = pytest.mark.parametrize("name, layer", LAYERS)
each_model = pytest.mark.parametrize("name", MODELS)


def data(model):
    return encode(EVERY, model.encoding)


@each_layer
def test_jacobian_and_hessian_against_dense_ones(name, layer):
    model = MODELS[name]
    function, point = input_function(model, data(model), layer)
    with torch.no_grad():
        x = data(model)
        assert torch.allclose(function(point), model(x.double() if x.is_floating_point() else x), rtol=1e-12, atol=1e-14)
    some = min(len(point), 25)
    J = jacfwd(function)(point).detach().reshape(some, 5, some, -1)
    oracle = J.diagonal(dim1=0, dim2=2).movedim(-1, 0).flatten(1).norm(dim=1)
    assert torch.allclose(jacobian_norm(function, point, exact=True), oracle, rtol=1e-12)
    best = function(point).argmax(1, keepdim=True)
    H = jacfwd(grad(lambda h: function(h).gather(1, best).sum()))(point).detach().reshape(point.numel(), -1)
    trace = H.diagonal().reshape(some, -1).sum(1)
    assert torch.allclose(input_hessian_trace(function, point, exact=True), trace, rtol=1e-9, atol=1e-12 * float(H.abs().max() + 1e-30))


@each_layer
def test_estimates_are_unbiased(name, layer):
    model = MODELS[name]
    function, point = input_function(model, data(model), layer)
    J = jacobian_norm(function, point, exact=True)
    squares = torch.stack([jacobian_norm(function, point, projections=4, seed=s) ** 2 for s in range(50)])
    sure = 8 * 50**-0.5  # Student's t with 49 degrees of freedom exceeds 8 once in 5 billion times; 650 are compared
    assert ((squares.mean(0) - J**2).abs() < sure * squares.std(0) + 1e-12).all()
    t = input_hessian_trace(function, point, exact=True)
    traces = torch.stack([input_hessian_trace(function, point, probes=4, seed=s) for s in range(50)])
    assert ((traces.mean(0) - t).abs() < sure * traces.std(0) + 1e-12 * traces.abs().max() + 1e-12).all()


def test_error_falls_with_the_root_of_the_projections():
    function, point = input_function(MODELS["transformer"], data(MODELS["transformer"]))
    J = jacobian_norm(function, point, exact=True)
    spread = {K: float(torch.stack([jacobian_norm(function, point, K, seed=s) / J - 1 for s in range(30)]).std()) for K in (4, 36)}
    assert 2.25 < spread[4] / spread[36] < 4  # 3; 750 values, of which at least 30 are independent examples of each seed


@each_layer
def test_nothing_is_changed_or_left_behind(name, layer):
    model = MODELS[name]
    before, state = params_of(model), torch.get_rng_state()
    with torch.no_grad():
        function, point = input_function(model, data(model), layer)
        kept = point.clone()
        first = jacobian_norm(function, point), input_hessian_trace(function, point)
    with torch.inference_mode():
        function, point = input_function(model, data(model), layer)
        second = jacobian_norm(function, point), input_hessian_trace(function, point)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(first, second))
    assert torch.equal(point, kept) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], p) and p.grad is None and p.requires_grad for k, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_the_hook_goes_also_after_an_error():
    model = MODELS["transformer"]
    function, point = input_function(model, data(model), "blocks.0")
    with pytest.raises(RuntimeError):
        function(point[..., :3])
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_results_follow_the_dtype_of_the_model(dtype):
    for Model in (BaselineMLP, GrokTransformer):
        model = built(Model, dtype=dtype, hidden_dim=8)
        function, point = input_function(model, data(model))
        assert point.dtype == jacobian_norm(function, point).dtype == input_hessian_trace(function, point).dtype == dtype
        params = params_of(model)
        assert fisher_trace(example_loss(model), params, data(model), EVERY.y).dtype == dtype
        assert gradient_norm(loss_function(model, data(model), EVERY.y), params).dtype == dtype


def test_other_modules_and_energies():
    with seeded(0, "init"):
        model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double().eval()
    X = randn(7, 3)
    function, point = input_function(model, X.float())
    assert point.dtype == F64 and jacobian_norm(function, point).shape == (7,)
    inner, at = input_function(model, X, "2")
    assert torch.allclose(jacobian_norm(inner, at, exact=True), model[3].weight.norm().detach())
    energy = input_hessian_trace(lambda x: (x**4).sum(1), X, exact=True)
    assert torch.allclose(energy, 12 * (X**2).sum(1))
    assert torch.allclose(jacobian_norm(lambda x: (x**4).sum(1), X, projections=1), (4 * X**3).norm(dim=1))  # C = 1: no noise
    relu = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    assert not input_hessian_trace(relu, X).any()
    alone = X[:1]
    assert torch.allclose(jacobian_norm(lambda x: x - x.mean(0) + x.sin(), alone, exact=True), alone.cos().norm(dim=1))  # one example can't mix


def attention(x):
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]).sum((1, 3))


@pytest.mark.parametrize("layer, words", [("block.0", "did you mean 'blocks.0'"), ("tokens", "called 0 times"), ("", "no module is called ''"),
                                          ("blocks", "called 0 times")])
def test_unknown_layers(layer, words):
    model = MODELS["transformer"]
    with pytest.raises(ValueError, match=words):
        input_function(model, data(model), layer)


BAD = [
    (lambda x: x - x.mean(0), "must not mix"),
    (lambda x: x.sum(0).expand(6, 3), "must not mix"),
    (lambda x: x.softmax(0), "must not mix"),
    (lambda x: x.detach(), "don't depend"),
    (lambda x: randn(6, 3).requires_grad_(), "don't depend"),
    (lambda x: x.sum(), "[N] or [N, C] with N = 6"),
    (lambda x: x[:3], "returned [3, 3]"),
    (lambda x: x[:, :0], "returned [6, 0]"),
    (lambda x: x[:, None], "returned [6, 1, 3]"),
    (lambda x: x.tolist(), "returned a list"),
    (lambda x: x / 0, "not finite"),
    (lambda x: (0 * x).sqrt(), "Jacobian is not finite"),
    (lambda x: F.dropout(x), "model.eval()"),
]


@pytest.mark.parametrize("function, words", BAD, ids=[w + str(i) for i, (_, w) in enumerate(BAD)])
@pytest.mark.parametrize("measure", [jacobian_norm, input_hessian_trace])
def test_bad_functions(measure, function, words):
    state = torch.get_rng_state()
    with pytest.raises(ValueError) as caught:
        measure(function, randn(6, 3))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("point, words", [(torch.ones(6, 3).long(), "torch.int64"), (torch.ones(()), "[N, …]"), (torch.ones(0, 3), "[N, …]"),
                                          (torch.full((6, 3), torch.nan), "not finite"), ([1.0], "not a tensor")])
def test_bad_points(point, words):
    for measure in (jacobian_norm, input_hessian_trace):
        with pytest.raises(ValueError) as caught:
            measure(lambda x: x, point)
        assert words in str(caught.value)


def test_bad_counts_and_second_derivatives():
    for count in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="whole number"):
            jacobian_norm(lambda x: x, randn(2, 3), projections=count)
        with pytest.raises(ValueError, match="whole number"):
            input_hessian_trace(lambda x: x, randn(2, 3), probes=count)
    with pytest.raises(ValueError, match="twice"):
        input_hessian_trace(attention, randn(2, 4, 8))


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(3)])
def test_training_mode_is_refused(layer):
    model = nn.Sequential(nn.Linear(3, 3), layer)
    kept = {k: t.clone() for k, t in model.named_buffers()}
    with pytest.raises(ValueError, match="model.eval"):
        input_function(model, torch.ones(4, 3))
    assert all(torch.equal(t, kept[k]) for k, t in model.named_buffers())
    input_function(model.eval(), torch.ones(4, 3))
    model.train()


# --------------------------------------------------------------------------------------------------- weights


@each_model
def test_fisher_against_a_loop(name):
    model = MODELS[name]
    x, loss, params = data(model), example_loss(model), params_of(model)
    before, state = params_of(model), torch.get_rng_state()
    alone = torch.stack([flatten(gradient(lambda p: loss(p, xi, yi), params)).norm() for xi, yi in zip(x, EVERY.y)])
    for chunk in (None, 1, 7, 25, 1000):
        found = example_gradient_norms(loss, params, x, EVERY.y, chunk)
        assert torch.allclose(found, alone, rtol=1e-10) and not found.requires_grad
        assert torch.allclose(fisher_trace(loss, params, x, EVERY.y, chunk), alone.square().mean(), rtol=1e-10)
    f = loss_function(model, x, EVERY.y)
    assert fisher_trace(loss, params, x, EVERY.y) >= gradient_norm(f, params) ** 2
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], p) and p.grad is None for k, p in model.named_parameters())
    with torch.inference_mode():
        assert torch.allclose(fisher_trace(loss, params, x, EVERY.y), alone.square().mean(), rtol=1e-10)


def test_fisher_is_the_trace_of_the_matrix():
    model = built(BaselineMLP, hidden_dim=4, n_layers=1)
    loss, params = example_loss(model), params_of(model)
    rows = torch.stack([flatten(gradient(lambda p: loss(p, xi, yi), params)) for xi, yi in zip(data(model), EVERY.y)])
    fisher = rows.T @ rows / len(rows)
    assert math.isclose(float(fisher_trace(loss, params, data(model), EVERY.y)), float(fisher.trace()), rel_tol=1e-12)


@each_model
def test_hessian_trace_is_that_of_the_operator(name):
    model = built(type(MODELS[name]), hidden_dim=4, n_layers=1, **({} if name == "perceptron" else {"n_heads": 1}))
    f, params = loss_function(model, data(model), EVERY.y), params_of(model)
    dense = HessianOperator(f, params).to_dense()
    n = len(dense)
    assert math.isclose(weight_hessian_trace(f, params, probes=n).estimate, float(dense.trace()), rel_tol=1e-9)
    some = weight_hessian_trace(f, params, probes=30, seed=3)
    assert abs(some.estimate - float(dense.trace())) < 7 * some.standard_error  # t with 29 degrees of freedom: once in 9 million times
    assert some == weight_hessian_trace(f, params, probes=30, seed=3)
    assert math.isclose(float(gradient_norm(f, params)), float(flatten(gradient(f, params)).norm()), rel_tol=1e-12)


def test_bad_losses():
    model = MODELS["perceptron"]
    x, loss, params = data(model), example_loss(model), params_of(model)
    y = EVERY.y
    cases = [
        ((loss, params, x, y[:3]), "same N"),
        ((loss, params, x[0], y[0]), "same N"),
        ((loss, params, x[:0], y[:0]), "N ≥ 1"),
        ((loss, params, x, y, 0), "chunk = 0"),
        ((loss, {**params, "more": randn(1)}, x, y), "only params has more"),
        ((lambda p, x, y: loss(p, x, y).detach(), params, x, y), "does not depend"),
        ((lambda p, x, y: F.cross_entropy(model(x.double()), y), params, x, y), "does not depend"),
        ((lambda p, x, y: loss(p, x, y)[None], params, x, y), "shape [1]"),
        ((lambda p, x, y: loss(p, x, y) + torch.rand(()), params, x, y), "model.eval()"),
        ((lambda p, x, y: loss(p, x, y) / (y - 4), params, x, y), "not finite in some examples"),
        ((loss, {k: t * torch.nan for k, t in params.items()}, x, y), "not finite"),
    ]
    for arguments, words in cases:
        state = torch.get_rng_state()
        with pytest.raises(ValueError) as caught:
            fisher_trace(*arguments)
        assert words in str(caught.value), caught.value
        assert torch.equal(torch.get_rng_state(), state)
