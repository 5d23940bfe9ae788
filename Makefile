# Needs Python 3.11 or later and a C compiler; the rest is installed in $(VENV).
#   make test PYTHON=python3.13 VENV=.venv313    another interpreter
#   make test PYTEST_ARGS="-k int4 -x"           a part of the tests

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

venv = $(PYTHON) scripts/venv.py $(VENV)
bin = $(VENV)/bin

.PHONY: help demo test bench check packages sanitize oracles clean

help:
	@echo "make demo      quantize a real model through a local server: table, plot and proof"
	@echo "make test      all tests"
	@echo "make bench     kernels against memory bandwidth, the exchange against one that does not compute"
	@echo "make check     lint, format, types, stubs"
	@echo "make packages  build wheel and sdist, install each and editable in clean environments"
	@echo "make sanitize  kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make oracles   live comparison with torch, compressed-tensors and gguf"

demo:
	@$(venv) demo
	$(bin)/python examples/demo.py

test:
	@$(venv) test
	$(bin)/python -m pytest $(PYTEST_ARGS)

bench:
	@$(venv) test
	$(bin)/python benchmarks/kernels.py
	$(bin)/python benchmarks/exchange.py

check:
	@$(venv) dev
	PATH="$(abspath $(bin)):$$PATH" scripts/check

packages:
	@$(venv) dev
	PATH="$(abspath $(bin)):$$PATH" scripts/packages

sanitize:
	@$(venv) dev
	PATH="$(abspath $(bin)):$$PATH" scripts/sanitize $(PYTEST_ARGS)

oracles:
	@$(venv) oracles
	$(bin)/python -c "import compressed_tensors, gguf, ml_dtypes, safetensors, torch"
	$(bin)/python -m pytest -m oracle $(PYTEST_ARGS)

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
