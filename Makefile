# make demo · make test · make check — nothing else is needed to set up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo finn test slow check format clean

$(VENV)/.engine: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[export]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(install_finn)
	touch $@ $(VENV)/.engine

# FINN+ pins versions that go with no recent torch; what it needs besides is in the extra.
define install_finn
$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[finn]'
$(BIN)/pip install --quiet --constraint constraints.txt --no-deps finn-plus mip onnx-passes
endef

finn: $(VENV)/.engine
	$(install_finn)

demo: $(VENV)/.engine
	rm -rf runs/demo
	$(BIN)/sdq demo --out runs/demo

# The networks in the tests are so small that a second thread only waits for the first.
test slow: export OMP_NUM_THREADS = 1

test: $(VENV)/.dev
	$(BIN)/pytest -n auto

slow: $(VENV)/.dev
	$(BIN)/pytest -n auto -m slow

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs
