# make demo: train, resize twice, export, draw. make test: lint, types, tests. Both make .venv if it's missing.
PYTHON ?= python3
BIN := .venv/bin
# Processes that share the tests of `make test` and `make quick`, file by file. Each has up to four ranks of its own,
# which mostly wait for one another.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: demo test quick matrix coverage mutants faults faults-peers soak gpu lint clean
.DELETE_ON_ERROR:

demo: .venv/demo.stamp
	$(BIN)/python examples/megatron_gpt/demo.py --force

# All but the widest tables, in sixteen to twenty minutes.
test: lint
	$(PYTEST) -m "not matrix"

# The widest tables: every cell of those that docs/parallelism.md shows, and more topologies elsewhere.
matrix: .venv/dev.stamp
	$(BIN)/python -m pytest -m matrix

# The tests without those marked slow, in six to seven minutes.
quick: .venv/dev.stamp
	$(PYTEST)

# Lines and branches of `ckpt` that its own tests don't reach; fails if there are any. About four minutes.
coverage: .venv/dev.stamp
	mkdir -p build
	$(BIN)/python -m coverage run -m pytest -q -m "" --hypothesis-seed=0 tests/ckpt
	$(BIN)/python -m coverage report

# Small faults in the modules that commit, read and (a sample) plan: tests must notice 90 %. About fifteen minutes.
mutants: .venv/dev.stamp
	$(BIN)/python tests/mutants.py commit reader
	$(BIN)/python tests/mutants.py plan --sample 120

# All faults of tests/faults, and the figures at the end: within an hour on two cores. Kills beside what else takes a
# core; then sick ranks beside the sick object store, both of which mostly wait.
FIGURES := build/faults
TRY := FAULTS=all $(BIN)/python -m pytest -q -m ""
KILLS := tests/faults/test_kills.py
RANKS := tests/faults/test_sick_ranks.py
STORE := tests/faults/test_sick_object_store.py
faults: .venv/dev.stamp
	rm -rf $(FIGURES) && mkdir -p $(FIGURES); failed=0; \
	FAULTS_OUT=$(FIGURES)/kills.json $(TRY) $(KILLS) & other=$$!; \
	FAULTS_OUT=$(FIGURES)/others.json $(TRY) tests/faults --ignore=$(KILLS) --ignore=$(RANKS) \
		--ignore=$(STORE) || failed=1; \
	wait $$other || failed=1; \
	FAULTS_OUT=$(FIGURES)/ranks.json $(TRY) $(RANKS) & other=$$!; \
	FAULTS_OUT=$(FIGURES)/store.json $(TRY) $(STORE) || failed=1; \
	wait $$other || failed=1; \
	$(BIN)/python tests/faults/figures.py $(FIGURES)/*.json; exit $$failed

# The same faults for other libraries; `make faults-peers DEEPSPEED=PYTHON` names an interpreter that has DeepSpeed.
faults-peers: .venv/dev.stamp
	$(BIN)/python tests/faults/peers.py $(if $(DEEPSPEED),--deepspeed-python $(DEEPSPEED))

# Ten minutes of saves, in which nothing may grow.
soak: .venv/dev.stamp
	$(BIN)/python tests/faults/soak.py

# On a machine with an H100 or H200: tests, speed, saves and offload in eight minutes, and a table. Without a GPU it
# ends with 2. `make gpu GPU_PYTHON=PYTHON` uses an interpreter that has torch, pytest and the rest already.
gpu: $(if $(GPU_PYTHON),,.venv/dev.stamp)
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "uni3d needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv

.venv/%.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing uni3d[$*] into .venv (PyTorch is large: this can take minutes)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

clean:
	rm -rf .venv build ./*.egg-info demo-run
