# Two commands need nothing but Python and make: `make quickstart` and `make test`. `make` alone lists all.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
NB ?=
WORKERS ?= 1
VARIATIONS ?=

# Figures are saved as data, and several test workers share the cores without slowing each other down.
export PLOTLY_RENDERER := plotly_mimetype
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PIP := $(PY) -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test docs preview notebooks stale claims readme clean

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

# Each part runs and reports, also after one that failed.
test: $(VENV)/.dev ## everything: structure, every notebook, contracts (two cores, about 10 minutes)
	@failed=; \
	echo "== structure"; $(ONE_THREAD) $(PY) -m pytest -n 2 --dist loadfile tests/structure || failed="$$failed structure"; \
	echo "== notebooks"; $(ONE_THREAD) $(PY) -c "from pathlib import Path; from lal.book.testing import test; test(Path.cwd(), n_workers=2)" || failed="$$failed notebooks"; \
	echo "== contracts"; $(ONE_THREAD) $(PY) -m pytest -n 2 --dist loadscope tests/contracts || failed="$$failed contracts"; \
	if [ -n "$$failed" ]; then echo "make test failed in:$$failed"; exit 1; fi; echo "make test: structure, notebooks and contracts passed"

claims: $(VENV)/.dev ## do the pages' claims hold elsewhere? all, or NB=training VARIATIONS=default,avx2
	@VARIATIONS=$(VARIATIONS) WORKERS=$(WORKERS) $(PY) -c "from lal.book.claims import main; main()" $(NB)

docs: ## the site, with Quarto, into _docs/
	@command -v quarto >/dev/null || [ -x $(VENV)/bin/quarto ] || { echo "Quarto is missing: pip install 'lal[docs]' brings it where the internet is open; make preview shows every page without it."; exit 1; }
	@$(MAKE) --no-print-directory $(VENV)/.dev
	@rm -rf _proc _docs
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/nbdev_docs

preview: $(VENV)/.dev ## every page, without Quarto or a network, into _preview/
	@$(PY) -c "from lal.book.preview import main; main()"

notebooks: $(VENV)/.dev ## execute notebooks in place: all, NB=stale, or NB=nbs/modular/02_models.ipynb
	@WORKERS=$(WORKERS) $(ONE_THREAD) $(PY) -c "from lal.book.execute import main; main()" $(NB)

stale: $(VENV)/.dev ## list the pages whose outputs are older than their code, with the reason
	@$(PY) -c "from lal.book.receipts import main; main()"

readme: $(VENV)/.dev ## README.md from nbs/index.ipynb
	@$(PY) -c "from lal.book.readme import main; main()"

clean: ## remove what was built; the environment and your runs stay
	@rm -rf _proc _docs _preview _claims.tsv build dist *.egg-info .pytest_cache .hypothesis nbs/nbdev.yml
