PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest

.PHONY: test test-matrix lint venv bench-%

venv:
	@scripts/venv.sh

# Ranks need cores: what starts them runs alone, everything else on two workers.
test: venv
	$(PYTEST) tests/unit -n 2 -q -m "not matrix and not gpu" --durations=5
	$(PYTEST) tests/distributed tests/e2e -q -m "not matrix and not gpu" --durations=10

# Every combination of settings against transformers: about an hour on two cores.
test-matrix: venv
	$(PYTEST) tests/e2e -q -m matrix

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	MYPYPATH=.venv/src .venv/bin/mypy -p waybill

# bench-finish_cost runs bench/finish_cost.py, and so on; ARGS passes options.
bench-%: venv
	$(PYTHON) bench/$*.py $(ARGS)
