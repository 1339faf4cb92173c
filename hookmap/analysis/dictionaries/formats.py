"""What the files of each program mean: a dictionary of tensors and a config -> a `Dictionary`. Pure.

SAELens (versions 5 and 6): `cfg.json`, `sae_weights.safetensors`. dictionary_learning: `config.json`, `ae.pt`. Gemma
Scope: `params.npz`. Plain: `config.json` and any one safetensors file, with SAELens's names of tensors.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from hookmap.analysis.dictionaries.dictionary import About, Dictionary
from hookmap.errors import SelectionError
from hookmap.maps.points import parse_point

Tensor = torch.Tensor
_LEARNED_AT = re.compile(r"(?P<point>[a-z_]+?)_layer_(?P<layer>[0-9]+)")
"""`submodule_name` of dictionary_learning: resid_post_layer_12"""


class _Weights(dict[str, Tensor]):
    """Tensors by name; a missing one is an error that says which there are."""

    def __missing__(self, name: str) -> Tensor:
        raise SelectionError(f"the weights lack {name}: they hold {', '.join(sorted(self)) or 'nothing'}.")


def place_of_hook(name: Any, layer: Any = None) -> tuple[str | None, int | None]:
    """The point and layer of a hook's name (`blocks.8.hook_resid_post`); (None, None) where it is none of ours."""
    if not isinstance(name, str) or not name:
        return None, None
    parsed = parse_point(name)
    if isinstance(parsed, str):
        return None, None
    return parsed.point, parsed.layer if parsed.layer is not None else layer if isinstance(layer, int) else None


def saelens(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Dictionary:
    """SAELens, versions 5 and 6; and plain files, whose tensors have the same names. Raises SelectionError."""
    weights, meta = _Weights(tensors), {**config, **(config.get("meta") or {}), **(config.get("metadata") or {})}
    if config.get("normalize_activations") == "expected_average_only_in":
        raise SelectionError(
            "the dictionary expects activations scaled by a factor that its files do not hold (normalize_activations "
            "expected_average_only_in): fold it in (SAELens: fold_activation_norm_scaling_factor), and save it again."
        )
    if config.get("finetuning_scaling_factor"):
        raise SelectionError(
            "the dictionary has a finetuning_scaling_factor, which only SAELens 5 applies: convert it there."
        )
    kind = str(config.get("architecture", "standard"))
    base = kind.removesuffix("_transcoder").removesuffix("_skip") if kind.endswith("transcoder") else kind
    base = {"transcoder": "standard", "skip": "standard", "skip_transcoder": "standard"}.get(base, base)
    own = {**meta, **(config.get("hookmap") or {})}  # names of ours, where SAELens has none
    point, layer = place_of_hook(own.get("point") or own.get("hook_name"), own.get("layer", own.get("hook_layer")))
    out, layer_out = place_of_hook(
        own.get("point_out") or own.get("hook_name_out"), own.get("layer_out", own.get("hook_layer_out"))
    )
    about = About(
        point,
        layer,
        out,
        layer_out,
        meta.get("model_name") or meta.get("model"),
        meta.get("prepend_bos"),
        meta.get("context_size"),
        _skipped(meta.get("seqpos_slice")),
        "SAELens" if "d_sae" in config else "plain",
        kind,
    )
    transcoder = kind.endswith("transcoder")
    decoder_bias = weights["b_dec"]
    read_bias = decoder_bias if config.get("apply_b_dec_to_input", True) and not transcoder else None
    features = weights["W_enc"].shape[-1]
    common: dict[str, Any] = {
        "encoder": weights["W_enc"],
        "decoder": weights["W_dec"],
        "decoder_bias": decoder_bias,
        "input_bias": read_bias,
        "skip": weights["W_skip"] if "skip" in kind else None,
        "normalisation": config.get("normalize_activations") or "none",
        "about": about,
    }
    if common["normalisation"] not in ("none", "constant_norm_rescale", "layer_norm"):
        raise SelectionError(f"normalize_activations {common['normalisation']!r} is not known here.")
    if base == "gated":
        gate = {"bias": weights["b_gate"], "magnitude": weights["r_mag"], "magnitude_bias": weights["b_mag"]}
        return Dictionary(**common, encoder_bias=torch.zeros(features), activation="gated", gate=gate)
    common["encoder_bias"] = weights["b_enc"]
    if base == "jumprelu":
        return Dictionary(**common, activation="jumprelu", threshold=_threshold(weights))
    if base in ("batchtopk", "matryoshka_batchtopk"):
        return Dictionary(**common, activation="threshold", threshold=_threshold(weights))
    if base == "topk" or config.get("activation_fn_str", config.get("activation_fn")) == "topk":
        k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
        by_norms = bool(config.get("rescale_acts_by_decoder_norm"))
        return Dictionary(**common, activation="topk", k=k, by_norms=by_norms)
    if base == "standard" and config.get("activation_fn_str", config.get("activation_fn", "relu")) == "relu":
        return Dictionary(**common)
    raise SelectionError(
        f"architecture {kind!r} is not known here: expected standard, gated, topk, batchtopk, jumprelu, "
        "matryoshka_batchtopk, or a transcoder of these."
    )


def _skipped(seqpos: Any) -> int:
    """First tokens of a text that a slice of positions leaves out; counted from the end, or none: 0."""
    first = seqpos[0] if isinstance(seqpos, list) and len(seqpos) > 1 else None
    return first if isinstance(first, int) and not isinstance(first, bool) and first > 0 else 0


def _threshold(weights: _Weights) -> Tensor:
    for name in ("threshold", "topk_threshold"):
        if name in weights:
            return weights[name].to(weights["W_enc"].dtype)
    return weights["log_threshold"].exp()


def dictionary_learning(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Dictionary:
    """The dictionary classes of dictionary_learning. Raises SelectionError."""
    weights, trainer = _Weights(tensors), config.get("trainer") or config
    kind = str(trainer.get("dict_class", "?"))
    place = _LEARNED_AT.fullmatch(str(trainer.get("submodule_name")))
    point, layer = place_of_hook(place["point"], int(place["layer"])) if place else (None, None)
    context = (config.get("buffer") or {}).get("ctx_len")
    model = trainer.get("lm_name")
    about = About(point, layer, model=model, context=context, program="dictionary_learning", kind=kind)
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        own: dict[str, Any] = {
            "encoder": weights["W_enc"],
            "decoder": weights["W_dec"],
            "encoder_bias": weights["b_enc"],
        }
        bias, threshold = weights["b_dec"], weights["threshold"].to(weights["W_enc"].dtype)
        if kind == "JumpReluAutoEncoder":
            return Dictionary(
                **own, decoder_bias=bias, activation="jumprelu", threshold=threshold, by_norms=True, about=about
            )
        return Dictionary(
            **own, decoder_bias=bias, input_bias=bias, activation="threshold", threshold=threshold, about=about
        )
    if kind not in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"):
        raise SelectionError(
            f"dict_class {kind!r} is not known here: expected AutoEncoder, AutoEncoderNew, GatedAutoEncoder, "
            "AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE or JumpReluAutoEncoder."
        )
    both: dict[str, Any] = {
        "encoder": weights["encoder.weight"].T,
        "decoder": weights["decoder.weight"].T,
        "about": about,
    }
    if kind == "GatedAutoEncoder":
        gate = {"bias": weights["gate_bias"], "magnitude": weights["r_mag"], "magnitude_bias": weights["mag_bias"]}
        bias, zeros = weights["decoder_bias"], torch.zeros(len(weights["encoder.weight"]))
        return Dictionary(
            **both, encoder_bias=zeros, decoder_bias=bias, input_bias=bias, activation="gated", gate=gate, by_norms=True
        )
    both["encoder_bias"] = weights["encoder.bias"]
    if kind == "AutoEncoder":
        return Dictionary(**both, decoder_bias=weights["bias"], input_bias=weights["bias"])
    if kind == "AutoEncoderNew":
        return Dictionary(**both, decoder_bias=weights["decoder.bias"])
    bias = weights["b_dec"]
    if kind == "AutoEncoderTopK":
        k = int(weights["k"]) if "k" in weights else trainer.get("k")
        return Dictionary(**both, decoder_bias=bias, input_bias=bias, activation="topk", k=k)
    threshold = weights["threshold"].to(bias.dtype)
    return Dictionary(**both, decoder_bias=bias, input_bias=bias, activation="threshold", threshold=threshold)


def gemma_scope(tensors: Mapping[str, Tensor]) -> Dictionary:
    """Gemma Scope's JumpReLU dictionaries, whose files do not say where they were trained. Raises SelectionError."""
    weights = _Weights(tensors)
    about = About(prepend_bos=True, program="Gemma Scope", kind="jumprelu")
    return Dictionary(
        weights["W_enc"],
        weights["W_dec"],
        weights["b_enc"],
        weights["b_dec"],
        "jumprelu",
        threshold=weights["threshold"],
        about=about,
    )
