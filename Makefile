# Each target sets up what it needs on a fresh machine: Linux, make and a Python 3.10 to 3.14.
PYTHON ?= python3
STACKS ?= cpu xflux-2024
VENVS := .venvs
# The demo runs on the CPU only where no NVIDIA device node is there.
CPU := $(if $(wildcard /dev/nvidiactl),,--cpu)

.PHONY: demo test test-long lint bench docs clean
.DEFAULT_GOAL := demo

.venv/ok: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

demo: .venv/ok
	.venv/bin/xflux-doctor fix --install --yes $(CPU) --accelerate-config examples/demo/accelerate_config.yaml
	.venv/bin/python examples/demo/make_tiny_flux.py output/tiny-flux
	.venv/bin/xflux-doctor run --yes $(CPU) --config examples/demo/train.yaml \
		--accelerate-config examples/demo/accelerate_config.yaml

test:
	PYTHON=$(PYTHON) bash tests/run.sh "$(STACKS)"

test-long:
	PYTHON=$(PYTHON) bash tests/run_long.sh

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/dev: .venv/ok
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

bench: .venv/ok
	.venv/bin/python benchmarks/check_speed.py

docs: .venv/ok
	.venv/bin/python docs/generate.py

clean:
	rm -rf .venv $(VENVS)/* $(VENVS) build dist *.egg-info
