# Start with `make demo` and `make test`. Both set up .venv when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED := 0
# The tests start hundreds of processes that import rayprune, which takes twice as long without bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo docs test test-oldest scenarios test-all torture fuzz check format setup bench clean

setup: $(VENV)/.done

# One pip call, so that torchvision picks the torch that it was built for.
$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: setup
	rm -rf runs/demo
	$(BIN)/rayprune train configs/digits_full.yaml configs/digits_infobatch.yaml run.storage_path=runs/demo
	$(BIN)/rayprune report runs/demo

# docs/reference, from the code; a test checks that it is current.
docs: setup
	$(BIN)/python docs/make_reference.py

# Everything but the long scenarios. Two processes that take whole files, those of tests/integration first: they are long.
# A test that hangs fails after 600 s, with the stack of each thread.
test: setup
	$(BIN)/python -m pytest --numprocesses=2 --timeout=600 --dist=loadfile --no-loadscope-reorder

# The trainers' tests again, on the oldest packages that pyproject.toml allows, beside the newest of everything else.
OLDEST := $(VENV)/oldest
$(OLDEST)/.done: setup
	test -f $@ || { $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLDEST) \
	  'transformers==4.57.1' 'huggingface_hub<1' 'tokenizers==0.22.1' 'datasets==4.0.0' 'accelerate==1.10.0' \
	  'lightning==2.5.0' 'pytorch-lightning==2.5.0' && touch $@; }

test-oldest: $(OLDEST)/.done
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest tests/trainers/test_huggingface.py -k 'not two and not killed'
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest tests/integration/trainers/test_loops.py -k 'not two and not killed'

# The long forms alone, the longest first: kills, a cluster that grows and shrinks, a soak.
scenarios: setup
	$(BIN)/python -m pytest -m scenario --numprocesses=2 --dist=load --maxschedchunk=1 tests/scenarios tests/integration tests/project tests/unit

test-all: test test-oldest scenarios

# 200 faults inside epochs, over both transports by turns; about an hour on two cores.
torture: setup
	$(BIN)/python -m tests.scenarios.kills --kills 200

# Commands on configs, data, checkpoints and run folders that are damaged at random.
fuzz: setup
	$(BIN)/python -m tests.scenarios.fuzz

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) runs/demo
