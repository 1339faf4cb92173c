"""Reads a capture folder, finished or still being written: shard headers, and only the bytes of the rows asked for."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from hookmap.activations import Key, Sample
from hookmap.errors import MapError, SelectionError, StoreError
from hookmap.stores.integrity import problems_of
from hookmap.stores.interface import Store, unknown_sample
from hookmap.stores.location import Location, location, sizes
from hookmap.stores.manifest import Manifest, TensorSpec, read_manifest
from hookmap.stores.shard import DTYPES, SHARD_FOLDER, Stored, read_header, read_into, shard_name
from hookmap.stores.sparse import INDICES, OFFSETS, VALUES, Parts, from_parts
from hookmap.stores.table import OPTIONAL, SAMPLES, Entry, Span, Table

if TYPE_CHECKING:
    from hookmap.stores.dataset import RowDataset

NORM_SAMPLES = 10_000
"""samples whose tensors `describe` reads by default"""

HEADERS = 256
"""shard headers that a reader keeps in memory"""


class CaptureStore(Store):
    """A capture folder as it stood when it was opened: samples finished later are seen by opening it again."""

    def __init__(self, path: "str | os.PathLike[str] | Location", opened: tuple[Manifest, Table] | None = None) -> None:
        """Reads the manifest and indexes the table, unless `opened` gives both. Raises StoreError."""
        self.path = location(path)
        self.manifest, self._table = self._open() if opened is None else opened
        self._specs = self.manifest.specs
        self._places = {key: place for place, key in enumerate(self.manifest.keys)}
        self._header = lru_cache(HEADERS)(self._read_header)
        self._entry = lru_cache(64)(self._read_entry)

    def _open(self) -> tuple[Manifest, Table]:
        """The manifest and the table, read again where they disagree: a writer may have added samples in between."""
        for _ in range(2):
            manifest = read_manifest(self.path)
            table = Table(self.path / SAMPLES)
            counts, rows = manifest.counts, table.committed.rows
            other = (len(table), rows) != (counts.samples, counts.rows)
            if other if manifest.finished else len(table) < counts.samples or rows < counts.rows:
                wrong = f"expected {counts.samples} samples of {counts.rows} rows, found {len(table)} of {rows}"
            elif rows and len(manifest.specs) < len(manifest.tensors):
                wrong = f"it tells no dtype and shape of all tensors, with {len(table)} samples finished"
            else:
                return manifest, table
        raise StoreError(
            f"{self.path / SAMPLES} and the manifest differ: {wrong}. Copy the whole folder again, or keep what is "
            f"sound: hookmap store repair {self.path} -o NEW"
        )

    @property
    def finished(self) -> bool:
        """Whether the run that wrote it finished."""
        return self.manifest.finished

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys of the tensors that this store holds, in forward order."""
        return self.manifest.keys

    @property
    def num_layers(self) -> int | None:
        """Layers of the model, as the map in the manifest says."""
        found = (self.manifest.map or {}).get("num_layers")
        return found if isinstance(found, int) else None

    def runs_of(self, layer: int) -> int | None:
        """How often a layer runs in one forward pass, as the map in the manifest says; see `Store.runs_of`."""
        from hookmap.maps.parsing import parse

        try:
            return None if self.manifest.map is None else parse(self.manifest.map).kind_of(layer).calls
        except MapError:
            return None

    @property
    def samples(self) -> Sequence[Sample]:
        """The finished samples, by number; each is read from disk when it is asked for."""
        return self._table

    def sample(self, number: int) -> Sample:
        """The finished sample with this number. Raises SelectionError where there is none."""
        return self._entry(number).sample

    def _with_id(self, id: str) -> list[int]:
        return self._table.with_id(id)

    def groups(self) -> Iterator[list[int]]:
        """The numbers of samples that were committed together (a batch), in the order of writing."""
        return self._table.groups()

    def spans(self) -> Iterator[tuple[int, tuple[Span, ...]]]:
        """Where the rows of each finished sample are, by its number."""
        return ((entry.sample.sample, entry.spans) for entry in self._table.entries())

    def shard_rows(self, shard: int, key: Key, row: int, rows: int) -> torch.Tensor:
        """Contiguous rows of one tensor in one shard, across sample boundaries: [rows, *row]. Raises StoreError."""
        spec, what = self.manifest.tensors[self._places[key]], self._specs[key]
        if spec.sparse:
            return self._sparse_rows(shard, spec, row, rows)
        stored = self._stored(shard, spec)
        if row + rows > stored.shape[0]:
            raise self._contradiction(shard, spec, f"{row + rows} rows", f"{stored.shape[0]}")
        data = bytearray(rows * stored.row_bytes)
        read_into(self._shard_path(shard), [(stored.offset + row * stored.row_bytes, memoryview(data))])
        return torch.frombuffer(data, dtype=what.dtype).reshape(rows, *what.shape)

    def dataset(
        self,
        points: "str | Sequence[str] | Mapping[str, Any]",
        layers: "int | Sequence[int] | None" = None,
        *,
        batch_size: int = 1024,
        shuffle_rows: "int | None" = None,
        seed: int = 0,
        where: bool = False,
        label: "str | None" = None,
    ) -> "RowDataset":
        """Batches of rows in random order, for training: {"resid_mid.8": [batch, d], …}.

        `layers`: of the points that have one; None for all that are held; or points={"resid_post": [3], "z": None}.
        `shuffle_rows`: rows that the buffer holds, 16384 unless given; 0 leaves the order as it is on disk.
        `where`: give "sample" [batch] and "position" [batch] too; `label`: and this label of each row's sample.
        Raises SelectionError.
        """
        from hookmap.stores.dataset import RowDataset  # it needs torch.utils.data, which a reader does not

        if isinstance(points, Mapping) and layers is not None:
            raise SelectionError("points name layers of their own: leave layers out.")
        names = [points] if isinstance(points, str) else points
        keys: list[Key] = []
        for name, its in points.items() if isinstance(points, Mapping) else [(name, None) for name in names]:
            own = layers if its is None else its
            for layer in [own] if own is None or isinstance(own, int) else own:
                keys += self.keys_of(name, layer)
        held = {} if shuffle_rows is None else {"shuffle_rows": shuffle_rows}
        return RowDataset(self, keys, batch_size=batch_size, seed=seed, where=where, label=label, **held)

    def _name(self) -> str:
        return f" {self.path}"

    def __reduce__(self) -> tuple[Any, ...]:
        return CaptureStore, (self.path,)  # another process opens the folder itself

    def verify(self) -> list[str]:
        """Every problem of the folder, one line each; empty where it is sound. Reads all of it."""
        return list(problems_of(self.path))

    def describe(self, norms: bool | None = None, texts: int = 20) -> dict[str, Any]:
        """What is in the capture, as plain data.

        `norms`: read all tensors, for the norms of their rows and for rows that are not finite; None: if there are at
        most NORM_SAMPLES samples.
        `texts`: the number of samples that are described with their texts.
        """
        manifest, rows = self.manifest, self._table.committed.rows
        norms = len(self) <= NORM_SAMPLES if norms is None else norms
        return {
            "path": str(self.path),
            "finished": self.finished,
            "format_version": manifest.format_version,
            "model": manifest.model,
            "architecture": manifest.architecture,
            "points": list(self.points),
            "layers": list(self.layers),
            "samples": len(self),
            "rows": rows,
            "shards": self._table.committed.shards,
            "bytes": sum(map(self._bytes_of, manifest.tensors)),
            "bytes_on_disk": sum(sizes(self.path).values()),
            "settings": manifest.settings,
            "overflow": _overflow(manifest),
            "versions": list(manifest.versions),
            "tensors": [self._describe_tensor(spec, norms) for spec in manifest.tensors],
            "texts": [_describe_sample(sample) for sample in self._table[:texts]],
        }

    def _describe_tensor(self, spec: TensorSpec, norms: bool) -> dict[str, Any]:
        rows = self._table.committed.rows
        found: dict[str, Any] = {
            "name": spec.name,
            "point": spec.point,
            "layer": spec.layer,
            **({} if spec.call is None else {"call": spec.call}),
            "dtype": spec.dtype,
            "shape": [rows, *(spec.row_shape or ())],
            "bytes": self._bytes_of(spec),
        }
        if spec.sparse:
            found["sparse"] = True
        if norms:
            norms_found = self.row_norms(*spec.key)
            named = {"mean_norm": "mean", "median_norm": "median", "largest_norm": "largest", "largest_share": "share"}
            for name, attribute in named.items():
                value = getattr(norms_found, attribute)
                found[name] = value if math.isfinite(value) else None
            found["not_finite"] = norms_found.not_finite
            if norms_found.first_not_finite is not None:
                found["first_not_finite"] = dict(zip(("sample", "position"), norms_found.first_not_finite, strict=True))
        return found

    def _bytes_of(self, spec: TensorSpec) -> int:
        """Of a tensor's rows; a sparse one's are asked of every shard."""
        if not spec.sparse:
            return self._table.committed.rows * _row_bytes(spec)
        headers = (self._read_header(shard) for shard in range(self._table.committed.shards))
        return sum(header[name].bytes for header in headers for name in spec.stored if name in header)

    def _rows(self, sample: int, key: Key, rows: Sequence[int]) -> torch.Tensor:
        entry, place = self._entry(sample), self._places[key]
        spec = self._specs.get(key)
        if spec is None:  # no sample has rows yet
            return torch.empty(0, 0)
        if not len(rows):
            nothing = torch.empty(0, *spec.shape, dtype=spec.dtype)
            return nothing.to_sparse() if spec.sparse else nothing
        if spec.sparse:
            where = [each for first, stop in _runs(rows) for each in self._where(entry, place, first, stop)]
            tensor = self.manifest.tensors[place]
            return torch.cat([self._sparse_rows(shard, tensor, row, n) for shard, row, n in where]).coalesce()
        row_bytes = math.prod(spec.shape) * spec.dtype.itemsize
        data = bytearray(len(rows) * row_bytes)
        view = memoryview(data)
        for first, stop in _runs(rows):
            self._fill(view[: (stop - first) * row_bytes], entry, place, first, stop)
            view = view[(stop - first) * row_bytes :]
        return torch.frombuffer(data, dtype=spec.dtype).reshape(len(rows), *spec.shape)

    def _fill(self, view: memoryview, entry: Entry, place: int, first: int, stop: int) -> None:
        """Read rows first..stop-1 of one sample of one tensor into `view`, which they fill."""
        spec = self.manifest.tensors[place]
        row_bytes = len(view) // (stop - first)
        for shard, row, rows in self._where(entry, place, first, stop):
            stored = self._stored(shard, spec)
            if row + rows > stored.shape[0]:
                raise self._contradiction(shard, spec, f"{row + rows} rows", f"{stored.shape[0]}")
            read_into(self._shard_path(shard), [(stored.offset + row * row_bytes, view[: rows * row_bytes])])
            view = view[rows * row_bytes :]

    def _where(self, entry: Entry, place: int, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where rows first..stop-1 of one sample of one tensor are, in order: shard, row, number of rows."""
        reached = first
        for span in entry.spans:
            if reached == stop:
                break
            if not (span.first <= place < span.end and span.start <= reached < span.start + span.rows):
                continue
            until = min(stop, span.start + span.rows)
            yield span.shard, span.row + reached - span.start, until - reached
            reached = until
        if reached != stop:
            name = self.manifest.tensors[place].name
            raise StoreError(
                f"{self.path / SAMPLES}: sample {entry.sample.sample} has {entry.sample.rows} rows, and no span for "
                f"row {reached} of {name}.\nSee every problem: hookmap inspect {self.path} --verify"
            )

    def _sparse_rows(self, shard: int, spec: TensorSpec, row: int, rows: int) -> torch.Tensor:
        """Contiguous rows of a sparse tensor in one shard. Raises StoreError."""
        values, indices, offsets = (self._stored(shard, spec, part) for part in (VALUES, INDICES, OFFSETS))
        if row + rows >= offsets.shape[0]:
            raise self._contradiction(shard, spec, f"{row + rows} rows", f"{offsets.shape[0] - 1}")
        at = self._numbers(shard, offsets, row, rows + 1)
        first, last = int(at[0]), int(at[-1])
        if bool((at.diff() < 0).any()) or first < 0 or last > min(values.shape[0], indices.shape[0]):
            raise self._contradiction(shard, spec, "offsets that ascend, into its values", "others")
        width = (spec.row_shape or (0,))[0]
        numbers, which = (self._numbers(shard, each, first, last - first) for each in (values, indices))
        try:
            return from_parts(Parts(numbers, which, at), width)
        except RuntimeError as error:
            expected = f"indices from 0 to {width - 1}, ascending in a row"
            raise self._contradiction(shard, spec, expected, "others") from error

    def _numbers(self, shard: int, stored: Stored, first: int, count: int) -> torch.Tensor:
        """Some numbers of a tensor with one axis."""
        if not count:
            return torch.empty(0, dtype=DTYPES[stored.dtype])
        data = bytearray(count * stored.row_bytes)
        read_into(self._shard_path(shard), [(stored.offset + first * stored.row_bytes, memoryview(data))])
        return torch.frombuffer(data, dtype=DTYPES[stored.dtype])

    def _stored(self, shard: int, spec: TensorSpec, part: str | None = None) -> Stored:
        """What a shard holds of a tensor; `part`: of a sparse one."""
        name = spec.name if part is None else f"{spec.name}.{part}"
        stored, (dtype, shape) = self._header(shard).get(name), spec.stored[name]
        if stored is None:
            raise self._contradiction(shard, spec, "it", "no such tensor")
        if stored.dtype != dtype or stored.shape[1:] != shape:
            raise self._contradiction(shard, spec, f"{dtype} rows of {shape}", f"{stored.dtype} of {stored.shape[1:]}")
        return stored

    def _contradiction(self, shard: int, spec: TensorSpec, expected: str, found: str) -> StoreError:
        return StoreError(
            f"{self._shard_path(shard)}, tensor {spec.name}: expected {expected}, as the manifest and the table of "
            f"samples say, found {found}.\nSee every problem: hookmap inspect {self.path} --verify"
        )

    def _shard_path(self, shard: int) -> Location:
        return self.path / SHARD_FOLDER / shard_name(shard)

    def _read_header(self, shard: int) -> dict[str, Stored]:
        return read_header(self._shard_path(shard))

    def _read_entry(self, number: int) -> Entry:
        entry = self._table.entry(number)
        if entry is None:
            raise unknown_sample(number, self._table.numbers)
        return entry


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs first..stop-1 of consecutive rows, in order."""
    if isinstance(rows, range) and rows.step == 1:
        yield rows.start, rows.stop
        return
    first = stop = rows[0]
    for row in rows:
        if row != stop:
            yield first, stop
            first = row
        stop = row + 1
    yield first, stop


def _overflow(manifest: Manifest) -> dict[str, int]:
    """For each tensor, how many rows overflowed in the stored dtype, as the runs that wrote them recorded."""
    found: Counter[str] = Counter()
    for run in manifest.runs:
        found.update(run.get("overflow", {}).get("rows", {}))
    return dict(found)


def _row_bytes(spec: TensorSpec) -> int:
    return 0 if spec.dtype is None else math.prod(spec.row_shape or ()) * DTYPES[spec.dtype].itemsize


def _describe_sample(sample: Sample) -> dict[str, Any]:
    return {
        "sample": sample.sample,
        "prompt": sample.prompt,
        "text": sample.text,
        "prompt_tokens": sample.prompt_tokens,
        "tokens": len(sample.token_ids),
        "rows": sample.rows,
        **{name: value for name in OPTIONAL if (value := getattr(sample, name)) is not None},
    }
