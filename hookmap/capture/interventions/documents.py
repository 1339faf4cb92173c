"""Interventions as data: frozen documents, also in JSON and YAML, that say what is written where. Runs nothing.

- {do: steer, point: resid_post, layers: [8], vector: {file: v.safetensors, key: happy}, strength: 4}
- {do: patch, point: resid_pre, layers: 4, positions: "text=7", source: {prompt: "Tom has 2 apples."}}
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from hookmap.capture.interventions.digests import digest_of
from hookmap.capture.interventions.importable import named
from hookmap.datasets.messages import relative_to
from hookmap.documents import Frozen
from hookmap.errors import InterventionError
from hookmap.loading.pictures import image_sources, sha256_of
from hookmap.loading.yaml_file import read_yaml

_LARGEST = 3.4e38
"""of float32"""


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists of numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _numbers(value: Any) -> Any:
    value = _plain(value)
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


Numbers: TypeAlias = Annotated[tuple[int, ...], BeforeValidator(_numbers)]
Layers: TypeAlias = Annotated[Literal["all"] | Numbers, BeforeValidator(_numbers)]
Calls: TypeAlias = Annotated[Literal["all", "last"] | Numbers, BeforeValidator(_numbers)]
Positions: TypeAlias = Annotated[str | tuple[int, ...], BeforeValidator(_numbers)]


class VectorFile(Frozen):
    """A tensor in a safetensors file."""

    file: str = Field(min_length=1, description="a .safetensors file; relative to the file that names it")
    key: str = Field(min_length=1, description="the tensor's name in it")


TENSORS = ("vector", "direction", "tensor", "down", "up")
"""the fields of interventions that may name a file"""
Vector: TypeAlias = Annotated[VectorFile | tuple[float, ...] | tuple[tuple[float, ...], ...], BeforeValidator(_plain)]
"""numbers, a tensor (stored as numbers) or a file; for heads [d_head], the same for each, or [heads, d_head]"""
Matrix: TypeAlias = Annotated[VectorFile | tuple[tuple[float, ...], ...], BeforeValidator(_plain)]
"""numbers, a tensor (stored as numbers) or a file"""
Tensor: TypeAlias = Annotated[
    VectorFile | tuple[float, ...] | tuple[tuple[float, ...], ...] | tuple[tuple[tuple[float, ...], ...], ...],
    BeforeValidator(_plain),
]
"""numbers, a tensor (stored as numbers) or a file: one row, or [n, ...], a row for each token"""


class PicturedText(Frozen):
    """A text with images, as the model's processor reads it without a chat template."""

    text: str
    images: tuple[str, ...] = Field(min_length=1, description="paths of files, or data: URIs")


class BegunPrompt(Frozen):
    """A prompt of an encoder-decoder, and what its decoder begins with: one of the two."""

    prompt: str | tuple[int, ...]
    decoder_text: str | None = None
    decoder_token_ids: tuple[int, ...] | None = None


class Source(Frozen):
    """The source of values: another prompt's run, or a sample of a stored capture."""

    prompt: str | tuple[int, ...] | tuple[dict[str, Any], ...] | PicturedText | BegunPrompt | None = Field(
        default=None, description="a text, token ids, chat messages, …; it is read once, without interventions"
    )
    store: str | None = Field(default=None, description="a capture folder that holds this point and layer")
    sample: int = Field(default=0, ge=0, description="which sample of the store")
    positions: Positions | None = Field(
        default=None, description="which of its tokens, in order; the positions of the intervention unless given"
    )
    calls: Calls | None = Field(
        default=None,
        description="of layers that run several times: the runs that the values come from, in order, or one for all; "
        "the same runs unless given",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> "Source":
        if (self.prompt is None) == (self.store is None):
            raise ValueError("expected a prompt or a store, one of them")
        messages = self.prompt if isinstance(self.prompt, tuple) else ()
        if any(isinstance(message, dict) and "role" not in message for message in messages):
            raise ValueError("expected messages with a role")
        if any(not isinstance(value, str) for value in image_sources(messages)):
            raise ValueError("an image of a document is the path of a file, or a data: URI")
        return self


class _Somewhere(Frozen):
    layers: Layers = "all"
    calls: Calls = Field(
        default="all", description='of layers that run several times in one forward pass: "all", "last", or numbers'
    )
    positions: Positions = Field(
        default="all",
        description='which tokens: "all", "prompt", "generated", "last_prompt", a span "4:20", positions, "image", '
        '"text" (no image), or "text=…"',
    )
    steps: Positions | None = Field(
        default=None, description='which generation steps: 0 for the prompt, n for the n-th new token; "1:" or [1, 2]'
    )


class _Intervention(_Somewhere):
    point: str = Field(description="a point's name; TransformerLens's and nnterp's are understood")
    heads: Numbers | None = Field(default=None, description="of a point with heads: only these")


class Steer(_Intervention):
    """Adds strength * vector."""

    do: Literal["steer"] = "steer"
    vector: Vector
    strength: float = Field(default=1.0, allow_inf_nan=False)
    keep_norm: bool = Field(default=False, description="scale the row back to its norm from before")


class Ablate(_Intervention):
    """Replaces the rows by zeros, by a mean, or by rows of another run."""

    do: Literal["ablate"] = "ablate"
    to: Literal["zero", "mean", "resample"] = "zero"
    vector: Vector | None = Field(default=None, description="mean: this vector, instead of the mean over each prompt")
    source: Source | None = Field(default=None, description="mean: over its rows; resample: rows drawn from it")
    seed: int = Field(default=0, description="resample: another seed draws other rows")

    @model_validator(mode="after")
    def _fitting(self) -> "Ablate":
        if self.to == "resample" and self.source is None:
            raise ValueError("to: resample needs a source")
        if self.vector is not None and self.to != "mean":
            raise ValueError(f"to: {self.to} takes no vector; to: mean does")
        if self.source is not None and (self.to == "zero" or self.vector is not None):
            raise ValueError("a source is for to: resample, or for to: mean without a vector")
        return self


class Patch(_Intervention):
    """Replaces the rows by those of another run. Tokens are paired in order; a single source token serves all."""

    do: Literal["patch"] = "patch"
    positions: Positions = "prompt"
    source: Source


class ProjectOut(_Intervention):
    """Removes the component along a direction."""

    do: Literal["project_out"] = "project_out"
    direction: Vector


class Scale(_Intervention):
    """Multiplies the rows by a factor."""

    do: Literal["scale"] = "scale"
    factor: float = Field(ge=-_LARGEST, le=_LARGEST)


class Clamp(_Intervention):
    """Limits a feature, or the component along a direction, to a range, or sets it to a value."""

    do: Literal["clamp"] = "clamp"
    feature: int | None = Field(default=None, ge=0, description="index into the last axis")
    direction: Vector | None = None
    min: float | None = Field(default=None, allow_inf_nan=False)
    max: float | None = Field(default=None, allow_inf_nan=False)
    value: float | None = Field(default=None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _fitting(self) -> "Clamp":
        if (self.feature is None) == (self.direction is None):
            raise ValueError("expected a feature or a direction, one of them")
        if (self.value is None) == (self.min is None and self.max is None):
            raise ValueError("expected a value, or min and max, or one of these two")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self


class Noise(_Intervention):
    """Adds normally distributed noise. The draw depends on a token's sample, its position, the layer and the seed."""

    do: Literal["noise"] = "noise"
    std: float = Field(gt=0, le=_LARGEST, description="its standard deviation")
    seed: int = Field(default=0, description="another seed draws other noise")


class Swap(_Intervention):
    """Exchanges the rows of two tokens of each prompt."""

    do: Literal["swap"] = "swap"
    positions: Positions = Field(description="the two tokens: [3, 7], [2, -1]")


class Replace(_Intervention):
    """Replaces the rows by given ones. Several are paired with the tokens in order; a single one serves all."""

    do: Literal["replace"] = "replace"
    positions: Positions = "prompt"
    tensor: Tensor


class LowRank(_Intervention):
    """Adds strength * up (down row): a map of rank k, as LoRA has it."""

    do: Literal["low_rank"] = "low_rank"
    down: Matrix = Field(description="[k, d]: what it reads of a row, d the row's last axis or all of it")
    up: Matrix = Field(description="[d, k]: what it adds")
    strength: float = Field(default=1.0, allow_inf_nan=False)


class Skip(_Somewhere):
    """Leaves a block, or a branch of it, out of the stream. Its modules run all the same, so that caches stay whole."""

    do: Literal["skip"] = "skip"
    what: str = Field(
        pattern=r"^(block|(mixer|mlp|cross_attn)(\.[0-9]+)?)$",
        description='"block", whose stream leaves it as it entered; or "mixer", "mlp", "cross_attn", which add nothing '
        '("mlp.1": the branch with that number)',
    )
    heads: ClassVar[None] = None

    @property
    def point(self) -> str:
        """The point that is written."""
        role, _, number = self.what.partition(".")
        return "resid_post" if role == "block" else f"{role}_out" + (f".{number}" if number else "")


class Function(_Intervention):
    """A function of the user's that writes rows, or sees them: see `functions`. It is in no document."""

    do: Literal["apply", "watch"]
    fn: Any = Field(repr=False)

    @field_validator("fn")
    @classmethod
    def _callable(cls, value: Any) -> Any:
        value = named(value)
        if not callable(value):
            raise ValueError(f"expected a function of (rows, at), got {type(value).__name__}")
        return value

    @property
    def name(self) -> str:
        """The function's own name."""
        return str(getattr(self.fn, "__qualname__", type(self.fn).__name__))


Document: TypeAlias = Annotated[
    Steer | Ablate | Patch | ProjectOut | Scale | Clamp | Noise | Swap | Replace | LowRank | Skip,
    Field(discriminator="do", description="one change"),
]
"""the interventions that a file may hold"""
Intervention: TypeAlias = Document | Function
_LIST: TypeAdapter[tuple[Document, ...]] = TypeAdapter(tuple[Document, ...])


def read_interventions(given: Any) -> "tuple[Intervention, ...]":
    """Validate interventions, or documents of them. Raises InterventionError with every problem at once."""
    if isinstance(given, str | os.PathLike):
        return load_interventions(given)
    items = list(given) if isinstance(given, Iterable) and not isinstance(given, dict | BaseModel) else [given]
    documents = [n for n, item in enumerate(items) if not isinstance(item, Function)]
    try:
        found = iter(_LIST.validate_python([items[n] for n in documents]))
    except ValidationError as error:
        wrong = [(documents[int(e["loc"][0])], e) for e in error.errors()]
        lines = [f"  - {_where(n, items[n], e['loc'][2:])}: {_problem(e, items[n])}" for n, e in wrong]
        raise InterventionError("these are no interventions:\n" + "\n".join(dict.fromkeys(lines))) from error
    return tuple(item if isinstance(item, Function) else next(found) for item in items)


def refuse_functions(interventions: "Iterable[Intervention]", why: str) -> None:
    """Raises InterventionError where one of these is a function. `why`: it cannot be run."""
    if names := [f"{each.do}({each.name})" for each in interventions if isinstance(each, Function)]:
        raise InterventionError(f"{', '.join(names)}: {why}")


def load_interventions(path: str | os.PathLike[str]) -> "tuple[Intervention, ...]":
    """The interventions of a JSON or YAML file: a list of them. Files in it are relative to its folder.

    Raises InterventionError where the file cannot be read or holds something else.
    """
    file = Path(path)
    try:
        document = read_yaml(file)
    except ValueError as error:
        raise InterventionError(str(error)) from error
    if isinstance(document, dict) and set(document) == {"interventions"}:
        document = document["interventions"]
    if not isinstance(document, list | dict):
        raise InterventionError(f"{file}: expected a list of interventions, found {type(document).__name__}.")
    try:
        found = read_interventions(document)
    except InterventionError as error:
        raise InterventionError(f"{file}: {error}") from error
    return tuple(_LIST.validate_python([_relative_to(item.model_dump(), file.parent) for item in found]))


_NO_DOCUMENT = "a document holds no function, and nothing in one is run as code: in Python give hookmap.{do}(fn, …)"
_ANOTHER = """expected a document, {{"do": "steer", …}}, got {kind}. \
A function is given by hookmap.apply(fn, point, layers), a steering vector by vector.interventions(strength)"""


def dump_interventions(interventions: "Iterable[Intervention]") -> str:
    """JSON that `load_interventions` reads. Raises InterventionError for functions."""
    interventions = list(interventions)
    refuse_functions(interventions, "a function is Python code, and JSON holds none: leave it out.")
    return json.dumps([item.model_dump(mode="json", exclude_defaults=False) for item in interventions], indent=2)


def fingerprint(interventions: "Iterable[Intervention]") -> list[dict[str, Any]]:
    """What a manifest records: all that decides the run, with vectors and vector files as SHA-256 of their contents."""
    return [
        _of_function(item) if isinstance(item, Function) else _hashed(item.model_dump(mode="json", exclude_none=True))
        for item in interventions
    ]


def _of_function(given: Function) -> dict[str, Any]:
    document = given.model_dump(mode="json", exclude_none=True, exclude={"fn"})
    return {**document, "fn": given.name, "sha256": digest_of(given.fn)}


def _hashed(document: dict[str, Any]) -> dict[str, Any]:
    if document["calls"] == "all":
        del document["calls"]  # a capture that was begun before there were calls goes on
    for name in TENSORS:
        if name not in document:
            continue
        value = document[name]
        if isinstance(value, dict):
            data = Path(value["file"]).read_bytes()
        else:
            data = json.dumps(value).encode()
        document[name] = {**(value if isinstance(value, dict) else {}), "sha256": hashlib.sha256(data).hexdigest()}
    if images := image_sources(document.get("source", {}).get("prompt", ())):
        document["images_sha256"] = [sha256_of(image) for image in images]
    return document


def _relative_to(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same document, with its files relative to this folder."""
    for name in TENSORS:
        if isinstance(document.get(name), dict):
            document[name] = {**document[name], "file": str(folder / document[name]["file"])}
    source = document.get("source")
    if source and source.get("store"):
        document["source"] = {**source, "store": str(folder / source["store"])}
    if source and source.get("prompt"):
        document["source"] = {**source, "prompt": relative_to(source["prompt"], folder)}
    return document


def _problem(error: Any, item: Any) -> str:
    """What pydantic says, or that a document holds no function, or how to make one of what is none."""
    if not isinstance(item, dict | BaseModel):
        return _ANOTHER.format(kind=type(item).__name__)
    do = dict(item).get("do")
    if do in ("apply", "watch"):
        return _NO_DOCUMENT.format(do=do)
    if error["type"].startswith("union_tag"):
        kinds = ", ".join(kind.model_fields["do"].default for kind in get_args(get_args(Document)[0]))
        return f"expected do: one of {kinds}" + (f"; got {do!r}" if do is not None else "")
    return str(error["msg"]).removeprefix("Value error, ")


def _where(number: int, item: Any, field: tuple[int | str, ...]) -> str:
    do = item.get("do") if isinstance(item, dict) else None
    return " ".join(filter(None, [f"intervention {number}", f"({do})" if do else "", ".".join(map(str, field))]))
