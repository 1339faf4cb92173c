"""What capturing, harvesting, steering and gradients cost on a real model, beside other libraries, in one run.

    python benchmarks/beside.py MODEL --peer transformer_lens=PYTHON --peer nnterp=PYTHON --peer interp_engine=PYTHON

MODEL is a folder. Each library runs in a process of its own, a peer's with its environment's Python, float32, one
thread; the ways take turns. A figure is the median over rounds of processor time over that of the model itself, without
the library, doing the same in the same process and round. `--write` puts the table into docs/benchmarks.md.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from machine import describe

FEW, AT, NEW = [7, 15, 23], 15, 16
PROMPT = torch.arange(1000, 1032)[None]
BATCH = torch.arange(2000, 2512).reshape(4, 128)
Ways = dict[str, Callable[[], Any]]
WAYS = {
    "capture": f"`resid_post` of {len(FEW)} layers while generating {NEW} tokens",
    "steering": f"a vector added at one layer while generating {NEW} tokens",
    "harvest": "`resid_post` of all layers, 4 texts of 128 tokens, one pass",
    "gradients": "of a logit by `resid_post` of all layers, 32 tokens",
}
OVER = {"capture": "generate", "steering": "generate", "harvest": "forward", "gradients": "backward"}
PACKAGES = {"hookmap": "hookmap", "transformer_lens": "transformer-lens", "nnterp": "nnterp", "nnsight": "nnsight",
            "interp_engine": "interp-engine"}  # fmt: skip
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- made by benchmarks/beside.py: do not edit -->\n", "<!-- end -->\n"
SECTION = f"""## A real model, beside other libraries

`python benchmarks/beside.py MODEL --peer NAME=PYTHON … --write`: SmolLM2-135M-Instruct, float32, one thread. Each
figure is processor time over that of the model without a library, doing the same in the same process and round;
medians. A dash: the library does not offer it.

{BEGIN}{END}
"""


def plain(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def generated(model: Any) -> Any:
    return model.generate(PROMPT, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)


def bare(model: Any) -> Ways:
    """The same without a library; the backward pass goes to what the first block reads."""

    def backward() -> torch.Tensor:
        given = model.get_input_embeddings()(PROMPT).requires_grad_()
        logit = model(inputs_embeds=given).logits[0, -1, 5]
        return torch.autograd.grad(logit, given)[0]

    return {
        "generate": lambda: generated(model),
        "forward": lambda: model(BATCH, use_cache=False),
        "backward": backward,
    }


def hookmap(folder: str) -> Ways:
    import hookmap

    hm = hookmap.open(plain(folder))
    vector = torch.ones(hm.map.d_model)
    steer = hookmap.apply(lambda rows, at: rows + vector, point="resid_post", layers=AT)
    ids = PROMPT.tolist()
    return {
        "capture": lambda: hm.capture(ids, "resid_post", FEW, NEW),
        "steering": lambda: hm.generate(ids, [steer], max_new_tokens=NEW),
        "harvest": lambda: hm.capture(BATCH.tolist(), "resid_post", "all", 0),
        "gradients": lambda: hm.gradients(ids, lambda logits, at: logits[..., -1, 5], points="resid_post"),
    }


def nnsight(folder: str) -> Ways:
    """Its own `NNsight` over the model: saved outputs, an output that is written, gradients of saved outputs."""
    import nnsight

    model = plain(folder)
    tree = nnsight.NNsight(model)
    blocks = range(len(model.model.layers))
    vector = torch.ones(model.config.hidden_size)

    def capture() -> Any:
        with tree.trace(None, fn=lambda _: generated(model)) as tracer:
            rows = nnsight.save([])
            for _ in tracer.iter[:]:
                for layer in FEW:
                    rows.append(tree.model.layers[layer].output.clone())
        assert len(rows) == NEW * len(FEW)

    def steering() -> Any:
        with tree.trace(None, fn=lambda _: generated(model)) as tracer:
            for _ in tracer.iter[:]:
                tree.model.layers[AT].output = tree.model.layers[AT].output + vector

    def harvest() -> Any:
        with torch.no_grad(), tree.trace(BATCH, use_cache=False):
            rows = nnsight.save([])
            for layer in blocks:
                rows.append(tree.model.layers[layer].output.clone())
        assert len(rows) == len(blocks)

    def gradients() -> Any:
        with tree.trace(PROMPT):
            first = tree.model.layers[0].input
            first.requires_grad_(True)
            rows = nnsight.save([])
            for layer in blocks:
                rows.append(tree.model.layers[layer].output)
            logit = tree.output.logits[0, -1, 5].save()
        assert len(torch.autograd.grad(logit, rows)) == len(blocks)

    return {"capture": capture, "steering": steering, "harvest": harvest, "gradients": gradients}


def nnterp(folder: str) -> Ways:
    """Its standardised names, in nnsight's traces."""
    import nnsight
    from nnterp import StandardizedTransformer

    model = StandardizedTransformer(folder, dtype=torch.float32, device_map="cpu")
    model._model.requires_grad_(False)
    blocks = range(model.num_layers)
    vector = torch.ones(model.hidden_size)
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def capture() -> Any:
        with model.generate(PROMPT, **how) as tracer:
            rows = nnsight.save([])
            for _ in tracer.iter[:]:
                for layer in FEW:
                    rows.append(model.layers_output[layer].clone())
        assert len(rows) == NEW * len(FEW)

    def steering() -> Any:
        with model.generate(PROMPT, **how) as tracer:
            for _ in tracer.iter[:]:
                model.layers_output[AT] = model.layers_output[AT] + vector

    def harvest() -> Any:
        with torch.no_grad(), model.trace(BATCH):
            rows = nnsight.save([])
            for layer in blocks:
                rows.append(model.layers_output[layer].clone())
        assert len(rows) == len(blocks)

    def gradients() -> Any:
        with model.trace(PROMPT):
            model.layers_input[0].requires_grad_(True)
            rows = nnsight.save([])
            for layer in blocks:
                rows.append(model.layers_output[layer])
            logit = model.logits[0, -1, 5].save()
        assert len(torch.autograd.grad(logit, rows)) == len(blocks)

    return {"capture": capture, "steering": steering, "harvest": harvest, "gradients": gradients}


def transformer_lens(folder: str) -> Ways:
    """The bridge: `generate(return_cache=True)`, hooks, `run_with_cache`."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(bridge.cfg.n_layers)]
    few, vector = [names[layer] for layer in FEW], torch.ones(bridge.cfg.d_model)
    how = {"max_new_tokens": NEW, "do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}

    def capture() -> Any:
        cache = bridge.generate(PROMPT, return_cache=True, names_filter=few, **how)[1]
        assert all(name in cache for name in few)

    def steering() -> Any:
        with bridge.hooks(fwd_hooks=[(names[AT], lambda rows, hook: rows + vector)]):
            bridge.generate(PROMPT, **how)

    def harvest() -> Any:
        with torch.no_grad():
            cache = bridge.run_with_cache(BATCH, names_filter=names)[1]
        assert all(name in cache for name in names)

    def gradients() -> Any:
        rows = []
        begin = ("blocks.0.hook_resid_pre", lambda given, hook: given.detach().requires_grad_())
        keep = [(name, lambda given, hook: rows.append(given)) for name in names]
        with bridge.hooks(fwd_hooks=[begin, *keep]):
            logit = bridge(PROMPT)[0, -1, 5]
        assert len(torch.autograd.grad(logit, rows)) == len(names)

    return {"capture": capture, "steering": steering, "harvest": harvest, "gradients": gradients}


def interp_engine(folder: str) -> Ways:
    """Its eager engine. `capture_generation` generates, and then runs one pass over all tokens."""
    from interp_engine import load_model
    from interp_engine.capture import capture, capture_generation
    from interp_engine.steer import SteerSpec, generate_stream, steer
    from transformers import AutoConfig

    model = load_model(folder, backend="eager", device="cpu", dtype="float32", requires_grad=True)
    config = AutoConfig.from_pretrained(folder)
    blocks = range(config.num_hidden_layers)
    spec = [SteerSpec(torch.ones(config.hidden_size), AT)]

    def steering() -> Any:
        with steer(model, spec):
            steps = list(generate_stream(model, PROMPT[0], max_tokens=NEW, temperature=0.0, stop_at_eos=False))
        assert len(steps) == NEW

    def gradients() -> Any:
        names = [("resid_post", n) for n in blocks]
        cache = capture(model, PROMPT, names, detach=False)
        found = torch.autograd.grad(cache.output.logits[0, -1, 5], [cache.get(*name) for name in names])
        assert len(found) == len(names)

    return {
        "gradients": gradients,
        "capture": lambda: capture_generation(model, PROMPT, [f"resid_post.{n}" for n in FEW], max_tokens=NEW),
        "steering": steering,
        "harvest": lambda: capture(model, BATCH, [("resid_post", n) for n in blocks]),
    }


LIBRARIES: dict[str, Callable[[str], Ways]] = {
    "hookmap": hookmap, "nnsight": nnsight, "transformer_lens": transformer_lens, "nnterp": nnterp,
    "interp_engine": interp_engine,
}  # fmt: skip


def serve(name: str, folder: str) -> None:
    """Runs the ways that it reads, one a line, and answers with the seconds of each, or with why there are none."""
    torch.set_num_threads(1)
    ways = {**bare(plain(folder)), **LIBRARIES[name](folder)}
    print("ready", sys.modules["hookmap"].__version__ if name == "hookmap" else version(PACKAGES[name]), flush=True)
    for line in sys.stdin:
        way = ways.get(line.strip())
        begun = time.process_time()
        try:
            if way is None:
                raise NotImplementedError("not offered")
            way()
            print(f"took {time.process_time() - begun}", flush=True)
        except Exception as error:
            print("failed", type(error).__name__, " ".join(str(error).split())[:300], flush=True)


class Library:
    """A library's process."""

    def __init__(self, name: str, python: str, folder: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, __file__, folder, "--serve", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self._answer("ready").split()[1]

    def seconds(self, way: str) -> float | None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{way}\n")
        self._process.stdin.flush()
        answer = self._answer("took", "failed")
        if answer.startswith("failed"):
            print(f"{self.name} {way}: {answer}", file=sys.stderr)
            return None
        return float(answer.split()[1])

    def _answer(self, *words: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # a library may print words of its own first
            if line.startswith(words):
                return line
        raise RuntimeError(f"{self.name} has ended")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--serve", choices=LIBRARIES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(given.serve, given.model)
    pythons = {"hookmap": sys.executable, "nnsight": sys.executable} | dict(each.split("=") for each in given.peer)
    libraries = [Library(name, python, given.model) for name, python in pythons.items()]
    ratios: dict[tuple[str, str], list[float]] = {}
    for number in range(given.rounds + 1):  # the first one warms up
        for library in libraries:
            bases = {base: library.seconds(base) for base in dict.fromkeys(OVER.values())}
            for way, base in OVER.items():
                took, alone = library.seconds(way), bases[base]
                if number and took is not None and alone is not None:
                    ratios.setdefault((library.name, way), []).append(took / alone)
    lines = [
        "| | over | " + " | ".join(f"{PACKAGES[each.name]} {each.version}" for each in libraries) + " |",
        "|---|---|" + "---|" * len(libraries),
    ]
    for way, what in WAYS.items():
        found = (ratios.get((each.name, way)) for each in libraries)
        cells = ("–" if one is None else f"{statistics.median(one):.2f}" for one in found)
        lines.append(f"| {way}: {what} | {OVER[way]} | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if given.write:
        text = PAGE.read_text(encoding="utf-8")
        if BEGIN not in text:
            text = text.replace("## nnbench\n", SECTION + "## nnbench\n")
        PAGE.write_text(
            re.sub(f"(?<={re.escape(BEGIN)}).*(?={END})", f"\n{describe()}\n\n{table}\n", text, flags=re.DOTALL),
            "utf-8",
        )


if __name__ == "__main__":
    main()
