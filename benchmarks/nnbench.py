"""The eight methodologies of nnbench, an interpretability benchmark, with hookmap as a backend beside its own.

    git clone https://github.com/ndif-team/nnbench
    python benchmarks/nnbench.py NNBENCH MODEL [--page FILE]

NNBENCH: its folder. MODEL: a folder of a Llama, such as SmolLM2-135M-Instruct; both backends open it in float32 on the
CPU. nnbench's own oracle scores hookmap's cells against its HF backend: the same most likely token for at least nine of
ten rows, and a total variation of at most 0.05. Three of its methodologies are written for GPT-2 alone; for these the
HF cells are here, by the same calls of its backend.
"""

import contextlib
import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import hookmap

RIGHT, WRONG = " Paris", " Moscow"
NEW_TOKENS = 5


def main(given: list[str]) -> None:
    page = None
    if "--page" in given:
        page = Path(given.pop(given.index("--page") + 1))
        given.remove("--page")
    folder, model = given
    sys.path.insert(0, folder)
    rows = [each for spec in _specs(model) for each in _run(spec)]
    told = "\n".join(_table(rows)) + "\n"
    print(told) if page is None else page.write_text(told, encoding="utf-8")


def _specs(model: str) -> list[Any]:
    from isb.specs import SPECS
    from isb.specs._prompts import BATCHED, CLEAN, CORRUPTED, ONE, PROBE
    from isb.sweep.spec import Workload

    pair = [CLEAN, CORRUPTED]
    alone = {"interactive": PROBE, "batched": BATCHED}
    found = []
    for name in (
        "logit_lens_llama", "steering_gpt2", "ablation_gpt2", "activation_patching_gpt2", "attention_pattern_gpt2",
        "attribution_patching_gpt2", "gen_steering_gpt2", "gen_patching_gpt2",
    ):  # fmt: skip
        spec = SPECS[name]
        works = [Workload(kind, prompts) for kind, prompts in alone.items()]
        if spec.methodology in ("activation_patching", "attribution_patching"):
            works = [Workload("interactive", pair, aggregate=False)]
        elif spec.methodology == "attention_pattern":
            works = [Workload("interactive", ONE, aggregate=False)]
        elif spec.methodology == "gen_steering":
            works = [Workload("generation", PROBE[:4], new_tokens=NEW_TOKENS)]
        elif spec.methodology == "gen_patching":
            works = [Workload("generation", pair, new_tokens=NEW_TOKENS, aggregate=False)]
        settings = {"family": "llama", "repo": model, "workloads": works, "warmup": 0, "n_trials": 1, "expected": {}}
        found.append(replace(spec, name=f"{spec.methodology}_llama", **settings))
    return found


def _run(spec: Any) -> list[Any]:
    from isb.backends import Backend, HFBackend
    from isb.sweep import driver

    class OnCpu(HFBackend):  # type: ignore[misc]
        def load(self, repo: str) -> Any:
            from nnsight import LanguageModel

            how = {"attn_implementation": "eager", "torch_dtype": torch.float32, "device_map": "cpu", "dispatch": True}
            return LanguageModel(repo, **how)

    class Hookmap(Backend):  # type: ignore[misc]
        name = "hookmap"

        def load(self, repo: str) -> Any:
            return hookmap.open(repo, dtype=torch.float32, device="cpu")

        def teardown(self, model: Any) -> None: ...

    with contextlib.redirect_stdout(io.StringIO()):
        made = {"hf": OnCpu, "hookmap": Hookmap}
        return list(driver.run_sweep(spec, ("hf", "hookmap"), backend_factory=lambda name, _: made[name]()))


def _cells() -> None:
    from isb.methodologies.registry import cell

    def on(methodology: str, backend: str = "hookmap") -> Any:
        return cell(methodology, family="llama", backend=backend)

    def last_logits(hm: Any, prompts: list[str], interventions: Any = ()) -> torch.Tensor:
        run = hm.capture(list(prompts), "logits", max_new_tokens=0, positions="last", interventions=interventions)
        return torch.cat([run.read(number, "logits") for number in range(len(prompts))]).float()

    def token(hm: Any, text: str) -> int:
        return int(hm.tokenizer(text, add_special_tokens=False)["input_ids"][-1])

    def steered(hm: Any, layer: int, target: str, alpha: float) -> list[Any]:
        weight = hm.root.get_output_embeddings().weight
        direction = F.normalize(weight[token(hm, target)].detach().float(), dim=0)

        def steer(rows: torch.Tensor, at: Any) -> torch.Tensor:
            return rows + alpha * rows.norm(dim=-1).mean() * direction

        return [hookmap.apply(steer, "resid_post", layer)] if alpha else []

    def steps(hm: Any, prompt: str, new_tokens: int, interventions: Any) -> torch.Tensor:
        run = hm.capture(prompt, "logits", max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                         interventions=interventions)  # fmt: skip
        return run.read(0, "logits")[-new_tokens:].float()  # type: ignore[no-any-return]

    def patch(layer: int, clean: str) -> list[Any]:
        return [{"do": "patch", "point": "resid_post", "layers": layer, "source": {"prompt": clean}}]

    @on("logit_lens")
    def logit_lens(be: Any, hm: Any, prompts: Any, *, layers: Any = "all", **_: Any) -> torch.Tensor:
        run = hm.capture(list(prompts), "resid_post", layers, max_new_tokens=0, positions="last")
        norm, head = hm.model.get_submodule(hm.map.final_norm_path), hm.root.get_output_embeddings()
        rows = torch.stack([torch.cat([run.read(n, *key) for n in range(len(prompts))]) for key in run.keys])
        with torch.no_grad():
            return torch.stack([head(norm(each)) for each in rows]).float()

    @on("steering")
    def steering(
        be: Any, hm: Any, prompts: Any, *, layer: int = 8, target: str = " Rome", alpha: float = 6.0, **_: Any
    ) -> torch.Tensor:
        return last_logits(hm, prompts, steered(hm, layer, target, alpha))

    @on("ablation")
    def ablation(be: Any, hm: Any, prompts: Any, *, layer: int = 6, target: str = "mlp", **_: Any) -> torch.Tensor:
        edits = [] if target == "none" else [{"do": "ablate", "point": f"{target}_out", "layers": layer}]
        return last_logits(hm, prompts, edits)

    @on("activation_patching")
    def activation_patching(
        be: Any, hm: Any, prompts: Any, *, layer: int = 6, patch_it: bool = True, **given: Any
    ) -> torch.Tensor:
        clean, corrupted = prompts
        return last_logits(hm, [corrupted], patch(layer, clean) if given.get("patch", patch_it) else ())

    @on("attention_pattern")
    def attention_pattern(be: Any, hm: Any, prompts: Any, *, layers: Any = "all") -> torch.Tensor:
        [prompt] = prompts
        run = hm.capture(prompt, "pattern", layers, max_new_tokens=0)
        return torch.stack([run.read(0, *key)[-1] for key in run.keys]).log()

    @on("attribution_patching")
    def attribution_patching(be: Any, hm: Any, prompts: Any, *, grad: bool = True, **_: Any) -> torch.Tensor:
        clean, corrupted = prompts
        pair = {"clean": clean, "corrupted": corrupted, "answer": first(hm, RIGHT), "wrong": first(hm, WRONG)}
        if not grad:
            return hm.measure([corrupted], hookmap.metrics.logit_difference(pair["answer"], pair["wrong"]))  # type: ignore[no-any-return]
        found = hm.attribution_patch([pair], points="resid_post", check=4)
        return torch.stack([parts[0].sum() for parts in found.scores.values()])

    @on("gen_steering")
    def gen_steering(
        be: Any, hm: Any, prompts: Any, *, layer: int = 8, target: str = " Rome", alpha: float = 6.0,
        new_tokens: int = 8, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        return steps(hm, prompts[0], new_tokens, steered(hm, layer, target, alpha))

    @on("gen_patching")
    def gen_patching(
        be: Any, hm: Any, prompts: Any, *, layer: int = 9, new_tokens: int = 8, **given: Any
    ) -> torch.Tensor:
        clean, corrupted = prompts
        return steps(hm, corrupted, new_tokens, patch(layer, clean) if given.get("patch", True) else ())

    def first(model: Any, text: str) -> int:
        return int(model.tokenizer.encode(text)[0])

    # By nnbench's HF backend, for a Llama: its own cells are for GPT-2.

    def stream(block: Any) -> Any:
        return block.output if isinstance(block.output, torch.Tensor) else block.output[0]

    @on("attention_pattern", "hf")
    def attention_pattern_hf(be: Any, model: Any, prompts: Any, *, layers: Any = "all") -> Any:
        blocks = model.model.layers

        def build() -> Any:
            chosen = range(len(blocks)) if layers == "all" else layers
            seen = [blocks[i].self_attn.output[1][0, :, -1, :] for i in chosen]
            return torch.log(torch.stack(seen))

        return be.run(model, prompts, build)

    @on("attribution_patching", "hf")
    def attribution_patching_hf(be: Any, model: Any, prompts: Any, *, grad: bool = True, **_: Any) -> Any:
        right, wrong = first(model, RIGHT), first(model, WRONG)
        clean, corrupted = prompts

        def metric(m: Any) -> Any:
            logits = F.linear(m.model.norm(stream(m.model.layers[-1])), m.lm_head.weight)[:, -1, :]
            return logits[:, right] - logits[:, wrong]

        if not grad:
            return be.run(model, [corrupted], lambda: metric(model))

        def streams(m: Any) -> Any:
            return [stream(block) for block in m.model.layers]

        return be.attribute(model, clean, corrupted, acts_of=streams, metric_of=metric, n=len(model.model.layers))

    @on("gen_patching", "hf")
    def gen_patching_hf(
        be: Any, model: Any, prompts: Any, *, layer: int = 9, new_tokens: int = 8, bound: str = "bounded",
        **given: Any,
    ) -> Any:  # fmt: skip
        clean, corrupted = prompts
        blocks, how = model.model.layers, {"new_tokens": new_tokens, "bounded": bound == "bounded"}
        done: list[bool] = []

        def read() -> Any:
            return model.lm_head.output[:, -1, :]

        if not given.get("patch", True):
            return be.generate(model, [corrupted], read, **how)

        def capture() -> Any:
            return stream(blocks[layer]).clone()

        def step(found: torch.Tensor) -> Any:
            if not done:  # the prompt
                done.append(True)
                whole = isinstance(blocks[layer].output, torch.Tensor)
                blocks[layer].output = found if whole else (found, *blocks[layer].output[1:])
            return read()

        return be.generate_patch(model, clean, corrupted, capture=capture, build_step=step, **how)


def _table(found: list[Any]) -> list[str]:
    lines = [
        "| methodology | workload | cell | hookmap | same top token | total variation |",
        "|---|---|---|---|---|---|",
    ]
    for each in found:
        if each.backend == "hookmap":
            m = each.metrics
            numbers = f"{m['top1_agree']:.2f} | {m['tv']:.1e}" if m else f"{each.error or ''} | "
            lines.append(f"| {each.methodology} | {each.workload} | {each.label} | {each.state} | {numbers} |")
    return lines


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    _cells()
    main(sys.argv[1:])
