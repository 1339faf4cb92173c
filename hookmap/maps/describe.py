"""A map in words: where each point is, and the evidence for it. Pure: map -> text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from hookmap.maps.contents import MapContents
from hookmap.maps.grammar import ranges
from hookmap.maps.points import POINTS, PointName
from hookmap.maps.templates import BlockKind, Heads, PointTemplate, TermTemplate, short_path, text_of_all


def explain(architecture_map: MapContents) -> str:
    """The evidence for every selector, kind by kind, in the order of the forward pass."""
    m = architecture_map
    lines = [f"{m.architecture}: {m.discovered_by}" if m.discovered_by else m.architecture]
    lines += order_of(m)
    for kind in m.kinds:
        lines += ["", *_kind(m, kind)]
    lines += ["", "around the blocks", *_points(m.model_points, "", m.model_unavailable)]
    return "\n".join(lines)


def order_of(m: MapContents) -> list[str]:
    """What a reader must know of the order of the layers: names, how often each runs, and what stands between them."""
    lines = list(_named(m.layer_names))
    lines += [f"The layers run in this order: {m.runs}."] if m.runs else []
    for pair, text in m.between.items():
        before, _, here = pair.partition(" -> ")
        if here == "final_norm":
            lines.append(f"Behind layer {before}, the last norm reads {text}.")
        elif before.isdecimal():
            lines.append(f"Behind layer {before}, resid_pre[{here}] = {text}.")
        else:
            lines.append(f"Behind each layer {{i}} of {before}, resid_pre of the next = {text}.")
    if not m.joined and not m.between:
        lines.append("The model adds to the stream between blocks: resid_pre of the next is not resid_post.")
    return lines


def _named(names: tuple[str, ...]) -> Iterator[str]:
    """Which layers the blocks of each list are."""
    parts = [(name.rpartition(".")[0], layer) for layer, name in enumerate(names)]
    for _, group in groupby(parts, key=lambda part: part[0]):
        layers = [layer for _, layer in group]
        own = names[layers[0]] + (f" to {names[layers[-1]]}" if len(layers) > 1 else "")
        yield f"{layers_text(layers).capitalize()}: {own}."


def _kind(m: MapContents, kind: BlockKind) -> Iterator[str]:
    yield f"{layers_text(kind.layers)}: {kind.name}, {m.layers_path} ({kind.block_class or 'not called'})"
    if kind.coupled:
        yield "  two streams: each branch adds to the one that it does not read; resid_mid is of the other one"
    if kind.calls > 1:
        yield f"  runs {kind.calls} times in one forward pass: each point is there in each of them"
    yield "  the chain of additions"
    yield from (f"    {relation}" for relation in kind.relations or ("none was found",))
    for role, branch in (("mixer", kind.mixer), ("cross-attention", kind.cross_attn), ("MLP", kind.mlp)):
        if branch is not None:
            modules = ", ".join(short_path(path, m.layers_path) for path in branch.modules) or "the block itself"
            made = f" ({branch.module_class})" if branch.module_class else ""
            yield f"  the {role} is {branch.type}: {modules}{made}"
    for name in ("resid_pre", "resid_mid_sum", "resid_mid", "resid_post"):
        if name in kind.points and (readers := _readers(kind, name, m.layers_path)):
            yield f"  {name} is read by {readers}"
    yield from _points(kind.points, m.layers_path, kind.unavailable)


def _readers(kind: BlockKind, name: str, prefix: str) -> str:
    """The modules whose input is this state of the stream."""
    terms = kind.points[name].terms
    return ", ".join(
        short_path(t.module, prefix)
        for t in terms
        if t.side == "input" and t.module != prefix and (t.operation, t.experts) == (None, None)
    )


def _points(points: dict[str, PointTemplate], prefix: str, unavailable: dict[str, str]) -> Iterator[str]:
    yield "  selectors, in the order of the forward pass"
    for names, point in same_place(points):
        where = " + ".join(term.text(prefix) + _cut(term.heads) for term in point.terms)
        yield f"    {' = '.join(names)}: {where}{f' -- {point.evidence}' if point.evidence else ''}"
    for name, reason in unavailable.items():
        yield f"    no {name}: {reason}"


def _cut(h: Heads | None) -> str:
    return f", features {h.start}:{h.stop} of {h.groups} groups, heads of {h.d_head}" if h else ""


def same_place(points: Mapping[str, PointTemplate]) -> list[tuple[list[str], PointTemplate]]:
    """The points in forward order; names of one tensor come together."""
    together: dict[tuple[TermTemplate, ...], list[str]] = {}
    for name, point in sorted(points.items(), key=lambda item: (item[1].order, "_raw" in item[0])):
        together.setdefault(point.terms, []).append(name)
    return [(names, points[names[0]]) for names in together.values()]


def places(m: MapContents) -> list[tuple[str, tuple[int, ...], str]]:
    """Names, layers and place of every point in forward order; points and kinds of block share a row where they can.

    So do kinds that differ in a constant alone.
    """
    rows: dict[tuple[str, tuple[TermTemplate, ...]], list[tuple[BlockKind, PointTemplate]]] = {}
    for kind in m.kinds:
        for names, point in same_place(kind.points):
            rows.setdefault((" = ".join(names), without_constants(point)), []).append((kind, point))
    vocabulary = list(POINTS)
    found = [
        (names, tuple(layer for kind, _ in held for layer in kind.layers), where_of_all([point for _, point in held]))
        for (names, _), held in rows.items()
    ]
    found += [(name, (), where_of_all([point])) for name, point in m.model_points.items()]
    return sorted(found, key=lambda row: vocabulary.index(PointName.of(row[0].split(" ")[0]).base))


def where_of_all(points: Sequence[PointTemplate], prefix: str = "") -> str:
    """Where one point of several kinds of block is, which differ in its constants alone."""
    return " + ".join(
        text_of_all(terms, prefix, " × ") for terms in zip(*(point.terms for point in points), strict=True)
    )


def without_constants(point: PointTemplate) -> tuple[TermTemplate, ...]:
    """Its terms as a reader sees them, but for their constants."""
    return tuple(term.model_copy(update={"scale": 1.0, "heads": None}) for term in point.terms)


def apart(m: MapContents, layers: Iterable[int]) -> list[list[BlockKind]]:
    """The kinds of block of these layers, each with those of them that are of it, and by itself."""
    wanted = frozenset(layers)
    held = [(kind, tuple(layer for layer in kind.layers if layer in wanted)) for kind in m.kinds]
    return [[kind.model_copy(update={"layers": own})] for kind, own in held if own]


def differing_constants(kinds: Sequence[BlockKind]) -> bool:
    """Whether kinds of block that are alike have unlike constants."""
    return len({tuple(t.scale for point in kind.points.values() for t in point.terms) for kind in kinds}) > 1


def alike(kinds: Iterable[BlockKind]) -> list[list[BlockKind]]:
    """Kinds of block, those together that differ in constants and in reasons alone."""
    groups: dict[Any, list[BlockKind]] = {}
    for kind in kinds:
        branches = tuple(b and (b.type, b.modules, b.module_class) for b in (kind.mixer, kind.cross_attn, kind.mlp))
        points = tuple((tuple(names), without_constants(point)) for names, point in same_place(kind.points))
        how = (kind.block_class, kind.branch_order, kind.norm_placement, kind.calls, kind.coupled)
        groups.setdefault((branches, points, how, frozenset(kind.unavailable)), []).append(kind)
    return list(groups.values())


def layers_text(layers: Iterable[int]) -> str:
    """`layer 3`, `layers 0–2, 5`."""
    found = set(layers)
    return f"{'layer' if len(found) == 1 else 'layers'} {layer_ranges(found)}"


def layer_ranges(layers: Iterable[int]) -> str:
    """(0, 1, 2, 5) -> "0–2, 5"."""
    return ranges(set(layers)).replace("-", "–")
