"Observers of gradients and weights: every number recomputed in float64 from recorded steps, in four kinds of run; degenerate models; refusals; and stops in the middle of a window."
import math, signal, tempfile, warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from lal.core.config import make_config, with_values
from lal.core.device import generator, seeded
from lal.core.errors import ConfigError, Interrupted
from lal.core.files import load_checkpoint
from lal.core.run import RunFolder
from lal.core.trainer import Trainer
from lal.hooks.hook import Hook, Needs, Schedule, declared_options, fires_at_steps, never_fires
from lal.hooks.registry import REGISTRY, create_hooks
from lal.hooks.runner import Hooks
from lal.hooks.watch import watch

PER_EPOCH, EPOCHS, STEPS, LOG_EVERY = 4, 15, 60, 5
OBSERVERS = [name for name, cls in REGISTRY.items() if cls.kind == "observer"]
HERE = "training_metrics", "norms", "consecutive"  # have contracts of their own
NAMED = [name for name in OBSERVERS if name not in HERE]
TOLERANCE = 3e-5  # relative to the sizes that enter: some hundred roundings of float32
each_unit = pytest.mark.parametrize("unit", ["epoch", "step"])


# 1. Four runs, each of whose steps is recorded in float64.


def numbers(tensors):
    "Tensors by name as float64 arrays of their own."
    return {name: t.detach().double().numpy().copy() for name, t in tensors.items()}


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Step(SimpleNamespace):
    "Step, epoch, loss, unclipped gradient, weights before and after."


class Recorder(Hook):
    "Keeps every step of a trainer's run."

    needs = Needs.LOSS

    def __init__(self):
        super().__init__()
        self._steps, self._before = [], None

    def pre_step(self, state):
        self._before = numbers(state.trainable())

    def post_step(self, state):
        live, factor = state.trainable(), state.train_state.clip_factor
        factor = 1.0 if factor is None else float(factor)
        grad = {n: g / factor for n, g in numbers({n: p.grad for n, p in live.items()}).items()}
        self._steps.append(Step(step=state.step, epoch=state.epoch, loss=float(state.loss), grad=grad, before=self._before, after=numbers(live)))


def shifted(model, seed=5):
    "Other weights of the same shapes."
    return {n: p.detach() + 0.3 * torch.randn(p.shape, generator=generator(seed, n)) for n, p in model.named_parameters()}


def instances(without=(), default=False):
    "Hooks with the options of their examples; or, of those that fire at log points, with none."
    found = [REGISTRY[name] for name in NAMED if name not in without and not (default and fires_at_steps(REGISTRY[name]))]
    return [cls(**{} if default else cls.example()) for cls in found]


def from_trainer(unit, root, default=False):
    "The book's transformer, its gradients clipped."
    from lal.modular.models import create_model

    length = {"epochs": EPOCHS} if unit == "epoch" else {"steps": STEPS}
    config = make_config(p=7, model_type="transformer", hidden_dim=8, n_heads=2, n_layers=1, train_frac=0.7, batch_size=10, lr=1e-2, grad_clip=0.5, device="cpu", threads=1, seed=3, log_every=LOG_EVERY, name=unit, **length)
    model, recorder = create_model(config), Recorder()
    hooks = Hooks([recorder, *instances(default=default)], reference=shifted(model))
    Trainer(config, root, hooks=hooks, progress=False).fit()
    found = {h.name: h for h in hooks.hooks}
    return SimpleNamespace(unit=unit, steps=recorder._steps, hooks=found, table=hooks.table, reference=numbers(shifted(model)), per_epoch=PER_EPOCH, embedding="tokens.weight", n_tokens=config.p, problems=hooks.problems, default=default)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(F.max_pool2d(self.norm(self.conv(x)).relu(), 3).flatten(1))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def of_tokens(model, batch):
    return model(input_ids=batch, labels=batch).loss


def watched(unit, model, loss_fn, batches, optimizer, clip, hooks, embedding=None, default=False):
    "A loop of one's own, recorded where it steps."
    reference, steps = shifted(model), []
    options = dict(log_every=LOG_EVERY, root=None, reference=reference)

    def step(run, batch):
        before = numbers(trained(model))
        with run.step(batch):
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            grad = numbers({n: p.grad for n, p in trained(model).items()})
            if clip:
                run.clipped(nn.utils.clip_grad_norm_(model.parameters(), clip), clip)
            optimizer.step()
            after = numbers(trained(model))
            steps.append(Step(step=run.state.step, epoch=run.state.epoch, loss=float(loss), grad=grad, before=before, after=after))

    with seeded(0, "observers"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of hooks that the end comes too early for
        with watch(model, optimizer, loss_fn, hooks, **options) as run:
            for k in range(EPOCHS):
                if unit == "epoch":
                    with run.epoch():
                        for batch in batches: step(run, batch)
                else:
                    for batch in batches: step(run, batch)
    found = {h.name: h for h in run.hooks.hooks}
    reference = {n: t for n, t in numbers(reference).items() if n in trained(model)}
    return SimpleNamespace(unit=unit, steps=steps, hooks=found, table=run.table, reference=reference, per_epoch=None, embedding=embedding, n_tokens=None, problems=run.hooks.problems, default=default)


def images():
    with seeded(0, "convnet"): model = ConvNet()
    x, y = torch.randn(64, 1, 6, 6, generator=generator(0, "x")), torch.randint(3, (64,), generator=generator(0, "y"))
    batches = [(x[k : k + 16], y[k : k + 16]) for k in range(0, 64, 16)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    return watched("epoch", model, cross_entropy, batches, optimizer, 0.3, instances(["token_gradient"]))


def small_gpt2():
    config = GPT2Config(vocab_size=23, n_positions=8, n_embd=12, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    with seeded(0, "gpt2"): return GPT2LMHeadModel(config)


def texts(default=False):
    model = small_gpt2()
    batches = [*torch.randint(20, (4, 8, 8), generator=generator(0, "texts"))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return watched("step", model, of_tokens, batches, optimizer, None, instances(default=default), "transformer.wte.weight", default)


RUNS = {
    "trainer, epochs": lambda root: from_trainer("epoch", root), "trainer, steps": lambda root: from_trainer("step", root), "convolutional network": lambda root: images(), "GPT-2": lambda root: texts(),
    "trainer, epochs, no options": lambda root: from_trainer("epoch", root, True), "trainer, steps, no options": lambda root: from_trainer("step", root, True), "GPT-2, no options": lambda root: texts(True),
}
each_run = pytest.mark.parametrize("which", RUNS)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    return cache(lambda which: RUNS[which](tmp_path_factory.mktemp("observed")))


# 2. When a hook fires, and what it is to say then.


def flat(params):
    return np.concatenate([t.ravel() for t in params.values()])


def firings(run, hook):
    "The steps at whose end a hook of epochs fires, by the specification."
    n_units = EPOCHS if run.unit == "epoch" else STEPS
    steps_of_unit = PER_EPOCH if run.unit == "epoch" else 1
    known = run.per_epoch if run.unit == "epoch" else 1  # a loop of one's own doesn't tell the steps of an epoch
    last = {n_units} if run.per_epoch else set()  # nor its length
    if hook.every_n_epochs:
        due = {n for n in range(1, n_units + 1) if n % hook.every_n_epochs == 0}
    else:
        apart = getattr(hook, "apart", 0)
        every = LOG_EVERY * math.ceil(apart / (LOG_EVERY * known)) if apart and known else LOG_EVERY
        due = {n for n in range(1, n_units + 1) if n % every == 0} | last
    return [n * steps_of_unit for n in sorted(due)]


def at(run, step):
    "The gradient that a hook is given after a step, in the size of what it is a mean of; the weights then."
    parts = [s for s in run.steps if s.epoch == run.steps[step - 1].epoch] if run.unit == "epoch" else [run.steps[step - 1]]
    grad = {n: np.mean([s.grad[n] for s in parts], axis=0) for n in parts[0].grad}
    size = np.mean([np.linalg.norm(flat(s.grad)) for s in parts])
    return SimpleNamespace(step=step, epoch=run.steps[step - 1].epoch, grad=grad, size=size, weights=run.steps[step - 1].after)


def entropy_rank(values):
    p = np.asarray(values) / np.sum(values)
    p = p[p > 0]
    return math.exp(-(p * np.log(p)).sum())


def cos(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def spread(G):
    "‖ḡ‖² and tr Σ̂ of gradients in rows."
    return (G.mean(0) ** 2).sum(), ((G - G.mean(0)) ** 2).sum() / (len(G) - 1)


def fewest(squares, share):
    "The fewest of the largest that have this share, as a range when rounding decides."
    total = np.cumsum(np.sort(squares)[::-1]) / np.sum(squares)
    return tuple(int((total < share + e).sum() + 1) for e in (-1e-4, 1e-4))


class Between(tuple):
    "A whole number within these."


def variance(run, hook):
    for window in windows(run, hook, hook.window):
        G, size = np.stack([flat(w.grad) for w in window]), max(w.size for w in window)
        k = len(G)
        if k < 2: continue
        mean2, trace = spread(G)
        norms = np.linalg.norm(G, axis=1)
        pairs = [cos(G[i], G[j]) for i in range(k) for j in range(i)]
        lengths = (norms**2).sum()
        yield window[-1], {
            "n_gradients": (k, 0), "gradient_variance": (trace, size**2 * k), "window_mean_norm": (mean2**0.5, lengths / k / mean2**0.5 * (size / norms.min())),
            "mean_pairwise_cos": (np.mean(pairs), size / norms.min()),
            "signal_to_noise": ((mean2 / trace) ** 0.5, (mean2 / trace) ** 0.5 * size**2 * (1 / mean2 + k / trace)),
        }


def windows(run, hook, size):
    "The window at each firing of a hook of epochs."
    seen = [at(run, step) for step in firings(run, hook)]
    return [seen[max(0, i + 1 - size) : i + 1] for i in range(len(seen))]


def subspace_gradient_info(run, hook):
    towards = flat(run.reference)
    for window in windows(run, hook, hook.window):
        G = np.stack([flat(w.grad) for w in window])
        unsure = max(w.size for w in window) / np.linalg.norm(G, axis=1).min()
        sigma, V = np.linalg.svd(G, full_matrices=False)[1:]
        s2, k = sigma**2, len(G)
        d = towards - flat(window[-1].weights)
        d /= np.linalg.norm(d)
        root = unsure / math.sqrt(TOLERANCE) * np.finfo("float32").eps ** 0.5  # of a singular value that a Gram matrix gives
        wanted = {
            "n_gradients": (k, 0), "dims_for_90pct": (Between(fewest(s2, 0.9)), 0), "participation_ratio": (sigma.sum() ** 2 / s2.sum(), k * unsure * 10),
            "top_sv_ratio": (sigma[0] / sigma.sum(), unsure * 10), "svd_total_variance": (s2.sum() / k, s2.sum() / k * unsure),
            "grad_energy_fraction_toward_solution": (((G @ d) ** 2).sum() / s2.sum(), unsure),
        }
        for r in (1, 5, 10): wanted[f"top{r}_explained"] = (s2[:r].sum() / s2.sum(), unsure)
        for name, r in (("top1", 1), ("top5", 5), ("top10", 10), ("subspace", hook.components)):
            r = min(r, k)
            gap = s2[r - 1] - (s2[r] if r < k else 0.0)
            wanted[f"{name}_toward_solution"] = (((V[:r] @ d) ** 2).sum(), unsure * s2[0] / gap)
        yield window[-1], wanted


def layers(params):
    found = {}
    for name, t in params.items(): found.setdefault(name.rpartition(".")[0] or name, {})[name] = t
    return found


def minus(a, b):
    return {name: a[name] - b[name] for name in a}


def gradient_projection(run, hook):
    seen = [at(run, step) for step in firings(run, hook)]
    for k, now in enumerate(seen):
        d = minus(run.reference, now.weights)
        wanted = {"distance_to_reference": (np.linalg.norm(flat(d)), np.linalg.norm(flat(run.reference)) * 2)}
        for layer, g in [("", now.grad), *layers(now.grad).items()]:
            mark, there = (f"/{layer}" if layer else ""), {n: d[n] for n in g}
            length = np.linalg.norm(flat(g))
            if length > 1e-6 * now.size: wanted[f"grad_cossim_to_solution{mark}"] = (-cos(flat(g), flat(there)), now.size / length)
        if k:
            then = seen[k - 1]
            moved, before = minus(now.weights, then.weights), minus(run.reference, then.weights)
            wanted["displacement_norm"] = (np.linalg.norm(flat(moved)), np.linalg.norm(flat(now.weights)))
            for layer, m in [("", moved), *layers(moved).items()]:
                length, mark = np.linalg.norm(flat(m)), (f"/{layer}" if layer else "")
                large = np.linalg.norm(flat({n: now.weights[n] for n in m}))
                if length > 1e-6 * large: wanted[f"displacement_cossim_to_solution{mark}"] = (cos(flat(m), flat({n: before[n] for n in m})), max(1.0, large / length))
        yield now, wanted


def token_gradient(run, hook):
    for step in firings(run, hook):
        now = at(run, step)
        r = np.linalg.norm(now.grad[run.embedding][: run.n_tokens], axis=1)  # the numbers alone, where there are signs too
        V, r2 = len(r), r**2
        unsure = now.size / np.linalg.norm(r)
        s = hook.stride or math.isqrt(V)
        e = np.array([r2[k::s].mean() for k in range(s)])
        ascending, i = np.sort(r), np.arange(1, V + 1)
        near = tuple(int((r < r.max() / 100 * f).sum()) / V for f in (1 - 1e-4, 1 + 1e-4))
        yield now, {
            "gradient_sparsity": (np.clip(0.0, *near) if near[0] == near[1] else sum(near) / 2, (near[1] - near[0]) / TOLERANCE + 0.01),
            "gradient_gini": (((2 * i - V - 1) * ascending).sum() / (V * r.sum()), unsure), "stride_group_variance": (e.var() / e.mean() ** 2, s * unsure),
            "stride_group_max_ratio": (e.max() / e.mean(), s * unsure), "tokens_for_50pct": (Between(fewest(r2, 0.5)), 0), "tokens_for_90pct": (Between(fewest(r2, 0.9)), 0),
            "concentration_ratio": (np.sort(r2)[::-1][: max(1, V // 10)].sum() / r2.sum(), unsure),
        }


def bursts(run, hook):
    "The recorded steps of every burst that ends before the run does."
    n, W = hook.every_n_steps, hook.burst_length
    for begin in range(n, STEPS + 1, n):
        if begin >= hook.warmup_steps and begin + W - 1 <= STEPS: yield run.steps[begin - 1 : begin - 1 + W]


def batch_dynamics(run, hook):
    for burst in bursts(run, hook):
        G = np.stack([flat(s.grad) for s in burst])
        norms, W = np.linalg.norm(G, axis=1), len(G)
        total = np.linalg.norm(G.sum(0))
        wanted = {"accumulation_efficiency": (total / norms.sum(), norms.sum() / total), "mean_grad_norm": (norms.mean(), norms.mean()), "subspace_rank": (entropy_rank(np.linalg.svd(G, compute_uv=False)), 10 * W)}
        for lag in (1, 2, 5, 10):
            if W > lag: wanted[f"autocorrelation_lag{lag}"] = (np.mean([cos(G[t], G[t + lag]) for t in range(W - lag)]), 1)
        yield burst[-1], wanted


def training_diagnostics(run, hook):
    def noise_scale(G):
        mean2, trace = spread(G)
        return trace / (mean2 - trace / len(G)), mean2 - trace / len(G)

    for burst in bursts(run, hook):
        G, losses = np.stack([flat(s.grad) for s in burst]), np.array([s.loss for s in burst])
        W, around = len(G), losses - losses.mean()
        ratios = [np.linalg.norm(flat(minus(s.after, s.before))) / np.linalg.norm(flat(s.before)) for s in burst[1:]]  # at the first step the weights before it are not there
        shaky = np.abs(losses).max() / max(np.abs(around).max(), 1e-9)
        wanted = {"loss_mean": (losses.mean(), np.abs(losses).max()), "loss_autocorrelation": ((around[1:] * around[:-1]).sum() / (around**2).sum(), shaky), "update_ratio": (np.median(ratios), 1.0)}
        wanted["loss_volatility"] = ((losses.std(ddof=1) / abs(losses.mean()), losses.std() / abs(losses.mean())), 1.0)
        scale, below = noise_scale(G)
        if below > 1e-4 * (G**2).sum() / W:
            wanted["gradient_noise_scale"] = (scale, abs(scale) * (G**2).sum() / below)
            left = [noise_scale(np.delete(G, k, 0)) for k in range(W)]
            if min(b for _, b in left) > 1e-4 * (G**2).sum() / W:
                values = np.array([v for v, _ in left])
                se = math.sqrt((W - 1) / W * ((values - values.mean()) ** 2).sum())
                wanted["gradient_noise_scale_se"] = (se, se + W * max(abs(values)) * (G**2).sum() / min(b for _, b in left))
        elif below < -1e-4 * (G**2).sum() / W:
            wanted["gradient_noise_scale"] = wanted["gradient_noise_scale_se"] = (None, 0)
        yield burst[-1], wanted


def weight_tracking(run, hook):
    for step in firings(run, hook):
        now, wanted, means = at(run, step), {}, {"top_sv": [], "effective_rank": [], "grad_weight_align": []}
        total = 0.0
        for name, W in now.weights.items():
            if W.ndim < 2: continue
            M, g = W.reshape(len(W), -1), now.grad[name].ravel()
            sigma, size = np.linalg.svd(M, compute_uv=False), np.linalg.norm(M)
            total += size**2
            length = np.linalg.norm(g)
            wanted |= {f"weight_norm/{name}": (size, size), f"top_sv/{name}": (sigma[0], size), f"effective_rank/{name}": (entropy_rank(sigma), 10 * len(sigma))}
            means["top_sv"].append(sigma[0])
            means["effective_rank"].append(entropy_rank(sigma))
            if length > 1e-6 * now.size:
                wanted[f"grad_weight_align/{name}"] = (cos(g, W.ravel()), now.size / length)
                means["grad_weight_align"].append(cos(g, W.ravel()))
        wanted |= {"weight_norm": (total**0.5, total**0.5), "top_sv_max": (max(means["top_sv"]), total**0.5), "effective_rank_mean": (np.mean(means["effective_rank"]), 100)}
        wanted["grad_weight_align_mean"] = (np.mean(means["grad_weight_align"]), 20)
        yield now, wanted


def ways(run, hook):
    "The weights at the start, and at each firing."
    start = SimpleNamespace(step=0, weights=run.steps[0].before)
    return [start, *[at(run, step) for step in firings(run, hook)]]


def parameter_delta(run, hook):
    points = ways(run, hook)
    for then, now in zip(points, points[1:]):
        moved, size, before = (np.linalg.norm(flat(x)) for x in (minus(now.weights, then.weights), now.weights, then.weights))
        yield now, {"absolute_delta": (moved, size), "relative_delta": (moved / before, 1.0), "param_norm": (size, size)}


def path_length(run, hook):
    points = ways(run, hook)
    path = 0.0
    for then, now in zip(points, points[1:]):
        path += np.linalg.norm(flat(minus(now.weights, then.weights)))
        net, size = np.linalg.norm(flat(minus(now.weights, points[0].weights))), np.linalg.norm(flat(now.weights))
        yield now, {"path_length": (path, size), "net_displacement": (net, size), "path_efficiency": (net / path, size / path)}


EXPECTED = {f.__name__: f for f in (variance, subspace_gradient_info, gradient_projection, token_gradient, batch_dynamics, training_diagnostics, weight_tracking, parameter_delta, path_length)}


def test_every_observer_is_recomputed_here_or_has_contracts_of_its_own():
    assert {*NAMED} <= {*EXPECTED}, "write its recomputation"


@each_run
@pytest.mark.parametrize("name", NAMED)
def test_every_metric_is_the_one_computed_in_float64_from_the_recorded_steps(name, which, recorded):
    run = recorded(which)
    assert run.steps[-1].step == len(run.steps) == STEPS
    if name not in run.hooks:
        assert name == "token_gradient" and run.embedding is None or run.default and fires_at_steps(REGISTRY[name])
        return
    hook, rows = run.hooks[name], run.table(name)
    wanted = {point.step: (point.epoch, values) for point, values in EXPECTED[name](run, hook)}
    wrong, seen = [], set()
    if not len(rows): rows = pd.DataFrame(columns=["epoch", "step"])
    if [*rows.step] != [*wanted]: wrong.append(f"rows at steps {rows.step.tolist()}, not {[*wanted]}")
    for row in rows.to_dict("records"):
        epoch, values = wanted.get(row["step"], (None, {}))
        if epoch != row["epoch"]: wrong.append(f"step {row['step']} is said to be in epoch {row['epoch']}, not {epoch}")
        for metric, (want, scale) in values.items():
            got = row.get(metric, math.nan)
            seen.add(metric)
            if not agrees(got, want, TOLERANCE * scale): wrong.append(f"step {row['step']}: {metric} is {got}, not {want} ± {TOLERANCE * scale:.1g}")
    unknown = {*rows.columns} - {"epoch", "step"} - seen
    assert not wrong and not unknown, f"{unknown}\n" + "\n".join(wrong[:20])
    assert len(rows) >= (0 if run.default else 2), "its example gives several rows"
    assert not {what: n for what, n in run.problems.items() if what[0] == name}


def agrees(got, want, tolerance):
    if want is None: return math.isnan(got)
    if isinstance(want, Between): return want[0] <= got <= want[1]
    if isinstance(want, tuple): return any(agrees(got, one, tolerance) for one in want)
    return abs(got - want) <= tolerance


# 3. Models and gradients at the edge of what there is.


class Little(nn.Module):
    "A table of tokens and a matrix; the loss is a function of both, or of neither."

    def __init__(self, n_tokens=6, width=3, dtype=torch.float32):
        super().__init__()
        with seeded(0, "little"):
            self.token_embedding, self.head = nn.Embedding(n_tokens, width, dtype=dtype), nn.Linear(width, 4, dtype=dtype)

    def forward(self, x):
        return self.head(self.token_embedding(x).tanh())


class One(nn.Module):
    "A single weight."

    def __init__(self, shape=(1,)):
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, 0.5))

    def forward(self, x):
        return (self.weight - 1.0).square().sum()


def classes(model, batch):
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def zero(model, batch):
    return sum((0.0 * p).sum() for p in model.parameters())


def draw(n_tokens=6):
    return [(torch.randint(n_tokens, (8,), generator=generator(k, "x")), torch.randint(4, (8,), generator=generator(k, "y"))) for k in range(PER_EPOCH)]


def frozen(*names):
    model = Little()
    for name in names: model.get_submodule(name).requires_grad_(False)
    return model


EDGES = {
    "no gradient": (lambda: Little(), zero, {}),
    "one weight": (lambda: One(), lambda model, batch: model(batch), {}),
    "a scalar weight": (lambda: One(()), lambda model, batch: model(batch), {}),
    "a matrix of one weight": (lambda: One((1, 1)), lambda model, batch: model(batch), {}),
    "a frozen head": (lambda: frozen("head"), classes, {}),
    "a frozen table": (lambda: frozen("token_embedding"), classes, {}),
    "one token": (lambda: Little(1), classes, {}),
    "float64": (lambda: Little(dtype=torch.float64), classes, {}),
    "bfloat16": (lambda: Little(dtype=torch.bfloat16), classes, {}),
    "weights of zero": (lambda: zeroed(Little()), classes, {}),
    "a window longer than the run": (lambda: Little(), classes, {"window": 1000}),
    "a window of two": (lambda: Little(), classes, {"window": 2}),
    "a burst longer than the run": (lambda: Little(), classes, {"burst_length": 1000, "every_n_steps": 1000}),
    "a burst of three": (lambda: Little(), classes, {"burst_length": 3}),
}


def zeroed(model):
    for p in model.parameters(): p.data.zero_()
    return model


LACKING = {  # refused there
    "token_gradient": {"one weight", "a scalar weight", "a matrix of one weight", "a frozen table"},
    "weight_tracking": {"one weight", "a scalar weight"},
}


def little_run(model, loss_fn, hooks, unit="epoch", epochs=EPOCHS, lr=0.05, **options):
    "A short watched loop; what it warned of."
    n_tokens = model.token_embedding.num_embeddings if isinstance(model, Little) else 1
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    options = {"log_every": LOG_EVERY, "root": None, **options}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with watch(model, optimizer, loss_fn, hooks, **options) as run:
            for k in range(epochs):
                if unit == "epoch": run.begin_epoch()
                for batch in draw(n_tokens):
                    with run.step(batch):
                        optimizer.zero_grad()
                        loss_fn(model, batch).backward()
                        optimizer.step()
                if unit == "epoch": run.end_epoch()
    return run, [str(w.message) for w in told]


@each_unit
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", OBSERVERS)
def test_at_the_edge_no_observer_raises_or_leaves_its_range(name, edge, unit):
    make, loss_fn, given = EDGES[edge]
    cls, model = REGISTRY[name], make()
    known = declared_options(cls)
    hook = cls(**cls.example() | {option: value for option, value in given.items() if option in known})
    reference = shifted(model) if cls.needs & Needs.REFERENCE else None
    if edge in LACKING.get(name, ()):
        with pytest.raises(ConfigError, match=f"hook {name}"): little_run(model, loss_fn, [hook], unit)
        return
    run, told = little_run(model, loss_fn, [hook], unit, reference=reference)
    undefined = "not finite" if edge == "no gradient" else "none"  # a cosine with it is left out, and said
    assert not [what for _, what in run.hooks.problems if undefined not in what]
    allowed = "will not have fired", "did not fire up to the end", "and is left out" if edge == "no gradient" else "did not fire"
    assert not [line for line in told if not any(words in line for words in allowed)]


@pytest.mark.parametrize("name", [n for n in NAMED if REGISTRY[n].needs & Needs.REFERENCE])
@each_unit
def test_at_its_own_reference_an_observer_says_nothing_wrong(name, unit):
    "The run's weights are the reference from the beginning, and stay there."
    model = Little()
    reference = {n: p.detach().clone() for n, p in model.named_parameters()}
    run, told = little_run(model, classes, [REGISTRY[name](**REGISTRY[name].example())], unit, lr=0.0, reference=reference)
    assert not dict(run.hooks.problems) and not told


SCALE_FREE = 1e-4  # relative; powers of two change no digit, so only the rounding of what is left differs


@pytest.mark.parametrize("power", [-60, 60])
@pytest.mark.parametrize("name", [name for name in OBSERVERS if name != "training_metrics"])
def test_a_loss_in_other_units_gives_the_same_numbers_in_other_units(name, power):
    "The loss times s with the learning rate over s makes the same weights: every metric is the same, or times s, or times s²."
    cls, tables, s = REGISTRY[name], [], 2.0**power
    for k in (0, power):
        model = Little()
        reference = shifted(model) if cls.needs & Needs.REFERENCE else None
        run, told = little_run(model, lambda model, batch: 2.0**k * classes(model, batch), [cls(**cls.example())], lr=0.05 * 2.0**-k, reference=reference)
        assert not dict(run.hooks.problems) and not told
        tables.append(run.table(name).set_index("step"))
    one, other = tables
    assert [*one.columns] == [*other.columns] and [*one.index] == [*other.index]
    wrong = {}
    for column in one:
        a, b = one[column].to_numpy(), other[column].to_numpy()
        near = [np.allclose(b, a * unit, rtol=SCALE_FREE, atol=SCALE_FREE * np.nanmax(np.abs(a)) * unit, equal_nan=True) for unit in (1.0, s, s * s, 1 / s)]
        if not any(near): wrong[column] = a.tolist()[:4], (b / a).tolist()[:4]
    assert not wrong


@each_unit
@pytest.mark.parametrize("name", OBSERVERS)
def test_what_an_observer_remembers_is_a_few_times_the_network_or_its_window(name, unit):
    cls, model = REGISTRY[name], Little(50, 20)
    hook = cls(**cls.example())
    n = sum(p.numel() for p in model.parameters())
    kept = getattr(hook, "window", None) if isinstance(getattr(hook, "window", None), int) else None
    kept = kept or (hook.burst_length if fires_at_steps(hook) else 0)
    run, _ = little_run(model, classes, [hook], unit, reference=shifted(model) if cls.needs & Needs.REFERENCE else None)
    assert run.hooks.sizes().get(name, 0) <= 4 * n * max(kept, 3) + 40 * max(kept, 3) ** 2 + 4096


# 4. Refusals: what a model lacks, and what memory bears.


def test_a_hook_whose_model_lacks_what_it_needs_is_left_out_of_a_set_with_one_warning():
    lacking = [name for name in LACKING if name in REGISTRY]
    run, told = little_run(One(), lambda model, batch: model(batch), "observers")
    left_out = [line for line in told if "left out" in line]
    assert len(left_out) == len(lacking) and all(f"hook {name}" in line for name, line in zip(lacking, left_out)), told
    assert not {*lacking} & {h.name for h in run.hooks.hooks} and {"variance", "norms"} <= {h.name for h in run.hooks.hooks}


@pytest.mark.parametrize("name", LACKING)
def test_a_hook_named_by_the_user_is_refused_in_one_line_before_anything_is_written(name, tmp_path):
    with pytest.raises(ConfigError, match=f"hook {name}: ") as error: little_run(One(), lambda model, batch: model(batch), name, root=tmp_path)
    assert "\n" not in str(error.value) and not [*tmp_path.glob("*/config.yaml")]


def test_in_the_trainer_too():
    "The network on one-hot inputs has no table of tokens."
    mlp = make_config(p=7, model_type="baseline", hidden_dim=8, batch_size=10, epochs=30, device="cpu", name="mlp")
    named = with_values(mlp, hooks={"token_gradient": {}})
    with tempfile.TemporaryDirectory() as root:
        with pytest.raises(ConfigError, match="hook token_gradient: "): Trainer(named, root, hooks=create_hooks(named), progress=False).fit()
        assert not (Path(root) / "mlp").exists()
        in_set = with_values(mlp, hooks={"observers": {}})
        with pytest.warns(UserWarning, match="hook token_gradient is left out") as told: run = Trainer(in_set, root, hooks=create_hooks(in_set), progress=False).fit()
        assert sum("is left out" in str(w.message) for w in told) == 1
        assert "hooks/norms" in run.table_names() and "hooks/token_gradient" not in run.table_names()
        longer = with_values(in_set, until=32)
        with pytest.warns(UserWarning, match="hook token_gradient is left out") as told: run = Trainer(longer, root, hooks=create_hooks(longer), progress=False).fit(resume=True)
        assert sum("token_gradient" in str(w.message) for w in told) == 1
        assert "hooks/token_gradient" not in run.table_names() and run.table("hooks/norms").read().epoch.max() == 32


BOUNDED = [name for name in REGISTRY if "memory_gb" in declared_options(REGISTRY[name])]


@pytest.mark.parametrize("name", BOUNDED)
def test_a_window_that_memory_does_not_bear_is_refused_with_its_size_and_ways_out(name):
    model = Little()
    n = sum(p.numel() for p in model.parameters())
    window = 1 + int(1e-4 * 1e9 / (4 * n))
    cls = REGISTRY[name]
    size = "window" if "window" in declared_options(cls) else "burst_length"
    far = {"every_n_steps": 10 * window} if size == "burst_length" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        little_run(Little(), classes, [cls(**{size: window - 1, "memory_gb": 1e-4, **far})], epochs=2)
    with pytest.raises(ConfigError, match=f"hook {name}") as error: little_run(model, classes, [cls(**{size: window, "memory_gb": 1e-4, **far})])
    text = str(error.value)
    assert "\n" not in text and "GB" in text and size in text and "memory_gb" in text, text


# 5. Stopped in the middle of a window, and continued.


class StopAt(Hook):
    "Asks the run to stop, as Ctrl-C would."

    stop = 0

    def post_step(self, state):
        if state.step == self.stop: signal.raise_signal(signal.SIGTERM)


def observers(stop=0):
    hook = StopAt()
    hook.stop = stop
    return Hooks([hook, *(cls(**cls.example()) for name, cls in REGISTRY.items() if cls.kind == "observer")], reference="reference")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    "A run of each unit that nobody stopped, beside the run that it is compared with."
    root = tmp_path_factory.mktemp("whole")
    base = dict(p=7, model_type="transformer", hidden_dim=8, n_heads=2, n_layers=1, train_frac=0.7, batch_size=10, lr=1e-2, grad_clip=0.5, device="cpu", threads=1, log_every=LOG_EVERY, checkpoint_every=1000)
    Trainer(make_config(**base, name="reference", seed=4, epochs=3), root, progress=False).fit()
    configs = {"epoch": make_config(**base, name="epoch", epochs=EPOCHS), "step": make_config(**base, name="step", steps=STEPS)}
    for config in configs.values(): Trainer(config, root, hooks=observers(), progress=False).fit()
    return root, configs


@each_unit
@pytest.mark.parametrize("stop", [7, 18, 30, 43, 55])  # in an epoch and at its end; in windows that fill, are full, and in bursts
def test_a_run_stopped_in_the_middle_of_a_window_has_the_rows_of_one_that_was_not(stop, unit, whole):
    root, configs = whole
    config = with_values(configs[unit], name=f"{unit}_{stop}")
    with pytest.raises(Interrupted): Trainer(config, root, hooks=observers(stop), progress=False).fit()
    resumed = Trainer(config, root, hooks=observers(), progress=False).fit(resume=True)
    straight = RunFolder(root / unit)
    assert straight.table_names() == resumed.table_names() and len(straight.table_names()) == 1 + len(OBSERVERS)
    for name in straight.table_names(): pd.testing.assert_frame_equal(straight.table(name).read(), resumed.table(name).read(), check_exact=True, obj=name)


def test_a_hook_that_comes_in_when_a_run_goes_on_begins_there(tmp_path):
    "Its start is the point at which it came, not that of the run."
    names = [name for name in ("parameter_delta", "path_length") if name in REGISTRY]
    config = make_config(p=7, model_type="transformer", hidden_dim=8, n_heads=2, n_layers=1, batch_size=10, epochs=EPOCHS, log_every=LOG_EVERY, checkpoint_every=5, device="cpu", name="late", hooks={"norms": {}})
    first = with_values(config, until=5)
    Trainer(first, tmp_path, hooks=create_hooks(first), progress=False).fit()
    later = with_values(config, until=EPOCHS, hooks={"norms": {}, **{name: {} for name in names}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the hooks that come
        run = Trainer(later, tmp_path, hooks=create_hooks(later), progress=False).fit(resume=True)
    theta = {n: flat(numbers(load_checkpoint(run.path / f"checkpoints/{n}.pt")["model"])) for n in (5, 10, 15)}
    steps = [np.linalg.norm(theta[10] - theta[5]), np.linalg.norm(theta[15] - theta[10])]
    wanted = {"absolute_delta": steps, "path_length": [steps[0], sum(steps)], "net_displacement": [steps[0], np.linalg.norm(theta[15] - theta[5])]}
    for name in names:
        rows = run.table(f"hooks/{name}").read()
        assert rows.epoch.tolist() == [10, 15], name
        for metric in {*rows} & {*wanted}: assert rows[metric].tolist() == pytest.approx(wanted[metric], rel=TOLERANCE), metric
