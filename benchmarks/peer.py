"""A peer in an environment of its own: `PEER_PYTHON benchmarks/peer.py NAME SHAPE NEW [ATTENTION]`.

Reads ways from stdin, one a line (`plain`, or `few` or `all` layers with the points behind it), runs each once, and
answers with its seconds of processor time, so that it takes turns with the ways of the benchmark that started it.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from narrow import ALL, FEW, PROMPT, build, plain
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


def tokenizer(size: int) -> Any:
    words = {f"w{number}": number for number in range(size)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w1")


Run = Callable[[list[int], list[str]], None]
RESIDUAL = ["resid_pre", "resid_mid"]


def nnterp(model: Any, new: int) -> Run:
    """Its accessors; it has none for the residual stream between attention and MLP, nor for the scores."""
    from nnterp import StandardizedTransformer

    wrapped, ids = StandardizedTransformer(model, tokenizer=tokenizer(model.config.vocab_size)), torch.tensor([PROMPT])
    accessors = {"resid_pre": wrapped.layers_input, "resid_mid": wrapped.attentions_output}

    def run(layers: list[int], points: list[str]) -> None:
        with wrapped.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0) as tracer:
            rows = list().save()  # noqa: C408
            with tracer.iter[:]:
                for layer in layers:
                    for point in points:
                        rows.append(accessors[point][layer].clone())
        assert len(rows) == new * len(points) * len(layers)

    return run


def transformer_lens(model: Any, new: int) -> Run:
    """The bridge's own `generate(return_cache=True)`, on its names of the points."""
    from transformer_lens.model_bridge import TransformerBridge

    own = tokenizer(model.config.vocab_size)
    bridge, ids = TransformerBridge.boot_transformers("Qwen/Qwen3-0.6B", hf_model=model, tokenizer=own), [PROMPT]

    def run(layers: list[int], points: list[str]) -> None:
        hooks = {"attn_scores": "attn.hook_attn_scores", "pattern": "attn.hook_pattern"}
        names = [f"blocks.{layer}.{hooks.get(point, f'hook_{point}')}" for layer in layers for point in points]
        _, cache = bridge.generate(
            torch.tensor(ids), max_new_tokens=new, do_sample=False, stop_at_eos=False, verbose=False,
            return_type="tokens", return_cache=True, names_filter=names,
        )  # fmt: skip
        assert all(name in cache for name in names)

    return run


def interp_engine(model: Any, new: int) -> Run:
    """Its eager engine's `capture_generation`: it generates, then runs one forward pass over all tokens with hooks."""
    from interp_engine import load_model
    from interp_engine.capture import capture_generation

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer(model.config.vocab_size).save_pretrained(folder)
        engine = load_model(folder, backend="eager", device="cpu", dtype="float32")

    def run(layers: list[int], points: list[str]) -> None:
        names = [f"{'attn_probs' if point == 'pattern' else point}.{layer}" for layer in layers for point in points]
        _, cache = capture_generation(engine, torch.tensor([PROMPT]), names, max_tokens=new)
        assert len(cache.tensors) == len(names)

    return run


PEERS: dict[str, Callable[[Any, int], Run]] = {
    "nnterp": nnterp,
    "transformer_lens": transformer_lens,
    "interp_engine": interp_engine,
}


def main() -> None:
    name, shape, new, *attention = sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:]
    torch.set_num_threads(1)
    run = PEERS[name](build(shape, attention=attention[0] if attention else None), new)
    bare = build(shape, attention=attention[0] if attention else None)
    print("ready", flush=True)
    for line in sys.stdin:
        way, *points = line.split()
        begun = time.process_time()
        if way == "plain":
            plain(bare, new)
        else:
            run({"few": FEW, "all": ALL}[way], points or RESIDUAL)
        print(time.process_time() - begun, flush=True)


if __name__ == "__main__":
    main()
