# make demo        the whole flow on a small scale; ends with a table               SEED=1: other data and weights
# make compare     all methods and an independent model on the demo's data          SEEDS="0 1 2": mean and range
# make compare WIDTH=256    the same with new models of another width than the old one's 128; both are kept
# make test        all tests
# make test-cluster  two torchruns as two machines, with docs/cluster.md's commands
# make lint        ruff check and ruff format --check
# make soak        kill runs and tools with SIGKILL and start them again, 20 minutes  MINUTES=600: overnight
# make clean-demo  delete demo/
PYTHON  ?= python3
SEED    ?= 0
SEEDS   ?= $(SEED)
WIDTH   ?= 128
MINUTES ?= 20
BIN     := .venv/bin

BESIDE  := $(if $(filter-out 128,$(WIDTH)),_f$(WIDTH))
METHODS := MixBCT UniBCT NCCL NCCLdefinition BCT BCTscale16 AdvBCT L2 RACT LCE

.PHONY: help demo compare test test-cluster lint soak clean-demo

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tools/demo.sh $(SEED)

compare: .venv/.installed
	for seed in $(SEEDS); do \
	    PATH="$(CURDIR)/$(BIN):$$PATH" WIDTH=$(WIDTH) bash tools/demo.sh $$seed $(METHODS) independent || exit 1; \
	done
	$(BIN)/python tools/ijbc_eval/compat_over_seeds.py $(SEEDS:%=demo/seed%/comparison$(BESIDE)/report.json) \
	    --out demo/comparison$(BESIDE).md

test: .venv/.installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-cluster: .venv/.installed-test
	$(BIN)/python -m pytest tests/cluster.py

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

soak: .venv/.installed-test
	$(BIN)/python tests/soak.py --minutes $(MINUTES) --seed $(SEED)

clean-demo:
	rm -rf demo

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else "Python 3.10 to 3.13 is needed, this is %d.%d; say make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv

.venv/.installed: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.installed-test: requirements-test.txt .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-test.txt
	touch $@
