"""Copies samples from one capture into another, to repair a capture or to merge several.

Rows are copied a few at a time, so that memory is flat. Groups stay groups.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from hookmap.activations import Activation, Sample, call_of
from hookmap.errors import StoreError
from hookmap.stores.folder import FolderWriter
from hookmap.stores.integrity import altered_tables, count_problems, entry_problems, shard_problems
from hookmap.stores.interface import Store
from hookmap.stores.location import Location, location, reading
from hookmap.stores.manifest import Counts, Manifest, read_manifest
from hookmap.stores.number_set import NumberSet
from hookmap.stores.reader import CaptureStore
from hookmap.stores.shard import SHARD_FOLDER, ShardInfo, read_header, shard_name
from hookmap.stores.sparse import rows_held
from hookmap.stores.table import SAMPLES, SHARDS, Entry, Table, decode_entry, decode_shard, is_intact
from hookmap.stores.table_index import Committed, left_of

ROWS = 256
"""rows of each tensor that a copy holds at a time"""
_PROMPTS = ("prompts", "prompts_sha256", "ids_sha256", "labels_sha256")
"""settings that say which samples a run is over, and may differ between captures that are merged"""


@dataclass(frozen=True)
class Repaired:
    """The result of a repair."""

    kept: int
    """samples"""
    lost: dict[str, str] = field(default_factory=dict)
    """why each other sample, or line of the table, is not kept"""
    missing: int = 0
    """samples that the manifest counts and the table lacks"""
    changed: list[str] = field(default_factory=list)
    """how the tables are not as the manifest says"""


@dataclass(frozen=True)
class Merged:
    """The result of a merge."""

    samples: int
    duplicates: list[str] = field(default_factory=list)
    """one line for each sample that was there before, and was left out"""
    renumbered: bool = False
    """whether the captures used the same numbers for different samples, and all got new ones"""
    renamed: list[str] = field(default_factory=list)
    """one line for each sample whose id was taken, with its new id"""


def copy_group(store: Store, samples: Sequence[tuple[int, Sample]], writer: FolderWriter) -> None:
    """Write samples as one group. `samples`: the number in `store`, and the sample as it is in the copy."""
    step = min(ROWS, writer.manifest.shard_tokens)  # as a forward pass: a shard ends between two of them
    for number, sample in samples:
        for start in range(0, sample.rows, step):
            rows = range(start, min(start + step, sample.rows))
            for key in store.keys:
                tensor = store.rows_at(number, key, rows)
                writer.write(Activation(sample.sample, key[0], key[1], start, tensor, call_of(key)))
    for _, sample in samples:
        writer.finish(sample)


def fresh(manifest: Manifest) -> Manifest:
    """The manifest of a copy that is about to begin."""
    return manifest.model_copy(update={"finished": False, "counts": Counts(), "sha256": None})


def repair(path: "str | os.PathLike[str]", out: "str | os.PathLike[str]") -> Repaired:
    """Copy every sample of the capture at `path` that is whole and right, to the bit, to the new folder `out`.

    Nothing in `path`, a folder or a URL, is changed. A sample is kept where its line is as it was written, all its rows
    are there, and each shard that they lie in has the checksum that the table of shards says. The copy is marked as
    finished where the capture was, nothing is lost, and both tables are as the manifest says; else
    `hookmap capture … -o OUT --resume` makes what is missing again, in the batches that it was in.
    Raises StoreError where the manifest or the table of samples is gone: nothing says then what the rows are.
    """
    folder = location(path)
    manifest = read_manifest(folder)
    lost: dict[str, str] = {}
    altered = altered_tables(folder, manifest)
    sound = _sound_lines(folder, manifest, lost, trusted=SAMPLES not in altered)
    table = Table(folder / SAMPLES, sound)
    missing = max(0, manifest.counts.samples - len(table) - len(lost))
    changed = list(altered.values())
    if not lost:
        changed += count_problems(folder, manifest, len(table), sound.rows)
    store = CaptureStore(folder, (manifest, table))
    with FolderWriter.create(out, fresh(manifest)) as writer:
        for numbers in table.groups():
            copy_group(store, [(number, store.sample(number)) for number in numbers], writer)
        writer.close(finished=manifest.finished and not (lost or missing or changed))
    return Repaired(len(table), lost, missing, changed)


def _sound_lines(folder: Location, manifest: Manifest, lost: dict[str, str], trusted: bool) -> Committed:
    """Where the lines of sound samples are; `lost` gets the others. `trusted`: the table is as it was written."""
    wrong = _wrong_shards(folder, manifest)
    path = folder / SAMPLES
    sound, seen = Committed(), NumberSet()
    for number, (offset, line) in enumerate(_finished_lines(path, manifest.finished), start=1):
        try:
            entry = decode_entry(line, path, number)
        except StoreError as error:
            lost[f"line {number}"] = str(error).splitlines()[0]
            continue
        if not trusted and is_intact(line) is None:
            lost[f"line {number}"] = "the table was changed, and this line has no checksum of its own"
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


def _finished_lines(path: Location, finished: bool) -> Iterator[tuple[int, bytes]]:
    """Lines up to the last one that ends a group: later lines were never finished, unless all of them were."""
    waiting: list[tuple[int, bytes]] = []
    offset = 0
    missing = StoreError(f"{path} is missing: without it nothing says which rows are of which sample.")
    with reading(path, missing), path.open("rb") as file:
        for line in file:
            waiting.append((offset, line))
            offset += len(line)
            if finished or (line.endswith(b"\n") and left_of(line) == 0):
                yield from waiting
                waiting = []


def _problems(folder: Location, manifest: Manifest, entry: Entry, wrong: Callable[[int], str | None]) -> Iterator[str]:
    broken = [found for shard in sorted({span.shard for span in entry.spans}) if (found := wrong(shard))]
    if broken:
        yield from broken
        return

    def rows_of(shard: int) -> dict[str, int]:
        header = read_header(folder / SHARD_FOLDER / shard_name(shard))
        return rows_held({name: stored.shape[0] for name, stored in header.items()})

    yield from entry_problems(manifest, None, entry, rows_of)


def _wrong_shards(folder: Location, manifest: Manifest) -> Callable[[int], str | None]:
    """A function that says what is wrong with a shard; each is read once."""
    infos: dict[int, ShardInfo] = {}
    path = folder / SHARDS
    if path.exists():
        with reading(path), path.open("rb") as file:
            for place, line in enumerate(file):
                try:
                    infos[place] = decode_shard(line, path, place)
                except StoreError:
                    continue
    known: dict[int, str | None] = {}

    def wrong(shard: int) -> str | None:
        if shard not in known:
            known[shard] = _wrong_shard(folder, manifest, shard, infos.get(shard))
        return known[shard]

    return wrong


def _wrong_shard(folder: Location, manifest: Manifest, shard: int, info: ShardInfo | None) -> str | None:
    if info is None:
        return f"{SHARDS} has no checksum of shard {shard}"
    return next(shard_problems(folder / SHARD_FOLDER / shard_name(shard), info, manifest), None)


def merge(
    paths: "Sequence[str | os.PathLike[str]]",
    out: "str | os.PathLike[str]",
    same_ids: Literal["rename", "refuse"] = "rename",
) -> Merged:
    """Put captures of one model, of the same tensors and under the same settings, into the new folder `out`.

    A sample that another capture has too (the same id, or without one the same number, and the same prompt, text,
    tokens, positions and labels) is left out and reported. Samples of one capture are all kept.
    same_ids: what happens where different samples have one id. "rename" appends a number to the later ones, `q7`
    becomes `q7.2`, and reports them; "refuse" raises StoreError. Numbers stay, unless two captures use one for
    different samples: then all are numbered anew, in order. Raises StoreError that names every difference.
    """
    if same_ids not in ("rename", "refuse"):
        raise StoreError(f"same_ids: expected rename or refuse, got {same_ids!r}.")
    stores = [CaptureStore(path) for path in paths]
    if not stores:
        raise StoreError("nothing to merge: expected at least one capture folder.")
    _refuse_differences(stores)
    kept = _distinct(stores)
    if kept.renamed and same_ids == "refuse":
        lines = "\n".join(f"  - {line}" for line in kept.renamed.values())
        raise StoreError(
            f"ids are of different samples:\n{lines}\nNothing was written. To give the later ones other ids: "
            "same_ids='rename', --same-ids rename"
        )
    manifest = fresh(stores[0].manifest)
    if len(stores) > 1:
        settings = {name: value for name, value in manifest.settings.items() if name not in _PROMPTS}
        manifest = manifest.model_copy(update={"settings": settings})
    count = 0
    with FolderWriter.create(out, manifest) as writer:
        for place, store in enumerate(stores):
            for group in store.groups():
                samples = []
                for number in group:
                    if number in kept.numbers[place]:
                        sample = store.sample(number)
                        if kept.clash:
                            sample = replace(sample, sample=count)
                        samples.append((number, replace(sample, id=kept.ids.get((place, number), sample.id))))
                        count += 1
                copy_group(store, samples, writer)
        writer.close(finished=all(store.finished for store in stores))
    return Merged(count, kept.duplicates, kept.clash, list(kept.renamed.values()))


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


@dataclass
class _Distinct:
    """What a merge keeps of several captures."""

    numbers: list[NumberSet] = field(default_factory=list)
    """of each capture, those to keep"""
    clash: bool = False
    """whether two different samples have one number"""
    ids: dict[tuple[int, int], str] = field(default_factory=dict)
    """(capture, number) -> the other id that this sample gets"""
    duplicates: list[str] = field(default_factory=list)
    renamed: dict[tuple[int, int], str] = field(default_factory=dict)


def _distinct(stores: Sequence[CaptureStore]) -> _Distinct:
    found = _Distinct()
    seen: dict[bytes, str] = {}
    names: dict[str, str] = {}
    again: list[tuple[int, int, str, str]] = []
    used = NumberSet()
    for place, store in enumerate(stores):
        numbers, within = NumberSet(), Counter[bytes]()
        for sample in store.samples:
            name = f"sample {sample.sample} of {store.path}" + (f" (id {sample.id})" if sample.id is not None else "")
            mark = _mark(sample)
            within[mark] += 1
            nth = mark + bytes(within[mark])  # a sample that one capture has twice is two samples
            if nth in seen:
                found.duplicates.append(f"{name} is {seen[nth]}")
                continue
            seen[nth] = name
            found.clash |= sample.sample in used
            numbers.add(sample.sample)
            if sample.id is not None and (first := names.setdefault(sample.id, name)) != name:
                again.append((place, sample.sample, sample.id, f"{name} has the id of {first}"))
        used.update(numbers)
        found.numbers.append(numbers)
    for place, number, id, told in again:
        count = 2
        while (other := f"{id}.{count}") in names:
            count += 1
        names[other] = told
        found.ids[place, number] = other
        found.renamed[place, number] = f"{told}: {other}"
    return found


def _mark(sample: Sample) -> bytes:
    own = sample.sample if sample.id is None else None
    what = (own, replace(sample, sample=0, labels=None), json.dumps(sample.labels, sort_keys=True))
    return hashlib.sha256(repr(what).encode("utf-8", "surrogatepass")).digest()
