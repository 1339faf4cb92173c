"""The branches of a model whose residual stream is a plain sum: what each reads of it, and what it adds. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from hookmap.activations import Key
from hookmap.errors import SelectionError
from hookmap.maps.calls import last_run
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName, why_absent
from hookmap.maps.summands import summands

_ADDS = ("mixer_out", "cross_attn_out", "mlp_out")
_STREAMS = ("resid_pre", "resid_mid")
_PARTS = ("q", "k", "v")
INPUT: Key = ("resid_pre", 0)
"""what the first block is given: the embedding"""


@dataclass(frozen=True)
class Branch:
    """One branch of one layer."""

    adds: Key
    """what it adds to the stream"""
    reads: Key
    """what it reads: after its norm"""
    stream: Key
    """the stream before that norm"""
    parts: tuple[Key, ...]
    """what its heads read: q, k and v, those that there are"""
    z: Key | None
    """what its heads give, where that is known"""
    before: int
    """how many branches have added to the stream that it reads"""

    @property
    def layer(self) -> int:
        """Its layer."""
        return self.adds[1] or 0


def branches_of(m: ArchitectureMap) -> tuple[Branch, ...]:
    """The branches in forward order. Raises SelectionError with the reason where the stream is no plain sum of them."""
    if isinstance(found := summands(m), str):
        raise refused(m, found)
    if any(kind.calls > 1 for kind in m.kinds):
        raise refused(m, "its layers run several times in one forward pass")
    made: list[Branch] = []
    for layer in range(m.num_layers):
        kind = m.kind_of(layer)
        order = {name: point.order for name, point in kind.points.items()}
        adds = sorted((name for name in order if PointName.of(name).base in _ADDS), key=order.__getitem__)
        earlier = len(made)
        for name in adds:
            own = PointName.of(name)
            reads = own.end("in")
            if reads not in order:
                raise refused(m, f"layer {layer} has no {reads}: {kind.unavailable.get(reads, why_absent(reads))}")
            streams = [s for s in order if PointName.of(s).base in _STREAMS and order[s] <= order[reads]]
            stream = max(streams, key=order.__getitem__)
            mixes = own.base == "mixer_out"
            parts = tuple((own.numbered(part), layer) for part in _PARTS if mixes and own.numbered(part) in order)
            z = (own.numbered("z"), layer) if mixes and own.numbered("z") in order else None
            before = earlier + sum(order[other] <= order[stream] for other in adds)
            made.append(Branch((name, layer), (reads, layer), (stream, layer), parts, z, before))
    return tuple(made)


def last_of(m: ArchitectureMap) -> Key:
    """The stream that leaves the last layer."""
    return "resid_post", last_run(m)[0]


def points_of(keys: Sequence[Key]) -> dict[str, list[int]]:
    """These points with their layers, as a selection."""
    found: dict[str, list[int]] = {}
    for key in dict.fromkeys(keys):
        found.setdefault(key[0], []).append(key[1] or 0)
    return found


def refused(m: ArchitectureMap, reason: str) -> SelectionError:
    """The error that says so."""
    return SelectionError(
        f"no attribution to edges of {m.architecture}: {reason}. Attribution to nodes needs no sum: attribution_patch."
    )
