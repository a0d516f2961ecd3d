# `make` lists the verbs. Each one that runs Python makes .venv and installs into it first.
#
# Which torch: without an NVIDIA GPU, 2.13.0; with one, the newest CUDA build. To be sure of the (much smaller) CPU
# build, point pip at where it is offered:
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1; ls /dev/nvidia0 2>/dev/null)
TORCH ?= $(if $(GPU),torch>=2.6,torch==2.13.0)
TORCH_INDEX ?=

# Tells DeepSpeed's launcher what it would otherwise guess, with a warning.
CPU := $(if $(GPU),,DS_ACCELERATOR=cpu)

# DeepSpeed looks for ninja on the path when it compiles its communication for several CPU ranks.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

help:
	@echo 'make demo    train a small BLIP on emoji pictures and test it on a vendor it never saw (runs/emoji)'
	@echo 'make test    run the tests'
	@echo 'make seeds   the demo over three seeds, and a summary'
	@echo 'make bench   run the benchmarks'
	@echo 'make aot     compile every kernel for sm_80 and sm_90, without a GPU; registers, shared memory, spills'
	@echo 'make bench-gpu     test and measure the kernels on this GPU, in at most eight minutes (benchmarks/results)'
	@echo 'make tune-kernels  find the fastest kernel configurations for this GPU and store them'
	@echo 'make lint    check style and formatting'
	@echo 'make clean   remove .venv and what was built; data/ and runs/ stay'

demo: $(VENV)/installed data/emoji/tokenizer.json
	$(CPU) $(VENV)/bin/deepspeed --quiet blipfast/train.py --config configs/emoji.yaml

data/emoji/tokenizer.json: | $(VENV)/installed
	$(VENV)/bin/blipfast data emoji data/emoji
	$(VENV)/bin/blipfast tokenizer train data/emoji/train.jsonl --vocab-size 1200 --output $@

test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest
	$(if $(GPU),$(VENV)/bin/python -m pytest -m gpu)

seeds: $(VENV)/installed data/emoji/tokenizer.json
	$(VENV)/bin/python benchmarks/emoji_seeds.py

bench: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest benchmarks/ --benchmark-only

aot: $(VENV)/installed-dev
	$(VENV)/bin/python -m blipfast.kernels.aot

bench-gpu: $(VENV)/installed-dev
	$(VENV)/bin/python benchmarks/gpu.py

tune-kernels: $(VENV)/installed-dev
	$(VENV)/bin/python benchmarks/tune_kernels.py

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first because DeepSpeed's setup.py imports it, which is also why nothing is built in isolation.
$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)' numpy || $(PIP) 'torch>=2.6' numpy
	$(PIP) 'setuptools>=70' wheel ninja packaging psutil py-cpuinfo
	$(PIP) --no-build-isolation -e '.[train,plot,fast]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --no-build-isolation -e '.[train,plot,fast,dev]'
	touch $@

.PHONY: help demo test seeds bench aot bench-gpu tune-kernels lint clean
