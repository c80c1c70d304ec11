# `make demo` and `make test` need Python 3.11 to 3.13 and pip, nothing else:
# both first build the virtual environment .venv. With an NVIDIA GPU it holds
# the CUDA build of JAX, without one it downloads no CUDA.

PYTHON ?= python3
BIN := .venv/bin
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)

.PHONY: demo test test-ci test-slow clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo       grow a network until it can do its task (a minute)'
	@echo 'make test       run the tests (about 12 minutes on 2 cores)'
	@echo 'make test-ci    test the wheel, and every Python that is installed'
	@echo 'make test-slow  run the long tests too'
	@echo 'make clean      remove the virtual environment'

.venv/ready: setup.cfg requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	@echo 'Building the virtual environment .venv (once)'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --upgrade pip
ifneq ($(HAS_GPU),0)
	@echo 'NVIDIA GPU found: installing the CUDA 12 build of JAX'
	@$(BIN)/python -m pip install -qq -r requirements.txt
endif
	@$(BIN)/python -m pip install -qq -e '.[test]' --config-settings editable_mode=compat
	@touch $@

demo: .venv/ready
	$(BIN)/python -m experiments.autogrow --preset=dots --workdir=runs/demo

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not ci'

test-ci: .venv/ready
	@$(BIN)/python -m pip install -qq -e '.[test,test-models]' --config-settings editable_mode=compat
	$(BIN)/python -m pytest -n 2 --dist load -rs -m ci

test-slow: .venv/ready
	$(BIN)/python -m pytest -m 'not ci'

clean:
	rm -rf .venv *.egg-info
