"Runs made before experiments declared their columns: a tiny one, trained by the code of that time, is read like any other."
import shutil
from pathlib import Path

from lal.analysis.curves import finding, training_curves
from lal.analysis.report import write_report
from lal.analysis.runs import list_runs, load_run, runs_table
from lal.analysis.store import RunStore

BEFORE = Path(__file__).parents[1] / "data" / "run_before_experiments"


def test_tables_summary_and_milestones_are_read():
    run = load_run(BEFORE)
    assert run.milestones == {"memorised": 80, "grok": 220} and run.when("grok", "step") == 880
    assert run.headline == "test_acc" and run.history.test_acc.max() == run.summary["best_test_acc"]
    assert run.config["p"] == 23 and "operation add" in run.about and "operation add" in run.ran_on
    assert run.hooks == ["norms"] and len(run.hook("norms")) == 40 and len(run.declared("norms"))
    assert "memorised at 80, grokked at 220" in repr(run)


def test_words_and_figures():
    run = load_run(BEFORE)
    assert finding([run]) == "The run grokked: at epoch 220, memorised at 80"
    figure = training_curves(run)
    assert figure.layout.yaxis.tickformat == ".0%" and figure.layout.yaxis2.type == "log"
    assert sorted(t.x[0] for t in figure.data if t.mode == "markers") == [80, 220]


def test_table_store_and_page(tmp_path):
    shutil.copytree(BEFORE, tmp_path / "old")
    table = runs_table(list_runs(tmp_path))
    assert table[["memorised", "grokked"]].values.tolist() == [[80, 220]]
    rows = RunStore(tmp_path).query("SELECT run, p, grok_epoch, best_test_acc FROM runs JOIN (SELECT run, count(*) AS n FROM history GROUP BY run) USING (run) WHERE n = 41")
    assert rows[["run", "p", "grok_epoch"]].values.tolist() == [["old", 23, 220]]
    assert "The run grokked" in write_report(load_run("old", tmp_path), tmp_path / "old.html").read_text("utf-8")


def test_one_that_is_still_running_is_read(tmp_path):
    shutil.copytree(BEFORE, tmp_path / "old")
    (tmp_path / "old" / "summary.json").unlink()
    run = load_run("old", tmp_path)
    assert run.headline == "test_acc" and run.milestones == {} and "test acc 98.6%" in repr(run)
