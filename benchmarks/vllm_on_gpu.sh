#!/bin/sh
# hookmap on vLLM on a machine with an NVIDIA GPU: every check and figure, one after the other. It has not run yet.
#
#     sh benchmarks/vllm_on_gpu.sh [MODEL …]        # models of the hub, or folders; Qwen/Qwen3-0.6B unless given
#
# It makes .venv-vllm with vLLM's own package, and writes what it finds to vllm-on-gpu/: send that folder with a report.
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- Qwen/Qwen3-0.6B
out=vllm-on-gpu
mkdir -p "$out"
nvidia-smi > "$out/machine.txt"

# 1. Rows, tokens and edits are transformers' under chunks, cached prefixes and preemption; kills; both servers. With two
#    GPUs also tensor, pipeline and data parallel; with one these are skipped, and tests.txt says so.
#    The same with V2, vLLM's default there, as every test's model runner: `make test-vllm` runs a part of them on it.
make test-vllm 2>&1 | tee "$out/tests.txt"
VLLM_USE_V2_MODEL_RUNNER=1 make test-vllm 2>&1 | tee "$out/tests-v2.txt"
python=.venv-vllm/bin/python

# 2. Every family against transformers in float32, and bf16 against float32.
"$python" benchmarks/vllm_families.py --bf16 --results "$out/families.jsonl" --table "$out/families.md"

for model in "$@"; do
    name=$(basename "$model")
    # 3. Tokens per second beside plain vLLM, which has CUDA graphs, and beside hookmap's own engine.
    "$python" benchmarks/on_vllm.py "$model" --prompts 256 --tokens 128 > "$out/$name-speed.jsonl"
    VLLM_USE_V2_MODEL_RUNNER=1 "$python" benchmarks/on_vllm.py "$model" --prompts 256 --tokens 128 > "$out/$name-speed-v2.jsonl"
    # 4. 200 requests of a server, half of them captured, and first tokens beside long requests.
    "$python" benchmarks/vllm_server.py "$model" > "$out/$name-server.jsonl"
done
echo "written to $out/"
