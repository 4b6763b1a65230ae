# Every target installs what it needs first (launch/setup.sh; at once when nothing changed).
# ARGS goes on to the command: make demo ARGS="distill.train.num_tokens=200000", make test ARGS="-k kl".

ARGS ?=
PY := .venv/bin/python
CODE := minitron tests

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu test-docker test-slurm check bench tables format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv and install everything pinned in requirements.lock (PYTHON=... chooses one)
	@sh launch/setup.sh

demo: setup ## compress a real 135M model on this machine, ending with a report
	@.venv/bin/minitron compress experiment=demo $(ARGS)

# In the files' own order: the few and long tests of tests/e2e first, so that nothing long is left for the end.
test: setup ## run the tests, in two processes
	@$(PY) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu: setup ## run the tests that need a GPU (and Transformer Engine); docs/gpu.md
	@$(PY) -m pytest tests/gpu $(ARGS)

test-docker: ## build the cpu image for real and run tests in it; needs root, buildah, debootstrap (docker/test.sh)
	@bash docker/test.sh

test-slurm: setup ## as root: compress as jobs of a SLURM cluster made here (installed with apt), torchrun on two hosts
	@$(PY) -m pytest -m "slurm or twonode" tests/launch $(ARGS)

check: setup ## lint, format, types, import layers
	@sh .ci/check.sh

# Not in the lock file; without them tests.bench.kd_peers says so, and the others run.
.peers: tests/bench/requirements-peers.txt | setup
	-@.venv/bin/uv pip install --quiet --python .venv --no-deps --target $@ -r $< && touch $@

bench: setup .peers ## install the losses that we compare with into .peers, and run the timings in tests/bench
	@for file in $(filter-out %_table.py %__init__.py,$(wildcard tests/bench/*.py)); do \
		name=$$(basename "$$file" .py); \
		echo "== tests.bench.$$name"; $(PY) -m "tests.bench.$$name" $(ARGS) || exit 1; \
	done

tables: setup ## run the measurements on SmolLM2 in tests/bench/*_table.py, hours
	@for file in $(wildcard tests/bench/*_table.py); do \
		name=$$(basename "$$file" .py); \
		echo "== tests.bench.$$name"; $(PY) -m "tests.bench.$$name" $(ARGS) || exit 1; \
	done

format: setup ## format the code and mend what ruff can
	@$(PY) -m ruff check --fix $(CODE)
	@$(PY) -m ruff format $(CODE)

lock: setup ## resolve pyproject.toml into requirements.lock again (ARGS=--upgrade for newer versions)
	@.venv/bin/uv pip compile pyproject.toml --extra demo --extra dev --universal \
		--python-version 3.12 --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" --quiet --output-file requirements.lock $(ARGS)

clean: ## remove caches and build results (.venv and runs/ stay)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist *.egg-info
	@find minitron tests -name __pycache__ -type d -prune -exec rm -rf {} +
