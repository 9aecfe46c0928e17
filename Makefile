# The common tasks. `make demo` is the shortest way from a checkout to a report.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS := $(CURDIR)/runs

# Flower: no private environment for each run, no telemetry, no look for updates.
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FEDSIGMA_RUNS := $(RUNS)

.PHONY: help venv test lint demo demo-short deploy-files clean
.DEFAULT_GOAL := help

help:
	@echo "make venv        make the environment in $(VENV)"
	@echo "make test        check style and types, then run the tests"
	@echo "make lint        check style and types"
	@echo "make demo        run the demonstration study and write its report"
	@echo "make demo-short  the same study for eight rounds"
	@echo "make deploy-files  renew the files in deploy/ that are made from others"
	@echo "make clean       remove caches and builds; environment and runs stay"

venv: $(STAMP)

# torch first and by itself: which build of it is installed is then the machine's choice, not the project's.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# In two processes: those of a deployment wait much, for sites and rounds, while the others compute. One OpenMP
# thread for each: where processes share the cores, threads wait for one another in busy loops, which took most
# of the tests' time.
test: export OMP_NUM_THREADS := 1
test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# In a checkout server/, client/ and common/ stand beside fedsigma/. mypy and import-linter do not run the path
# shim that joins them, so they are shown the layout of the installed package.
TYPES := build/types/fedsigma

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPES) && mkdir -p $(TYPES)
	ln -s $(wildcard $(CURDIR)/fedsigma/*.py) $(CURDIR)/fedsigma/py.typed $(CURDIR)/fedsigma/cli $(TYPES)/
	ln -s $(CURDIR)/server $(CURDIR)/client $(CURDIR)/common $(TYPES)/
	cd build/types && MYPYPATH=. $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p fedsigma
	cd build/types && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports $(CURDIR)/pyproject.toml --no-cache

demo: $(STAMP)
	$(BIN)/fedsigma study run demo

demo-short: $(STAMP)
	$(BIN)/fedsigma study run demo --rounds 8

deploy-files: $(STAMP)
	mkdir -p build
	$(BIN)/python deploy/images/constraints.py > build/constraints.txt && mv build/constraints.txt deploy/images/
	$(BIN)/python deploy/proxy/examples.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
