"The hook framework: bursts, resumes, and training that is bit for bit the same whoever watches it. Hooks that misbehave are named."
import copy, csv, json, random, re, shutil, signal, subprocess, sys, warnings
from collections import Counter, OrderedDict, defaultdict
from typing import Annotated
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
import lal.core.run, lal.hooks.runner, lal.modular.models
from lal.core.config import make_config, one_per_seed, with_values
from lal.core.errors import ConfigError, HookError, Interrupted, NonFiniteLoss
from lal.core.experiment import Metric, find_experiment
from lal.core.files import digest, load_checkpoint, save_checkpoint
from lal.core.keys import doc
from lal.core.recorder import measure
from lal.core.run import RunFolder, checkpoints
from lal.core.state import EVENTS, POST_EPOCH, POST_STEP, PRE_EPOCH, PRE_STEP, SNAPSHOT, train_step
from lal.core.trainer import Trainer
from lal.curvature.params import axpy, norm
from lal.hooks.consecutive import Consecutive
from lal.hooks.hessian import Hessian
from lal.hooks.hook import Hook, Needs, Schedule, declared_options, events_of, fires_at_steps, never_fires
from lal.hooks.norms import Norms
from lal.hooks.registry import REGISTRY as HOOKS, choose, create_hooks
from lal.hooks.rows import MetricBuffer
from lal.hooks.runner import Hooks
from lal.hooks.training_metrics import TrainingMetrics
from lal.hooks.view import Batch, GradientBuffer, HookState
from lal.modular.models import BaselineMLP

UNITS = {"epoch": dict(epochs=15), "step": dict(steps=60)}  # four batches an epoch, the last one short
BASE = dict(p=7, hidden_dim=8, n_layers=1, train_frac=0.7, batch_size=10, device="cpu", threads=1, seed=3, lr=3e-3, checkpoint_every=1000)


def example(cls):
    "The options of a tiny run with which a registered hook is tried."
    return cls.example()


BURSTS = {name: example(cls) for name, cls in HOOKS.items() if example(cls) and fires_at_steps(cls)}
ALL = dict(hooks={"full": {}, **BURSTS}, sinks=["jsonl", "csv"], log_every=5)
each_unit = pytest.mark.parametrize("unit", UNITS)


def configure(unit="epoch", **keys):
    return make_config(**{**BASE, **UNITS[unit], **keys})


@pytest.fixture(scope="module", autouse=True)
def table_of_tokens():
    "The network on one-hot inputs has none; for hooks that ask for it, a matrix with a row for each number."
    BaselineMLP.token_embedding = property(lambda model: model.output.weight)
    yield
    del BaselineMLP.token_embedding


class Around:
    "Hooks, with something of a test's own done after each point."

    def __init__(self, hooks, after):
        self.hooks, self.after = hooks, after

    def fire(self, point, state):
        if self.hooks is not None: self.hooks.fire(point, state)
        self.after(point, state)

    def __getattr__(self, name):
        if self.hooks is None: raise AttributeError(name)
        return getattr(self.hooks, name)


def stop_at(step):
    def after(point, state):
        if point == POST_STEP and state.step == step: signal.raise_signal(signal.SIGTERM)

    return after


def fit(config, root, hooks="its own", stop=None, **options):
    "Train quietly; with `stop` to a SIGTERM at that step."
    hooks = create_hooks(config) if hooks == "its own" else hooks
    trainer = Trainer(config, root, progress=False, hooks=Around(hooks, stop_at(stop)) if stop else hooks)
    if stop:
        with pytest.raises(Interrupted): trainer.fit(**options)
    else:
        trainer.fit(**options)
    return trainer


def equal_rows(one, two):
    "The tables of two runs, value for value."
    one, two = RunFolder(one), RunFolder(two)
    assert one.table_names() == two.table_names()
    for name in one.table_names():
        pd.testing.assert_frame_equal(one.table(name).read(), two.table(name).read(), check_exact=True)


def equal_checkpoints(one, two, keys=("epoch", "step", "model", "optimizer", "scheduler", "batches", "generators", "hooks")):
    "The checkpoints of two runs, bit for bit."
    names = [[f.name for f in checkpoints(run)] for run in (one, two)]
    assert names[0] == names[1] and names[0]
    for name in names[0]:
        a, b = (load_checkpoint(run / "checkpoints" / name) for run in (one, two))
        assert {k: digest(a[k]) for k in keys if k in a} == {k: digest(b[k]) for k in keys if k in b}


@pytest.fixture
def dropout(monkeypatch):
    make = lal.modular.models.create_model

    def with_dropout(config):
        model = make(config)
        model.hidden.append(nn.Dropout(0.5))
        return model

    monkeypatch.setattr(lal.modular.models, "create_model", with_dropout)


@pytest.fixture
def always_flush(monkeypatch):
    monkeypatch.setattr(lal.core.run, "FLUSH_SECONDS", -1.0)


# 1. Bursts, stops and resumes.


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "The run of each unit that nobody stopped."
    root = tmp_path_factory.mktemp("straight")
    return {unit: fit(configure(unit, name=unit, **ALL), root).folder.path for unit in UNITS}


@each_unit
def test_a_burst_of_eleven_gives_ten_rows_across_the_ends_of_epochs(unit, straight):
    rows = RunFolder(straight[unit]).table("hooks/hessian").read()
    assert rows.step.tolist() == [*range(21, 31), *range(41, 51)]
    assert rows.entanglement_coherence.isna().tolist() == ([True] + [False] * 9) * 2
    assert rows.relative_fd_error.notna().tolist() == [k % 3 == 0 for k in range(20)]
    assert rows.epoch.tolist() == [-(-s // 4) if unit == "epoch" else (10 * s) // 34 for s in rows.step]
    metrics = RunFolder(straight[unit]).table("hooks/training_metrics").read()
    assert metrics.step.tolist() == ([*range(10, 61, 10)] if unit == "epoch" else [*range(5, 61, 5)])
    at_log = metrics[metrics.test_acc.notna()].step.tolist()
    assert at_log == ([20, 40, 60] if unit == "epoch" else [*range(5, 61, 5)])


def test_pairs_of_epochs_at_every_log_point(straight):
    rows = RunFolder(straight["epoch"]).table("hooks/consecutive").read()
    assert rows.epoch.tolist() == [5, 10, 15] and rows.step.tolist() == [20, 40, 60]
    assert RunFolder(straight["epoch"]).table("hooks/norms").read().epoch.tolist() == [5, 10, 15]
    for unit in UNITS:
        names = choose("full", configure(unit))
        assert RunFolder(straight[unit]).table_names() == ["history", *sorted(f"hooks/{name}" for name in names)] and {"hessian", "training_metrics", "norms"} <= {*names}
    by_steps = {name: RunFolder(straight["step"]).table(f"hooks/{name}").read() for name in ("norms", "consecutive")}
    assert all(rows.step.tolist() == [*range(5, 61, 5)] for rows in by_steps.values())


STOPS = {"epoch": [20, 25, 28, 30, 34, 38], "step": [20, 25, 30]}  # in and at the ends of a burst and of an epoch; in epochs 9 and 10, which `consecutive` compares


@pytest.mark.parametrize("unit, at", [(unit, at) for unit in UNITS for at in STOPS[unit]])
def test_a_stopped_run_gives_the_rows_of_an_uninterrupted_one(unit, at, straight, tmp_path, always_flush):
    config = configure(unit, name=unit, **ALL)
    fit(config, tmp_path, stop=at)
    folder = RunFolder(tmp_path / unit)
    assert folder.summary["status"] == "interrupted"
    assert folder.table("hooks/hessian").read().step.tolist() == [*range(21, at + 1)][:10] if at > 20 else True
    fit(config, tmp_path, resume=True)
    equal_rows(tmp_path / unit, straight[unit])
    equal_checkpoints(tmp_path / unit, straight[unit])
    files = [file for file in straight[unit].glob("hooks/*.*") if file.suffix != ".parquet"]
    assert {file.suffix for file in files} == {".jsonl", ".csv"}
    for file in files: assert (tmp_path / unit / "hooks" / file.name).read_bytes() == file.read_bytes(), file.name


@each_unit
@pytest.mark.parametrize("warmup, begin", [(0, 7), (7, 7), (8, 14), (56, 56)])
def test_a_burst_as_long_as_its_period_or_longer_lasts_from_the_first_burst_on(unit, warmup, begin, tmp_path):
    for length in (7, 8, 1000):
        hooks = Hooks([a_hook()(lambda self, state: {"fine": state.step})(every_n_steps=7, burst_length=length, warmup_steps=warmup)])
        fit(configure(unit, name=f"{length}"), tmp_path, hooks)
        assert hooks.table("odd").step.tolist() == [*range(begin, 61)]


LATE = [  # the unit; what a hook declares and is told, what the run has, with which it never fires; and a change of either with which it does
    *[(unit, {}, dict(every_n_steps=7, warmup_steps=57), {}, dict(warmup_steps=56)) for unit in UNITS],
    *[(unit, {}, dict(every_n_steps=61), {}, dict(every_n_steps=60)) for unit in UNITS],
    ("epoch", {}, dict(from_epoch=16), {}, dict(from_epoch=15)),
    ("step", {}, dict(from_epoch=18), {}, dict(from_epoch=17)),  # pass 18 begins in step 60
    ("epoch", {}, dict(every_n_steps=9, from_epoch=8, to_epoch=8), {}, dict(every_n_steps=10)),
    ("step", {}, dict(every_n_steps=5, to_epoch=0), {}, dict(every_n_steps=4)),  # four steps begin in the first pass
    ("epoch", dict(needs=Needs.PREVIOUS_GRAD), dict(to_epoch=1), dict(batch_size=None), dict(to_epoch=2)),
    ("epoch", dict(point=POST_EPOCH), dict(from_epoch=16), {}, dict(from_epoch=15)),
    ("epoch", dict(point=POST_EPOCH), dict(every_n_epochs=16), {}, dict(every_n_epochs=15)),
    ("epoch", dict(point=PRE_EPOCH), dict(from_epoch=6, to_epoch=9), dict(log_every=5), dict(to_epoch=10)),
    ("epoch", dict(point=SNAPSHOT), {}, dict(snapshot_every=16), dict(snapshot_every=15)),
    ("epoch", dict(point=SNAPSHOT), dict(from_epoch=6, to_epoch=9), dict(snapshot_every=5), dict(to_epoch=10)),
    ("step", dict(point=SNAPSHOT), dict(to_epoch=1), dict(snapshot_every=7), dict(to_epoch=2)),  # step 7 ends in pass 2
]


@pytest.mark.parametrize("unit, declared, options, keys, change", LATE)
def test_a_hook_that_will_not_have_fired_at_the_end_is_named_in_one_warning_before_training_begins(unit, declared, options, keys, change, tmp_path):
    def fitted(name, options, keys):
        began, hooks = [], Hooks([a_hook(**declared)(lambda self, state: {"fine": 1})(**options)])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            around = Around(hooks, lambda point, state: began.append(len(said)))
            Trainer(configure(unit, name=name, **keys), tmp_path, progress=False, hooks=around).fit()
        return [str(w.message) for w in said], began[0], len(hooks.table("odd"))

    said, before, rows = fitted("late", options, keys)
    assert len(said) == before == 1 and not rows and "\n" not in said[0]
    assert said[0].startswith(f"hook odd will not have fired at the end, {unit} {15 if unit == 'epoch' else 60}: change ")
    for option, value in (options | {k: v for k, v in keys.items() if k in change}).items(): assert f"{option} = {value}" in said[0]
    enough = fitted("enough", *({k: change.get(k, v) for k, v in given.items()} for given in (options, keys)))
    assert enough[0] == [] and enough[2]


def test_a_pair_of_which_only_the_first_lies_in_the_run_is_late(tmp_path):
    for every, words in ((15, 0), (16, 1)):
        hooks = Hooks([Consecutive(every_n_epochs=every)])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fit(configure(name=f"{every}"), tmp_path, hooks)
        assert len(said) == words and len(hooks.table("consecutive")) == 1 - words


def test_log_points_of_a_run_that_counts_steps_are_firings_of_training_metrics(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hooks = Hooks([TrainingMetrics(every_n_steps=1000)])
        fit(configure("step", log_every=20), tmp_path, hooks)
    assert hooks.table("training_metrics").step.tolist() == [20, 40, 60]


@each_unit
def test_without_a_gap_between_bursts_every_row_follows_the_one_before(unit, tmp_path, always_flush):
    config = configure(unit, name="through", hooks={"hessian": {"every_n_steps": 5, "burst_length": 11}})
    rows = fit(config, tmp_path).folder.table("hooks/hessian").read()
    assert rows.step.tolist() == [*range(6, 61)]
    assert rows.entanglement_coherence.notna().tolist() == [False] + [True] * 54
    assert rows.relative_fd_error.notna().tolist() == [k % 7 == 0 for k in range(55)]
    stopped = with_values(config, name="stopped")
    fit(stopped, tmp_path, stop=10)  # where another burst begins inside the first
    fit(stopped, tmp_path, stop=23, resume=True)
    fit(stopped, tmp_path, resume=True)
    equal_rows(tmp_path / "stopped", tmp_path / "through")


@each_unit
def test_a_checkpoint_at_every_epoch_and_a_second_stop(unit, straight, tmp_path):
    config = configure(unit, name=unit, **ALL | dict(checkpoint_every=1))
    fit(config, tmp_path, stop=22)
    fit(config, tmp_path, stop=27, resume=True)
    for file in sorted((tmp_path / unit / "checkpoints").glob("*.pt"))[-2:]: file.unlink()  # lost, and an older one is used
    fit(config, tmp_path, resume=True)
    equal_rows(tmp_path / unit, straight[unit])


def test_text_files_hold_what_the_tables_hold(straight):
    for name in choose("full", configure()):
        rows = RunFolder(straight["epoch"]).table(f"hooks/{name}").read()
        lines = (straight["epoch"] / f"hooks/{name}.jsonl").read_text().splitlines()
        sparse = [{k: v for k, v in row.items() if v == v} for row in rows.to_dict("records")]
        assert [json.loads(line) for line in lines] == sparse
        with open(straight["epoch"] / f"hooks/{name}.csv", newline="") as file: table = [*csv.DictReader(file)]
        assert [{k: float(v) for k, v in row.items() if v} for row in table] == sparse


# 2. Nobody notices that they are there.


class Drawing(Hook):
    "Draws from every generator, and raises half-way."

    metrics = (Metric("drawn", "u", (0, 1), "a random number"),)

    def pre_step(self, state):
        self.draw(state)

    def post_step(self, state):
        return {"drawn": self.draw(state)}

    def post_epoch(self, state):
        self.draw(state)

    def snapshot(self, state):
        self.draw(state)

    def draw(self, state):
        torch.manual_seed(state.step)
        np.random.seed(state.step)
        random.seed(state.step)
        drawn = torch.rand(()), np.random.rand(), random.random()
        if state.step % 3 == 0: raise ValueError("half-way")
        return drawn[0]


class DrawingOne(Drawing):
    kind = "intervention"


def watched(config, root, hooks):
    "Train; the states of all generators after each step, as one number."
    seen, others = [], lambda: (np.random.get_state()[1].tobytes(), np.random.get_state()[2], hash(random.getstate()))

    def after(point, state):
        if point in (POST_STEP, POST_EPOCH): seen.append(digest([torch.get_rng_state(), others()]))

    random.seed(1)
    np.random.seed(1)
    trainer = Trainer(config, root, progress=False, hooks=Around(hooks, after))
    trainer.fit()
    return trainer, [*seen, digest(others())]


def full(kind, unit, **options):
    "Every registered hook that fires in such a run, and one of this kind."
    watchers = [cls(**{k: 2 for k in ("every_n_epochs",) if k in declared_options(cls)} | example(cls)) for cls in HOOKS.values() if not never_fires(cls, Schedule(unit, snapshot_every=10))]
    return Hooks([*watchers, kind()], on_error="skip", **options)


@pytest.mark.filterwarnings("ignore:hook drawing")
@pytest.mark.parametrize("kind", [Drawing, DrawingOne])
@pytest.mark.parametrize("length", [dict(epochs=75), dict(steps=300)], ids=["epoch", "step"])
def test_three_hundred_steps_are_bit_for_bit_those_that_nobody_watched(length, kind, dropout, tmp_path):
    keys = dict(length, log_every=20, checkpoint_every=25 if "epochs" in length else 100, snapshot_every=10, grad_clip=0.5)
    hooks = full(kind, "step" if "steps" in length else "epoch")
    alone, unseen = watched(configure(name="alone", **keys), tmp_path, None)
    seen_by, seen = watched(configure(name="seen", **keys), tmp_path, hooks)
    assert alone.state.step == 300 and len(hooks.table(hooks.hooks[-1].name)) == 200
    assert hooks.problems[hooks.hooks[-1].name, "raised"] >= 200
    equal_checkpoints(tmp_path / "alone", tmp_path / "seen", ("epoch", "step", "model", "optimizer", "scheduler", "batches", "generators"))
    assert digest(alone.state.checkpoint()) == digest(seen_by.state.checkpoint())
    pd.testing.assert_frame_equal(alone.folder.history, seen_by.folder.history, check_exact=True)
    assert seen == unseen


NOISY = {  # what draws masks or keeps running statistics in training mode
    "dropout": lambda: [nn.Dropout(0.5)],
    "batch norm": lambda: [nn.BatchNorm1d(8)],
    "both, and a frozen part in evaluation mode": lambda: [nn.BatchNorm1d(8), nn.Dropout(0.3), nn.BatchNorm1d(8).eval().requires_grad_(False)],
}
OF_TRAINING = ("epoch", "step", "model", "optimizer", "scheduler", "batches", "generators")


@pytest.fixture(params=NOISY)
def noisy(request, monkeypatch):
    patched(monkeypatch, lambda model: model.hidden.extend(NOISY[request.param]()))


def statistics(model):
    return {name: t.clone() for name, t in model.named_buffers() if "running" in name}


@each_unit
def test_how_often_a_run_measures_changes_no_bit_of_it(unit, noisy, tmp_path):
    often, seldom = (fit(configure(unit, name=f"{n}", log_every=n), tmp_path, None) for n in (1, 4))
    equal_checkpoints(tmp_path / "1", tmp_path / "4", OF_TRAINING)
    rows = often.folder.history[often.folder.history[unit] % 4 == 0].reset_index(drop=True)
    ours = seldom.folder.history[seldom.folder.history[unit] % 4 == 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(rows, ours, check_exact=True)


@each_unit
def test_measuring_is_done_in_evaluation_mode_and_moves_no_statistics(unit, noisy, tmp_path):
    state = find_experiment("modular").build(configure(unit), torch.device("cpu"))
    for _ in range(3): train_step(state, state.batches.of_epoch())
    flags, before, drawn = [m.training for m in state.model.modules()], statistics(state.model), torch.get_rng_state()
    rows = [measure(state) for _ in range(2)]
    assert rows[0] == rows[1] and torch.equal(torch.get_rng_state(), drawn)
    assert flags == [m.training for m in state.model.modules()]
    assert all(torch.equal(t, before[name]) for name, t in statistics(state.model).items())
    state.model.eval()
    assert measure(state) == rows[0]  # the numbers are those of the network as it is used


each_hook = pytest.mark.parametrize("name", HOOKS)


@each_hook
@each_unit
def test_every_hook_leaves_masks_and_running_statistics_as_they_were(name, unit, noisy, tmp_path):
    cls = HOOKS[name]
    if never_fires(cls, Schedule(unit, snapshot_every=2)): return
    every = {key: n for key, n in dict(every_n_steps=1, burst_length=3, every_n_epochs=1).items() if key in declared_options(cls)}
    alone = fit(configure(unit, name="alone", snapshot_every=2), tmp_path, None)
    seen = fit(configure(unit, name="seen", snapshot_every=2, log_every=1, hooks={name: example(cls) | every}), tmp_path)
    assert len(seen.folder.table(f"hooks/{name}").read()) > 10
    equal_checkpoints(tmp_path / "alone", tmp_path / "seen", OF_TRAINING)
    flags = [[m.training for m in trainer.state.model.modules()] for trainer in (alone, seen)]
    assert flags[0] == flags[1]


@each_hook
@each_unit
def test_every_hook_with_its_example_is_unseen_resumes_and_keeps_to_its_declaration(name, unit, dropout, tmp_path):
    cls, keys = HOOKS[name], dict(log_every=5, snapshot_every=5, grad_clip=0.5)
    if never_fires(cls, Schedule(unit, snapshot_every=5)): return
    assert cls.example() == {k: v for k, v in cls.example().items() if k in declared_options(cls)}
    made = lambda: Hooks([cls(**example(cls))], verify="always")
    alone, unseen = watched(configure(unit, name="alone", **keys), tmp_path, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # ranges, names, numbers
        trainer, seen = watched(configure(unit, name="seen", **keys), tmp_path, hooks := made())
    assert seen == unseen and len(hooks.table(name)) and not hooks.problems
    equal_checkpoints(tmp_path / "alone", tmp_path / "seen", OF_TRAINING)
    pd.testing.assert_frame_equal(alone.folder.history, trainer.folder.history, check_exact=True)
    fit(configure(unit, name="stopped", **keys), tmp_path, made(), stop=27)
    fit(configure(unit, name="stopped", **keys), tmp_path, made(), resume=True)
    equal_rows(tmp_path / "stopped", tmp_path / "seen")
    equal_checkpoints(tmp_path / "stopped", tmp_path / "seen")


# 3. One mask.


def small_state(**keys):
    return find_experiment("modular").build(configure(**keys), torch.device("cpu"))


def far(a, b):
    return float(norm(axpy(-1, b, a)) / norm(b))


class Masked(Hook):
    kind = "intervention"
    metrics = tuple(Metric(name, "x", (0, None), "a distance") for name in ("same", "double", "other", "loss"))

    def pre_step(self, state):
        self.before = state.params()

    def post_step(self, state):
        used, batch = state.unclipped(), state.batch
        other = batch._replace(rng_states={"cpu": state.generator("other").get_state()})
        at = lambda b, dtype=None: {k: g.float() for k, g in state.grad_at(self.before, b, dtype).items()}
        return {
            "same": far(at(batch), used),
            "double": far(at(batch, torch.float64), used),
            "other": far(at(other), used),
            "loss": abs(state.loss_at(self.before, batch) - state.loss),
        }


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_gradient_evaluated_afterwards_has_the_mask_of_the_step(clip, dropout):
    state, hooks = small_state(), Hooks([Masked()])
    for _ in range(9):
        train_step(state, state.batches.of_epoch(), clip, hooks.fire)
        hooks.fire(POST_STEP, state)
    rows = hooks.table("masked")
    assert rows.same.max() < 1e-6 and rows.double.max() < 1e-5 and rows.loss.max() < 1e-6
    assert rows.other.min() > 0.1


def test_with_dropout_the_automatic_step_in_double_precision_agrees_with_the_exact_product(dropout):
    rows = {}
    for scheme in ("exact", "forward", "central"):
        state = small_state()
        torch.manual_seed(0)
        hooks = Hooks([Hessian(scheme=scheme, epsilon=None, every_n_steps=1, burst_length=1, check_every=1, displacement=True)])
        for _ in range(9):
            train_step(state, state.batches.of_epoch(), None, hooks.fire)
            hooks.fire(POST_STEP, state)
        rows[scheme] = hooks.table("hessian")
    for scheme in ("forward", "central"):
        assert rows[scheme].relative_fd_error.max() < 1e-5
        for name in ("entanglement_norm", "content_norm", "entanglement_content_cossim", "rayleigh_quotient", "displacement_residual"):
            assert np.allclose(rows[scheme][name], rows["exact"][name], rtol=1e-4, atol=1e-5), name
    assert rows["exact"].displacement_residual.max() < 0.5  # with another mask it would be about 1


def test_a_batch_without_a_saved_state_is_refused_and_nothing_is_drawn(dropout):
    state, seen = small_state(), []

    class Watcher(Hook):  # an observer: no state is lent to it
        def post_step(self, state):
            before = torch.get_rng_state()
            for batch in (state.batch, state.batch.data, Batch(state.batches.data)):
                with pytest.raises(ValueError) as error: state.grad_at(state.params(), batch)
                seen.append(str(error.value))
            assert torch.equal(before, torch.get_rng_state())
            state.model.eval()
            state.grad_at(state.params(), state.batch)
            state.model.train()

    hooks = Hooks([Watcher()])
    train_step(state, state.batches.of_epoch(), None, hooks.fire)
    hooks.fire(POST_STEP, state)
    assert len(seen) == 3 and all("carries the generator's state" in said and "\n" not in said for said in seen)


# 4. Nothing is paid for that is not used.


@each_unit
def test_gradients_are_kept_only_where_a_hook_needs_them(unit, monkeypatch, tmp_path):
    calls, copy, lent = [], HookState.unclipped, []
    monkeypatch.setattr(HookState, "unclipped", lambda self: calls.append(self.step) or copy(self))
    config = configure(unit, **ALL | dict(hooks={"norms": {}, "consecutive": {}, "hessian": BURSTS["hessian"]}))
    hooks = create_hooks(config)

    def after(point, state):
        if point == PRE_STEP and hooks.view.batch.rng_states is not None: lent.append(state.step)

    Trainer(config, tmp_path, progress=False, hooks=Around(hooks, after)).fit()
    kept = {*range(19, 30), *range(39, 50), 59, 60}  # for the next step; a run may be continued after 60
    observed = {*range(21, 31), *range(41, 51)}
    ends = {4 * e - 3 for e in (4, 5, 9, 10, 14, 15)} if unit == "epoch" else {s for s in range(1, 61) if s % 5 in (4, 0)}  # one copy an epoch: further steps are added in place
    assert set(calls) == kept | observed | ends
    assert len(calls) == len(kept) + len(observed) + len(ends)
    assert lent == [*range(20, 31), *range(40, 51), 60]


def test_observers_alone_keep_no_gradient(monkeypatch, tmp_path):
    monkeypatch.setattr(HookState, "unclipped", None)
    for unit in UNITS: fit(configure(unit, hooks="training_metrics", log_every=5, name=unit), tmp_path)


@each_unit
def test_the_gradient_before_is_that_of_the_step_before_wherever_a_window_or_burst_begins(unit, tmp_path):
    seen, own = [], {}

    class Before(Hook):
        needs = Needs.PREVIOUS_GRAD

        def post_step(self, state):
            seen.append(state.step)
            assert all(torch.equal(g, own[state.step - 1][k]) for k, g in state.previous_grad.items())

    def after(point, state):
        if point == POST_STEP: own[state.step] = {k: p.grad.clone() for k, p in state.model.named_parameters()}

    for options in (dict(from_epoch=3, to_epoch=4), dict(every_n_steps=7, burst_length=2, warmup_steps=10)):
        seen.clear()
        Trainer(configure(unit, name=f"{len(options)}"), tmp_path, progress=False, hooks=Around(Hooks([Before(**options)]), after)).fit()
        window = [*range(9, 17)] if unit == "epoch" else [*range(12, 18)]
        assert seen == (window if "from_epoch" in options else [s for s in range(14, 61) if s % 7 < 2])


# 5. What is wrong is said before anything is written.

WRONG = [  # keys of the configuration, and words the error must say
    (dict(hooks="hesian"), "no hook or set is called 'hesian'; did you mean 'hessian'?"),
    (dict(hooks=["norms", "what"]), "no hook or set is called 'what'"),
    (dict(hooks="none,norms"), "'none' stands alone"),
    (dict(hooks={"hessian": {"epsilom": 1}}), "hooks.hessian.epsilom = 1: unknown option; did you mean 'epsilon'?"),
    (dict(hooks={"hessian": {"epsilon": "small"}}), "hooks.hessian.epsilon = small: must be a number or null"),
    (dict(hooks={"hessian": {"epsilon": -1}}), "hooks.hessian.epsilon = -1"),
    (dict(hooks={"hessian": {"scheme": "backward"}}), "must be one of forward, central, exact"),
    (dict(hooks={"hessian": {"every_n_steps": 0}}), "hooks.hessian.every_n_steps = 0"),
    (dict(hooks={"hessian": {"every_n_steps": 2.5}}), "must be a whole number"),
    (dict(hooks={"hessian": {"burst_length": 0}}), "hooks.hessian.burst_length = 0"),
    (dict(hooks={"hessian": {"every_n_epochs": 5}}), "unknown option"),
    (dict(hooks={"norms": {"every_n_steps": 5}}), "unknown option"),
    (dict(hooks={"minimal": {}, "norms": {"every_n_steps": 5}}, steps=50), "unknown option"),
    (dict(hooks={"hessian": 3}), "hooks.hessian = 3: must be a mapping from options to values"),
    (dict(hooks={"norm": {}}), "no hook or set is called 'norm'; did you mean 'norms'?"),
    (dict(hooks={"norms": [3]}), "hooks.norms = [3]: must be a mapping"),
    (dict(hooks="norms", sinks=["json"]), "no sink is called 'json'; did you mean 'jsonl'?"),
    (dict(hooks="none", sinks=["json"]), "no sink is called 'json'"),
    (dict(hooks="norms", sinks=[["csv"]]), "sinks"),
    (dict(hooks=[3]), "hooks"),
    (dict(hooks="norms", on_error="ignore"), "must be one of stop, skip"),
]


@pytest.mark.parametrize("keys, words", WRONG, ids=str)
def test_a_wrong_configuration_is_one_clear_line(keys, words):
    with pytest.raises(ConfigError) as error: create_hooks(configure(**keys))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_without_hooks_nobody_watches_and_options_of_a_set_reach_its_hooks(tmp_path):
    for none in ({}, "none", None): assert create_hooks(configure(hooks=none)) is None
    by_set = create_hooks(configure(hooks={"minimal": {}, "norms": {"every_n_epochs": 2}}))
    assert [hook.name for hook in by_set.hooks] == ["training_metrics", "norms"] and by_set.hooks[1].every_n_epochs == 2
    assert by_set.hooks[0]._of_set and not by_set.hooks[1]._of_set


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "Runs beside which others are: one finished, one stopped, one of another width."
    root = tmp_path_factory.mktemp("finished")
    fit(configure(name="done", epochs=3), root)
    fit(configure(name="wide", epochs=1, hidden_dim=9, n_layers=2), root)
    fit(configure(name="stopped"), root, hooks=create_hooks(configure(hooks="minimal")), stop=5)
    (root / "folder").mkdir()
    return root


REFERENCES = [
    ("nobody", ["neither a run nor a checkpoint"]),
    ("folder", ["neither a run nor a checkpoint"]),
    ("done/config.yaml", ["not a readable checkpoint"]),
    ("stopped", ["is interrupted: a finished run is needed"]),
    ("wide", ["hidden.0.weight is [8, 14] in the model and [9, 14] in the reference", "output.weight is [7, 8]", "only the reference has hidden.1.weight, hidden.1.bias"]),
    ({}, ["only the model has hidden.0.weight"]),
    ({"w": 1.0}, ["not a tensor"]),
]


@pytest.mark.parametrize("which, words", REFERENCES, ids=[str(which) for which, _ in REFERENCES])
def test_a_wrong_reference_is_one_clear_line_and_nothing_is_written(which, words, finished):
    before = sorted(finished.rglob("*"))
    given = {"reference": which} if isinstance(which, str) else {}
    config = configure(name="new", hooks=BURSTS, **given)
    with pytest.raises(ConfigError) as error: fit(config, finished, hooks=create_hooks(config, None if given else which))
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value)
    assert [f for f in sorted(finished.rglob("*")) if f.suffix != ".lock"] == [f for f in before if f.suffix != ".lock"]


@pytest.mark.parametrize("which", ["done", "path", "done/checkpoints/3.pt", "done/checkpoints/best.pt", "dict"])
def test_a_reference_by_name_path_or_dict_gives_solution_columns(which, finished, tmp_path):
    saved = load_checkpoint(finished / "done/checkpoints/3.pt")["model"]
    given = {"path": str(finished / "done"), "dict": None}.get(which, which)
    config = configure(name=f"to_{which.replace('/', '_')}", **ALL | dict(reference=given))
    trainer = fit(config, finished, hooks=create_hooks(config, saved if which == "dict" else None))
    rows = trainer.folder.table("hooks/hessian").read()
    assert rows.content_cossim_to_solution.notna().all() and rows.entanglement_cossim_to_solution.between(-1, 1).all()


def test_a_reference_is_a_copy():
    state = small_state()
    live = dict(state.model.named_parameters())
    hooks = Hooks([Hessian()], reference=live)
    hooks.check(None, state)
    before = {k: t.clone() for k, t in live.items()}
    for _ in range(4): train_step(state, state.batches.of_epoch())
    assert not any(torch.equal(live[k], before[k]) for k in before)
    assert hooks.view.reference.keys() == before.keys() and all(torch.equal(hooks.view.reference[k], before[k]) for k in before)


@pytest.mark.parametrize("needed", [False, True])
def test_a_reference_is_loaded_and_hashed_once_and_only_for_a_hook_that_needs_it(needed, finished, monkeypatch):
    loads, digests = [], []
    for name, seen in (("load_reference", loads), ("digest", digests)):
        work = getattr(lal.hooks.runner, name)
        monkeypatch.setattr(lal.hooks.runner, name, lambda *given, work=work, seen=seen: seen.append(given) or work(*given))
    for resume in (False, True):
        hooks = Hooks([Hessian(**BURSTS["hessian"]) if needed else Norms()], reference="done" if needed else "nowhere")
        fit(configure(name=f"needs_{needed}", checkpoint_every=1), finished, hooks, None if resume else 25, resume=resume)
        assert len(loads) == len(digests) == needed * (1 + resume)
        assert (hooks.view.reference is not None) == needed


def test_a_trainer_with_hooks_in_its_configuration_wants_them():
    with pytest.raises(ConfigError, match="create_hooks"): Trainer(configure(hooks="minimal"))


# 6. Hooks that misbehave.

FINE = Metric("fine", "x", (None, None), "a number")


def a_hook(kind="observer", point=POST_STEP, name="odd", metrics=(FINE,), **more):
    "A hook that does `work(self, state)` at one point."

    def make(work):
        body = {"name": name, "kind": kind, "metrics": metrics, point: work, "__doc__": "What?", **more}
        return type("Odd", (Hook,), body)

    return make


def reported(work, tmp_path, on_error="stop", metrics=(FINE,), unit="epoch", **more):
    "Rows, warnings and problems of a whole run with one such hook."
    hooks = Hooks([a_hook(metrics=metrics, **more)(work)()], on_error)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        folder = fit(configure(unit), tmp_path, hooks).folder
    assert folder.summary["status"] == "finished"
    return folder.table("hooks/odd").read(), [str(w.message) for w in said], hooks.problems


VALUES = [
    (torch.zeros(2), "is [2] torch.float32, not a real scalar"),
    (torch.zeros(0), "not a real scalar"),
    (torch.tensor(1j), "not a real scalar"),
    (1j, "is a complex, not a number"),
    ("three", "is a str, not a number"),
    ([1.0], "is a list, not a number"),
    (float("nan"), "is nan, and is left out"),
    (float("-inf"), "is -inf, and is left out"),
    (torch.tensor(float("nan")), "is nan, and is left out"),
    (np.float32("inf"), "is inf, and is left out"),
    (10**400, "is too large for a number"),
]


@pytest.mark.parametrize("value, words", VALUES, ids=lambda v: str(v)[:40])
def test_a_value_that_is_no_finite_number_is_reported_and_the_rest_is_kept(value, words, tmp_path):
    both = (FINE, Metric("bad", "x", (None, None), "a number"))
    rows, said, problems = reported(lambda self, state: {"fine": state.step, "bad": value if state.step > 3 else 0.5}, tmp_path, metrics=both)
    assert rows.fine.tolist() == [*range(1, 61)] and rows.bad.dropna().tolist() == [0.5] * 3
    assert len(said) == 1 and "hook odd, step 4" in said[0] and "bad " in said[0] and words in said[0] and "\n" not in said[0]
    assert [*problems.values()] == [57]


def test_an_undeclared_name_is_reported_and_the_rest_is_kept(tmp_path):
    rows, said, _ = reported(lambda self, state: {"fine": 1, "other": 2}, tmp_path)
    assert rows.columns.tolist() == ["epoch", "step", "fine"] and len(rows) == 60
    assert len(said) == 1 and "hook odd, step 1 (post_step): other is not declared; odd has fine" in said[0]


@pytest.mark.parametrize("result", [[1.0], 3.0, "x", torch.zeros(3)], ids=str)
def test_a_result_that_is_no_dict_is_reported(result, tmp_path):
    rows, said, _ = reported(lambda self, state: result, tmp_path)
    assert not len(rows) and len(said) == 1 and "hook odd, step 1" in said[0] and "not a dict" in said[0]


@each_unit
def test_numbers_of_every_kind_are_kept_as_they_are(unit, tmp_path):
    kinds = [1, True, 2.5, np.float64(2.5), np.int64(7), np.bool_(True), torch.tensor(3), torch.tensor(True), torch.tensor([2.5]), torch.tensor(1 / 3, dtype=torch.float64), torch.tensor(1 / 3), torch.tensor(0.5, requires_grad=True) * 1]
    rows, said, _ = reported(lambda self, state: {"fine": kinds[state.step % len(kinds)]}, tmp_path, unit=unit)
    assert rows.fine.tolist() == [float(torch.as_tensor(kinds[s % len(kinds)]).detach()) for s in range(1, 61)] and not said


def test_a_number_is_that_of_its_step_though_the_hook_goes_on_counting_in_it(tmp_path):
    def work(self, state):
        if not hasattr(self, "sum"): self.sum = torch.zeros(())
        return {"fine": self.sum.add_(1)}

    assert reported(work, tmp_path)[0].fine.tolist() == [*range(1, 61)]


@pytest.mark.parametrize("kind", ["observer", "intervention", "debug"])
@each_unit
def test_a_hook_that_raises_stops_the_run_or_is_skipped(unit, kind, tmp_path):
    def work(self, state):
        if state.step == 7: raise KeyError("first line\nsecond line")
        return {"fine": 1}

    with pytest.raises(HookError) as error: fit(configure(unit), tmp_path, Hooks([a_hook(kind)(work)()]))
    assert "hook odd, step 7 (post_step): KeyError" in str(error.value) and "on_error = skip" in str(error.value) and "\n" not in str(error.value)
    folder = RunFolder(tmp_path / "run")
    assert folder.summary["status"] == "failed" and "hook odd, step 7" in folder.summary["error"]
    assert folder.table("hooks/odd").read().step.tolist() == [*range(1, 7)]
    rows, said, _ = reported(work, tmp_path / "skip", "skip", kind=kind, unit=unit)
    assert rows.step.tolist() == [s for s in range(1, 61) if s != 7] and len(said) == 1 and "hook odd, step 7" in said[0]


@pytest.mark.parametrize("value", [{1, 2}, [{"a": {1}}], object(), np.zeros(2), lambda: 0], ids=["set", "nested", "object", "array", "function"])
def test_what_has_no_place_in_a_checkpoint_is_named_at_the_first_call(value, tmp_path):
    def work(self, state): self.kept = value

    with pytest.raises(HookError) as error: fit(configure(checkpoint_every=2), tmp_path, Hooks([a_hook()(work)()]))
    assert "step 1 (post_step)" in str(error.value) and "hook odd: ['kept']" in str(error.value) and "no place in a checkpoint" in str(error.value) and "\n" not in str(error.value)
    assert RunFolder(tmp_path / "run").summary["status"] == "failed"


@pytest.mark.parametrize("late", [False, True])
def test_what_cannot_be_kept_costs_no_checkpoint_under_skip(late, tmp_path):
    def work(self, state):
        self.count = getattr(self, "count", 0) + 1
        if not late or self.count > 3: self.kept = {1, 2}
        return {"fine": self.count}

    hooks = Hooks([a_hook()(work)()], "skip")
    with pytest.warns(UserWarning) as said: trainer = fit(configure(checkpoint_every=2), tmp_path, hooks)
    assert any("['kept']" in str(w.message) or "kept is a set" in str(w.message) for w in said) and trainer.folder.summary["status"] == "finished"
    newest = checkpoints(tmp_path / "run")[-1]
    assert load_checkpoint(newest)["hooks"]["hooks"]["odd"] == {"count": 60}


def remembering(kind):
    "A hook that counts steps in a container of this kind."

    def work(self, state):
        if not hasattr(self, "kept"): self.kept = kind()
        self.kept[state.step % 5] = self.kept[state.step % 5] + 1 if state.step % 5 in self.kept or hasattr(self.kept, "default_factory") or isinstance(self.kept, Counter) else 1
        return {"fine": self.kept[state.step % 5]}

    return Hooks([a_hook()(work)()])


def test_a_container_comes_back_as_it_was(tmp_path):
    "A run that is stopped and resumed gives the rows of one that ran through."
    fit(configure(name="straight"), tmp_path, remembering(dict))
    fit(configure(name="stopped"), tmp_path, remembering(dict), stop=22)
    stopped = load_checkpoint(tmp_path / "stopped/checkpoints/interrupted.pt")["hooks"]["hooks"]["odd"]["kept"]
    assert stopped == {0: 4, 1: 5, 2: 5, 3: 4, 4: 4}
    resumed = remembering(dict)
    fit(configure(name="stopped"), tmp_path, resumed, resume=True)
    assert type(resumed.hooks[0].kept) is dict
    equal_rows(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("kind", [Counter, OrderedDict, lambda: defaultdict(int)], ids=["Counter", "OrderedDict", "defaultdict"])
def test_a_container_that_would_come_back_as_another_is_refused_by_name(kind, tmp_path):
    with pytest.raises(HookError) as error: fit(configure(), tmp_path, remembering(kind))
    assert f"hook odd: ['kept'] is a {type(kind()).__name__}" in str(error.value) and "\n" not in str(error.value)


def test_hooks_of_one_name_or_without_a_point_are_refused():
    with pytest.raises(ConfigError, match="two hooks are called norms"): Hooks([Norms(), Norms()])
    with pytest.raises(ConfigError, match="never fire"): Hooks([type("Idle", (Hook,), {})()])


def going_on(run, root, watchers, **keys):
    "Resume a copy of a run with these hooks, or those of these keys; what was warned of, and the folder."
    shutil.copytree(run, root / run.name)
    config = configure(name=run.name, **keys)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        folder = fit(config, root, watchers, resume=True).folder
    return [str(w.message) for w in said], folder


OTHERS = [  # with which hooks a run of Norms and Hessian goes on, and what is said
    ("norms", "the run goes on with other hooks: hessian no longer watches"),
    ("norms hessian consecutive", "the run goes on with other hooks: consecutive watches from here on"),
    ("training_metrics hessian", "the run goes on with other hooks: training_metrics watches from here on, norms no longer watches"),
    ("", "the run goes on without the hooks it had"),
    ("hessian norms", None),
]


@pytest.mark.parametrize("names, words", OTHERS)
def test_a_run_goes_on_with_a_hook_more_or_less_and_one_line_says_so(names, words, tmp_path):
    every = lambda name: {"every_n_epochs": 1} if name in ("norms", "consecutive") else example(HOOKS[name])
    made = lambda names: Hooks([HOOKS[name](**every(name)) for name in names.split()]) if names else None
    fit(configure(name="through"), tmp_path, made("norms hessian consecutive training_metrics"))
    fit(configure(), tmp_path, made("norms hessian"), stop=27)  # in epoch 7, and in a burst
    said, folder = going_on(tmp_path / "run", tmp_path / "on", made(names))
    assert said == [words] * bool(words)
    through = RunFolder(tmp_path / "through")
    for name in {*names.split(), "norms", "hessian"}:
        rows, whole = folder.table(f"hooks/{name}").read(), through.table(f"hooks/{name}").read()
        if name not in names.split(): whole = whole[whole.step <= 27]
        if name not in ("norms", "hessian"): whole = whole[whole.step > (28 if name == "consecutive" else 27)]  # it compares epoch 8 with epoch 7, whose mean was kept for norms
        pd.testing.assert_frame_equal(rows, whole.reset_index(drop=True)[[*rows]], check_exact=True)
    pd.testing.assert_frame_equal(folder.history, through.history, check_exact=True)


def test_a_hook_that_comes_back_has_its_old_rows_and_remembers_nothing(tmp_path):
    made = lambda *names: Hooks([HOOKS[name](**({"every_n_epochs": 1} if name != "hessian" else example(Hessian))) for name in names])
    fit(configure(), tmp_path, made("norms", "hessian"), stop=25)
    with pytest.warns(UserWarning, match="hessian no longer watches"): fit(configure(), tmp_path, made("norms"), stop=35, resume=True)
    with pytest.warns(UserWarning, match="hessian watches from here on"): fit(configure(), tmp_path, made("norms", "hessian"), resume=True)
    assert RunFolder(tmp_path / "run").table("hooks/hessian").read().step.tolist() == [*range(21, 26), *range(41, 51)]
    assert RunFolder(tmp_path / "run").table("hooks/norms").read().epoch.tolist() == [*range(1, 16)]


def test_a_run_without_hooks_goes_on_with_some_and_one_line_says_so(tmp_path):
    fit(configure(), tmp_path, None, stop=27)
    said, folder = going_on(tmp_path / "run", tmp_path / "on", Hooks([Norms(every_n_epochs=1)]))
    assert said == ["the run goes on with hooks; it had none"]
    assert folder.table("hooks/norms").read().epoch.tolist() == [*range(8, 16)]


def test_through_the_configuration_hooks_come_and_go_and_one_that_stays_keeps_its_options(tmp_path):
    began = {"norms": {"every_n_epochs": 1}, "hessian": BURSTS["hessian"]}
    fit(configure(hooks=began), tmp_path, stop=27)
    wanted = {"norms": {"every_n_epochs": 1}, "consecutive": {}}
    said, folder = going_on(tmp_path / "run", tmp_path / "on", "its own", hooks=wanted)
    assert said == ["the run goes on with other hooks: consecutive watches from here on, hessian no longer watches"]
    assert folder.config.hooks == wanted and folder.table("hooks/norms").read().epoch.tolist() == [*range(1, 16)]
    for other in ({"norms": {"every_n_epochs": 2}}, {"norms": {}}, {**began, "hessian": {"burst_length": 3}}):
        with pytest.raises(ConfigError) as error: fit(configure(hooks=other), tmp_path, resume=True)
        assert "goes on as it began" in str(error.value) and "hooks." in str(error.value) and "\n" not in str(error.value)
    assert RunFolder(tmp_path / "run").config.hooks == began


def test_what_an_earlier_version_kept_of_an_epoch_is_dropped(tmp_path):
    fit(configure(), tmp_path, Hooks([Norms(every_n_epochs=1)]), stop=27)
    file = tmp_path / "run/checkpoints/interrupted.pt"
    saved = load_checkpoint(file)
    del saved["hooks"]["kept"]["wanted"]
    save_checkpoint(file, saved)
    rows = fit(configure(), tmp_path, Hooks([Norms(every_n_epochs=1)]), resume=True).folder.table("hooks/norms").read()
    assert rows.epoch.tolist() == [e for e in range(1, 16) if e != 7]


# 6b. Declarations that can't be right, and those that look odd and are.


def declared(*points, **body):
    "A class of hooks that does nothing at these points."
    return type("Odd", (Hook,), {**{point: lambda self, state: None for point in points}, **body})


COS = Metric("cos", "c", (-1, 1), "a cosine")
FAULTS = {  # a class, and words that the error must say
    "a name that is no table's": (lambda: declared(POST_STEP, name="a/b"), ["hook a/b", "its name is that of a table"]),
    "a name with capitals": (lambda: declared(POST_STEP, name="LR"), ["hook LR", "small letters"]),
    "a method that is nearly an event's": (lambda: declared(POST_EPOCH, post_epochs=lambda self, state: None), ["no event is called post_epochs; did you mean post_epoch?"]),
    "another one": (lambda: declared(POST_EPOCH, PreStep=lambda self, state: None), ["no event is called PreStep; did you mean pre_step?"]),
    "two metrics of one name": (lambda: declared(POST_STEP, metrics=[COS, FINE, COS]), ["two metrics are called cos"]),
    "a metric that is a string": (lambda: declared(POST_STEP, metrics=["cos"]), ["metrics holds a str, not a Metric"]),
    "a misspelt condition": (lambda: declared(POST_STEP, metrics=[Metric("cos", "c", (-1, 1), "to the end", "referense")]), ["metric cos: only_with = 'referense'", "did you mean 'reference'?"]),
    "the mean of an epoch before it": (lambda: declared(PRE_EPOCH, needs=Needs.EPOCH_GRAD), ["EPOCH_GRAD is there at post_epoch and snapshot, not at pre_epoch"]),
    "the mean of an epoch in its steps": (lambda: declared(POST_STEP, POST_EPOCH, needs=Needs.EPOCH_GRAD | Needs.REFERENCE), ["EPOCH_GRAD is there at post_epoch and snapshot, not at post_step"]),
    "the gradient of the step before at an epoch": (lambda: declared(PRE_STEP, POST_EPOCH, needs=Needs.PREVIOUS_GRAD), ["PREVIOUS_GRAD is there at pre_step and post_step, not at post_epoch"]),
    "no event": (lambda: declared(), ["never fire"]),
    "events that are switched off": (lambda: type("Off", (declared(POST_STEP),), {"post_step": None}), ["hook off", "never fire"]),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_declaration_that_cannot_be_right_is_refused_when_the_hook_is_made(what):
    make, words = FAULTS[what]
    with pytest.raises(ConfigError) as error: make()()
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value)


def test_a_window_that_ends_before_it_begins_is_refused():
    with pytest.raises(ConfigError) as error: Norms(from_epoch=5, to_epoch=3)
    assert "hooks.norms.to_epoch = 3: must not be smaller than from_epoch = 5" in str(error.value)
    assert Norms(from_epoch=5, to_epoch=5).to_epoch == 5


def test_names_lists_and_properties_of_a_class_are_taken_as_they_are(tmp_path):
    evaluated = []

    class LRFinder(Hook):
        metrics = [FINE]
        kept = []
        layers: Annotated[list[int], doc("which layers")] = [0]

        @property
        def post_hoc(self): evaluated.append(1)

        @property
        def risky(self): raise RuntimeError("evaluated")

        def post_step(self, state):
            self.kept.append(state.step)
            return {"fine": len(self.kept)}

    one, two = LRFinder(layers=[1, 2]), LRFinder()
    assert LRFinder.name == "lr_finder" and LRFinder.metrics == (FINE,) and (one.layers, two.layers) == ([1, 2], [0])
    hooks = Hooks([one])
    fit(configure(), tmp_path, hooks)
    assert hooks.table("lr_finder").fine.tolist() == [*range(1, 61)] and not evaluated and LRFinder.kept == two.kept == []


def test_a_method_that_a_subclass_switches_off_is_no_event(tmp_path):
    class Both(Hook):
        metrics = (FINE,)

        def pre_step(self, state): raise AssertionError

        def post_step(self, state): return {"fine": 1}

    class One(Both):
        pre_step = None

    hooks = Hooks([One()])
    fit(configure(), tmp_path, hooks)
    assert events_of(One) == (POST_STEP,) and len(hooks.table("one")) == 60


def test_the_mean_of_an_epoch_is_there_at_snapshots(tmp_path):
    class Compared(Hook):
        needs = Needs.EPOCH_GRAD
        metrics = (FINE, Metric("later", "x", (None, None), "at a snapshot"))

        def post_epoch(self, state): return {"fine": norm(state.epoch_grad)}

        def snapshot(self, state): return {"later": norm(state.epoch_grad)}

    hooks = Hooks([Compared(every_n_epochs=2), type("Alone", (Compared,), {"post_epoch": None})()])
    fit(configure(snapshot_every=3), tmp_path, hooks)
    rows, alone = hooks.table("compared"), hooks.table("alone")
    assert rows.epoch.tolist() == [2, 3, 4, 6, 8, 9, 10, 12, 14, 15] and alone.epoch.tolist() == [3, 6, 9, 12, 15]
    both = rows[rows.epoch.isin((6, 12))]
    assert both.fine.tolist() == both.later.tolist() and alone.later.tolist() == rows.later.dropna().tolist()
    fit(configure("step", snapshot_every=7, log_every=5, name="s"), tmp_path, hooks := Hooks([Compared(), type("Alone", (Compared,), {"post_epoch": None})()]))
    rows, alone = hooks.table("compared"), hooks.table("alone")
    assert rows.step.tolist() == sorted({*range(5, 61, 5), *range(7, 61, 7)}) and alone.step.tolist() == [*range(7, 61, 7)]
    assert rows.later.dropna().tolist() == alone.later.tolist() and rows.fine[rows.step == 35].tolist() == alone.later[alone.step == 35].tolist()


@each_unit
def test_without_a_gradient_of_the_step_before_a_hook_is_not_called(unit, tmp_path):
    class Before(Hook):
        needs = Needs.PREVIOUS_GRAD
        metrics = (FINE,)

        def pre_step(self, state): return {"fine": norm(state.previous_grad)}

        def post_step(self, state): assert state.previous_grad is not None

    hooks = Hooks([Before()])
    fit(configure(unit), tmp_path, hooks)
    assert hooks.table("before").step.tolist() == [*range(2, 61)]


@each_unit
def test_a_hook_of_the_beginning_of_epochs_in_a_run_of_steps_without_snapshots_is_refused(unit, tmp_path):
    hooks = Hooks([declared(PRE_EPOCH, POST_EPOCH, SNAPSHOT)()])
    if unit == "step":
        with pytest.raises(ConfigError, match="fires at the beginning of an epoch"): fit(configure(unit), tmp_path, hooks)
        fit(configure(unit, snapshot_every=5), tmp_path, hooks)
    else:
        fit(configure(unit), tmp_path, hooks)


class AtEnds(Hook):
    "Where it fired, and with which gradient."

    needs = Needs.EPOCH_GRAD
    metrics = (Metric("count", "n", (0, None), "epochs or steps"), Metric("length", r"\|g\|", (0, None), "of the gradient"))

    def post_epoch(self, state): return {"count": state.count, "length": norm(state.epoch_grad)}


def test_in_a_run_of_steps_a_hook_of_epochs_fires_at_log_points_with_the_gradient_of_the_step(tmp_path):
    lengths, hooks = {}, Hooks([AtEnds(from_epoch=3, to_epoch=12)])

    def after(point, state):
        if point == POST_STEP: lengths[state.step] = norm({k: p.grad / state.clip_factor for k, p in state.model.named_parameters()}).item()

    Trainer(configure("step", log_every=7, grad_clip=0.1), tmp_path, progress=False, hooks=Around(hooks, after)).fit()
    rows = hooks.table("at_ends")
    assert rows["count"].tolist() == rows.step.tolist() == [s for s in range(7, 60, 7) if 3 <= (10 * s) // 34 <= 12]
    assert np.allclose(rows.length, [lengths[s] for s in rows.step], rtol=1e-6)
    fit(configure("step", name="each"), tmp_path, each := Hooks([AtEnds(every_n_epochs=4)]))
    assert each.table("at_ends").step.tolist() == [*range(4, 61, 4)]


@pytest.mark.parametrize("unit, log_every, wanted", [("epoch", 1, [7, 14, 15]), ("epoch", 2, [8, 15]), ("epoch", 8, [8, 15]), ("step", 5, [25, 50, 60]), ("step", 30, [30, 60])])
def test_a_hook_keeps_the_log_points_apart_unless_it_is_told_when_to_fire(unit, log_every, wanted, tmp_path):
    cls = type("Apart", (AtEnds,), {"apart": 25})  # steps, four of which are an epoch
    fit(configure(unit, log_every=log_every), tmp_path, hooks := Hooks([cls(), type("Often", (cls,), {})(every_n_epochs=2)]))
    assert hooks.table("apart")["count"].tolist() == wanted
    assert hooks.table("often")["count"].tolist() == [*range(2, 16 if unit == "epoch" else 61, 2)]


def beginning(work):
    "A hook that does that before the run."
    return type("Beginning", (AtEnds,), {"begin": lambda self, state: work(self, state)})


def unfit(self, state): raise ConfigError("the model has no ears: leave it out")


def test_a_hook_that_cannot_work_on_the_model_is_refused_by_name_and_left_out_of_a_set(monkeypatch, tmp_path):
    cls = beginning(unfit)
    with pytest.raises(ConfigError) as error: fit(configure(), tmp_path, Hooks([cls()]))
    assert str(error.value) == "hook beginning: the model has no ears: leave it out" and not [*tmp_path.glob("[!.]*")]
    monkeypatch.setitem(HOOKS, "beginning", cls)
    config = configure(hooks={"observers": {}, **{n: options for n, options in BURSTS.items() if HOOKS[n].kind == "observer"}}, log_every=5)
    with pytest.warns(UserWarning, match="hook beginning is left out: the model has no ears") as said: trainer = fit(config, tmp_path)
    assert len(said) == 1 and "hooks/beginning" not in trainer.folder.table_names() and "hooks/norms" in trainer.folder.table_names()
    with pytest.raises(ConfigError, match="no ears"): create_hooks(configure(hooks={"observers": {}, "beginning": {}})).check(None, small_state())


def test_what_a_hook_does_before_the_run_may_not_touch_training_and_an_error_there_is_one_line():
    def touching(self, state):
        with torch.no_grad(): next(state.model.parameters()).add_(1)

    for work, words in ((touching, "hook beginning (begin): changed weights"), (lambda self, state: 1 / 0, "hook beginning (begin): ZeroDivisionError: division by zero")):
        with pytest.raises(HookError, match=re.escape(words)): Hooks([beginning(work)()]).check(None, small_state())


@each_unit
def test_a_hook_begins_before_the_first_step_or_where_it_comes_in(unit, tmp_path):
    def keep(self, state): self.begun = {"step": state.step, "weights": norm(state.params())}

    config = configure(unit, name="late", log_every=5)
    fit(config, tmp_path, Hooks([Norms()]), stop=27)
    both = [Norms(), beginning(keep)()]
    with pytest.warns(UserWarning, match="beginning watches from here on"): trainer = fit(config, tmp_path, Hooks(both), resume=True)
    saved = load_checkpoint(checkpoints(trainer.folder.path)[-1])["hooks"]["hooks"]["beginning"]["begun"]
    assert saved["step"] == 27
    hooks = Hooks([beginning(keep)()])
    fit(config := with_values(config, name="early"), tmp_path, hooks, stop=27)
    trainer = fit(config, tmp_path, Hooks([beginning(keep)()]), resume=True)
    assert load_checkpoint(checkpoints(trainer.folder.path)[-1])["hooks"]["hooks"]["beginning"]["begun"]["step"] == 0


def test_sizes_are_there_before_a_run():
    assert Hooks([Norms(), Hessian()]).sizes() == {"norms": 0, "hessian": 0, "kept for hooks": 0}


@pytest.mark.parametrize("bounds, value, end", [((0, 1), 1.5, "[0, 1]"), ((-1, 1), -1.01, "[−1, 1]"), ((0, None), -3, "[0, ∞)")])
def test_a_value_outside_its_range_is_reported_once_and_kept(bounds, value, end, tmp_path):
    metrics = (Metric("fine", "x", bounds, "a number"),)
    rows, said, problems = reported(lambda self, state: {"fine": value if state.step > 3 else 0.5}, tmp_path, metrics=metrics)
    assert rows.fine.tolist() == [0.5] * 3 + [value] * 57 and problems == {("odd", "fine out of range"): 57}
    assert len(said) == 1 and f"hook odd, step 4: fine is {value:g}, outside {end}" in said[0] and "\n" not in said[0]
    edge = torch.tensor(1.0, dtype=torch.float32) + 2.0**-23
    assert reported(lambda self, state: {"fine": edge}, tmp_path / "edge", metrics=(Metric("fine", "x", (0, 1), "a number"),))[1] == []


# 7. Who changes training is stopped.


def in_place(work):
    def change(self, state):
        with torch.no_grad(): work(state)
        return {"fine": 1}

    return change


def first(state):
    return next(state.model.parameters())


def backward(state):
    with torch.enable_grad(): state.train_state.loss_fn(state.model, state.batches.data).backward()


def new_gradient(state):
    first(state).grad = first(state).grad.clone()


def rate(state):
    state.optimizer.param_groups[0]["lr"] *= 2


def moments(state):
    for kept in state.optimizer.state.values(): kept["exp_avg"].mul_(0.5)


def moments_replaced(state):
    for kept in state.optimizer.state.values(): kept["exp_avg"] = kept["exp_avg"] * 0.5


CHANGES = {  # what a hook does: what the message names, which look notices
    "weights": (lambda s: first(s).add_(1e-6), "weights", "quick"),
    "weights by load_state_dict": (lambda s: s.model.load_state_dict(s.model.state_dict()), "weights", "quick"),
    "weights by .data": (lambda s: first(s).data.add_(1e-6), "weights", "long"),
    "weights by .data =": (lambda s: setattr(first(s), "data", first(s).data + 1), "weights", "long"),
    "the optimizer's step": (lambda s: s.optimizer.step(), "the optimizer's state", "quick"),  # fused: the version of the weights stays
    "gradients": (lambda s: first(s).grad.mul_(2), "gradients", "quick"),
    "gradients by .data": (lambda s: first(s).grad.data.mul_(2), "gradients", "long"),
    "gradients by backward": (backward, "gradients", "quick"),
    "gradients replaced": (new_gradient, "gradients", "quick"),
    "gradients set to none": (lambda s: s.optimizer.zero_grad(), "gradients", "quick"),
    "gradients through grads()": (lambda s: next(iter(s.grads().values()) if s.stepped else (p.grad for p in s.model.parameters())).zero_(), "gradients", "quick"),
    "rate": (rate, "the optimizer's settings", "quick"),
    "moments": (moments, "the optimizer's state", "quick"),
    "moments replaced": (moments_replaced, "the optimizer's state", "quick"),
    "buffers": (lambda s: s.model.counted.add_(1), "buffers", "quick"),
    "mode": (lambda s: s.model.eval(), "the model's mode", "quick"),
    "schedule": (lambda s: s.scheduler.step(), "the schedule", "quick"),
    "next batch": (lambda s: s.batches.of_epoch(), "the order of the data", "quick"),
    "moments by .data": (lambda s: [kept["exp_avg"].data.mul_(0.5) for kept in s.optimizer.state.values()], "the optimizer's state", "long"),
    "buffers by .data": (lambda s: s.model.counted.data.add_(1), "buffers", "long"),
    "order's generator": (lambda s: torch.rand((), generator=s.batches.rng), "the order of the data", "quick"),
    "training data": (lambda s: s.batches.data[0].zero_(), "the data", "quick"),
    "training data replaced": (lambda s: setattr(s.batches, "data", (s.batches.data[0].clone(), s.batches.data[1])), "the data", "quick"),
    "requires_grad": (lambda s: first(s).requires_grad_(False), "weights", "quick"),
}  # fmt: skip


def cases():
    for what, (work, words, look) in CHANGES.items():
        for kind in ("observer", "intervention", "debug"):
            yield pytest.param(work, words, kind, look, id=f"{kind} changes {what}")


def complaint(work, kind, point, call, verify="first"):
    "What is said when a hook with all points does that when it is called at one of them for the `call`th time; and where."
    state, calls = small_state(weight_decay=0.1), Counter()
    state.model.register_buffer("counted", torch.zeros(3))
    for _ in range(2): train_step(state, state.batches.of_epoch())

    def at(here):
        def run(self, s):
            calls[here] += 1
            if here == point and calls[here] == call: in_place(work)(self, s)

        return run

    hooks = Hooks([a_hook(kind, point, name="meddler", **{p: at(p) for p in EVENTS if p != point})(at(point))()], "skip", verify=verify)
    try:
        for _ in range(call):
            hooks.fire(PRE_EPOCH, state)
            train_step(state, state.batches.of_epoch(), 1.0, hooks.fire)
            for here in (POST_STEP, POST_EPOCH, SNAPSHOT): hooks.fire(here, state)
    except HookError as error:
        return str(error), f"hook meddler, step {state.step} ({point}): changed"
    assert calls == dict.fromkeys(EVENTS, call)
    return None, None


def names_it(said, where, words):
    return said is not None and said.startswith(where) and words in said and "\n" not in said


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("work, words, kind, look", [*cases()])
def test_a_hook_that_changes_training_is_stopped_at_its_first_call_at_each_point_also_under_skip(work, words, kind, look):
    for point in EVENTS: assert names_it(*complaint(work, kind, point, 1), words), point


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("verify", ["first", "always"])
@pytest.mark.parametrize("work, words, kind, look", [*cases()])
def test_later_a_hook_is_stopped_where_the_quick_look_suffices_and_always_under_verify_always(work, words, kind, look, verify):
    for point in (PRE_STEP, POST_STEP):
        said, where = complaint(work, kind, point, 3, verify)
        if verify == "first" and look == "long":
            assert said is None  # as the page on the guard says
        else:
            assert names_it(said, where, words), point


AMONG = {  # what one hook of several does; whether it shows in a quick look, and again in a second call
    "weights": (lambda s: first(s).add_(1e-6), True, True),
    "mode": (lambda s: s.model.train(not s.model.training), True, True),
    "rate, the first time": (lambda s: s.optimizer.param_groups[0].update(lr=7.0), True, False),
    "a gradient that is replaced": (new_gradient, True, True),
    "bits alone": (lambda s: first(s).data.add_(1e-6), False, True),
    "bits alone, the first time": (lambda s: first(s).data.fill_(0.5), False, False),
}


def among(work, at, call, verify="first", raises=False):
    "What is said when the hook in this place among three does that at its `call`th call."
    state, names = small_state(), ("zero", "one", "two")

    def of(k):
        def run(self, s):
            self.calls = getattr(self, "calls", 0) + 1
            if k == at and self.calls >= call:
                with torch.no_grad(): work(s)
                if raises: raise ValueError("and more")
            return {"fine": 1}

        return a_hook(name=names[k])(run)()

    hooks = Hooks([of(k) for k in range(3)], "skip", verify=verify)
    with pytest.raises(HookError) as error:
        for _ in range(call):
            train_step(state, state.batches.of_epoch(), 1.0, hooks.fire)
            hooks.fire(POST_STEP, state)
    assert state.step == call and str(error.value).endswith(": a hook may not touch training")
    return str(error.value).partition(f", step {call} (post_step): changed ")[0]


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("what", AMONG)
def test_among_several_hooks_the_one_at_fault_is_named(what, at, raises):
    work, quick, again = AMONG[what]
    named = f"hook {('zero', 'one', 'two')[at]}"
    told_apart = named if quick or again else "hook zero or one or two"
    assert among(work, at, 1, raises=raises) == told_apart
    for call, verify in [(3, "always"), *([(3, "first")] if quick else [])]:
        assert among(work, at, call, verify, raises) == told_apart


def test_of_two_that_change_training_the_first_is_named():
    state = small_state()
    hooks = Hooks([a_hook(name=name)(in_place(lambda s: first(s).add_(1)))() for name in ("one", "two")])
    train_step(state, state.batches.of_epoch(), None, hooks.fire)
    with pytest.raises(HookError, match="^hook one, step 1"): hooks.fire(POST_STEP, state)


@pytest.mark.parametrize("what", ["weights", "bits alone"])
def test_among_this_packages_own_hooks_the_one_at_fault_is_named_at_later_calls(what, monkeypatch):
    "Between them there are no fingerprints, after the first call."
    state, hooks, measure = small_state(), Hooks([TrainingMetrics(every_n_steps=1), Hessian(every_n_steps=1)], verify="always" if "bits" in what else "first"), Hessian.pre_step

    def change(self, s):
        if s.step > 3: in_place(AMONG[what][0])(self, s)
        return measure(self, s)

    monkeypatch.setattr(Hessian, "pre_step", change)
    monkeypatch.setattr(TrainingMetrics, "pre_step", lambda self, s: None, raising=False)
    hooks.check(None, state)
    with pytest.raises(HookError, match="^hook hessian, step 4 .*changed weights"):
        for _ in range(5):
            train_step(state, state.batches.of_epoch(), None, hooks.fire)
            hooks.fire(POST_STEP, state)


UNSEEN = {  # where, and what a hook does
    "the batch of the step": (PRE_STEP, lambda s: s.batch.data[0].zero_()),
    "the loss": (POST_STEP, lambda s: s.loss.zero_()),
    "the test data": (POST_STEP, lambda s: s.held_out[0].zero_()),
}


@pytest.mark.parametrize("point, work", UNSEEN.values(), ids=UNSEEN)
def test_a_hook_that_changes_the_numbers_of_a_step_is_stopped_or_without_effect(point, work):
    found = []
    for hooks in (Hooks([a_hook("intervention", point)(lambda self, state: None)()]), Hooks([a_hook("intervention", point)(in_place(work))()])):
        state = small_state()
        try:
            train_step(state, state.batches.of_epoch(), None, hooks.fire)
            hooks.fire(POST_STEP, state)
        except HookError as error:
            assert "changed" in str(error)
            return
        found.append(digest([state.model.state_dict(), state.loss, state.held_out]))
    assert found[0] == found[1]


def test_a_hook_that_changes_weights_and_raises_is_stopped_too():
    def work(self, state):
        with torch.no_grad(): first(state).add_(1)
        raise ValueError("and more")

    state, hooks = small_state(), Hooks([a_hook(point=PRE_STEP)(work)()], "skip")
    with pytest.raises(HookError, match="changed weights"): train_step(state, state.batches.of_epoch(), None, hooks.fire)


WRITTEN = ["step", "loss", "lr", "model", "loss_fn", "seed", "train_state", "batch", "reference", "previous_grad", "params"]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_hook_can_write_nothing_on_the_state(name):
    state, seen = small_state(), []
    hooks = Hooks([a_hook()(lambda self, state: setattr(state, name, -1))(), a_hook(name="after")(lambda self, state: seen.append(getattr(state, name)))()], "skip")
    with pytest.warns(UserWarning, match=f"hook odd, step 1 \\(post_step\\): AttributeError: a hook may not set state.{name}"):
        for _ in range(2):
            train_step(state, state.batches.of_epoch(), None, hooks.fire)
            hooks.fire(POST_STEP, state)
    assert len(seen) == hooks.problems["odd", "raised"] == 2 and -1 not in [s for s in seen if isinstance(s, int)]


# 8. Options of all hooks together.


@each_unit
def test_offloading_gives_the_same_rows(unit, straight, tmp_path):
    config = configure(unit, name=unit, **ALL | dict(offload_hooks=True))
    fit(config, tmp_path, stop=25)
    fit(config, tmp_path, resume=True)
    equal_rows(tmp_path / unit, straight[unit])
    equal_checkpoints(tmp_path / unit, straight[unit])


@each_unit
def test_one_object_used_for_two_runs_gives_the_rows_of_fresh_ones(unit, straight, tmp_path):
    config = configure(unit, name=unit, **ALL)
    hooks = create_hooks(config)
    fit(with_values(config, name="other", seed=8), tmp_path, hooks, stop=25)  # after five rows
    fit(config, tmp_path, hooks)
    equal_rows(tmp_path / unit, straight[unit])


def test_a_refused_run_does_not_spoil_the_next_one(straight, tmp_path):
    config = configure(name="epoch", **ALL)
    hooks = create_hooks(config)
    hooks.wanted = {"w": torch.zeros(2)}
    with pytest.raises(ConfigError): fit(config, tmp_path, hooks)
    hooks.wanted = None
    fit(config, tmp_path, hooks)
    equal_rows(tmp_path / "epoch", straight["epoch"])


def test_the_profile_has_a_row_for_each_hook_and_event_and_changes_no_row(straight, tmp_path):
    config = configure(name="epoch", **ALL | dict(profile_hooks=True))
    hooks = create_hooks(config)
    fit(config, tmp_path, hooks)
    table = hooks.profile().set_index(["hook", "event"])
    firings = {
        ("training_metrics", "post_step"): 6, ("training_metrics", "post_epoch"): 3, ("norms", "post_epoch"): 3,
        ("consecutive", "post_epoch"): 6, ("hessian", "pre_step"): 23, ("hessian", "post_step"): 23,
    }  # fmt: skip
    assert table.firings.to_dict().items() >= firings.items() and (table.ms > 0).all() and (table.seconds > 0).all()
    assert table.ms["hessian", "post_step"] > table.ms["training_metrics", "post_step"]
    equal_rows(tmp_path / "epoch", straight["epoch"])


def test_what_is_remembered_has_a_stated_size(tmp_path):
    hooks = Hooks([Hessian(every_n_steps=20, burst_length=11), Norms()])
    fit(configure("epoch", log_every=5), tmp_path, hooks, stop=25)
    n = 4 * sum(p.numel() for p in hooks.view.model.parameters())
    sizes = hooks.sizes()
    assert sizes["norms"] == 0 and 2 * n <= sizes["hessian"] <= 2 * n + 64 and sizes["kept for hooks"] == n


# 9. Odd networks, lengths and sizes.

EXACT = dict(log_every=5, hooks={"full": {}, **BURSTS, "hessian": {"every_n_steps": 1, "burst_length": 1, "scheme": "exact", "displacement": True, "per_parameter": True}})


def patched(monkeypatch, change):
    make = lal.modular.models.create_model

    def changed(config):
        model = make(config)
        change(model)
        return model

    monkeypatch.setattr(lal.modular.models, "create_model", changed)


def rows_of(config, root, warned=()):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        folder = fit(config, root).folder
    assert [w for w in said if not any(k in str(w.message) for k in warned)] == []
    return {n.removeprefix("hooks/"): folder.table(n).read() for n in folder.table_names()}


def test_frozen_parameters_have_no_part_in_anything(monkeypatch, tmp_path):
    patched(monkeypatch, lambda model: model.hidden[0].weight.requires_grad_(False))
    tables = rows_of(configure(**EXACT), tmp_path)
    assert len(tables["hessian"]) == 58 and tables["hessian"].displacement_residual.max() < 0.5
    columns = {*tables["hessian"], *tables["norms"]}
    assert "content_norm/hidden.0.bias" in columns and not [c for c in columns if "hidden.0.weight" in c]
    n = tables["norms"]
    assert np.allclose(n.total_norm, np.hypot(n["norm/hidden.0"], n["norm/output"]))


def test_tied_embeddings_are_one_parameter(tmp_path):
    tables = rows_of(configure(model_type="transformer", n_heads=2, tie_embeddings=True, **EXACT), tmp_path)
    assert len(tables["hessian"]) == 58 and tables["hessian"].displacement_residual.max() < 0.5
    assert "content_norm/tokens.weight" in tables["hessian"] and "content_norm/output.weight" not in tables["hessian"]


def test_weights_tied_by_assignment_are_one_parameter(monkeypatch, tmp_path):
    def tie(model):
        model.hidden.append(nn.Linear(8, 8, bias=False))
        model.hidden.append(nn.Linear(8, 8, bias=False))
        model.hidden[2].weight = model.hidden[1].weight

    patched(monkeypatch, tie)
    tables = rows_of(configure(**EXACT), tmp_path)
    assert len(tables["hessian"]) == 58 and tables["hessian"].displacement_residual.max() < 0.5
    fit(configure(name="after", **EXACT, reference="run"), tmp_path)


def test_a_parameter_without_a_gradient_counts_as_zero(monkeypatch, tmp_path):
    patched(monkeypatch, lambda model: model.register_parameter("idle", nn.Parameter(torch.ones(3))))
    tables = rows_of(configure(weight_decay=0.0, **EXACT), tmp_path, warned=["entanglement_content_cossim/idle is nan", "clip"])
    assert (tables["hessian"]["content_norm/idle"] == 0).all() and (tables["norms"]["norm/idle"] == 0).all()
    assert len(tables["hessian"]) == 58 and "entanglement_content_cossim/idle" not in tables["hessian"]


def test_the_full_batch_is_followed_by_itself(tmp_path):
    config = configure(epochs=30, batch_size=None, optimizer="sgd", weight_decay=0.0, lr=0.1, **EXACT)
    tables = rows_of(config, tmp_path)
    rows, norms = tables["hessian"], tables["norms"]
    assert np.allclose(norms.total_norm, rows.observed_grad_norm[rows.step.isin(norms.step)], rtol=1e-6) and len(norms) == 6
    assert rows.step.tolist() == [*range(3, 31)] and rows.epoch.tolist() == rows.step.tolist()
    before = rows.observed_grad_norm.to_numpy()[:-1]  # of step t, and the content of step t + 1 is the same gradient
    assert np.allclose(rows.content_norm.to_numpy()[1:], before, rtol=1e-5)
    steps = rows_of(configure("step", name="s", steps=30, batch_size=None, optimizer="sgd", weight_decay=0.0, lr=0.1, **EXACT), tmp_path)["hessian"]
    pd.testing.assert_frame_equal(rows, steps, check_exact=True)


def test_the_mean_of_an_epoch_is_that_of_the_gradients_before_clipping(monkeypatch, tmp_path):
    kept, add = {}, GradientBuffer.after_step
    grads = lambda s: {k: p.grad.double() / (float(s.clip_factor) if s.clip_factor is not None else 1) for k, p in s.model.named_parameters()}
    monkeypatch.setattr(GradientBuffer, "after_step", lambda self, view: kept.setdefault(view.epoch, []).append(grads(view)) or add(self, view))
    for clip in (None, 0.05):
        kept.clear()
        tables = rows_of(configure(name=f"clip_{clip}", grad_clip=clip, **ALL), tmp_path)
        mean = lambda e: {k: sum(g[k] for g in kept[e]) / len(kept[e]) for k in kept[e][0]}
        assert {len(g) for g in kept.values()} == {4} and tables["norms"].epoch.tolist() == tables["consecutive"].epoch.tolist() == [5, 10, 15]
        for row in tables["norms"].itertuples(): assert row.total_norm == pytest.approx(float(norm(mean(row.epoch))), rel=1e-5)
        for row in tables["consecutive"].itertuples():
            a, b = (torch.cat([t.flatten() for t in mean(e).values()]) for e in (row.epoch, row.epoch - 1))
            assert row.cos_sim == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-4)
            assert np.cos(np.radians(row.angle_degrees)) == pytest.approx(row.cos_sim, abs=1e-3)
        assert (tables["hessian"].clip_factor < 1).all() == bool(clip)


def test_training_metrics_are_those_of_the_history(straight, tmp_path):
    for unit in UNITS:
        folder = RunFolder(straight[unit])
        rows, history = folder.table("hooks/training_metrics").read(), folder.history
        both = rows.merge(history, on="step", suffixes=("", "_h"))
        both = both[both.test_acc.notna()]
        assert len(both) == (3 if unit == "epoch" else 12)
        assert both.test_acc.tolist() == both.test_acc_h.tolist() and both.train_acc.tolist() == both.train_acc_h.tolist()
        assert np.allclose(rows.perplexity, np.exp(rows.loss), rtol=1e-6)


def test_log_points_beyond_the_end_leave_the_last_epoch(tmp_path):
    tables = rows_of(configure(**ALL | dict(log_every=1000)), tmp_path)
    assert tables["norms"].epoch.tolist() == [15] and tables["consecutive"].epoch.tolist() == [15]
    assert tables["training_metrics"].test_acc.notna().sum() == 1


def test_a_run_that_goes_on_measures_on(straight, tmp_path):
    short = configure(name="epoch", **ALL | dict(log_every=4))  # 4, 8, 12, and the end wherever it is
    fit(with_values(short, epochs=8), tmp_path)
    fit(with_values(short, epochs=8), tmp_path, extra_epochs=7)
    fit(with_values(short, name="through"), tmp_path)
    one, two = RunFolder(tmp_path / "epoch"), RunFolder(tmp_path / "through")
    for name in two.table_names():
        apart = name != "history" and HOOKS[name.removeprefix("hooks/")].apart  # where log points are passed over, the first end is one more
        if name != "history" and not apart: pd.testing.assert_frame_equal(one.table(name).read(), two.table(name).read(), check_exact=True)
    with pytest.raises(ConfigError): fit(with_values(short, until=5), tmp_path, resume=True)


@pytest.mark.parametrize("at", [28, 29, 30, 31])  # the last step of epoch 7, and all but the last of epoch 8
def test_an_epoch_that_becomes_a_log_point_half_way_has_its_whole_mean_or_no_row(at, tmp_path):
    config = configure(name="run", **ALL | dict(log_every=100))
    fit(config, tmp_path, stop=at)
    ends_there = with_values(config, until=8)  # and makes epoch 8 a log point
    fit(ends_there, tmp_path, resume=True)
    fit(configure(name="whole", **ALL | dict(log_every=8)), tmp_path)  # at 8 and 15
    rows, whole = ({n: RunFolder(tmp_path / run).table(f"hooks/{n}").read() for n in ("norms", "consecutive")} for run in ("run", "whole"))
    assert all(table.epoch.tolist() == [8, 15] for table in whole.values())
    assert not len(rows["consecutive"])  # epoch 7, with which it would compare, was no log point's neighbour when it ran
    if at == 28:
        pd.testing.assert_frame_equal(rows["norms"], whole["norms"][:1], check_exact=True)
    else:
        assert not len(rows["norms"])
    fit(ends_there, tmp_path, extra_epochs=7)
    for name, table in whole.items():
        found = RunFolder(tmp_path / "run").table(f"hooks/{name}").read()
        later = lambda t: t[t.epoch > 8].reset_index(drop=True)
        pd.testing.assert_frame_equal(later(found), later(table), check_exact=True)


def test_hooks_that_come_in_the_middle_of_an_epoch_see_no_mean_of_it():
    state, hooks = small_state(), Hooks([Norms()])
    for epoch in (1, 2):
        state.epoch = epoch
        if epoch == 2: hooks.fire(PRE_EPOCH, state)
        for k in range(4):
            fire = hooks.fire if epoch == 2 or k > 1 else lambda point, state: None
            train_step(state, state.batches.of_epoch(), None, fire)
            fire(POST_STEP, state)
        hooks.fire(POST_EPOCH, state)
    assert hooks.table("norms").epoch.tolist() == [2]


def test_two_seeds_through_one_per_seed(straight, tmp_path):
    config = configure(name="epoch", **ALL | dict(seeds=[3, 4]))
    for each in one_per_seed(config): fit(each, tmp_path)
    pd.testing.assert_frame_equal(
        RunFolder(tmp_path / "epoch_seed3").table("hooks/hessian").read(), RunFolder(straight["epoch"]).table("hooks/hessian").read(), check_exact=True
    )
    assert not RunFolder(tmp_path / "epoch_seed4").table("hooks/hessian").read().equals(RunFolder(straight["epoch"]).table("hooks/hessian").read())


def test_a_keyboard_interrupt_inside_a_hook_ends_the_run_and_it_resumes(straight, tmp_path, dropout):
    class Impatient(Hook):
        kind = "intervention"
        at = 27

        def post_step(self, state):
            torch.manual_seed(0)
            if state.step == self.at: raise KeyboardInterrupt

    watchers = lambda: [TrainingMetrics(), Norms(), Consecutive(), Hessian(**BURSTS["hessian"]), Impatient()]
    config = configure(name="run", log_every=5, checkpoint_every=4)
    with pytest.raises(KeyboardInterrupt): fit(config, tmp_path, Hooks(watchers()))
    assert RunFolder(tmp_path / "run").summary["status"] == "interrupted"
    Impatient.at = None
    fit(config, tmp_path, Hooks(watchers()), resume=True)
    fit(with_values(config, name="through"), tmp_path, Hooks(watchers()))
    equal_rows(tmp_path / "run", tmp_path / "through")


@each_unit
def test_a_run_that_diverges_says_so_and_hooks_do_not_get_in_the_way(unit, tmp_path):
    config = configure(unit, optimizer="sgd", lr=1e30, **ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NonFiniteLoss): fit(config, tmp_path)
    assert RunFolder(tmp_path / "run").summary["status"] == "failed"


def test_many_rows_between_two_writes(monkeypatch, tmp_path):
    monkeypatch.setattr("lal.hooks.rows.MOST_PENDING", 7)
    settled, settle = [], MetricBuffer.settle
    monkeypatch.setattr(MetricBuffer, "settle", lambda self: settled.append(len(self.pending)) or settle(self))
    config = configure(name="epoch", **ALL)
    fit(config, tmp_path)
    monkeypatch.undo()
    fit(with_values(config, name="all"), tmp_path)
    equal_rows(tmp_path / "epoch", tmp_path / "all")
    assert 7 in settled and 14 in settled


def test_what_is_written_is_described_in_the_tables(straight):
    import pyarrow.parquet as pq

    told = json.loads(pq.read_schema(straight["epoch"] / "hooks/hessian.parquet").metadata[b"lal.hook"])
    assert told["name"] == "hessian" and told["kind"] == "intervention" and told["options"]["burst_length"] == 11
    columns = {metric["name"] for metric in told["metrics"]}
    rows = RunFolder(straight["epoch"]).table("hooks/hessian").read()
    assert {*rows} - {"epoch", "step"} <= columns and "content_cossim_to_solution" not in columns
    assert all(("low" in m and "high" in m and m["meaning"]) for m in told["metrics"])
    for metric in told["metrics"]:
        values = rows[metric["name"]].dropna() if metric["name"] in rows else pd.Series(dtype=float)
        slack = 1e-6
        assert metric["low"] is None or (values >= metric["low"] - slack).all(), metric["name"]
        assert metric["high"] is None or (values <= metric["high"] + slack).all(), metric["name"]


def test_the_columns_of_the_experiment_are_declared_where_training_metrics_writes_them(straight):
    import pyarrow.parquet as pq

    told = json.loads(pq.read_schema(straight["epoch"] / "hooks/training_metrics.parquet").metadata[b"lal.hook"])
    columns = [metric.declared() for metric in find_experiment("modular").columns]
    assert [metric["name"] for metric in told["metrics"][:3]] == ["loss", "lr", "perplexity"] and told["metrics"][3:] == columns
    rows = RunFolder(straight["epoch"]).table("hooks/training_metrics").read()
    assert [*rows] == ["epoch", "step", *(metric["name"] for metric in told["metrics"])]


def test_hooks_and_sinks_raise_no_warning_of_any_kind(tmp_path):
    "A whole run, with a stop and a resume, under `python -W error`."
    script = f"""
import torch
from pathlib import Path
from lal.core.config import make_config
from lal.core.trainer import Trainer
from lal.hooks.registry import REGISTRY as HOOKS, create_hooks
for unit in (dict(epochs=6), dict(steps=24)):
    config = make_config(**{BASE | dict(model_type="transformer", n_heads=2)}, **unit, name=next(iter(unit)), sinks=["jsonl", "csv"], log_every=2, profile_hooks=True,
        hooks={{"full": {{}}, **{dict.fromkeys(BURSTS, dict(every_n_steps=4, burst_length=3))}, "hessian": {{"every_n_steps": 4, "burst_length": 3, "displacement": True}}}})
    Trainer(config, {str(tmp_path)!r}, progress=False, hooks=create_hooks(config)).fit()
    more = dict(extra_epochs=2) if "epochs" in unit else dict(extra_steps=3)
    Trainer(config, {str(tmp_path)!r}, progress=False, hooks=create_hooks(config)).fit(**more)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_the_console_shows_the_newest_row_of_each_hook(tmp_path, capsys):
    fit(configure(**ALL | dict(sinks=["console"])), tmp_path)
    said = capsys.readouterr()
    assert said.out == "" and {line.split()[0] for line in said.err.splitlines()} == {*choose("full", configure())}
    assert re.search(r"hessian  step 50 .*entanglement_norm", said.err)


# 10. What a hook remembers, and where that goes wrong.


class Keeping(Hook):
    "Keeps the batch of its first step, as the page on views says one may."

    kind = "intervention"
    metrics = (FINE,)

    def post_step(self, state):
        if not hasattr(self, "kept"): self.kept = state.batch
        return {"fine": state.loss_at(state.params(), self.kept) + 0 * self.kept.data[0].sum()}


class KeepingLive(Hook):
    "Keeps a live parameter: after a resume it would be a copy that moves no more."

    metrics = (FINE,)

    def post_step(self, state):
        if not hasattr(self, "kept"): self.kept = first(state)
        return {"fine": self.kept.sum()}


class KeepingInTheClass(Hook):
    "Keeps its numbers in a list that belongs to the class."

    metrics = (FINE,)
    kept = []

    def post_step(self, state):
        self.kept.append(1.0)
        return {"fine": len(self.kept)}


class KeepingABatchByName(Hook):
    "Keeps a dict that looks like a Batch in a checkpoint."

    metrics = (FINE,)

    def post_step(self, state):
        if not hasattr(self, "kept"): self.kept = {"Batch": state.step}
        return {"fine": self.kept["Batch"]}


class KeepingUnderANumber(Hook):
    "Keeps something under a number of NumPy's."

    metrics = (FINE,)

    def post_step(self, state):
        if not hasattr(self, "kept"): self.kept = {np.int64(3): state.step}
        return {"fine": self.kept[3]}


KEEPERS = [  # and the class, or what refuses it
    (Keeping, Batch),
    (KeepingLive, "hook keeping_live: ['kept'] is a Parameter"),
    (KeepingInTheClass, list),
    (KeepingABatchByName, dict),
    (KeepingUnderANumber, dict),
]


@pytest.mark.parametrize("cls, wanted", KEEPERS)
def test_what_is_kept_survives_a_resume_or_is_refused_by_name(cls, wanted, tmp_path):
    if isinstance(wanted, str):
        with pytest.raises(HookError) as error: fit(configure(name="straight"), tmp_path, Hooks([cls()]))
        assert wanted in str(error.value) and "\n" not in str(error.value)
        return
    fit(configure(name="straight"), tmp_path, Hooks([cls()]))
    fit(configure(name="stopped"), tmp_path, Hooks([cls()]), stop=22)
    resumed = Hooks([cls()])
    fit(configure(name="stopped"), tmp_path, resumed, resume=True)
    assert type(resumed.hooks[0].kept) is wanted and not getattr(cls, "kept", None)
    equal_rows(tmp_path / "straight", tmp_path / "stopped")


def test_one_object_in_loops_of_ones_own_watches_one_state_alone(dropout):
    def train(state, hooks):
        for _ in range(2):
            train_step(state, state.batches.of_epoch(), None, hooks.fire)
            hooks.fire(POST_STEP, state)

    hooks, one, two = Hooks([Masked()]), small_state(seed=1), small_state(seed=2)
    train(one, hooks)
    before = digest(two.model.state_dict())
    with pytest.raises(ConfigError) as error: train(two, hooks)
    assert "another training state" in str(error.value) and "make new ones" in str(error.value) and "\n" not in str(error.value)
    for point in EVENTS:
        with pytest.raises(ConfigError, match="another training state"): hooks.fire(point, two)
    assert digest(two.model.state_dict()) == before
    train(one, hooks)
    train(two, new := Hooks([Masked()]))
    assert hooks.table("masked").step.tolist() == [1, 2, 3, 4] and new.table("masked").step.tolist() == [2, 3]  # the refused step was counted
    assert hooks.table("masked").same.max() < 1e-6 and new.table("masked").same.max() < 1e-6


@pytest.mark.parametrize("name", ["step", "epoch"])
def test_a_metric_cannot_take_the_name_of_a_rows_own_column(name):
    odd = a_hook(metrics=(FINE, Metric(name, "x", (0, None), "a number")))(lambda self, state: {"fine": 1, name: 3})
    with pytest.raises(ConfigError) as error: Hooks([odd()])
    assert f"hook odd: no metric may be called {name}" in str(error.value) and "\n" not in str(error.value)


def test_a_view_can_be_copied():
    view = HookState(small_state())
    assert copy.copy(view).train_state is view.train_state and copy.copy(view).step == view.step
    alike = copy.deepcopy(view)
    assert alike.model is not view.model and digest(alike.model.state_dict()) == digest(view.model.state_dict())
