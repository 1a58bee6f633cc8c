# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
.DEFAULT_GOAL := help
.PHONY: needs-compiler help quickstart install test test-ci test-slow test-gpu test-faults transformers5 neuron-checks test-neuron mutants lint format types bench reproduce kernel-report docs lock clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(STAMP)  ## Create .venv and install everything at the tested versions

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found. Install Python 3.11 (Debian: apt install python3.11 python3.11-venv)"; \
		echo "       or name another one: make $(MAKECMDGOALS) PYTHON=python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) -V) is too old: Python 3.11 or newer is needed."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv module. Debian: apt install python3.11-venv"; exit 1; }
	@test "$$(df -Pk . | awk 'NR==2 {print $$4}')" -gt 10485760 || { echo "error: less than 10 GiB free here; the packages (torch, ray, ...) take about 8 GiB."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): about 8 GiB, a few minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,s3,hf]'
	@touch $(STAMP)

quickstart: install  ## Install, then train and evaluate a small B'MOJO on the Python standard library (CPU, minutes)
	$(BIN)/bmojo run configs/quickstart.yaml

needs-compiler:
	@command -v $${CXX:-g++} >/dev/null || { echo "error: the tests compile the C++ kernels, and there is no g++. Debian: apt install g++"; exit 1; }

test: install needs-compiler  ## Quick tests, in three processes (about 9 minutes on 2 cores)
	$(BIN)/python -m pytest -n 3

test-ci: install needs-compiler  ## What CI runs beside them: more processes, more values (about a quarter of an hour)
	$(BIN)/python -m pytest -n 3 -m "ci and not slow"

TRANSFORMERS5 := .venv-transformers5
transformers5: $(TRANSFORMERS5)/.installed  ## The environment in which exported models meet transformers 5

# Beside its own packages it sees those of $(VENV) (torch and all), but not the checkout.
$(TRANSFORMERS5)/.installed: $(STAMP) constraints-transformers5.txt
	$(PYTHON) -m venv --clear $(TRANSFORMERS5)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > \
		$$($(TRANSFORMERS5)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/packages.pth
	$(TRANSFORMERS5)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-transformers5.txt
	@touch $@

NEURON := .venv-neuron
neuron-checks: $(NEURON)/.installed  ## The environment in which graphs for Neuron are lowered and run on a CPU

# As transformers5's, it sees the packages of $(VENV).
$(NEURON)/.installed: $(STAMP) constraints-neuron.txt
	$(PYTHON) -m venv --clear $(NEURON)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > \
		$$($(NEURON)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/packages.pth
	$(NEURON)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-neuron.txt
	@touch $@

test-neuron: install neuron-checks  ## Lower every block to StableHLO with torch-mlir, and run it on XLA's CPU (minutes)
	$(BIN)/python -m pytest -m neuron

test-slow: install needs-compiler transformers5  ## The tests that take longer: kills, resumes, whole pipelines
	$(BIN)/python -m pytest -m slow

test-faults: install  ## Break whole pipelines at random: kills, stops, outages, full disks, flipped bits (hours)
	$(BIN)/python -m tests.faults --report docs/faults

test-gpu: install  ## On a machine with a GPU: the Triton kernels' tests there instead of in the interpreter (minutes)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -n 4 $(wildcard tests/kernels/*/test_triton.py)
	$(BIN)/python -m benchmarks.train_step_gpu --check --seq-len 2048 --models bmojo --ways graphs --repeats 3

mutants: install needs-compiler  ## Wrong versions of the code, each of which some test must reject (minutes)
	$(BIN)/python -m tests.mutants

lint: install  ## ruff: lint and format; long lines, long sentences and old words in prose
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python docs/lint.py

format: install  ## Apply ruff's fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install  ## mypy
	$(BIN)/mypy

bench: install  ## List the benchmarks; each runs as `python -m benchmarks.NAME`
	@$(BIN)/python -m benchmarks

reproduce: install  ## Test the papers' claims at small scale (hours, resumes; page: runs/reproduce/); GPU=1, CORPUS="FILES"
	$(BIN)/python -m benchmarks.reproduce $(if $(GPU),--gpu) $(if $(CORPUS),--corpus $(CORPUS))

kernel-report: install  ## Compile every GPU kernel without a GPU: registers, spills, occupancy, rooflines
	$(BIN)/python -m benchmarks.kernel_report

DOCS := .venv-docs
docs: $(DOCS)/.installed  ## Build the documentation as a site in site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

# mkdocs reads docstrings without importing anything, so that its environment needs none of our packages.
$(DOCS)/.installed: constraints-docs.txt
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-docs.txt
	@touch $@

lock: install  ## Write the versions that are installed now to constraints.txt (and constraints-docs.txt)
	$(BIN)/python -m pip freeze --exclude-editable | grep -v ' @ ' > constraints.txt
	test ! -d $(DOCS) || $(DOCS)/bin/python -m pip freeze > constraints-docs.txt

clean:  ## Remove the environments and the site (never touches runs/)
	rm -rf $(VENV) $(TRANSFORMERS5) $(NEURON) $(DOCS) site
