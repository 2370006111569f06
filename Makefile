# Every target makes the virtual environment it needs; none needs the network once the packages are installed, but for
# the first `make nightly`, which has pip fetch the JSON Schema test suite.
#   VENV=path     another environment          PYTHON=python3.12   the interpreter it is made from
#   PEERS=path    where bench-cpu's peers are  BENCH_ARGS=...      what bench-cpu measures, and how much of it
#   LITELLM=path  where the router's peer is
#   PIP_ARGS=...  passed to pip install, for example --index-url of a mirror

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PIP_ARGS ?=
PEERS ?= .venv-peers
LITELLM ?= .venv-litellm
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# the tests start hundreds of processes, each of which would compile the same sources again
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test check lint types layers docs docs-check fmt bench bench-cpu bench-peers bench-litellm nightly soak lock sbom release clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found" >&2; \
		echo "hint: install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing Quire and what it needs into $(VENV) (about 600 MB the first time)"
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -e '.[dev,bench,release]'
	@touch $@

venv: $(STAMP) ## make the virtual environment and install Quire into it

quickstart: $(STAMP) ## serve the built-in model and ask it one question
	$(BIN)/platform quickstart manifests/quickstart.yaml

test: $(STAMP) ## run the tests, three files at a time: those of whole platforms first, as they take longest and mostly wait
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: lint types layers docs-check ## run every check but the tests

lint: $(STAMP) ## ruff: lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy --strict
	$(BIN)/mypy

layers: $(STAMP) ## import-linter: who may import what
	$(BIN)/lint-imports

docs: $(STAMP) ## write docs/reference anew
	$(BIN)/platform reference docs/reference

docs-check: $(STAMP) ## fail if docs/reference is not what `make docs` would write
	$(BIN)/platform reference --check docs/reference

fmt: $(STAMP) ## format the source
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## compare with transformers on the built-in model; rows go to benchmarks/results
	$(BIN)/python -m benchmarks.run throughput --model tiny

bench-cpu: $(STAMP) bench-peers ## compare with llama.cpp, oneDNN, transformers and the machine (hours); BENCH_ARGS=--quick
	$(BIN)/python -m benchmarks.run cpu --peers $(PEERS) $(BENCH_ARGS)

bench-peers: $(PEERS)/.installed ## build llama.cpp for bench-cpu from the source that a Python package brings along

$(PEERS)/.installed:
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) gguf cmake ninja
	$(PEERS)/bin/python -m pip download -q --disable-pip-version-check $(PIP_ARGS) --no-deps --no-binary llama-cpp-python \
		-d $(PEERS) llama-cpp-python
	mkdir -p $(PEERS)/source && tar -xzf $(PEERS)/llama_cpp_python-*.tar.gz --strip-components 1 -C $(PEERS)/source
	$(PEERS)/bin/cmake -S $(PEERS)/source/vendor/llama.cpp -B $(PEERS)/llama -G Ninja \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(PEERS))/bin/ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
		-DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
	$(PEERS)/bin/cmake --build $(PEERS)/llama --target llama-server llama-batched-bench llama-quantize
	@touch $@

bench-litellm: $(LITELLM)/.installed ## install LiteLLM's proxy for the benchmark of the router, apart from all else

$(LITELLM)/.installed:
	test -x $(LITELLM)/bin/python || $(PYTHON) -m venv $(LITELLM)
	$(LITELLM)/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) 'litellm[proxy]'
	@touch $@

nightly: $(STAMP) ## run every suite at 20 times the examples, the router's with two workers, too; record what came of it
	export QUIRE_TEST_EFFORT=20 QUIRE_FIGURES=benchmarks/results/survival.jsonl; \
	$(BIN)/python -m pytest -m '' tests/e2e tests/integration tests/clients; timed=$$?; \
	$(BIN)/python -m pytest -m '' -n 2 --dist loadfile tests/unit tests/test_*.py; code=$$((timed + $$?)); \
	QUIRE_TEST_EFFORT=1 QUIRE_TEST_WORKERS=2 $(BIN)/python -m pytest tests/integration -k "router or adapters"; code=$$((code + $$?)); \
	printf '{"date": "%s", "commit": "%s", "passed": %s}\n' "$$(date -u +%FT%TZ)" "$$(git rev-parse HEAD)" \
		"$$(test $$code -eq 0 && echo true || echo false)" >> benchmarks/results/nightly.jsonl; exit $$code

MINUTES ?= 30
soak: $(STAMP) ## a platform under mixed traffic for MINUTES=30: whether anything grows, or is left (SOAK_TRACE=1: where)
	QUIRE_SOAK_MINUTES=$(MINUTES) QUIRE_FIGURES=benchmarks/results/survival.jsonl \
	$(BIN)/python -m pytest -m '' -s tests/e2e/test_soak.py

lock: $(STAMP) ## pin what a release runs on, by version and hash, in release/
	$(BIN)/python -m release.locks

sbom: $(STAMP) ## write the list of what a release is made of (CycloneDX) into dist/
	mkdir -p dist && $(BIN)/python -m release.sbom dist/quire.cdx.json

release: $(STAMP) ## make a release in dist/: the wheel, the locks, the list of what is in them, and their sums
	rm -rf dist && mkdir dist
	$(BIN)/python -m pip wheel -q --disable-pip-version-check $(PIP_ARGS) --no-deps -w dist .
	cp release/requirements.txt release/requirements-torch.txt dist/
	$(BIN)/python -m release.sbom dist/quire.cdx.json
	cd dist && sha256sum * > SHA256SUMS

clean: ## remove the virtual environment and caches; running models stay (platform down stops them)
	rm -rf $(VENV) .venv-ci .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
