# Two commands: `make demo` and `make test`. Everything lives in .venv; exact versions are in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install demo test test-all lint benchmarks clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[all]'
	touch $@

# The GPTQ loader (gptqmodel, optimum) is an extra of its own: heavy, and needed to prove GPTQ files only.
.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[all,gptq,dev]'
	touch $@

demo: install
	$(BIN)/signround quantize examples/llama-4m --scheme w4g32 --to gguf --to onnx --to gptq --iters 100 --samples 128 -o demo

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one thread each: small matrices gain nothing from threads, and lose much where cores are shared.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test: lint
	$(PYTEST) -m 'not slow'

test-all: lint
	$(PYTEST)

benchmarks: .venv/.installed-dev
	$(BIN)/python benchmarks/quality.py examples/llama-4m --scheme w2g64 --scheme w4g32 \
		--method signround --method signround-400 --method rtn --samples 64 --seqlen 256
	$(BIN)/python benchmarks/memory.py

clean:
	rm -rf .venv demo
