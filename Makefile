# Everything a person or CI runs. Nothing but Python 3.11 and make is needed: .venv is made on demand.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STUBS := client_sdk/wire
PROTO := proto/policyserver/v1/policyserver.proto

.DEFAULT_GOAL := help
.PHONY: help venv demo compare test test-slow check-install lint format bench proto lock clean

help: ## Say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

venv: $(STAMP) ## Create .venv with everything pinned

# Without build isolation, so that setuptools is the pinned one too.
$(STAMP): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock setuptools
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock \
		--no-build-isolation -e ".[server,certs,video,dev]"
	@touch $@

demo: $(STAMP) ## Train CartPole from simulators in other processes, watch it, keep the picture
	@$(BIN)/python examples/demo.py

compare: $(STAMP) ## Train CartPole in several ways, three seeds each; table, JSON and a picture
	$(BIN)/policy-server compare --out benchmarks/results

test: $(STAMP) ## Fast tests and one training per mode (12 minutes at most), in two processes
	$(BIN)/pytest -m "not slow" --numprocesses 2 --dist loadgroup

test-slow: $(STAMP) ## Every training and installation; writes docs/results.md
	$(BIN)/python -m benchmarks.results
	$(BIN)/pytest -m "slow or learning"

check-install: $(STAMP) ## Install the client alone, then the server, each into an empty environment
	$(BIN)/pytest -m slow tests/test_install.py

lint: $(STAMP) ## Ruff, its formatter and mypy --strict, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Every figure of benchmarks/, one after the other
	@for name in inference wire_columns acting anatomy local stepping while_learning memory learning; do \
		echo "== $$name"; $(BIN)/python -m benchmarks.$$name || exit 1; \
	done

proto: $(STAMP) ## Generate the Python stubs from the contract
	$(BIN)/python -m grpc_tools.protoc -I$(STUBS)=$(patsubst %/,%,$(dir $(PROTO))) \
		--python_out=. --pyi_out=. --grpc_python_out=. $(STUBS)/policyserver.proto

# Local version suffixes (+cpu) belong to one machine's index; the number is what is pinned.
lock: ## Pin every dependency of all extras anew
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet --disable-pip-version-check "setuptools>=77"
	$(VENV)-lock/bin/pip install --quiet --disable-pip-version-check \
		--no-build-isolation -e ".[server,certs,video,dev]"
	@echo "# Every dependency of every extra. Made by \`make lock\`; used as pip install -c." > requirements.lock
	$(VENV)-lock/bin/pip freeze --all --exclude-editable | grep -v '^pip==' \
		| sed -E 's/\+[a-z0-9.]+$$//' >> requirements.lock
	rm -rf $(VENV)-lock

clean: ## Remove .venv, caches and runs
	rm -rf $(VENV) $(VENV)-lock runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf examples/javascript/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
