"""Examples as a file: safetensors, whole or not at all, that a killed run goes on from."""

import os
from typing import Any, Final, Literal

import torch
from pydantic import Field

from hookmap.activations import call_of, key_of
from hookmap.analysis.examples.best import Best
from hookmap.analysis.examples.features import Features
from hookmap.analysis.examples.result import Examples, Settings, TensorExamples
from hookmap.analysis.kept import Kind
from hookmap.documents import Frozen
from hookmap.stores.ledger import tensor_name
from hookmap.stores.number_set import NumberSet

FORMAT: Final = "hookmap-examples"
DIRECTION = "direction/"


class _Tensor(Frozen):
    point: str
    layer: int | None
    call: int | None = None
    tokens: int | None = Field(description="that were looked at; null where no row has come")
    not_finite: int = 0


class _Document(Frozen):
    """The metadata of the file."""

    format: Literal["hookmap-examples"] = FORMAT
    format_version: Literal[1] = 1
    complete: bool
    features: dict[str, Any]
    settings: dict[str, Any]
    tensors: tuple[_Tensor, ...]
    samples: tuple[tuple[int, int], ...]
    about: dict[str, Any]
    texts: dict[int, str] = Field(description="the text of each token id in the examples")


def _written(examples: Examples) -> tuple[_Document, dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    told, ids = [], set[int]()
    for key in examples.keys:
        held = examples.tensors.get(key)
        named: dict[str, Any] = {"point": key[0], "layer": key[1], "call": call_of(key)}
        if held is None:
            told.append(_Tensor(**named, tokens=None))
            continue
        told.append(_Tensor(**named, tokens=held.tokens, not_finite=held.not_finite))
        tensors[f"{tensor_name(key)}/positive"] = held.positive
        for kind, best in (("top", held.top), ("random", held.random)):
            ids.update(torch.unique(best.tensors["tokens"]).tolist())
            for name, value in best.tensors.items():
                tensors[f"{tensor_name(key)}/{kind}/{name}"] = value
    tensors |= {f"{DIRECTION}{name}": value for name, value in examples.features.directions.items()}
    document = _Document(
        complete=examples.complete,
        features=examples.features.as_json(),
        settings=examples.settings.as_json(),
        tensors=tuple(told),
        samples=tuple(examples.samples.ranges()),
        about=examples.about,
        texts={token: examples.text(token) for token in sorted(ids) if token >= 0},
    )
    return document, tensors


def _read(document: _Document, tensors: dict[str, torch.Tensor]) -> Examples:
    numbers = document.features["numbers"]
    directions = {name.removeprefix(DIRECTION): v for name, v in tensors.items() if name.startswith(DIRECTION)}
    features = Features(document.features["kind"], None if numbers is None else tuple(numbers), directions)
    samples = NumberSet.of_ranges(document.samples)
    keys = tuple(key_of(each.point, each.layer, each.call) for each in document.tensors)
    texts = document.texts
    found = Examples(features, Settings(**document.settings), keys, document.about, samples, document.complete)
    found.text = lambda token: texts.get(token, str(token))
    for key, each in zip(keys, document.tensors, strict=True):
        if each.tokens is None:
            continue
        name = tensor_name(key)
        best = []
        for kind in ("top", "random"):
            start = f"{name}/{kind}/"
            best.append(
                Best.from_tensors({n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)})
            )
        positive = tensors[f"{name}/positive"]
        found.tensors[key] = TensorExamples(best[0], best[1], positive, each.tokens, each.not_finite)
    return found


EXAMPLES = Kind(
    "examples.safetensors",
    "examples",
    "hookmap examples MODEL --points mlp_post --layers 8 --prompts FILE",
    _Document,
    _written,
    _read,
)


def open_examples(folder: str | os.PathLike[str]) -> Examples:
    """The examples in a folder, or in the file itself; complete or not. Raises StoreError."""
    return EXAMPLES.open(folder)
