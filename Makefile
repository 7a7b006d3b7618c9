# Everything a stranger needs: `make demo`, then `make test`. Each installs what it needs into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint check conformance bench soak format clean

# Stamps are newer than pyproject.toml exactly if the environment is up to date.
.venv/claude.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[claude]'
	touch $@

.venv/dev.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ .venv/claude.stamp

demo: .venv/claude.stamp
	$(BIN)/orchestrator run examples/review_team.yaml --offline

test: .venv/dev.stamp
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

# Needs npm; what it installs stays inside .venv.
conformance: .venv/dev.stamp
	$(BIN)/python -m scripts.conformance

bench: .venv/dev.stamp
	$(BIN)/python -m bench

soak: .venv/dev.stamp
	$(BIN)/python -m bench.soak

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .orchestrator build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
