# `make demo` trains on real digits, `make test` checks everything fast, `make test-slow` the rest.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-parity test-newer lint format clean

demo: .venv/installed
	$(BIN)/python -m effnetv2_jax.main --config=configs/digits.py --workdir=runs/digits

test: lint
	$(BIN)/python -m pytest -q -m "not slow and not parity" -n 2 --dist loadfile
	$(MAKE) --no-print-directory test-newer

# Processes that exchange sums give up on one that comes too late: they have the machine to themselves.
test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -q -m slow -n 2 --dist loadfile --ignore tests/test_processes.py
	$(BIN)/python -m pytest -q -m slow tests/test_processes.py

# Against PyTorch, timm, torchvision and Keras, which take gigabytes in an environment of their own;
# there too real weights on real photographs, and the notebooks.
test-parity: .venv-peers/installed-peers
	PEERS=.venv-peers/bin/python .venv-peers/bin/python -m pytest -q -m parity \
		tests/weights tests/test_real_weights.py tests/test_notebooks.py tests/tools/test_benchmark.py

# A fast subset on a newer Python, whose jax is newer, wherever there is one.
test-newer:
	@newer=$$(sh tests/find_newer_python.sh $(BIN)/python); \
	if [ -z "$$newer" ]; then \
		echo "No Python newer than $(BIN)'s was found: the newer jax is not tested here."; \
	else \
		$(MAKE) --no-print-directory PYTHON="$$newer" .venv-newer/installed-dev && \
		.venv-newer/bin/python -m pytest -q -m "not slow and not parity" -n 2 --dist loadfile \
			tests/models tests/test_steps.py tests/test_train_state.py tests/test_optimizers.py \
			tests/test_checkpoint.py tests/test_reporting.py tests/data/test_pipeline.py tests/nas/test_search.py \
			tests/tools/test_export.py tests/tools/test_convert.py; \
	fi

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PRECIOUS: %/bin/python
%/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
		sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, and $(PYTHON) is %d.%d: run make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $*

%/installed: setup.py | %/bin/python
	$*/bin/pip install --quiet --disable-pip-version-check -e '.[digits]'
	touch $@

%/installed-dev: setup.py | %/bin/python
	$*/bin/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

%/installed-peers: setup.py tests/requirements-peers.txt | %/bin/python
	$*/bin/pip install --quiet --disable-pip-version-check -e '.[digits]' -r tests/requirements-peers.txt
	touch $@

clean:
	rm -rf .venv .venv-newer .venv-peers .cache runs
