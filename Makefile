# make demo      the whole flow, small, on this machine; ends in a table      (SEED=1 for other data and weights)
# make compare   all methods and an independent model on the demo's data
# make test      the tests
# make soak      kill runs with SIGKILL and resume them, for 20 minutes            (MINUTES=600 over night)
PYTHON  ?= python3
SEED    ?= 0
MINUTES ?= 20
BIN     := .venv/bin

METHODS := MixBCT UniBCT UniBCTscale16 NCCL NCCLscale16 BCT BCTscale16 AdvBCT L2 weakenedL2

.PHONY: demo compare test soak clean-demo

demo: .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tools/demo.sh $(SEED)

compare: .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tools/demo.sh $(SEED) $(METHODS) independent

test: .venv/.installed-test
	$(BIN)/python -m pytest

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
