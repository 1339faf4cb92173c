"""A dictionary as SAELens's files: `cfg.json` and `sae_weights.safetensors`, which SAELens 6 reads."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from hookmap.analysis.dictionaries.dictionary import Dictionary
from hookmap.analysis.dictionaries.formats import place_of_hook
from hookmap.analysis.dictionaries.loading import CONFIG, WEIGHTS
from hookmap.errors import SelectionError, StoreError
from hookmap.stores.durable_files import write_file, writing

_KINDS = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "threshold": "jumprelu", "gated": "gated"}

_SAELENS = "6.0.0"
"""the first version with this format: it takes files that name none for older ones, and drops their metadata"""


def save_dictionary(found: Dictionary, folder: str | os.PathLike[str]) -> Path:
    """Write a dictionary so that `load_dictionary` and SAELens read it.

    Raises StoreError for a folder that has one, SelectionError for what these files cannot hold.
    """
    path = Path(folder)
    if type(found) is not Dictionary:
        raise SelectionError(
            f"a {type(found).__name__} is more than SAELens's files hold: keep the files that it was loaded from."
        )
    if (path / CONFIG).exists():
        raise StoreError(f"{path} already holds a dictionary. Write to another folder: -o DIR")
    text, data = json.dumps(_config(found), indent=2) + "\n", bytes(save(_weights(found)))
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        write_file(path / WEIGHTS, data)
        write_file(path / CONFIG, text.encode())
    return path


def _config(found: Dictionary) -> dict[str, Any]:
    about, kind = found.about, _KINDS[found.activation]
    if found.transcoder:
        prefix = "" if kind == "standard" else f"{kind}_"
        kind = f"{prefix}{'skip_' if found.skip is not None else ''}transcoder"
    metadata = {
        "sae_lens_version": _SAELENS,
        "model_name": about.model,
        "hook_name": None if about.point is None else _hook(about.point, about.layer),
        "prepend_bos": about.prepend_bos,
        "context_size": about.context,
        "seqpos_slice": [about.skip, None],
    }
    config: dict[str, Any] = {
        "architecture": kind,
        "d_in": found.d_in,
        "d_sae": found.features,
        "dtype": str(found.encoder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": _shares_bias(found),
        "normalize_activations": found.normalisation,
        "reshape_activations": "hook_z" if about.point == "z" else "none",
    }
    if found.activation == "topk":
        config |= {"k": found.k, "rescale_acts_by_decoder_norm": found.by_norms}
    if found.transcoder:
        config["d_out"] = found.d_out
        metadata["hook_name_out"] = None if about.point_out is None else _hook(about.point_out, about.layer_out)
    own = {name: getattr(about, name) for name in ("point", "layer", "point_out", "layer_out")}
    return {**config, "metadata": metadata, "hookmap": own}


def _weights(found: Dictionary) -> dict[str, torch.Tensor]:
    """SAELens knows features in units of their decoder's norms for topk only: else the norms go into the weights."""
    norms = found.decoder.norm(dim=1) if found.by_norms and found.activation != "topk" else None
    one = torch.ones_like(found.encoder_bias) if norms is None else norms
    bias = found.encoder_bias
    if found.input_bias is not None and not _shares_bias(found):
        bias = bias - found.input_bias @ found.encoder
    weights = {"W_dec": found.decoder / one[:, None], "b_dec": found.decoder_bias}
    if found.activation == "gated":
        gate = found.gate
        weights |= {"W_enc": found.encoder, "b_gate": gate["bias"], "b_mag": gate["magnitude_bias"] * one}
        weights["r_mag"] = gate["magnitude"] + one.log()
    else:
        weights |= {"W_enc": found.encoder * one, "b_enc": bias * one}
    if found.threshold is not None:
        weights["threshold"] = found.threshold.expand_as(bias) * one
    if found.skip is not None:
        weights["W_skip"] = found.skip
    return {name: each.detach().cpu().contiguous().clone() for name, each in weights.items()}


def _shares_bias(found: Dictionary) -> bool:
    """Whether what is subtracted from the rows is the decoder's bias: all that SAELens can say."""
    return found.input_bias is not None and not found.transcoder and torch.equal(found.input_bias, found.decoder_bias)


def _hook(point: str, layer: int | None) -> str | None:
    """TransformerLens's name of a point; None where it has none that means the same."""
    inside = {
        "z": "attn.hook_z",
        "q": "attn.hook_q",
        "k": "attn.hook_k",
        "v": "attn.hook_v",
        "mlp_post": "mlp.hook_post",
    }
    name = f"blocks.{layer}.{inside.get(point, f'hook_{point}')}"
    return name if place_of_hook(name) == (point, layer) else None
