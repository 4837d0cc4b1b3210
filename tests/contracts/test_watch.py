"Hooks on a loop of one's own: training bit for bit as nobody watched it, the trainer's rows, resumes, run folders, and one sentence for each loop that can't be right."
import copy, functools, random
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from lal.core.config import load_config
from lal.core.device import generator, rng_states, seeded
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
