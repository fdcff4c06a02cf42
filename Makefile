# Everything from a fresh checkout: `make demo`, `make test`. Needs Python 3.11+, gcc and g++.
PYTHON ?= python3

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip
STAMP := $(VENV)/.setup-done
PINS := -c constraints.txt
DEMO := configs/demo/pfcr_maskrcnn_swin_demo_w4a4.py

# No recipe may pick up another environment's packages or settings.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.DELETE_ON_ERROR:
.PHONY: help setup demo test lint clean

help:
	@echo 'make setup   create $(VENV) with the pinned stack (builds onedl-mmcv, about 20 minutes)'
	@echo 'make demo    set up, quantize the demo detector to W4A4, print its AP table'
	@echo 'make test    set up, run ruff and the tests'
	@echo 'make lint    set up, run ruff'
	@echo 'make clean   remove $(VENV), caches and work_dirs/demo'
	@echo 'PYTHON=python3.11 picks the interpreter; PIP_FIND_LINKS=DIR uses local wheels'

setup: $(STAMP)

# The stamp goes first and comes back last: an interrupted set-up never looks complete.
# Every step takes its versions from constraints.txt: an open torch pulls gigabytes of CUDA.
$(STAMP): setup.py constraints.txt pfcr_mm/version.py pfcr_mm/quantizers/native.c
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo '$(PYTHON) is missing or older than 3.11; name another: make PYTHON=python3.11'; exit 1; }
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install $(PINS) torch setuptools wheel ninja psutil packaging
	MMCV_WITH_OPS=1 $(PIP) install $(PINS) --no-build-isolation onedl-mmcv
	$(PIP) install $(PINS) --no-build-isolation -e '.[dev]'
# opencv-python wants libGL, which a bare machine lacks; the headless build does without.
	$(PY) -c 'import cv2' 2>/dev/null || \
		$(PIP) install $(PINS) --force-reinstall --no-deps opencv-python-headless
	$(PY) -c 'import mmcv.ops, mmdet, pfcr_mm, timm'
	@touch $@

demo: $(STAMP)
	$(PY) tools/quant.py $(DEMO)

# Tensors of tests are tiny: a second thread is no faster, and beside other jobs ten times slower.
test: export OMP_NUM_THREADS ?= 1
test: lint
	$(PY) -m pytest

lint: $(STAMP)
	$(PY) -m ruff check .

clean:
	rm -rf $(VENV) build dist pfcr_mm.egg-info pfcr_mm/quantizers/_native*.so work_dirs/demo \
		.pytest_cache .ruff_cache
