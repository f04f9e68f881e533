# Every target does all its set-up: an own .venv, made when missing, brought up to date when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check test-system format clean

demo: $(READY)
	$(BIN)/swarm demo

test: $(READY)
	$(BIN)/pytest -m "not system and not gpu" -n 2 --dist loadfile

test-system: $(READY)
	$(BIN)/pytest -m system

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/unit/test_docs.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' || { echo "Python 3.11.4 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[torch,ray,postgres,dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
