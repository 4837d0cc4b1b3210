"The site: every page once in the sidebar, no link that leads nowhere, one plotly.js, a README that follows the front page."
import os
import re
import shutil

import yaml
from lal.book import preview, readme
from lal.book.cells import notebooks
from lal.book.testing import sidebar_problems

from conftest import ROOT


def test_sidebar_lists_every_page_once():
    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    names = [path.relative_to(ROOT / "nbs").as_posix() for path in notebooks(ROOT)]
    problems = sidebar_problems(contents, names)
    assert not problems, "\n".join(problems)


def test_quarto_reads_the_same_sidebar():
    link = ROOT / "nbs" / "_quarto.yml"
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml", "nbs/_quarto.yml must be a link to ../_quarto.yml"


def test_every_notebook_has_its_page(site):
    expected = {preview.page_name(path.relative_to(ROOT / "nbs").as_posix()) for path in notebooks(ROOT)}
    built = {path.relative_to(site).as_posix() for path in site.rglob("*.html")} - {p.relative_to(site).as_posix() for p in (site / "source").rglob("*")}
    assert built == expected, f"pages without a notebook: {sorted(built - expected)}; notebooks without a page: {sorted(expected - built)}"


def test_no_link_leads_nowhere(site):
    dead = preview.dead_links(site)
    assert not dead, "dead links, as page: address\n" + "\n".join(dead)


def test_a_dead_link_on_a_built_page_is_found(site, tmp_path):
    broken = shutil.copytree(site, tmp_path / "site")
    page = broken / "book/cells.html"
    page.write_text(page.read_text() + '<a href="#no-such-heading">x</a><a href="../core/nowhere.html">y</a>')
    assert {"book/cells.html: #no-such-heading", "book/cells.html: ../core/nowhere.html"} <= set(preview.dead_links(broken))


def test_no_link_is_made_twice(site):
    "nbdev links a name in backticks; inside a link that was written out, it leaves brackets behind."
    doubled = [f"{page.relative_to(site)}: {found[0]}" for page in sorted(site.rglob("*.html")) if (found := re.findall(r"\[<code>.{0,80}", page.read_text()))]
    assert not doubled, "links with a name in backticks as their text; write the name without them:\n" + "\n".join(doubled)


def test_figures_share_one_plotly(site):
    copies = [path for path in site.rglob("*.js") if "plotly" in path.name]
    assert len(copies) <= 1, f"several copies of plotly.js: {copies}"
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert len(text) < 3_000_000, f"{page.name} is {len(text) / 1e6:.1f} MB: does it hold a copy of plotly.js?"
        scripts, figures = text.count('plotly.min.js"></script>'), text.count('class="plotly-graph-div"')
        assert scripts == (1 if figures else 0), f"{page.name} shows {figures} figures and loads plotly.js {scripts} times"


def test_readme_follows_the_front_page():
    text, pictures = readme.readme(ROOT / "nbs" / "index.ipynb")
    assert (ROOT / "README.md").read_text() == text, "README.md is not what nbs/index.ipynb says: run `make readme`"
    missing = [name for name in pictures if not (ROOT / name).is_file()]
    assert not missing, f"pictures of the README are missing: {missing}; run `make readme` where Chromium is"
