"""Runs in TransformerLens's own environment: python ask_transformer_lens.py CHECKPOINTS ANSWERS."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import questions as q
import torch
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge

NAMES = {
    "resid_pre": ["hook_resid_pre"], "resid_mid": ["hook_resid_mid"], "resid_post": ["hook_resid_post"],
    "mixer_out": ["hook_attn_out", "hook_mixer_out"], "mlp_out": ["hook_mlp_out"],
    "z": ["attn.hook_z"], "pattern": ["attn.hook_pattern"], "attn_scores": ["attn.hook_attn_scores"],
    "q": ["attn.hook_q"], "k": ["attn.hook_k"], "q_rot": ["attn.hook_rot_q"], "k_rot": ["attn.hook_rot_k"],
    "mlp_pre": ["mlp.hook_pre"], "mlp_pre_linear": ["mlp.hook_pre_linear"], "mlp_post": ["mlp.hook_post"],
}  # fmt: skip


def main(checkpoints: Path, answers: Path) -> None:
    for folder in sorted(checkpoints.iterdir()):
        found = q.Answers()
        try:
            ask(TransformerBridge.boot_transformers(str(folder), device="cpu"), folder, found)
        except Exception as error:
            found.note("load", error)
        found.save(answers / folder.name)


def ask(bridge: Any, folder: Path, found: q.Answers) -> None:
    tokens, source = torch.tensor([q.TOKENS]), torch.tensor([q.SOURCE])
    logits, cache = bridge.run_with_cache(tokens)
    _, clean = bridge.run_with_cache(source)

    def at(point: str, layer: int = q.LAYER) -> str:
        """The point's name here. KeyError where the model has none such."""
        names = [f"blocks.{layer}.{name}" for name in NAMES[point]]
        return next((name for name in names if name in cache), None) or names[0]

    def written(point: str, change: Any) -> torch.Tensor:
        return bridge.run_with_hooks(tokens, fwd_hooks=[(at(point), lambda tensor, hook: change(tensor))])[0]

    def steered(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + q.STRENGTH * q.VECTOR

    def steered_at_places(tensor: torch.Tensor) -> torch.Tensor:
        new = tensor.clone()
        new[:, q.PLACES] += q.STRENGTH * q.VECTOR
        return new

    def without_head(z: torch.Tensor) -> torch.Tensor:
        new = z.clone()
        new[:, :, q.HEAD] = 0
        return new

    def patched(point: str, tensor: torch.Tensor) -> torch.Tensor:
        new = tensor.clone()
        new[:, q.PLACES] = clean[at(point)][:, q.PLACES]
        return new

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, q.TARGET] - logits[0, -1, q.AGAINST]

    found.ask("logits", lambda: logits[0])
    for point in NAMES:
        for layer in range(q.LAYERS):
            found.ask(
                f"read {point} {layer}", lambda point=point, layer=layer: q.seen(point, cache[at(point, layer)][0])
            )
    found.ask("lens", lambda: cache.logit_lens(positions=None, return_type="probs").values[1:, 0])
    for point in ("resid_post", "resid_mid", "mlp_out"):
        found.ask(f"steer {point}", partial(written, point, steered))
    found.ask("steer at places", lambda: written("resid_post", steered_at_places))
    for point in ("mixer_out", "mlp_out"):
        found.ask(f"ablate {point}", partial(written, point, torch.zeros_like))
    found.ask("ablate head", lambda: written("z", without_head))
    for point in ("resid_pre", "resid_mid"):
        found.ask(f"patch {point}", lambda point=point: written(point, partial(patched, point)))
    found.ask("sweep", lambda: patching.get_act_patch_resid_pre(bridge, tokens, clean, metric))
    found.ask("attribution", lambda: attribution(folder, tokens))


def attribution(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """[parts], of the last position: what enters the first block, then each branch; with weights folded for it."""
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    bridge.enable_compatibility_mode()
    _, cache = bridge.run_with_cache(tokens)
    stack, labels = cache.decompose_resid(return_labels=True)
    values = cache.logit_attrs(stack, torch.tensor([q.TARGET]), incorrect_tokens=torch.tensor([q.AGAINST]))[:, 0, -1]
    branches = [n for n, label in enumerate(labels) if label.endswith(("attn_out", "mlp_out", "mixer_out"))]
    rest = [n for n, label in enumerate(labels) if n not in branches and label != "bias"]
    return torch.cat([values[rest].sum()[None], values[branches]])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
