# `make train` and `make test` work on a fresh clone with Python >= 3.10 and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
FUZZ_SECONDS ?= 600
CHAOS_FAULTS ?= 1000
CHAOS_SEED ?= 0
FAST := not (slow or fidelity or chaos)

# The CPU build of torch where there is no NVIDIA GPU: the plain Linux build brings several GB of CUDA libraries.
TORCH := torch==2.13.0
ifeq ($(shell uname -s),Linux)
ifeq ($(shell command -v nvidia-smi),)
TORCH := torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu --retries 1
endif
endif

.PHONY: train test slow lint format docs bench chaos fidelity fuzz soak clean

train: $(READY)
	$(BIN)/decentral train

# One process for each core and one more. They and the many that they start keep the bytecode that one has compiled.
test: export PYTHONDONTWRITEBYTECODE =
test: $(READY)
	$(BIN)/pytest -n logical --maxprocesses 8 -m '$(FAST)'

# What `make test` leaves out, some minutes.
slow: export PYTHONDONTWRITEBYTECODE =
slow: $(READY)
	$(BIN)/pytest -n logical --maxprocesses 8 -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site, below site/: open site/index.html. A dead link ends it.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Minutes, on a quiet machine, as root: what is predicted against real runs over links limited by the kernel.
fidelity: $(READY)
	$(BIN)/pytest -m fidelity tests/worlds/fidelity

# Hours, as root: real runs on a Ray of several nodes, in which everything is killed, frozen and cut again and again.
# After a failure, CHAOS_SEED=7 begins with the runs of that seed.
chaos: $(READY)
	DECENTRAL_CHAOS_FAULTS=$(CHAOS_FAULTS) DECENTRAL_CHAOS_SEED=$(CHAOS_SEED) $(BIN)/pytest -m chaos tests/chaos

bench: $(READY)
	$(BIN)/python -m benchmarks

# A million spoiled frames, then as many as coverage leads to. atheris has wheels for Linux alone.
fuzz: $(READY)
	$(BIN)/python -m fuzz --frames 1000000 --seconds $(FUZZ_SECONDS)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m fuzz.guided -max_total_time=$(FUZZ_SECONDS)

# Hours: the fuzzers, ten thousand rounds over real sockets with peers killed and started again, an hour of churn.
soak: fuzz
	$(BIN)/python -m soak.rounds
	$(BIN)/python -m soak.churn

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV)
