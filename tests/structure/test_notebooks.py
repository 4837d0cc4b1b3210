"Each notebook keeps the rules that nbs/book/08_outputs.ipynb and nbs/book/09_anatomy.ipynb explain."
import tempfile
from pathlib import Path

import pytest
from execnb.nbio import read_nb
from lal.book import anatomy, cells, execute, outputs, receipts, testing
from lal.book.imports import Package

from conftest import ROOT

PAGES = [path.relative_to(ROOT).as_posix() for path in cells.notebooks(ROOT)]
PLACES = (f"{ROOT}/", f"{ROOT.parent}/" if len(ROOT.parts) > 2 else f"{ROOT}/", f"{Path.home()}/", f"{tempfile.gettempdir()}/")
PACKAGE = Package(ROOT)
each_notebook = pytest.mark.parametrize("page", PAGES)


def none(page: str, problems: list[str]) -> None:
    assert not problems, "\n".join(f"{page}: {problem}" for problem in problems)


def test_there_are_notebooks():
    assert "nbs/index.ipynb" in PAGES, "the site has no front page: nbs/index.ipynb"


@each_notebook
def test_is_clean(page):
    none(page, execute.unclean((ROOT / page).read_text()))


@each_notebook
def test_outputs_belong_to_the_code(page):
    none(page, receipts.stale(read_nb(ROOT / page), PACKAGE))


@each_notebook
def test_outputs_show_no_error_warning_or_machine_path(page):
    none(page, outputs.bad_outputs(read_nb(ROOT / page), PLACES))


@each_notebook
def test_outputs_are_small(page):
    none(page, outputs.too_large(read_nb(ROOT / page), (ROOT / page).read_text()))


@each_notebook
def test_figures_are_data_on_a_transparent_ground(page):
    none(page, outputs.bad_figures(read_nb(ROOT / page)))


@each_notebook
def test_building_pages_reruns_only_imports_and_definitions(page):
    none(page, outputs.rerun_cells(read_nb(ROOT / page)))


@each_notebook
def test_headings_stand_over_their_own_source(page):
    none(page, anatomy.misplaced_headings(read_nb(ROOT / page)))


@each_notebook
def test_begins_with_title_and_quoted_line(page):
    none(page, anatomy.anatomy(read_nb(ROOT / page)))


@each_notebook
def test_says_what_its_runs_ran_on(page):
    none(page, anatomy.ran_on(read_nb(ROOT / page)))


@each_notebook
def test_is_tested(page):
    nb, path = read_nb(ROOT / page), ROOT / page
    none(page, testing.left_out_of_tests(nb, path))


def size_problems(page: str) -> list[str]:
    "Cells, runs of cells and the module of a page above their bounds."
    nb = read_nb(ROOT / page)
    names = [name for cell in nb.cells for name in cells.directives(cell).get("default_exp", [])]
    modules = [ROOT / "lal" / f"{name.replace('.', '/')}.py" for name in names]
    return [*anatomy.long_cells(nb), *anatomy.long_runs(nb), *anatomy.late_use(nb), *(p for m in modules for p in anatomy.long_module(m.read_text()))]


@each_notebook
def test_cells_and_modules_are_of_a_readable_size(page):
    none(page, size_problems(page))
