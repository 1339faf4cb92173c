"""A narrow copy of a config: the same depth, the same kinds of layer, widths that a CPU runs in a moment.

Verification computes with it, and discovery where a model cannot run without data. Config fields are told by the
words that transformers uses in their names; what is not a width, a count of heads or of experts stays as it is.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Collection, Iterator
from math import prod
from typing import TYPE_CHECKING, Any

from hookmap.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

VOCAB = 512
MOST_BYTES = 4 * 2**30
"""the most that the weights of a copy may take, in float32"""

# First match decides. A value is a ceiling: a field that is smaller already stays.
_CEILINGS: tuple[tuple[str, int], ...] = (
    (r"vocab_size", VOCAB),
    (r"(rope|nope|rotary).*dim", 8),
    (r"(num|n)_(key_value|kv)_heads|num_kv|multi_query_group_num|num_key_value_groups", 2),
    (r"index_n_heads|index_head_dim", 8),
    (r"(num_experts_per_tok|moe_k|experts_per_token|top_?k(_experts)?)$", 2),
    (r"n_group$|topk_group|num_expert_group", 2),
    (r"(num|n)(_local|_routed)?_experts$|moe_num_experts$|num_zero_experts", 8),
    (r"(n|num)_shared_experts", 1),
    (r"lora_rank|_rank$|^lora_", 16),
    (r"mamba_(n|num)_heads|ssm_num_heads|mamba_num_heads", 8),
    (r"n_groups$|mamba_n_groups|mamba_ngroups", 2),
    (r"(linear|short|mamba|ssm|head).*head_dim|d_head|head_dim|head_size|kv_channels|attention_head_dim", 16),
    (r"state_size|d_state|state_dim|ssm_state", 16),
    (r"(linear|mamba|ssm)_.*(key|value|num).*heads", 4),
    (r"(attention|encoder|decoder)_(attention_)?heads|(^|_)n_heads?$|num_heads|num_attention_heads", 4),
    (r"(intermediate|ffn|inner|ff|mlp|expert|feed_?forward|shared).*(dim|size|hidden)|n_inner|d_ff|d_inner", 128),
    (
        r"hidden_size|d_model|n_embd|^dim$|(embed|embedding|emb|proj|model|lru|vision|output|input|_in|_out)_?(dim|size|width)",
        64,
    ),
    (r"width", 64),
)
# Kept where they held before: sizes that are the same, (a size, what it is a multiple of), (heads, width of each, what
# their product is).
_EQUAL = (("codebook_dim", "hidden_size"),)
_MULTIPLES = (("attention_hidden_size", "hidden_size"),)
# The same of two parts, each (part, field): the first is a part of the second.
_SHARES = ((("adaptor_config", "intermediate_size"), ("text_config", "hidden_size")),)
_PRODUCTS = (
    ("num_attention_heads", "attention_head_dim", ("attention_hidden_size",)),
    ("num_heads", "head_dim", ("expand", "hidden_size")),
    ("num_heads", "d_kv", ("hidden_size",)),
    ("num_attention_heads", "d_kv", ("hidden_size",)),
    ("n_mamba_heads", "mamba_headdim", ("mamba_expand", "hidden_size")),
    ("mamba_n_heads", "mamba_d_head", ("mamba_d_ssm",)),
)
_SECTIONS = "mrope_section"
_TOKEN = re.compile(r"token_id$|token_index$")
# Of a part that reads images or sounds, when a copy is still too large: in some, each layer is wider than the last.
_DEPTH = re.compile(r"^(num_hidden_layers|num_layers|n_layers?|depth|encoder_layers|decoder_layers)$")
_SHALLOW = 2


def narrow_copy(config: Any, trust_remote_code: bool = False) -> tuple[nn.Module, Any]:
    """A narrow copy on the CPU, weights and all, and its config. What it takes is known before anything is allocated.

    Raises ModelError with the figure where it would be more than MOST_BYTES.
    """
    import torch

    from hookmap.loading import configs

    for shallow in (False, True):
        small, plan = _planned(config, shallow, trust_remote_code)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in (*plan.parameters(), *plan.buffers()))
        if needed <= MOST_BYTES:
            return configs.build(small, "cpu", torch.float32, trust_remote_code), small
    largest, tensor = max(plan.named_parameters(), key=lambda item: item[1].numel())
    raise ModelError(
        f"a narrow copy of {type(plan).__name__} would take {needed / 2**30:,.1f} GiB, and at most "
        f"{MOST_BYTES / 2**30:g} GiB are allowed: its largest weight, {largest}, is {list(tensor.shape)}. Give a "
        "config with a smaller size there, or a model with its weights: hookmap verify MODEL"
    )


def _planned(config: Any, shallow: bool, trust_remote_code: bool) -> tuple[Any, nn.Module]:
    """A narrow config that builds, and its model without weights.

    Where the whole cannot be narrow, because its config asks for a relation that is not known here, one field or one
    part keeps its size.
    """
    import torch

    from hookmap.loading import configs

    def build(kept: frozenset[str]) -> tuple[Any, nn.Module]:
        small = narrow(config, shallow, kept)
        return small, configs.build(small, "meta", torch.float32, trust_remote_code)

    try:
        return build(frozenset())
    except ModelError:
        for name in _changed(config, narrow(config, shallow)):
            with contextlib.suppress(ModelError):
                return build(frozenset({name}))
        raise


def _changed(config: Any, small: Any) -> list[str]:
    """What differs in a narrow copy, by name: the vocabulary first, then other fields, then parts."""
    fields: dict[str, None] = {}
    parts: dict[str, None] = {}
    stack = [(config, small)]
    while stack:
        before, after = stack.pop()
        for name, value in vars(before).items():
            other = vars(after).get(name, value)
            # `==` of two configs reads attributes that a config with values for each layer refuses to give.
            part = hasattr(value, "to_dict")
            if name.startswith("_") or (value.to_dict() == other.to_dict() if part else value == other):
                continue
            (parts if part else fields)[name] = None
            if part:
                stack.append((value, other))
    return [*sorted(fields, key=lambda name: name != "vocab_size"), *parts]


def narrow(config: Any, shallow: bool = False, kept: Collection[str] = ()) -> Any:
    """A copy of a transformers config at narrow width; depth and the pattern of layers stay.

    `shallow`: of the parts beside the text model, such as a vision tower, two layers are left. `kept`: names of fields
    and parts that stay as they are.
    """
    made = copy.deepcopy(config)
    text = made.get_text_config(decoder=True) if hasattr(made, "get_text_config") else made
    _narrow(made, config, kept, text if shallow else None)
    return made


def _narrow(config: Any, original: Any, kept: Collection[str], text: Any = None) -> None:
    """`text`: this part keeps its depth; other parts do not."""
    names = getattr(config, "attribute_map", {})
    settings, before = vars(config), vars(original)
    for name, value in list(settings.items()):
        if name.startswith("_") or names.get(name, name) != name or name in kept:
            continue
        if hasattr(value, "to_dict"):
            _narrow(value, before[name], kept, text)
            if text is not None and value is not text:
                _cut_depth(value)
        elif isinstance(value, dict) and name.endswith("config"):
            settings[name] = {key: _field(key, each) for key, each in value.items()}
        else:
            settings[name] = _field(name, value)
    _relations(settings, before)
    _shares(settings, before)
    _sections(config)
    if getattr(config, "is_heterogeneous", False):
        config.per_layer_config = dict(_narrow_layers(config, original))


def _cut_depth(part: Any) -> None:
    settings = vars(part)
    for name, depth in list(settings.items()):
        if _DEPTH.search(name) and isinstance(depth, int) and not isinstance(depth, bool) and depth > _SHALLOW:
            settings[name] = _SHALLOW
            for other, value in settings.items():  # such as layer_types
                if isinstance(value, list) and len(value) == depth:
                    settings[other] = value[:_SHALLOW]


def _narrow_layers(config: Any, original: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Settings of single layers, made narrow like those of the whole model."""
    spec = original._heterogeneity_spec
    for layer, overrides in spec.per_layer_overrides.items():
        cut = {name: _field(name, value) for name, value in overrides.items()}
        of_layer = {**vars(config), **cut}
        _relations(of_layer, {**vars(original), **overrides})
        yield layer, {name: of_layer[name] for name in overrides}


def _field(name: str, value: Any) -> Any:
    if _TOKEN.search(name):
        return _token(value)
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple)):
        return value
    for pattern, ceiling in _CEILINGS:
        if re.search(pattern, name):
            if isinstance(value, int):
                return min(value, ceiling)
            if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
                return type(value)(min(item, ceiling) for item in value)
    return value


def _token(value: Any) -> Any:
    if isinstance(value, list):
        return [_token(item) for item in value]
    return value % VOCAB if isinstance(value, int) and value >= VOCAB else value


def _relations(settings: dict[str, Any], before: dict[str, Any]) -> None:
    """Restores the relations between sizes that held before they were reduced."""
    for part in ("", "encoder_", "decoder_"):
        heads, shared = _heads(settings, part)
        if heads and shared:
            same = len(set(_heads(before, part))) == 1
            settings[f"{part}num_key_value_heads"] = heads if same else shared if heads % shared == 0 else 1
    for one, other in _EQUAL:
        if before.get(one) and before[one] == before.get(other):
            settings[one] = settings[other]
    rope = settings.get("qk_rope_head_dim")
    if rope and before.get("head_dim") == before["qk_rope_head_dim"]:
        settings["head_dim"] = rope
    if rope and "qk_head_dim" in settings:
        settings["qk_head_dim"] = settings["qk_nope_head_dim"] + rope
    if settings.get("axial_pos_embds_dim"):
        parts = settings["axial_pos_embds_dim"] = [16] * len(settings["axial_pos_embds_dim"])
        parts[0] = settings["hidden_size"] - sum(parts[1:])
    pool = settings.get("index_kpool")
    if pool and settings.get("index_topk", 0) % pool:
        settings["index_topk"] = pool
    for wide, part in _MULTIPLES:
        if before.get(wide) and before.get(part) and before[wide] % before[part] == 0:
            settings[wide] = settings[part] * (before[wide] // before[part])
    for count, width, whole in _PRODUCTS:
        sizes = [size for name in (count, width, *whole) if isinstance(size := before.get(name), int)]
        if len(sizes) == 2 + len(whole) and sizes[0] * sizes[1] == prod(sizes[2:]):
            settings[width] = prod(settings[name] for name in whole) // settings[count]


def _shares(settings: dict[str, Any], before: dict[str, Any]) -> None:
    for (part, field), (other, whole) in _SHARES:
        share, size = getattr(before.get(part), field, None), getattr(before.get(other), whole, None)
        if share and size and size % share == 0:
            setattr(settings[part], field, getattr(settings[other], whole) // (size // share))


def _sections(config: Any) -> None:
    """Rotary sections (time, height, width) that together are half of the rotated width, as in a whole model.

    Written also where the config has none, and its class has sections of its own for the full width.
    """
    rope = vars(config).get("rope_parameters")
    reads = _SECTIONS in (getattr(config, "ignore_keys_at_rope_validation", None) or ())
    for each in (rope, *rope.values()) if isinstance(rope, dict) else ():
        if isinstance(each, dict) and (_SECTIONS in each or (reads and "rope_type" in each)):
            half = _rotated(config, each) // 2
            side = round(half * 3 / 8)
            each[_SECTIONS] = [side, side, half - 2 * side]


def _rotated(config: Any, rope: dict[str, Any]) -> int:
    """How many features of a head are rotated."""
    if width := getattr(config, "qk_rope_head_dim", None):
        return int(width)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(width * (rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0))


def _heads(settings: dict[str, Any], part: str) -> tuple[int | None, int | None]:
    found = (settings.get(f"{part}{name}") for name in ("num_attention_heads", "num_key_value_heads"))
    heads, shared = (value if isinstance(value, int) else None for value in found)
    return heads, shared
