"""What changed between two maps of one architecture. Pure: two documents in, sentences out."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from hookmap.maps.describe import layer_ranges, layers_text
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.templates import BlockKind, PointTemplate, TermTemplate

# Where points are and what blocks consist of; the map's origin, date and proofs are not compared.
_HEAD = (
    "architecture", "layers_path", "num_layers", "d_model", "num_heads", "d_vocab", "pre_attention_path",
    "pre_mlp_path", "embedding_path", "final_norm_path", "lm_head_path", "layer_names", "runs", "joined", "between",
    "left_out", "part",
)  # fmt: skip
_OF_KIND = (
    "layers",
    "block_class",
    "branch_order",
    "norm_placement",
    "axes",
    "calls",
    "mixer",
    "cross_attn",
    "mlp",
    "relations",
)


def differences(before: ArchitectureMap, after: ArchitectureMap) -> Iterator[str]:
    """One sentence for each difference in structure: fields, kinds of block, points, reasons for missing ones."""
    for name in _HEAD:
        if getattr(before, name) != getattr(after, name):
            yield f"{name}: {getattr(before, name)} -> {getattr(after, name)}"
    yield from _points("", before.model_points, after.model_points)
    yield from _reasons("", before.model_unavailable, after.model_unavailable)
    old, new = ({kind.name: kind for kind in each.kinds} for each in (before, after))
    for name in old.keys() - new.keys():
        yield f"kind {name}: gone"
    for name in new.keys() - old.keys():
        yield f"kind {name}: new, on {layers_text(new[name].layers)}"
    for name in (name for name in old if name in new):
        yield from _kind(old[name], new[name])


def _kind(before: BlockKind, after: BlockKind) -> Iterator[str]:
    where = f"kind {before.name}: "
    for name in _OF_KIND:
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            yield f"{where}{name}: {_short(name, old)} -> {_short(name, new)}"
    yield from _points(where, before.points, after.points)
    yield from _reasons(where, before.unavailable, after.unavailable)


def _points(where: str, before: dict[str, PointTemplate], after: dict[str, PointTemplate]) -> Iterator[str]:
    for name in before.keys() - after.keys():
        yield f"{where}{name}: {_terms(before[name])} -> unavailable"
    for name in after.keys() - before.keys():
        yield f"{where}{name}: unavailable -> {_terms(after[name])}"
    for name in (name for name in before if name in after):
        old, new = _terms(before[name]), _terms(after[name])
        if old != new:
            yield f"{where}{name}: {old} -> {new}"


def _reasons(where: str, before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    for name in (name for name in before if name in after):
        if before[name] != after[name]:
            yield f"{where}{name} is unavailable: {before[name]} -> {after[name]}"


def _terms(point: PointTemplate) -> str:
    beside = f", beside {' + '.join(map(_term, point.beside))}" if point.beside else ""
    return " + ".join(map(_term, point.terms)) + beside


def _term(term: TermTemplate) -> str:
    rest = _fields(term, "module", "side", "index", "scale")
    return term.text() + (f" ({rest})" if rest else "")


def _fields(part: BaseModel, *known: str) -> str:
    """Its other fields that differ from their defaults."""
    said = part.model_dump(exclude=set(known), exclude_defaults=True)
    return ", ".join(f"{name} {value}" for name, value in said.items())


def _short(name: str, value: object) -> str:
    if name == "layers":
        return layer_ranges(value)  # type: ignore[arg-type]
    if name in ("mixer", "cross_attn", "mlp"):
        return _fields(value) if isinstance(value, BaseModel) else "none"
    return str(value)
