# Every target sets up what it needs (a virtual environment, dependencies, the engine), and does it once.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
OPTIONS ?=
SANITIZER ?=
OLDEST_TRITON := $(VENV)/triton-3.6.0
SHIPPED_TRITONS := $(patsubst %,$(VENV)/triton-%,3.7.1 3.8.0)  # by torch 2.13 and 2.14
TRITON ?=
TRITON_FOLDER := $(if $(TRITON),$(VENV)/triton-$(TRITON))
OLDEST_TRANSFORMERS := $(VENV)/transformers-5.15.0
TIMM := $(VENV)/timm-1.0.31
SITE_TOOLS := $(VENV)/site-tools
PTXEMU ?= $(wildcard ../shared/tools/ptxemu)
EMULATED ?= 80 90

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-interpreted test-emulated test-gpu test-oldest-transformers test-timm test-sanitized test-mutations compile-kernels gpu-static gpu-report lint fmt wheel docs bench plots ci clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 26

setup: $(INSTALLED)  ## virtual environment, dependencies and the compiled engine

demo: $(INSTALLED)  ## train a small language model on real text, with a table and a picture (under 3 minutes on 2 cores)
	$(RUN) examples/train_bytes.py $(OPTIONS)

test: $(INSTALLED)  ## run the tests
	TESTS_REQUIRE_ALL=1 $(RUN) -m pytest $(OPTIONS)

test-interpreted: $(INSTALLED) $(TRITON_FOLDER)  ## run the tests on the GPU kernels in Triton's interpreter (TRITON=3.7.1 on that version; no GPU needed)
	PYTHONPATH=$(TRITON_FOLDER) TRITON_INTERPRET=1 $(RUN) -m pytest -n auto -k triton $(OPTIONS)

test-emulated: $(INSTALLED) $(TRITON_FOLDER)  ## run the compiled GPU kernels in a PTX emulator (PTXEMU=its folder, EMULATED="80 90", TRITON=3.7.1; no GPU needed)
	@if test -z "$(PTXEMU)"; then echo "make test-emulated needs PTXEMU=FOLDER, the PTX emulator's; nothing was run"; else \
	for arch in $(EMULATED); do PYTHONPATH=$(TRITON_FOLDER) PTXEMU=$(PTXEMU) PTXEMU_ARCH=$$arch $(RUN) -m pytest tests/test_emulated.py tests/test_triton_precision.py tests/test_triton_one_key.py tests/test_triton_gate.py $(OPTIONS) || exit 1; done; fi

test-gpu: $(INSTALLED)  ## run the tests on CUDA tensors (SANITIZER="compute-sanitizer --tool memcheck" checks memory as well)
	TESTS_REQUIRE_ALL=1 TEST_DEVICE=cuda $(SANITIZER) $(RUN) -m pytest $(OPTIONS)

test-oldest-transformers: $(INSTALLED) $(OLDEST_TRANSFORMERS)  ## run the tests of the integration on the oldest transformers that it declares
	PYTHONPATH=$(OLDEST_TRANSFORMERS) $(RUN) -m pytest tests/integrations $(OPTIONS)

test-timm: $(INSTALLED) $(TIMM)  ## run the tests of the integration of timm
	PYTHONPATH=$(TIMM) $(RUN) -m pytest tests/integrations/test_timm.py $(OPTIONS)

test-sanitized: $(INSTALLED)  ## run the engine's tests under address, undefined-behaviour and thread sanitizers (needs GCC)
	$(RUN) tests/sanitized/run.py $(OPTIONS)

test-mutations: $(INSTALLED)  ## plant mistakes one at a time and show that the tests see each
	$(RUN) tests/mutations.py $(OPTIONS)

compile-kernels: $(INSTALLED) $(OLDEST_TRITON) $(SHIPPED_TRITONS)  ## compile the GPU kernels for every target on every Triton that torch ships, within a budget of registers and spills
	for triton in "" $(OLDEST_TRITON) $(SHIPPED_TRITONS); do PYTHONPATH=$$triton $(RUN) -m bench.compile_kernels $(OPTIONS) || exit 1; done

gpu-static: $(INSTALLED) $(SHIPPED_TRITONS)  ## model the GPU kernels' cycles from their compiled code (needs sassmeter, see --help)
	for triton in $(SHIPPED_TRITONS); do PYTHONPATH=$$triton $(RUN) -m bench.gpu_static $(OPTIONS) || exit 1; done

gpu-report:  ## is it right on this GPU, and how fast? no network, nothing is installed (OPTIONS="--minutes 7")
	$(firstword $(wildcard $(RUN)) $(PYTHON)) -m bench.gpu_report $(OPTIONS)

lint: $(INSTALLED)  ## ruff, mypy, clang-format, and the compiler's warnings about the engine
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror csrc_ref/*.h csrc_ref/*.cpp tests/sanitized/*.cpp
	$(RUN) tests/lint_engine.py

fmt: $(INSTALLED)  ## format the code
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .
	$(VENV)/bin/clang-format -i csrc_ref/*.h csrc_ref/*.cpp tests/sanitized/*.cpp

wheel: $(INSTALLED)  ## build this machine's wheel as a release has it, and try it in a clean environment without a compiler
	rm -rf build dist
	$(RUN) -m build --no-isolation --outdir build/wheel .
	mkdir -p dist
	@if test "$$(uname)" = Linux; then PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) -m auditwheel repair --wheel-dir dist build/wheel/*.whl; \
	else cp build/wheel/*.whl dist; fi
	TEST_WHEEL="$$(ls dist/*.whl)" $(RUN) -m pytest tests/test_packaging.py $(OPTIONS)

docs: $(INSTALLED) $(SITE_TOOLS)  ## build the documentation site in build/site; a link that leads nowhere is an error
	PYTHONPATH=$(SITE_TOOLS) $(RUN) -m mkdocs build --strict $(OPTIONS)

bench: $(INSTALLED)  ## measure against other ways to do the same, on this machine
	$(RUN) -m bench $(OPTIONS)

plots: $(INSTALLED)  ## draw the plots from the benchmark's CSV
	$(RUN) -m bench.plots $(OPTIONS)

ci:  ## what every change has to pass
	bash .ci/run

clean:  ## remove everything that was built
	rm -rf $(VENV) build dist *.egg-info triton_offset_bias/_engine_*

$(INSTALLED): pyproject.toml constraints.txt setup.py $(wildcard csrc_ref/*)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "Installing dependencies and compiling the engine (a few minutes the first time) ..."
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/triton-%: | $(INSTALLED)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target $@ triton==$*

$(OLDEST_TRANSFORMERS):
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check --target $@ transformers==5.15.0
	rm -rf $@/numpy*  # the environment's own fits its other packages

$(SITE_TOOLS): | $(INSTALLED)
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --target $@ mkdocs mkdocs-material "mkdocstrings[python]"

# In a folder of its own, because transformers looks for torchvision, and torchvision for the CUDA that it was built for.
$(TIMM): | $(INSTALLED)
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check --no-deps --target $@ timm==1.0.31 torchvision==0.28.0
