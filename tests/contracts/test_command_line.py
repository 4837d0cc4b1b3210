"The command line, used as a person would use it: in its own process, in an empty folder."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pandas as pd
import pytest
import torch
from lal.analysis.runs import load_run

LAL = [sys.executable, "-c", "from lal.app.cli import main; main()"]
SMALL = ["--set", "p=11", "--set", "batch_size=16", "--set", "seeds=null", "--set", "device=cpu"]


def lal(*words, cwd, expect=0):
    done = subprocess.run([*LAL, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, f"lal {' '.join(map(str, words))}: exit {done.returncode}, not {expect}\n{done.stdout}\n{done.stderr}"
    return done


WRONG = {
    "unknown key": ("weigth_decay: 1.0\n", ("weigth_decay", "1.0", "did you mean 'weight_decay'?")),
    "train_frac": ("train_frac: 1.5\n", ("train_frac = 1.5", "strictly between 0 and 1")),
    "heads": ("model_type: transformer\nhidden_dim: 64\nn_heads: 5\n", ("n_heads = 5", "hidden_dim = 64")),
    "divide": ("operation: divide\np: 15\n", ("p = 15", "prime")),
    "ordering": ("ordering: stride\n", ("ordering = stride", "batch_size")),
    "not a mapping": ("- p\n- 23\n", ("must be a mapping",)),
    "not YAML": ("p: [23\n", ("not valid YAML", "line")),
    "twice": ("p: 23\np: 31\n", ("'p' is given twice",)),
    "experiment": ("experiment: energies\n", ("experiment = energies", "modular")),
    "type": ("lr: fast\n", ("lr = fast", "must be a number")),
    "name": ("name: ../elsewhere\n", ("name = ../elsewhere",)),
    "device": ("device: cuda:99\n", ("device = cuda:99", "not available")),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_configuration_is_one_line_exit_2_and_no_run_folder(case, tmp_path):
    text, named = WRONG[case]
    (tmp_path / "my.yaml").write_text(text)
    done = lal("train", "my.yaml", cwd=tmp_path, expect=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert "my.yaml" in done.stderr and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in named), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["my.yaml"]


@pytest.mark.parametrize("words, named", [
    (("train", "quikstart"), "did you mean 'quickstart'?"), (("train", "no/such.yaml"), "no/such.yaml"), (("train",), "name one configuration"),
    (("train", "quickstart", "--set", "p"), "key=value"), (("train", "quickstart", "--resume"), "no run to continue"), (("runs",), "there is no such folder"),
    (("train", "quickstart", "--set", "n_heads=7"), "n_heads = 7"), (("configs", "show", "nothing"), "nothing"),
])
def test_wrong_usage_is_one_line_and_exit_2(words, named, tmp_path):
    done = lal(*words, cwd=tmp_path, expect=2)
    assert named in done.stderr and done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == [], done.stderr


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    (tmp_path / "my.yaml").write_text("eps: 1e-8\nlr: 1e-3\np: 7\nepochs: 2\n")
    lal("train", "my.yaml", cwd=tmp_path)
    assert "eps: 1.0e-08" in (tmp_path / "runs/my/config.yaml").read_text()


def test_a_run_and_its_page(tmp_path):
    done = lal("train", "quickstart", "--set", "p=11", "--set", "batch_size=16", "--set", "epochs=12", cwd=tmp_path)
    assert "quickstart_seed2: " in done.stdout and "\x1b" not in done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("Open the result:") and last.endswith(f"{(tmp_path / 'runs/quickstart.html').resolve().as_uri()}")
    runs = lal("runs", cwd=tmp_path).stdout
    assert all(f"quickstart_seed{k}" in runs for k in range(3))
    again = lal("train", "quickstart", cwd=tmp_path, expect=2)
    assert "exists already" in again.stderr
    assert "p=11" not in again.stderr and len(list((tmp_path / "runs").glob("*/summary.json"))) == 3


def test_the_same_seed_twice_is_the_same_bits_in_two_processes(tmp_path):
    for name in ("one", "two"): lal("train", "quickstart", *SMALL, "--set", "epochs=30", "--name", name, cwd=tmp_path)
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    pd.testing.assert_frame_equal(pd.read_parquet(one / "history.parquet"), pd.read_parquet(two / "history.parquet"), check_exact=True)
    a, b = (torch.load(p / "checkpoints/30.pt", weights_only=True)["model"] for p in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (one / "history.parquet").read_bytes() == (two / "history.parquet").read_bytes()


def started(tmp_path, name):
    "A run of 600 epochs that has written its first checkpoint."
    process = subprocess.Popen([*LAL, "train", "quickstart", *SMALL, "--set", "epochs=600", "--set", "checkpoint_every=20", "--name", name], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs" / name / "checkpoints/20.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_resumes_and_ends_where_it_would_have_ended(how, tmp_path):
    process = started(tmp_path, "stopped")
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    run = tmp_path / "runs/stopped"
    if how == signal.SIGKILL:
        assert not (run / "summary.json").exists()
        assert "running" in lal("runs", cwd=tmp_path).stdout
        command = ["train", "quickstart", "--resume", "--name", "stopped", "--set", "seeds=null"]
    else:
        assert process.returncode == 130 and "Continue with:  lal train quickstart --set p=11" in err and "Traceback" not in err, err
        assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
        command = err.split("Continue with:  ")[1].splitlines()[0].split()[1:]     # the printed line is the one that works
    assert len(load_run(run).history) > 1
    lal(*command, cwd=tmp_path)
    lal("train", "quickstart", *SMALL, "--set", "epochs=600", "--set", "checkpoint_every=20", "--name", "straight", cwd=tmp_path)
    straight = tmp_path / "runs/straight"
    pd.testing.assert_frame_equal(pd.read_parquet(run / "history.parquet"), pd.read_parquet(straight / "history.parquet"), check_exact=True)
    a, b = (torch.load(p / "checkpoints/600.pt", weights_only=True)["model"] for p in (run, straight))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


def test_a_failed_run_is_exit_1_and_says_why(tmp_path):
    done = lal("train", "quickstart", *SMALL, "--set", "optimizer=sgd", "--set", "lr=1e6", "--set", "grad_clip=null", "--set", "warmup_epochs=0", cwd=tmp_path, expect=1)
    assert "stopped being finite in epoch 1;" in done.stderr and "lr = 1e+06" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "runs/quickstart/summary.json").read_text())["status"] == "failed"


def test_help_is_a_page_to_start_from(tmp_path):
    for words in (("--help",), ("train", "--help"), ("configs", "--help"), ("runs", "--help"), ("doctor",), ("configs",), ("configs", "--keys"), ("configs", "show", "quickstart")):
        assert len(lal(*words, cwd=tmp_path).stdout) > 200
    assert "lal train quickstart" in lal("--help", cwd=tmp_path).stdout
