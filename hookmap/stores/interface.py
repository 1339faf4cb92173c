"""The interface of every store of activations, in memory or on disk."""

import itertools
import operator
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch

from hookmap import html
from hookmap.activations import Activation, Key, Sample, Sink
from hookmap.errors import SelectionError
from hookmap.maps.points import PointName, parse_point
from hookmap.wording import counted, did_you_mean, sentence

Tokens: TypeAlias = "slice | Sequence[int] | None"
"""positions in a sample's own tokens: a slice, a range, a sequence of whole numbers, or None for all"""

NEAR_IDS = 1000
"""samples whose ids are compared with a misspelt one: that takes milliseconds"""

NORM_ROWS = 256
"""rows that `norms` reads at a time"""


@dataclass(frozen=True)
class RowNorms:
    """L2 norms of the finite rows of one tensor; nan where no row is finite."""

    rows: int
    """finite rows"""
    mean: float
    median: float
    largest: float
    share: float
    """the largest norm as a share of the sum of all norms"""
    not_finite: int
    """rows that hold an infinity or nan"""
    first_not_finite: tuple[int, int | None] | None
    """(sample, position) of the first such row; the position of a mean is None"""


class Store(ABC):
    """Finished samples and their rows. A subclass lists them and reads rows; everything else is defined here."""

    @property
    @abstractmethod
    def keys(self) -> tuple[Key, ...]:
        """The (point, layer) pairs that this store holds, in forward order."""

    @property
    @abstractmethod
    def samples(self) -> Sequence[Sample]:
        """The finished samples, by number."""

    @abstractmethod
    def sample(self, number: int) -> Sample:
        """The finished sample with this number. Raises SelectionError where there is none."""

    @abstractmethod
    def _rows(self, sample: int, key: Key, rows: Sequence[int]) -> torch.Tensor:
        """These rows of one sample (all inside it), [len(rows), *row]; a copy of the caller's own."""

    @property
    def num_layers(self) -> int | None:
        """Layers of the model, where the store knows them: then negative layers count from the end."""
        return None

    @property
    def points(self) -> tuple[str, ...]:
        """Names of the points held, each once, in forward order."""
        return tuple(dict.fromkeys(point for point, _ in self.keys))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers held, ascending."""
        return tuple(sorted({layer for _, layer in self.keys if layer is not None}))

    @property
    def texts(self) -> list[str]:
        """The generated text of each sample."""
        return [sample.text for sample in self.samples]

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        """The token ids of each sample: prompt, then generated."""
        return [sample.token_ids for sample in self.samples]

    def __len__(self) -> int:
        """How many samples are finished."""
        return len(self.samples)

    def __bool__(self) -> bool:
        return True  # a store without samples is still a store

    def read(self, sample: int, point: str, layer: int | None = None, tokens: Tokens = None) -> torch.Tensor:
        """Rows of one sample, [tokens, d], in the model's own dtype.

        A slice is cut at the sample's end, as Python's are; other positions must be inside the sample.
        Raises SelectionError for a sample, point, layer or position that this store does not have.
        """
        found = self.sample(sample)
        return self._rows(sample, self.key(point, layer), rows_of(tokens, found))

    def by_id(self, id: str) -> Sample:
        """The finished sample that the data set calls so. Raises SelectionError where there is none, or several."""
        found = self._with_id(id)
        if len(found) == 1:
            return self.sample(found[0])
        if found:
            raise SelectionError(f"id {id!r} is of several samples here: {', '.join(map(str, found[:20]))}.")
        some = (sample.id for sample in itertools.islice(self.samples, NEAR_IDS) if sample.id is not None)
        hint = sentence(did_you_mean(repr(id), map(repr, some), n=1))
        raise SelectionError(f"no sample of this capture has the id {id!r}.{hint}")

    def _with_id(self, id: str) -> list[int]:
        return [sample.sample for sample in self.samples if sample.id == id]

    def rows_at(self, sample: int, key: Key, rows: Sequence[int]) -> torch.Tensor:
        """These rows of one sample (rows, not positions, and all inside it), [len(rows), *row]."""
        return self._rows(sample, key, rows)

    def __getitem__(self, where: "str | tuple[str, int | None]") -> "torch.Tensor | list[torch.Tensor]":
        """All rows of all samples: [batch, pos, d] where every sample has as many rows, else a list of [pos, d]."""
        key = self.key(*place_of(where))
        return join(
            [sample.rows for sample in self.samples],
            (self._rows(sample.sample, key, range(sample.rows)) for sample in self.samples),
        )

    def to_xarray(self, point: str, layer: int | None = None, sample: int | None = None) -> Any:
        """See `Capture.to_xarray`; `pattern` has the axes batch, query, heads, key here, as it is stored."""
        from hookmap.stores.xarray import to_xarray

        return to_xarray(self, point, layer, sample)

    def axes(self, point: str, layer: int | None, ndim: int) -> tuple[str, ...]:
        """Names of the axes of `self[point, layer]`, which has `ndim`; of `pattern` as it is stored, a row a query."""
        axes = PointName.of(point).definition.axes
        return ("batch", "query", "heads", "key") if "key" in axes else axes

    def __repr__(self) -> str:
        samples = counted(len(self), "sample")
        tensors = counted(len(self.keys), "tensor")
        return f"<{type(self).__name__}{self._name()} of {samples}, {tensors}: {', '.join(self.points)}>"

    def _name(self) -> str:
        """What identifies this store in its `repr`, after a space; empty by default."""
        return ""

    def _repr_html_(self) -> str:
        return as_html(repr(self), self.keys, self.samples)

    def _ipython_key_completions_(self) -> list[Any]:
        return completions(self.keys)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def write_to(self, sink: Sink) -> None:
        """Hand every sample to a sink, one whole after the other."""
        for sample in self.samples:
            for point, layer in self.keys:
                sink.write(Activation(sample.sample, point, layer, 0, self.read(sample.sample, point, layer)))
            sink.finish(sample)

    def norms(self, point: str, layer: int | None = None) -> float:
        """Mean L2 norm of the rows of one tensor over all samples; nan where there are none, or one is not finite."""
        found = self.row_norms(point, layer)
        return float("nan") if found.not_finite else found.mean

    def row_norms(self, point: str, layer: int | None = None) -> RowNorms:
        """L2 norms of the rows of one tensor over all samples. Memory is 8 bytes a row, and NORM_ROWS rows."""
        key, lengths, not_finite, first = self.key(point, layer), array("d"), 0, None
        for sample in self.samples:
            for start in range(0, sample.rows, NORM_ROWS):
                rows = self._rows(sample.sample, key, range(start, min(start + NORM_ROWS, sample.rows))).flatten(1)
                good = rows.isfinite().all(1)
                if first is None and not bool(good.all()):
                    first = (sample.sample, position_of(sample, start + int((~good).nonzero()[0])))
                not_finite += int((~good).sum())
                lengths.extend(torch.linalg.vector_norm(rows[good].double(), dim=1).tolist())
        found = np.frombuffer(lengths) if lengths else np.full(1, np.nan)
        mean, largest = float(found.mean()), float(found.max())
        share = largest / (mean * len(found)) if mean > 0 else float("nan")
        return RowNorms(len(lengths), mean, float(np.median(found)), largest, share, not_finite, first)

    def key(self, point: str, layer: int | None = None) -> Key:
        """The pair that these names (ours, TransformerLens's or nnterp's) mean. Raises SelectionError."""
        parsed = parse_point(point)
        if isinstance(parsed, str):
            raise SelectionError(f"{parsed}. {self._held()}")
        layer = parsed.layer if layer is None else layer
        if not isinstance(layer, Integral | None):
            raise SelectionError(f"layer {layer!r} is not a whole number. {self._held()}")
        if layer is not None and layer < 0 and self.num_layers is not None:
            layer += self.num_layers
        key = (parsed.point, layer)
        if key in self.keys:
            return key
        if key[1] is None and PointName.of(parsed.point).definition.per_layer and parsed.point in self.points:
            raise SelectionError(f"{point} is a tensor of each layer: say which. {self._held()}")
        if key[1] is not None and (parsed.point, None) in self.keys:
            raise SelectionError(f"{point} is a tensor of the whole model and has no layer. {self._held()}")
        near = None if parsed.point in self.points else did_you_mean(parsed.point, self.points, n=1)
        raise SelectionError(f"this capture does not hold {point}{_of_layer(key[1])}.{sentence(near)} {self._held()}")

    def keys_of(self, point: str, layer: int | None = None) -> tuple[Key, ...]:
        """The pairs of one point: of this layer, or of every layer held, in forward order. Raises SelectionError."""
        parsed = parse_point(point)
        if layer is not None or isinstance(parsed, str) or parsed.layer is not None:
            return (self.key(point, layer),)
        return tuple(key for key in self.keys if key[0] == parsed.point) or (self.key(point),)

    def _held(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return f"It holds {', '.join(self.points)}" + (f" of layers {layers}." if layers else ".")


def position_of(sample: Sample, row: int) -> int | None:
    """The position in its sample's own tokens that a row is of; None of a mean."""
    if sample.positions == "mean":
        return None
    return row if sample.positions is None else sample.positions[row]


def _of_layer(layer: int | None) -> str:
    return "" if layer is None else f" of layer {layer}"


def place_of(where: Any) -> tuple[str, int | None]:
    """Point and layer from the key of `run[...]`. Raises SelectionError."""
    point, layer = where if isinstance(where, tuple) and len(where) == 2 else (where, None)
    if not isinstance(point, str) or not isinstance(layer, Integral | None):
        raise SelectionError(f'expected ["point"] or ["point", layer] such as ["resid_mid", 8], got {where!r}.')
    return point, None if layer is None else int(layer)


def rows_of(tokens: Tokens, sample: Sample) -> Sequence[int]:
    """The rows of `sample` that hold `tokens`, positions in its own tokens.

    Raises SelectionError where one is outside the sample, was not kept, or is no whole number.
    """
    if tokens is None:
        return range(sample.rows)
    if sample.positions == "mean":
        raise SelectionError(f"sample {sample.sample} is one mean over positions: read it without tokens.")
    if isinstance(tokens, slice):
        return _rows_in(tokens, sample)
    if not isinstance(tokens, Sequence) or isinstance(tokens, str | bytes):
        raise SelectionError(f"tokens must be a slice, a range, a sequence of positions or None, not {tokens!r}")
    return _rows_at(tokens, sample)


def _rows_in(tokens: slice, sample: Sample) -> Sequence[int]:
    if not isinstance(sample.positions, tuple):
        return range(*tokens.indices(sample.rows))
    wanted = range(*tokens.indices(len(sample.token_ids)))
    return [row for row, position in enumerate(sample.positions) if position in wanted]


def _rows_at(tokens: Sequence[int], sample: Sample) -> Sequence[int]:
    kept = sample.positions if isinstance(sample.positions, tuple) else None
    row_of = range(sample.rows) if kept is None else {position: row for row, position in enumerate(kept)}
    span = kept is None and isinstance(tokens, range)  # its ends suffice
    asked = [*tokens[:1], *tokens[-1:]] if span else tokens
    if wrong := [p for p in asked if not _is_whole(p) or operator.index(p) not in row_of]:
        held = f"rows 0 to {sample.rows - 1} (the last generated token is never fed to the model)"
        if kept is not None:
            held = f"rows of the positions {_first(kept, 20)}"
        raise SelectionError(f"positions {_first(wrong, 5)} are not in sample {sample.sample}: it has {held}.")
    return tokens if span else [row_of[operator.index(p)] for p in tokens]


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _first(values: Sequence[Any], count: int) -> str:
    return f"{', '.join(map(repr, values[:count]))}{', …' if len(values) > count else ''}"


def join(rows: Sequence[int], parts: Iterable[torch.Tensor]) -> "torch.Tensor | list[torch.Tensor]":
    """One tensor [batch, pos, d] where every part has as many rows, else the list of parts [pos, d].

    `rows`: rows of each part, so that one tensor is filled part by part and nothing is held twice.
    """
    if len(set(rows)) != 1:
        return list(parts)
    joined: torch.Tensor | None = None
    for place, part in enumerate(parts):
        if joined is None:
            joined = part.new_empty((len(rows), *part.shape))
        joined[place] = part
    assert joined is not None  # there is at least one part
    return joined


def unknown_sample(number: int, known: Sequence[int]) -> SelectionError:
    """The error for a sample that is not there, or not finished."""
    if not known:
        return SelectionError(f"sample {number} is not in this capture: it has no finished samples yet.")
    shown = f"0 to {known[-1]}" if known[-1] == len(known) - 1 else ", ".join(map(str, known[:20]))
    shown += ", …" if "," in shown and len(known) > 20 else ""
    return SelectionError(f"sample {number} is not in this capture: its finished samples are {shown}.")


SHOWN_SAMPLES = 5
"""samples that Jupyter shows"""


def as_html(title: str, keys: Sequence[Key], samples: Sequence[Sample]) -> str:
    """The tensors by point, and the first samples."""
    body = []
    for point in dict.fromkeys(point for point, _ in keys):
        body.append((point, ", ".join(str(layer) for name, layer in keys if name == point and layer is not None)))
    shown: list[tuple[Any, ...]] = [
        (s.sample, s.rows, html.short(s.prompt), html.short(s.text)) for s in samples[:SHOWN_SAMPLES]
    ]
    if len(samples) > SHOWN_SAMPLES:
        shown.append(("…", "", f"{len(samples) - SHOWN_SAMPLES} more", ""))
    points = html.table(("point", "layers"), body)
    return html.page(title, points, html.table(("sample", "rows", "prompt", "text"), shown))


def completions(keys: Iterable[Key]) -> list[Any]:
    """The keys that `run[...]` takes: (point, layer) pairs, and the bare names of points of the whole model."""
    return [point if layer is None else (point, layer) for point, layer in keys]
