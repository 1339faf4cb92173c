"""A peer in an environment of its own: `PEER_PYTHON benchmarks/peer.py nnterp|transformer_lens SHAPE NEW`.

Reads names of ways from stdin, one a line, runs each once, and answers with its seconds of processor time, so that it
takes turns with the ways of the benchmark that started it.
"""

import sys
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


def nnterp(model: Any, new: int) -> Callable[[list[int]], None]:
    """Its accessors `layers_input` and `attentions_output`: it has none for the residual stream between them."""
    from nnterp import StandardizedTransformer

    wrapped, ids = StandardizedTransformer(model, tokenizer=tokenizer(model.config.vocab_size)), torch.tensor([PROMPT])

    def run(layers: list[int]) -> None:
        with wrapped.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0) as tracer:
            rows = list().save()  # noqa: C408
            with tracer.iter[:]:
                for layer in layers:
                    rows.append(wrapped.layers_input[layer].clone())
                    rows.append(wrapped.attentions_output[layer].clone())
        assert len(rows) == new * 2 * len(layers)

    return run


def transformer_lens(model: Any, new: int) -> Callable[[list[int]], None]:
    """The bridge's own `generate(return_cache=True)`, on the names `hook_resid_pre` and `hook_resid_mid`."""
    from transformer_lens.model_bridge import TransformerBridge

    own = tokenizer(model.config.vocab_size)
    bridge, ids = TransformerBridge.boot_transformers("Qwen/Qwen3-0.6B", hf_model=model, tokenizer=own), [PROMPT]

    def run(layers: list[int]) -> None:
        names = [f"blocks.{layer}.hook_{point}" for layer in layers for point in ("resid_pre", "resid_mid")]
        _, cache = bridge.generate(
            torch.tensor(ids), max_new_tokens=new, do_sample=False, stop_at_eos=False, verbose=False,
            return_type="tokens", return_cache=True, names_filter=names,
        )  # fmt: skip
        assert all(name in cache for name in names)

    return run


def main() -> None:
    name, shape, new = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    run = {"nnterp": nnterp, "transformer_lens": transformer_lens}[name](build(shape), new)
    bare = build(shape)
    ways: dict[str, Callable[[], None]] = {
        "plain": lambda: plain(bare, new),
        "few": lambda: run(FEW),
        "all": lambda: run(ALL),
    }
    print("ready", flush=True)
    for line in sys.stdin:
        begun = time.process_time()
        ways[line.strip()]()
        print(time.process_time() - begun, flush=True)


if __name__ == "__main__":
    main()
