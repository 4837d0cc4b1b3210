# Two commands need nothing but Python and make: `make quickstart` and `make test`. `make` alone lists all.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
NB ?=

# Figures are saved as data, and several test workers share the cores without slowing each other down.
export PLOTLY_RENDERER := plotly_mimetype
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PIP := $(PY) -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test docs preview notebooks readme clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lal needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python could not make a virtual environment (on Debian: apt install python3-venv)"; exit 1; }

$(VENV)/.base: pyproject.toml constraints.txt | $(PY)
	@echo "installing lal into $(VENV)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(PY)
	@echo "installing lal and its development tools into $(VENV)"
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.base

quickstart: $(VENV)/.base ## install, train a small network until it groks, and say how to open the result
	@$(VENV)/bin/lal train quickstart --overwrite

test: $(VENV)/.dev ## everything: structure, every notebook, contracts (two cores, under 25 minutes)
	$(ONE_THREAD) $(PY) -m pytest tests/structure
	$(ONE_THREAD) $(PY) -c "from pathlib import Path; from lal.book.notebooks import test; test(Path.cwd(), n_workers=2)"
	$(ONE_THREAD) $(PY) -m pytest tests/contracts

docs: ## the site, with Quarto, into _docs/
	@command -v quarto >/dev/null || [ -x $(VENV)/bin/quarto ] || { echo "Quarto is missing: pip install 'lal[docs]' brings it where the internet is open; make preview shows every page without it."; exit 1; }
	@$(MAKE) --no-print-directory $(VENV)/.dev
	@rm -rf _proc _docs
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/nbdev_docs

preview: $(VENV)/.dev ## every page, without Quarto or a network, into _preview/
	@$(PY) -c "from lal.book.pages import main; main()" preview

notebooks: $(VENV)/.dev ## execute notebooks in place: all, or NB=nbs/modular/02_models.ipynb
	@$(PY) -c "from lal.book.notebooks import main; main()" $(NB)

readme: $(VENV)/.dev ## README.md from nbs/index.ipynb
	@$(PY) -c "from lal.book.pages import main; main()" readme

clean: ## remove what was built; the environment and your runs stay
	@rm -rf _proc _docs _preview build dist *.egg-info .pytest_cache .hypothesis nbs/nbdev.yml
