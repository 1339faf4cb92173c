"""What Jupyter shows: small HTML tables of maps, captures and stores. Everything in them is escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookmap.activations import Key
    from hookmap.capture.prepare import Capture
    from hookmap.maps.document import ArchitectureMap
    from hookmap.stores.interface import Store

SHOWN_SAMPLES = 5
SHOWN_TEXT = 160
"""characters of a prompt or an answer"""


def map_html(m: "ArchitectureMap") -> str:
    """Each point, its layers, and where it is."""
    from hookmap.maps.selectors import layer_ranges
    from hookmap.maps.tree import places

    rows = [(names, layer_ranges(layers), where) for names, layers, where in places(m)]
    return _head(repr(m)) + _table(("point", "layers", "where"), rows)


def capture_html(run: "Capture | Store") -> str:
    """The tensors by point, and the first samples."""
    body = []
    for point in dict.fromkeys(point for point, _ in run.keys):
        layers = [layer for name, layer in run.keys if name == point and layer is not None]
        body.append((point, ", ".join(map(str, layers))))
    samples: list[tuple[Any, ...]] = [
        (s.sample, s.rows, _short(s.prompt), _short(s.text)) for s in run.samples[:SHOWN_SAMPLES]
    ]
    if len(run) > SHOWN_SAMPLES:
        samples.append(("…", "", f"{len(run) - SHOWN_SAMPLES} more", ""))
    tables = _table(("point", "layers"), body) + _table(("sample", "rows", "prompt", "text"), samples)
    return _head(repr(run)) + tables


def completions(keys: "Iterable[Key]") -> list[Any]:
    """What may stand between the brackets of `run[...]`: the pairs, and alone the points of the whole model."""
    return [point if layer is None else (point, layer) for point, layer in keys]


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_TEXT else text[: SHOWN_TEXT - 1] + "…"


def _head(text: str) -> str:
    return f"<p><b>{escape(text.strip('<>'))}</b></p>"


def _table(head: Sequence[str], rows: "Iterable[Sequence[Any]]") -> str:
    def row(cells: "Sequence[Any]", tag: str) -> str:
        return "<tr>" + "".join(f"<{tag} style='text-align:left'>{escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    return f"<table><thead>{row(head, 'th')}</thead><tbody>{''.join(row(each, 'td') for each in rows)}</tbody></table>"
