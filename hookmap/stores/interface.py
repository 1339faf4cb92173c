"""The interface of every store of activations, in memory or on disk."""

import itertools
import operator
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch

from hookmap.activations import Activation, Key, Sample, Sink, call_of, key_of
from hookmap.errors import SelectionError
from hookmap.maps import html
from hookmap.maps.points import PointName, axes_of, parse_point
from hookmap.stores.joining import Rows, call_and_tokens, flat_rows, join, layers_meant, stacked
from hookmap.stores.sparse import compact
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
        """(point, layer) of each tensor, in forward order; (point, layer, call) of layers that run several times."""

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

    def runs_of(self, layer: int) -> int | None:
        """How often a layer runs in one forward pass, where the store knows it: then negative calls count from it."""
        return None

    @property
    def points(self) -> tuple[str, ...]:
        """Names of the points held, each once, in forward order."""
        return tuple(dict.fromkeys(key[0] for key in self.keys))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers held, ascending."""
        return tuple(sorted({key[1] for key in self.keys if key[1] is not None}))

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

    def read(
        self,
        sample: int,
        point: str,
        layer: int | None = None,
        call: "int | Tokens" = None,
        tokens: Tokens = None,
    ) -> torch.Tensor:
        """Rows of one sample, [tokens, d], in the model's own dtype: `read(3, "resid_mid", 8, tokens=[0, 4])`.

        `call`: of a layer that runs several times.
        A slice is cut at the sample's end, as Python's are; other positions must be inside the sample.
        Raises SelectionError for a sample, point, layer or position that this store does not have.
        """
        run, tokens = call_and_tokens(call, tokens)
        found = self.sample(sample)
        return self._rows(sample, self.key(point, layer, run), rows_of(tokens, found))

    def by_id(self, id: str) -> Sample:
        """The finished sample with this id of the data set. Raises SelectionError where there is none, or several."""
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

    def __getitem__(self, where: "str | Key") -> "torch.Tensor | list[torch.Tensor]":
        """All rows of all samples: [batch, pos, d] where every sample has as many rows, else a list of [pos, d].

        `store["resid_post"]` is of every layer held, in the order of `keys_of`: [layers, batch, pos, d].
        """
        if (keys := layers_meant(self, where)) is not None:
            return stacked((self[key] for key in keys), len(keys), str(where))
        key = self.key(*place_of(where))
        return join(
            [sample.rows for sample in self.samples],
            (self._rows(sample.sample, key, range(sample.rows)) for sample in self.samples),
        )

    def rows(self, point: str, layer: int | None = None, call: int | None = None) -> Rows:
        """All rows of all samples behind each other, [rows, d], and where those of each sample begin.

        The shape is the same whatever the texts' lengths. Raises SelectionError, also for points with a row as wide as
        the text (`pattern`).
        """
        return flat_rows(self, self.key(point, layer, call))

    def to_xarray(
        self, point: str, layer: int | None = None, sample: int | None = None, call: int | None = None
    ) -> Any:
        """See `Capture.to_xarray`; `pattern` has the axes batch, query, heads, key here, as it is stored."""
        from hookmap.stores.xarray import to_xarray

        return to_xarray(self, point, layer, sample, call)

    def axes(self, point: str, layer: int | None, ndim: int) -> tuple[str, ...]:
        """Names of the axes of `self[point, layer]`, which has `ndim`; of `pattern` as it is stored, a row a query."""
        axes = axes_of(point, ndim)
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
            for key in self.keys:
                rows = self.rows_at(sample.sample, key, range(sample.rows))
                sink.write(Activation(sample.sample, key[0], key[1], 0, rows, call_of(key)))
            sink.finish(sample)

    def norms(self, point: str, layer: int | None = None, call: int | None = None) -> float:
        """Mean L2 norm of the rows of one tensor over all samples; nan where there are none, or one is not finite."""
        found = self.row_norms(point, layer, call)
        return float("nan") if found.not_finite else found.mean

    def row_norms(self, point: str, layer: int | None = None, call: int | None = None) -> RowNorms:
        """L2 norms of the rows of one tensor over all samples. Memory is 8 bytes a row, and NORM_ROWS rows."""
        key, lengths, not_finite, first = self.key(point, layer, call), array("d"), 0, None
        for sample in self.samples:
            for start in range(0, sample.rows, NORM_ROWS):
                rows = self._rows(sample.sample, key, range(start, min(start + NORM_ROWS, sample.rows)))
                rows = compact(rows)[1] if rows.is_sparse else rows.flatten(1)
                good = rows.isfinite().all(1)
                if first is None and not bool(good.all()):
                    first = (sample.sample, position_of(sample, start + int((~good).nonzero()[0])))
                not_finite += int((~good).sum())
                lengths.extend(torch.linalg.vector_norm(rows[good].double(), dim=1).tolist())
        found = np.frombuffer(lengths) if lengths else np.full(1, np.nan)
        mean, largest = float(found.mean()), float(found.max())
        share = largest / (mean * len(found)) if mean > 0 else float("nan")
        return RowNorms(len(lengths), mean, float(np.median(found)), largest, share, not_finite, first)

    def key(self, point: str, layer: int | None = None, call: int | None = None) -> Key:
        """The key that these names (ours, TransformerLens's or nnterp's) mean. Raises SelectionError.

        `call`: of a layer that runs several times, negative from the end; a layer that runs once has call 0.
        """
        parsed = parse_point(point)
        if isinstance(parsed, str):
            raise SelectionError(f"{parsed}. {self._held()}")
        layer = parsed.layer if layer is None else layer
        if not isinstance(layer, Integral | None):
            raise SelectionError(f"layer {layer!r} is not a whole number. {self._held()}")
        if not isinstance(call, Integral | None):
            raise SelectionError(f"call {call!r} is not a whole number. {self._held()}")
        if layer is not None and layer < 0 and self.num_layers is not None:
            layer += self.num_layers
        return self._of_call(parsed.point, layer, call) or self._refuse(point, parsed.point, layer)

    def _of_call(self, point: str, layer: int | None, call: int | None) -> Key | None:
        """The key where this point and layer are held; None where not. Raises SelectionError for another call."""
        if (point, layer) in self.keys:
            if call in (None, 0, -1):
                return point, layer
            raise SelectionError(
                f"{point}{_of_layer(layer)} has no call {call}: the layer runs once in a forward pass. Leave call out."
            )
        held = [key[2] for key in self.keys if len(key) == 3 and key[:2] == (point, layer)]
        if not held or layer is None:
            return None
        if call is not None and call < 0:
            call += self.runs_of(layer) or 0
        if call in held:
            return key_of(point, layer, call)
        calls = f"this capture holds {'call' if len(held) == 1 else 'calls'} {', '.join(map(str, held))}"
        if call is None:
            say = f'say which, as in ["{point}", {layer}, {held[-1]}]'
            raise SelectionError(
                f"layer {layer} runs several times in one forward pass, and {calls} of {point}: {say}."
            )
        raise SelectionError(f"call {call} of {point}{_of_layer(layer)} is not held: {calls}.")

    def _refuse(self, given: str, point: str, layer: int | None) -> NoReturn:
        if layer is None and PointName.of(point).definition.per_layer and point in self.points:
            raise SelectionError(f"{given} is a tensor of each layer: say which. {self._held()}")
        if layer is not None and (point, None) in self.keys:
            raise SelectionError(f"{given} is a tensor of the whole model and has no layer. {self._held()}")
        near = None if point in self.points else did_you_mean(point, self.points, n=1)
        raise SelectionError(f"this capture does not hold {given}{_of_layer(layer)}.{sentence(near)} {self._held()}")

    def keys_of(self, point: str, layer: int | None = None, call: int | None = None) -> tuple[Key, ...]:
        """The keys of one point: of this layer and call, or of every layer and call held, in forward order.

        Raises SelectionError.
        """
        parsed = parse_point(point)
        if isinstance(parsed, str):
            raise SelectionError(f"{parsed}. {self._held()}")
        layer = parsed.layer if layer is None else layer
        if call is not None:
            return (self.key(point, layer, call),)
        if layer is not None and layer < 0 and self.num_layers is not None:
            layer += self.num_layers
        found = tuple(k for k in self.keys if k[0] == parsed.point and (layer is None or k[1] == layer))
        return found or (self.key(point, layer),)

    def _held(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return f"It holds {', '.join(self.points)}" + (f" of layers {layers}." if layers else ".")


def position_of(sample: Sample, row: int) -> int | None:
    """The position in its sample's own tokens that a row is of; None of a mean."""
    return None if sample.positions == "mean" else sample.row_positions[row]


def _of_layer(layer: int | None) -> str:
    return "" if layer is None else f" of layer {layer}"


def place_of(where: Any) -> tuple[str, int | None, int | None]:
    """Point, layer and call from the key of `run[...]`. Raises SelectionError."""
    point, layer, call = (
        (*where, None, None)[:3] if isinstance(where, tuple) and len(where) in (2, 3) else (where, None, None)
    )
    if not isinstance(point, str) or not isinstance(layer, Integral | None) or not isinstance(call, Integral | None):
        raise SelectionError(
            f'expected ["point"], ["point", layer] such as ["resid_mid", 8], or ["point", layer, call], got {where!r}.'
        )
    return point, None if layer is None else int(layer), None if call is None else int(call)


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
    for point in dict.fromkeys(key[0] for key in keys):
        layers = dict.fromkeys(key[1] for key in keys if key[0] == point and key[1] is not None)
        body.append((point, ", ".join(_with_calls(layer, keys, point) for layer in layers)))
    shown: list[tuple[Any, ...]] = [
        (s.sample, s.rows, html.short(s.prompt), html.short(s.text)) for s in samples[:SHOWN_SAMPLES]
    ]
    if len(samples) > SHOWN_SAMPLES:
        shown.append(("…", "", f"{len(samples) - SHOWN_SAMPLES} more", ""))
    points = html.table(("point", "layers"), body)
    return html.page(title, points, html.table(("sample", "rows", "prompt", "text"), shown))


def completions(keys: Iterable[Key]) -> list[Any]:
    """The keys that `run[...]` takes; of points of the whole model the bare names."""
    return [key[0] if key[1] is None else key for key in keys]


def _with_calls(layer: int, keys: Sequence[Key], point: str) -> str:
    """`8`, or `8 (calls 0, 1)` of a layer that runs several times."""
    calls = [str(key[2]) for key in keys if len(key) == 3 and key[:2] == (point, layer)]
    return f"{layer} (calls {', '.join(calls)})" if calls else str(layer)
