"A base install has no nbdev and no pandoc. What needs them says so; what doesn't need them works."
import subprocess
import sys

import pytest

WITHOUT = "import sys\nfor name in ('nbdev', 'execnb', 'pypandoc', 'playwright'): sys.modules[name] = None\n"


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", WITHOUT + code], capture_output=True, text=True)


@pytest.mark.parametrize("module", ["lal.book.readme", "lal.book.execute", "lal.book.claims"])
def test_the_module_imports(module):
    done = run(f"import {module}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("call", ["lal.book.readme.readme('nbs/index.ipynb')", "lal.book.execute.execute('nbs/index.ipynb')"])
def test_what_needs_nbdev_names_the_extra(call):
    done = run(f"import lal.book.readme, lal.book.execute; {call}")
    assert done.returncode != 0 and "pip install 'lal[dev]'" in done.stderr.splitlines()[-1]
