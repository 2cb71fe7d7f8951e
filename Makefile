PYTHON ?= python3
PORT ?= 8000
# Tests at the same time. Each worker has the package, torch and, for the site, a browser in memory: about 1 GB.
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
PYTEST = $(BIN)/pytest tests -n $(WORKERS)
BUILD := $(BIN)/jupyter-book build .
CHECKED := ewc_code ewc_checks ewc_experiments ewc_plots tests book/_ext $(wildcard tools benchmarks)

# A thread that waits for another may spin for some tens of microseconds: asleep at once, small networks train at half
# the speed; spinning for as long as OpenMP's default, a busy machine costs many times the work itself.
export GOMP_SPINCOUNT ?= 1000

.DEFAULT_GOAL := help
.PHONY: help html chapter notebooks test test-device test-signs test-notebooks test-site peers bench record readme pdf serve format clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, PYTHON=... chooses one") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps -e .
	@touch $@

html: $(STAMP)  ## install, execute every chapter, write _build/html/index.html
	@$(BIN)/python tools/unchanged.py || BOOK_NOTE=1 $(BUILD) -n -W --keep-going

chapter: $(STAMP)  ## one chapter with the reference pages, while it is written: make chapter NAME=bayes
	@mkdir -p _build/only-$(NAME)
	@$(BIN)/python -c 'import sys, yaml; \
	toc = yaml.safe_load(open("_toc.yml")); \
	[part.update(chapters=[c for c in part["chapters"] if c["file"] == "book/$(NAME)"]) for part in toc["parts"] if part.get("numbered")]; \
	toc["parts"] = [part for part in toc["parts"] if part["chapters"]]; \
	yaml.safe_dump(toc, open("_build/only-$(NAME)/toc.yml", "w"))'
	$(BUILD) --toc _build/only-$(NAME)/toc.yml --path-output _build/only-$(NAME)

notebooks: $(STAMP)  ## the chapters as notebooks for Colab and Jupyter, into notebooks/
	$(BIN)/python tools/make_notebooks.py

test: $(STAMP)  ## lint, types, tests of the package and of the book's sources
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy
	$(PYTEST) --dist loadfile -m "not site and not signs and not notebooks"

# The tests that go through the package's tensors; the rest is about files, pages and processes.
ON_DEVICE = consolidation devices experiments fisher gaussian laplace methods metrics models own sequences structures sweep tasks training wild_models
test-device: $(STAMP)  ## the package's tests on a stand-in for an accelerator, a minute; EWC_DEVICE=cuda make test for a real one
	EWC_DEVICE=standin $(BIN)/pytest -n $(WORKERS) --dist loadfile $(ON_DEVICE:%=tests/test_%.py)

test-signs: $(STAMP)  ## a wrong sign planted in every identity of the book, minutes
	$(PYTEST) -m signs

test-notebooks: $(STAMP)  ## every notebook in an environment of its own that has what a Colab has, minutes
	$(PYTEST) -m notebooks

test-site: $(STAMP)  ## tests of the built site: links, offline, browser
	$(PYTEST) -m site

peers: $(STAMP)  ## the packages that tests and benchmarks compare with; not needed for anything else
	$(BIN)/pip install --disable-pip-version-check -c requirements.txt -r benchmarks/requirements.txt

bench: peers  ## speed, error and memory against those packages, into benchmarks/results
	$(BIN)/pytest benchmarks -o python_files='bench_*.py'

SCALE ?= paper
record: $(STAMP)  ## the recorded runs: minutes on a GPU, hours on a CPU; WHAT=scenarios makes one of them
	$(BIN)/python tools/record.py --scale $(SCALE) $(WHAT)

readme: $(STAMP)  ## the README's results table and picture, from the last build
	$(BIN)/python tools/make_readme.py

pdf: $(STAMP)  ## the built site as one printable book, _build/pdf/book.pdf; needs Chromium
	$(BIN)/python tools/make_pdf.py

serve: $(STAMP)  ## the built site on http://localhost:8000
	$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

format: $(STAMP)  ## format the code and repair what can be repaired
	$(BIN)/ruff format $(CHECKED)
	$(BIN)/ruff check --fix $(CHECKED)

clean:  ## remove what a build made; .venv stays
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache .hypothesis
