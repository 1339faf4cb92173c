"""What is verified: the model that runs, and the map that is checked. Only this part may discover."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookmap.discovery.discover import Part as Part
from hookmap.discovery.discover import config_of, discover
from hookmap.errors import MapMismatchError, ModelError
from hookmap.loading import modules
from hookmap.loading.float64 import can_be_float64, in_float64
from hookmap.loading.narrow import narrow_copy
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.templates import BlockKind, PointTemplate

OWN_WEIGHTS = "the model's own weights"


def config(source: Any, trust_remote_code: bool) -> Any:
    """The config of a hub id, a folder or a config; None for a module. Offline, a shipped map's config serves."""
    if not isinstance(source, (str, Path)):
        is_config = hasattr(source, "to_dict") and not isinstance(source, nn.Module)
        return source if is_config else None
    return config_of(source, trust_remote_code)[0]


def runnable(source: Any, config: Any, random_weights: bool, trust_remote_code: bool) -> tuple[nn.Module, str]:
    """The model with its own weights, or, where there are none or none are wanted, a narrow copy; and which it is."""
    if config is None:
        return modules.unwrap(source), OWN_WEIGHTS
    why = ""
    if isinstance(source, (str, Path)) and not random_weights:
        from hookmap.loading.checkpoints import load_model

        try:
            return load_model(source, trust_remote_code=trust_remote_code), OWN_WEIGHTS
        except ModelError as error:
            if any(Path(source).glob("*.safetensors")) or any(Path(source).glob("*.bin")):
                raise  # there are weights, and they are broken
            why = f" ({str(error).splitlines()[0]})"
    model, _ = narrow_copy(config, trust_remote_code)
    return model, f"random weights, narrow width, full depth{why}"


def precisely(model: nn.Module) -> AbstractContextManager[None]:
    """In float64 where the weights are bfloat16 or float16: their rounding hides a wrong tensor, or looks like one."""
    root = modules.model_inside(model)
    return in_float64(root) if is_narrow(model) and root is not None and can_be_float64(root) else nullcontext()


def is_narrow(model: nn.Module) -> bool:
    """Whether some weights are bfloat16 or float16, and none is quantised."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return bool(dtypes & {torch.bfloat16, torch.float16}) and all(dtype.is_floating_point for dtype in dtypes)


def discovered(source: Any, trust_remote_code: bool = False, part: Part = "text") -> ArchitectureMap:
    """The map that discovery makes."""
    return discover(source, part=part, trust_remote_code=trust_remote_code)


def check_architecture(found: ArchitectureMap, model: nn.Module) -> None:
    """Raises MapMismatchError where the map is of another architecture."""
    if found.architecture != (own := modules.architecture_of(model)):
        raise MapMismatchError(
            f"the map is of {found.architecture}, the model is a {own}. "
            "Make its own map: hookmap discover MODEL -o FILE"
        )


def for_narrow_copy(found: ArchitectureMap, copy: nn.Module) -> tuple[ArchitectureMap, ArchitectureMap]:
    """The map without what a narrow copy cannot prove, and that map with the numbers of heads that the copy has."""
    if not any(_has_heads(point) for kind in found.kinds for point in kind.points.values()):
        return found, found
    of_copy = discovered(copy, part="vision" if found.part else "text")
    stated = [_provable(kind, of_copy.kind_of(kind.layers[0])) for kind in found.kinds]
    checked = [_with_heads_of(kind, of_copy.kind_of(kind.layers[0])) for kind in stated]
    return found.model_copy(update={"kinds": tuple(stated)}), found.model_copy(update={"kinds": tuple(checked)})


def _provable(kind: BlockKind, of_copy: BlockKind) -> BlockKind:
    reason = "it is not proved: a narrow copy of the model does not show it in the same place"
    elsewhere = [n for n, point in kind.points.items() if not _same_places(point, of_copy.points.get(n))]
    return kind.without(dict.fromkeys(elsewhere, reason))


def _same_places(point: PointTemplate, of_copy: PointTemplate | None) -> bool:
    """Whether a point of heads stands where the copy's does; other points are checked where they are."""
    if not _has_heads(point):
        return True
    return of_copy is not None and _places(of_copy) == _places(point)


def _places(point: PointTemplate) -> list[tuple[str, str, int | str | None]]:
    return [(term.module, term.side, term.index) for term in point.terms]


def _with_heads_of(kind: BlockKind, of_copy: BlockKind) -> BlockKind:
    points = {name: _resized(point, of_copy.points.get(name)) for name, point in kind.points.items()}
    return kind.model_copy(update={"points": points})


def _resized(point: PointTemplate, of_copy: PointTemplate | None) -> PointTemplate:
    if of_copy is None or len(of_copy.terms) != len(point.terms):
        return point
    pairs = zip(point.terms, of_copy.terms, strict=True)
    terms = tuple(a.model_copy(update={"heads": b.heads}) if a.heads else a for a, b in pairs)
    return point.model_copy(update={"terms": terms})


def _has_heads(point: PointTemplate) -> bool:
    return any(term.heads for term in point.terms)
