"""How long discovery takes and how much memory it needs, for full-size models: `python benchmarks/discovery.py`.

Each model in a process of its own; time and peak memory of discovery alone, after the imports, and of what plain
transformers needs to build the same model on the meta device, in the same process.
"""

import json
import resource
import subprocess
import sys
import time

from machine import describe

MODELS = {
    "gpt2": "GPT-2 (124 M)",
    "llama": "Llama (6.7 B)",
    "qwen3_moe": "Qwen3-MoE",
    "jamba": "Jamba (52 B)",
    "deepseek_v3": "DeepSeek-V3 (671 B)",
}


def measure(model_type: str) -> None:
    """One model, in this process; prints its figures as JSON."""
    import transformers

    from hookmap.discovery import discover
    from hookmap.skeleton import build

    config = transformers.CONFIG_MAPPING[model_type]()
    discover(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2))  # what is loaded lazily is loaded now
    before = _peak_mb()
    begun = time.perf_counter()
    model = build(config)
    built = time.perf_counter() - begun
    begun = time.perf_counter()
    found = discover(config)
    seconds = time.perf_counter() - begun
    parameters = sum(parameter.numel() for parameter in model.parameters())
    figures = {"layers": found.num_layers, "parameters": parameters, "build": built, "discover": seconds}
    print(json.dumps({**figures, "peak": _peak_mb(), "above": _peak_mb() - before}))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    print(describe(), end="\n\n")
    print("| model | parameters | layers | discovery, s | of it building, s | peak memory above imports, MB |")
    print("|---|---|---|---|---|---|")
    for model_type, name in MODELS.items():
        rounds = []
        for _ in range(3):
            run = subprocess.run([sys.executable, __file__, model_type], capture_output=True, text=True, check=True)
            rounds.append(json.loads(run.stdout.splitlines()[-1]))
        middle = sorted(rounds, key=lambda r: r["discover"])[1]
        print(
            f"| {name} | {middle['parameters'] / 1e9:.2f} B | {middle['layers']} | {middle['discover']:.2f} "
            f"| {middle['build']:.2f} | {middle['above']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
