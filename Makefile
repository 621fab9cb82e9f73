# Two commands: `make demo` runs the main job, `make test` lints and runs every test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# A TPU runtime installed on a machine without a TPU writes noise at start-up unless told; a real
# accelerator is used when the caller sets JAX_PLATFORMS.
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-slow lint clean

$(VENV)/runtime: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/dev: $(VENV)/runtime requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(VENV)/runtime
	$(BIN)/python -m tools.demo

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

# A file's tests share what they compile, so they stay in one process.
test: lint
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --durations=30

test-slow: $(VENV)/dev
	XLA_FLAGS= $(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) .cache
