"""An experiment that is not arithmetic (`tests/second`: teacher and student, squared error) goes through the whole machine: hooks, kill and resume, summary,
tables, and the command line. Nothing in the package knows it."""
import json, os, re, signal, subprocess, sys
from pathlib import Path
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner
from lal.app.cli import app
from lal.core.config import load_config, with_values
from lal.core.errors import ConfigError, Interrupted
from lal.core.experiment import Milestone, find_experiment, milestones_reached
from lal.core.files import digest, load_checkpoint
from lal.core.recorder import measure
from lal.core.run import RunFolder, checkpoints
from lal.core.state import POST_STEP, train_step
from lal.core.tables import table_metadata
from lal.core.trainer import Trainer
from lal.hooks.hook import Hook
from lal.hooks.registry import create_hooks
from lal.hooks.runner import Hooks

SECOND = Path(__file__).parents[1] / "second"
FILE = "teacher_student.yaml"
COLUMNS = ["train_loss", "test_loss", "mean_output"]


@pytest.fixture(autouse=True)
def beside_the_file(monkeypatch):
    monkeypatch.chdir(SECOND)  # where `imports: [teacher_student.py]` finds it


def configure(**changes):
    return with_values(load_config(FILE), **changes)


def fit(config, root, **options):
    trainer = Trainer(config, root, progress=False, hooks=create_hooks(config))
    trainer.fit(**options)
    return trainer


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    "The run of each loop that nobody stopped, with dropout."
    root, here = tmp_path_factory.mktemp("second"), os.getcwd()
    os.chdir(SECOND)
    try:
        return {name: fit(configure(name=name, dropout=0.2, **more), root).folder.path for name, more in LOOPS.items()}
    finally:
        os.chdir(here)


LOOPS = {"by_epoch": {}, "by_step": {"steps": 240, "log_every": 8, "checkpoint_every": 80}}


def test_the_file_is_short_and_knows_no_accuracy():
    text = (SECOND / "teacher_student.py").read_text()
    assert len(text.splitlines()) <= 60 and "acc" not in text and "cross_entropy" not in text


def test_it_is_reached_through_the_file_under_imports_alone(tmp_path, monkeypatch):
    code = f"from lal.core.config import load_config; c = load_config({FILE!r}); print(c.experiment, c.width, c.section.inputs)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["teacher_student", "8", "3"], done.stderr
    code = "from lal.core.config import make_config; make_config(experiment='teacher_student')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "must be one of modular" in done.stderr.splitlines()[-1]
    with pytest.raises(ConfigError) as error: configure(width=0)
    assert "width = 0" in str(error.value) and "must be from 1 to 100000" in str(error.value)
    with pytest.raises(ConfigError, match="did you mean 'width'"): configure(widht=3)


def test_history_summary_and_metadata_are_those_of_its_declaration(straight):
    experiment = find_experiment("teacher_student")
    for name, path in straight.items():
        folder = RunFolder(path)
        history, summary = folder.history, folder.summary
        assert [*history] == ["epoch", "step", *COLUMNS, "lr", "total_weight_norm"]
        told = json.loads(table_metadata(path / "history.parquet")["lal.experiment"])
        assert told["name"] == "teacher_student" and told["describe"] == "teacher and student, 3 inputs, width 8"
        assert told["headline"] == "test_loss" and told["higher"] is False
        assert [column["name"] for column in told["columns"]] == [*COLUMNS, "lr", "total_weight_norm"]
        assert all(column["meaning"] and column.keys() == {"name", "formula", "low", "high", "meaning"} for column in told["columns"])
        assert told["milestones"] == [dict(name="converged", said="converged", column="test_loss", level=0.01, in_a_row=2, below=True)]
        best = int(history.test_loss.argmin())
        when = {unit: milestones_reached(history, [Milestone(**told["milestones"][0])], unit)["converged"] for unit in ("epoch", "step")}
        after = history.test_loss[history.step >= (10**9 if when["step"] is None else when["step"])].max()
        expected = {
            "status": "finished", "epochs": int(history.epoch.iloc[-1]), "steps": 240, **{f"final_{c}": history[c].iloc[-1] for c in COLUMNS},
            "best_test_loss": history.test_loss[best], "best_epoch": history.epoch[best], "converged_epoch": when["epoch"], "converged_step": when["step"],
            "worst_test_loss_after_converged": None if when["step"] is None else after, "parameters": 41,
        }  # fmt: skip
        assert {k: v for k, v in summary.items() if k != "seconds"} == expected and [*summary][:3] == ["status", "epochs", "steps"]
        kept = load_checkpoint(path / "checkpoints/best.pt")
        assert kept["test_loss"] == history.test_loss.min() and kept["step"] == history.step[best]
        state = experiment.build(folder.config, torch.device("cpu"))
        state.model.load_state_dict(kept["model"])
        assert measure(state)["test_loss"] == kept["test_loss"]


def test_parts_of_an_unfinished_history_carry_the_declaration_too(tmp_path):
    class Impatient:
        def fire(self, point, state):
            if point == POST_STEP and state.step == 100:
                folder.flush()
                assert not (folder.path / "history.parquet").exists()
                parts = [*folder.path.glob("history.parts/*.parquet")]
                assert parts and all(b"lal.experiment" in pq.read_schema(part).metadata for part in parts)
                signal.raise_signal(signal.SIGTERM)

        def open(self, opened):
            nonlocal folder
            folder = opened

    folder = None
    with pytest.raises(Interrupted): Trainer(configure(hooks={}), tmp_path, hooks=Impatient()).fit()
    assert folder.summary["status"] == "interrupted" and folder.summary["final_test_loss"] > 0


def test_a_run_without_a_row_has_the_declared_columns(tmp_path):
    from lal.core.run import create_run

    assert [*create_run(tmp_path, configure(), {}).history] == ["epoch", "step", *COLUMNS, "lr", "total_weight_norm"]


def test_the_stopping_rule_and_the_best_weights_look_at_a_headline_that_falls(tmp_path):
    stopped = fit(configure(hooks={}, stop_at=0.005, log_every=1, epochs=500), tmp_path)
    last = stopped.folder.history.test_loss
    assert len(last) < 400 and (last[-5:] <= 0.005).all() and not (last[-6:-1] <= 0.005).all()
    assert stopped.state.best["test_loss"] == last.min()


def test_hooks_measure_it_and_change_nothing(straight, tmp_path):
    for name, more in LOOPS.items():
        alone = fit(configure(name=name, dropout=0.2, **more | {"hooks": {}}), tmp_path)
        pd.testing.assert_frame_equal(alone.folder.history, RunFolder(straight[name]).history, check_exact=True)
        ours, theirs = (load_checkpoint(checkpoints(run)[-1]) for run in (alone.folder.path, straight[name]))
        for key in ("model", "optimizer", "scheduler", "batches", "generators"): assert digest(ours[key]) == digest(theirs[key]), key
    tables = {name: RunFolder(straight["by_epoch"]).table(f"hooks/{name}").read() for name in ("training_metrics", "norms", "consecutive", "hessian")}
    assert len(tables["training_metrics"]) == 48 and len(tables["norms"]) == 30 and len(tables["hessian"]) > 50
    assert sorted(tables["training_metrics"]) == sorted(["epoch", "step", "loss", "lr", "perplexity", *COLUMNS])
    assert tables["training_metrics"].loss.dropna().index.size == 24
    logged = tables["training_metrics"].dropna(subset="test_loss")
    history = RunFolder(straight["by_epoch"]).history[1:]
    assert logged.step.tolist() == history.step.tolist() and logged[COLUMNS].to_numpy().tolist() == history[COLUMNS].to_numpy().tolist()
    assert tables["hessian"].relative_fd_error.dropna().max() < 1  # the same mask on both sides of the difference


def test_a_hook_that_changes_data_in_a_dict_is_stopped():
    state = find_experiment(configure().experiment).build(configure(), torch.device("cpu"))

    class Meddling(Hook):
        def post_step(self, state): state.batches.data["y"].add_(1)

    hooks = Hooks([Meddling()])
    train_step(state, state.batches.of_epoch(), None, hooks.fire)
    with pytest.raises(RuntimeError, match="changed the data"): hooks.fire(POST_STEP, state)


KILLED = """
import os, signal, sys
import lal.core.run
from lal.core.config import load_config, with_values
from lal.core.run import RunFolder
from lal.core.trainer import Trainer
from lal.hooks.registry import create_hooks

class Killed:
    "The hooks of the run, and death at one step."
    def __init__(self, hooks, at): self.hooks, self.at = hooks, at
    def fire(self, point, state):
        self.hooks.fire(point, state)
        if point == "post_step" and state.step == self.at: os.kill(os.getpid(), signal.SIGKILL)
    def __getattr__(self, name): return getattr(self.hooks, name)

name, root, at, changes = sys.argv[1], sys.argv[2], int(sys.argv[3]), eval(sys.argv[4])
lal.core.run.FLUSH_SECONDS = 0.01
config = with_values(load_config("teacher_student.yaml"), name=name, dropout=0.2, **changes)
Trainer(config, root, progress=False, hooks=Killed(create_hooks(config), at)).fit(resume=RunFolder(f"{root}/{name}").is_run)
"""


@pytest.mark.parametrize("name", LOOPS)
def test_killed_and_resumed_it_equals_the_run_that_nobody_stopped(name, straight, tmp_path):
    for at in (30, 113, 161, 0):  # in the first epochs, in a burst of the Hessian hook, just after a checkpoint; then to the end
        done = subprocess.run([sys.executable, "-c", KILLED, name, tmp_path, str(at), repr(LOOPS[name])], capture_output=True, text=True)
        assert done.returncode == (-signal.SIGKILL if at else 0), done.stderr
    killed, whole = RunFolder(tmp_path / name), RunFolder(straight[name])
    assert killed.table_names() == whole.table_names()
    for table in whole.table_names(): pd.testing.assert_frame_equal(killed.table(table).read(), whole.table(table).read(), check_exact=True)
    assert [f.name for f in checkpoints(killed.path)] == [f.name for f in checkpoints(whole.path)]
    for file in [*checkpoints(whole.path), whole.path / "checkpoints/best.pt"]:
        ours, theirs = load_checkpoint(killed.path / "checkpoints" / file.name), load_checkpoint(file)
        for key in theirs.keys() - {"seconds"}: assert digest(ours[key]) == digest(theirs[key]), (file.name, key)
    assert killed.summary | {"seconds": 0} == whole.summary | {"seconds": 0}
    assert table_metadata(killed.path / "history.parquet") == table_metadata(whole.path / "history.parquet")


def lal(*words, expect=0) -> str:
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == expect, result.output
    return result.output


@pytest.fixture(scope="session")
def by_command(tmp_path_factory):
    "Two seeds trained from the command line."
    root, here = tmp_path_factory.mktemp("by_command"), os.getcwd()
    os.chdir(SECOND)
    try:
        lal("train", FILE, "--root", root, "--set", "seeds=[1, 2]", "--set", "epochs=30", "--name", "ts")
    finally:
        os.chdir(here)
    return root


def test_lal_train_makes_runs_of_it_with_its_hooks(by_command):
    for seed in (1, 2):
        folder = RunFolder(by_command / f"ts_seed{seed}")
        assert folder.summary["status"] == "finished" and folder.history.epoch.iloc[-1] == 30
        assert "hooks/hessian" in folder.table_names() and folder.config.imports == ["teacher_student.py"]


def test_lal_train_extends_a_run_of_it(tmp_path):
    lal("train", FILE, "--root", tmp_path, "--set", "epochs=4", "--name", "one")
    lal("train", FILE, "--root", tmp_path, "--set", "epochs=4", "--name", "one", "--extra-epochs", "3")
    assert RunFolder(tmp_path / "one").history.epoch.iloc[-1] == 7
    said = lal("train", FILE, "--root", tmp_path, "--set", "epochs=4", "--set", "width=9", "--name", "one", "--resume", expect=2)
    assert "width = 9" in said and "goes on as it began" in said


def test_lal_runs_lists_it_and_sql_knows_its_columns_and_milestones(by_command):
    said = lal("runs", "--root", by_command)
    assert "ts_seed1" in said and "ts_seed2" in said and "accuracy" not in said
    query = "SELECT run, converged_epoch, best_test_loss FROM runs ORDER BY run"
    said = lal("runs", "--root", by_command, "--sql", query)
    assert "ts_seed1" in said and str(RunFolder(by_command / "ts_seed1").summary["converged_epoch"] or "") in said
    said = lal("runs", "--root", by_command, "--sql", "SELECT run, count(*) AS n, min(test_loss) FROM history GROUP BY run")
    assert "16" in said
    said = lal("runs", "--root", by_command, "--sql", "SELECT run, max(entanglement_norm) FROM hessian GROUP BY run")
    assert "ts_seed2" in said


def test_lal_report_writes_its_page_in_its_own_words(by_command):
    lal("report", "ts_seed1", "ts_seed2", "--root", by_command)
    page = (by_command / "ts_seed1_and_1_more.html").read_text()
    page = re.sub(r"<script.*?</script>", "", page, flags=re.S)  # plotly.js has many words
    assert "converged" in page and "teacher and student, 3 inputs, width 8" in page and "ts_seed2" in page
    for word in ("grokked", "memorised", "accuracy", "modular"): assert word not in page.lower(), word
