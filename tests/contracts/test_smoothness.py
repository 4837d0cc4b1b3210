"Smoothness over the grid against NumPy, on waves, constants and models, and what it refuses and leaves alone."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from lal.core.device import generator, seeded
from lal.modular.models import BaselineMLP, GrokTransformer
from lal.modular.smoothness import grid_outputs, spectral_smoothness
from lal.modular.task import Task, encode, examples
from torch import nn

F64 = torch.float64
TASK = Task(5)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=generator(seed, "test"))


def built(Model, task, dtype=F64, **sizes):
    with seeded(0, "init"):
        return Model(task, **sizes).to(dtype)


def by_numpy(outputs, k):
    p = len(outputs)
    power = (np.abs(np.fft.fft2(outputs, axes=(0, 1))) ** 2).reshape(p, p, -1).sum(-1)
    power[0, 0] = 0
    f = np.abs(np.fft.fftfreq(p) * p).round()
    return power[np.maximum(f[:, None], f[None]) > k].sum() / power.sum()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 13), st.integers(1, 3), st.integers(0, 6), st.integers(0, 99), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_smoothness_against_numpy(p, C, k, seed, shift, factor):
    z, k = randn(p, p, C, seed=seed), min(k, p // 2)
    found = spectral_smoothness(z, k)
    assert math.isclose(found, by_numpy(z.numpy(), k), rel_tol=1e-9, abs_tol=1e-12) and 0 <= found <= 1
    assert math.isclose(spectral_smoothness(factor * z + shift, k), found, rel_tol=1e-6, abs_tol=1e-9)
    assert math.isclose(spectral_smoothness(z.roll((1, 2), (0, 1)).transpose(0, 1), k), found, rel_tol=1e-9, abs_tol=1e-12)
    assert spectral_smoothness(z, p // 2) == 0 and spectral_smoothness(z, 0) > 1 - 1e-12
    assert found <= spectral_smoothness(z, max(0, k - 1)) + 1e-12


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(3, 23), st.data())
def test_one_wave_is_all_at_its_frequency(p, draw):
    fa, fb = (draw.draw(st.integers(0, p - 1)) for _ in range(2))
    if fa == fb == 0:
        return
    a, b = torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij")
    angle = 2 * math.pi * (fa * a + fb * b) / p
    wave = torch.stack([angle.cos(), (angle + 1).cos()], -1)
    at = max(min(fa, p - fa), min(fb, p - fb))
    assert spectral_smoothness(wave, at) < 1e-6 and spectral_smoothness(wave, at - 1) > 1 - 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e6, 1e-30])
def test_a_constant_has_no_smoothness(dtype, value):
    z = torch.full((7, 7, 3), value, dtype=dtype)
    assert math.isnan(spectral_smoothness(z, 1))
    assert math.isnan(spectral_smoothness(z * (1 + torch.finfo(dtype).eps * randn(7, 7, 3).sign().to(dtype)), 1))


@pytest.mark.parametrize("z, k, words", [(torch.ones(3, 4), 1, "[3, 4]"), (torch.ones(3), 1, "[3]"), (torch.ones(3, 3), 2, "0 to 1"),
                                         (torch.ones(3, 3), -1, "k = -1"), (torch.ones(3, 3), 1.0, "k = 1.0"), (torch.ones(3, 3).long(), 1, "int64"),
                                         (torch.full((3, 3), torch.nan), 1, "not finite"), ([[1.0]], 0, "not a tensor")])
def test_bad_grids(z, k, words):
    with pytest.raises(ValueError) as caught:
        spectral_smoothness(z, k)
    assert words in str(caught.value)


@pytest.mark.parametrize("operation", ["add", "subtract", "multiply", "both"])
def test_grid_is_in_the_order_of_the_operands(operation):
    task = Task(5, operation)
    for Model in (BaselineMLP, GrokTransformer):
        model = built(Model, task, hidden_dim=8)
        every = examples(task)
        x = encode(every, model.encoding)
        with torch.no_grad():
            direct = model(x.double() if x.is_floating_point() else x)
        for op in range(task.n_operations):
            for chunk in (1, 7, 4096):
                z = grid_outputs(model, task, op, chunk)
                for i in torch.nonzero(every.op == op).flatten().tolist():
                    assert torch.allclose(z[every.a[i], every.b[i]], direct[i], rtol=1e-10, atol=1e-13)


def test_grids_that_do_not_exist():
    model = built(BaselineMLP, TASK, hidden_dim=8)
    for task, op, words in ((Task(5, "divide"), 0, "b = 0"), (TASK, 1, "numbered from 0"), (TASK, -1, "numbered from 0")):
        with pytest.raises(ValueError, match=words):
            grid_outputs(model, task, op)
    for chunk in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="chunk = "):
            grid_outputs(model, TASK, chunk=chunk)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_grid_follows_the_dtype_of_the_model(dtype):
    for Model in (BaselineMLP, GrokTransformer):
        assert grid_outputs(built(Model, TASK, dtype, hidden_dim=8), TASK).dtype == dtype


def test_a_grid_is_taken_in_evaluation_mode_and_every_flag_put_back():
    model = built(BaselineMLP, TASK, hidden_dim=8)
    plain = grid_outputs(model, TASK)
    model.hidden.insert(1, nn.Dropout(0.5))
    model.hidden[0].eval()
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    found = grid_outputs(model, TASK)
    assert found.shape == plain.shape and torch.equal(found, grid_outputs(model, TASK))
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == flags
    with pytest.raises(RuntimeError):
        grid_outputs(model, Task(7))
    assert [m.training for m in model.modules()] == flags
