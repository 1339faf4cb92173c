"""Maximally activating examples: what they are, and their documented JSON."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hookmap.activations import Key
from hookmap.analysis.examples.best import NO_TOKEN, NOTHING, Best
from hookmap.analysis.examples.features import Features
from hookmap.errors import SelectionError
from hookmap.stores.interface import place_of
from hookmap.stores.ledger import tensor_name
from hookmap.stores.number_set import NumberSet
from hookmap.wording import counted

QUANTILES = (0.9, 0.7, 0.5, 0.3, 0.1)
"""of the random examples: which ones are shown as a sample of all strengths"""


@dataclass(frozen=True)
class Settings:
    """How many examples of each feature there are, and what is shown around each."""

    k: int = 20
    """of the highest value"""
    random: int = 20
    """drawn at random from all tokens, or from those where the feature is above 0 (`positive`)"""
    before: int = 24
    after: int = 8
    """tokens shown before and after each"""
    skip: int = 1
    """tokens at the start of each text that are no examples: attention sinks"""
    positive: bool = False
    """whether only values above 0 are examples, as of features that are 0 nearly everywhere"""
    seed: int = 0
    """of the random examples"""

    @property
    def window(self) -> int:
        return self.before + 1 + self.after

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Example:
    """One token at which a feature has a value, with the tokens around it."""

    value: float
    sample: int
    position: int
    tokens: tuple[int, ...]
    """ids: the tokens around it that the text has, and it"""
    values: tuple[float | None, ...]
    """the feature at each of them; None where its row was not finite"""
    at: int
    """which of `tokens` it is"""

    def as_json(self, text: Callable[[int], str]) -> dict[str, Any]:
        """Plain JSON. `text`: of a token id."""
        words = [text(token) for token in self.tokens]
        shown = [None if value is None else float(f"{value:.5g}") for value in self.values]
        value = float(f"{self.value:.5g}")
        named = {"value": value, "sample": self.sample, "position": self.position}
        return {**named, "at": self.at, "tokens": words, "token_ids": list(self.tokens), "values": shown}


@dataclass
class TensorExamples:
    """The examples of all features of one tensor."""

    top: Best
    random: Best
    positive: torch.Tensor
    """int64 [features]: tokens at which each feature is above 0"""
    tokens: int = 0
    """tokens that were looked at"""
    not_finite: int = 0
    """rows that hold an infinity or nan: no examples"""


@dataclass(frozen=True)
class FeatureExamples:
    """The examples of one feature."""

    tensor: Key
    name: str
    density: float
    """share of the tokens at which it is above 0"""
    top: tuple[Example, ...]
    """those of the highest value, descending"""
    random: tuple[Example, ...]
    """drawn at random, in the order of the draw"""

    @property
    def quantiles(self) -> tuple[Example, ...]:
        """Of the random examples, those at the quantiles 0.9 to 0.1 of their values."""
        ordered = sorted(self.random, key=lambda each: each.value)
        if not ordered:
            return ()
        places = dict.fromkeys(round(quantile * (len(ordered) - 1)) for quantile in QUANTILES)
        return tuple(ordered[place] for place in places)

    def as_json(self, text: Callable[[int], str]) -> dict[str, Any]:
        """Plain JSON. `text`: of a token id."""
        key = self.tensor
        call = {"call": key[2]} if len(key) == 3 else {}
        named = {"tensor": tensor_name(key), "point": key[0], "layer": key[1], **call, "feature": self.name}
        groups = {name: [each.as_json(text) for each in getattr(self, name)] for name in ("top", "random", "quantiles")}
        return {**named, "density": self.density, **groups}

    def __repr__(self) -> str:
        best = f", up to {self.top[0].value:.4g}" if self.top else ""
        return f"<FeatureExamples of {tensor_name(self.tensor)}, feature {self.name}: {len(self.top)}{best}>"


@dataclass
class Examples:
    """Examples of each feature of each tensor: `examples["mlp_post", 8].top`. They merge, and are a file."""

    features: Features
    settings: Settings
    keys: tuple[Key, ...]
    about: dict[str, Any] = field(default_factory=dict)
    samples: NumberSet = field(default_factory=NumberSet)
    complete: bool = False
    tensors: dict[Key, TensorExamples] = field(default_factory=dict)
    text: Callable[[int], str] = str
    """of a token id"""

    def key(self, where: Any) -> Key:
        """The tensor of ["mlp_post", 8]. Raises SelectionError."""
        point, layer, call = place_of(where)
        found = next((k for k in self.keys if k == (point, layer) or k == (point, layer, call)), None)
        if found is None or found not in self.tensors:
            held = ", ".join(tensor_name(key) for key in self.keys if key in self.tensors) or "nothing"
            raise SelectionError(f"no examples of {where!r}: they are of {held}.")
        return found

    def names(self, where: Any) -> list[str]:
        """What the features of a tensor are called. Raises SelectionError."""
        return self.features.names(len(self.tensors[self.key(where)].positive))

    def of(self, where: Any, feature: int | str) -> FeatureExamples:
        """The examples of one feature, by its number or its direction's name. Raises SelectionError."""
        key = self.key(where)
        names = self.names(where)
        if str(feature) not in names:
            raise SelectionError(f"no examples of feature {feature!r} of {tensor_name(key)}: {_said(names)}.")
        place, held = names.index(str(feature)), self.tensors[key]
        top, drawn = (_examples(each, place, self.settings) for each in (held.top, held.random))
        density = float(held.positive[place]) / held.tokens if held.tokens else float("nan")
        return FeatureExamples(key, str(feature), density, top, drawn)

    def absorb(self, other: "Examples") -> None:
        """Take another part of the run. Raises SelectionError where it is of another kind, or of a sample twice."""
        mine, theirs = self.identity(), other.identity()
        if wrong := [name for name in mine if mine[name] != theirs.get(name)]:
            raise SelectionError(f"these examples do not merge: they differ in {', '.join(wrong)}.")
        if twice := [number for number in other.samples if number in self.samples]:
            raise SelectionError(f"samples {twice[:5]} are in both examples: they would be there twice.")
        for key, held in other.tensors.items():
            own = self.tensors.get(key)
            if own is None:
                self.tensors[key] = held
                continue
            own.top.merge(held.top)
            own.random.merge(held.random)
            own.positive += held.positive.to(own.positive.device)
            own.tokens += held.tokens
            own.not_finite += held.not_finite
        self.samples.update(other.samples)

    def identity(self) -> dict[str, Any]:
        """What a run has to have in common with these to go on with them."""
        vectors = {name: value.tolist() for name, value in self.features.directions.items()}
        settings = {"settings": self.about.get("settings", {})}
        named = {name: self.about.get(name) for name in ("model", "architecture")}
        tensors = [tensor_name(key) for key in self.keys]
        how = {"features": self.features.as_json(), "directions": vectors, "examples": self.settings.as_json()}
        return {"tensors": tensors, **how, **named, **settings}

    def as_json(self, features: Mapping[Key, Sequence[int | str]] | None = None) -> dict[str, Any]:
        """The documented form. features: of each tensor those that are meant; all unless given."""
        chosen = {key: self.names(key) for key in self.tensors} if features is None else features
        found = [self.of(key, name).as_json(self.text) for key, names in chosen.items() for name in names]
        return {
            "format": "hookmap-examples",
            "format_version": 1,
            **{name: self.about.get(name) for name in ("model", "architecture")},
            **self.settings.as_json(),
            "texts": len(self.samples),
            "tokens": max((held.tokens for held in self.tensors.values()), default=0),
            "features": found,
        }

    def __repr__(self) -> str:
        count = sum(len(held.positive) for held in self.tensors.values())
        tensors = counted(len(self.tensors), "tensor")
        return f"<Examples of {counted(count, 'feature')} of {tensors}, {counted(len(self.samples), 'text')}>"


def _examples(best: Best, feature: int, settings: Settings) -> tuple[Example, ...]:
    held = {name: each[feature].cpu() for name, each in best.tensors.items()}
    found = []
    for place in (held["score"] > NOTHING).nonzero().flatten().tolist():
        inside = (held["tokens"][place] != NO_TOKEN).nonzero().flatten().tolist()
        values = [held["values"][place, n].item() for n in inside]
        found.append(
            Example(
                held["value"][place].item(),
                int(held["sample"][place]),
                int(held["position"][place]),
                tuple(held["tokens"][place, inside].tolist()),
                tuple(value if math.isfinite(value) else None for value in values),
                inside.index(settings.before),
            )
        )
    return tuple(found)


def _said(names: Sequence[str]) -> str:
    if len(names) <= 10:
        return f"they are of {', '.join(names)}"
    return f"they are of {len(names)}, {names[0]} to {names[-1]}"
