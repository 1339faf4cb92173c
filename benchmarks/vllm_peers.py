"""hookmap beside its peers on vLLM: tokens per second of a capture, and rows that are wrong after preemptions.

    for peer in vllm-lens==1.3.0 interp-engine==1.14.2; do
        .venv-vllm/bin/pip install --no-deps --ignore-requires-python --target peers/${peer%%=*} $peer
    done
    .venv-vllm/bin/python benchmarks/vllm_peers.py MODEL --peers peers

The peers pin other versions of vLLM and, one of them, of Python; both run on this one. Each engine has a process of its
own. What is captured is `resid_post`, the point that all of them have. For the rows a tiny Llama in float32 runs in a
cache that is too small for eight requests; each row is held against transformers' hidden states of the same tokens.
Prints JSON, one line for each engine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from safetensors.torch import load_file, save_file
from support import on_vllm

ENGINES = ("plain vLLM, compiled", "plain vLLM, eager", "hookmap", "hookmap, eager", "vllm-lens", "interp-engine")
PACKAGES = {"vllm-lens": "vllm-lens", "interp-engine": "interp-engine"}
"""engine -> its folder in `--peers`"""
Found = list[tuple[list[int], torch.Tensor | None]]
"""of each prompt, all tokens, and rows [layers, tokens - 1, d]"""
Run = Callable[[list[list[int]], list[int], int], Found]
"""of prompts, layers, and how many new tokens"""


def hookmap_run(model: str, settings: dict[str, Any], eager: bool) -> Run:
    import hookmap

    opened = hookmap.open_on_vllm(model, eager=eager, taps=None if eager else {"resid_post": "all"}, **settings)

    def run(asked: list[list[int]], layers: list[int], new: int) -> Found:
        found = opened.capture(asked, "resid_post", layers, max_new_tokens=new, min_new_tokens=new)
        rows = [torch.stack([found.read(n, "resid_post", each) for each in layers]) for n in range(len(asked))]
        return [(list(sample.token_ids), each) for sample, each in zip(found.samples, rows, strict=True)]

    return run


def plain_run(model: str, settings: dict[str, Any], eager: bool, lens: bool = False) -> Run:
    """vLLM's own `generate`, or vllm-lens's, which is a plugin of it."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, enforce_eager=eager, **settings)

    def run(asked: list[list[int]], layers: list[int], new: int) -> Found:
        more: dict[str, Any] = {"extra_args": {"output_residual_stream": layers}} if lens else {}
        parameters = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, **more)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], parameters, use_tqdm=False)
        rows: list[Any] = [each.activations["residual_stream"] if lens else None for each in outputs]
        tokens = [[*ids, *each.outputs[0].token_ids] for ids, each in zip(asked, outputs, strict=True)]
        return list(zip(tokens, rows, strict=True))

    return run


def interp_engine_run(model: str, settings: dict[str, Any]) -> Run:
    """Its hooks for each request, on an engine of one's own, as its documentation has it."""
    from interp_engine import WORKER_EXTENSION_CLS, Address, capture_engine_kwargs, decode_capture_payload
    from vllm import LLM, SamplingParams

    llm = LLM(model, worker_extension_cls=WORKER_EXTENSION_CLS, **{**settings, **capture_engine_kwargs()})

    def run(asked: list[list[int]], layers: list[int], new: int) -> Found:
        parameters = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        for number, ids in enumerate(asked):
            points = [f"resid_post.{layer}" for layer in layers]
            llm.collective_rpc("register_capture", args=(f"r{number:04d}", points))
            llm.llm_engine.add_request(f"r{number:04d}", {"prompt_token_ids": ids}, parameters.clone())
        tokens: dict[str, list[int]] = {}
        while llm.llm_engine.has_unfinished_requests():
            tokens |= {o.request_id: list(o.outputs[0].token_ids) for o in llm.llm_engine.step() if o.finished}
        found: Found = []
        for number, ids in enumerate(asked):
            taken = decode_capture_payload(llm.collective_rpc("collect_request", args=(f"r{number:04d}",))[0])
            rows = [taken[Address("resid_post", layer)] for layer in layers]
            found.append(([*ids, *tokens[f"r{number:04d}"]], torch.stack(rows)))
        return found

    return run


def made(engine: str, model: str, settings: dict[str, Any]) -> Run:
    if engine.startswith("hookmap"):
        return hookmap_run(model, settings, engine.endswith("eager"))
    if engine == "interp-engine":
        return interp_engine_run(model, settings)
    return plain_run(model, settings, not engine.endswith("compiled"), engine == "vllm-lens")


def speed(engine: str, given: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second, by the clock and of the processor, the best of two runs behind one that warms up."""
    from on_vllm import prompts

    settings = {"dtype": given.dtype, "max_model_len": 512, "max_num_seqs": given.prompts}
    run, asked, found = made(engine, given.model, settings), prompts(given.prompts), dict[str, Any]()
    count = json.loads((Path(given.model) / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    middle = count // 2
    for name, layers in (("3 layers", [middle - 2, middle, middle + 2]), ("all layers", [*range(count)])):
        times = []
        for _ in range(3):
            start, processor = time.perf_counter(), time.process_time()
            run(asked, layers, given.tokens)
            times.append((time.perf_counter() - start, time.process_time() - processor))
        best = [round(given.prompts * given.tokens / min(each), 1) for each in zip(*times[1:], strict=True)]
        found[name] = dict(zip(("tokens/s", "tokens/s of the processor"), best, strict=True))
        if engine.startswith("plain"):
            return {"nothing captured": found[name]}
    return found


def rows(engine: str, folder: str, out: str) -> None:
    """Write tokens and rows of requests of which vLLM preempts some."""
    run = made(engine, folder, {**on_vllm.SETTINGS, **on_vllm.SCARCE})
    found = run(on_vllm.prompts(8, 12, seed=1), [0, 1], 30)
    save_file({f"{n}.tokens": torch.tensor(tokens) for n, (tokens, _) in enumerate(found)}, f"{out}.tokens")
    save_file({f"{n}.rows": r.float().cpu().contiguous() for n, (_, r) in enumerate(found) if r is not None}, out)


def wrong_rows(folder: str, out: str) -> str:
    """How many rows are not those of transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, found = load_file(f"{out}.tokens"), load_file(out)
    wrong = total = shapes = 0
    for n in range(len(tokens)):
        with torch.no_grad():
            hidden = model(tokens[f"{n}.tokens"][None, :-1], output_hidden_states=True).hidden_states
        expected = torch.stack([hidden[1][0], hidden[2][0]])
        mine = found[f"{n}.rows"]
        shapes += mine.shape != expected.shape
        length = min(mine.shape[1], expected.shape[1])
        off = (mine[:, :length] - expected[:, :length]).norm(dim=-1) / expected[:, :length].norm(dim=-1)
        wrong += int((off > 1e-4).any(0).sum()) + expected.shape[1] - length
        total += expected.shape[1]
    return f"{wrong} of {total} tokens have wrong rows, {shapes} of {len(tokens)} requests another number of rows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder")
    parser.add_argument("--peers", type=Path, required=True, help="the folder with the peers' packages")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", choices=ENGINES, action="append")
    parser.add_argument("--rows-only", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if given.one:
        engine, folder = given.one
        if folder == "speed":
            print(json.dumps(speed(engine, given)), flush=True)
        else:
            rows(engine, folder, f"{folder}/rows")
        os._exit(0)  # vLLM's threads may hold the process
    with tempfile.TemporaryDirectory() as folder:
        on_vllm.save(Path(folder))
        for engine in given.only or ENGINES:
            paths = [str(given.peers / PACKAGES[engine])] if engine in PACKAGES else []
            paths += filter(None, [os.environ.get("PYTHONPATH")])
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
            said: dict[str, Any] = {"engine": engine}
            for what in ([] if given.rows_only else ["speed"]) + ([] if engine.startswith("plain") else [folder]):
                command = [sys.executable, __file__, *sys.argv[1:], "--one", engine, what]
                run = subprocess.run(command, capture_output=True, env=environment)
                if run.returncode:
                    said["failed"] = run.stderr.decode(errors="replace").strip().splitlines()[-1:]
                elif what == "speed":
                    said |= json.loads(run.stdout.splitlines()[-1])
                else:
                    said["after preemption"] = wrong_rows(folder, f"{folder}/rows")
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
