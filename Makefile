# Two commands: `make demo` and `make test`. Everything they need goes into .venv.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
DATA ?=
DEMO_OUT ?= demo_out

.PHONY: demo test lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

demo: $(VENV)/.installed
	$(PY) -m tritonspeed.cli demo --config examples/ds_config.json --out $(DEMO_OUT) $(if $(DATA),--data $(DATA))

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/pyrefly check

test: lint
	$(PY) -m pytest

clean:
	rm -rf $(VENV) $(DEMO_OUT)
