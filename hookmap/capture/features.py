"""Features of dictionaries in a run: computed of the rows that the dictionaries read, and handed on sparse."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from hookmap.activations import Activation, Key, Sample, Sink, call_of, key_of
from hookmap.capture.options import Points
from hookmap.errors import SelectionError
from hookmap.maps.points import FEATURES, parse_point
from hookmap.maps.selectors import Selector
from hookmap.stores.ledger import tensor_name


class Dictionary(Protocol):
    """What a run asks of a dictionary: see `hookmap.analysis.dictionaries.dictionary`."""

    @property
    def reads(self) -> Key: ...
    @property
    def features(self) -> int: ...
    @property
    def digest(self) -> str: ...
    def active(self, rows: torch.Tensor) -> torch.Tensor: ...
    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Any: ...


@dataclass(frozen=True)
class Featured:
    """The dictionaries of a run, and what is stored of it."""

    readers: Mapping[Key, tuple[tuple[Key, Dictionary], ...]]
    """of each tensor that is read: the keys of the features, and their dictionaries"""
    rows: tuple[Key, ...]
    """tensors whose own rows are stored, too"""

    @property
    def keys(self) -> tuple[Key, ...]:
        """Of all that is stored: the rows, then the features in the order of the dictionaries."""
        return (*self.rows, *(key for found in self.readers.values() for key, _ in found))

    def as_json(self) -> list[dict[str, Any]]:
        """Which features are of which dictionary."""
        return [
            {"tensor": tensor_name(key), "of": tensor_name(read), "features": each.features, "sha256": each.digest}
            for read, found in self.readers.items()
            for key, each in found
        ]

    def into(self, sink: Sink) -> Sink:
        """A sink for the rows that are read, which hands this one what is stored."""
        return _Encoding(self, sink)


def dictionaries_of(given: Any, options: Mapping[str, Any]) -> tuple[Dictionary, ...]:
    """The dictionaries of a run. Raises SelectionError for other objects, and for rows that no dictionary can read.

    options: of the capture.
    """
    found = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    if wrong := [each for each in found if not callable(getattr(each, "active", None))]:
        raise SelectionError(
            f"dictionaries: expected what hookmap.load_dictionary gives, got {wrong[0]!r:.80}. An object of another "
            "library goes through hookmap.analysis.dictionaries.loading.as_dictionary."
        )
    refused = {
        "mean": "the features of a mean are not the mean of the features",
        "features": "it takes numbers of a row away before a dictionary reads it",
        "keep_dtype": "it rounds a row before a dictionary reads it",
        "before": "features before the interventions are not kept: capture once without them",
    }
    usual = {"mean": False, "features": None, "keep_dtype": None, "before": False}
    if bad := [f"{name}: {why}" for name, why in refused.items() if found and options[name] != usual[name]]:
        raise SelectionError("dictionaries are not read with " + "; ".join(bad) + ".")
    return found


def without_features(points: Points) -> Points:
    """The points but for `features`, which the dictionaries name."""
    if isinstance(points, str):
        return () if _is_features(points) else points
    if isinstance(points, Mapping):
        return {name: own for name, own in points.items() if not _is_features(name)} or ()
    return tuple(name for name in points if not _is_features(name))


def _is_features(name: Any) -> bool:
    parsed = parse_point(name) if isinstance(name, str) else ""
    return not isinstance(parsed, str) and parsed.point.partition(".")[0] == FEATURES


def placed(asked: Iterable[Selector], read: Sequence[tuple[Dictionary, Iterable[Selector]]]) -> Featured:
    """Names the features: `features` of the layer that is read; `features.1`, … of further dictionaries there."""
    readers: dict[Key, tuple[tuple[Key, Dictionary], ...]] = {}
    used: set[Key] = set()
    for dictionary, selectors in read:
        for selector in selectors:
            names = (FEATURES if not n else f"{FEATURES}.{n}" for n in range(len(used) + 1))
            keys = (key_of(name, selector.layer, selector.call) for name in names)
            key = next(key for key in keys if key not in used)
            used.add(key)
            readers[selector.key] = (*readers.get(selector.key, ()), (key, dictionary))
    return Featured(readers, tuple(selector.key for selector in asked))


class _Encoding:
    """A sink that turns rows into features, and passes on the rows that are stored."""

    def __init__(self, featured: Featured, sink: Sink) -> None:
        self._readers, self._rows, self._sink = featured.readers, frozenset(featured.rows), sink
        self._there: dict[tuple[Key, torch.device], Any] = {}

    def write(self, activation: Activation) -> None:
        read: Key = activation.key
        if read in self._rows:
            self._sink.write(activation)
        for key, dictionary in self._readers.get(read, ()):
            rows = activation.tensor.flatten(1)
            if (key, rows.device) not in self._there:
                self._there[key, rows.device] = dictionary.to(rows.device)
            own = self._there[key, rows.device]
            self._sink.write(
                replace(activation, point=key[0], layer=key[1], call=call_of(key), tensor=own.active(rows))
            )

    def finish(self, sample: Sample) -> None:
        self._sink.finish(sample)

    def abandon(self) -> None:
        self._sink.abandon()


def in_forward_order(selectors: Iterable[Selector]) -> tuple[Selector, ...]:
    """Each once, in the order of the forward pass."""
    return tuple(sorted({each.key: each for each in selectors}.values(), key=lambda s: s.forward_index))
