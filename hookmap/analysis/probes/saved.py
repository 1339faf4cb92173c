"""Probes and their safetensors file: they score other rows, and give steering vectors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError

from hookmap.activations import Key, call_of, key_of
from hookmap.analysis import steering
from hookmap.documents import Frozen
from hookmap.errors import SelectionError, StoreError
from hookmap.placeholders import is_pointer, pointers_told
from hookmap.stores.durable_files import write_file, writing
from hookmap.stores.ledger import tensor_name

_METADATA = "hookmap.probes"


class About(Frozen):
    """What the probes were made from; JSON in the metadata of their file."""

    format_version: Literal[1] = 1
    label: str = Field(description="the condition of a positive sample, in words")
    method: str
    pool: str = Field(description="which rows of a sample they were fitted on")
    positions: str | None = Field(default=None, description="that the pool was restricted to; all unless given")
    position: int | None = Field(default=None, description="of pool=each, counted from the end of the prompt")
    model: str | None = None
    samples: int = Field(ge=1, description="number of samples that they were fitted on")
    kind: Literal["binary", "classes", "regression"] = "binary"
    classes: tuple[Any, ...] = Field(default=(), description="of kind classes: what each column is of")


@dataclass(frozen=True)
class Probes:
    """A linear probe for each of some tensors: sigmoid(row · weights + bias) is the probability of the label.

    Of several classes the softmax is; of a regression, row · weights + bias is the number.
    """

    about: About
    weights: Mapping[Key, torch.Tensor]
    """float32 [features], or [features, classes]"""
    biases: Mapping[Key, float | torch.Tensor]
    """or float32 [classes]"""

    def logits(self, rows: torch.Tensor, point: str, layer: int | None = None, call: int | None = None) -> torch.Tensor:
        """[rows, features] -> float32 [rows], or [rows, classes]. Raises SelectionError for another tensor."""
        if (key := key_of(point, layer, call)) not in self.weights:
            held = ", ".join(map(tensor_name, self.weights))
            raise SelectionError(f"no probe of {tensor_name(key)}: there are probes of {held}.")
        flat = rows if rows.is_sparse else rows.flatten(1)
        return flat.float() @ self.weights[key] + self.biases[key]

    def vector(self, point: str, call: int | None = None, of: Any = None) -> steering.SteeringVector:
        """A steering vector from the weights of one point, scaled to length 1 in each layer; it points to the label.

        `call`: of layers that run several times; None where they run once. `of`: of several classes the one to which
        it points, away from the mean of all.
        Raises SelectionError where no probe is of this point's layers, StoreError where one has no direction.
        """
        if self.about.classes and of not in self.about.classes:
            raise SelectionError(
                f"a vector to which class? of={of!r} is none of {', '.join(map(str, self.about.classes))}."
            )
        column = self.about.classes.index(of) if self.about.classes else None
        found = {
            key[1]: w if column is None else w[:, column] - w.mean(1)
            for key, w in self.weights.items()
            if key[0] == point and key[1] is not None
            if call_of(key) == call
        }
        if not found:
            raise SelectionError(f"no probe of a layer of {point}.")
        about = steering.About(point=point, method=f"probe:{self.about.method}", model=self.about.model, call=call)
        return steering.SteeringVector(about, {layer: w / w.norm() for layer, w in found.items()})

    def save(self, path: str | Path) -> Path:
        """Write `POINT.LAYER.weight` [features] and `.bias` [1] for each tensor; of several classes, a column each.

        Raises StoreError.
        """
        from safetensors.torch import save

        tensors = {f"{tensor_name(key)}.weight": value.contiguous() for key, value in self.weights.items()}
        tensors |= {
            f"{tensor_name(key)}.bias": torch.as_tensor(value).reshape(-1) for key, value in self.biases.items()
        }
        keys = json.dumps([list(key) for key in self.weights])
        data = save(tensors, {_METADATA: self.about.model_dump_json(), "keys": keys})
        with writing(path):
            write_file(Path(path), data)
        return Path(path)


def load_probes(path: str | Path) -> Probes:
    """Read a file of `Probes.save`. Raises StoreError where it is another file."""
    from safetensors import SafetensorError, safe_open

    if is_pointer(Path(path)):
        raise StoreError(pointers_told(Path(path).parent, [Path(path).name]))
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            about = About.model_validate_json(metadata[_METADATA])
            keys = [key_of(*each) for each in json.loads(metadata["keys"])]
            weights = {key: file.get_tensor(f"{tensor_name(key)}.weight") for key in keys}
            told = {key: file.get_tensor(f"{tensor_name(key)}.bias") for key in keys}
            biases = {key: bias if about.classes else float(bias) for key, bias in told.items()}
    except (OSError, SafetensorError, KeyError, ValueError, ValidationError) as error:
        raise StoreError(
            f"{path}: no probes that hookmap wrote ({type(error).__name__}: {str(error)[:200]})."
        ) from error
    return Probes(about, weights, biases)
