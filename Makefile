# The project in four words: demo, test, lint, clean. Each builds what it needs.
#
#   make demo   DEMO_SCALE=2 DEMO_SEEDS=3      a longer demo, repeated with three seeds
#   make test   TESTS="-m 'not slow'" JOBS=4   arguments for pytest, and how many processes
#   make gpu-check CHECK="--minutes 20"        a check of a GPU machine
#   make ...    PYTHON=python3.12              the interpreter for the environment
#   make ...    VENV=/some/where/venv          another place for it
#   make ...    WHEELS=folder                  build it from wheels, without internet

VENV ?= .venv
PYTHON ?= python3
DEMO_SCALE ?= 1
DEMO_SEEDS ?= 1
TESTS ?=
CHECK ?=
JOBS ?= auto

export PYTHON WHEELS DEMO_SCALE DEMO_SEEDS

.PHONY: demo test lint clean environment wheels gpu-check

demo: environment
	$(VENV)/bin/python tools/demo.py --scale $(DEMO_SCALE) --seeds $(DEMO_SEEDS)

test: environment
	$(VENV)/bin/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal $(TESTS)

# What a site runs before it trusts a new machine: docs/gpu.md. No data, no network.
gpu-check: environment
	$(VENV)/bin/python tools/check_gpu.py $(CHECK)

lint: environment
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

environment:
	@tools/setup_env.sh $(VENV)

# On a machine with internet: fills WHEELS for one without; with FOR=3.12 INSTALLED=pip-freeze.txt
# for one that has that Python and torch.
wheels:
	@test -n "$(WHEELS)" || { echo "error: say where to: make wheels WHEELS=folder" >&2; exit 2; }
	@WHEELS= tools/setup_env.sh $(VENV)
	tools/fetch_wheels.sh $(WHEELS) $(VENV)/bin/python $(FOR) $(INSTALLED)

# Removes what make built; a virtual environment of another origin and runs' outputs stay.
clean:
	@if [ -f $(VENV)/.built-by-virtex-d2 ]; then rm -rf $(VENV); fi
	rm -rf demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -not -path './.git/*' -exec rm -rf {} +
