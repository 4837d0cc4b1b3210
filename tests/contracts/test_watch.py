"Hooks on a loop of one's own: training bit for bit as nobody watched it, the trainer's rows, resumes, run folders, and one sentence for each loop that can't be right."
import copy, functools, random
from contextlib import nullcontext
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from lal.analysis.runs import load_run
from lal.core.config import load_config
from lal.core.device import deterministic, generator, rng_states, seeded, threads
from lal.core.errors import ConfigError, HookError
from lal.core.experiment import Metric, find_experiment
from lal.core.files import digest
from lal.core.state import POINTS
from lal.core.trainer import Trainer
from lal.hooks.hook import Hook, Needs, events_of
from lal.hooks.loop import LoopError
from lal.hooks.registry import REGISTRY, create_hooks
from lal.hooks.watch import watch

from test_fork import OPTIMIZERS, Tied, squared
from test_hooks import statistics

CPU, SIZE, PER_EPOCH = torch.device("cpu"), 8, 4
EXAMPLES = {"hessian": {"every_n_steps": 20, "burst_length": 11, "check_every": 3, "displacement": True}}
UNITS = ("epoch", "step")
each_unit = pytest.mark.parametrize("unit", UNITS)


def example(name):
    return REGISTRY[name].example() or EXAMPLES.get(name, {})


def fitting(unit):
    "The hooks that fire in a loop of this unit, with options for a short one."
    return {n: example(n) for n, cls in REGISTRY.items() if unit == "epoch" or {"pre_step", "post_step", "snapshot"} & {*events_of(cls)}}


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
        loop = Loop(**FEATURES[feature], unit=unit).watch({name: example(name)}, verify="always", log_every=1 if unit == "epoch" else 5)
        with loop.run: loop.go(STEPS)
    assert len(loop.run.table(name)) > 5 and not loop.run.hooks.problems
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
@pytest.mark.parametrize("event", POINTS)
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

    with torch.random.fork_rng():
        torch.set_rng_state(states)
        loss = functional_call(Loss(), {f"model.{n}": t for n, t in leaves.items()}, ())
    grads = torch.autograd.grad(loss, [*leaves.values()], create_graph=hessian)
    g = torch.cat([t.flatten() for t in grads])
    if not hessian: return g, None
    rows = torch.autograd.grad(g, [*leaves.values()], torch.eye(len(g), dtype=g.dtype), is_grads_batched=True, materialize_grads=True)
    return g.detach(), torch.cat([r.flatten(1) for r in rows], 1)


NETWORKS = {"convolutional": convolutional, "gpt2": gpt2}
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
    sdpa = {"check_every": None} if getattr(make, "keywords", {}).get("attention") == "sdpa" else {"check_every": 1}
    rows, *_, seen = trained(lambda: make(torch.float32), {"displacement": True, **sdpa})
    *_, alone = trained(lambda: make(torch.float32), {}, watching=False)
    assert seen == alone and len({*seen}) == 4
    assert len(rows) >= 2 and ("relative_fd_error" in rows) == (sdpa["check_every"] is not None)
