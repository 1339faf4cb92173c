"""How long discovery takes and how much memory it needs, without weights: `python benchmarks/discovery.py`.

Full-size models one by one, each in a process of its own, beside what plain transformers needs to build the same model
on the meta device. With `--all`, every causal language model class of transformers at its default full size: the
median, and the ten slowest. Time and peak memory are discovery's alone, after the imports.
"""

import json
import multiprocessing
import resource
import subprocess
import sys
import time
import warnings
from statistics import median
from typing import Any

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

    from hookmap.discovery.discover import discover
    from hookmap.loading.configs import build

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


def some() -> None:
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


def every_class() -> None:
    """Each class in a child that is forked after the imports: its memory is what it adds to them."""
    import torch
    import transformers

    from hookmap.discovery.discover import discover
    from hookmap.sweep.build import classes

    torch.set_num_threads(1)
    discover(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2))
    types = {architecture: model_type for model_type, architecture in classes().items()}
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        found = list(pool.imap(_one, sorted(types.values()), chunksize=1))
    good = [each for each in found if "error" not in each]
    seconds, memory = ([each[key] for each in good] for key in ("seconds", "above"))
    print(
        f"{len(good)} of {len(found)} classes: median {median(seconds):.2f} s and {median(memory):.0f} MB above "
        f"imports; longest {max(seconds):.1f} s, most {max(memory):.0f} MB; together {sum(seconds) / 60:.1f} min\n"
    )
    print("| model type | layers | discovery, s | peak memory above imports, MB | what ran |\n|---|---|---|---|---|")
    for each in sorted(good, key=lambda each: -each["seconds"])[:10]:
        figures = f"{each['layers']} | {each['seconds']:.1f} | {each['above']:.0f}"
        print(f"| {each['type']} | {figures} | {each['how']} |")
    print()
    for each in found:
        if "error" in each:
            print(f"not measured: {each['type']}: {each['error'][:160]}")


def _one(model_type: str) -> dict[str, Any]:
    import logging

    from hookmap.discovery.discover import discover
    from hookmap.errors import HookmapError
    from hookmap.sweep.configs import config_of

    logging.getLogger("transformers").setLevel(logging.ERROR)
    before, begun = _peak_mb(), time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = discover(config_of(model_type))
    except (HookmapError, ValueError) as error:
        return {"type": model_type, "error": " ".join(str(error).split())}
    seconds = time.perf_counter() - begun
    how = "a narrow copy" if "narrow" in found.discovered_by else "full size"
    above = _peak_mb() - before
    return {"type": model_type, "seconds": seconds, "above": above, "layers": found.num_layers, "how": how}


def main() -> None:
    print(describe(), end="\n\n")
    every_class() if "--all" in sys.argv else some()


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1] in MODELS else main()
