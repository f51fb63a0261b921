# README and CI call these targets and nothing else.
PYTHON ?= python3
UV := 0.13.9
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := sdk operator trainer tests benchmarks tools
COMPILE := $(VENV)/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate --no-header
REWARDS := tools/reward_images
# Byte code is compiled at set-up: where PYTHONDONTWRITEBYTECODE is set, each of the hundreds of
# processes that the tests start would spend a quarter of a minute on torch's.
# One thread a process: torch's threads spin while they wait, which slows tests that run side by side.
export OMP_NUM_THREADS ?= 1
# A GPU that is there and does not work is an error, not a reason to skip its tests.
GPU := $(wildcard /dev/nvidia0)
# The helm of the chart's tests is a program for this platform.
HELM := $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m))

.PHONY: help setup demo test mutants test-faults test-rewards test-device test-gpu test-cluster cluster cluster-down check generate lock images push-images clean

help: ## What can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

setup: $(VENV)/ready ## A virtual environment with everything, from the lock

$(VENV)/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11 ...")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(RUN) -m ensurepip >/dev/null
	@echo "setting up $(VENV): downloads about 3 GB the first time"
	@$(RUN) -m pip install -q --disable-pip-version-check uv==$(UV)
	@$(VENV)/bin/uv pip install -q -p $(VENV) --compile-bytecode --require-hashes -r requirements.lock
	@$(VENV)/bin/uv pip install -q -p $(VENV) --no-deps -e .
	@touch $@

demo: setup ## Train the digits model, a minute or two, and draw with the result
	$(VENV)/bin/tempflow run examples/digits.yaml
	$(VENV)/bin/tempflow sample runs/digits --prompt "a three" --prompt "a seven" --out runs/digits/sample.png

test: setup ## The tests that need nothing but Python packages
	@$(if $(GPU),:,echo "left out: the tests marked gpu, as this machine has no /dev/nvidia0")
	@$(if $(HELM),:,echo "left out: the tests marked helm, as this is not Linux on x86-64")
	$(RUN) tests/budget.py --name test --minutes 10 -- $(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not faults and not cluster and not packages and not pretended$(if $(GPU),, and not gpu)$(if $(HELM),, and not helm)"

test-gpu: setup ## One real step of every family on a GPU; fails without one
	$(RUN) tests/budget.py --name gpu --minutes 5 -- $(RUN) -m pytest -q -m gpu tests/gpu

mutants: setup ## Mistakes in the mathematics, one at a time: each has its test, which must fail
	$(RUN) -m tests.numerics.mutants "$(NAME)"

# Three side by side on two cores: half of their time is waiting.
test-faults: setup ## Kill it, fill its disk, take its port: nothing is lost
	$(RUN) tests/budget.py --name faults --minutes 10 -- $(RUN) -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m faults tests/faults

test-rewards: setup ## Rewards with packages of their own, each in the environment of its image
	$(RUN) tests/packages/environment.py
	$(RUN) tests/budget.py --name rewards --minutes 3 -- $(RUN) -m pytest -q -n 2 --dist loadfile -m packages tests/packages

test-device: setup ## What the trainer computes on a device that is not the processor: a pretended one
	$(RUN) tests/budget.py --name device --minutes 2 -- $(RUN) -m pytest -q -m pretended tests/pretended

cluster: setup ## A real two-node Kubernetes on this machine (Linux, root), built once
	$(RUN) tests/cluster/build.py
	$(RUN) tests/cluster/cluster.py up

cluster-down: ## End it; nothing is left behind
	$(RUN) tests/cluster/cluster.py down

test-cluster: setup ## The operator in pods on that cluster: images, chart, jobs, faults
	$(RUN) tests/cluster/build.py $(if $(TEMPFLOW_TEST_KUBECONFIG),--clients)
	$(RUN) tests/budget.py --name cluster --minutes 30 -- $(RUN) -m pytest -q -x -m cluster tests/cluster

check: setup ## Format, types, imports, generated files
	$(RUN) tests/budget.py --name check --minutes 3 -- $(MAKE) --no-print-directory check-all

.PHONY: check-all
check-all:
	$(VENV)/bin/ruff check --output-format concise $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/mypy $(SOURCES)
	$(VENV)/bin/lint-imports
	$(RUN) -m tempflow_api.crd --check charts/tempflow/files/crd.yaml
	$(RUN) -m tempflow_api.reference --check docs/reference.md
	$(RUN) tools/chart_readme.py --check
	$(RUN) tools/cli_docs.py --check

generate: setup ## Renew generated files: the resource definition, the reference, the chart's README
	$(RUN) -m tempflow_api.crd --write charts/tempflow/files/crd.yaml
	$(RUN) -m tempflow_api.reference --write docs/reference.md
	$(RUN) tools/chart_readme.py
	$(RUN) tools/cli_docs.py
	cp sdk/tempflow/presets/*.yaml examples/
	$(VENV)/bin/ruff format -q $(SOURCES)

lock: ## Resolve requirements.lock anew, for all platforms at once
	$(COMPILE) --extra dev pyproject.toml -o requirements.lock
	$(COMPILE) --extra operator -c requirements.lock pyproject.toml -o requirements-operator.lock
	$(COMPILE) --extra trainer -c requirements.lock pyproject.toml -o requirements-trainer.lock
	printf 'hatchling>=1.27\nuv>=0.13\n' | $(COMPILE) -c requirements.lock - -o requirements-build.lock
	$(COMPILE) $(REWARDS)/hpsv3.in -o $(REWARDS)/hpsv3.lock
	$(COMPILE) --override $(REWARDS)/image-reward-override.in $(REWARDS)/image-reward.in -o $(REWARDS)/image-reward.lock
	@for platform in x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu aarch64-apple-darwin; do \
		echo "resolves on $$platform:"; MACOSX_DEPLOYMENT_TARGET=14.0 $(VENV)/bin/uv pip install -q --dry-run \
		--target .cache/none --python-platform $$platform --python-version 3.11 --only-binary :all: \
		--require-hashes -r requirements.lock && echo yes || exit 1; done

images: ## Build the operator's and the trainer's image with docker, podman or buildah
	tools/images.sh build

push-images: ## Push them to IMAGE_REPOSITORY
	tools/images.sh push

clean: ## Remove what was set up or generated here, but no runs
	rm -rf $(VENV) .cache/reward-images .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
