# make demo    export both example checkpoints, check parity, compare latency, generate text
# make test    every test (make quick: without the slow ones)
# make lint    ruff and mypy
# make bench   the performance targets, short form, and latency of both example models; see docs/performance.md
# make cpp     the C++ runtime: what it is built with, three builds (two with sanitizers), its tests, lint
# make triton  a real Triton server, in an environment of its own, and the tests that need one
# make web     the JavaScript runtime and the page: packages from npm, and their tests in Node and Chromium
# make clean   remove what these targets made
# Each target first sets up .venv, which takes some minutes the first time.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test quick lint format bench cpp triton web clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := mscompile exporters engines validation
JOBS ?= 2

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

demo: $(READY)
	$(BIN)/python examples/demo.py

# One compute thread a test process: two processes of several threads each would wait for one another.
# A file's tests stay in one process, since they share what they export.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

test: quick
	$(PYTEST) --slow -m slow

quick: $(READY)
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(PACKAGES) examples

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/run.py --examples

# Debian packages, unpacked into build/cpp; give CPP_DEPENDENCIES= where CMake finds what it needs by itself.
CPP_DEPENDENCIES ?= clang
CPP := build/cpp
cpp: $(READY)
	$(if $(CPP_DEPENDENCIES),bash cpp/dependencies.sh $(CPP)/dependencies && \
	    bash cpp/dependencies.sh $(CPP)/dependencies $(CPP_DEPENDENCIES))
	for preset in release address thread; do \
	    (cd cpp && cmake --preset $$preset) && cmake --build $(CPP)/$$preset --parallel $(JOBS) && \
	    (cd $(CPP)/$$preset && ctest --output-on-failure) || exit 1; \
	done
	$(BIN)/python -m pytest -q --slow -rs tests/test_cpp.py
	$(if $(CPP_DEPENDENCIES),sed -nE 's|.*"file": "(.*/cpp/src/.*)".*|\1|p' $(CPP)/release/compile_commands.json | \
	    xargs -P $(JOBS) -n 1 $(CPP)/dependencies/bin/clang-tidy -p $(CPP)/release --quiet)

triton: $(READY)
	bash tests/triton_server.sh build/triton $(BIN)/python
	$(BIN)/python -m pytest -q --slow -rs tests/test_triton.py

web: $(READY)
	mkdir -p build/web
	cp web/package.json web/package-lock.json build/web
	npm ci --prefix build/web --ignore-scripts --no-audit --no-fund
	$(BIN)/python -m pytest -q --slow -rs tests/test_web.py tests/test_ort_mobile.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# The first of these that runs and is at least Python 3.11; the tested version is tried first.
# PIP_CONSTRAINT holds for the isolated build environments, too.
$(READY): pyproject.toml constraints.txt
	@python=; \
	for candidate in python3.11 python3.12 python3.13 python3; do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "mscompile needs Python 3.11 or newer with its venv module;" \
	        "install it (on Debian: python3.11 and python3.11-venv) and run make again" >&2; \
	    exit 1; \
	fi; \
	echo "setting up $(VENV) with $$("$$python" --version), which takes some minutes" >&2; \
	rm -rf $(VENV); \
	"$$python" -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	    $(BIN)/python -m pip install -c constraints.txt -e '.[export,ort,openvino,trt-rtx,public,retro,dev]'
	@touch $@
