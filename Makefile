# `make` alone lists what there is to do. Everything runs in .venv, which is made at the first call.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto
PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet -c constraints.txt
# One thread a worker, and threads that wait asleep: on a busy machine spinning ones slow each other down tenfold.
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python -m pytest -q -n $(JOBS) --maxprocesses 4

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-compiled bench bench-gpu lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.demo ## quantize a real MiniLM-L6 and show what happened
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/.dev ## the tests, without the slow ones
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.dev ## all tests
	$(PYTEST)

test-compiled: $(VENV)/.dev ## the tests of the kernels on the code that GPUs would get, carried out on the CPU
	QFX_TEST_PTX=80 $(PYTEST) -m "not slow" tests/backends/triton
	QFX_TEST_PTX=90 $(PYTEST) -m "not slow" tests/backends/triton

bench: $(VENV)/.dev ## the benchmarks (nothing else should run meanwhile)
	$(VENV)/bin/python examples/benchmarks/cpu_encoder.py
	$(VENV)/bin/python examples/benchmarks/cpu_decoder.py --model tiny_lm --model llama-0.1b
	$(VENV)/bin/python examples/benchmarks/quantize_cost.py
	$(VENV)/bin/python examples/benchmarks/memory.py --model minilm --model llama-0.1b

bench-gpu: $(VENV)/.dev ## the benchmarks on a GPU (nothing else should run on it meanwhile)
	$(VENV)/bin/python examples/benchmarks/gpu_kernels.py
	$(VENV)/bin/python examples/benchmarks/gpu_models.py

lint: $(VENV)/.dev ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove what builds and tests left behind, the venv too
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit("qfx needs Python 3.11 or later, found " + sys.version.split()[0] + "; run: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)

# One stamp per set of dependencies: a second call installs nothing.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(PIP_INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(PIP_INSTALL) -e ".[demo,dev]"
	@touch $@
