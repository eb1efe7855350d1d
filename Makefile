# Every target does the set-up that it needs. `make demo` and `make test` work on a fresh clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.layercache-ready
PYTEST_ARGS ?= -n auto --dist loadfile
# One thread a worker: the tests are small, and workers that share cores by threads slow each other.
TEST_ENV := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: setup demo test lint format bench ablation benchmarks schema clean

setup: $(STAMP)

# torch goes first and alone, so that one build of it is chosen before anything depends on it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--editable '.[diffusers,plot,eval,hub,peers,dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/layercache demo --out out

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict layercache bench

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every method at equal measured speed. Stopped, it goes on where it was.
bench: setup
	$(BIN)/python -m bench --results bench/results

ablation: setup
	$(BIN)/python -m bench --ablation --results bench/results

# Speed and memory of LayerCache's own parts.
benchmarks: setup
	for part in calibration calibration_plans runtime solver surrogate; do \
		$(BIN)/python -m bench.$$part || exit 1; done

# plans/schema.json follows from the pydantic model; a test holds the two together.
schema: setup
	$(BIN)/python plans/make_schema.py

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
