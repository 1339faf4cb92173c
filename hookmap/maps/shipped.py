"""The maps that ship with hookmap, of architectures and of single models; and such a map at another size."""

import difflib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hookmap.errors import MapError, MapMismatchError, MapNotFoundError
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import load
from hookmap.maps.templates import BlockKind

log = logging.getLogger("hookmap")

_LAYER_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTH_FIELDS = ("hidden_size", "n_embd", "d_model")


def mappings_folder() -> Path:
    """The shipped maps: beside this file in an installed wheel, at the root of a checkout."""
    here = Path(__file__).resolve().parents[1]
    installed = here / "mappings"
    return installed if installed.is_dir() else here.parent / "mappings"


def shipped_architectures() -> tuple[str, ...]:
    """Names of the architectures that have a shipped map."""
    return tuple(sorted(p.stem for p in mappings_folder().glob("*.json") if not p.name.endswith(".schema.json")))


def shipped_models() -> tuple[str, ...]:
    """Hub ids of the models that have a shipped map of their own."""
    return tuple(sorted(p.stem.replace("--", "/", 1) for p in (mappings_folder() / "models").glob("*.json")))


def shipped_config(name: str) -> Any:
    """A config with the shape of a published model, from its shipped map; None where it has none."""
    if name not in shipped_models():
        return None
    from transformers import CONFIG_MAPPING

    shipped = load(mappings_folder() / "models" / f"{name.replace('/', '--')}.json")
    log.warning("%s: its config cannot be had here. The one inside its shipped map is read instead.", name)
    return CONFIG_MAPPING[shipped.model_type].from_dict(shipped.config)


def likely_map(model: str) -> ArchitectureMap | None:
    """The shipped map of a model in a folder or the local cache, at the model's size; None where there is none.

    A guess for quick answers: nothing is proved on the model.
    """
    try:
        config = _read_config(Path(model)) if Path(model).is_dir() else _cached_config(model)
        names = config.get("architectures") or []
        found = next(name for name in names if name in shipped_architectures())
        shipped = load(mappings_folder() / f"{found}.json")
        layers, width = _first(config, _LAYER_FIELDS), _first(config, _WIDTH_FIELDS)
        return resize(shipped, layers or shipped.num_layers, width or shipped.d_model, model_id=model)
    except (MapError, StopIteration):
        return None


def resize(
    architecture_map: ArchitectureMap,
    num_layers: int,
    d_model: int,
    *,
    num_heads: int | None = None,
    d_vocab: int | None = None,
    model_id: str | None = None,
) -> ArchitectureMap:
    """The same architecture at another size. Raises MapMismatchError where another size may change more than sizes.

    Points whose selectors say where each head is in a tensor (`q`, `k`, `v`, `z`) are left out: that depends on the
    size.
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
        if architecture_map.runs or architecture_map.layer_names:
            raise MapMismatchError(
                f"the shipped map of {name} runs its layers in the order {architecture_map.runs or 'of their names'}; "
                f"which of {num_layers} layers run how often cannot be told from it. "
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
    own = {"model_id": model_id, "scope": "architecture", "config_hash": None, "proofs": ()}
    return architecture_map.model_copy(update={"kinds": resized, **sizes, **own})


def _without_heads(kind: BlockKind, reason: str) -> BlockKind:
    sized = {name for name, point in kind.points.items() if any(term.heads for term in point.terms)}
    return kind.without(dict.fromkeys(sorted(sized), reason))


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


def _cached_config(name: str) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise MapNotFoundError(f"{name} is no hub id: {error}") from error
    if not isinstance(path, str):
        raise MapNotFoundError(f"the local cache does not hold {name}")
    return _read_config(Path(path).parent)


def _first(config: Mapping[str, Any], fields: tuple[str, ...]) -> int | None:
    return next((config[field] for field in fields if config.get(field) is not None), None)


def shipped_near(*names: str) -> str:
    """A sentence that names the shipped maps with similar names, of any owner, or the command that lists all."""
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
