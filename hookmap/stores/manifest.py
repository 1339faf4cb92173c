"""manifest.json: what a capture is of, and whether it is finished."""

import functools
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from hookmap.activations import Key, call_of, key_of
from hookmap.documents import Frozen, read_json
from hookmap.errors import MapError, StoreError
from hookmap.maps.points import FEATURES, PointName
from hookmap.stores.durable_files import write_file
from hookmap.stores.ledger import RowSpec, tensor_name
from hookmap.stores.location import Location, RemotePath, local, reading
from hookmap.stores.shard import DTYPES, NAMES
from hookmap.stores.sparse import INDEX_DTYPE, INDICES, OFFSET_DTYPE, OFFSETS, VALUES

MANIFEST = "manifest.json"
FORMAT: Final = "hookmap-capture"
FORMAT_VERSIONS: Final = (1, 2, 3)
"""2: a tensor is of one call of a layer that runs several times; 3: a tensor is sparse"""

SHARD_TOKENS = 256
SHARD_BYTES = 16 * 2**20

# What a run under another version of a library may change in its map without being another run.
_PASSING = frozenset({"config", "transformers_version", "hookmap_version", "discovered_by", "proofs"})


_USUAL = (("call", None), ("sparse", False))
"""what a tensor is where its entry does not say"""


class TensorSpec(Frozen):
    """One captured tensor."""

    name: str = Field(description="its name in the shards: `resid_mid.8`, `logits`")
    point: str
    layer: int | None
    call: int | None = Field(default=None, ge=0, description="which run of a layer that runs several times; else null")
    dtype: str | None = Field(default=None, description="safetensors' name; null until the first samples are finished")
    row_shape: tuple[int, ...] | None = Field(default=None, description="of one row: [d]; null as `dtype` is")
    sparse: bool = Field(default=False, description="whether shards hold NAME.values, NAME.indices and NAME.offsets")

    @model_validator(mode="after")
    def _is_one_tensor(self) -> "TensorSpec":
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"expected a dtype out of {', '.join(DTYPES)}, found {self.dtype}")
        if (self.dtype is None) != (self.row_shape is None):
            raise ValueError(f"expected dtype and row_shape, or neither, found {self.dtype} and {self.row_shape}")
        if any(size < 0 for size in self.row_shape or ()):
            raise ValueError(f"expected a row_shape of numbers from 0 on, found {list(self.row_shape or ())}")
        if self.name != (own := tensor_name(self.key)):
            raise ValueError(f"expected the name {own}, of its point and layer, found {self.name}")
        return self

    @property
    def key(self) -> Key:
        return key_of(self.point, self.layer, self.call)

    @property
    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors of a shard that hold it: dtype and shape of a row of each; none before it is known."""
        if self.dtype is None or self.row_shape is None:
            return {}
        if not self.sparse:
            return {self.name: (self.dtype, self.row_shape)}
        dtypes = {VALUES: self.dtype, INDICES: INDEX_DTYPE, OFFSETS: OFFSET_DTYPE}
        return {f"{self.name}.{part}": (dtype, ()) for part, dtype in dtypes.items()}


class Counts(Frozen):
    """What the capture held when its writer was last closed."""

    samples: int = Field(default=0, ge=0)
    rows: int = Field(default=0, ge=0, description="of each tensor, over all samples")
    shards: int = Field(default=0, ge=0)
    bytes: int = Field(default=0, ge=0, description="of all shards")


class Manifest(Frozen):
    """The whole document."""

    format: Literal["hookmap-capture"] = FORMAT
    format_version: Literal[1, 2, 3] = 1
    finished: bool = Field(default=False, description="false while it is written, and after a kill until it is resumed")
    model: str | None = Field(description="hub id or path, as the run was given it")
    architecture: str | None
    points: tuple[str, ...] = Field(description="in forward order")
    layers: tuple[int, ...] = Field(description="ascending")
    tensors: tuple[TensorSpec, ...] = Field(description="in forward order; spans of samples count in this list")
    settings: dict[str, Any] = Field(default_factory=dict, description="of the generation, and of the prompts")
    shard_tokens: int = Field(ge=1, description="a shard ends with the forward pass that brings it to so many rows")
    shard_bytes: int = Field(ge=1, description="or to so many bytes; inside a pass at twice as many")
    versions: tuple[dict[str, str], ...] = Field(description="of the libraries that wrote it; one entry per set")
    runs: tuple[dict[str, Any], ...] = Field(
        default=(), description="one note for each run that wrote it: engine, memory in bytes, batches made smaller"
    )
    counts: Counts = Counts()
    sha256: dict[str, str] | None = Field(default=None, description="of the two tables, once finished")
    map: dict[str, Any] | None = Field(default=None, description="the architecture map that the run used")

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Manifest":
        """Several fields say the same: a wrong one would give a tensor under another's name."""
        said = {"points": list(self.points), "layers": list(self.layers)}
        names = [spec.name for spec in self.tensors]
        points, layers = _points_and_layers(self.keys)
        wrong = [
            f"{name} are {said[name]}, and its tensors say {list(own)}"
            for name, own in (("points", points), ("layers", layers))
            if list(own) != said[name]
        ]
        wrong += [f"the tensor {name} is there twice" for name in sorted(set(names)) if names.count(name) > 1]
        count = (self.map or {}).get("num_layers")
        if isinstance(count, int) and (over := [layer for layer in layers if not 0 <= layer < count]):
            wrong.append(f"layers {over} are in none of the map's {count}")
        if (self.sha256 or {}).keys() != ({"samples.jsonl", "shards.jsonl"} if self.finished else set()):
            wrong.append("the sha256 of both tables stands in it once it is finished, and only then")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def keys(self) -> tuple[Key, ...]:
        return tuple(spec.key for spec in self.tensors)

    @property
    def specs(self) -> dict[Key, RowSpec]:
        """What one row of each tensor is, as far as it is known."""
        return {
            spec.key: RowSpec(DTYPES[spec.dtype], spec.row_shape, spec.sparse)
            for spec in self.tensors
            if spec.dtype is not None and spec.row_shape is not None
        }

    def with_specs(self, specs: Mapping[Key, RowSpec]) -> "Manifest":
        """The same, with what is known of each tensor's rows."""
        tensors = []
        for spec in self.tensors:
            found = specs.get(spec.key)
            update = {"dtype": NAMES[found.dtype], "row_shape": found.shape} if found else {}
            tensors.append(spec.model_copy(update=update))
        return self.model_copy(update={"tensors": tuple(tensors)})

    def differences(self, run: "Manifest") -> list[str]:
        """Why `run` cannot go on with this capture: one line per difference, empty where it can."""
        lines = []
        for name in ("model", "architecture", "points", "layers", "shard_tokens", "shard_bytes"):
            lines += _difference(name, getattr(self, name), getattr(run, name))
        if self.points == run.points and self.layers == run.layers:
            lines += _difference("tensors", [t.name for t in self.tensors], [t.name for t in run.tensors])
        lines += _differences("settings", self.settings, run.settings)
        if self.map is not None and run.map is not None:
            lines += _differences("map", _as_written_today(self.map), _as_written_today(run.map), but=_PASSING)
        return lines


def manifest_of_run(
    keys: Sequence[Key],
    *,
    model: str | None = None,
    architecture: str | None = None,
    architecture_map: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """The manifest of a run that is about to begin.

    `keys`: of the tensors, in forward order; `architecture_map`: the map as plain data (its `to_document()`);
    `settings`: plain JSON data, everything that decides what the samples are, compared when the run is resumed.
    """
    if len(set(keys)) != len(keys):
        raise StoreError(f"a capture needs tensors, each once, got {list(keys)}.")
    points, layers = _points_and_layers(keys)
    sparse = {key for key in keys if PointName.of(key[0]).base == FEATURES}
    return Manifest(
        format_version=3 if sparse else 1 if all(call_of(key) is None for key in keys) else 2,
        model=model,
        architecture=architecture,
        points=points,
        layers=layers,
        tensors=tuple(
            TensorSpec(name=tensor_name(key), point=key[0], layer=key[1], call=call_of(key), sparse=key in sparse)
            for key in keys
        ),
        settings=_plain(settings or {}),
        shard_tokens=shard_tokens,
        shard_bytes=shard_bytes,
        versions=(versions(),),
        map=None if architecture_map is None else _plain(architecture_map),
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest, whole or not at all. Raises OSError."""
    plain = manifest.model_dump(mode="json")
    # Not as a serializer of pydantic's, which makes another error of an interrupt.
    plain["tensors"] = [{k: v for k, v in each.items() if (k, v) not in _USUAL} for each in plain["tensors"]]
    text = json.dumps(plain, indent=2) + "\n"
    write_file(folder / MANIFEST, text.encode("ascii"))


def read_manifest(folder: Location) -> Manifest:
    """The manifest of the capture in `folder`. Raises StoreError that says what is wrong, and where."""
    path = (folder if isinstance(folder, RemotePath) else local(folder)) / MANIFEST
    with reading(path):
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _no_manifest(folder) from error
    try:
        found = read_json(data)
    except ValueError as error:
        raise StoreError(f"{path} is broken: expected JSON, found {error}. Copy the whole folder again.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        what = f"format {found.get('format')!r}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise StoreError(
            f"{path} is no capture's manifest: expected format {FORMAT!r}, found {what}. {_MAKE.format(folder)}"
        )
    if found.get("format_version") not in FORMAT_VERSIONS:
        raise StoreError(
            f"{path}: expected format_version {' or '.join(map(str, FORMAT_VERSIONS))}, found "
            f"{found.get('format_version')!r}: another version of hookmap wrote it. Read it with that one, or update: "
            "pip install -U hookmap"
        )
    try:
        return Manifest.model_validate(found)
    except ValidationError as error:
        problems = "\n".join(
            f"  - {'.'.join(map(str, p['loc']))}: {p['msg']}, found {str(p['input'])[:80]!r}"
            if p["loc"]
            else f"  - {p['msg']}"
            for p in error.errors()
        )
        raise StoreError(f"{path} is broken:\n{problems}\nCopy the whole folder again.") from error


def _as_written_today(architecture_map: dict[str, Any]) -> dict[str, Any]:
    """The map of a manifest, whatever schema it was written in; as it is, where that is unknown."""
    from hookmap.maps.parsing import parse

    try:
        return parse(architecture_map).to_document()
    except MapError:
        return architecture_map


def _points_and_layers(keys: Sequence[Key]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """In forward order; ascending."""
    return (
        tuple(dict.fromkeys(key[0] for key in keys)),
        tuple(sorted({key[1] for key in keys if key[1] is not None})),
    )


def _no_manifest(folder: Location) -> StoreError:
    what = f"{folder} is not a capture: it has no {MANIFEST}."
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing there"
        what = f"{folder} is not a capture: expected a folder, found {kind}."
    return StoreError(f"{what} {_MAKE.format(folder)}")


_MAKE = "Make a capture: hookmap capture MODEL --points resid_mid --layers 8 -o {}"


def versions() -> dict[str, str]:
    """Of the libraries that decide what a capture's numbers are."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    from hookmap._version import __version__

    found = {"hookmap": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "nnsight"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be after a round trip through JSON, so that it compares equal to what is read back."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise StoreError(f"settings and map must be plain JSON data: {error}") from error
    return plain


def _difference(name: str, here: Any, now: Any) -> list[str]:
    return [] if here == now else [f"{name}: the capture has {_short(here)}, this run has {_short(now)}"]


def _differences(
    name: str, here: Mapping[str, Any], now: Mapping[str, Any], but: frozenset[str] = frozenset()
) -> list[str]:
    lines = []
    for key in sorted({*here, *now} - but):
        ours, theirs = here.get(key, "nothing"), now.get(key, "nothing")
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            lines += _differences(f"{name}.{key}", ours, theirs)
        else:
            lines += _difference(f"{name}.{key}", ours, theirs)
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
