"Can the structural tests fail? Each is given a copy of the checkout, or a notebook, with one thing broken. The checks themselves are shown failing in 03_notebooks."
import json
import shutil

import pytest
from execnb.nbio import read_nb
from lal.app import notebooks as check
from lal.app import pages

from conftest import ROOT, copy_checkout, python
from test_package import export_differences

SAMPLE = ROOT / "nbs/book/01_pages.ipynb"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("broken") / "lal")


def test_export_check_names_edited_stray_and_missing_modules(copy):
    (copy / "lal/book/pages.py").write_text((copy / "lal/book/pages.py").read_text() + "\nedited = 1\n")
    (copy / "lal/app/stray.py").write_text("x = 1\n")
    (copy / "lal/book/notebooks.py").unlink()
    assert {line.split()[0] for line in export_differences(copy)} >= {"lal/book/pages.py", "lal/app/stray.py", "lal/book/notebooks.py"}


def test_an_edited_cell_makes_outputs_stale():
    nb = read_nb(SAMPLE)
    assert check.stale(nb) == []
    next(cell for cell in nb.cells if cell.cell_type == "code").source += "\n# one more line"
    assert check.stale(nb)


def test_an_edited_sentence_does_not():
    nb = read_nb(SAMPLE)
    next(cell for cell in nb.cells if cell.cell_type == "markdown").source += " More."
    assert check.stale(nb) == []


@pytest.mark.parametrize("change", [
    lambda nb: nb["cells"][0].update(metadata={"collapsed": True}),
    lambda nb: nb.update(metadata={**nb["metadata"], "language_info": {"name": "python"}}),
    lambda nb: next(c for c in nb["cells"] if c["cell_type"] == "code").update(execution_count=3)])
def test_metadata_that_nbdev_clean_removes_is_found(change):
    nb = json.loads(SAMPLE.read_text())
    change(nb)
    assert check.unclean(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n")


@pytest.mark.parametrize("how", ["skip_exec", "underscore", "notest file", "every cell notest"])
def test_a_notebook_that_tests_leave_out_is_found(tmp_path, how):
    path = tmp_path / ("_sample.ipynb" if how == "underscore" else "sample.ipynb")
    shutil.copyfile(SAMPLE, path)
    nb = read_nb(path)
    assert how == "underscore" or check.left_out_of_tests(nb, path) == []
    if how == "notest file": (tmp_path / ".notest").touch()
    if how == "skip_exec": nb.cells[0].source += "\n- skip_exec: true"
    if how == "every cell notest":
        for cell in nb.cells:
            if cell.cell_type == "code": cell.source = "#| notest\n" + cell.source
    assert check.left_out_of_tests(nb, path)


def test_a_dead_link_on_a_built_page_is_found(site, tmp_path):
    broken = shutil.copytree(site, tmp_path / "site")
    page = broken / "book/pages.html"
    page.write_text(page.read_text() + '<a href="#no-such-heading">x</a><a href="../core/nowhere.html">y</a>')
    assert {"book/pages.html: #no-such-heading", "book/pages.html: ../core/nowhere.html"} <= set(pages.dead_links(broken))


def test_a_failing_notebook_leaves_its_file_and_exits_nonzero(copy):
    path = copy / "nbs/app/index.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"].append({"cell_type": "code", "execution_count": None, "id": "abcd1234", "metadata": {}, "outputs": [], "source": ["1 / 0"]})
    path.write_text(json.dumps(nb))
    before = path.read_text()
    shutil.copytree(ROOT / "lal", copy / "lal", dirs_exist_ok=True)
    done = python("from lal.book.notebooks import main; main(['nbs/app/index.ipynb'])", copy)
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr and "1 / 0" in done.stderr
    assert path.read_text() == before
