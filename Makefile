# Each target is complete on a fresh machine with Python >= 3.11, a C++ compiler and make.
PYTHON ?= python3
VENV ?= .venv
# Processes that run the tests, each on one thread most of the time.
WORKERS ?= 2
# Any torch >= 2.10 will do; name your own build, e.g. `make install TORCH=torch==2.11.0`.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: install demo test lint bench evidence evidence-small clean

install: $(VENV)/.installed

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install -e ".[evidence,test,lint]"
	touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

bench: install
	$(BIN)/python -m benchmarks.run

# The study of experiments/: minutes on two cores, or hours. What is there already is not made again.
evidence-small: install
	$(BIN)/python -m experiments --size small

evidence: install
	$(BIN)/python -m experiments --size full

clean:
	rm -rf $(VENV) build dist
