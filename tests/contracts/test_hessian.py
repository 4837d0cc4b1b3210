"The hook `hessian` against closed forms, through `train_step` and `Hooks.fire`: quadratic and cubic losses, every scheme, optimizer and option."
import math, warnings
from collections import Counter
import numpy as np
import pytest
import torch
from torch import nn
from lal.core.config import make_config
from lal.core.device import generator
from lal.core.experiment import find_experiment
from lal.core.state import POST_STEP, Batches, TrainState, train_step
from lal.curvature.params import flatten
from lal.hooks.hessian import Hessian
from lal.hooks.runner import Hooks

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
        found += [(step, name) for name in row.keys() ^ want.keys()]
        found += [(step, name) for name in row.keys() & want.keys() if not math.isclose(row[name], want[name], rel_tol=tolerance, abs_tol=tolerance)]
    return found


REFERENCE = torch.randn(N, dtype=F64, generator=generator(0, "reference"))
AS_DICT = {name: REFERENCE[part] for name, part in PARTS.items()}
EACH = dict(every_n_steps=1, burst_length=1)
EVERY = dict(check_every=1, displacement=True, per_parameter=True)
SCHEMES = [("exact", None), ("exact", 1e-4), ("central", 1e-4), ("central", None), ("forward", 1e-2), ("forward", 1e-4), ("forward", None)]


@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheme, epsilon", SCHEMES)
@pytest.mark.parametrize("cubic", [False, True])
def test_every_metric_is_its_closed_form(cubic, scheme, epsilon, optimizer, clip):
    hook = Hessian(scheme=scheme, epsilon=epsilon, **EACH, **EVERY)
    rows, before = clean(hook, cubic, optimizer, clip, AS_DICT)
    assert [row["step"] for row in rows] == [*range(2, STEPS + 1)]
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
    assert {name: bad[name] for name in shown_by} == {name: curved if name == "stability_margin" else STEPS - 1 for name in shown_by}


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


@pytest.mark.parametrize("options, at", [(dict(check_every=1), [*range(2, 18)]), (dict(check_every=4), [2, 6, 10, 14]), (dict(check_every=16), [2]), ({}, [2, 9, 16])], ids=str)
def test_the_error_is_checked_at_every_so_manieth_row(options, at):
    rows, _ = clean(Hessian(**EACH, **options), True, steps=17)
    assert [row["step"] for row in rows] == [*range(2, 18)]
    assert [row["step"] for row in rows if row["relative_fd_error"] == row["relative_fd_error"]] == at


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
