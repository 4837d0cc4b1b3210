"Runs that are continued, extended, overwritten or damaged: one line and an exit code, and nothing lost."
import shutil, signal
from pathlib import Path
import pytest
import pandas as pd
import torch
from typer.testing import CliRunner
from lal.analysis.runs import load_run
from lal.app.cli import app
from lal.core.config import load_config, make_config, with_values
from lal.core.errors import Interrupted
from lal.core.files import load_checkpoint, save_checkpoint
from lal.core.keys import read_yaml
from lal.core.run import RunFolder
from lal.core.recorder import Recorder
from lal.core.trainer import Trainer

SMALL = ("--set", "p=11", "--set", "epochs=8", "--set", "batch_size=16", "--set", "device=cpu", "--set", "checkpoint_every=4", "--set", "warmup_epochs=0")


def lal(root: Path, *words, expect=0, small=SMALL) -> str:
    result = CliRunner().invoke(app, ["train", "quickstart", *small, "--root", str(root), *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == expect, result.output
    return result.output


def one(root: Path, *words, **options) -> str:
    return lal(root, "--set", "seeds=null", "--name", "one", *words, **options)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    "A root with two equal runs, `one` and `two`, trained once; tests work on copies."
    root = tmp_path_factory.mktemp("made")
    for name in ("one", "two"): lal(root, "--set", "seeds=null", "--name", name)
    return root


@pytest.fixture
def root(made, tmp_path) -> Path:
    "A copy of these two runs."
    return shutil.copytree(made, tmp_path / "made")


def config(run: Path) -> dict:
    values = read_yaml(run / "config.yaml")
    return {**values, **values["modular"]}


def test_a_seed_added_on_resume_trains_like_its_siblings(tmp_path):
    lal(tmp_path, "--set", "seeds=[0]", "--name", "x")
    lal(tmp_path, "--set", "seeds=[0, 1]", "--name", "x", "--resume", small=())
    first, second = (config(tmp_path / f"x_seed{k}") for k in (0, 1))
    assert second["p"] == 11 and {k: v for k, v in first.items() if k not in ("name", "seed", "modular")} == {k: v for k, v in second.items() if k not in ("name", "seed", "modular")}


@pytest.mark.parametrize("change", ["p=13", "lr=0.1", "modular.p=13", "modular={p: 13}", "hooks.hessian.burst_length=3", "hooks={hessian: {burst_length: 3}}"])
def test_resuming_with_a_contradiction_is_refused_also_when_finished(change, root):
    before = (root / "one/config.yaml").read_bytes()
    said = one(root, "--resume", "--set", change, expect=2, small=())
    assert "goes on as it began" in said and said.count("\n") == 1
    assert (root / "one/config.yaml").read_bytes() == before


@pytest.mark.parametrize("extra", [3, 12])  # fewer log points than the stopping rule wants in a row, and more
def test_extra_epochs_count_from_where_the_run_stands(extra, tmp_path):
    one(tmp_path, "--set", "stop_at=0.001", "--set", "log_every=1", "--set", "epochs=400")
    stood = load_run(tmp_path / "one").max_epoch
    assert stood < 100
    one(tmp_path, "--extra-epochs", str(extra), small=())
    assert load_run(tmp_path / "one").max_epoch == stood + extra
    assert "finished already" in one(tmp_path, "--resume", "--set", f"until={stood + extra}", small=())


STOPPING = dict(p=7, hidden_dim=8, log_every=1, epochs=300, stop_at=0.001, threads=1, device="cpu")  # a level that every network reaches


def test_the_stopping_rule_holds_whatever_until_says(tmp_path):
    for name, until in (("whole", None), ("part", 200)):
        Trainer(make_config(name=name, until=until, **STOPPING), tmp_path).fit()
    whole, part = (load_run(tmp_path / name) for name in ("whole", "part"))
    assert whole.max_epoch < 100 and whole.history.test_acc[-5:].min() >= 0.001
    pd.testing.assert_frame_equal(whole.history, part.history, check_exact=True)
    Trainer(make_config(name="part", until=250, **STOPPING), tmp_path).fit(resume=True)  # finished, and stays so
    assert load_run(tmp_path / "part").max_epoch == whole.max_epoch


def test_a_run_extended_before_its_rule_is_met_obeys_it(tmp_path):
    stopped = int(Trainer(make_config(name="whole", **STOPPING), tmp_path).fit().history.epoch.max())
    brief = make_config(name="brief", **STOPPING | dict(epochs=stopped - 2))
    Trainer(brief, tmp_path).fit()
    Trainer(brief, tmp_path).fit(extra_epochs=20)
    assert load_run(tmp_path / "brief").max_epoch == stopped


@pytest.mark.parametrize("stops", [(2,), (2, 9)])
def test_a_run_sent_on_after_its_rule_was_met_trains_all_extra_epochs_also_when_stopped(stops, tmp_path):
    class Alarm:
        at = None

        def fire(self, point, state):
            if point == "post_step" and state.step == self.at: signal.raise_signal(signal.SIGTERM)

    ended = {name: Trainer(make_config(name=name, **STOPPING), tmp_path).fit().history.epoch.max() for name in ("whole", "stopped")}
    Trainer(make_config(name="whole", **STOPPING), tmp_path).fit(extra_epochs=12)
    alarm, how = Alarm(), dict(extra_epochs=12)
    for after in stops:
        alarm.at = ended["stopped"] + after
        with pytest.raises(Interrupted): Trainer(make_config(name="stopped", **STOPPING), tmp_path, hooks=alarm).fit(**how)
        how = dict(resume=True)
    Trainer(make_config(name="stopped", **STOPPING), tmp_path).fit(resume=True)
    whole, stopped = (load_run(tmp_path / name) for name in ("whole", "stopped"))
    assert whole.max_epoch == ended["whole"] + 12
    pd.testing.assert_frame_equal(whole.history, stopped.history, check_exact=True)


def contents(run: Path) -> dict:
    return {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}


def test_a_damaged_checkpoint_is_a_warning_and_the_one_before_is_used(root):
    newest = root / "one/checkpoints/8.pt"
    newest.write_bytes(newest.read_bytes()[:500])
    said = one(root, "--extra-epochs", "2", small=())
    assert "lal: warning: " in said and "going on from 4.pt" in said and "10 epochs" in said
    lal(root, "--set", "seeds=null", "--name", "two", "--extra-epochs", "2", small=())
    one_run, whole = (load_run(root / name) for name in ("one", "two"))
    pd.testing.assert_frame_equal(one_run.history, whole.history, check_exact=True)
    ours, theirs = (run.checkpoint(10)["model"] for run in (one_run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_failed_extension_changes_nothing(root):
    for epoch in (4, 8): (root / f"one/checkpoints/{epoch}.pt").write_text("hello")
    before = contents(root / "one")
    said = one(root, "--extra-epochs", "2", expect=2, small=())
    assert "8.pt" in said and "overwrite it to begin anew" in said
    assert before == contents(root / "one")


def test_a_run_that_counts_steps(tmp_path):
    steps = ("--set", "steps=40", "--set", "log_every=4", "--hooks", "full")
    said = one(tmp_path, *steps)
    assert "40 steps" in said and "--extra-steps" in one(tmp_path, *steps, "--resume")
    assert "give --extra-steps" in one(tmp_path, "--extra-epochs", "2", expect=2, small=())
    one(tmp_path, "--extra-steps", "5", small=())
    run = load_run(tmp_path / "one")
    assert run.history.step.iloc[-1] == 45 and run.epochs_saved[-1] == 45 and run.summary["steps"] == 45
    assert run.history.epoch.iloc[-1] == 45 * 16 // round(0.4 * 121)
    other = one(tmp_path, *steps, "--set", "warmup_epochs=3", "--overwrite", expect=2)
    assert "warmup_epochs = 3" in other and "use warmup_steps" in other


def test_two_processes_do_not_train_one_run(root):
    with RunFolder(root / "one").locked():
        before = contents(root / "one")
        for words in (("--extra-epochs", "2"), ("--overwrite",)):
            assert "another process is training this run" in one(root, *words, expect=2, small=SMALL if "--overwrite" in words else ())
        assert before == contents(root / "one")
    one(root, "--overwrite")


def test_a_signal_in_the_last_epoch_is_not_lost(tmp_path, monkeypatch):
    log = Recorder.log

    def at_the_end(self):
        if self.state.epoch == self.config.epochs: signal.raise_signal(signal.SIGTERM)
        return log(self)

    monkeypatch.setattr(Recorder, "log", at_the_end)
    trainer = Trainer(make_config(name="x", p=7, epochs=3, device="cpu"), tmp_path)
    with pytest.raises(Interrupted): trainer.fit()
    assert load_run(tmp_path / "x").summary["status"] == "finished"


def test_overwrite_keeps_what_is_not_a_run_and_what_cannot_be_replaced(root):
    (root / "conf").mkdir()
    for name in ("config.yaml", "other.txt"): (root / "conf" / name).write_text("db: mysql\n")
    said = lal(root, "--set", "seeds=null", "--name", "conf", "--overwrite", expect=2)
    assert "not a run folder" in said and (root / "conf/other.txt").exists()
    said = one(root, "--overwrite", "--set", "hidden_dim=100000000000", expect=2)
    assert "can't be built" in said and load_run(root / "one").max_epoch == 8


DAMAGE = {
    "checkpoints are text": ("checkpoints/?.pt", b"hello"),
    "checkpoints are cut": ("checkpoints/?.pt", None),
    "config is empty": ("config.yaml", b""),
    "config is another's": ("config.yaml", b"db: 1\n"),
    "config is a list": ("config.yaml", b"- 1\n"),
    "summary is a list": ("summary.json", b"[]"),
    "summary is cut": ("summary.json", b'{"status'),
    "environment is empty": ("environment.json", b"{}"),
    "history is cut": ("history.parquet", None),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_is_one_line_and_hides_no_other(case, root):
    name, content = DAMAGE[case]
    for file in (root / "one").glob(name):
        file.write_bytes(file.read_bytes()[:100] if content is None else content)
    said = one(root, "--extra-epochs", "2", expect=2, small=())
    complaints = [line for line in said.splitlines() if line.startswith("lal: ")]
    assert len(complaints) == 1 and "one" in complaints[0] and "Traceback" not in said
    for question in ((), ("--sql", "SELECT run FROM runs JOIN history USING (run)")):
        listed = CliRunner().invoke(app, ["runs", "--root", str(root), *question])
        assert listed.exit_code == 0 and "two" in listed.output, listed.output


def test_a_checkpoint_of_another_model_is_named(root):
    file = root / "one/checkpoints/8.pt"
    save_checkpoint(file, load_checkpoint(file) | {"model": {"w": torch.zeros(3)}})
    assert "8.pt: does not fit this run" in one(root, "--extra-epochs", "2", expect=2, small=())


@pytest.mark.parametrize("words, named", [
    (("--name", ""), "name = ''"), (("--name", "x" * 300), "at most 100"), (("--name", "x.html"), "not end in .html"), (("--set", "p=1000003"), "from 2 to 1000000"),
    (("--set", "experiment=[modular]"), "experiment"), (("--set", "[1]=2"), "unknown key"), (("--set", "lr=" + "9" * 400), "must be a number"), (("--set", "p=[[[["), "not valid YAML"),
])
def test_odd_values_are_one_line(words, named, tmp_path):
    said = lal(tmp_path / "runs", *words, expect=2)
    assert named in said and said.count("\n") == 1 and not (tmp_path / "runs").exists(), said


def test_names_are_plain_text_and_other_folders_do_not_shadow_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2020-01-01").mkdir()
    said = lal(tmp_path / "runs", "--set", "seeds=null", "--name", "2020-01-01")
    assert "Open the result" in said and (tmp_path / "runs/2020-01-01.html").exists()


def test_fit_leaves_the_process_as_it_found_it(tmp_path):
    def state(): return (torch.get_rng_state().tolist(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))

    before = state()
    Trainer(make_config(name="x", p=7, epochs=3, threads=1, device="cpu"), tmp_path).fit()
    with pytest.raises(Exception): Trainer(make_config(name="y", p=7, epochs=3, threads=1, device="cpu", optimizer="sgd", lr=1e30), tmp_path).fit()
    assert state() == before


def test_accuracy_is_exact(tmp_path):
    from lal.modular.experiment import evaluate
    logits = torch.eye(2)[torch.tensor([0] * 95 + [1] * 5)]
    assert float(evaluate(lambda x: x, logits, torch.zeros(100, dtype=torch.int64))[1]) == 0.95


def test_shipped_configs_are_found_beside_a_checkout_called_lal(tmp_path):
    "A clone lies in a folder called lal; Python started in the folder above sees that folder first."
    import subprocess, sys
    (tmp_path / "lal").mkdir()
    done = subprocess.run([sys.executable, "-c", "from lal.core.config import load_config; print(load_config('quickstart').p)"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "47\n", done.stderr


def test_a_resumed_run_keeps_its_threads_and_device(tmp_path):
    begun = make_config(name="x", p=7, epochs=3, threads=1, device="cpu")
    Trainer(begun, tmp_path).fit()
    seen, log = [], Recorder.log
    trainer = Trainer(with_values(begun, threads=None, device="auto"), tmp_path)
    try:
        Recorder.log = lambda self: (seen.append((torch.get_num_threads(), self.state.device.type)), log(self))[1]
        torch.set_num_threads(2)
        trainer.fit(extra_epochs=2)
    finally: Recorder.log = log
    assert set(seen) == {(1, "cpu")} and (trainer.config.threads, trainer.config.device) == (1, "cpu")


@pytest.mark.parametrize("unit", ["epochs", "steps"])
@pytest.mark.parametrize("when", ["in the last step", "in the last checkpoint"])
def test_two_ctrl_c_at_the_very_end_leave_a_run_that_resumes(unit, when, tmp_path, monkeypatch):
    from lal.core import recorder as module
    config = make_config(name="x", p=7, hidden_dim=16, batch_size=10, checkpoint_every=3, threads=1, device="cpu", **{unit: 12})
    save = module.save_checkpoint

    def twice():
        for _ in range(2): signal.raise_signal(signal.SIGINT)

    def last_checkpoint(path, state):
        if when == "in the last checkpoint" and path.name == "12.pt": twice()
        save(path, state)

    class Hook:
        def fire(self, point, state):
            if when == "in the last step" and point == "pre_step" and state.step == (12 if unit == "steps" else 24): twice()

    monkeypatch.setattr(module, "save_checkpoint", last_checkpoint)
    with pytest.raises(KeyboardInterrupt): Trainer(config, tmp_path, hooks=Hook()).fit()
    assert RunFolder(tmp_path / "x").summary["status"] == "interrupted"
    monkeypatch.undo()
    Trainer(config, tmp_path).fit(resume=True)
    Trainer(with_values(config, name="y"), tmp_path).fit()
    one_run, whole = (load_run(name, tmp_path) for name in "xy")
    pd.testing.assert_frame_equal(one_run.history, whole.history, check_exact=True)
    assert one_run.epochs_saved == whole.epochs_saved == [3, 6, 9, 12]


def test_extra_epochs_begin_where_an_unfinished_run_would_have_ended(tmp_path):
    class Alarm:
        def fire(self, point, state):
            if point == "post_epoch" and state.epoch == 7: signal.raise_signal(signal.SIGTERM)

    config = make_config(name="x", p=7, hidden_dim=16, epochs=20, threads=1, device="cpu")
    with pytest.raises(Interrupted): Trainer(config, tmp_path, hooks=Alarm()).fit()
    Trainer(config, tmp_path).fit(extra_epochs=5)
    assert load_run("x", tmp_path).max_epoch == 25
    for wrong in (-1, 1.5):
        with pytest.raises(ValueError, match="must be a whole number"): Trainer(config, tmp_path).fit(extra_epochs=wrong)


@pytest.mark.parametrize("method", ["fire", "open", "flush", "state_dict", "row"])
def test_a_hook_that_breaks_fails_the_run_and_says_why(method, tmp_path):
    class Hook:
        def fire(self, point, state):
            if method == "row" and point == "post_step": self.folder.table("hooks/bad").append({"x": 1 if state.step % 2 else True})
            if method == "fire" and state.step == 5: raise ValueError("it broke")

        def open(self, folder):
            self.folder = folder
            if method == "open": raise ValueError("it broke")

        def flush(self):
            if method == "flush": raise ValueError("it broke")

        def state_dict(self):
            if method == "state_dict": raise ValueError("it broke")
            return {}

    config = make_config(name="x", p=7, hidden_dim=16, epochs=12, checkpoint_every=3, threads=1, device="cpu")
    with pytest.raises((ValueError, TypeError), match="it broke|column holds"): Trainer(config, tmp_path, hooks=Hook()).fit()
    summary = RunFolder(tmp_path / "x").summary
    assert summary["status"] == "failed" and ("it broke" in summary["error"] or "column holds" in summary["error"])

    class Mended:
        def fire(self, point, state): pass

    Trainer(config, tmp_path, hooks=Mended()).fit(resume=True)
    assert load_run("x", tmp_path).summary["status"] == "finished"


def test_a_run_folder_removed_in_mid_run_is_one_error_and_no_stump(tmp_path):
    import shutil

    class Hook:
        def fire(self, point, state):
            if state.step == 5 and (tmp_path / "x").exists(): shutil.rmtree(tmp_path / "x")

    config = make_config(name="x", p=7, hidden_dim=16, epochs=12, checkpoint_every=3, threads=1, device="cpu")
    with pytest.raises(OSError, match="can't be written"): Trainer(config, tmp_path, hooks=Hook()).fit()
    assert not (tmp_path / "x").exists()
    Trainer(config, tmp_path).fit()


def test_a_reader_that_a_merge_overtakes_reads_once_more(tmp_path, monkeypatch):
    from lal.core import tables
    table = tables.Table(tmp_path / "t.parquet")
    for k in range(4):
        table.append({"step": k})
        table.flush()
    files, overtaken = tables.table_files, []

    def while_merging(path):
        found = files(path)
        if not overtaken:
            overtaken.append(True)
            with monkeypatch.context() as m:      # the merged file is there, the parts are still there
                m.setattr(tables.Table, "_remove", lambda *_: None)
                table.merge()
            found = [tmp_path / "t.parquet", *found]
        return found

    monkeypatch.setattr(tables, "table_files", while_merging)
    assert tables.read_table(table.path).step.tolist() == [0, 1, 2, 3]


def test_tables_and_titles_of_a_run_that_counts_steps_are_in_steps(tmp_path):
    from lal.analysis.curves import finding, training_curves
    from lal.analysis.report import stages_table
    config = make_config(name="x", p=7, hidden_dim=16, steps=400, log_every=1, batch_size=10, lr=1e-2, threads=1, device="cpu")
    Trainer(config, tmp_path).fit()
    run = load_run("x", tmp_path)
    assert not run.history.epoch.is_unique
    table, rows = stages_table([run]), run.history
    memorised = table["memorised (step)"][0]
    assert memorised == run.summary["memorised_step"] == rows.step[rows.train_acc >= 0.99].iloc[0]
    then = rows.test_acc[rows.step == memorised].item()
    assert table["test accuracy when memorised"][0] == f"{then:.1%}"
    assert training_curves(run).layout.xaxis2.title.text == "step"
    assert f"memorised at {memorised:,}" in repr(run) and "memorised" in finding([run])
