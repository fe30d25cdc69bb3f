# make demo    from nothing to a served dashboard
# make test    everything, as CI runs it
# make check   the fast loop: format, lint, types, quick tests
PYTHON ?= python3
BIN := .venv/bin
SERVE ?= 1
PORT ?= 5006

.PHONY: demo test check dashboard nano

.venv/.user: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dashboard]"
	touch $@

.venv/.dev: .venv/.user
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.user
	rm -rf runs/demo.zarr runs/demo
	mkdir -p runs
	$(BIN)/workbench generate nano data/prompts.jsonl runs/demo.jsonl --effort low --effort medium --effort high --overwrite
	$(BIN)/workbench capture nano runs/demo.jsonl runs/demo.zarr
	$(BIN)/workbench verify runs/demo.zarr
	$(BIN)/workbench study routing runs/demo.zarr --out runs/demo
	$(BIN)/workbench figures runs/demo.zarr --out runs/demo --format html
ifneq ($(SERVE),0)
	$(BIN)/workbench dashboard runs/demo.zarr --port $(PORT)
endif

dashboard: .venv/.user
	$(BIN)/workbench dashboard runs/demo.zarr --port $(PORT)

test: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

check: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 -m "not browser and not slow"
