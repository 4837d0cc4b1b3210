"The package is what the notebooks say, as source and as an installed wheel."
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lal.book.imports import Package, against_the_arrows

from conftest import ROOT, copy_checkout, python

SHIPPED = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("lal/configs/*.yaml")}


def modules(root: Path) -> dict[str, str]:
    "All files of the package but its shipped data."
    return {path.relative_to(root).as_posix(): path.read_text() for path in sorted((root / "lal").rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".yaml"}


def export_differences(copy: Path) -> list[str]:
    "Export the notebooks of `copy` into an empty package, and name every file that then differs from what was there."
    before = modules(copy)
    for name in before: (copy / name).unlink()
    done = subprocess.run([str(Path(sys.executable).parent / "nbdev_export")], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, f"nbdev_export failed:\n{done.stderr}"
    after = modules(copy)
    return ([f"{name} comes from no notebook: delete it" for name in before.keys() - after.keys()]
            + [f"{name} is missing: run nbdev_export and commit it" for name in after.keys() - before.keys()]
            + [f"{name} is not what its notebook exports: run nbdev_export" for name in before.keys() & after.keys() if before[name] != after[name]])


def test_package_is_a_fresh_export(tmp_path):
    differences = export_differences(copy_checkout(tmp_path / "lal"))
    assert not differences, "\n".join(differences)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    "The wheel, built from a copy and installed into an empty folder."
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    copy = copy_checkout(place / "source" / "lal")
    build = subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place / "wheels", "."], cwd=copy,
                           capture_output=True, text=True)
    assert build.returncode == 0, f"the wheel can't be built:\n{build.stdout}{build.stderr}"
    wheel, = (place / "wheels").glob("lal-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", place / "installed", str(wheel)], check=True)
    return place / "installed"


def test_wheel_holds_the_shipped_configs(installed):
    found = {path.relative_to(installed).as_posix() for path in installed.glob("lal/configs/*.yaml")}
    assert found == SHIPPED, f"shipped configs in the wheel {sorted(found)}, in the checkout {sorted(SHIPPED)}"


def test_imports_follow_the_arrows():
    against = against_the_arrows(Package(ROOT))
    assert not against, "imports against the arrows of nbs/book/05_imports.ipynb:\n" + "\n".join(against)


def test_wheel_holds_every_module_but_the_books_own_and_all_import(installed, tmp_path):
    names = {name for name in modules(ROOT) if name.endswith(".py") and not name.startswith("lal/book/")}
    assert names == {path.relative_to(installed).as_posix() for path in (installed / "lal").rglob("*.py")}
    dotted = [name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in sorted(names)]
    code = f"import importlib, lal\nassert lal.__file__.startswith({str(installed)!r}), lal.__file__\nfor name in {dotted}: importlib.import_module(name)"
    done = python(code, tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, f"the installed package does not import from outside the checkout:\n{done.stderr}"


def test_version_and_name_are_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    settings = dict(line.split(" = ", 1) for line in (ROOT / "settings.ini").read_text().splitlines() if " = " in line)
    assert project["name"] == settings["lib_name"] and project["description"] == settings["description"], "settings.ini and pyproject.toml disagree"
    assert project["requires-python"] == f">={settings['min_python']}", "settings.ini and pyproject.toml name different Python versions"
    assert f'__version__ = "{settings["version"]}"' in (ROOT / "lal/__init__.py").read_text()
