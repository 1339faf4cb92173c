"""The entries of a sweep as a Markdown table, one row for each class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import get_args

from hookmap.maps.points import PointName
from hookmap.sweep.build import Entry, Kind, Status

_HEAD = """\
# {title}

Made by `{command}` with transformers {version}; do not edit it.

{counts}.

*Supported*: discovered without a list of names from its default config at full size (where it cannot run without data,
on a narrow copy), and every point in its map verified on a narrow copy of full depth with random weights
([how](discovery.md)). A block of order "other" has `resid_pre` and `resid_post` alone. *Error*: the class could
not be built, or did not run on what hookmap gives it, in its own words. *Silently wrong*: verification refuted what
discovery found, so no map is shipped.

| class | model types | status | kinds of block (layers): order, norms | not there, and why |
| --- | --- | --- | --- | --- |
"""
_CAUSAL = (
    "Every causal language model of transformers",
    "hookmap maps build --table docs/architectures-table.md",
)
_MULTIMODAL = (
    "Every model of transformers that reads images or sounds and text",
    "hookmap maps build --multimodal --table docs/multimodal-table.md",
)
# Reasons that most blocks give: they would fill the table.
_OBVIOUS = (
    "this block has no",
    "no norm stands on the stream",
    "nothing is done to the sum",
    "this block's mixer is not",
)


def counts(entries: Iterable[Entry]) -> str:
    """`175 SUPPORTED, 0 UNAVAILABLE, … of 181 classes`."""
    found = Counter(entry.status for entry in by_class(entries).values())
    return ", ".join(f"{found[status]} {status}" for status in get_args(Status)) + f" of {found.total()} classes"


def by_class(entries: Iterable[Entry]) -> dict[str, Entry]:
    """One entry for each class: that of its model type with the worst status."""
    order = list(get_args(Status))
    found: dict[str, Entry] = {}
    for entry in entries:
        known = found.get(entry.architecture)
        if known is None or order.index(entry.status) >= order.index(known.status):
            found[entry.architecture] = entry
    return found


def markdown(entries: Sequence[Entry], multimodal: bool = False) -> str:
    """The whole page: of the causal language models, or of those that read images or sounds too."""
    from importlib.metadata import version

    types: dict[str, list[str]] = {}
    for entry in entries:
        types.setdefault(entry.architecture, []).append(entry.model_type)
    rows = [_row(entry, types[name]) for name, entry in sorted(by_class(entries).items())]
    title, command = _MULTIMODAL if multimodal else _CAUSAL
    head = _HEAD.format(title=title, command=command, version=version("transformers"), counts=counts(entries))
    return head + "\n".join(rows) + "\n"


def _row(entry: Entry, types: Sequence[str]) -> str:
    cells = (entry.architecture, ", ".join(types), entry.status, "<br>".join(map(_kind, entry.kinds)), _missing(entry))
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _kind(kind: Kind) -> str:
    axes = "" if kind.axes == ("batch", "pos", "d_model") else f", `[{', '.join(kind.axes)}]`"
    if not kind.points:
        return f"{kind.name} ({kind.layers})"
    return f"{kind.name} ({kind.layers}): {kind.order}, {kind.norms}{axes}"


def _missing(entry: Entry) -> str:
    if entry.status != "SUPPORTED":
        return entry.detail[:400]
    reasons: dict[str, dict[str, None]] = {}
    everything = [(entry.model_missing, True), *((kind.missing, bool(kind.points)) for kind in entry.kinds)]
    for missing, called in everything:
        for point, reason in missing.items():
            mixer = PointName.of(point).as_mixer()
            alias = mixer != point and mixer in missing
            if not reason.startswith(_OBVIOUS) and not alias and not PointName.of(point).definition.deeper:
                reasons.setdefault(reason, {})[point if called else "every point of some layers"] = None
    lines = [f"{', '.join(f'`{p}`' for p in points)}: {why}" for why, points in reasons.items()]
    return "<br>".join([*filter(None, [entry.detail]), *lines])[:900]
