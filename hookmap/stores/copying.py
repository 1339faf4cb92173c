"""Copies samples from one capture into another: what `repair` keeps, and `merge` puts together.

Rows are copied some at a time, so memory is flat; groups stay groups.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hookmap.activations import Activation, Sample
from hookmap.errors import StoreError
from hookmap.stores.folder import FolderWriter
from hookmap.stores.integrity import entry_problems
from hookmap.stores.interface import Store
from hookmap.stores.manifest import Counts, Manifest, read_manifest
from hookmap.stores.numbers import NumberSet
from hookmap.stores.reader import CaptureStore
from hookmap.stores.shard import SHARD_FOLDER, ShardInfo, read_header, sha256_of, shard_name
from hookmap.stores.table import SAMPLES, SHARDS, Committed, Entry, Table, decode_entry, decode_shard, left_of

ROWS = 256
"""rows of each tensor that a copy holds at a time"""
_PROMPTS = ("prompts", "prompts_sha256")
"""settings that say which samples a run is over, and may differ between captures that are merged"""


@dataclass(frozen=True)
class Repaired:
    """What came of a repair."""

    kept: int
    """samples"""
    lost: dict[str, str] = field(default_factory=dict)
    """why each other sample, or line of the table, is not kept"""


@dataclass(frozen=True)
class Merged:
    """What came of a merge."""

    samples: int
    duplicates: list[str] = field(default_factory=list)
    """one line for each sample that was there before, and was left out"""
    renumbered: bool = False
    """whether the captures used the same numbers for different samples, and all got new ones"""


def copy_group(store: Store, samples: Sequence[tuple[int, Sample]], writer: FolderWriter) -> None:
    """Write these samples together: (number in `store`, what it is in the copy)."""
    step = min(ROWS, writer.manifest.shard_tokens)  # as a forward pass: a shard ends between two of them
    for number, sample in samples:
        for start in range(0, sample.rows, step):
            rows = range(start, min(start + step, sample.rows))
            for key in store.keys:
                writer.write(Activation(sample.sample, *key, start, store.rows_at(number, key, rows)))
    for _, sample in samples:
        writer.finish(sample)


def fresh(manifest: Manifest) -> Manifest:
    """The manifest of a copy that is about to begin."""
    return manifest.model_copy(update={"finished": False, "counts": Counts(), "sha256": None})


def repair(path: "str | os.PathLike[str]", out: "str | os.PathLike[str]") -> Repaired:
    """Copy every sample of the capture at `path` that is whole and right, to the bit, to the new folder `out`.

    Nothing in `path` is changed. A sample is kept where its line can be read, all its rows are there, and each shard
    that they lie in has the checksum that the table of shards says. The copy is marked as finished where the capture
    was and nothing is lost; else `hookmap capture … -o OUT --resume` makes what is missing again.
    Raises StoreError where the manifest or the table of samples is gone: nothing says then what the rows are.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    lost: dict[str, str] = {}
    table = Table(folder / SAMPLES, _sound_lines(folder, manifest, lost))
    store = CaptureStore(folder, (manifest, table))
    with FolderWriter.create(out, fresh(manifest)) as writer:
        for numbers in table.groups():
            copy_group(store, [(number, store.sample(number)) for number in numbers], writer)
        writer.close(finished=manifest.finished and not lost)
    return Repaired(len(table), lost)


def _sound_lines(folder: Path, manifest: Manifest, lost: dict[str, str]) -> Committed:
    """Where the lines of sound samples are; `lost` gets the others."""
    wrong = _wrong_shards(folder)
    path = folder / SAMPLES
    sound, seen = Committed(), NumberSet()
    for number, (offset, line) in enumerate(_finished_lines(path), start=1):
        try:
            entry = decode_entry(line, path, number)
        except StoreError as error:
            lost[f"line {number}"] = str(error).splitlines()[0]
            continue
        name = f"sample {entry.sample.sample}"
        if entry.sample.sample in seen:
            lost[f"line {number}"] = f"{name} is there twice"
        elif reasons := list(_problems(folder, manifest, entry, wrong)):
            lost[name] = "; ".join(reasons)
        else:
            seen.add(entry.sample.sample)
            sound.numbers.append(entry.sample.sample)
            sound.offsets.append(offset)
            sound.rows += entry.sample.rows
    return sound


def _finished_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines up to the last that ends a group: what is behind it was never finished."""
    waiting: list[tuple[int, bytes]] = []
    offset = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                waiting.append((offset, line))
                offset += len(line)
                if line.endswith(b"\n") and left_of(line) == 0:
                    yield from waiting
                    waiting = []
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing: without it nothing says which rows are of which sample.") from error


def _problems(folder: Path, manifest: Manifest, entry: Entry, wrong: Callable[[int], str | None]) -> Iterator[str]:
    broken = [found for shard in sorted({span.shard for span in entry.spans}) if (found := wrong(shard))]
    if broken:
        yield from broken
        return

    def rows_of(shard: int) -> dict[str, int]:
        header = read_header(folder / SHARD_FOLDER / shard_name(shard))
        return {name: stored.shape[0] for name, stored in header.items()}

    yield from entry_problems(manifest, None, entry, rows_of)


def _wrong_shards(folder: Path) -> Callable[[int], str | None]:
    """A function that says what is wrong with a shard; each is read once."""
    infos: dict[int, ShardInfo] = {}
    path = folder / SHARDS
    if path.is_file():
        with open(path, "rb") as file:
            for place, line in enumerate(file):
                try:
                    infos[place] = decode_shard(line, path, place)
                except StoreError:
                    continue
    known: dict[int, str | None] = {}

    def wrong(shard: int) -> str | None:
        if shard not in known:
            known[shard] = _wrong_shard(folder, shard, infos.get(shard))
        return known[shard]

    return wrong


def _wrong_shard(folder: Path, shard: int, info: ShardInfo | None) -> str | None:
    path = folder / SHARD_FOLDER / shard_name(shard)
    if info is None:
        return f"{SHARDS} has no checksum of shard {shard}"
    try:
        read_header(path)
    except StoreError as error:
        return str(error).splitlines()[0]
    return None if sha256_of(path) == info.sha256 else f"{path} was changed: its checksum is another one"


def merge(paths: "Sequence[str | os.PathLike[str]]", out: "str | os.PathLike[str]") -> Merged:
    """Put captures of one model, of the same tensors and under the same settings, into the new folder `out`.

    A sample that comes again (the same id; without one the same number, prompt and tokens) is left out and told.
    Ids stay; so do numbers, unless two captures use one for different samples: then all are numbered anew, in order.
    Raises StoreError that names every difference.
    """
    stores = [CaptureStore(path) for path in paths]
    if not stores:
        raise StoreError("nothing to merge: expected at least one capture folder.")
    _refuse_differences(stores)
    duplicates: list[str] = []
    keep, clash = _distinct(stores, duplicates)
    manifest = fresh(stores[0].manifest)
    if len(stores) > 1:
        settings = {name: value for name, value in manifest.settings.items() if name not in _PROMPTS}
        manifest = manifest.model_copy(update={"settings": settings})
    count = 0
    with FolderWriter.create(out, manifest) as writer:
        for store, numbers in zip(stores, keep, strict=True):
            for group in store.groups():
                samples = []
                for number in group:
                    if number in numbers:
                        sample = store.sample(number)
                        samples.append((number, replace(sample, sample=count) if clash else sample))
                        count += 1
                copy_group(store, samples, writer)
        writer.close(finished=all(store.finished for store in stores))
    return Merged(count, duplicates, clash)


def _refuse_differences(stores: Sequence[CaptureStore]) -> None:
    def comparable(manifest: Manifest) -> Manifest:
        settings = {name: value for name, value in manifest.settings.items() if name not in _PROMPTS}
        return manifest.model_copy(update={"settings": settings, "shard_tokens": 1, "shard_bytes": 1})

    lines, first = [], stores[0].manifest
    for store in stores[1:]:
        lines += [f"  - {store.path}: {line}" for line in comparable(first).differences(comparable(store.manifest))]
        for one, other in zip(first.tensors, store.manifest.tensors, strict=False):
            if one.dtype and other.dtype and (one.dtype, one.row_shape) != (other.dtype, other.row_shape):
                ours, theirs = (f"{spec.dtype} rows of {list(spec.row_shape or ())}" for spec in (one, other))
                lines.append(f"  - {store.path}: {one.name}: the first has {ours}, this one {theirs}")
    if lines:
        raise StoreError(f"these captures cannot be merged with {stores[0].path}:\n" + "\n".join(lines))


def _distinct(stores: Sequence[CaptureStore], duplicates: list[str]) -> tuple[list[set[int]], bool]:
    """The numbers to keep of each store, and whether two different samples have one number."""
    seen: dict[bytes, str] = {}
    used, clash = set[int](), False
    keep: list[set[int]] = []
    for store in stores:
        numbers = set[int]()
        for sample in store.samples:
            name = f"sample {sample.sample} of {store.path}" + (f" (id {sample.id})" if sample.id is not None else "")
            mark = _mark(sample)
            if mark in seen:
                duplicates.append(f"{name} is {seen[mark]}")
                continue
            seen[mark] = name
            clash |= sample.sample in used
            numbers.add(sample.sample)
        used |= numbers
        keep.append(numbers)
    return keep, clash


def _mark(sample: Sample) -> bytes:
    own = ("id", sample.id) if sample.id is not None else (sample.sample, sample.prompt, sample.token_ids)
    return hashlib.sha256(repr(own).encode("utf-8", "surrogatepass")).digest()
