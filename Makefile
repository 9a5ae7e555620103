# make demo | test | test-servers | fuzz | lint | bench, on a fresh clone with Python >= 3.11, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Index for torch, such as https://download.pytorch.org/whl/cpu or .../cu128; empty: pip's own.
TORCH_INDEX ?=
PIP_OPTIONS := -q --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test test-servers fuzz test-uv test-slurm lint style types bench clean

demo: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" mlflow run . --env-manager local -P recipe=demo -P workers=2

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test-servers: $(VENV)/.installed
	$(BIN)/python -m pip install $(PIP_OPTIONS) -e '.[servers]'
	.ci/postgres $(BIN)/python -m pytest -q tests/tracking/test_server.py tests/tracking/test_facility.py

# Opt-in: thousands of damaged inputs through the command line.
fuzz: $(VENV)/.installed
	CECTFLOW_FUZZ_PERCENT=400 $(BIN)/python -m pytest -n 2 -q tests/prediction/test_hostile_predictions.py

# Opt-in: an environment of 2 GB is made. uv reads no settings of pip; TORCH_INDEX is handed on.
test-uv: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check 'uv>=0.9'
	$(if $(PIP_FIND_LINKS),UV_FIND_LINKS="$(PIP_FIND_LINKS)") $(if $(TORCH_INDEX),UV_INDEX="$(TORCH_INDEX)") \
	  $(BIN)/python -m pytest tests/walks/uv_environment.py

# Opt-in: a Slurm of one node is started, as root; `apt-get install slurm-wlm` beforehand.
test-slurm: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps 'mlflow-slurm==1.0.6'
	$(BIN)/python -m pytest tests/walks/slurm_cluster.py

lint: style types

style: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.road --quick --json road-quick.json
	$(BIN)/python -m benchmarks.simulation --quick --json simulation-quick.json
	$(BIN)/python -m benchmarks.segmentation --quick --work runs/segmentation --json segmentation-quick.json
	$(BIN)/python -m benchmarks.distillation --quick --work runs/distillation --json distillation-quick.json
	$(BIN)/python -m benchmarks.registry --quick --json registry-quick.json
	$(BIN)/python -m benchmarks.prediction --quick --work runs/prediction --json prediction-quick.json

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cectflow needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_OPTIONS) torch
	$(BIN)/python -m pip install $(PIP_OPTIONS) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
