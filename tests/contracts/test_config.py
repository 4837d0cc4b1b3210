"Configurations: whatever is given is read or refused in one line, and what is written reads back equal, by every reader of YAML."
import json, subprocess, sys
import pytest
import yaml
from hypothesis import given, settings, strategies as st
from jsonschema import Draft202012Validator
from lal.core.config import config_keys, config_schema, load_config, make_config, one_per_seed, shipped_configs, to_dict, to_yaml, with_values
from lal.core.errors import ConfigError
from lal.core.keys import parse_yaml, read_yaml, write_yaml
from lal.hooks.registry import create_hooks, hooks_schema

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["1e-8", "5e3", "null", "true", "nan", "1e400", "0x10", "1_000"]) | st.dates()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3), max_leaves=6)
KEYS = sorted({*config_keys(), "modular", "experiment", "hooks.norms", "lrr"} - {"imports"})


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_any_values_are_read_or_refused_in_one_line(values):
    try: config = make_config(values, "my.yaml")
    except ConfigError as error:
        assert str(error).startswith("my.yaml: ") and "\n" not in str(error) and len(str(error)) < 900
    else:
        assert make_config(to_dict(config)) == config
        json.dumps(to_dict(config), allow_nan=False, default=str)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KEYS[:-1]), VALUES)
def test_a_refused_value_is_named_with_its_key(key, value):
    try: make_config({key: value})
    except ConfigError as error: assert key.split(".")[0] in str(error) or "train_frac" in str(error) or key == "modular", error


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from(["1e5", "yes", "No", "on", "~", "null", "1:30", "0o17", "0b1", ".5", "- a", "a: b", "#", "=", "<<", "2020-01-01"])
NUMBERS = st.floats(min_value=1e-300, max_value=1e300)


@settings(max_examples=80, deadline=None)
@given(TEXT, NUMBERS, st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._+=-]{0,9}\Z").filter(lambda name: not name.endswith(".html")), st.lists(st.integers(0, 10**17), min_size=1, max_size=3, unique=True))
def test_what_is_written_reads_back_equal_in_both_versions_of_yaml(text, number, name, seeds):
    config = make_config(name=name, description=text, eps=number, seeds=seeds, hooks={"hessian": {"epsilon": number}})
    written = to_yaml(config)
    assert make_config(parse_yaml(written)) == config
    assert yaml.safe_load(written) == to_dict(config)          # YAML 1.1: analysis reads so, and other people's tools


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration_is_right_and_passes_in_an_editor(name):
    config = load_config(name)
    for one in one_per_seed(config):
        assert with_values(one) == one
        create_hooks(one)
    editor = Draft202012Validator(config_schema(hooks=hooks_schema()))
    editor.check_schema(editor.schema)
    assert list(editor.iter_errors(read_yaml(shipped_configs()[name]))) == []


@pytest.mark.parametrize("module", ["lal.core.errors", "lal.core.keys", "lal.core.config", "lal.core.experiment", "lal.modular.keys", "lal.modular.experiment"])
def test_configuration_imports_nothing_heavy(module):
    read = "from lal.core.config import load_config; load_config('quickstart')" if "config" in module else ""
    heavy = {"torch", "pandas", "numpy", "pyarrow", "plotly"}
    code = f"import sys, {module}; {read}\nprint(*({heavy} & {{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


OWN = """
from typing import Annotated
import msgspec
from lal.core.experiment import Experiment, register_experiment
from lal.core.keys import Count, doc
class Keys(msgspec.Struct, frozen=True, kw_only=True):
    width: Annotated[Count, doc("hidden units")] = 8
@register_experiment
class Own(Experiment):
    name, keys, headline, higher = "own_one", Keys, "error", False
    def check(self, config):
        if config.width > config.epochs: yield "width", "must not exceed epochs"
"""


def test_an_experiment_of_your_own_is_named_in_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "my.yaml").write_text("imports: [own.py]\nexperiment: own_one\nown_one: {width: 3}\n")
    config = load_config("my.yaml", ("own_one.width=5e0",))
    assert config.width == 5 and to_dict(config)["own_one"] == {"width": 5}
    for change, named in (("width=0", "width = 0: must be 1 or larger"), ("width=99999", "must not exceed epochs"), ("p=3", "unknown key"), ("own_one.widht=3", "did you mean 'width'?"), ("imports=[gone.py]", "imports = gone.py: can't be imported: FileNotFoundError")):
        with pytest.raises(ConfigError) as error: load_config("my.yaml", (change,))
        assert named in str(error.value)


def test_changes_reach_into_mappings_and_win_over_the_file(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("hooks: full\nmodular: {p: 7}\nlr: 1\n")
    config = load_config(file, ("p=11", "hooks.hessian.epsilon=1e-3", "hooks.hessian.check_every=3", "modular.train_frac=0.5"))
    assert config.hooks == {"full": {}, "hessian": {"epsilon": 1e-3, "check_every": 3}} and (config.p, config.train_frac) == (11, 0.5)
    assert load_config(file, ("hooks.hessian.epsilon=1", "hooks=norms")).hooks == {"norms": {}}
    assert load_config(file, ("modular={p: 5}",), lr=2).p == 5
    for change, named in (("lr.x=3", "lr = {x: 3}: must be a number"), ("hooks.norms.x=3", "hooks.norms.x = 3: unknown option"), ("other.p=3", "other = {p: 3}: unknown key")):
        with pytest.raises(ConfigError) as error: create_hooks(load_config(file, (change,)))
        assert named in str(error.value)


def test_written_values_are_portable():
    assert write_yaml({"eps": 1e-8, "s": "on"}) == 'eps: 1.0e-08\ns: "on"\n'
