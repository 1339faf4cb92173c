"""Steering vectors from contrast pairs, and their file format.

A layer's vector is a direction in the space of one point, from its rows for the negative texts to those for the
positive texts. Two methods:

- `mean_difference`: the mean over pairs of positive minus negative. Its length is that of the difference.
- `pca`: the first principal component of the rows around each pair's midpoint, of length 1. Its sign is that of the
  mean difference: adding it moves towards the positive texts. (repeng calls it `pca_center`.)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from pydantic import Field, ValidationError

from hookmap.capture.finiteness import not_finite
from hookmap.capture.options import TemplateOptions, of_kind
from hookmap.documents import Frozen
from hookmap.errors import SelectionError, StoreError
from hookmap.loading.prompts import is_one
from hookmap.maps.calls import listed
from hookmap.maps.describe import layers_text
from hookmap.maps.points import parse_point
from hookmap.maps.selectors import Selector
from hookmap.placeholders import is_pointer, pointers_told, why_no_file
from hookmap.stores.durable_files import writing
from hookmap.wording import is_number

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

Method = Literal["mean_difference", "pca"]
_METADATA = "hookmap.steering"


class About(Frozen):
    """What a vector was made from; JSON in the metadata of its file."""

    format_version: Literal[1] = 1
    point: str = Field(description="the point whose space the vectors are in, and to which they are added")
    method: str = Field(description="mean_difference or pca, or what the file of another tool says")
    model: str | None = Field(default=None, description="hub id or path of the model")
    model_type: str | None = Field(default=None, description="the config's, such as qwen3")
    architecture: str | None = None
    pairs: int | None = Field(default=None, ge=1, description="number of contrast pairs")
    positions: str | None = Field(default=None, description="tokens whose rows were used; several are averaged")
    call: int | Literal["last"] | None = Field(
        default=None, description="which run of layers that run several times; to this one it is added"
    )


@dataclass(frozen=True, repr=False)
class SteeringVector:
    """One direction for each of some layers."""

    about: About
    directions: Mapping[int, torch.Tensor]
    """layer -> float32 [d_model], on the CPU"""

    def __post_init__(self) -> None:
        """Raises StoreError with everything that is wrong with the directions."""
        widths = {tuple(v.shape) for v in self.directions.values()}
        problems = [] if self.directions else ["it has no layers"]
        if len(widths) > 1 or any(len(shape) != 1 for shape in widths):
            problems.append(f"expected vectors [d_model] of one width, found {sorted(map(list, widths))}")
        problems += [f"layer {n} is negative" for n in self.directions if n < 0]
        problems += [f"layer {n} holds what is no number" for n, v in self.directions.items() if not v.isfinite().all()]
        if problems:
            raise StoreError("no steering vector: " + "; ".join(problems) + ".")

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a direction, ascending."""
        return tuple(sorted(self.directions))

    def __getitem__(self, layer: int) -> torch.Tensor:
        """The direction of one layer. Raises SelectionError where there is none."""
        if layer not in self.directions:
            raise SelectionError(f"the vector has no layer {layer}: it has {', '.join(map(str, self.layers))}.")
        return self.directions[layer]

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return f"<SteeringVector of {self.about.point} of {self.about.architecture or 'a model'}, layers {layers}>"

    def interventions(self, strength: float = 1.0, layers: Sequence[int] | None = None, **where: Any) -> list[Any]:
        """Documents that add these directions, one for each layer, for `interventions=` or a YAML file."""
        return [
            {"do": "steer", "point": self.about.point, "layers": [n], "vector": self[n].tolist(), "strength": strength}
            | ({} if self.about.call is None else {"calls": self.about.call})
            | where
            for n in (self.layers if layers is None else layers)
        ]

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file: a tensor `POINT.LAYER` for each layer, and `about` in its metadata."""
        from safetensors.torch import save_file

        target = Path(path)
        if target.suffix != ".safetensors":
            raise StoreError(f"{target}: a steering vector's file ends in .safetensors. GGUF: hookmap vector convert")
        tensors = {f"{self.about.point}.{n}": self.directions[n].contiguous() for n in self.layers}
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, target, metadata={_METADATA: self.about.model_dump_json()})
        return target


def load_vector(path: str | Path) -> SteeringVector:
    """Read a file of `SteeringVector.save`. Raises StoreError where it is another file, or broken."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        new = f"{path}/FILE.safetensors" if Path(path).is_dir() else path
        raise StoreError(f"{why_no_file(Path(path))} Make one: hookmap vector make --pairs FILE.jsonl -o {new}")
    if is_pointer(Path(path)):
        raise StoreError(pointers_told(Path(path).parent, [Path(path).name]))
    try:
        with safe_open(path, framework="pt") as file:
            about = About.model_validate_json((file.metadata() or {})[_METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (OSError, SafetensorError, KeyError, ValidationError, json.JSONDecodeError) as error:
        why = f"{type(error).__name__}: {str(error)[:300]}"
        raise StoreError(
            f"{path} is no steering vector that hookmap wrote ({why}). Make one: hookmap vector make. A bare tensor "
            "steers too: hookmap steer --vector FILE --key NAME --layers N."
        ) from error
    directions = {}
    for name, tensor in tensors.items():
        point, _, layer = name.rpartition(".")
        if point != about.point or not is_number(layer) or not tensor.is_floating_point():
            raise StoreError(
                f"{path}: expected tensors {about.point}.LAYER of floats, found {name} of {tensor.dtype}. "
                "Make the vector again."
            )
        directions[int(layer)] = tensor.float()
    return from_file(path, about, directions)


def from_file(path: str | Path, about: About, directions: Mapping[int, torch.Tensor]) -> SteeringVector:
    """The vector that a file holds. Raises StoreError with the file's name where the directions are wrong."""
    try:
        return SteeringVector(about, directions)
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from error


def make_vector(
    hm: Hooked,
    positive: Sequence[Any],
    negative: Sequence[Any],
    point: str = "resid_post",
    layers: Any = "all",
    *,
    method: Method = "mean_difference",
    positions: Any = "last",
    calls: Any = "all",
    **options: Any,
) -> SteeringVector:
    """See `HookedModel.steering_vector`."""
    parsed = parse_point(point)
    if isinstance(parsed, str) or method not in get_args(Method):
        raise SelectionError(
            parsed if isinstance(parsed, str) else f"method {method!r}: expected one of {', '.join(get_args(Method))}."
        )
    one = ["one prompt" if is_one(given) else str(len(given)) for given in (positive, negative)]
    if one[0] != one[1] or one[0] in ("one prompt", "0"):
        raise SelectionError(f"contrast pairs are two lists of prompts of one length: got {one[0]} and {one[1]}.")
    rows = {"max_new_tokens": 0, "positions": positions, "mean": positions != "last"}
    chosen = hm.map.selectors(parsed.point, layers, calls)
    times = Counter(selector.layer for selector in chosen if selector.layer is not None)
    if several := [layer for layer, count in times.items() if count > 1]:
        raise SelectionError(
            f"{layers_text(several)}: a vector has one direction for each layer, and they run several times in one "
            'forward pass. Choose a run: calls="last" (--calls last), or a number.'
        )
    encoded = hm.encode([*positive, *negative], **of_kind(TemplateOptions, options))
    run = hm.capture(encoded, parsed.point, layers, calls=calls, **rows, **options)
    find: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    find = mean_difference if method == "mean_difference" else principal_direction
    directions = {}
    for key in run.keys:
        layer = key[1]
        if layer is None:
            raise SelectionError(f"{parsed.point} is of the whole model: a steering vector is of layers.")
        each = torch.stack([run.read(sample, *key)[0] for sample in range(len(run))])
        if (bad := ~each.isfinite().all(1)).any():
            sample = int(bad.nonzero()[0])
            raise not_finite(hm, encoded[sample], f"steering vector (prompt {sample}, layer {layer})")
        directions[layer] = find(each[: len(positive)], each[len(positive) :])
    about = About(
        point=parsed.point,
        method=method,
        model=hm.name,
        model_type=hm.map.model_type,
        architecture=hm.map.architecture,
        pairs=len(positive),
        positions=positions if isinstance(positions, str) else str(positions),
        call=_call(chosen, calls),
    )
    return SteeringVector(about, directions)


def _call(selectors: Sequence[Selector], calls: Any) -> int | Literal["last"] | None:
    """Which run the directions are of; None where the layers run once."""
    if all(selector.call is None for selector in selectors):
        return None
    return "last" if isinstance(calls, str) else int(listed(calls)[0])


def mean_difference(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """The mean over pairs of positive minus negative rows, [pairs, d] each -> float32 [d]."""
    return (positive.double() - negative.double()).mean(0).float()


def principal_direction(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """The first principal component of the rows around each pair's midpoint, [pairs, d] each -> float32 [d], length 1.

    Its sign is such that its product with the mean difference, positive minus negative, is not negative; where that
    product is 0, its entry of the largest magnitude is positive. Raises SelectionError where no pair differs.
    """
    halves = (positive.double() - negative.double()) / 2  # the two rows around a midpoint are this and its negative
    if not bool(halves.any()):
        raise SelectionError("the texts of each pair leave the same rows: they have no direction. Give other pairs.")
    direction: torch.Tensor = torch.linalg.svd(halves, full_matrices=False).Vh[0]
    towards = float(direction @ halves.mean(0))
    if abs(towards) < 1e-12 * float(halves.abs().max()):
        towards = float(direction[direction.abs().argmax()])
    return (direction if towards > 0 else -direction).float()
