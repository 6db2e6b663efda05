PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
# Else each of the processes that tests start would compile the sources that it imports.
export PYTHONDONTWRITEBYTECODE :=

# What takes longest begins first, so that the workers end together.
LONGEST := $(addprefix tests/e2e/,test_reference_equality.py test_death.py test_start_and_end.py test_model_families.py weight_sync test_chaos.py)

.PHONY: test test-operators-off test-matrix test-nodes test-kernels test-asan test-gpu test-clients load-http soak chaos chaos-disaggregation lint venv bench-stall bench-capture_overhead bench-%

venv:
	@scripts/venv.sh

# On two workers, of which each has half of the cores. Those that share an engine or a server run on one of them.
test: venv
	$(PYTEST) tests/unit -n 2 -q -m "not matrix and not gpu" --durations=5
	$(PYTEST) $(LONGEST) tests/distributed tests/e2e -n 2 --dist loadscope --no-loadscope-reorder -q \
		-m "not matrix and not gpu and not nodes" --durations=10

# The same without the C++ operators, as on a processor that has no AVX2: torch computes what they do.
test-operators-off: export WAYBILL_CPU_OPERATORS := off
test-operators-off: test

# Every combination of settings against transformers: about an hour on two cores.
test-matrix: venv
	$(PYTEST) tests/unit tests/distributed tests/e2e -q -m matrix

# Two torchrun agents as two nodes, in network namespaces where that is permitted: some minutes.
test-nodes: venv
	$(PYTEST) tests/e2e/test_nodes.py -q --durations=5

# The Triton kernels against their torch twins, on the CPU in Triton's interpreter.
test-kernels: venv
	.venv/bin/pip install --quiet "triton>=3.6,<3.8"
	$(PYTEST) tests/unit/test_triton_*twins.py -q

# The C++ operators, built to check every access to memory. Leaks are those of Python, which frees nothing at its end.
test-asan: venv
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 \
		WAYBILL_CPU_OPERATORS_FLAGS="-fsanitize=address -fno-omit-frame-pointer -g -O1" \
		$(PYTEST) tests/unit/parallel/cpu_ops tests/unit/parallel/moe/test_experts.py \
		tests/unit/engine/models/test_batch_invariance.py -m "not matrix" -q --capture=sys -k "not library"

# On a machine with a CUDA device: the kernels, compiled, and the whole engine against transformers.
test-gpu: venv
	$(PYTEST) tests/unit/test_triton_*twins.py -q
	$(PYTEST) tests -q -m gpu

# Clients as their makers publish them, in an environment beside the project's: some minutes, most of them to install it.
test-clients: venv
	$(PYTHON) -m venv .venv-clients
	ls -d $(CURDIR)/.venv/lib/python3*/site-packages > $$(ls -d .venv-clients/lib/python3*/site-packages)/project.pth
	.venv-clients/bin/pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
	.venv-clients/bin/python -m pytest tests/clients -q

# A server under 200 streaming clients for a minute; ARGS passes options.
load-http: venv
	PYTHONPATH=tests:bench $(PYTHON) tests/load/http_load.py $(ARGS)

# Two dp ranks under random arrivals, aborts, flushes and pauses for ten minutes; ARGS passes options.
soak: venv
	PYTHONPATH=tests:bench $(PYTHON) tests/load/soak.py $(ARGS)

# Faults of all kinds against real services, 200 trials in some half an hour; ARGS="--seed 7" repeats one.
chaos: venv
	PYTHONPATH=tests:bench $(PYTHON) -m chaos $(ARGS)

# The same between an engine for prompts and one for what follows, 100 trials; with ARGS="--scene encoder" between an engine
# and its encoder. With --keep FILE it goes on where it was ended.
chaos-disaggregation: venv
	PYTHONPATH=tests:bench $(PYTHON) -m chaos.disaggregation_report $(ARGS)

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	MYPYPATH=.venv/src .venv/bin/mypy -p waybill

# Whole runs, which keep their reports in bench/results and make their models on first use; ARGS=--quick for a look.
bench-stall bench-capture_overhead: bench-%: venv
	$(PYTHON) bench/$*.py --json --write $(ARGS)

# bench-finish_cost runs bench/finish_cost.py, and so on; ARGS passes options.
bench-%: venv
	$(PYTHON) bench/$*.py $(ARGS)
