"What several structural tests need: a throw-away copy of the checkout, and the site built from one."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAVE_OUT = shutil.ignore_patterns(".git", ".venv*", "_proc", "_docs", "_preview", "__pycache__", ".ipynb_checkpoints", "runs", "*.egg-info", "build",
                                   "dist", ".pytest_cache", ".hypothesis", "nbdev.yml")


def copy_checkout(to: Path) -> Path:
    "The checkout's files without what is built or installed."
    return Path(shutil.copytree(ROOT, to, ignore=LEAVE_OUT, symlinks=True))


def python(code: str, cwd: Path, **env) -> subprocess.CompletedProcess:
    "Run Python in `cwd`, with the `lal` that is there."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(cwd)} | env
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    "All pages, built from a copy of the checkout."
    copy = copy_checkout(tmp_path_factory.mktemp("pages") / "lal")
    done = python("from lal.book.preview import main; main()", copy)
    assert done.returncode == 0, f"the pages can't be built:\n{done.stdout}{done.stderr}"
    return copy / "_preview"
