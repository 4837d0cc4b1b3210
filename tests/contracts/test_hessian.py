"The hook `hessian` against closed forms, through `train_step` and `Hooks.fire`: quadratic and cubic losses, every scheme, optimizer and option."
import math, warnings
from collections import Counter
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from lal.core.config import make_config
from lal.core.device import generator
from lal.core.errors import HookError
from lal.core.experiment import find_experiment
from lal.core.state import POST_STEP, Batches, TrainState, train_step
from lal.curvature.hvp import gradient, hvp
from lal.curvature.params import axpy, flatten, norm
from lal.hooks.hessian import DIFFERENCES, TIMES, Hessian, nudged
from lal.hooks.runner import Hooks
from test_hvp import Cube

F64, N, STEPS = torch.float64, 5, 7
LR, MOMENTUM, DECAY = 0.05, 0.7, 0.9  # the rate shrinks by `DECAY` from step to step
PARTS = {"one": slice(0, 3), "two.w": slice(3, 5)}


class Polynomial(nn.Module):
    "½ θᵀHθ − cᵀθ + ⅙ Σ (u·θ)³ for inputs `[H | c | U]` `[5, 11]`; the third derivative is Σ u⊗u⊗u over the rows of U."

    def __init__(self):
        super().__init__()
        start = torch.randn(N, dtype=F64, generator=generator(0, "start"))
        self.one, self.two = nn.Parameter(start[:3].clone()), nn.Module()
        self.two.w = nn.Parameter(start[3:].clone())

    def forward(self, x):
        theta, (H, c, U) = torch.cat([self.one, self.two.w]), split(x)
        return theta @ H @ theta / 2 - c @ theta + ((U @ theta) ** 3).sum() / 6


def split(x):
    return x[:, :N], x[:, N], x[:, N + 1 :]


def batch(step: int, cubic: bool):
    rng = generator(step, "batch")
    draw = lambda *shape: torch.randn(*shape, dtype=F64, generator=rng)
    H, c, U = draw(N, N), draw(N), 0.4 * draw(N, N) * cubic
    return torch.cat([H + H.T, c[:, None], U], 1), torch.zeros(1, dtype=F64)


def slope(x, theta):
    H, c, U = split(x)
    return H @ theta - c + (U @ theta) ** 2 @ U / 2


def curve(x, theta, v, epsilon=0.0):
    "H v at θ; with ε what the forward scheme returns on a cubic: H v + (ε/2) ‖v‖ T[v̂, v̂]."
    H, _, U = split(x)
    return H @ v + (U @ theta * (U @ v)) @ U + epsilon / 2 * (U @ v) ** 2 @ U / v.norm()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR),
    "momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=MOMENTUM),
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1),
}


def observed(hook, cubic, optimizer="sgd", clip=None, reference=None, steps=STEPS, **options):
    "The rows of a hook, and the weights before each step, `{step: θ}`."
    model = Polynomial()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: DECAY**t)
    data = Batches(torch.zeros(1), None, None, generator(0, "order"))
    state = TrainState(model, optimizer, schedule, data, lambda model, batch: model(batch[0]).mean())
    hooks, before = Hooks([hook], reference=reference, **options), {}
    for step in range(1, steps + 1):
        before[step] = flatten(dict(model.named_parameters())).detach().clone()
        train_step(state, batch(step, cubic), clip, hooks.fire)
        hooks.fire(POST_STEP, state)
        schedule.step()
    before[steps + 1] = flatten(dict(model.named_parameters())).detach().clone()
    return hooks.table(hook.name).to_dict("records"), before


def clean(hook, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return observed(hook, *arguments, **options)


def cos(a, b):
    return float(a @ b / a.norm() / b.norm())


def wanted(step, before, cubic, optimizer, clip, reference, epsilon, last):
    "Every metric of the row of B = `step`, A the step before it, and the entanglement."
    factor = lambda g: 1.0 if clip is None else min(1.0, clip / (float(g.norm()) + 1e-6))
    a, b, theta, here = batch(step - 1, cubic)[0], batch(step, cubic)[0], before[step - 1], before[step]
    g_a, content, used = slope(a, theta), slope(b, theta), slope(b, here)
    bent, exact, gap = curve(b, theta, g_a, epsilon), curve(b, theta, g_a), used - content
    rayleigh, rate = float(g_a @ bent / (g_a @ g_a)), [LR * DECAY ** (k - 1) for k in (step - 1, step)]
    row = {
        "entanglement_norm": bent.norm(),
        "content_norm": content.norm(),
        "observed_grad_norm": factor(used) * used.norm(),
        "clip_factor": factor(used),
        "entanglement_energy_ratio": bent.norm() ** 2 / (bent.norm() ** 2 + content.norm() ** 2),
        "sgd_change": rate[1] * bent.norm() / content.norm(),
        "relative_change": gap.norm() / content.norm(),
        "content_kept": used @ content / (content @ content),
        "change_cossim": -cos(gap, bent),
        "batch_cossim": cos(g_a, content),
        "entanglement_content_cossim": cos(bent, content),
        "rayleigh_quotient": rayleigh,
        "amplification_ratio": bent.norm() / g_a.norm(),
        "edge_of_stability": max(0, rayleigh),
        "relative_fd_error": (bent - exact).norm() / exact.norm(),
        "displacement_residual": (gap - curve(b, theta, here - theta, epsilon)).norm() / gap.norm(),
        "entanglement_cossim_to_solution": cos(bent, reference - theta),
        "content_cossim_to_solution": -cos(content, reference - theta),
    }
    if last is not None:
        row["entanglement_coherence"] = cos(bent, last)
    if optimizer == "sgd":
        row["eta_residual"] = (gap + rate[0] * factor(g_a) * bent).norm() / gap.norm()
    if optimizer != "adamw":
        row["stability_margin"] = rate[1] * max(0, rayleigh) / (2 if optimizer == "sgd" else 2 * (1 + MOMENTUM))
    for name, part in PARTS.items():
        row[f"entanglement_norm/{name}"] = bent[part].norm()
        row[f"content_norm/{name}"] = content[part].norm()
        row[f"entanglement_content_cossim/{name}"] = cos(bent[part], content[part])
    return {name: float(value) for name, value in row.items()}, bent


def wrong(rows, before, cubic, optimizer, clip, reference, epsilon, exact_scheme, tolerance=1e-6):
    "The metrics that are not their closed form, as `(step, metric)`."
    found, last = [], None
    for row in rows:
        row = {name: value for name, value in row.items() if value == value}
        row.pop("epoch")
        step = row.pop("step")
        want, last = wanted(step, before, cubic, optimizer, clip, reference, epsilon, last)
        if exact_scheme: del want["relative_fd_error"]
        zero = {name for name in ("eta_residual", "displacement_residual") if want.get(name, 1) < 1e-9}  # on a quadratic
        found += [(step, name) for name in (row.keys() ^ want.keys()) - zero]
        found += [(step, name) for name in row.keys() & want.keys() if not math.isclose(row[name], want[name], rel_tol=tolerance, abs_tol=tolerance)]
    return found


REFERENCE = torch.randn(N, dtype=F64, generator=generator(0, "reference"))
AS_DICT = {name: REFERENCE[part] for name, part in PARTS.items()}
EACH = dict(every_n_steps=1, burst_length=1)
FIRST = observed(Hessian(**EACH), False)[0][0]["step"]  # 3 where a hook is not called at a step that has no gradient before it, else 2
EVERY = dict(check_every=1, displacement=True, per_parameter=True)
SCHEMES = [("exact", None), ("exact", 1e-4), ("central", 1e-4), ("central", None), ("forward", 1e-2), ("forward", 1e-4), ("forward", None)]


@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheme, epsilon", SCHEMES)
@pytest.mark.parametrize("cubic", [False, True])
def test_every_metric_is_its_closed_form(cubic, scheme, epsilon, optimizer, clip):
    hook = Hessian(scheme=scheme, epsilon=epsilon, **EACH, **EVERY)
    rows, before = clean(hook, cubic, optimizer, clip, AS_DICT)
    assert [row["step"] for row in rows] == [*range(FIRST, STEPS + 1)]
    step = (epsilon or 2**-26.5) if scheme == "forward" else 0.0
    tolerance = 1e-5 if (scheme, epsilon) == ("forward", None) else 1e-6  # its rounding is √u ‖∇L‖ ‖g‖ / ‖Hg‖
    assert not wrong(rows, before, cubic, optimizer, clip, REFERENCE, step, scheme == "exact", tolerance)
    assert any(row["clip_factor"] < 1 for row in rows) == (clip is not None)
    if cubic and epsilon == 1e-2 and scheme == "forward": assert max(row["relative_fd_error"] for row in rows) > 1e-4


class AtTheCurrentWeights(Hessian):
    name = "hessian"

    def measure(self, state, theta, here, rate):
        return super().measure(state, here, here, rate)


class Shadowed(Hessian):
    "Measures with something on the state replaced by another."

    name = "hessian"

    def measure(self, state, theta, here, rate):
        instead = self.instead(state)
        kept = {name: vars(state)[name] for name in instead if name in vars(state)}
        vars(state).update(instead)
        try:
            return super().measure(state, theta, here, rate)
        finally:
            for name in instead: del vars(state)[name]
            vars(state).update(kept)


class AtTheOtherGradient(Shadowed):
    def instead(self, state):
        return {"previous_grad": state.unclipped()}


class AtTheRateOfA(Shadowed):
    def instead(self, state):
        return {"lr": state.lr / DECAY}


class AtTheClippedRate(Shadowed):
    def instead(self, state):
        return {"lr": state.lr * state.clip_factor}


class WithTheClippedGradient(Shadowed):
    def instead(self, state):
        return {"unclipped": lambda: {name: g.clone() for name, g in state.grads().items()}}


class WithTheNewRate(Hessian):
    name = "hessian"

    def measure(self, state, theta, here, rate):
        return super().measure(state, theta, here, self.rate)


OTHERWISE = [  # what is done otherwise, with which clipping, and the metrics that must show it in every row
    (AtTheCurrentWeights, None, {"entanglement_norm", "content_norm", "sgd_change", "relative_change", "content_kept", "batch_cossim"}),
    (AtTheOtherGradient, None, {"rayleigh_quotient", "sgd_change", "change_cossim", "batch_cossim"}),
    (WithTheNewRate, None, {"eta_residual"}),
    (AtTheRateOfA, None, {"sgd_change", "stability_margin"}),
    (AtTheClippedRate, 0.5, {"sgd_change"}),
    (WithTheClippedGradient, 0.5, {"relative_change", "content_kept", "change_cossim"}),
]


@pytest.mark.filterwarnings("ignore:hook hessian")
@pytest.mark.parametrize("cls, clip, shown_by", OTHERWISE)
def test_these_tests_notice_a_product_at_another_place(cls, clip, shown_by):
    options = dict(scheme="exact", **EACH, **EVERY)
    rows, before = observed(cls(**options), True, "sgd", clip, AS_DICT)
    bad = Counter(name for _, name in wrong(rows, before, True, "sgd", clip, REFERENCE, 0.0, True))
    curved = sum(row["edge_of_stability"] > 0 for row in rows)  # elsewhere the margin is 0 at every rate
    assert {name: bad[name] for name in shown_by} == {name: curved if name == "stability_margin" else STEPS - FIRST + 1 for name in shown_by}


@pytest.mark.filterwarnings("ignore:hook hessian")
def test_on_a_quadratic_the_current_weights_would_change_the_content_but_not_the_product():
    rows, before = observed(AtTheCurrentWeights(scheme="exact", **EACH, check_every=None), False)
    for row in rows:
        want, _ = wanted(row["step"], before, False, "sgd", None, REFERENCE, 0.0, None)
        assert row["entanglement_norm"] == pytest.approx(want["entanglement_norm"], rel=1e-9)
        assert row["content_norm"] != pytest.approx(want["content_norm"], rel=1e-3)


def test_metrics_that_were_not_asked_for_are_absent():
    rows, _ = clean(Hessian(**EACH, check_every=None), True, "adamw")
    absent = {"eta_residual", "stability_margin", "displacement_residual", "relative_fd_error", "entanglement_cossim_to_solution", "content_cossim_to_solution"}
    assert not absent & rows[0].keys() and not [name for name in rows[0] if "/" in name]


@pytest.mark.parametrize("options, every", [(dict(check_every=1), 1), (dict(check_every=4), 4), (dict(check_every=16), 16), ({}, 7)], ids=str)
def test_the_error_is_checked_at_every_so_manieth_row(options, every):
    rows, _ = clean(Hessian(**EACH, **options), True, steps=17)
    assert [row["step"] for row in rows] == [*range(FIRST, 18)]
    assert [row["step"] for row in rows if row["relative_fd_error"] == row["relative_fd_error"]] == [*range(FIRST, 18, every)]


@pytest.mark.parametrize("clip", [None, 0.5])
def test_two_steps_of_plain_sgd_fix_the_signs(clip):
    "θ'' − θ = −ηg_A − ηg_B(θ) + η²H_B g_A on a quadratic: each part is read off the weights, and made the way to the reference."
    _, before = clean(Hessian(**EACH), False, clip=clip, steps=3)
    step_a, step_b = (before[k + 1] - before[k] for k in (2, 3))
    used = [LR * DECAY ** (k - 1) * (1 if clip is None else min(1, clip / (float(slope(batch(k, False)[0], before[k]).norm()) + 1e-6))) for k in (2, 3)]
    content = -used[1] * slope(batch(3, False)[0], before[2])
    bent = step_b - content  # what A's step changed in B's step
    both = step_a + content + bent
    assert torch.allclose(both, before[4] - before[2], atol=1e-12)
    for part, name in ((content, "content"), (bent, "entanglement")):
        towards = {n: (before[2] + part)[s] for n, s in PARTS.items()}
        rows, _ = clean(Hessian(**EACH, scheme="exact"), False, clip=clip, steps=3, reference=towards)
        assert rows[-1]["step"] == 3 and rows[-1][f"{name}_cossim_to_solution"] == pytest.approx(1, abs=1e-9)
        away = {n: (before[2] - part)[s] for n, s in PARTS.items()}
        rows, _ = clean(Hessian(**EACH, scheme="exact"), False, clip=clip, steps=3, reference=away)
        assert rows[-1][f"{name}_cossim_to_solution"] == pytest.approx(-1, abs=1e-9)


@pytest.mark.parametrize("lr, clip", [(0.1, None), (0.1, 0.5), (2.5, None)])
def test_a_positive_cosine_means_that_the_entanglement_shrinks_the_gradient(lr, clip):
    "Equal batches with H = I: the step makes the next gradient shorter by the factor 1 − η, and beyond η = 1 turns it round."
    model = Polynomial()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    data = Batches(torch.zeros(1), None, None, generator(0, "order"))
    state = TrainState.of(model, optimizer, data, lambda model, batch: model(batch[0]).mean())
    x = torch.cat([torch.eye(N, dtype=F64), torch.zeros(N, N + 1, dtype=F64)], 1)
    hooks = Hooks([Hessian(**EACH)])
    for _ in range(3):
        train_step(state, (x, torch.zeros(1)), clip, hooks.fire)
        hooks.fire(POST_STEP, state)
    row = hooks.table("hessian").iloc[-1]
    factor = 1 if clip is None else clip / row.content_norm  # A's, whose gradient is the content
    assert factor == 1 or factor < 0.5
    assert row.entanglement_content_cossim == pytest.approx(1) and row.observed_grad_norm == pytest.approx(clip or abs(1 - lr) * row.content_norm)
    assert row.entanglement_energy_ratio == pytest.approx(0.5) and row.stability_margin == pytest.approx(lr / 2)
    assert row.sgd_change == pytest.approx(lr) and row.relative_change == pytest.approx(lr * factor, rel=1e-5)
    assert row.content_kept == pytest.approx(1 - lr * factor, rel=1e-5)
    assert row.change_cossim == pytest.approx(1) and row.batch_cossim == pytest.approx(1)


# A small network, in float64.


def real(optimizer, lr, steps=6, **options):
    "Rows of `hessian` on a small network, from weights that do not depend on lr."
    more = {"sgd": dict(optimizer="sgd", weight_decay=0.0), "momentum": dict(optimizer="sgd", momentum=0.9), "adamw": dict(optimizer="adamw", beta2=0.98)}[optimizer]
    config = make_config(p=7, hidden_dim=12, n_layers=1, batch_size=10, train_frac=0.7, device="cpu", seed=3, lr=float(lr), **more)
    state = find_experiment("modular").build(config, torch.device("cpu"))
    state.model.double()
    x, y = state.batches.data
    state.batches.data = x.double(), y
    hooks = Hooks([Hessian(**EACH, scheme="exact", **options)])
    for _ in range(steps):
        train_step(state, state.batches.of_epoch(), None, hooks.fire)
        hooks.fire(POST_STEP, state)
    rows = hooks.table("hessian")
    assert not hooks.problems
    return rows


RATES = np.array([1e-2, 3e-3, 1e-3, 3e-4, 1e-4])


def test_what_the_first_order_picture_leaves_out_shrinks_linearly_in_the_rate():
    found = np.array([real("sgd", lr).eta_residual for lr in RATES])
    slopes = np.polyfit(np.log(RATES), np.log(found), 1)[0]
    assert np.abs(slopes - 1).max() < 0.03, slopes
    assert found[0].max() < 0.1 and (np.diff(found, axis=0) < 0).all()


def test_for_small_rates_plain_sgd_changes_what_the_entanglement_says():
    rows = [real("sgd", lr) for lr in RATES]
    off = np.array([abs(row.relative_change / row.sgd_change - 1) for row in rows])
    turned = np.array([1 - row.change_cossim for row in rows])
    for found, order in ((off, 1), (turned, 2)):
        slopes = np.polyfit(np.log(RATES), np.log(found), 1)[0]
        assert np.abs(slopes - order).max() < 0.03, slopes
    assert off[0].max() < 1e-3 and turned[0].max() < 2e-6


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_the_displacement_explains_the_change_under_every_optimizer(optimizer):
    found = np.array([real(optimizer, lr, displacement=True).displacement_residual for lr in RATES])
    slopes = np.polyfit(np.log(RATES), np.log(found), 1)[0]
    assert found[0].max() < 0.5 and found[-1].max() < 2e-3 and np.abs(slopes - 1).max() < 0.1, (found, slopes)


def test_eta_residual_is_of_plain_sgd_alone():
    assert "eta_residual" not in real("momentum", 1e-3) and "eta_residual" not in real("adamw", 1e-3)


# Small changes: what rounding leaves.


@pytest.mark.parametrize("dtype, u", [(F64, 2.0**-53), (torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8)])
def test_every_weight_is_changed_in_its_last_digit(dtype, u):
    params = {"a": torch.randn(50, 70, generator=generator(0, "a")).to(dtype), "b": torch.randn(9, generator=generator(0, "b")).to(dtype)}
    state, moved = torch.get_rng_state(), nudged(params)
    for name, t in params.items():
        share = moved[name].double() / t.double() - 1
        assert moved[name].dtype == dtype and (share.abs() > 0.9 * u).all() and (share.abs() < 3.1 * u).all()
    assert 0.4 < float((moved["a"] > params["a"]).float().mean()) < 0.6
    assert torch.equal(state, torch.get_rng_state()) and all(torch.equal(t, nudged(params)[name]) for name, t in moved.items())


class Beside(Hessian):
    "Keeps the differences of every row in float64, as shares of the change."

    name = "hessian"

    def __init__(self, **options):
        super().__init__(**options)
        self.true = []

    def measure(self, state, theta, here, rate):
        wide = lambda p: {name: t.double() for name, t in p.items()}
        f, a, b, g_a = state.loss_fn(state.batch), wide(theta), wide(here), wide(state.previous_grad)
        content = gradient(f, a)
        change, bent = axpy(-1, content, gradient(f, b)), hvp(f, a, g_a, "exact")
        parts = {"relative_change": norm(change) ** 2 / norm(content), "eta_residual": norm(axpy(float(rate), bent, change)), "displacement_residual": norm(axpy(-1, hvp(f, a, axpy(-1, a, b), "exact"), change))}
        true = {name: float(x / norm(change)) for name, x in parts.items()}
        self.true += [true | {"change_cossim": -cos(flatten(change), flatten(bent))}]
        return super().measure(state, theta, here, rate)


@pytest.fixture(scope="module")
def small_changes():
    "Rows in float32, and their truth, at rates that float32 can and can't follow."
    found = {}
    for seed in (0, 1, 2):
        for lr in (1e-1, 1e-4, 1e-6):
            config = make_config(p=11, model_type="baseline", hidden_dim=32, batch_size=24, device="cpu", seed=seed)
            state = find_experiment("modular").build(config, torch.device("cpu"))
            state.optimizer = torch.optim.SGD(state.model.parameters(), lr=lr)
            hook = Beside(**EACH, scheme="exact", displacement=True)
            hooks = Hooks([hook])
            for _ in range(12):
                train_step(state, state.batches.of_epoch(), None, hooks.fire)
                hooks.fire(POST_STEP, state)
            assert not hooks.problems
            found[seed, lr] = hooks.table("hessian"), hook.true
    return found


def test_a_shown_metric_of_a_small_change_has_its_first_digit_right(small_changes):
    off = [abs(row[name] / true[name] - 1) for rows, truth in small_changes.values() for (_, row), true in zip(rows.iterrows(), truth) for name in DIFFERENCES if row.get(name, math.nan) == row.get(name, math.nan)]
    assert len(off) > 150 and np.mean(np.array(off) < 1 / TIMES) > 0.95


def test_below_the_floor_a_metric_is_absent_and_above_it_is_there(small_changes):
    for (_, lr), (rows, truth) in small_changes.items():
        there = {name for name in DIFFERENCES if name in rows and rows[name].notna().any()}
        assert there == {1e-1: {*DIFFERENCES}, 1e-4: {"relative_change", "change_cossim"}, 1e-6: set()}[lr]
        assert len(rows) == len(truth) and rows.content_kept.notna().all() and np.allclose(rows.content_kept, 1, atol=0.1)
        assert all(rows[name].notna().all() for name in there if lr != 1e-4)


@pytest.mark.parametrize("scheme, epsilon, wider", [("exact", None, 0), ("forward", 1e-6, 1e6), ("central", 1e-6, 5e5), ("forward", None, 2**26.5)])
def test_the_rounding_of_a_difference_raises_the_floor_of_the_residuals(scheme, epsilon, wider, monkeypatch):
    seen = []
    monkeypatch.setattr("lal.hooks.hessian.hidden", lambda length, floors: seen.append((length, floors)) or [])
    hook = Hessian(**EACH, scheme=scheme, epsilon=epsilon, displacement=True, check_every=None)
    _, before = clean(hook, True)
    assert len(seen) == STEPS - FIRST + 1
    for step, (length, floors) in enumerate(seen, FIRST):
        moved = {"eta_rest": LR * DECAY ** (step - 2) * length["g_a"], "rest": (before[step] - before[step - 1]).norm()}
        assert floors["change"] > 0 and length["change"] > 1e6 * floors["change"]
        for name, size in moved.items():
            assert float(floors[name] / floors["change"]) == pytest.approx(1 + wider * float(size), rel=1e-9)


# Models without a second derivative.


def once(self, x):
    theta, (H, c, U) = torch.cat([self.one, self.two.w]), split(x)
    return theta @ H @ theta / 2 - c @ theta + Cube.apply(U @ theta).sum() / 6


@pytest.mark.parametrize("epsilon", [1e-2, None])
def test_without_an_exact_product_the_forward_difference_is_checked_by_the_central_one(epsilon, monkeypatch):
    rows, _ = clean(Hessian(**EACH, check_every=2, epsilon=epsilon), True)
    monkeypatch.setattr(Polynomial, "forward", once)
    instead, _ = clean(Hessian(**EACH, check_every=2, epsilon=epsilon), True)
    central, _ = clean(Hessian(**EACH, check_every=2, epsilon=epsilon, scheme="central"), True)
    for row, other, third in zip(rows, instead, central, strict=True):
        assert other["relative_fd_error"] == pytest.approx(row["relative_fd_error"], rel=1e-6 if epsilon else 1, abs=1e-7, nan_ok=True)
        assert "relative_fd_error" not in third and third["entanglement_norm"] == pytest.approx(row["entanglement_norm"], rel=0.1)


def test_the_exact_scheme_names_the_operation_and_the_way_out(monkeypatch):
    monkeypatch.setattr(Polynomial, "forward", once)
    with pytest.raises(HookError, match="Cube is once_differentiable.*use scheme = forward or central") as error:
        observed(Hessian(**EACH, scheme="exact"), True)
    assert "\n" not in str(error.value)


class Attending(nn.Module):
    "One layer of fused attention over tokens, with dropout inside."

    def __init__(self, dropout):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(7, 8), nn.Linear(8, 24), nn.Linear(8, 7)
        self.dropout = dropout

    def forward(self, x):
        q, k, v = self.mix(self.embed(x)).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, -1)
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def gpt2(dropout):
    transformers = pytest.importorskip("transformers")
    rates = dict(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    ends = dict(bos_token_id=0, eos_token_id=0)
    config = transformers.GPT2Config(vocab_size=7, n_positions=6, n_embd=8, n_layer=1, n_head=2, **rates, **ends, attn_implementation="sdpa")
    model = transformers.GPT2LMHeadModel(config).train()

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(input_ids=x).logits

    return Logits()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("make", [Attending, gpt2])
def test_default_options_work_on_models_with_fused_attention(make, dropout):
    def rows(**options):
        torch.manual_seed(0)
        model = make(dropout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        tokens = torch.randint(7, (9, 4, 6), generator=generator(0, "tokens"))
        state = TrainState.of(model, optimizer, Batches(tokens, None, None, generator(0, "order")), loss)
        hooks = Hooks([Hessian(every_n_steps=1, burst_length=1, displacement=True, **options)])
        for x in tokens:
            train_step(state, x, None, hooks.fire)
            hooks.fire(POST_STEP, state)
        assert not hooks.problems
        return hooks.table("hessian")

    def loss(model, x):
        return functional.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())

    default, exact = rows(), rows(scheme="exact")
    wide = {scheme: rows(scheme=scheme, epsilon=None, check_every=1) for scheme in ("forward", "central")}
    assert default.relative_fd_error.notna().tolist() == [k % 7 == 0 for k in range(len(default))]
    for found in (default, *wide.values()):
        assert np.allclose(found.entanglement_norm, exact.entanglement_norm, rtol=0.05)
        assert np.allclose(found.content_norm, exact.content_norm, rtol=1e-5) and np.allclose(found.relative_change, exact.relative_change, rtol=1e-3)
    assert exact.displacement_residual.median() < 0.5  # with another mask it would be about 1
    assert all(found.relative_fd_error.max() < 1e-4 for found in wide.values())


def test_the_options_of_a_tiny_run():
    assert Hessian.example() == {"every_n_steps": 20, "burst_length": 11, "check_every": 3, "displacement": True}
    Hessian(**Hessian.example())


@pytest.mark.parametrize("options, limit", [(dict(momentum=0.9), 3.8), (dict(momentum=0.9, dampening=0.5), 7.6), (dict(momentum=0.9, nesterov=True), 3.8 / 2.8)])
def test_the_margin_is_a_share_of_the_edge_of_the_optimizer(options, limit, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "other", lambda p: torch.optim.SGD(p, lr=LR, **options))
    rows, _ = clean(Hessian(**EACH), True, "other")
    for row in rows:
        assert row["stability_margin"] == pytest.approx(LR * DECAY ** (row["step"] - 1) * row["edge_of_stability"] / limit)
    apart = lambda p: torch.optim.SGD([{"params": [t], "momentum": 0.1 * k} for k, t in enumerate(p)], lr=LR)
    monkeypatch.setitem(OPTIMIZERS, "apart", apart)
    assert "stability_margin" not in clean(Hessian(**EACH), True, "apart")[0][0]
