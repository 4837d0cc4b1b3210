"Stability edges: the preconditioner is what real optimizers multiply by, the sharpness is that of the dense matrix, and nothing is touched."
import copy
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from lal.core.device import generator
from lal.curvature.edges import coupled_decay, preconditioner, stability, stability_edge
from lal.curvature.hessian_operator import HessianOperator
from lal.curvature.operators import MatrixOperator
from lal.curvature.params import flatten
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop

F64 = torch.float64
MAKERS = {
    "plain": lambda p, **o: SGD(p, lr=0.1, **o),
    "momentum": lambda p, **o: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.3, **o),
    "nesterov": lambda p, **o: SGD(p, lr=0.1, momentum=0.9, nesterov=True, **o),
    "dampened": lambda p, **o: SGD(p, lr=0.1, momentum=0.9, dampening=0.4, **o),
    "rmsprop": lambda p, **o: RMSprop(p, lr=0.01, eps=1e-3, **o),
    "centred": lambda p, **o: RMSprop(p, lr=0.01, centered=True, momentum=0.9, weight_decay=0.2, eps=1e-3, **o),
    "adam": lambda p, **o: Adam(p, lr=0.01, eps=1e-4, **o),
    "adam, decay": lambda p, **o: Adam(p, lr=0.01, weight_decay=0.5, **o),
    "amsgrad": lambda p, **o: Adam(p, lr=0.01, amsgrad=True, betas=(0.8, 0.9), **o),
    "adamw": lambda p, **o: AdamW(p, lr=0.01, weight_decay=0.5, **o),
    "adamw, amsgrad": lambda p, **o: AdamW(p, lr=0.01, weight_decay=0.5, amsgrad=True, betas=(0.8, 0.9), **o),
}
each = pytest.mark.parametrize("name", MAKERS)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=generator(seed, "test"))


def trained(make, steps=7, **options):
    "A small model after some steps with gradients that vary in size, and its optimizer."
    model = nn.ParameterDict({"a": nn.Parameter(randn(2, 3)), "b": nn.Parameter(randn(4, seed=1))})
    groups = [{"params": [model["a"]]}, {"params": [model["b"]], "lr": 0.003}]
    optimizer = make(groups, **options)
    for step in range(steps):
        for k, (_, t) in enumerate(model.named_parameters()):
            t.grad = randn(*t.shape, seed=10 + 2 * step + k) * 10.0 ** (2 - step)  # shrinking, so that amsgrad differs
        before = {n: (t.detach().clone(), t.grad.clone()) for n, t in model.named_parameters()}
        optimizer.step()  # which may write into the gradients
    return model, optimizer, before


@each
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}])
def test_a_step_is_the_preconditioner_times_the_smoothed_gradient(name, options):
    model, optimizer, before = trained(MAKERS[name], **options)
    P, decay = preconditioner(optimizer, model), coupled_decay(optimizer, model)
    assert list(P) == list(dict(model.named_parameters())) and not any(t.requires_grad for t in P.values())
    for (n, t), group in zip(model.named_parameters(), optimizer.param_groups):
        state, (start, g) = optimizer.state[t], before[n]
        g = g + decay[n] * start
        if "betas" in group:
            m = state["exp_avg"] / (1 - group["betas"][0] ** float(state["step"]))
            if not decay[n].any():
                start = start * (1 - group["lr"] * group["weight_decay"])
        elif isinstance(optimizer, SGD):
            m = g if not group["momentum"] else state["momentum_buffer"]
            m = g + group["momentum"] * m if group["nesterov"] else m
        else:
            m = g if not group["momentum"] else state["momentum_buffer"] * (group["lr"] / P[n])
        assert torch.allclose(t.detach() - start, -P[n] * m, rtol=1e-9, atol=1e-15)


@each
def test_sharpness_is_that_of_the_dense_matrix(name):
    model, optimizer, _ = trained(MAKERS[name])
    A = randn(10, 10, seed=3)
    A = A + A.T
    P, decay = (flatten(f(optimizer, model)) for f in (preconditioner, coupled_decay))
    dense = P.sqrt()[:, None] * (A + decay.diag()) * P.sqrt()
    expected = float(torch.linalg.eigvalsh(dense)[-1])
    kept, state = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    for op in (A, MatrixOperator(A)):
        found = stability(op, optimizer, model, tol=1e-9)
        assert math.isclose(found.sharpness, expected, rel_tol=1e-8) and found.edge == stability_edge(optimizer)
        assert found.ratio == found.sharpness / found.edge

    def quadratic(p):
        v = torch.cat([p["b"], p["a"].reshape(-1)])  # another order than the model's
        B = torch.cat([torch.cat([A[6:, 6:], A[6:, :6]], 1), torch.cat([A[:6, 6:], A[:6, :6]], 1)])
        return v @ B @ v / 2

    params = {n: model[n].detach() for n in ("b", "a")}
    H = HessianOperator(quadratic, params)
    assert math.isclose(stability(H, optimizer, model, tol=1e-9).sharpness, expected, rel_tol=1e-8)
    part = stability(H.restrict("b"), optimizer, model, tol=1e-9).sharpness
    assert math.isclose(part, float(torch.linalg.eigvalsh(dense[6:, 6:])[-1]), rel_tol=1e-8, abs_tol=1e-12) and part <= expected * (1 + 1e-9)
    now = optimizer.state_dict()
    assert now["param_groups"] == kept["param_groups"]
    assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(now["state"][i][k])) for i, s in kept["state"].items() for k, x in s.items() if x is not None)
    assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.floats(0, 0.99), st.floats(0, 0.9), st.booleans())
def test_the_edge_is_where_a_root_leaves_the_unit_circle(beta, dampening, nesterov):
    dampening = 0.0 if nesterov or beta == 0 else dampening
    nesterov = nesterov and beta > 0
    edge = stability_edge(SGD([nn.Parameter(torch.ones(1))], 1.0, momentum=beta, dampening=dampening, nesterov=nesterov))

    def radius(a):  # of the matrix that takes (x, m) to the next (x, m), as SGD does it
        g = torch.tensor([a, 0.0], dtype=F64)
        m = torch.tensor([0.0, beta], dtype=F64) + (1 - (dampening if beta else 0)) * g
        move = g + beta * m if nesterov else m
        step = torch.stack([torch.tensor([1.0, 0.0], dtype=F64) - move, m])
        return float(torch.linalg.eigvals(step).abs().max())

    assert radius(edge * (1 - 1e-6)) < 1 < radius(edge * (1 + 1e-6)) and abs(radius(edge) - 1) < 1e-6


def test_what_is_not_moved_has_no_share():
    still, w, idle = (nn.Parameter(torch.ones(2, dtype=F64)) for _ in range(3))
    frozen = nn.Parameter(torch.ones(2, dtype=F64), requires_grad=False)
    named = {"still": still, "w": w, "idle": idle, "frozen": frozen}
    for make in (lambda p: Adam(p, 0.1), lambda p: SGD(p, 0.1)):
        optimizer = make([w, idle, frozen])
        w.grad = torch.ones(2, dtype=F64)
        optimizer.step()
        P = preconditioner(optimizer, named)
        assert P["w"].all() and not P["still"].any() and not P["frozen"].any()
        if isinstance(optimizer, Adam):
            assert not P["idle"].any()
    A = torch.diag(torch.tensor([9.0, 9, 1, 1, 0, 0, 0, 0], dtype=F64))
    assert math.isclose(stability(A, SGD([w], 0.1), named).sharpness, 0.1, rel_tol=1e-6)


def test_settings_may_be_tensors():
    w = nn.Parameter(torch.ones(2, dtype=F64))
    w.grad = torch.tensor([1.0, 2.0], dtype=F64)
    plain, wrapped = Adam([w], 0.1), Adam([w], torch.tensor(0.1, dtype=F64))
    for optimizer in (plain, wrapped):
        optimizer.step()
    a, b = (preconditioner(o, {"w": w})["w"] for o in (plain, wrapped))
    assert torch.allclose(a, b)
    assert torch.allclose(preconditioner(SGD([w], torch.tensor(0.1)), {"w": w})["w"], torch.full((2,), 0.1, dtype=F64))


def test_dtype_follows_the_operator():
    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), 0.5)
    assert math.isclose(stability(torch.eye(6, dtype=F64), optimizer, model).sharpness, 0.5, rel_tol=1e-9)


def bad():
    w, v = (nn.Parameter(torch.ones(2, dtype=F64)) for _ in range(2))
    one = torch.eye(2, dtype=F64)
    return [
        (lambda: stability_edge(NAdam([w])), "NAdam"),
        (lambda: stability_edge(Adagrad([w])), "Adagrad"),
        (lambda: stability_edge(type("Mine", (Adam,), {})([w])), "Mine"),
        (lambda: stability_edge("adam"), "str"),
        (lambda: stability_edge(Adam([w], maximize=True)), "maximises"),
        (lambda: stability_edge(Adam([{"params": [w]}, {"params": [v], "betas": (0.5, 0.9)}])), "betas"),
        (lambda: stability_edge(SGD([{"params": [w]}, {"params": [v], "nesterov": True}], 0.1, momentum=0.9)), "nesterov"),
        (lambda: preconditioner(NAdam([w]), {"w": w}), "NAdam"),
        (lambda: preconditioner(AdamW([w]), {"w": w}), "no step"),
        (lambda: preconditioner(SGD([w], 0.1), {"w": v}), "none of these parameters"),
        (lambda: preconditioner(SGD([w], 0.1), {}), "none of these parameters"),
        (lambda: stability(torch.eye(3, dtype=F64), SGD([w], 0.1), {"w": w}), "does not fit"),
        (lambda: stability(one * torch.nan, SGD([w], 0.1), {"w": w}), "not finite"),
        (lambda: stability(one, SGD([w], 0.1), {"w": w}, tol=0), "tol"),
    ]


@pytest.mark.parametrize("act, words", bad(), ids=[f"{i}: {w}" for i, (_, w) in enumerate(bad())])
def test_bad_input_is_one_clear_error(act, words):
    with pytest.raises(ValueError) as caught:
        act()
    assert words in str(caught.value) and "\n" not in str(caught.value)
