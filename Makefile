# make demo   sets up .venv, then discovers, captures and inspects the bundled demo model, offline
# make test   sets up .venv with the test tools, then runs every check
# make format, make schema, make docs-reference: what a contributor needs; see CONTRIBUTING.md
#
# PYTHON=python3.12 make demo   another interpreter (3.10 or later)
# TORCH=torch make demo         another build of PyTorch than scripts/setup.py would choose

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: demo test setup check format schema clean

demo: .venv/.ready
	@rm -rf demo-output && mkdir demo-output
	HF_HUB_OFFLINE=1 $(BIN)/hookmap discover -o demo-output/map.json
	HF_HUB_OFFLINE=1 $(BIN)/hookmap capture --points resid_pre,resid_mid --layers 8,12,16 -o demo-output/capture
	HF_HUB_OFFLINE=1 $(BIN)/hookmap inspect demo-output/capture

test: .venv/.ready-for-tests check

# Two workers share the cores: more threads than cores in each would slow both down.
check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.venv/.ready: pyproject.toml scripts/setup.py
	$(PYTHON) scripts/setup.py

.venv/.ready-for-tests: pyproject.toml scripts/setup.py
	$(PYTHON) scripts/setup.py --tests

setup: .venv/.ready-for-tests

format: .venv/.ready-for-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: .venv/.ready
	$(BIN)/python scripts/write_schema.py

clean:
	rm -rf .venv demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
