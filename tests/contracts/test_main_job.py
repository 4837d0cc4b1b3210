"The main job, run for real: three seeds memorise, and grok later."
from statistics import median
from lal.analysis.report import report_html
from lal.analysis.runs import load_run
from lal.core.config import load_config, one_per_seed, with_values
from lal.core.trainer import Trainer
from lal.hooks.registry import create_hooks


def test_quickstart_groks_for_most_seeds_with_memorising_and_generalising_apart(tmp_path):
    configs = one_per_seed(with_values(load_config("quickstart"), device="cpu"))
    assert len(configs) >= 3
    runs = [load_run(Trainer(c, tmp_path, hooks=create_hooks(c)).fit().path) for c in configs]
    for run in runs:
        assert run.history.step.iloc[-1] >= 4 * run.max_epoch, "at least four batches per epoch"
    grokked = [run for run in runs if run.milestones["grok"] is not None]
    assert len(grokked) >= 2, f"{len(grokked)} of {len(runs)} seeds grokked"
    late = [run.milestones["grok"] / run.milestones["memorised"] for run in grokked]
    assert median(late) >= 2, f"grokked / memorised: {late}, not visibly apart"
    page = report_html(runs)
    assert " grokked: " in page and "99% train" in page and "95% test" in page
