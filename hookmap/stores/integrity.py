"""Is a capture folder sound? Every problem, found by reading all of it; nothing is changed."""

from collections.abc import Callable, Iterator
from functools import lru_cache

from hookmap.errors import StoreError
from hookmap.stores.durable_files import is_temporary
from hookmap.stores.location import Location, sizes
from hookmap.stores.manifest import Manifest, read_manifest
from hookmap.stores.number_set import NumberSet
from hookmap.stores.shard import SHARD_FOLDER, ShardInfo, read_header, sha256_of, shard_name
from hookmap.stores.sparse import rows_held
from hookmap.stores.table import SAMPLES, SHARDS, Entry, decode_entry, read_shards
from hookmap.stores.table_index import Committed, scan


def problems_of(folder: Location) -> Iterator[str]:
    """One line per problem. What the writer of an unfinished capture has not committed is no problem."""
    try:
        manifest = read_manifest(folder)
        committed = scan(folder / SAMPLES)
        for _ in _shards(folder, committed):
            pass
    except StoreError as error:  # without these there is nothing to hold the rest against
        yield _first_line(error)
        return
    size = 0
    for info in _shards(folder, committed):
        size += info.bytes
        yield from shard_problems(folder / SHARD_FOLDER / shard_name(info.shard), info, manifest)
    yield from _table_problems(folder, manifest, committed)
    yield from count_problems(folder, manifest, len(committed.numbers), committed.rows)
    if manifest.finished:
        yield from _finished_problems(folder, manifest, committed, size)


def _shards(folder: Location, committed: Committed) -> Iterator[ShardInfo]:
    return (info for info, _ in read_shards(folder / SHARDS, committed.shards))


def shard_problems(path: Location, info: ShardInfo, manifest: Manifest) -> Iterator[str]:
    """What is wrong with one shard: all of it is read."""
    try:
        found = read_header(path)
    except StoreError as error:
        yield _first_line(error)
        return
    said = {name: what for spec in manifest.tensors for name, what in spec.stored.items()}
    for name, stored in found.items():
        if said.get(name) != (stored.dtype, stored.shape[1:]):
            row = f"{stored.dtype} rows of {list(stored.shape[1:])}"
            yield f"{path}, tensor {name}: {row} are not what the manifest says"
    if (digest := sha256_of(path)) != info.sha256:
        yield f"{path} was changed: expected sha256 {info.sha256}, found {digest}"


def _table_problems(folder: Location, manifest: Manifest, committed: Committed) -> Iterator[str]:
    path, seen = folder / SAMPLES, NumberSet()

    @lru_cache(maxsize=256)  # memory stays flat; neighbouring samples share shards
    def rows_of(shard: int) -> dict[str, int] | None:
        try:
            header = read_header(folder / SHARD_FOLDER / shard_name(shard))
        except StoreError:  # told before
            return None
        return rows_held({name: stored.shape[0] for name, stored in header.items()})

    with path.open("rb") as file:
        for number in range(1, len(committed.numbers) + 1):
            try:
                entry = decode_entry(file.readline(), path, number)
            except StoreError as error:
                yield _first_line(error)
                continue
            if entry.sample.sample in seen:
                yield f"{path}, line {number}: sample {entry.sample.sample} is there twice"
            seen.add(entry.sample.sample)
            for problem in entry_problems(manifest, committed.shards, entry, rows_of):
                yield f"{path}, line {number}, sample {entry.sample.sample}: {problem}"


def entry_problems(
    manifest: Manifest, shards: int | None, entry: Entry, rows_of: Callable[[int], dict[str, int] | None]
) -> Iterator[str]:
    """What is wrong with one line of the table of samples.

    `shards`: how many there are, where that is known; `rows_of`: rows of each tensor in a shard, None if it is broken.
    """
    for place, spec in enumerate(manifest.tensors):
        reached = 0
        for span in entry.spans:
            if not span.first <= place < span.end:
                continue
            if span.start != reached:
                yield f"{spec.name}: expected a span from row {reached} on, found one from {span.start} on"
            reached = span.start + span.rows
            if shards is not None and span.shard >= shards:
                yield f"{spec.name}: expected a shard under {shards}, found {span.shard}"
            elif (held := rows_of(span.shard)) is not None and span.row + span.rows > held.get(spec.name, 0):
                end, found = span.row + span.rows, held.get(spec.name, 0)
                yield f"{spec.name}: expected {end} rows in shard {span.shard}, found {found}"
        if reached != entry.sample.rows:
            yield f"{spec.name}: expected {entry.sample.rows} rows in spans, found {reached}"
    if entry.sample.prompt_tokens > len(entry.sample.token_ids):
        ids = len(entry.sample.token_ids)
        yield f"expected {entry.sample.prompt_tokens} token ids of the prompt, found {ids} in all"


def count_problems(folder: Location, manifest: Manifest, samples: int, rows: int) -> Iterator[str]:
    """Where the table of samples is not as long as the manifest says; an unfinished capture's may be longer."""
    said = (manifest.counts.samples, manifest.counts.rows)
    if (samples, rows) != said if manifest.finished else samples < said[0] or rows < said[1]:
        yield (
            f"{folder / SAMPLES}: expected {said[0]} samples of {said[1]} rows, as the manifest says, "
            f"found {samples} of {rows}"
        )


def altered_tables(folder: Location, manifest: Manifest) -> dict[str, str]:
    """Tables of a finished capture that have changed since, each with what is wrong."""
    wrong = {}
    for name, expected in (manifest.sha256 or {}).items():
        try:
            digest = sha256_of(folder / name)
        except StoreError as error:
            wrong[name] = _first_line(error)
            continue
        if digest != expected:
            wrong[name] = f"{folder / name} was changed: expected sha256 {expected}, found {digest}"
    return wrong


def _finished_problems(folder: Location, manifest: Manifest, committed: Committed, size: int) -> Iterator[str]:
    said, found = (manifest.counts.shards, manifest.counts.bytes), (committed.shards, size)
    if said != found:
        yield f"{folder}: expected {said[0]} shards of {said[1]} bytes, as the manifest says, found {found}"
    yield from altered_tables(folder, manifest).values()
    known = {shard_name(shard) for shard in range(committed.shards)}
    for name in sorted(sizes(folder / SHARD_FOLDER)):
        if name not in known:
            left = "left over from a write that did not end" if is_temporary(name) else "named by no table"
            yield f"{folder / SHARD_FOLDER / name} is {left}"


def _first_line(error: StoreError) -> str:
    return str(error).splitlines()[0]
