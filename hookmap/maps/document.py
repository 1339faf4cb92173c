"""The map: a frozen JSON document that says where each point of one architecture, or of one model, is.

A map holds kinds of blocks and path templates over `{i}`, never one row per layer, so it stays small and serves every
size of an architecture. It knows nothing of torch.
"""

from pathlib import Path
from typing import Any

from hookmap.maps import html, nnsight_names, selectors
from hookmap.maps.contents import MapContents
from hookmap.maps.describe import layer_ranges, places
from hookmap.maps.json_text import json_text
from hookmap.maps.selectors import Selector
from hookmap.maps.writing import written
from hookmap.wording import counted


class ArchitectureMap(MapContents):
    """The whole document. `discover` makes it, `save` keeps it, `selectors` says where to look in a model."""

    def unavailable(self, point: str, layer: int | None = None) -> str | None:
        """Why `point` does not exist on `layer`, or None where it does."""
        return selectors.unavailable(self, point, layer)

    def selectors(self, points: Any = "all", layers: Any = "all", calls: Any = "all") -> tuple[Selector, ...]:
        """Forward-ordered selectors; `{"resid_post": [3], "z": [8]}` too; see `hookmap.maps.selectors.select`."""
        return selectors.select(self, points, layers, calls)

    def rename(self) -> dict[str, list[str]]:
        """The points that are one module's boundary as nnsight's `rename=`; see `hookmap.maps.nnsight_names.rename`."""
        return nnsight_names.rename(self)

    def __repr__(self) -> str:
        name = f" of {self.model_id}" if self.model_id else ""
        kinds = counted(len(self.kinds), "kind of block", "kinds of block")
        size = f"{self.num_layers} layers, d_model {self.d_model}, {kinds}"
        return f"<ArchitectureMap {self.architecture}{name}: {size}, {len(self.points)} points>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        rows = [(names, layer_ranges(layers), where) for names, layers, where in places(self)]
        return html.page(repr(self), html.table(("point", "layers", "where"), rows))

    def to_document(self) -> dict[str, Any]:
        """The document as plain JSON data: schema 3, whose grammar is `hookmap.maps.grammar`."""
        return written(self)

    def to_json(self) -> str:
        """The document as JSON text; what fits on a line stands on one."""
        return json_text(self.to_document()) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the document to `path`, with the folders that it is in."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(self.to_json(), encoding="utf-8")
