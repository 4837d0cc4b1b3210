"Hooks on a loop of one's own: training bit for bit as nobody watched it, the trainer's rows, resumes, run folders, and one sentence for each loop that can't be right."
import copy, functools, os, random, shutil, signal, subprocess, sys, warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from typer.testing import CliRunner
from lal.analysis.runs import list_runs, load_run, runs_table
from lal.analysis.store import RunStore
from lal.app.cli import app
from lal.core.config import load_config
from lal.core.device import deterministic, generator, rng_states, seeded, threads
from lal.core.errors import ConfigError, HookError
from lal.core.experiment import find_experiment
from lal.core.files import digest
from lal.core.state import EVENTS
from lal.core.trainer import Trainer
from lal.hooks.hook import Hook, Schedule, never_fires
from lal.hooks.loop import LoopError
from lal.hooks.registry import REGISTRY, create_hooks
from lal.hooks.watch import watch

from test_fork import OPTIMIZERS, Tied, squared

CPU, PER_EPOCH = torch.device("cpu"), 4
UNITS, EACH_STEP = ("epoch", "step"), {"every_n_steps": 1}
each_unit = pytest.mark.parametrize("unit", UNITS)


def fitting(unit):
    "The hooks that fire in a loop of this unit, with options for a short one."
    fires = {n: cls for n, cls in REGISTRY.items() if not never_fires(cls, Schedule(unit, snapshot_every=3))}
    return {n: cls.example() | (EACH_STEP if n == "training_metrics" else {}) for n, cls in fires.items()}


def averaged(model, parts):
    "The loss of a step whose gradient is accumulated over parts."
    return sum(squared(model, part) for part in parts) / len(parts)


def everything(loop):
    "All that the next step depends on, and the gradients, by value."
    params = [*loop.model.parameters()]
    drawn = torch.get_rng_state(), np.random.get_state()[1].tobytes(), np.random.get_state()[2], hash(random.getstate())
    modes = [m.training for m in loop.model.modules()]
    return digest([dict(loop.model.named_parameters()), dict(loop.model.named_buffers()), [p.grad for p in params], loop.optimizer.state_dict(), drawn, modes])


class Loop:
    "A loop of one's own: dropout, batch normalization, a weight used twice, a frozen and an unused layer; accumulation and clipping if asked for."

    def __init__(self, optimizer="momentum", parts=1, clip=None, set_to_none=True, unit="epoch", schedule=False, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = Tied()
        self.x, self.y = (torch.randn(64, n, generator=generator(n, "data")) for n in (6, 2))
        self.optimizer = OPTIMIZERS[optimizer]([p for p in self.model.parameters() if p.requires_grad])
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.97) if schedule else None
        self.parts, self.clip, self.set_to_none, self.unit = parts, clip, set_to_none, unit
        self.seen, self.run, self.made = [], None, 0

    def watch(self, hooks, **options):
        self.run = watch(self.model, self.optimizer, averaged, hooks, **{"snapshot_every": 3, **options})
        return self

    def batch(self, k):
        "The batch of step k, counted from 1, in parts; the last of an epoch is short."
        epoch, place = divmod(k - 1, PER_EPOCH)
        order = torch.randperm(64, generator=generator(epoch, "order"))
        rows = order[place * 16 :][: 16 if place < PER_EPOCH - 1 else 12]
        return [(self.x[r], self.y[r]) for r in rows.chunk(self.parts)]

    def step(self, k):
        batch = self.batch(k)
        if self.run: self.run.begin_step(batch)
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        for part in batch: (squared(self.model, part) / self.parts).backward()
        if self.clip:
            length = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            if self.run: self.run.clipped(length, self.clip)
        self.optimizer.step()
        if self.run: self.run.end_step()
        self.seen.append(everything(self))
        if self.schedule: self.schedule.step()

    def go(self, last, first=1):
        "Steps from the first to the last one, wherever in an epoch."
        for k in range(first, last + 1):
            if self.run and self.unit == "epoch" and (self.run.joined or not self.run.in_epoch): self.run.begin_epoch()
            self.step(k)
            if k % PER_EPOCH == 0:
                if self.run and self.unit == "epoch": self.run.end_epoch()
                self.seen.append(everything(self))
        return self

    def checkpoint(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "rng": rng_states(CPU), "run": self.run.state_dict()} | ({"schedule": self.schedule.state_dict()} if self.schedule else {})

    def restore(self, saved):
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.schedule: self.schedule.load_state_dict(saved["schedule"])
        self.run.load_state_dict(saved["run"])
        torch.set_rng_state(saved["rng"]["cpu"])
        return self


# 1. Bits: nobody notices that they are there.

FEATURES = {
    "plain": {},
    "accumulated": dict(parts=3),
    "clipped": dict(clip=0.5),
    "accumulated and clipped, adamw, gradients zeroed in place": dict(parts=2, clip=0.3, optimizer="fused adamw", set_to_none=False),
    "foreach, a schedule": dict(optimizer="foreach adamw", schedule=True),
}
STEPS = 32


@functools.cache
def unwatched(feature):
    with seeded(0, "train"):
        random.seed(1), np.random.seed(1)
        return Loop(**FEATURES[feature]).go(STEPS).seen


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("feature", FEATURES)
@each_unit
def test_every_step_is_bit_for_bit_that_of_the_loop_that_nobody_watched(unit, feature, name):
    if name not in fitting(unit): return
    alone = unwatched(feature)
    with seeded(0, "train"):
        random.seed(1), np.random.seed(1)
        loop = Loop(**FEATURES[feature], unit=unit).watch({name: fitting(unit)[name]}, verify="always", log_every=1 if unit == "epoch" else 5)
        with loop.run: loop.go(STEPS)
    assert len(loop.run.table(name)) > 0 and not loop.run.hooks.problems
    assert loop.seen == alone


@pytest.mark.parametrize("when", ["the model draws", "a buffer grows", "in inference mode", "in evaluation mode"])
def test_a_loop_may_be_odd_and_is_still_bit_for_bit_the_same(when):
    def odd(watched):
        loop = Loop()
        forward, model = loop.model.forward, loop.model
        model.register_buffer("passes", torch.zeros(())), model.register_buffer("cache", torch.zeros(0, 1), persistent=False)

        def counting(x):
            model.passes += 1  # in evaluation mode, too
            if when == "a buffer grows" and len(x) > len(model.cache): model.cache = torch.arange(len(x) + len(model.cache) + 1.0)[:, None] / 100
            if when == "the model draws": x = x + torch.randn_like(x)
            return forward(x) + (model.cache[: len(x)] if when == "a buffer grows" else 0)

        model.forward = counting
        if when == "in evaluation mode": model.eval()
        if watched: loop.watch({**fitting("epoch")}, verify="always")
        for k in range(1, 25):
            if when == "in inference mode" and k % 4 == 1:
                with torch.inference_mode(): model(loop.x)  # what a loop does between two epochs
            loop.go(k, k)
        return loop

    with seeded(0, "train"): alone = odd(False)
    with seeded(0, "train"): seen = odd(True)
    assert seen.seen == alone.seen and int(alone.model.passes) in (24, 30)
    assert len(seen.run.table("hessian")) == 4 and not seen.run.hooks.problems


class Forking(Hook):
    "Makes the next three steps on a twin, at every event."

    kind, every_n_epochs = "intervention", 1

    def look(self, state, first):
        with state.fork() as twin:
            twin.run(self.loop.batch(k) for k in range(first, first + 3))
            self.loop.ends.append((first, digest(twin.params())))

    def pre_step(self, state): self.look(state, state.step)

    def post_step(self, state): self.look(state, state.step + 1)

    pre_epoch = post_epoch = snapshot = post_step


@pytest.mark.parametrize("clip, optimizer", [(None, "momentum"), (0.3, "fused adamw"), (0.3, "foreach adamw")])
@each_unit
def test_a_twin_makes_the_steps_that_the_loop_makes_next_at_every_event(unit, clip, optimizer):
    with seeded(0, "train"): alone = Loop(optimizer, clip=clip).go(15)
    loop = Forking.loop = Loop(optimizer, clip=clip, unit=unit)
    loop.ends, ahead = [], {}
    with seeded(0, "train"):
        loop.watch([Forking()], snapshot_every=1)
        for k in range(1, 16):
            loop.go(k, k)
            ahead[k] = digest({n: p.detach() for n, p in loop.model.named_parameters() if p.requires_grad})
    assert loop.seen == alone.seen and len(loop.ends) == (40 if unit == "epoch" else 45)
    known = [(first + 2, end) for first, end in loop.ends if first <= 13 and (clip is None or first > 1)]  # before the first step nobody can know of clipping
    assert len(known) > 30 and all(end == ahead[last] for last, end in known)


CHANGES = {
    "weights": lambda s: next(iter(s.trainable().values())).data.add_(1e-6),
    "gradients": lambda s: s.model.head.weight.grad.mul_(0.5),
    "buffers": lambda s: s.model.norm.running_mean.add_(1e-6),
    "the optimizer's settings": lambda s: s.optimizer.param_groups[0].update(lr=1.0),
    "the optimizer's state": lambda s: s.optimizer.state.clear(),
    "the data": lambda s: s.train_state.batch[0][0].mul_(1.0),
    "the model's mode": lambda s: s.model.eval(),
}


@pytest.mark.parametrize("thing", CHANGES)
@pytest.mark.parametrize("event", EVENTS)
def test_a_hook_that_changes_training_is_stopped_and_named(event, thing):
    def meddle(self, state):
        if state.step >= 5: CHANGES[thing](state)

    meddler = type("Meddler", (Hook,), {event: meddle})()
    loop = Loop().watch([REGISTRY["training_metrics"](), meddler], snapshot_every=1, verify="always")
    with pytest.raises(HookError) as error, loop.run: loop.go(12)
    said = str(error.value)
    assert said.startswith("hook meddler, step ") and f"({event})" in said and thing in said and "\n" not in said, said


# 2. A run that stops and goes on.

EVERYTHING = dict(clip=0.3, optimizer="fused adamw", schedule=True)
STOPS = [4, 10, 20, 21, 25, 28, 30]  # between epochs, in one, and in a burst of hessian (20 to 30), whose first step gives no row


@functools.cache
def straight(unit):
    with seeded(0, "train"):
        loop = Loop(**EVERYTHING, unit=unit).watch(fitting(unit), log_every=3)
        with loop.run: logged(loop, 1, STEPS)
    return tables(loop.run), loop.seen[-1]


def logged(loop, first, last):
    "Steps with numbers of the loop's own in the history, after the fifth step, and after every epoch."
    for k in range(first, last + 1):
        loop.go(k, k)
        if k == 5 or k % PER_EPOCH == 0: loop.run.log(**{f"own/{k % 3}": k})


def tables(run):
    return {name: run.table(name) for name in run.hooks.rows.columns} | {"history": run.history}


def equal_tables(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours: pd.testing.assert_frame_equal(ours[name], theirs[name], check_exact=True, check_like=name == "history")


@pytest.mark.parametrize("at", STOPS)
@pytest.mark.parametrize("where", ["folder", "memory"])
@each_unit
def test_a_loop_that_goes_on_from_its_own_checkpoint_gives_the_rows_of_one_that_never_stopped(unit, where, at, tmp_path):
    def begin():
        return Loop(**EVERYTHING, unit=unit, seed=at).watch(fitting(unit), log_every=3, root=tmp_path if where == "folder" else None)

    rows, end = straight(unit)
    with seeded(0, "train"):
        first = Loop(**EVERYTHING, unit=unit).watch(fitting(unit), log_every=3, root=tmp_path if where == "folder" else None)
        logged(first, 1, at)
        torch.save(first.checkpoint(), tmp_path / "loop.pt")
        logged(first, at + 1, at + 2)  # lost
        first.run.close("interrupted") if at % 2 else first.run.stack.close()  # stopped, or killed
        loop = begin().restore(torch.load(tmp_path / "loop.pt", weights_only=True))
        with loop.run: logged(loop, at + 1, STEPS)
    assert loop.seen[-1] == end
    equal_tables(tables(loop.run), rows)


# 3. The trainer's rows.

LENGTHS = {
    "epoch": ("epochs=20", "log_every=2", "hooks={norms: {}, consecutive: {}, training_metrics: {}, hessian: {every_n_steps: 40, burst_length: 11, displacement: true, per_parameter: true}}"),
    "step": ("steps=100", "log_every=10", "warmup_epochs=0", "warmup_steps=20", "hooks={hessian: {every_n_steps: 40, burst_length: 11}, training_metrics: {every_n_steps: 3}}"),
}


@each_unit
def test_on_the_quickstart_network_rows_are_those_of_the_trainer(unit, tmp_path):
    config = load_config("quickstart", LENGTHS[unit], seeds=None, name="trained", device="cpu")
    hooks = create_hooks(config)
    Trainer(config, tmp_path, progress=False, hooks=hooks).fit()
    with threads(config.threads), deterministic(), seeded(config.seed, "train"):
        s = find_experiment("modular").build(config, CPU)
        model, optimizer, loss_fn = s.model, s.optimizer, s.loss_fn
        run = watch(model, optimizer, loss_fn, config.hooks, log_every=config.log_every, seed=config.seed, root=tmp_path, name="mine")

        def step(batch):
            with run.step(batch):
                optimizer.zero_grad()
                loss_fn(model, batch).backward()
                run.clipped(nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip), config.grad_clip)
                optimizer.step()

        with run:
            for _ in range(config.length):
                if unit == "step":
                    step(s.batches.of_stream())
                else:
                    with run.epoch():
                        for _ in range(5): step(s.batches.of_epoch())
                s.scheduler.step()
    for name in run.hooks.rows.columns:
        ours, theirs = run.table(name), hooks.table(name)
        common = [c for c in theirs if c in ours and (unit == "epoch" or c != "epoch")]  # the trainer counts passes over the data
        pd.testing.assert_frame_equal(ours[common], theirs[common], check_exact=True)
        assert {*ours} - {*theirs} == set() and len(ours) >= (9 if unit == "epoch" else 20)
        assert {*theirs} - {*ours} <= ({"train_acc", "test_acc", "train_loss", "test_loss"} if name == "training_metrics" else set())
    assert run.table("hessian").step.tolist() == [*range(41, 51), *range(81, 91)]
    weights = (load_run(name, tmp_path).history.total_weight_norm.iloc[-1] for name in ("trained", "mine"))
    assert next(weights) == next(weights)


# 4. The numbers of `hessian` on a convolutional network and on GPT-2.


def convolutional(dtype):
    "118 parameters on 16 of the digits, with batch normalization and dropout."
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x = (x / 16).to(dtype).reshape(-1, 1, 8, 8)
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Dropout(0.3), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(8, 10)
    return nn.Sequential(*layers).to(dtype), [(x[k : k + 16], y[k : k + 16]) for k in range(0, 64, 16)], lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])


def gpt2(dtype, dropout=0.0, attention="eager"):
    "GPT-2 with two layers of width 8; batches are dicts."
    sizes = dict(n_embd=8, n_layer=2, n_head=2, n_inner=8, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0)
    drop = {f"{part}_pdrop": dropout for part in ("resid", "embd", "attn")}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **drop, attn_implementation=attention))
    ids = torch.randint(11, (4, 4, 8), generator=generator(0, "ids"))

    def loss_fn(model, batch):  # transformers' own loss computes in float32
        return F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    return model.to(dtype).train(), [{"input_ids": i} for i in ids], loss_fn


def trained(make, options, watching=True):
    "Four steps: the rows of `hessian`, the model, and weights and generators' states before each step with all that was there after it."
    before, after = [], []
    with seeded(0, "train"):
        model, batches, loss_fn = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        run = watch(model, optimizer, loss_fn, {"hessian": {"every_n_steps": 1, "burst_length": 1, **options}}) if watching else None
        for batch in batches:
            before.append(({n: p.detach().to(torch.float64, copy=True) for n, p in model.named_parameters()}, torch.get_rng_state()))
            with run.step(batch) if run else nullcontext():
                optimizer.zero_grad()
                loss_fn(model, batch).backward()
                optimizer.step()
            after.append(digest([model.state_dict(), [p.grad for p in model.parameters()], torch.get_rng_state()]))
        return run and run.table("hessian"), model, batches, loss_fn, before, after


def dense(model, loss_fn, batch, params, states, hessian=True):
    "Gradient and Hessian in float64 at these weights, with the mask of these states, one row at a time."
    model, leaves = copy.deepcopy(model).double(), {n: t.clone().requires_grad_() for n, t in params.items()}
    batch = tree_map(lambda t: t.double() if t.is_floating_point() else t, batch)

    class Loss(nn.Module):
        def __init__(self): super().__init__(), setattr(self, "model", model)

        def forward(self): return loss_fn(self.model, batch)

    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):  # the kernel that can be differentiated twice
        torch.set_rng_state(states)
        loss = functional_call(Loss(), {f"model.{n}": t for n, t in leaves.items()}, ())
    grads = torch.autograd.grad(loss, [*leaves.values()], create_graph=hessian)
    g = torch.cat([t.flatten() for t in grads])
    if not hessian: return g, None
    rows = torch.autograd.grad(g, [*leaves.values()], torch.eye(len(g), dtype=g.dtype), is_grads_batched=True, materialize_grads=True)
    return g.detach(), torch.cat([r.flatten(1) for r in rows], 1)


NETWORKS = {"convolutional": convolutional, "gpt2": functools.partial(gpt2, attention="sdpa")}
EPSILON = 1e-3
SCHEMES = {"exact": {"scheme": "exact"}, "forward": {"scheme": "forward", "epsilon": EPSILON, "check_every": None}}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_numbers_of_hessian_are_those_of_the_dense_matrix(network, dtype, scheme):
    rows, model, batches, loss_fn, before, _ = trained(lambda: NETWORKS[network](dtype), SCHEMES[scheme])
    n = sum(p.numel() for p in model.parameters())
    assert rows.step.tolist()[-2:] == [3, 4] and n < 1200
    for row in rows.to_dict("records")[-2:]:
        a, b = row["step"] - 2, row["step"] - 1
        (theta, drawn_a), (here, drawn_b) = before[a], before[b]
        g_a = dense(model, loss_fn, batches[a], theta, drawn_a, False)[0]
        g_b, H = dense(model, loss_fn, batches[b], theta, drawn_b, scheme == "exact")
        used, size = dense(model, loss_fn, batches[b], here, drawn_b, False)[0], g_a.norm()
        # A sum of n numbers rounds by about √n units; a gradient is made of some ten such sums, one after another.
        rounding = torch.finfo(dtype).eps * 10 * n**0.5
        of_g = rounding * max(g_b.norm(), size)
        if scheme == "exact":
            assert torch.allclose(H, H.T, atol=1e-12)
            bent, of_bent = H @ g_a, rounding * torch.linalg.eigvalsh(H).abs().max() * size
        else:  # the quotient in float64, and the rounding of two gradients
            ahead = dict(zip(theta, unflattened(flattened(theta) + EPSILON * g_a / size, theta)))
            bent = (dense(model, loss_fn, batches[b], ahead, drawn_b, False)[0] - g_b) * size / EPSILON
            of_bent = 2 * of_g * size / EPSILON
        cos, off = lambda x, y: x @ y / x.norm() / y.norm(), lambda name, value, bound: abs(row[name] - float(value)) <= float(bound)
        assert off("content_norm", g_b.norm(), of_g) and off("observed_grad_norm", used.norm(), of_g)
        assert off("entanglement_norm", bent.norm(), of_bent)
        assert off("rayleigh_quotient", g_a @ bent / size**2, (of_bent + 2 * rounding * bent.norm()) / size)
        assert off("batch_cossim", cos(g_a, g_b), 4 * of_g / min(g_b.norm(), size))
        assert off("entanglement_content_cossim", cos(bent, g_b), 2 * of_bent / bent.norm() + 2 * of_g / g_b.norm())
        assert of_bent < (0.25 if scheme == "forward" else 1e-2) * bent.norm()  # else these say little


def flattened(params):
    return torch.cat([t.flatten() for t in params.values()])


def unflattened(vector, like):
    return [part.view(t.shape) for part, t in zip(vector.split([t.numel() for t in like.values()]), like.values())]


@pytest.mark.parametrize("make", [convolutional, functools.partial(gpt2, dropout=0.2), functools.partial(gpt2, dropout=0.2, attention="sdpa")], ids=["convolutional", "gpt2", "gpt2, sdpa"])
def test_masks_statistics_and_generators_are_as_they_were(make):
    rows, *_, seen = trained(lambda: make(torch.float32), {"displacement": True, "check_every": 1})
    *_, alone = trained(lambda: make(torch.float32), {}, watching=False)
    assert seen == alone and len({*seen}) == 4
    assert len(rows) >= 2 and rows.relative_fd_error.notna().all()


# 5. Loops that can't be right: one sentence that says what to write.


def mean_square(model, batch):
    return model(batch).square().mean()


ALWAYS = {"every_n_steps": 1, "burst_length": 1, "scheme": "exact"}


class Small:
    "A linear model, a batch, and a step in pieces."

    def __init__(self, loss_fn=mean_square, hooks="training_metrics", model=None, optimizer=None, **options):
        torch.manual_seed(0)
        self.model = model or nn.Linear(3, 2)
        self.optimizer = optimizer or torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.batch, self.loss_fn = torch.randn(4, 3), loss_fn
        self.run = watch(self.model, self.optimizer, loss_fn, hooks, **options)

    def do(self, words):
        "What a step does, in this order."
        for word in words.split():
            match word:
                case "zero": self.optimizer.zero_grad()
                case "fill": self.optimizer.zero_grad(set_to_none=False)
                case "back": mean_square(self.model, self.batch).backward()
                case "step": self.optimizer.step()
                case "clip": nn.utils.clip_grad_norm_(self.model.parameters(), 0.01)
                case "value": nn.utils.clip_grad_value_(self.model.parameters(), 0.01)
                case "twice": (2 * mean_square(self.model, self.batch)).backward()
                case "other": mean_square(self.model, torch.ones(4, 3)).backward()
                case "widen": self.model.weight = nn.Parameter(torch.zeros(3, 3))
                case "more": self.model.more = nn.Parameter(torch.zeros(3))
                case "freeze": self.model.bias.requires_grad_(False)
                case "nested": self.run.begin_step(self.batch)
                case "epoch": self.run.begin_epoch()
                case "/epoch": self.run.end_epoch()
                case "state": self.run.state_dict()
                case "load": self.run.load_state_dict({"step": 1})
                case "(": self.run.begin_step(self.batch)
                case ")": self.run.end_step()
                case "clipped": self.run.clipped(1.0, 1.0)
                case "close": self.run.close()
                case "log": self.run.log(acc=1.0)
                case "raise": raise ZeroDivisionError
        return self


FINE = "( zero back step ) "
STEPS_THAT_ARE_WRONG = {
    "( ) ": "no gradient was computed inside the step: put zero_grad, backward and optimizer.step inside `with run.step(batch)`",
    "zero back ( step )": "no gradient was computed inside the step",
    "( zero step )": "no gradient was computed inside the step",
    "( back zero step )": "no gradient was computed inside the step",
    "( fill step )": "no gradient was computed inside the step",
    FINE + "( step )": "no gradient was computed inside the step",
    FINE + "( fill step )": "the gradients are zero when the step ends: call backward inside `with run.step(batch)`, after optimizer.zero_grad()",
    "( zero back step zero )": "call optimizer.zero_grad() before backward, not after optimizer.step()",
    "( zero back step fill )": "call optimizer.zero_grad() before backward, not after optimizer.step()",
    FINE * 5 + "( zero back step fill )": "call optimizer.zero_grad() before backward, not after optimizer.step()",
    "( zero back step back )": "call optimizer.zero_grad() before backward, not after optimizer.step()",
    "( zero back )": "optimizer.step was not called inside the step: for accumulated gradients, one step holds all backward calls and one optimizer.step()",
    "( zero back step zero back step )": "optimizer.step was called 2 times inside one step: enter run.step once for each",
    "( zero back step step )": "optimizer.step was called 2 times inside one step",
    FINE + "( back step )": "call model.zero_grad() before each backward",
    "( zero nested )": "a step begins inside a step, which has to end before",
    "( epoch": "an epoch begins inside a step, which has to end before",
    "epoch epoch": "an epoch begins inside an epoch, which has to end before",
    "epoch ( /epoch": "end_epoch was called without begin_epoch, or inside a step",
    "/epoch": "end_epoch was called without begin_epoch, or inside a step",
    ")": "end_step was called without begin_step",
    "epoch " + FINE + "/epoch " + FINE: "some steps are inside `with run.epoch()` and others are not: put all of them inside, or none",
    FINE + "epoch": "some steps are inside `with run.epoch()` and others are not",
    "( zero back step widen )": "other parameters than at the first step, or others that train (weight): change it before that, or go on in a new run of watch",
    FINE * 3 + "widen ( zero back step )": "(weight)",
    FINE * 3 + "more ( zero back step )": "(their number)",
    FINE * 3 + "freeze ( zero back step )": "(bias)",
    "( zero back clip step )": "Tell clipping by run.clipped(norm, max_norm)",
    "( zero back value step )": "is not that of loss_fn(model, batch)",
    "( zero twice step )": "it is 2 times as long, at a cosine of 1.000",
    "( zero other step )": "is not that of loss_fn(model, batch)",
    "clipped": "run.clipped belongs inside the step whose gradient was clipped",
    FINE + "clipped": "run.clipped belongs inside the step whose gradient was clipped",
    "( state": "run.state_dict belongs between two steps, not inside one",
    FINE + "load": "run.load_state_dict comes before the first epoch or step",
    FINE + "close " + FINE: "the run is closed: put the loop inside `with watch(…) as run`, or call run.close() after it",
    FINE + "close log": "the run is closed",
    "close epoch": "the run is closed",
}


def one_line(error):
    said = str(error.value)
    assert said.strip() and "\n" not in said, said
    return said


@pytest.mark.parametrize("words", STEPS_THAT_ARE_WRONG)
def test_a_step_that_can_not_be_right_is_one_sentence(words, tmp_path):
    small = Small(root=tmp_path, name="wrong")
    with pytest.raises(LoopError) as error, small.run: small.do(words)
    assert STEPS_THAT_ARE_WRONG[words] in one_line(error)
    if "close" in words or small.run.hooks is None: return
    summary = load_run("wrong", tmp_path).summary  # and the run is readable
    assert summary["status"] == "failed" and summary["error"] == str(error.value)
    Small(root=tmp_path, name="wrong", overwrite=True).do(FINE).run.close()  # its lock is free


LOSSES = {
    "each example's": (lambda model, batch: model(batch).square().mean(1), "it must return one real scalar, and returned torch.float32 of shape [4]; end it with .mean()"),
    "a number": (lambda model, batch: model(batch).square().mean().item(), "loss_fn(model, batch): f returned a float, not a scalar tensor"),
    "of whole numbers": (lambda model, batch: (model(batch) > 0).sum(), "must return one real scalar"),
    "detached": (lambda model, batch: model(batch).detach().square().mean(), "without detach or no_grad"),
    "of another model": (lambda model, batch: OTHER(batch).square().mean(), "compute with its argument `model`, not with another name"),
    "partly of another model": (lambda model, batch: model(batch).square().mean() + OTHER(batch).square().mean() * model.weight.sum(), "is not that of loss_fn(model, batch)"),
    "not finite": (lambda model, batch: (model(batch).square().mean() - 9).sqrt(), "the gradient is not finite in weight, bias"),
}
OTHER = nn.Linear(3, 2)


@pytest.mark.parametrize("which", LOSSES)
def test_a_loss_that_can_not_be_right_is_one_sentence(which):
    loss_fn, wanted = LOSSES[which]
    with pytest.raises(LoopError) as error: Small(loss_fn).do(FINE)
    assert wanted in one_line(error)


def test_gradients_of_parameters_that_the_optimizer_does_not_clear_are_one_sentence():
    model = perceptron()
    small = Small(model=model, optimizer=torch.optim.SGD(model[2].parameters(), lr=0.1))
    with pytest.raises(LoopError) as error: small.do(FINE * 2)
    assert "call model.zero_grad() before each backward" in one_line(error)


def test_a_loss_that_names_the_live_model_computes_with_the_weights_it_is_given():
    rows = []
    for live in (False, True):
        small = Small(hooks={"hessian": ALWAYS})
        model = small.model
        if live: small.run = watch(model, small.optimizer, lambda _, batch: mean_square(model, batch), {"hessian": ALWAYS})
        rows.append(small.do(FINE * 4).run.table("hessian"))
    pd.testing.assert_frame_equal(*rows, check_exact=True)


class Odd:
    name = "odd"


SPARSE, LAZY = nn.Sequential(nn.Identity(), nn.Embedding(5, 3, sparse=True)), nn.LazyLinear(2)
REQUESTS = {
    "a model": (dict(model=lambda x: x, optimizer="sgd"), "model is a function, not a torch.nn.Module"),
    "an optimizer": (dict(optimizer="sgd"), "optimizer is a str, not a torch.optim.Optimizer"),
    "another model's": (dict(optimizer=torch.optim.SGD(OTHER.parameters(), lr=0.1)), "the optimizer has none of the model's parameters: make it from model.parameters()"),
    "data parallel": (dict(model=nn.DataParallel(OTHER), optimizer=torch.optim.SGD(OTHER.parameters(), lr=0.1)), "the model is split (DataParallel)"),
    "sparse gradients": (dict(model=SPARSE, optimizer=torch.optim.SparseAdam(SPARSE.parameters())), "1 has sparse gradients, which hooks can't compare: use sparse=False"),
    "a lazy model": (dict(model=LAZY, optimizer=torch.optim.SGD(LAZY.parameters(), lr=0.1)), "the model has parameters without a shape yet: call it on a batch before watch"),
    "a loss": (dict(loss_fn="cross_entropy"), "loss_fn = cross_entropy: must be a function of model and batch"),
    "a hook": (dict(hooks="hesian"), "no hook or set is called 'hesian'; did you mean 'hessian'?"),
    "a hook in a list": (dict(hooks=["norms", "x"]), "no hook or set is called 'x'"),
    "an option": (dict(hooks={"hessian": {"epsilom": 1}}), "hooks.hessian.epsilom = 1: unknown option; did you mean 'epsilon'?"),
    "an option's value": (dict(hooks={"hessian": {"epsilon": -1}}), "hooks.hessian.epsilon = -1"),
    "options of a set": (dict(hooks={"full": {"epsilon": 1}}), "hooks.full = {epsilon: 1}: is a set, and has no options: give them to its hooks"),
    "a class of hooks": (dict(hooks=[REGISTRY["norms"]]), "is no hook: give names, or instances such as Norms()"),
    "no hook at all": (dict(hooks=[REGISTRY["norms"](), Odd()]), "is no hook: give names, or instances such as Norms()"),
    "names and hooks": (dict(hooks=["hessian", REGISTRY["norms"]()]), "hessian is no hook: give names, or instances such as Norms()"),
    "a hook without a list": (dict(hooks=REGISTRY["norms"]()), "must be a name, a list of names, or a mapping"),
    "two hooks of a name": (dict(hooks=[REGISTRY["norms"](), REGISTRY["norms"]()]), "two hooks are called norms"),
    "a sink": (dict(sinks=["json"]), "json"),
    "on_error": (dict(on_error="go on"), "on_error = go on: must be one of stop, skip"),
    "verify": (dict(verify="never"), "verify = never: must be one of first, always"),
    "a name": (dict(name="a/b"), "name = a/b: "),
    "log_every": (dict(log_every=0), "log_every = 0: must be a whole number, 1 or larger, or None"),
    "log_every in words": (dict(log_every="often"), "log_every = often: must be a whole number, 1 or larger, or None"),
    "snapshot_every": (dict(snapshot_every=2.5), "snapshot_every = 2.5: must be a whole number, 1 or larger, or None"),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_a_request_that_can_not_be_right_is_one_sentence_before_the_loop_begins(what, tmp_path):
    keys, wanted = REQUESTS[what]
    with pytest.raises(ConfigError) as error: Small(**keys, root=tmp_path)
    assert wanted in one_line(error) and not [*tmp_path.iterdir()]


class Begins(Hook):
    def pre_epoch(self, state): ...


def test_hooks_of_the_beginning_of_epochs_in_a_loop_without_them_are_refused_by_name_and_left_out_of_a_set(monkeypatch, tmp_path):
    monkeypatch.setitem(REGISTRY, "begins", Begins)
    for hooks in ("begins", {"begins": {}}, [Begins()]):
        small = Small(hooks=hooks, root=tmp_path)
        with pytest.raises(ConfigError) as error: small.do(FINE)
        assert "hook begins fires at the beginning of an epoch" in one_line(error) and "or put the steps inside `with run.epoch()`" in str(error.value)
    assert not [*tmp_path.glob("*")]
    small = Small(hooks="observers").do(FINE)
    assert {"training_metrics", "norms"} <= {*small.run.hooks.rows.columns} and "begins" not in small.run.hooks.rows.columns
    with pytest.raises(ConfigError) as error: small.run.table("begins")
    assert "no hook 'begins' watches this run; there are training_metrics" in one_line(error)
    with pytest.raises(ConfigError) as error: Small().run.table("norms")
    assert "no step was made yet" in one_line(error)


@pytest.mark.parametrize("name", ["epoch", "step", "run", "filename"])
def test_what_can_not_be_logged_is_one_sentence(name):
    small = Small().do(FINE)
    for numbers, wanted in (({name: 1}, f"run.log: {name} is a column that tables have: choose another name"), ({"acc": torch.ones(2)}, "run.log: acc is [2]"), ({"acc": "high"}, "run.log: acc is a str")):
        with pytest.raises(ConfigError) as error: small.run.log(**numbers)
        assert wanted in one_line(error)


def test_a_reference_that_does_not_fit_is_one_sentence_and_nothing_is_lost(tmp_path):
    for reference, wanted in (("nobody", "is neither a run nor a checkpoint"), ({"w": torch.ones(2)}, "the reference"), (tmp_path, "is neither a run")):
        small = Small(hooks="hessian", reference=reference, root=tmp_path)
        with pytest.raises(ConfigError) as error: small.do(FINE)
        assert wanted in one_line(error) and not [*tmp_path.glob("watched")]


def test_a_model_that_is_distributed_is_refused_in_one_sentence():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
        with pytest.raises(ConfigError) as error: Small(model=model)
        assert "the model is split (DistributedDataParallel)" in one_line(error) and "watch the module inside" in str(error.value)
        Small(model=model.module).do(FINE * 3)
    finally:
        torch.distributed.destroy_process_group()


# 6. Loops that are out of the ordinary and right.


def perceptron(bend=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), bend(), nn.Linear(8, 2))


def batches_of(n):
    return torch.randn(n, 6, 3, generator=generator(0, "x"))


ALL_HOOKS = {"hessian": ALWAYS, "norms": {}, "consecutive": {}, "training_metrics": EACH_STEP}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflows, clip", [(2, None), (5, 0.5), (8, 0.5)])
def test_a_step_that_a_scaler_leaves_out_is_no_step_and_gradients_are_unscaled(overflows, clip, fused):
    "A scale that is a power of two changes no bit, so rows are those of the loop without it and without that batch."
    def loop(scaled):
        model, left = perceptron(nn.ReLU), False
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, enabled=scaled)
        run = watch(model, optimizer, mean_square, ALL_HOOKS)
        for epoch in batches_of(12).split(4):
            with run.epoch():
                for batch in epoch:
                    if run.state.step + 1 == overflows and not left:
                        batch, left = batch * 1e6, True
                        if not scaled: continue
                    with run.step(batch):
                        optimizer.zero_grad()
                        scaler.scale(mean_square(model, batch)).backward()
                        if clip:  # else scaler.step unscales
                            scaler.unscale_(optimizer)
                            run.clipped(nn.utils.clip_grad_norm_(model.parameters(), clip), clip)
                        scaler.step(optimizer)
                        scaler.update()
            run.log(scale=scaler.get_scale())
        return run, model

    (run, model), (alone, same) = loop(True), loop(False)
    assert run.state.step == alone.state.step == 11 and run.history.scale.iloc[-1] == 2.0**99
    assert digest(model.state_dict()) == digest(same.state_dict())
    for name in ALL_HOOKS: pd.testing.assert_frame_equal(run.table(name), alone.table(name), check_exact=True)


def test_a_step_that_raises_and_is_caught_is_no_step():
    small = Small(hooks=[REGISTRY["training_metrics"](**EACH_STEP), REGISTRY["hessian"](**ALWAYS)])
    for broken in ("raise", "zero raise", "zero back raise"):
        small.do(FINE * 2)
        with pytest.raises(ZeroDivisionError), small.run.step(small.batch): small.do(broken)
    small.do(FINE)
    assert small.run.table("training_metrics").step.tolist() == [*range(1, 8)]
    assert small.run.table("hessian").step.tolist()[-5:] == [*range(3, 8)]


@pytest.mark.parametrize("how", ["the model", "in place", "a part", "the loss"])
def test_a_compiled_model_is_watched_with_exact_products(how):
    def loop(compiled):
        model, loss_fn = perceptron(), mean_square
        if compiled:
            if how == "the model": model = torch.compile(model, backend="aot_eager")
            if how == "in place": model.compile(backend="aot_eager")
            if how == "a part": model[0] = torch.compile(model[0], backend="aot_eager")
            if how == "the loss": loss_fn = torch.compile(mean_square, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(model, optimizer, loss_fn, ALL_HOOKS) as run:
            for epoch in batches_of(9).split(3):
                with run.epoch():
                    for batch in epoch:
                        with run.step(batch):
                            optimizer.zero_grad()
                            loss_fn(model, batch).backward()
                            optimizer.step()
        return run

    ours, theirs = loop(True), loop(False)
    for name in ALL_HOOKS:
        a, b = (run.table(name).rename(columns=lambda c: c.replace("._orig_mod", "")) for run in (ours, theirs))
        pd.testing.assert_frame_equal(a, b, rtol=1e-4, atol=1e-5)  # the compiler may sum in another order
    assert len(ours.table("hessian")) >= 7 and not [n for n, _ in ours.state.model.named_parameters() if n.startswith("_orig_mod")]


def test_a_loss_in_half_precision_is_bit_for_bit_the_same_when_watched():
    def loop(watched):
        model, seen = perceptron(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

        def loss_fn(model, batch):
            with torch.autocast("cpu", torch.bfloat16): return model(batch).float().square().mean()

        run = watch(model, optimizer, loss_fn, {"hessian": {**ALWAYS, "scheme": "exact"}, "training_metrics": EACH_STEP}) if watched else None
        for batch in batches_of(8):
            with run.step(batch) if run else nullcontext():
                optimizer.zero_grad()
                loss_fn(model, batch).backward()
                optimizer.step()
            seen.append(digest([model.state_dict(), optimizer.state_dict()]))
        return seen, run

    (ours, run), (theirs, _) = loop(True), loop(False)
    assert ours == theirs and run.table("training_metrics").loss.notna().all() and len(run.table("hessian")) >= 6


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_closure_works_where_the_gradient_is_that_of_the_step_and_is_refused_elsewhere(make):
    small, ours = Small(hooks={"hessian": ALWAYS}), Small(hooks={"hessian": ALWAYS})
    optimizer = make(ours.model.parameters(), lr=0.1)
    run = watch(ours.model, optimizer, mean_square, {"hessian": ALWAYS})

    def closure():
        optimizer.zero_grad()
        loss = mean_square(ours.model, ours.batch)
        loss.backward()
        return loss

    def loop():
        for _ in range(4):
            with run.step(ours.batch): optimizer.step(closure)

    if make is torch.optim.SGD:
        loop()
        pd.testing.assert_frame_equal(run.table("hessian"), small.do(FINE * 4).run.table("hessian"), check_exact=True)
        return
    with pytest.raises(LoopError) as error: loop()
    assert "is not that of loss_fn(model, batch)" in one_line(error)


FORMS = {
    "a dict": lambda x: ({"x": x, "about": "text", "n": 3, "none": None}, lambda b: b["x"]),
    "nested tuples": lambda x: ((x, (x, [x])), lambda b: b[1][1][0]),
    "a BatchEncoding": lambda x: (transformers.BatchEncoding({"x": x}), lambda b: b["x"]),
    "an object": lambda x: (SimpleNamespace(x=x), lambda b: b.x),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_may_have_any_form(form):
    rows = []
    for take in (None, FORMS[form](None)[1]):
        model = perceptron()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_fn = mean_square if take is None else lambda model, batch: mean_square(model, take(batch))
        with watch(model, optimizer, loss_fn, {"hessian": {**ALWAYS, "displacement": True}, "training_metrics": EACH_STEP}, verify="always") as run:
            for x in batches_of(6):
                batch = x if take is None else FORMS[form](x)[0]
                with run.step(batch):
                    optimizer.zero_grad()
                    loss_fn(model, batch).backward()
                    optimizer.step()
        rows.append((run.table("hessian"), run.table("training_metrics")))
    for ours, theirs in zip(*rows): pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


# 7. The run folder, and going on with the right one.


def watched_run(root, name, unit="epoch", last=12, **options):
    with seeded(0, "train"):
        loop = Loop(unit=unit).watch(fitting(unit), root=root, name=name, **{"log_every": 1 if unit == "epoch" else 4, **options})
        with loop.run: logged(loop, 1, last)
    return loop


@pytest.fixture(scope="session")
def both(tmp_path_factory):
    "A root with a run of the trainer and two watched ones."
    root = tmp_path_factory.mktemp("both")
    config = load_config("quickstart", ("epochs=3", "p=11", "hooks=minimal"), seeds=None, name="trained", device="cpu", warmup_epochs=0)
    Trainer(config, root, progress=False, hooks=create_hooks(config)).fit()
    for unit in UNITS: watched_run(root, unit, unit)
    return root


def lal(*words, code=0):
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == code and (result.exception is None or isinstance(result.exception, SystemExit)), (result.output, result.exception)
    return result.output


def test_a_watched_run_reads_like_any_other(both):
    runs = {run.name: run for run in list_runs(both, errors="raise")}
    assert [*runs] == ["epoch", "step", "trained"] and load_run("epoch", both).name == "epoch"
    for unit in UNITS:
        run = runs[unit]
        assert run.summary["status"] == "finished" and run.summary["steps"] == 12 and run.summary["parameters"] == 140
        assert run.summary["final_loss"] == run.history.loss.iloc[-1] and run.summary["best_loss"] == run.history.loss.min()
        assert run.unit == unit and run.length == ("3 epochs" if unit == "epoch" else "12 steps")
        assert {*run.columns.name} >= {"loss", "own/0", "own/1", "own/2", "lr", "total_weight_norm"} and run.headline == "loss"
        assert run.about == "Tied, 140 parameters, SGD lr 0.05" and {"training_metrics"} <= {*run.hooks} <= {*fitting(unit)} and run.config["momentum"] == 0.9
        assert "loss" in repr(run) and run.name in run._repr_html_() and "Tied" in run.ran_on
        assert not run.milestones and run.epochs_saved == []
    table = runs_table([*runs.values()])
    assert table.run.tolist() == [*runs] and table.length.tolist() == ["3 epochs", "12 steps", "3 epochs"]


def test_runs_of_both_kinds_are_asked_in_one_query(both):
    store = RunStore(both)
    rows = store.query("SELECT run, experiment, status, steps, max_epochs, model, best_loss FROM runs ORDER BY run")
    assert rows.experiment.tolist() == ["watched", "watched", "modular"] and rows.model.tolist()[:2] == ["Tied", "Tied"]
    assert rows.status.tolist() == ["finished"] * 3 and rows.max_epochs.isna().tolist() == [True, True, False]
    rows = store.query("SELECT run, count(*) n, max(step) s, count(loss) loss, count(test_acc) acc FROM history GROUP BY run ORDER BY run")
    assert rows.s.tolist()[:2] == [12, 12] and (rows.acc > 0).tolist() == [False, False, True] and (rows.loss > 0).tolist() == [True, True, False]
    rows = store.query("SELECT run, count(*) n FROM training_metrics GROUP BY run ORDER BY run")
    assert rows.run.tolist() == ["epoch", "step", "trained"] and rows.n.tolist()[0] == 12
    rows = store.query("SELECT metric, meaning FROM metrics WHERE hook = 'history'")
    assert {"loss", "own/1", "test_acc"} <= {*rows.metric} and "logged by the loop" in {*rows.meaning}


def test_the_command_line_lists_and_reports_watched_runs(both, tmp_path):
    said = lal("runs", "--root", both)
    assert all(word in said for word in ("epoch", "step", "trained", "12 steps", "Tied, 140 parameters"))
    assert "12" in lal("runs", "--root", both, "--sql", "SELECT max(step) FROM history WHERE run = 'step'")
    for names in (["epoch"], ["step"], ["epoch", "step"], ["epoch", "trained"]):
        lal("report", *names, "--root", both, "--output", tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text("utf-8")
        assert "Tied, 140 parameters" in page and "nan" not in page.partition("<script")[0].lower()
        if "trained" not in names: assert "full batches" not in page and "SGD" in page and "optimizer" not in page.partition("<h1>")[0].partition("SGD")[0][-20:]


def test_a_watched_run_is_not_trained_by_the_trainer(both, tmp_path):
    root = shutil.copytree(both, tmp_path / "both")
    before = {f: f.read_bytes() for f in (root / "epoch").rglob("*") if f.is_file()}
    for more in ("--resume", "--extra-epochs=3"):
        said = lal("train", "quickstart", "--set", "seeds=null", "--name", "epoch", "--root", root, more, code=2)
        assert said.count("\n") == 1 and "a loop of its own" in said and "run.load_state_dict" in said, said
    config = load_config("quickstart", seeds=None, name="epoch", hooks={})
    with pytest.raises(ConfigError) as error: Trainer(config, root, progress=False).fit(resume=True)
    assert "a loop of its own" in one_line(error)
    with pytest.raises(ConfigError) as error: Trainer(config, root, progress=False).fit()
    assert "exists already" in one_line(error)
    assert before == {f: f.read_bytes() for f in (root / "epoch").rglob("*") if f.is_file()}


def test_an_existing_run_is_refused_and_whole_and_replaced_when_asked(tmp_path):
    watched_run(tmp_path, "one")
    before = {f: f.read_bytes() for f in (tmp_path / "one").rglob("*") if f.is_file()}
    for _ in range(2):
        loop = Loop().watch("norms", root=tmp_path, name="one")
        with pytest.raises(ConfigError) as error: loop.go(1)
        assert "exists already: resume it, overwrite it, or choose another name" in one_line(error)
    assert before == {f: f.read_bytes() for f in (tmp_path / "one").rglob("*") if f.is_file()}
    first = Loop().watch("norms", root=tmp_path, name="one", overwrite=True).go(4)  # still open
    with pytest.raises(ConfigError) as error: Loop().watch("norms", root=tmp_path, name="one", overwrite=True).go(1)
    assert "another process is training this run" in one_line(error)
    first.run.close()
    assert len(load_run("one", tmp_path).history) == 1


class Stop(Exception):
    pass


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), "interrupted"), (Stop("two\nlines"), "failed"), (SystemExit(3), "failed"), (None, "finished")])
def test_the_summary_says_how_the_loop_ended(error, status, tmp_path):
    loop = Loop().watch(fitting("epoch"), root=tmp_path, name="ended")
    with pytest.raises(type(error)) if error else nullcontext():
        with loop.run:
            loop.go(6)
            if error: raise error
    loop.run.close()  # a second time changes nothing
    run = load_run("ended", tmp_path)
    assert run.summary["status"] == status and run.summary.get("error") == ("two\nlines" if isinstance(error, Stop) else "3" if isinstance(error, SystemExit) else None)
    assert run.history.step.tolist() == [4] and len(run.hook("training_metrics")) == 6 and run.summary["seconds"] > 0
    pd.testing.assert_frame_equal(loop.run.table("training_metrics"), run.hook("training_metrics"))


def test_a_close_that_fails_does_not_hide_why_the_loop_ended(tmp_path, monkeypatch):
    loop = Loop().watch("norms", root=tmp_path)
    monkeypatch.setattr("lal.hooks.watch.close_record", lambda *_: 1 / 0)
    with pytest.raises(Stop), loop.run:
        loop.go(2)
        raise Stop
    monkeypatch.undo()
    with Loop().watch("norms", root=tmp_path, overwrite=True).run as run: run.begin_epoch()  # the lock is free


def test_a_history_without_a_log_point_is_summarised_and_read(tmp_path):
    with Loop(unit="step").watch("training_metrics", root=tmp_path, name="brief").run as run: pass
    assert not [*tmp_path.iterdir()]  # nothing was done
    for logs in (False, True):
        loop = Loop(unit="step").watch("training_metrics", root=tmp_path, name="brief", overwrite=True)
        with loop.run:
            if logs: loop.run.log(acc=0.1)
            loop.go(7)
            if logs: loop.run.log(acc=0.5)
        run = load_run("brief", tmp_path)
        assert run.summary["status"] == "finished" and run.summary["steps"] == (7 if logs else 0)
        assert run.history.get("acc", pd.Series()).tolist() == [0.1, 0.5][: 2 * logs] and run.unit == "step"
        assert "brief" in repr(run) and lal("runs", "--root", tmp_path) and run._repr_html_()
        assert len(RunStore(tmp_path).query("SELECT * FROM runs")) == 1
        if logs: lal("report", "brief", "--root", tmp_path)


KILLED = """
import os, signal, sys
import lal.core.run
from test_watch import Loop, fitting, logged
lal.core.run.FLUSH_SECONDS = float(sys.argv[3])
loop = Loop(unit=sys.argv[2]).watch(fitting(sys.argv[2]), root=sys.argv[1], name="killed", log_every=2)
logged(loop, 1, 26)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("unit, seconds", [("epoch", 1000), ("step", -1)])
def test_a_loop_that_is_killed_leaves_a_run_that_can_be_read(unit, seconds, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), unit, str(seconds)]
    ended = subprocess.run(command, cwd=Path(__file__).parent, env={**os.environ, "PYTHONPATH": os.pathsep.join(["."] + sys.path)}, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    run, = list_runs(tmp_path, errors="raise")
    assert run.summary == {"status": "running"} and "killed" in repr(run) and lal("runs", "--root", tmp_path)
    assert RunStore(tmp_path).query("SELECT status FROM runs").status.tolist() == ["running"]
    if seconds < 0:
        rows, _ = straight(unit)
        assert run.unit == unit and len(run.history) >= 10 and len(run.hook("training_metrics")) == 26
        assert lal("report", "killed", "--root", tmp_path)
    Loop().watch("norms", root=tmp_path, name="killed", overwrite=True).go(4).run.close()


def saved_state(root, name, last=10):
    loop = Loop().watch(fitting("epoch"), root=root, name=name).go(last)
    state = loop.run.state_dict()
    loop.run.close()
    return state


def test_the_checkpoint_of_another_run_is_refused_before_a_row_is_lost(tmp_path, both):
    state, memory = saved_state(tmp_path, "one"), saved_state(None, "one")
    watched_run(tmp_path, "two", last=24)
    shutil.copytree(both / "trained", tmp_path / "trained")
    before = {f: f.read_bytes() for f in tmp_path.rglob("*.parquet")}

    def load(state, root, name="one", hooks=None, **options):
        with pytest.raises(ConfigError) as error: Loop().watch(hooks or fitting("epoch"), root=root, name=name, **options).run.load_state_dict(state)
        return one_line(error)

    assert "the checkpoint is of a run in a folder one, and this one is in a folder two: pass the root and name of that run" in load(state, tmp_path, "two")
    assert "is of a run in a folder one, and this one is in memory (root = None)" in load(state, None)
    assert "is of a run in memory (root = None), and this one is in a folder one" in load(memory, tmp_path)
    assert "belongs to a run that is not here: give its root and name" in load(state, tmp_path / "elsewhere")
    assert "belongs to a run that is not here" in load({**state, "run": "a folder trained"}, tmp_path, "trained")
    assert "has fewer rows than when the checkpoint was made" in load({**state, "rows": {**state["rows"], "history": 100}}, tmp_path)
    assert before == {f: f.read_bytes() for f in tmp_path.rglob("*.parquet")}
    Loop().watch(fitting("epoch"), root=tmp_path, name="one").run.load_state_dict({})  # of a loop that had made no step


def test_another_reference_is_refused_before_a_row_is_lost(tmp_path):
    one, two = (dict(Loop(seed=k).model.named_parameters()) for k in (1, 2))
    loop = Loop().watch("hessian", root=tmp_path, reference=one).go(6)
    state = loop.run.state_dict()
    loop.go(9, 7).run.close()
    before = {f: f.read_bytes() for f in tmp_path.rglob("*.parquet")}
    again = Loop().watch("hessian", root=tmp_path, reference=two)
    with pytest.raises(ConfigError) as error: again.run.load_state_dict(state)
    assert "the weights to compare with are not those that the run began with" in one_line(error)
    assert before == {f: f.read_bytes() for f in tmp_path.rglob("*.parquet")}
    Loop().watch("hessian", root=tmp_path, reference=one).run.load_state_dict(state)


def test_a_run_may_go_on_with_a_hook_more_or_less_and_after_its_end(tmp_path):
    loop = Loop().watch("norms", root=tmp_path, name="on")
    with loop.run: logged(loop, 1, 8)
    saved = loop.checkpoint()
    again = Loop(seed=1).watch("consecutive", root=tmp_path, name="on")
    with pytest.warns(UserWarning) as said: again.restore(saved)
    assert [str(w.message) for w in said] == ["the run goes on with other hooks: consecutive watches from here on, norms no longer watches"]
    with again.run: again.go(16, 9)
    run = load_run("on", tmp_path)
    assert run.summary["status"] == "finished" and run.history.step.tolist() == [4, 5, 8, 12, 16]
    assert run.hook("norms").epoch.tolist() == [1, 2] and run.hook("consecutive").epoch.tolist() == [4]
    assert "own/2" in {*run.columns.name}  # logged by the first part alone
    assert len(run.environment["continued"]) == 1 and run.environment["continued"][0]["step"] == 8


def test_a_state_goes_through_a_file_of_tensors_and_plain_values(tmp_path):
    for root in (tmp_path, None):
        loop = Loop(clip=0.3).watch({**fitting("epoch"), "norms": {"every_n_epochs": 1}}, root=root, name="state").go(22)
        torch.save(loop.run.state_dict(), tmp_path / "run.pt")
        saved = torch.load(tmp_path / "run.pt", weights_only=True)
        assert digest(saved) == digest(loop.run.state_dict() | {"seconds": saved["seconds"]}) and saved["step"] == 22 and saved["in_epoch"]
        twice = [Loop(clip=0.3).watch({**fitting("epoch"), "norms": {"every_n_epochs": 1}}).run for _ in range(2)]
        if root is None:
            for run in twice:
                run.load_state_dict(saved)  # a dict that is loaded is not changed by going on
                assert digest(run.hooks.state_dict()) == digest(saved["hooks"])
                run.begin_epoch()
                run.end_epoch()
        loop.run.close()


def test_numbers_of_any_optimizer_are_in_the_configuration(tmp_path):
    model = perceptron()
    groups = [{"params": [p], "name": n, "about": object()} for n, p in model.named_parameters()]
    optimizer = torch.optim.Adam(groups, lr=torch.tensor(0.01), betas=(0.8, 0.9))
    with watch(model, optimizer, mean_square, "norms", root=tmp_path, name="own", seed=3) as run:
        with run.epoch(), run.step(batches_of(1)[0]):
            mean_square(model, batches_of(1)[0]).backward()
            optimizer.step()
    found = load_run("own", tmp_path).config
    assert found["name"] == "own" and found["seed"] == 3 and found["betas"] == [0.8, 0.9] and abs(found["lr"] - 0.01) < 1e-8 and "about" not in found


def test_a_hook_that_never_fired_is_named_when_the_run_closes(tmp_path):
    "The length of a loop is known at its end: one line for the hook whose schedule never came up, none for the others."
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = lambda model, batch: model(batch).square().mean()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with watch(model, optimizer, loss_fn, {"training_metrics": {"every_n_steps": 1}, "hessian": {}}, tmp_path, "short") as run:
            for _ in range(3):
                with run.step(torch.ones(4, 3)):
                    optimizer.zero_grad()
                    loss_fn(model, torch.ones(4, 3)).backward()
                    optimizer.step()
    said = [str(w.message) for w in caught]
    assert said == ["hook hessian did not fire up to the end, step 3: change every_n_steps = 1000, burst_length = 11, warmup_steps = 0, from_epoch = 0"]
