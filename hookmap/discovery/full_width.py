"""Turns a map that was read from a narrow copy into the map of the model at full width.

Where a point is does not depend on the width. The size of its heads does, and so may a constant factor: such points
are unavailable.
"""

from __future__ import annotations

from typing import Any

from hookmap.maps.document import ArchitectureMap
from hookmap.maps.templates import BlockKind, PointTemplate

_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim")
_REASON = "its sizes could only be read from a narrow copy: discover the loaded model"


def at_full_width(found: ArchitectureMap, config: Any, small: Any) -> ArchitectureMap:
    """The map with the sizes of `config`, where it was read from a model of `small`."""
    own, copy = (each.get_text_config(decoder=True) for each in (config, small))
    sizes = {
        "d_model": _size(found.d_model, own, copy, _WIDTHS),
        "d_vocab": found.d_vocab and _size(found.d_vocab, own, copy, ("vocab_size",)),
    }
    return found.model_copy(update={**sizes, "kinds": tuple(map(_kind, found.kinds))})


def _size(found: int, own: Any, copy: Any, names: tuple[str, ...]) -> int:
    """The full size for `found`, which is a multiple of the config's where there are several streams."""
    for name in names:
        narrow, full = getattr(copy, name, None), getattr(own, name, None)
        if isinstance(narrow, int) and isinstance(full, int) and narrow and found % narrow == 0:
            return found // narrow * full
    return found


def _kind(kind: BlockKind) -> BlockKind:
    mlp = kind.mlp and kind.mlp.model_copy(update={"experts": None, "experts_per_token": None})
    lost = {name: _REASON for name, point in kind.points.items() if _depends_on_width(point)}
    return kind.without(lost).model_copy(update={"mlp": mlp})


def _depends_on_width(point: PointTemplate) -> bool:
    return any(term.heads is not None or abs(term.scale) != 1.0 for term in point.terms)
