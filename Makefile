# Every target makes what it needs: on a bare machine with Python >= 3.10 and make, `make demo` and `make test` are
# all there is to run. The environment lives in .venv; versions are pinned in constraints.txt.
PYTHON ?= python3
# For example: make demo DEMO_ARGS="--seed 1 --output runs/seed1"
DEMO_ARGS ?=
# For example: make bench BENCH_ARGS="--output runs/cpu.json"
BENCH_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

# The compiled library is part of the installation: rebuilt when a source changes.
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)

# The other end of the window of TRL in pyproject.toml; constraints.txt has the newest.
OLDEST_TRL := 1.15.0
OLDEST_TRL_DIR := $(CURDIR)/$(VENV)/trl-$(OLDEST_TRL)

.PHONY: demo test test-all machines lint bench figures figures-steps docs wheel wheels clean install

install: $(STAMP)

# torch first and alone: a plain `pip install .` with build isolation, or a looser pin, may fetch another torch.
$(STAMP): pyproject.toml setup.py constraints.txt Makefile $(CSRC)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; a few minutes)"
	@$(PIP) install -q -c constraints.txt --upgrade pip "setuptools>=77" wheel
	@$(PIP) install -q -c constraints.txt torch numpy
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[train,retrieval,bench,peers,dev,triton]" pytest-xdist
	@touch $@

demo: $(STAMP)
	@# Passive waiting: on cores that are shared, spinning threads slow each other down several times over.
	OMP_WAIT_POLICY=PASSIVE $(BIN)/unisd demo $(DEMO_ARGS)

# Everything but the exhaustive sweeps, of which it holds one example of each kind: at most eight minutes of CPU time.
test: $(STAMP) $(OLDEST_TRL_DIR)
	@scripts/check.sh $(BIN) $(OLDEST_TRL_DIR) -m "not exhaustive"

# With the sweeps, and the library as the wheels have it.
test-all: $(STAMP) $(VENV)/.release $(OLDEST_TRL_DIR)
	@scripts/check.sh $(BIN) $(OLDEST_TRL_DIR)

# The suite as other processors and other versions of torch would run it; its table is docs/machines.md. An hour or two.
machines: $(STAMP)
	$(BIN)/python scripts/machines.py $(MACHINES_ARGS)

$(OLDEST_TRL_DIR): $(STAMP)
	@$(PIP) install -q --no-deps --upgrade --target $@ trl==$(OLDEST_TRL)
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tables of a CPU for the forward KL, in float32 and bfloat16, with every peer, in at most six minutes: what no longer
# fits says so.
bench: $(STAMP)
	$(BIN)/python -m bench --device cpu --case unisd_star_cpu_bf16 unisd_star kl_cpu_bf16 kl scoring --beta 0 --rounds 5 --peer-rounds 3 --deadline 300 $(BENCH_ARGS)

# Every figure of a CPU in docs/benchmarks.md and README.md, measured anew on this machine into a folder named after its
# processor: some 20 minutes of an idle one. FIGURES_ARGS=--list says what and how long.
figures: $(STAMP)
	$(BIN)/python -m bench figures $(FIGURES_ARGS)

# The same of whole training steps with every preset; some 40 minutes. Threads wait without spinning, as in the demo.
figures-steps: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench figures --steps $(FIGURES_ARGS)

# The API reference from the docstrings, build/api/index.html.
docs: $(VENV)/.docs
	@$(BIN)/python scripts/api.py

$(VENV)/.docs: $(STAMP)
	@$(PIP) install -q -c constraints.txt pdoc
	@touch $@

# One wheel for every Python >= 3.10 and torch >= 2.10, and for machines no older than this (docs/building.md).
wheel: $(STAMP)
	UNISD_BUILD=cpu $(PIP) wheel -q --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

# A release: an sdist, and manylinux_2_28 wheels for x86_64 and aarch64 made from it, checked (docs/building.md).
wheels: $(VENV)/.release
	$(BIN)/python scripts/wheels.py

$(VENV)/.release: $(STAMP)
	@$(PIP) install -q -c constraints.txt ziglang auditwheel twine build
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .benchmarks runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
