"""Runs in nnterp's own environment: python ask_nnterp.py CHECKPOINTS ANSWERS."""

import sys
from pathlib import Path
from typing import Any

import questions as q
import torch
from nnterp import StandardizedTransformer
from nnterp.interventions import logit_lens


def main(checkpoints: Path, answers: Path) -> None:
    for folder in sorted(checkpoints.iterdir()):
        found = q.Answers()
        try:
            ask(load(str(folder), found), found)
        except Exception as error:
            found.note("load", error)
        found.save(answers / folder.name)


def load(folder: str, found: q.Answers) -> Any:
    """With the attention weights, where nnterp finds them."""
    try:
        return StandardizedTransformer(folder, device_map="cpu", enable_attention_probs=True)
    except Exception as error:
        found.note("pattern", error)
        return StandardizedTransformer(folder, device_map="cpu", attn_implementation="eager")


def ask(model: Any, found: q.Answers) -> None:
    tokens, source = torch.tensor([q.TOKENS]), torch.tensor([q.SOURCE])
    accessors = {
        "resid_pre": model.layers_input, "resid_post": model.layers_output,
        "mixer_out_raw": model.attentions_output, "mlp_out_raw": model.mlps_output,
    }  # fmt: skip
    if "pattern" not in found.refused:
        accessors["pattern"] = model.attention_probabilities

    def logits() -> torch.Tensor:
        with model.trace(tokens):
            out = model.logits.save()
        return out[0]

    def read(accessor: Any, layer: int, given: torch.Tensor = tokens) -> torch.Tensor:
        with model.trace(given):
            out = accessor[layer].save()
        return out[0]

    def steered(places: list[int] | None) -> torch.Tensor:
        with model.trace(tokens):
            model.steer(q.LAYER, q.VECTOR, q.STRENGTH, token_positions=places)
            out = model.logits.save()
        return out[0]

    def steered_mlp() -> torch.Tensor:
        with model.trace(tokens):
            model.mlps_output[q.LAYER] = model.mlps_output[q.LAYER] + q.STRENGTH * q.VECTOR
            out = model.logits.save()
        return out[0]

    def ablated(accessor: Any) -> torch.Tensor:
        with model.trace(tokens):
            accessor[q.LAYER] = torch.zeros_like(accessor[q.LAYER])
            out = model.logits.save()
        return out[0]

    def patched() -> torch.Tensor:
        rows = read(model.layers_input, q.LAYER, source)
        with model.trace(tokens):
            new = model.layers_input[q.LAYER].clone()
            new[:, q.PLACES] = rows[q.PLACES]
            model.layers_input[q.LAYER] = new
            out = model.logits.save()
        return out[0]

    found.ask("logits", logits)
    for point, accessor in accessors.items():
        for layer in range(q.LAYERS):
            found.ask(f"read {point} {layer}", lambda accessor=accessor, layer=layer: read(accessor, layer))
    found.ask("lens", lambda: logit_lens(model, tokens)[0][:, None])
    found.ask("steer resid_post", lambda: steered(None))
    found.ask("steer at places", lambda: steered(q.PLACES))
    found.ask("steer mlp_out_raw", steered_mlp)
    found.ask("ablate mlp_out_raw", lambda: ablated(model.mlps_output))
    found.ask("ablate mixer_out_raw", lambda: ablated(model.attentions_output))
    found.ask("patch resid_pre", patched)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
