"""Finds the map for a model without running it: a file, or one of the maps that ship with hookmap.

A map of an architecture serves other sizes of it (`resize`), as long as nothing but sizes differs.
"""

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hookmap import hub
from hookmap.architecture_map import ArchitectureMap, BlockKind, load
from hookmap.errors import MapMismatchError, MapNotFoundError

# Fields of a config that change how large tensors are, or numbers inside a module: never which modules there are.
# Every other field is not understood here, and a difference in it is refused.
SIZE_FIELDS = frozenset(
    "hidden_size n_embd d_model num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads "
    "num_heads num_key_value_heads num_kv_heads head_dim intermediate_size moe_intermediate_size n_inner ffn_dim "
    "ffn_hidden_size vocab_size state_size conv_kernel time_step_rank query_pre_attn_scalar is_decoder "
    "max_position_embeddings n_positions n_ctx rope_theta rope_parameters rope_scaling rms_norm_eps layer_norm_eps "
    "layer_norm_epsilon initializer_range sliding_window use_sliding_window max_window_layers layer_types "
    "attention_bias attention_dropout tie_word_embeddings use_cache bos_token_id eos_token_id pad_token_id "
    "model_type architectures dtype torch_dtype transformers_version _name_or_path".split()
)
_LAYER_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTH_FIELDS = ("hidden_size", "n_embd", "d_model")
_HEAD_FIELDS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


def mappings_folder() -> Path:
    """The shipped maps: beside this file in an installed wheel, at the root of a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "mappings"
    return installed if installed.is_dir() else here.parent / "mappings"


def shipped_architectures() -> tuple[str, ...]:
    """Names of the architectures that have a shipped map."""
    return tuple(sorted(p.stem for p in mappings_folder().glob("*.json") if not p.name.endswith(".schema.json")))


def shipped_models() -> tuple[str, ...]:
    """Hub ids of the models that have a shipped map of their own."""
    return tuple(sorted(p.stem.replace("--", "/", 1) for p in (mappings_folder() / "models").glob("*.json")))


def load_map(x: str | Path) -> ArchitectureMap:
    """The map for `x`, without running a model or downloading weights.

    `x`: a map file, an architecture's name (`Qwen3ForCausalLM`), a model folder, or a hub id. For a folder or a hub
    id, the shipped map of its architecture is resized to its config; a hub id's config comes from the local cache,
    or else from the hub. Raises MapNotFoundError with what was tried, MapError where the file is broken.
    """
    path = Path(x)
    if path.is_file():
        return load(path)
    name = str(x)
    if path.is_dir():
        config = _read_config(path)
        return _for_config(config, where=str(x))
    if name in shipped_architectures():
        return load(mappings_folder() / f"{name}.json")
    if name in shipped_models():
        return load(mappings_folder() / "models" / f"{name.replace('/', '--')}.json")
    if name.endswith(".json"):
        raise MapNotFoundError(f"there is no map file {name}. Make one: hookmap discover MODEL -o {name}")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _for_config(_hub_config(name), where=name)
    raise _not_found(name, "it is no file, no folder, no hub id (org/name) and no architecture with a shipped map")


def given_map(map: "ArchitectureMap | str | os.PathLike[str] | None") -> "ArchitectureMap | None":
    """A map as a caller may give it: itself, or what `load_map` takes. Raises as that one."""
    return load_map(os.fspath(map)) if isinstance(map, str | os.PathLike) else map


def resize(
    architecture_map: ArchitectureMap,
    num_layers: int,
    d_model: int,
    *,
    num_heads: int | None = None,
    d_vocab: int | None = None,
    model_id: str | None = None,
) -> ArchitectureMap:
    """The same architecture at another size. Pure. Raises MapMismatchError where the size decides more than sizes.

    Points whose selectors say how heads lie in a tensor (`q`, `k`, `v`, `z`) are left out: that depends on the size.
    """
    name = architecture_map.architecture
    if num_layers != architecture_map.num_layers:
        if len(architecture_map.kinds) > 1:
            kinds = ", ".join(kind.name for kind in architecture_map.kinds)
            raise MapMismatchError(
                f"the shipped map of {name} has several kinds of block ({kinds}) on {architecture_map.num_layers} "
                f"layers; which of {num_layers} layers is of which kind cannot be told from it. "
                f"Run: hookmap discover {model_id or 'MODEL'}"
            )
        scales = {term.scale for kind in architecture_map.kinds for p in kind.points.values() for term in p.terms}
        if scales - {1.0, -1.0}:
            raise MapMismatchError(
                f"the shipped map of {name} scales its branches by {sorted(scales - {1.0, -1.0})}, which may depend on "
                f"the number of layers. Run: hookmap discover {model_id or 'MODEL'}"
            )
        only = architecture_map.kinds[0].model_copy(update={"layers": tuple(range(num_layers))})
        architecture_map = architecture_map.model_copy(update={"kinds": (only,)})
    sizes = {"num_layers": num_layers, "d_model": d_model, "num_heads": num_heads, "d_vocab": d_vocab}
    reason = f"where its heads lie depends on the size: hookmap discover {model_id or 'MODEL'}"
    resized = tuple(_without_heads(kind, reason) for kind in architecture_map.kinds)
    # The new size has not been verified, and is no longer the config that the hash is of.
    own = {"model_id": model_id, "scope": "architecture", "config_hash": None, "verified_by": (), "proved_on": ()}
    return architecture_map.model_copy(update={"kinds": resized, **sizes, **own})


def _without_heads(kind: BlockKind, reason: str) -> BlockKind:
    sized = {name for name, point in kind.points.items() if any(term.heads for term in point.terms)}
    points = {name: point for name, point in kind.points.items() if name not in sized}
    return kind.model_copy(
        update={"points": points, "unavailable": {**kind.unavailable, **dict.fromkeys(sorted(sized), reason)}}
    )


def _for_config(config: Mapping[str, Any], where: str) -> ArchitectureMap:
    names = config.get("architectures") or []
    found = next((name for name in names if name in shipped_architectures()), None)
    if found is None:
        raise _not_found(where, f"its architecture is {', '.join(names) or 'not in its config'}", names)
    shipped = load(mappings_folder() / f"{found}.json")
    _refuse_other_structure(shipped, config, where)
    return resize(
        shipped,
        num_layers=_first(config, _LAYER_FIELDS) or shipped.num_layers,
        d_model=_first(config, _WIDTH_FIELDS) or shipped.d_model,
        num_heads=_first(config, _HEAD_FIELDS) or shipped.num_heads,
        d_vocab=_first(config, ("vocab_size",)) or shipped.d_vocab,
        model_id=where,
    )


def _refuse_other_structure(shipped: ArchitectureMap, config: Mapping[str, Any], where: str) -> None:
    """Refuses a config that differs from the shipped map's in a field that may change the structure."""
    ours, theirs = (
        {key: value for key, value in _difference(raw).items() if key not in SIZE_FIELDS}
        for raw in ({"model_type": shipped.model_type, **shipped.config}, config)
    )
    differing = [
        f"  {key}: the map's is {ours.get(key, 'the default')!r}, this model's is {theirs.get(key, 'the default')!r}"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key)
    ]
    if differing:
        raise MapMismatchError(
            f"the shipped map of {shipped.architecture} may not fit {where}: these fields of the config differ\n"
            + "\n".join(differing)
            + f"\nRun: hookmap discover {where}"
        )


def _difference(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config's difference from its class's defaults, so that a default written out is no difference."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return dict(config)
    difference: dict[str, Any] = CONFIG_MAPPING[model_type].from_dict(dict(config)).to_diff_dict()
    return difference


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise MapNotFoundError(
            f"{folder} is no model folder: expected a config.json in it, found {inside}. "
            "Give a model folder, a hub id, or a map file: hookmap show MAP"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MapNotFoundError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise MapNotFoundError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _hub_config(name: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(name, "config.json", **hub.source_arguments(name))
    except Exception as error:  # the hub's client raises a dozen unrelated classes; all mean "no config from there"
        raise _not_found(name, hub.explain(error, name)) from error
    return _read_config(Path(path).parent)


def _first(config: Mapping[str, Any], fields: tuple[str, ...]) -> int | None:
    return next((config[field] for field in fields if config.get(field) is not None), None)


def shipped_near(*names: str) -> str:
    """The shipped maps whose names are near, whoever the owner, or how to list all, as a sentence."""
    shipped = (*shipped_architectures(), *shipped_models())
    bare = {each: each.rpartition("/")[2].lower() for each in shipped}
    near: dict[str, None] = {}
    for name in names:
        word = name.rpartition("/")[2].lower()
        longer = [each for each in sorted(shipped, key=len) if bare[each].startswith(word)][:3]
        close = difflib.get_close_matches(word, dict.fromkeys(bare.values()), n=3, cutoff=0.6)
        near |= dict.fromkeys(longer if word else ())
        near |= dict.fromkeys(each for like in close for each in shipped if bare[each] == like)
    if near:
        return f"Shipped maps near it: {', '.join(near)}."
    return f"None of the {len(shipped)} shipped maps has a name near it: hookmap maps list"


def _not_found(name: str, reason: str, near_to: list[str] | None = None) -> MapNotFoundError:
    hint = shipped_near(*(near_to or [name]))
    return MapNotFoundError(
        f"no map for {name}: {reason.rstrip('.')}. {hint} Make one: hookmap discover {name} -o FILE"
    )
