"Can the structural tests fail? Each is given a copy of the checkout, or a notebook, with one thing broken. The checks themselves are shown failing on the pages of nbs/book."
import json
import shutil

import pytest
from execnb.nbio import read_nb
from lal.book import execute, receipts, testing
from lal.book.imports import Package, against_the_arrows

from conftest import ROOT, copy_checkout, python
from test_package import export_differences

SAMPLE = ROOT / "nbs/book/02_cells.ipynb"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("broken") / "lal")


def test_export_check_names_edited_stray_and_missing_modules(copy):
    (copy / "lal/book/cells.py").write_text((copy / "lal/book/cells.py").read_text() + "\nedited = 1\n")
    (copy / "lal/app/stray.py").write_text("x = 1\n")
    (copy / "lal/book/testing.py").unlink()
    assert {line.split()[0] for line in export_differences(copy)} >= {"lal/book/cells.py", "lal/app/stray.py", "lal/book/testing.py"}


def test_an_edited_cell_makes_outputs_stale():
    nb = read_nb(SAMPLE)
    assert receipts.stale(nb, Package(ROOT)) == []
    next(cell for cell in nb.cells if cell.cell_type == "code").source += "\n# one more line"
    assert receipts.stale(nb, Package(ROOT))


def test_a_module_that_changed_two_imports_away_makes_outputs_stale(copy):
    nb = read_nb(ROOT / "nbs/book/04_readme.ipynb")
    far, before = copy / "lal/book/figures.py", Package(copy)
    assert receipts.sources(nb, before)["lal.book.figures"] == ["lal.book.figures"]
    for cell in nb.cells: cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("from lal.book.figures"))
    nb.metadata["lal"] = receipts.receipt(nb, before)
    text = far.read_text()
    far.write_text("# File to edit: ../../nbs/book/77_renamed.ipynb.\n" + text)
    assert receipts.stale(nb, Package(copy)) == []
    far.write_text(text + "\nnew = 1\n")
    assert receipts.stale(nb, Package(copy)) == ["lal.book.figures (through lal.book.cells) changed"]
    far.write_text(text)


def test_an_import_against_the_arrows_is_found(copy):
    module = copy / "lal/core/files.py"
    text = module.read_text()
    module.write_text(text + "\ndef late():\n    import lal.hooks.norms\n")
    assert "lal.core.files imports lal.hooks.norms: core does not import hooks" in against_the_arrows(Package(copy))
    module.write_text(text)


@pytest.mark.parametrize("name", ["long_cells", "long_runs", "late_use"])
def test_a_page_of_one_long_definition_is_found(name):
    from execnb.nbio import mk_cell
    from lal.book import anatomy
    nb = read_nb(SAMPLE)
    assert getattr(anatomy, name)(nb) == []
    nb.cells = [*nb.cells[:1], mk_cell("#| export\ndef f(): return [\n" + "1,\n" * 200 + "]"), *[mk_cell("Text.", "markdown")] * 20, mk_cell("f()")]
    assert getattr(anatomy, name)(nb)


def test_an_edited_sentence_does_not():
    nb = read_nb(SAMPLE)
    next(cell for cell in nb.cells if cell.cell_type == "markdown").source += " More."
    assert receipts.stale(nb, Package(ROOT)) == []


@pytest.mark.parametrize("change", [
    lambda nb: nb["cells"][0].update(metadata={"collapsed": True}),
    lambda nb: nb.update(metadata={**nb["metadata"], "language_info": {"name": "python"}}),
    lambda nb: next(c for c in nb["cells"] if c["cell_type"] == "code").update(execution_count=3)])
def test_metadata_that_nbdev_clean_removes_is_found(change):
    nb = json.loads(SAMPLE.read_text())
    change(nb)
    assert execute.unclean(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n")


@pytest.mark.parametrize("how", ["skip_exec", "underscore", "notest file", "every cell notest"])
def test_a_notebook_that_tests_leave_out_is_found(tmp_path, how):
    path = tmp_path / ("_sample.ipynb" if how == "underscore" else "sample.ipynb")
    shutil.copyfile(SAMPLE, path)
    nb = read_nb(path)
    assert how == "underscore" or testing.left_out_of_tests(nb, path) == []
    if how == "notest file": (tmp_path / ".notest").touch()
    if how == "skip_exec": nb.cells[0].source += "\n- skip_exec: true"
    if how == "every cell notest":
        for cell in nb.cells:
            if cell.cell_type == "code": cell.source = "#| notest\n" + cell.source
    assert testing.left_out_of_tests(nb, path)


def test_a_failing_notebook_leaves_its_file_and_exits_nonzero(copy):
    path = copy / "nbs/app/index.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"].append({"cell_type": "code", "execution_count": None, "id": "abcd1234", "metadata": {}, "outputs": [], "source": ["1 / 0"]})
    path.write_text(json.dumps(nb))
    before = path.read_text()
    shutil.copytree(ROOT / "lal", copy / "lal", dirs_exist_ok=True)
    done = python("from lal.book.execute import main; main(['nbs/app/index.ipynb'])", copy)
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr and "1 / 0" in done.stderr
    assert path.read_text() == before
