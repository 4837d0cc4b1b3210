"The command line, used as a person would use it: in an empty folder. In its own process where signals, a terminal or imports matter."
import contextlib, fcntl, json, os, pty, re, shutil, signal, struct, subprocess, sys, termios, textwrap, time
from pathlib import Path
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner
from lal.analysis.runs import load_run
from lal.app.cli import app
from lal.core.run import RunFolder

LAL = [sys.executable, "-c", "from lal.app.cli import main; main()"]
SMALL = ["--set", "p=11", "--set", "batch_size=16", "--set", "seeds=null", "--set", "device=cpu"]


def lal(*words, cwd, expect=0):
    "Call the command line in this process; what it printed has `stdout` and `stderr`."
    with contextlib.chdir(cwd): done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == expect, f"lal {' '.join(map(str, words))}: exit {done.exit_code}, not {expect}\n{done.output}"
    return done


def lal_alone(*words, cwd, expect=0):
    "Call it in a process of its own."
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
    "a hook's option": ("hooks: {hessian: {epsilom: 1}}\n", ("hooks.hessian.epsilom = 1", "did you mean 'epsilon'?")),
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
    (("train", "quickstart", "--hooks", "hesian"), "did you mean 'hessian'?"), (("train", "quickstart", "--hooks", ""), "no hook or set is called ''"),
    (("train", "quickstart", "--hooks", "none,norms"), "'none' stands alone"), (("train", "quickstart", "--hooks", "full", "--set", "hooks=none"), "give one"),
    (("train", "quickstart", "--hooks", "full", "--hook", "hesian.epsilon=1"), "did you mean 'hessian'?"), (("train", "quickstart", "--set", "hooks.hessian.epsilon=fast"), "hooks.hessian.epsilon = fast"),
    (("train", "quickstart", "--hooks", "full", "--hook", "hessian.epsilom=1"), "did you mean 'epsilon'?"), (("train", "quickstart", "--hooks", "full", "--hook", "hessian.epsilon=fast"), "must be a number or null"),
    (("train", "quickstart", "--hooks", "full", "--hook", "hessian.epsilon=[["), "not valid YAML"), (("train", "quickstart", "--hooks", "full", "--hook", "epsilon=1"), "name.option=value"),
    (("train", "quickstart", "--hooks", "full", "--hook", "hessian.burst_length=0"), "must be 1 or larger"), (("train", "quickstart", "--hooks", "full", "--hook", "minimal.x=1"), "is a set"),
    (("train", "quickstart", "--hooks", "full", "--set", "reference=nowhere"), "reference = nowhere"), (("train", "quickstart", "--hooks", "none", "--profile"), "--profile"),
    (("train", "quickstart", "--hooks", "full", "--reference", "nowhere"), "reference = nowhere"), (("train", "quickstart", "--hooks", "full", "--reference", "a", "--set", "reference=b"), "give one"),
    (("train", "quickstart", "--hooks", "none", "--reference", "a"), "no hook that compares is on"), (("train", "quickstart", "--hooks", "norms", "--reference", "a"), "or one of"),
    (("train", "quickstart", "--set", "steps=50"), "this run counts steps: use warmup_steps"),
    (("hooks", "describe", "hesian"), "did you mean 'hessian'?"), (("hooks", "describe", "norms", "--import", "no/such.py"), "imports = no/such.py"), (("hooks", "describe", "full"), "is a set"),
    (("configs", "--keys", "--experiment", "modula"), "did you mean 'modular'?"), (("configs", "--schema", "--experiment", "modula"), "did you mean 'modular'?"), (("report", "nothing"), "nothing"),
])
def test_wrong_usage_is_one_line_and_exit_2(words, named, tmp_path):
    done = lal(*words, cwd=tmp_path, expect=2)
    assert named in done.stderr and done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == [], done.stderr


@pytest.mark.parametrize("words, code", [(("--help",), 0), (("nonsense",), 2), (("train", "--help"), 0), (("train", "quikstart"), 2), (("train", "quickstart", "--set", "lrr=3"), 2), (("train", "my.yaml"), 2), (("configs",), 0), (("configs", "--keys"), 0)])
def test_help_and_a_wrong_call_load_nothing_heavy(words, code, tmp_path):
    (tmp_path / "my.yaml").write_text("train_frac: 1.5\n")
    watched = textwrap.dedent("""
        import atexit, sys
        atexit.register(lambda: print("loaded:", *sorted({"torch", "pandas", "pyarrow", "duckdb", "plotly", "scipy"} & {*sys.modules})))
        from lal.app.cli import main; main()
    """)
    done = subprocess.run([sys.executable, "-c", watched, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and done.stdout.splitlines()[-1] == "loaded:", done.stdout + done.stderr


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    (tmp_path / "my.yaml").write_text("eps: 1e-8\nlr: 1e-3\np: 7\nepochs: 2\n")
    lal("train", "my.yaml", cwd=tmp_path)
    config = RunFolder(tmp_path / "runs/my").config
    assert (config.eps, config.lr) == (1e-8, 1e-3)
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
    page = (tmp_path / "runs/quickstart.html").read_text()
    (tmp_path / "runs/quickstart.html").unlink()
    said = lal("report", "quickstart_seed0", "runs/quickstart_seed1", "--output", "two.html", cwd=tmp_path).stdout
    assert said.strip().endswith((tmp_path / "two.html").resolve().as_uri())
    two = (tmp_path / "two.html").read_text()
    assert "quickstart_seed1" in two and "quickstart_seed2" not in two and "quickstart_seed2" in page
    lal("report", "quickstart_seed2", cwd=tmp_path)
    assert (tmp_path / "runs/quickstart_seed2.html").exists()
    (tmp_path / "full").mkdir()
    refused = lal("report", "quickstart_seed2", "--output", "full", cwd=tmp_path, expect=2)
    assert "is a folder" in refused.stderr


def test_the_same_seed_twice_is_the_same_bits_in_two_processes(tmp_path):
    for name in ("one", "two"): lal_alone("train", "quickstart", *SMALL, "--set", "epochs=30", "--name", name, cwd=tmp_path)
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    pd.testing.assert_frame_equal(pd.read_parquet(one / "history.parquet"), pd.read_parquet(two / "history.parquet"), check_exact=True)
    a, b = (torch.load(p / "checkpoints/30.pt", weights_only=True)["model"] for p in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (one / "history.parquet").read_bytes() == (two / "history.parquet").read_bytes()


LONG = [*SMALL, "--set", "epochs=200", "--set", "checkpoint_every=20"]


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    "The run of `LONG`, never interrupted."
    root = tmp_path_factory.mktemp("straight")
    lal("train", "quickstart", *LONG, "--name", "straight", cwd=root)
    return root / "runs/straight"


def started(cwd, *words):
    "The process of a run, named by the last word, that has written its first checkpoint."
    process = subprocess.Popen([*LAL, "train", *words], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (cwd / "runs" / words[-1] / "checkpoints/20.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_resumes_and_ends_where_it_would_have_ended(how, tmp_path, straight):
    process = started(tmp_path, "quickstart", *LONG, "--name", "stopped")
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
    pd.testing.assert_frame_equal(pd.read_parquet(run / "history.parquet"), pd.read_parquet(straight / "history.parquet"), check_exact=True)
    a, b = (torch.load(p / "checkpoints/200.pt", weights_only=True)["model"] for p in (run, straight))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


def test_an_experiment_of_ones_own_is_trained_killed_resumed_listed_queried_and_reported(tmp_path):
    for file in (Path(__file__).parents[1] / "second").glob("teacher_student.*"): shutil.copy(file, tmp_path)
    words = ["teacher_student.yaml", "--set", "epochs=200", "--set", "hooks={norms: {}, hessian: {every_n_steps: 40, burst_length: 4}}"]
    process = started(tmp_path, *words, "--name", "killed")
    process.kill()
    process.communicate(timeout=60)
    assert "running" in lal("runs", cwd=tmp_path).stdout
    done = lal_alone("train", *words, "--name", "killed", "--resume", cwd=tmp_path)
    assert "killed: teacher and student, 3 inputs, width 8, seed 1, on " in done.stderr and "killed: converged at epoch " in done.stdout and "accuracy" not in done.stdout, done.stdout
    lal_alone("train", *words, "--name", "straight", cwd=tmp_path)
    for table in ("history", "hooks/norms", "hooks/hessian", "hooks/training_metrics"):
        one, two = (pd.read_parquet(tmp_path / f"runs/{name}/{table}.parquet") for name in ("killed", "straight"))
        pd.testing.assert_frame_equal(one, two, check_exact=True)
    listed = lal("runs", cwd=tmp_path).stdout                       # nothing below imports the experiment
    assert "teacher and student, 3 inputs, width 8" in listed and "converged" in listed and "acc" not in listed and "grok" not in listed
    answer = lal("runs", "--sql", "SELECT run, converged_epoch, round(min(test_loss), 6) AS best FROM history JOIN runs USING (run) GROUP BY ALL ORDER BY run", cwd=tmp_path).stdout.splitlines()
    assert answer[1].split()[1:] == answer[2].split()[1:] and len(answer) == 3
    lal("report", "killed", "straight", "--output", "page.html", cwd=tmp_path)
    page = re.sub("<script.*?</script>", "", (tmp_path / "page.html").read_text(), flags=re.S)      # plotly knows the word accuracy
    assert "teacher and student" in page and "converged" in page and "accuracy" not in page


def test_a_failed_run_is_exit_1_and_says_why(tmp_path):
    done = lal("train", "quickstart", *SMALL, "--set", "optimizer=sgd", "--set", "lr=1e6", "--set", "grad_clip=null", "--set", "warmup_epochs=0", cwd=tmp_path, expect=1)
    assert "stopped being finite in epoch 1;" in done.stderr and "lr = 1e+06" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "runs/quickstart/summary.json").read_text())["status"] == "failed"


def test_help_is_a_page_to_start_from(tmp_path):
    for words in (("--help",), ("train", "--help"), ("configs", "--help"), ("hooks", "--help"), ("runs", "--help"), ("report", "--help"), ("hooks",), ("hooks", "describe", "hessian"), ("doctor",), ("configs",), ("configs", "--keys"), ("configs", "show", "quickstart")):
        assert len(lal(*words, cwd=tmp_path).stdout) > 200
    assert "lal train quickstart" in lal("--help", cwd=tmp_path).stdout
    assert "lal train quickstart" in lal_alone("--help", cwd=tmp_path).stdout


def test_the_schema_knows_every_key_and_every_option_of_a_hook(tmp_path):
    import jsonschema                                  # nbformat needs it
    from lal.core.config import shipped_configs
    from lal.core.keys import read_yaml
    schema = json.loads(lal("configs", "--schema", cwd=tmp_path).stdout)
    text = json.dumps(schema)
    listed = {line.split()[0] for line in lal("configs", "--keys", cwd=tmp_path).stdout.splitlines()[1:]}
    assert all(f'"{key}"' in text for key in ("weight_decay", "train_frac", "epsilon", "burst_length", *listed))
    names = [line.split()[0] for line in lal("configs", cwd=tmp_path).stdout.splitlines()[1:]]
    assert names == [*shipped_configs()] and "validate_transformer_half" in names
    refuse = jsonschema.Draft202012Validator(schema)
    for file in shipped_configs().values(): assert not [*refuse.iter_errors(read_yaml(file))], file
    for fine in ({"hooks": "norms,hessian"}, {"hooks": None}, {"hooks": {"hessian": {"epsilon": 1e-3}, "full": {}}}, {"p": 23}, {"modular": {"p": 23}}): assert refuse.is_valid(fine), fine
    for wrong in ({"lrr": 1}, {"lr": "fast"}, {"lr": -1}, {"hooks": {"hessian": {"epsilom": 1}}}, {"hooks": {"hesian": {}}}, {"modular": {"q": 1}}, {"experiment": "energies"}): assert not refuse.is_valid(wrong), wrong


WATCHED = (*SMALL, "--set", "epochs=24", "--set", "log_every=4", "--hooks", "norms,hessian", "--hook", "hessian.every_n_steps=20", "--hook", "hessian.burst_length=4")


def test_a_watched_run_leaves_a_table_for_each_hook_and_goes_on_as_it_began(tmp_path):
    done = lal("train", "quickstart", *WATCHED, "--name", "x", "--profile", cwd=tmp_path)
    table = [line.split() for line in done.stdout.splitlines() if line.startswith(("hook ", "hessian ", "norms ", "training_metrics "))]
    assert table[0][:3] == ["hook", "event", "firings"] and ["hessian", "pre_step", "12"] in [row[:3] for row in table]
    assert 0 < sum(float(row[-1].rstrip("%")) for row in table[1:]) < 100 and "\x1b" not in done.stdout + done.stderr
    run = tmp_path / "runs/x"
    assert sorted(p.name for p in (run / "hooks").iterdir()) == ["hessian.parquet", "norms.parquet", "training_metrics.parquet"]
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    for words, named in ((("--hook", "hessian.burst_length=5"), "hooks.hessian.burst_length = 5: the run has 4"), (("--hook", "hessian.epsilon=null"), "hooks.hessian.epsilon = null: the run has 0.0001"),
                         (("--set", "hooks={norms: {}, hessian: {burst_length: 5}}"), "the run has 4"), (("--hooks", "full", "--hook", "norms.every_n_epochs=3"), "hooks.norms.every_n_epochs = 3: the run has null")):
        refused = lal("train", "quickstart", "--name", "x", "--set", "seeds=null", "--resume", *words, cwd=tmp_path, expect=2)
        assert named in refused.stderr and "goes on as it began" in refused.stderr and refused.stderr.count("\n") == 1 and refused.stdout == "", refused.stderr
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before
    for words in ((), ("--hooks", "hessian,norms,training_metrics"), ("--set", "hooks=[norms, hessian]"), ("--hook", "hessian.epsilon=1e-4"), ("--set", "hooks.hessian={burst_length: 4}"), ("--hooks", "full"), ("--set", "hooks=none")):
        assert "finished already" in lal("train", "quickstart", "--name", "x", "--set", "seeds=null", "--resume", *words, cwd=tmp_path).stdout
    lal("train", "quickstart", "--name", "x", "--set", "seeds=null", "--extra-epochs", "4", cwd=tmp_path)
    assert pd.read_parquet(run / "hooks/norms.parquet").epoch.tolist() == [4, 8, 12, 16, 20, 24, 28]


def test_a_run_goes_on_with_the_hooks_that_are_named_and_else_with_those_it_has(tmp_path):
    lal("train", "quickstart", *WATCHED, "--name", "x", cwd=tmp_path)
    run, began = tmp_path / "runs/x", {"norms": {}, "hessian": {"every_n_steps": 20, "burst_length": 4}}
    assert RunFolder(run).config.hooks == began
    other, steps = "lal: warning: the run goes on with other hooks: ", len(pd.read_parquet(run / "hooks/hessian.parquet"))
    for words, said, hooks in (
        ((), "", began),
        (("--hooks", "norms,consecutive"), f"{other}consecutive watches from here on, hessian no longer watches\n", {"training_metrics": {}, "norms": {}, "consecutive": {}}),
        ((), "", {"training_metrics": {}, "norms": {}, "consecutive": {}}),
        (("--hook", "hessian.every_n_steps=4"), f"{other}hessian watches from here on\n", {"training_metrics": {}, "norms": {}, "consecutive": {}, "hessian": {"every_n_steps": 4}}),
        (("--hooks", "none"), "lal: warning: the run goes on without the hooks it had\n", {}),
        (("--hooks", "norms"), "lal: warning: the run goes on with hooks; it had none\n", {"norms": {}}),
    ):
        done = lal("train", "quickstart", "--name", "x", "--set", "seeds=null", "--extra-epochs", "4", *words, cwd=tmp_path)
        assert "".join(line + "\n" for line in done.stderr.splitlines() if "goes on" in line) == said, (words, done.stderr)
        found = RunFolder(run).config.hooks
        assert found.keys() - {"training_metrics"} == hooks.keys() - {"training_metrics"} and all(found[name].items() >= hooks[name].items() for name in found if name in hooks), words
    assert pd.read_parquet(run / "hooks/norms.parquet").epoch.tolist() == [*range(4, 41, 4), 48]
    assert pd.read_parquet(run / "hooks/consecutive.parquet").epoch.tolist() == [32, 36, 40]
    assert len(pd.read_parquet(run / "hooks/hessian.parquet")) > steps  # none was lost


def test_an_interrupted_watched_run_resumes_with_the_printed_line_and_has_the_same_rows(tmp_path):
    words = [w.replace("epochs=24", "epochs=100") for w in WATCHED] + ["--set", "checkpoint_every=20"]
    process = started(tmp_path, "quickstart", *words, "--name", "x")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--hooks norms,hessian --hook hessian.every_n_steps=20 --hook hessian.burst_length=4" in err, err
    lal(*err.split("Continue with:  ")[1].splitlines()[0].split()[1:], cwd=tmp_path)
    lal("train", "quickstart", *words, "--name", "y", cwd=tmp_path)
    for table in ("history", "hooks/norms", "hooks/hessian", "hooks/training_metrics"):
        one, two = (pd.read_parquet(tmp_path / f"runs/{name}/{table}.parquet") for name in "xy")
        pd.testing.assert_frame_equal(one, two, check_exact=True)


def test_options_of_hooks_are_keys_like_others(tmp_path):
    (tmp_path / "my.yaml").write_text("p: 7\nepochs: 3\ndevice: cpu\nhooks: {norms: {every_n_epochs: 2}, hessian: {epsilon: 1e-3}}\n")
    words = {"a": ("--hooks", "none"), "b": ("--hooks", "minimal"), "c": ("--hook", "hessian.check_every=3"), "d": ("--hooks", "norms", "--hook", "consecutive.from_epoch=1"),
             "e": ("--set", "hooks.hessian.epsilon=1e-2", "--set", "hooks.norms={}")}
    for name, more in words.items(): lal("train", "my.yaml", *more, "--name", name, cwd=tmp_path)
    runs = {name: load_run(tmp_path / "runs" / name) for name in words}
    hooks = {name: RunFolder(run.path).config.hooks for name, run in runs.items()}
    assert hooks["a"] == {} and not (tmp_path / "runs/a/hooks").exists()
    assert runs["b"].hooks == ["norms", "training_metrics"]
    assert hooks["c"]["hessian"].items() >= {"epsilon": 1e-3, "check_every": 3}.items() and hooks["c"]["norms"]["every_n_epochs"] == 2
    assert runs["d"].hooks == ["consecutive", "norms", "training_metrics"] and hooks["d"]["consecutive"]["from_epoch"] == 1     # an option switches its hook on
    assert hooks["e"]["hessian"]["epsilon"] == 1e-2


@pytest.mark.parametrize("words", [("--set", "reference=small"), ("--reference", "small")])
def test_a_reference_that_does_not_fit_is_one_line_and_nothing_is_written(words, tmp_path):
    lal("train", "quickstart", *SMALL, "--set", "epochs=12", "--hooks", "none", "--name", "small", cwd=tmp_path)
    done = lal("train", "quickstart", "--set", "device=cpu", "--hooks", "full", *words, cwd=tmp_path, expect=2)
    assert "tokens.weight is [49, 64] in the model and [13, 64] in the reference" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(p.name for p in (tmp_path / "runs").glob("[!.]*")) == ["small", "small.html"]


def test_a_reference_is_given_by_name_path_or_checkpoint(tmp_path):
    short = (*SMALL, "--set", "epochs=12", "--hook", "hessian.every_n_steps=10", "--hook", "hessian.burst_length=3")
    lal("train", "quickstart", *SMALL, "--set", "epochs=14", "--name", "7", cwd=tmp_path)  # a name that reads like a number
    for n, which in enumerate(("7", "runs/7", tmp_path / "runs/7", "runs/7/checkpoints/14.pt")):
        lal("train", "quickstart", *short, "--reference", str(which), "--name", f"to_{n}", cwd=tmp_path)
        rows = pd.read_parquet(tmp_path / f"runs/to_{n}/hooks/hessian.parquet")
        assert len(rows) and rows.content_cossim_to_solution.between(-1, 1).all(), which
        assert RunFolder(tmp_path / f"runs/to_{n}").config.reference == str(which)
    lal("train", "quickstart", *short, "--name", "to_0", "--extra-epochs", "5", "--reference", "7", cwd=tmp_path)
    refused = lal("train", "quickstart", *short, "--name", "to_0", "--resume", "--reference", "runs/7", cwd=tmp_path, expect=2)
    assert "goes on as it began" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_hook_in_a_file_of_ones_own_is_described_and_trained_with(tmp_path):
    (tmp_path / "own.py").write_text(textwrap.dedent("""
        from lal.hooks.hook import Hook, Metric
        from lal.hooks.registry import register

        @register
        class CountsAlong(Hook):
            "How many epochs have passed?"
            metrics = (Metric("n", "n", (0, None), "epochs so far"),)
            def post_epoch(self, state): return {"n": float(state.epoch)}
    """))
    assert "counts_along: How many epochs have passed?" in lal_alone("hooks", "describe", "counts_along", "--import", "own.py", cwd=tmp_path).stdout
    assert "How many epochs" in lal_alone("hooks", "--import", "own.py", cwd=tmp_path).stdout
    lal_alone("train", "quickstart", *SMALL, "--set", "epochs=12", "--set", "imports=[own.py]", "--hooks", "counts_along", "--name", "own", cwd=tmp_path)
    assert pd.read_parquet(tmp_path / "runs/own/hooks/counts_along.parquet").n.tolist() == [*range(1, 13)]


def test_a_hook_that_raises_is_one_line_and_exit_1_or_counted(tmp_path, monkeypatch):
    from lal.hooks.norms import Norms

    def breaks(self, state): raise ValueError("it broke")

    monkeypatch.setattr(Norms, "post_epoch", breaks)
    words = ["train", "quickstart", *SMALL, "--set", "epochs=12", "--set", "log_every=4", "--hooks", "norms"]
    done = lal(*words, "--name", "x", cwd=tmp_path, expect=1)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("lal: hook norms, step ") and "it broke" in last and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "runs/x/summary.json").read_text())["status"] == "failed"
    done = lal(*words, "--name", "y", "--set", "on_error=skip", cwd=tmp_path)
    assert done.stderr.count("it broke") == 1 and "lal: hook norms: raised, 3 times\n" in done.stderr, done.stderr


def in_a_terminal(*words, cwd, columns=80):
    "What a terminal of so many columns shows."
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")} | {"TERM": "xterm-256color"}
    process = subprocess.Popen([*LAL, *words], cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536): shown += chunk
    except OSError: pass                               # the other end is closed
    assert process.wait(timeout=60) == 0, shown
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "")


def test_a_hook_is_described_in_80_columns_and_in_a_pipe_in_a_line_each(tmp_path):
    from lal.hooks.registry import REGISTRY
    for words in (("hooks",), ("hooks", "describe", "hessian")):
        lines = in_a_terminal(*words, cwd=tmp_path).splitlines()
        assert max(map(len, lines)) <= 80 and sum(line.strip() != "" for line in lines) > 15
    at = next(i for i, line in enumerate(lines) if line.startswith("content_norm "))
    assert lines[at].split() == ["content_norm", "[0,", "∞)", "‖g_B‖"] and lines[at + 1].strip() == "B's own gradient, at the weights before A"
    for hook in REGISTRY.values():
        piped = lal("hooks", "describe", hook.name, cwd=tmp_path).stdout.splitlines()
        for metric in hook.metrics: assert any(line.startswith(f"{metric.name} ") and metric.meaning in line for line in piped), metric.name
    listed = lal("hooks", cwd=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in listed[1 : 1 + len(REGISTRY)]] == [*REGISTRY]
