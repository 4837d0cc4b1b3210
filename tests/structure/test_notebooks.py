"Each notebook keeps the rules that nbs/book/02_notebooks.ipynb explains."
import tempfile
from pathlib import Path

import pytest
from execnb.nbio import read_nb
from lal.app import notebooks as check

from conftest import ROOT

PAGES = [path.relative_to(ROOT).as_posix() for path in check.notebooks(ROOT)]
PLACES = (f"{ROOT}/", f"{ROOT.parent}/" if len(ROOT.parts) > 2 else f"{ROOT}/", f"{Path.home()}/", f"{tempfile.gettempdir()}/")
each_notebook = pytest.mark.parametrize("page", PAGES)


def none(page: str, problems: list[str]) -> None:
    assert not problems, "\n".join(f"{page}: {problem}" for problem in problems)


def test_there_are_notebooks():
    assert "nbs/index.ipynb" in PAGES, "the site has no front page: nbs/index.ipynb"


@each_notebook
def test_is_clean(page):
    none(page, check.unclean((ROOT / page).read_text()))


@each_notebook
def test_outputs_belong_to_the_code(page):
    none(page, check.stale(read_nb(ROOT / page)))


@each_notebook
def test_outputs_show_no_error_warning_or_machine_path(page):
    none(page, check.bad_outputs(read_nb(ROOT / page), PLACES))


@each_notebook
def test_outputs_are_small(page):
    none(page, check.too_large(read_nb(ROOT / page), (ROOT / page).read_text()))


@each_notebook
def test_figures_are_data_on_a_transparent_ground(page):
    none(page, check.bad_figures(read_nb(ROOT / page)))


@each_notebook
def test_building_pages_reruns_only_imports_and_definitions(page):
    none(page, check.rerun_cells(read_nb(ROOT / page)))


@each_notebook
def test_headings_stand_over_their_own_source(page):
    none(page, check.misplaced_headings(read_nb(ROOT / page)))


@each_notebook
def test_begins_with_title_and_quoted_line(page):
    none(page, check.anatomy(read_nb(ROOT / page)))


@each_notebook
def test_says_what_its_runs_ran_on(page):
    none(page, check.ran_on(read_nb(ROOT / page)))


@each_notebook
def test_is_tested(page):
    nb, path = read_nb(ROOT / page), ROOT / page
    none(page, check.left_out_of_tests(nb, path))
