"The main job, run for real: three seeds memorise, and grok later."
from lal.analysis.report import report_html
from lal.analysis.runs import load_run
from lal.core.config import load_config, one_per_seed, with_values
from lal.core.trainer import Trainer
from lal.hooks.registry import create_hooks


def test_quickstart_groks_for_three_seeds_with_memorising_and_generalising_apart(tmp_path):
    configs = one_per_seed(with_values(load_config("quickstart"), device="cpu"))
    assert len(configs) >= 3
    runs = [load_run(Trainer(c, tmp_path, hooks=create_hooks(c)).fit().path) for c in configs]
    for run in runs:
        assert run.history.step.iloc[-1] >= 4 * run.max_epoch, "at least four batches per epoch"
        assert run.has_grokked, f"{run.name} did not grok"
        assert run.grok_epoch >= 2 * run.memorised_epoch, f"{run.name}: memorised at {run.memorised_epoch}, grokked at {run.grok_epoch}: not visibly apart"
    page = report_html(runs)
    assert "All 3 runs grokked" in page and "99% train" in page and "95% test" in page
