# `make` alone lists the targets. Every target that needs the environment sets it up first.

PYTHON_BIN := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help setup demo test integrations test-all test-more test-more-torch test-more-tensorflow test-pages test-tools test-integrations test-reliability test-elastic test-hosts test-docker test-gpu test-horovod reliability soak lint format bench fuzz audit sbom docs notebook package clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv with the frameworks, hvdloss and Horovod (quick when up to date)
	@./scripts/setup.sh

demo: ## train on real data on several ranks, against one process (the rest is installed meanwhile)
	@./scripts/setup.sh --torch
	@$(PYTHON_BIN) examples/demo.py --setup ./scripts/setup.sh

test: setup ## run the tests
	$(PYTHON_BIN) -m pytest

integrations: setup ## install what the ways in from other tools need (Lightning, Transformers, MLflow, ...)
	@$(PYTHON_BIN) -m pip --disable-pip-version-check install -qq --constraint constraints.txt --editable '.[integrations]' || \
		echo "*** not all of them could be installed: their tests will be SKIPPED" >&2

test-all: test test-more-torch test-more-tensorflow test-elastic test-hosts test-reliability test-pages test-tools test-integrations test-docker ## run everything there is (hours)

test-more: test-more-torch test-more-tensorflow test-pages test-tools test-integrations ## run what `test` leaves out, but for jobs that are killed and the image

test-more-torch: setup ## PyTorch on 3 and 4 ranks and over MPI
	$(PYTHON_BIN) -m pytest -m more tests/torch

test-more-tensorflow: setup ## TensorFlow and Keras on 3 and 4 ranks and over MPI
	$(PYTHON_BIN) -m pytest -m more tests/tensorflow tests/keras

test-pages: setup ## slow pages of the documentation
	$(PYTHON_BIN) -m pytest -m more tests/docs

test-tools: setup ## slow examples, commands, explanations and packages
	$(PYTHON_BIN) -m pytest -m more tests/cli tests/core tests/examples tests/package tests/security

test-integrations: integrations ## Lightning, Transformers, MLflow, W&B, Ray, launchers
	$(PYTHON_BIN) -m pytest -m "more or not more" tests/integrations

test-reliability: setup ## inflict every kind of fault on real jobs, once
	$(PYTHON_BIN) -m pytest -m more tests/reliability

test-horovod: setup ## run Horovod's own tests with Horovod and with hvdloss, and compare (HOROVOD=folder of its repository at v0.28.1)
	$(PYTHON_BIN) scripts/horovod_tests.py $(HOROVOD)

reliability: setup ## inflict every kind of fault on real jobs, and write docs/explanation/reliability.md's table (40 minutes)
	$(PYTHON_BIN) tests/reliability/inflict.py --docs

soak: setup ## train on 8 ranks for 20 minutes while ranks are killed (SOAK="--minutes 720" for a night)
	$(PYTHON_BIN) tests/reliability/soak.py $(SOAK)

test-elastic: setup ## kill, stop, add, take away and preempt ranks of real elastic jobs
	$(PYTHON_BIN) -m pytest tests/elastic -m "more or not more"

test-hosts: setup ## train across hosts out of network namespaces, by ssh, and cut, slow and kill them (root)
	@./scripts/hosts_tools.sh
	$(PYTHON_BIN) -m pytest -m hosts tests/hosts

test-docker: setup ## build the container image and run it: locked up, with ranks, as two hosts (root)
	@./scripts/docker_tools.sh
	$(PYTHON_BIN) -m pytest -m docker tests/docker

test-gpu: setup ## run ranks on a CUDA GPU, over NCCL (a GPU; Horovod from `hvdloss install --nccl`)
	$(PYTHON_BIN) -m pytest -m gpu tests/gpu

lint: setup ## check style and types
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .
	$(PYTHON_BIN) -m mypy

format: setup ## put the code into the project's format
	$(PYTHON_BIN) -m ruff check --fix .
	$(PYTHON_BIN) -m ruff format .

bench: setup ## measure steps and all-reduces on 2 and 4 ranks, Gloo and MPI (results under runs/bench)
	.venv/bin/hvdloss bench step -np 2 -np 4 --controller both --out runs/bench
	.venv/bin/hvdloss bench allreduce -np 2 --controller both --out runs/bench

fuzz: setup ## fuzz every reader of bytes, 20 s each (FUZZ_SECONDS=...), guided by coverage; corpus in runs/fuzz
	@$(PYTHON_BIN) -m pip install -q "atheris>=2.3" || true
	$(PYTHON_BIN) tests/fuzz/run.py --seconds $(or $(FUZZ_SECONDS),20)

audit: setup ## look for known vulnerabilities in what is installed; says loudly if it cannot
	$(PYTHON_BIN) scripts/audit.py audit

sbom: setup ## list what is installed, as CycloneDX (runs/sbom.json)
	$(PYTHON_BIN) scripts/audit.py sbom

docs: setup ## build the documentation into site/, strictly and without a network
	NO_MKDOCS_2_WARNING=1 $(PYTHON_BIN) -m mkdocs build --strict

notebook: setup ## make docs/tutorial.ipynb out of docs/tutorial.md, and execute it
	$(PYTHON_BIN) docs/_site/notebook.py

package: setup ## build wheel and sdist into dist/, check them, and try them in clean environments
	$(PYTHON_BIN) scripts/package.py

clean: ## remove what building, testing and running left (not .venv, .venv-audit)
	rm -rf build dist site *.egg-info runs .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf .venv .venv-audit
