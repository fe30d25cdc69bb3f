# make demo    from nothing to a served dashboard
# make test    everything, as CI runs it
# make check   the fast loop: format, lint, types, quick tests
# make paper   the figures of a paper, from RUN into OUT
# make docs    the documentation site, into site/
#
# TORCH=auto (the default) installs the CUDA or ROCm build of PyTorch where a GPU is found and the CPU build elsewhere;
# TORCH=cpu, cuda or rocm decide it, as does a folder of PyTorch's index such as TORCH=cu126.
PYTHON ?= python3
TORCH ?= auto
BIN := .venv/bin
SERVE ?= 1
PORT ?= 5006

# pip compiles one file after the other, for a minute or two. It is told not to, by a 0, and all cores compile what it
# installed. The packages' own tests and large packages of which few modules are imported are left out: Python compiles
# these few itself when they are imported.
INSTALL := PIP_NO_COMPILE=0 $(BIN)/python
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/(tests|transformers/models|moto|openai|pip|mypy)/' .venv/lib || true

COMPILE_LOOPS := from workbench.kernels import cpu; cpu.compile_loops()

.PHONY: demo test check dashboard nano run findings paper docs

.venv/.torch-$(TORCH): constraints.txt scripts/install_torch.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$($(PYTHON) --version) is too old: Python 3.11 or newer is needed; make demo PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' || { echo "this Python cannot make environments: apt-get install python3-venv"; exit 2; }
	@printf '── installing into .venv: torch and the rest, one to four minutes the first time\n'
	$(PYTHON) -m venv .venv
	@$(INSTALL) scripts/install_torch.py $(TORCH) --constraints constraints.txt
	@rm -f .venv/.torch-*; touch $@

.venv/.user: pyproject.toml constraints.txt .venv/.torch-$(TORCH)
	$(INSTALL) -m pip install -q -c constraints.txt -e ".[dashboard]"
	@$(COMPILE)
	touch $@

# All that users have, too: one call of pip resolves both, and builds the package once.
.venv/.dev: pyproject.toml constraints.txt .venv/.torch-$(TORCH)
	$(INSTALL) -m pip install -q -c constraints.txt -e ".[dev]"
	@$(COMPILE)
	touch .venv/.user $@

# $(call step,WHAT,COMMAND): say what is done, do it, say how long it took
define step
@printf '\n── %s\n' "$(1)"; begun=$$(date +%s); $(2) || exit 1; printf '   took %d s\n' $$(($$(date +%s) - begun))
endef

demo: .venv/.user
	@rm -rf runs/demo.zarr runs/demo; mkdir -p runs
	$(call step,nano answers 200 problems at three efforts,$(BIN)/workbench generate nano data/prompts.jsonl \
	  runs/demo.jsonl --batch 200 --overwrite --effort low --effort medium --effort high)
	$(call step,its routing and sinks and neurons are recorded,$(BIN)/workbench capture nano runs/demo.jsonl \
	  runs/demo.zarr --record routing --record sinks --record logprobs --record neurons:2)
	$(call step,a graph explains one token,$(BIN)/workbench graph nano --prompt "24*29" --effort high \
	  --out runs/demo-graph.json --overwrite > /dev/null)
	$(call step,the run is checked,$(BIN)/workbench verify runs/demo.zarr)
	$(call step,studies and their report,$(BIN)/workbench report runs/demo.zarr --out runs/demo/report.html --overwrite)
	$(call step,every figure as a page,$(BIN)/workbench figures runs/demo.zarr --out runs/demo --format html --overwrite > /dev/null)
	$(call step,what the run says,$(BIN)/workbench summary runs/demo.zarr)
	@printf '\nreport: runs/demo/report.html   figures: runs/demo/*.html   dashboard: make dashboard\n\n'
ifneq ($(SERVE),0)
	$(BIN)/workbench dashboard runs/demo.zarr --model nano --port $(PORT)
endif

# Rebuilds everything in data/ that is made: an hour and a half on two cores.
nano: .venv/.user
	rm -rf data/nano data/nano.dense data/demo.zarr
	$(BIN)/python -m workbench.data.train --out data/nano
	$(BIN)/python -m workbench.data.evaluate data/nano --before data/nano.dense
	$(BIN)/python -m workbench.data.card data/nano
	$(BIN)/python -m workbench.data.prompts data/prompts.jsonl
	$(MAKE) run

# The finished run that comes with the project.
run: .venv/.user
	mkdir -p runs
	rm -rf data/demo.zarr
	$(BIN)/workbench generate nano data/prompts.jsonl runs/bundled.jsonl --dtype float32 --batch 200 --overwrite
	$(BIN)/workbench capture nano runs/bundled.jsonl data/demo.zarr --dtype float32

# What the studies and experiments say of the finished run: data/findings.md. Sample sizes are in the script, and results
# that are in runs/findings are not made again.
findings: .venv/.user
	$(BIN)/python scripts/findings.py

# The figures of a paper from a run, each as a script of its own: make paper RUN=runs/demo.zarr
RUN ?= data/demo.zarr
OUT ?= runs/paper
paper: .venv/.user
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[figures]"
	for script in notebooks/figures/*.py; do $(BIN)/python $$script $(RUN) $(OUT) pdf svg png || exit 1; done
	$(BIN)/workbench figures $(RUN) --out $(OUT)/supplement --set supplement --column single --format pdf --overwrite

# The documentation site, into site/; a warning is an error.
docs: .venv/.dev
	$(BIN)/mkdocs build --strict --quiet

dashboard: .venv/.user
	$(BIN)/workbench dashboard runs/demo.zarr --model nano --port $(PORT)

# hundreds of processes of the tests import the same modules: Python may keep them compiled
test check: export PYTHONDONTWRITEBYTECODE :=
test: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# Beside the tests, which also wait, types are checked and the loops of kernels compiled: processes that need the same
	@# loops at the same time would compile them several times. A third process uses cores while others wait.
	$(BIN)/mypy & types=$$!; $(BIN)/python -c '$(COMPILE_LOOPS)' & $(BIN)/python -m pytest -n 3 --dist worksteal; \
	  tests=$$?; wait $$types && exit $$tests

check: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 -m "not browser and not slow"
