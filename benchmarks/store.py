"""Seconds for a query over 1,000 runs of 1,000 rows with five hooks each: with one table opened, and with all of them.

    python benchmarks/store.py

The queries take turns, six rounds; the first includes reading what the store keeps between queries.
"""
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from lal.analysis.store import RunStore
from lal.core.config import make_config
from lal.core.device import environment
from lal.core.experiment import declaration, find_experiment
from lal.core.run import create_run, summarize

RUNS, ROWS, METRICS = 1000, 1000, {"hessian": 12, "norms": 14, "consecutive": 2, "fourier": 12, "training_metrics": 3}
QUERIES = {
    "runs alone": "SELECT run FROM runs WHERE grok_epoch > 10",
    "history, grouped": "SELECT run, max(test_acc) FROM history GROUP BY run",
    "one hook, grouped": "SELECT run, median(m0) FROM hessian GROUP BY run",
    "hook and history, joined": "SELECT run, count(*) FROM hessian JOIN history USING (run, epoch) GROUP BY run",
    "metrics": "SELECT hook, count(*) FROM metrics GROUP BY hook",
    "all tables opened": "SHOW TABLES",
}


def make_runs(root: Path) -> None:
    "One run, written as a trainer writes it, and copies of it."
    rng = np.random.default_rng(0)
    config, modular = make_config(name="run0", p=23), find_experiment("modular")
    folder = create_run(root, config, environment())
    folder.table("history", {"lal.experiment": json.dumps(declaration(modular, config))})
    for epoch in range(ROWS):
        folder.log({"epoch": epoch, "step": epoch, "train_acc": float(epoch > 50), "test_acc": float(epoch > 300),
                    **{name: rng.random() for name in ("train_loss", "test_loss", "lr", "total_weight_norm")}})
    for hook, n in METRICS.items():
        metrics = [{"name": f"m{k}", "formula": "x", "low": 0, "high": None, "meaning": "made up"} for k in range(n)]
        table = folder.table(f"hooks/{hook}", {"lal.hook": json.dumps({"name": hook, "metrics": metrics})})
        for epoch in range(ROWS): table.append({"epoch": epoch, "step": epoch, **{f"m{k}": rng.random() for k in range(n)}})
    folder.merge()
    folder.write_summary(summarize(folder.history, modular, "finished"))
    for k in range(1, RUNS): shutil.copytree(folder.path, root / f"run{k}")


def main() -> None:
    machine = environment()
    print(f"{RUNS:,} runs of {ROWS:,} rows, {len(METRICS)} hooks; {machine['device_name']}")
    with tempfile.TemporaryDirectory() as root:
        make_runs(Path(root))
        store, seconds = RunStore(root), {name: [] for name in QUERIES}
        for _ in range(6):
            for name, sql in QUERIES.items():
                begun = time.perf_counter()
                store.query(sql)
                seconds[name].append(time.perf_counter() - begun)
    for name, (first, *later) in seconds.items():
        print(f"{name:25s} first {first:5.2f} s, then median {np.median(later):5.2f} s")


if __name__ == "__main__": main()
