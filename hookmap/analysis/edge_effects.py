"""True effects of edges: the other prompt's value of a writer reaches one reader alone.

Three runs of the base for each edge: what the writer adds with the other value; what the reader reads of a stream with
that difference; and the metric where this reader alone got it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hookmap.activations import Key
from hookmap.analysis.branches import INPUT, Branch, branches_of, last_of, points_of
from hookmap.analysis.edge_scores import Node
from hookmap.analysis.metrics import measure, measure_and_capture
from hookmap.analysis.sides import Sides, of_sample, read
from hookmap.capture.interventions.plan import EditPlan
from hookmap.capture.options import BATCH_SIZE
from hookmap.capture.result import Capture
from hookmap.maps.selectors import Selector

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

Edge = tuple[int, Node, Node]
"""pair, writer, reader"""


def patchable(hm: Hooked, writers: Sequence[Node], readers: Sequence[Node]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which writers, and which readers, can be patched: bool [writers], bool [readers]."""
    branches = branches_of(hm.map)

    def may(keys: Sequence[Key | None]) -> bool:
        return all(key is not None and hm.proofs.of(_selector(hm, key)).reason is None for key in keys)

    def read_at(node: Node) -> list[Key | None]:
        return [last_of(hm.map)] if node.key is None else [node.key, branches[node.branch].stream]

    sends = [not node.rest and (node.head is None or may([branches[node.branch].z])) for node in writers]
    gets = [not node.rest and may(read_at(node)) for node in readers]
    return torch.tensor(sends), torch.tensor(gets)


def edge_effects(sides: Sides, edges: Sequence[Edge]) -> torch.Tensor:
    """The metric of the base with each edge alone from the source, [edges]. All must be `patchable`."""
    hm, branches = sides.hm, branches_of(sides.hm.map)
    own = sides.of([pair for pair, _, _ in edges])
    streams = [_stream(hm, branches, reader) for _, _, reader in edges]
    changes = _added(own, [writer for _, writer, _ in edges], branches, streams)
    seen = own.run("base", points_of(streams))[1]
    moved = [
        (key, read(seen, n, key) + change, None) for n, (key, change) in enumerate(zip(streams, changes, strict=True))
    ]
    readers = [reader for _, _, reader in edges]
    got = _run(own, moved, [reader.key for reader in readers if reader.key is not None])
    given = [
        moved[n] if reader.key is None else (reader.key, read(got, n, reader.key), reader.head)
        for n, reader in enumerate(readers)
    ]
    return measure(hm, None, own.base, _plan(hm, given), batch_size=BATCH_SIZE)


Given = tuple[Key, torch.Tensor, int | None]
"""a point, its rows in a sample, and the head that gets them"""


def _added(
    own: Sides, writers: Sequence[Node], branches: Sequence[Branch], streams: Sequence[Key]
) -> list[torch.Tensor]:
    """What each writer adds in the source and not in the base, [pos, d_model]; of a head, where it alone changes."""
    heads = [(n, writer) for n, writer in enumerate(writers) if writer.head is not None]
    keys = [INPUT if writer.key is None else writer.key for writer in writers]
    zs = {n: branches[writer.branch].z for n, writer in heads}
    wanted = points_of([*keys, *(z for z in zs.values() if z is not None)])
    (_, base), (_, source) = (own.run(side, wanted) for side in ("base", "source"))
    changed: Capture | None = None
    if heads:
        given: list[Given | None] = [None] * len(writers)
        for n, writer in heads:
            z = zs[n]
            assert z is not None  # a head has one
            given[n] = (z, read(source, n, z), writer.head)
        changed = _run(own, given, [keys[n] for n, _ in heads])
    return [
        (read(source, n, keys[n]) if changed is None or writer.head is None else read(changed, n, keys[n]))
        - read(base, n, keys[n])
        for n, writer in enumerate(writers)
    ]


def _run(own: Sides, given: Sequence[Given | None], keys: Sequence[Key]) -> Capture:
    """Points of the base, where each sample gets what is given to it."""
    return measure_and_capture(
        own.hm, own.base, points_of(keys) or (), interventions=_plan(own.hm, given), batch_size=BATCH_SIZE
    )[1]


def _plan(hm: Hooked, given: Sequence[Given | None]) -> EditPlan:
    edits = []
    for sample, each in enumerate(given):
        if each is not None:
            key, rows, head = each
            heads = None if head is None else (head,)
            edits.append(of_sample(_selector(hm, key), sample, rows, range(len(rows)), heads))
    return EditPlan(tuple(edits), [])


def _stream(hm: Hooked, branches: Sequence[Branch], reader: Node) -> Key:
    return last_of(hm.map) if reader.key is None else branches[reader.branch].stream


def _selector(hm: Hooked, key: Key) -> Selector:
    [selector] = hm.selectors([key[0]], [key[1]], 0)
    return selector
