# make demo trains and samples; make test runs the tests. Both start from a machine with Python 3.11+, gcc and make.
#   PYTHON=python3.12         the interpreter of .venv
#   PART=2, MINUTES=3         of make gpu: which part, and its time; OUT=folder, where its archive goes
#   FILES="tests/..."         of make test-settings: these tests alone; TABLE=file, where its table goes
#   TORCH_INDEX=https://...   where PyTorch comes from; unset, the configured index or PyTorch's CPU index is chosen

PYTHON ?= python3
TORCH_INDEX ?=
PART ?= 1
OUT ?= gpu-results
FILES ?=
TABLE ?= settings.md
CPU_INDEX := https://download.pytorch.org/whl/cpu

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
version = $(shell sed -n 's/^$(1)==//p' constraints.txt)
TORCH := $(call version,torch)
TRITON := $(call version,triton)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-settings check docs gpu clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train a small Diffusion Transformer on handwritten digits, then draw and score samples"
	@echo "make test    run the tests"
	@echo "make test-fast  most of them: none that is slow, starts a process or compiles"
	@echo "make test-settings  the tests as other CPUs add, with two threads and on a busy machine: about an hour"
	@echo "make check   ruff and mypy"
	@echo "make docs    the documentation as web pages, in site/"
	@echo "make gpu     correctness, training steps and operations on one NVIDIA GPU in 7 minutes, with the python3 that"
	@echo "             has torch there; make gpu PART=2 in 5 more: sampling, row kernels, race check, Nsight Compute"
	@echo "make clean   remove .venv, demo/ and what tools left behind"

demo: .venv/.demo
	@case $$($(PY) -c "$$DEMO_STATE") in \
	    trained) echo "== demo/run is trained already (rm -r demo/run to start anew)" ;; \
	    begun) echo "== demo/run was interrupted: continuing it"; $(PY) -m dit_fast.cli train --resume demo/run ;; \
	    absent) echo "== Training on MNIST: about 3 minutes on two cores"; rm -rf demo/run; \
	        $(PY) -m dit_fast.cli train --preset demo --out demo/run ;; \
	    *) exit 1 ;; \
	esac
	@echo "== Sampling"
	@$(PY) -m dit_fast.cli sample --ckpt demo/run --out demo/samples --cfg-scale 2 --compare-to
	@echo "== Look at demo/samples/sample.png and demo/run/loss.png"

# A run without a whole checkpoint has nothing to continue from.
define DEMO_STATE
from dit_fast.errors import CheckpointError
from dit_fast.checkpoint.folder import latest_checkpoint, read_manifest
try:
    manifest = read_manifest(latest_checkpoint("demo/run"))
    print("trained" if manifest["step"] >= manifest["train_config"]["steps"] else "begun")
except CheckpointError:
    print("absent")
endef
export DEMO_STATE

# Triton reads TRITON_INTERPRET when it is imported, so the kernels' own tests are a process of their own.
test: .venv/.test
	@test -L dit_fast/kernels || { echo "dit_fast/kernels is not a link to ../kernels: clone with core.symlinks=true"; exit 1; }
	@echo "== Tests"
	@failed=0; export OMP_NUM_THREADS=1; \
	$(PY) -m pytest -n 2 --ignore=tests/kernels || failed=1; \
	echo "== Tests of the kernels, in Triton's interpreter"; \
	TRITON_INTERPRET=1 $(PY) -m pytest -n 2 tests/kernels || failed=1; \
	if [ $$failed = 1 ]; then echo "== Some tests FAILED"; else echo "== All tests passed"; fi; \
	exit $$failed

test-fast: .venv/.test
	@failed=0; export OMP_NUM_THREADS=1; \
	$(PY) -m pytest -q -n 2 --fast --ignore=tests/kernels || failed=1; \
	TRITON_INTERPRET=1 $(PY) -m pytest -q -n 2 --fast tests/kernels || failed=1; \
	exit $$failed

# As other CPUs add, with more threads, and beside busy processes: six runs of the suite and a table of them.
test-settings: .venv/.test
	$(PY) -m tests.settings --out '$(TABLE)' $(FILES)

check: .venv/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: .venv/.test
	$(PY) -m mkdocs build --strict --quiet
	@echo "== Open site/index.html"

# The python of the machine, whose torch is built for its GPU; nothing is installed.
gpu:
	$(PYTHON) -m benchmarks.gpu.gpu_suite --part $(PART) --out '$(OUT)' $(if $(MINUTES),--minutes $(MINUTES))

clean:
	rm -rf .venv demo site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find dit_fast kernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

# The three stages of an installation. Each stamp is written last, so that an interrupted stage runs again.
.venv/.python:
	@echo "== 1/3 Python environment in .venv"
	@$(PYTHON) -c 'import sys; sys.exit("dit-fast needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; give PYTHON=...") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv .venv
	@touch $@

# A machine without NVIDIA's driver has no use for the CUDA build, which is ten times the size of the CPU build.
# PyTorch's own index holds other versions of its dependencies: they come from the configured index.
.venv/.torch: .venv/.python constraints.txt
	@echo "== 2/3 PyTorch $(TORCH) and Triton $(TRITON): the large downloads, 0.4 GB (with CUDA 3 GB)"
	@wanted="torch==$(TORCH)"; index="$(TORCH_INDEX)"; \
	if [ -z "$$index" ] && [ ! -e /dev/nvidiactl ] && ! command -v nvidia-smi > /dev/null; then \
	    wanted="$$wanted+cpu"; \
	    $(PIP) index versions torch 2> /dev/null | grep -qF "$(TORCH)+cpu" || index="$(CPU_INDEX)"; \
	fi; \
	echo "$$wanted from $${index:-the configured package index}"; \
	$(PIP) install --no-deps "$$wanted" $${index:+--index-url "$$index"}
	@$(PIP) install "torch==$(TORCH)" "triton==$(TRITON)" -c constraints.txt
	@touch $@

# Build isolation would fetch an unpinned setuptools.
.venv/.test .venv/.demo: .venv/.%: .venv/.torch pyproject.toml setup.py constraints.txt
	@echo "== 3/3 dit-fast and what 'make $*' needs"
	@$(PIP) install -c constraints.txt setuptools wheel
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[$*]'
	@touch $@
