"A hook is one notebook and one line of the sidebar: all that lists hooks finds it by its file."
import json
from pathlib import Path

import pytest
import yaml
from execnb.nbio import mk_cell, new_nb, read_nb, write_nb
from lal.book.cells import directives
from lal.book.figures import FIGURE
from lal.book.gallery import card, hook_page, hooks_table, pages_table
from lal.book.preview import sidebar_pages
from lal.hooks.registry import REGISTRY

from conftest import ROOT, copy_checkout, python

PROBE = '''#| export
class Probe(Hook):
    "What is probed?"

    minimal = True
    metrics = (Metric("probed", "1", (0, 1), "one"),)

    def post_step(self, state): return {"probed": 1.0}'''
LISTED = '''import json
from pathlib import Path
from lal.book.gallery import gallery, hooks_table, pages_table
from lal.core.config import make_config
from lal.hooks.registry import REGISTRY, SETS, create_hooks, members
nbs = Path("nbs")
print(json.dumps({"names": [*REGISTRY], "sets": {s: members(s) for s in SETS}, "made": [h.name for h in create_hooks(make_config(hooks="probe")).hooks],
                  "pages": pages_table("hooks", nbs, REGISTRY), "front": hooks_table(REGISTRY, nbs), "cards": gallery(REGISTRY, nbs)}))'''


def lal(words: str, cwd: Path):
    "Call the command line of the checkout `cwd`."
    return python(f"import sys; sys.argv = ['lal', *{words.split()}]; from lal.app.cli import main; main()", cwd)


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Path:
    "A copy of the checkout with one notebook and one line of the sidebar more, and two modules that are no hooks and can't be imported."
    copy = copy_checkout(tmp_path_factory.mktemp("grown") / "lal")
    drawn = mk_cell("figure()")
    line = {"data": [{"type": "scatter", "x": [0, 1, 2], "y": [3, 1, 2]}], "layout": {"title": {"text": "Down and up"}}}
    drawn.outputs = [{"output_type": "display_data", "metadata": {}, "data": {FIGURE: line}}]
    imports = "#| export\nfrom lal.hooks.hook import Hook, Metric"
    page = new_nb([mk_cell("# A probe\n\n> It is one", "markdown"), mk_cell("#| default_exp hooks.probe"), mk_cell(imports), mk_cell(PROBE), drawn])
    write_nb(page, copy / "nbs/hooks/90_probe.ipynb")
    text, last = (copy / "_quarto.yml").read_text(), "          - hooks/25_path_length.ipynb\n"
    (copy / "_quarto.yml").write_text(text.replace(last, f"{last}          - hooks/90_probe.ipynb\n"))
    done = python("from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()", copy)
    assert done.returncode == 0 and (copy / "lal/hooks/probe.py").is_file(), done.stderr
    for name in ("heavy", "lightning"): (copy / f"lal/hooks/{name}.py").write_text("import not_installed\n\nclass LalCallback(not_installed.Callback): pass\n")
    return copy


def test_one_notebook_and_one_line_of_the_sidebar_add_a_hook(grown):
    done = python(LISTED, grown)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["names"] == [name for name, cls in sorted({**REGISTRY, "probe": None}.items(), key=lambda item: (
        item[0] != "training_metrics", getattr(item[1], "kind", "observer") != "observer", item[0]))]
    assert {name for name, members in found["sets"].items() if "probe" in members} == {"minimal", "observers", "full"}
    assert found["made"] == ["training_metrics", "probe"]
    assert "| [A probe](nbs/hooks/90_probe.ipynb) | What is probed? |" in found["pages"].splitlines()
    assert "| [probe](nbs/hooks/90_probe.ipynb) | observer | What is probed? |" in found["front"].splitlines()
    assert found["cards"].count("<svg") == found["cards"].count("<article") == len(REGISTRY) + 1 and 'aria-label="Down and up"' in found["cards"]
    listed = lal("hooks", grown).stdout.splitlines()
    assert listed[1 + found["names"].index("probe")].split() == ["probe", "observer", "post_step", "What", "is", "probed?"]
    assert "probed" in lal("hooks describe probe", grown).stdout


def test_two_modules_with_one_name_are_one_line_that_names_both_files(grown):
    twin = grown / "lal/hooks/twin.py"
    twin.write_text("from .norms import Norms\n\nclass Twin(Norms):\n    name = 'probe'\n")
    try:
        for words in ("hooks", "hooks describe norms", "configs --schema", "train quickstart"):
            done = lal(words, grown)
            assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stdout == "", f"{words}: {done.stdout}{done.stderr}"
            for part in ("two hooks are called probe", f"Probe in {grown}/lal/hooks/probe.py", f"Twin in {twin}"): assert part in done.stderr
    finally:
        twin.unlink()


def test_the_registry_imports_no_module_that_defines_no_hook():
    heavy = "{'lightning', 'pytorch_lightning', 'transformers', 'accelerate', 'lal.hooks.watch', 'lal.hooks.lightning', 'lal.hooks.transformers'}"
    done = python(f"import sys, lal.hooks.registry; print(*sorted({heavy} & {{*sys.modules}}))", ROOT)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr


@pytest.mark.parametrize("name", REGISTRY)
def test_each_hook_has_a_page_in_the_sidebar_that_defines_it(name):
    cls = REGISTRY[name]
    page = hook_page(cls, ROOT / "nbs")
    exported = [cell["source"] for cell in read_nb(ROOT / "nbs" / page).cells if directives(cell).keys() & {"export", "exports"}]
    assert any(f"class {cls.__name__}(" in source for source in exported), f"nbs/{page} exports no class {cls.__name__}"
    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    assert page in sidebar_pages(contents), f"{page} is not in the sidebar of _quarto.yml"


def outputs(page: str) -> str:
    "All text and HTML in the outputs of a page."
    data = [output.get("data", {}) for cell in read_nb(ROOT / "nbs" / page).cells for output in cell.get("outputs", ())]
    return "\n".join("".join(d.get(kind, "")) for d in data for kind in ("text/markdown", "text/html"))


def test_tables_and_cards_are_what_the_declarations_and_pages_are_now(monkeypatch):
    monkeypatch.chdir(ROOT / "nbs")
    assert hooks_table(REGISTRY, Path(".")) in outputs("index.ipynb"), "execute nbs/index.ipynb"
    monkeypatch.chdir(ROOT / "nbs/hooks")
    assert pages_table("hooks", Path(".."), REGISTRY) in outputs("hooks/index.ipynb"), "execute nbs/hooks/index.ipynb"
    shown = outputs("hooks/gallery.ipynb")
    for cls in REGISTRY.values():
        assert card(cls, Path("..")).removesuffix("</article>") in shown, f"execute nbs/hooks/gallery.ipynb: the card of {cls.name} is old"
    assert shown.count("<article") == len(REGISTRY)
