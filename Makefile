# Everything runs in an environment of its own, .venv, made from requirements.txt. PYTHON=python3.12 make test: another one.
# make demo SDXL=1: the demo on the tiny SDXL.
PYTHON ?= python3
BIN = .venv/bin
export HF_HUB_OFFLINE = 1

.PHONY: demo test style quality

demo: .venv/ready
	$(BIN)/python examples/tinyworld/demo.py $(if $(SDXL),--sdxl)

test: .venv/ready
	$(BIN)/python -m pytest -n auto --dist loadfile

style: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

.venv/ready: requirements.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@
