# Every target makes what it needs: on a bare machine with Python >= 3.10 and make, `make demo` and `make test` are
# all there is to run. The environment lives in .venv; versions are pinned in constraints.txt.
PYTHON ?= python3
# For example: make demo DEMO_ARGS="--seed 1 --output runs/seed1"
DEMO_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

# The compiled library is part of the installation: rebuilt when a source changes.
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)

# The other end of the window of TRL in pyproject.toml; constraints.txt has the newest.
OLDEST_TRL := 1.15.0
OLDEST_TRL_DIR := $(CURDIR)/$(VENV)/trl-$(OLDEST_TRL)

.PHONY: demo test lint bench bench-cpu wheel clean install

install: $(STAMP)

# torch first and alone: a plain `pip install .` with build isolation, or a looser pin, may fetch another torch.
$(STAMP): pyproject.toml setup.py constraints.txt Makefile $(CSRC)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; a few minutes)"
	@$(PIP) install -q -c constraints.txt --upgrade pip "setuptools>=77" wheel
	@$(PIP) install -q -c constraints.txt torch numpy
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[train,bench,dev,triton]" pytest-xdist
	@touch $@

demo: $(STAMP)
	@# Passive waiting: on cores that are shared, spinning threads slow each other down several times over.
	OMP_WAIT_POLICY=PASSIVE $(BIN)/unisd demo $(DEMO_ARGS)

test: lint $(OLDEST_TRL_DIR)
	$(BIN)/python -m pytest -n 2
	@PYTHONPATH=$(OLDEST_TRL_DIR) $(BIN)/python -c 'import trl; print("the trainer again, with TRL", trl.__version__); assert trl.__version__ == "$(OLDEST_TRL)"'
	PYTHONPATH=$(OLDEST_TRL_DIR) $(BIN)/python -m pytest -n 2 tests/trainer

$(OLDEST_TRL_DIR): $(STAMP)
	@$(PIP) install -q --no-deps --upgrade --target $@ trl==$(OLDEST_TRL)
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: bench-cpu

# Against the bare matrix products, the dense formulas and TRL's kernels; then the moving average, and the digits of a
# small divergence.
bench-cpu: $(STAMP)
	$(BIN)/python -m bench --case unisd_star_cpu
	$(BIN)/python -m bench.ema
	$(BIN)/python -m bench.numerics

# One wheel for every Python >= 3.10 and torch >= 2.10 (docs/building.md).
wheel: $(STAMP)
	UNISD_BUILD=cpu $(PIP) wheel -q --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .benchmarks runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
