# `make help` lists what can be done. Everything happens inside .venv, which is made on demand.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test test-fast chaos check protos wire-release bench docs dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Minga needs Python 3.11 or newer; set one with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cluster,dev]'
	@touch $(STAMP)

demo: $(STAMP) ## run the whole loop on real data: search, train, serve, federate, swap
	$(BIN)/minga demo

test: WORKERS ?= 3
test: ARGS ?=
test: $(STAMP) check ## run every check and every test; make test WORKERS=8 ARGS='-k serve'
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder $(ARGS)

test-fast: $(STAMP) ## run the tests that need no Ray and no second process
	$(BIN)/python -m pytest -m 'not slow'

chaos: POINTS ?= 400
chaos: SEED ?=
chaos: $(STAMP) ## kill the coordinator at hundreds of points; make chaos POINTS=1000 SEED=7
	$(BIN)/python -m pytest tests/federation/test_chaos.py --chaos-points=$(POINTS) $(SEED:%=--chaos-seed=%)

check: $(STAMP) ## lint, types, layers, protocol
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	$(BIN)/buf breaking protos --against $(RELEASED_WIRE)
	@$(MAKE) --no-print-directory protos OUT=$(VENV)/protos
	@diff -r $(VENV)/protos/minga/federation/v1 federation/minga/federation/v1 -x __pycache__ -x __init__.py \
	  && diff -r $(VENV)/protos/minga/inference/v2 serving/minga/inference/v2 -x __pycache__ -x '*.py' \
	  || { echo "The generated code differs from protos/: run 'make protos' and commit."; exit 1; }

OUT ?=
protos: FEDERATION = $(abspath $(or $(OUT),federation))
protos: SERVING = $(abspath $(or $(OUT),serving))
protos: $(STAMP) ## generate the wire code from protos/
	@mkdir -p $(FEDERATION) $(SERVING)/minga/inference/v2
	@cd protos && PATH="$(abspath $(BIN)):$$PATH" $(abspath $(BIN))/python -m grpc_tools.protoc -I . \
	  --python_out=$(FEDERATION) --mypy_out=quiet:$(FEDERATION) \
	  --grpc_python_out=$(FEDERATION) --mypy_grpc_out=quiet:$(FEDERATION) \
	  minga/federation/v1/federation.proto
	@cd protos && PATH="$(abspath $(BIN)):$$PATH" $(abspath $(BIN))/python -m grpc_tools.protoc -I . \
	  --mypy_out=quiet:$(SERVING) --descriptor_set_out=$(SERVING)/minga/inference/v2/open_inference.binpb \
	  minga/inference/v2/open_inference.proto

RELEASED_WIRE := protos/released.binpb
wire-release: $(STAMP) ## at a release: make the wire of now the one that may not be broken
	$(BIN)/buf build protos --exclude-source-info -o $(RELEASED_WIRE)

bench: ARGS ?= --quick
bench: $(STAMP) ## run every benchmark roughly; make bench ARGS= runs them in full
	@set -e; for file in $$(grep -l '^if __name__' benchmarks/*.py); do \
	  echo "== $$file"; $(BIN)/python $$file $(ARGS); done

docs: $(STAMP) ## write the reference from the code and build the site into site/
	$(BIN)/python -m minga.cli.reference docs/reference
	$(BIN)/zensical build --clean --strict

dist: $(STAMP) ## build wheel and sdist into dist/
	$(BIN)/python -m build

clean: ## remove the virtual environment, what was built, and caches
	rm -rf $(VENV) dist site .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
