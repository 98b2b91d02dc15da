# Each target does its whole set-up: it needs python3 (>= 3.10, with venv) and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the test files; more of them than cores gain nothing.
WORKERS ?= auto
TORCH := torch==2.13.0
CPU_WHEELS := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
STAMP := $(VENV)/.installed

.PHONY: install demo test lint types image clean

# Threads that wait without spinning: tests beside other jobs then take no longer than alone.
test: export OMP_WAIT_POLICY ?= PASSIVE

install: $(STAMP)

# Simulate undersampled scans, reconstruct each by two methods, print the errors and draw the maps into demo/.
demo: $(STAMP)
	$(BIN)/python -m quantitron.host.demo

test: lint types
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not see default editable installs: it gets a folder that is called quantitron.
types: $(STAMP)
	mkdir -p build/types
	ln -sfn "$(CURDIR)" build/types/quantitron
	cd build && MYPYPATH=types ../$(BIN)/mypy --config-file ../pyproject.toml -p quantitron.recon -p quantitron.gadgets -p quantitron.training

# Lint docker/, build the images with whatever engine there is, and try them; docker/image.sh says what can be set.
image:
	sh docker/image.sh

clean:
	rm -rf $(VENV) build demo quantitron.egg-info

# Where there is no GPU, the CPU build of torch saves gigabytes: from what pip is configured with, else from PyTorch's
# own wheels, else whatever build there is.
$(STAMP): constraints.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "quantitron needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) and the other requirements into $(VENV) (minutes on a first run)"
	@if nvidia-smi >/dev/null 2>&1; then \
		$(PIP) '$(TORCH)'; \
	else \
		$(PIP) '$(TORCH)+cpu' 2>/dev/null \
		|| $(PIP) --extra-index-url $(CPU_WHEELS) '$(TORCH)+cpu' 2>/dev/null \
		|| $(PIP) '$(TORCH)'; \
	fi
	$(PIP) -e '.[test]'
	@touch $(STAMP)
