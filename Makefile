# Each target sets everything up by itself: environment in .venv, dependencies by constraints.txt, C++ kernels.
# ARGS adds arguments to pytest: make bench ARGS='--pio-category=accuracy --pio-report=report'

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.dependencies-installed
BUILT := $(VENV)/.kernels-built
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
KERNELS := $(shell find kernels -type f)
CXX_FILES := $(filter %.cc %.h,$(KERNELS))

.PHONY: bench test sanitize lint setup clean
.DELETE_ON_ERROR:

bench: setup
	$(BIN)/pytest --pio-model=all --benchmark-compare $(ARGS)

# In two processes, whose threads give the core away while they wait: the tests alone keep little more than one busy.
WORKERS ?= 2

test: setup
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(WORKERS) --dist=loadfile $(ARGS)

# The kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer, beside the installation: tests/sanitized puts the
# kernels of build/sanitized in place of the installed ones. The sanitizer's library must be the first one loaded, and with
# it libstdc++, whose exceptions it watches; Python never frees all its memory; what a sanitizer prints must not be captured.
sanitize: setup
	CXX=g++ $(BIN)/cmake -S kernels -B build/sanitized -G Ninja -DPIO_SANITIZE=ON \
		-DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/sanitized
	PIO_SANITIZED=$$(echo $(CURDIR)/build/sanitized/_native.*.so) PYTHONPATH=$(CURDIR)/tests/sanitized \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/pytest --capture=sys tests/sanitized/check_sanitizers.py tests/native tests/decoder $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

setup: $(BUILT)

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "make: no virtual environment could be made in $(VENV); Debian and Ubuntu need the package python3-venv" >&2; exit 1; }
	$(PIP) install --constraint constraints.txt scikit-build-core nanobind cmake ninja
	@touch $@

# Without build isolation, so that the build tools are the pinned ones and a second build is incremental.
$(BUILT): $(INSTALLED) $(KERNELS)
	@command -v "$${CXX:-g++}" >/dev/null || { echo "make: the kernels need a C++ compiler and $${CXX:-g++} was not found; install g++ (on Debian and Ubuntu: apt install g++) or set CXX" >&2; exit 1; }
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[test]'
	@touch $@

clean:
	rm -rf build $(BUILT)
