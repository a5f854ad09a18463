# Everything lives in .venv: `make battle` and `make test` need Python >= 3.11 and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: battle test lint docs lock clean

battle: $(READY) ## the main job on the built-in digits; ends with the path of a report
	$(BIN)/vertebra battle digits --budget 140s

test: $(READY) ## the whole suite: no network, no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(READY) ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

docs: $(READY) ## the generated pages of docs/papers
	$(BIN)/python docs/generate.py

# uv comes in by hash through pip, then installs the locked versions by hash.
$(READY): requirements.lock requirements-uv.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("vertebra needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $(READY)

lock: ## new versions and hashes, after a change of pyproject.toml
	echo uv | uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --upgrade -o requirements-uv.lock -
	uv pip compile --quiet pyproject.toml --universal --python-version 3.11 --all-extras --group dev --generate-hashes --no-header --upgrade -o requirements.lock

clean:
	rm -rf .venv runs
