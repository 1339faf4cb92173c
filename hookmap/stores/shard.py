"""One shard: a safetensors file, written as a whole; read by its header and only the bytes asked for.

The `safetensors` package serialises from memory and hands out views of a mapped file; this module writes tensor by
tensor and reads ranges, in the documented format (https://huggingface.co/docs/safetensors):

    8 bytes   length n of the header, unsigned, little-endian
    n bytes   JSON: {"name": {"dtype": "BF16", "shape": [rows, d], "data_offsets": [begin, end]}, …}, space-padded
    the rest  the tensors' bytes, little-endian, C order, without gaps; offsets count from here
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from hookmap.documents import read_json
from hookmap.errors import StoreError
from hookmap.stores.durable_files import beside, put_in_place, write_draft
from hookmap.stores.location import Location, reading

DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' name of each dtype that a shard can hold"""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

SHARD_FOLDER = "shards"
ALIGN = 8
_ALONE = 2**14
"""bytes of a piece that is written by itself: copying it would cost more than a call of the system"""
HEADER_LIMIT = 100_000_000
"""bytes; the safetensors package refuses longer headers too"""


@dataclass(frozen=True)
class Block:
    """One tensor to be written: pieces of rows, in order."""

    name: str
    rows: int
    pieces: Sequence[torch.Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.pieces[0].shape[1:])

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.pieces[0].element_size()


@dataclass(frozen=True)
class ShardInfo:
    """One line of the table of shards."""

    shard: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class WrittenShard:
    """A shard that has been given to the system. It counts once its checksum is there and it is durable."""

    bytes: int
    checksum: "Future[str]"
    placed: "Future[None]"

    def info(self, shard: int) -> ShardInfo:
        """Its line as number `shard`, once it is durable, but for its name in the folder. Raises OSError."""
        self.placed.result()
        return ShardInfo(shard, self.bytes, self.checksum.result())


@dataclass(frozen=True)
class Stored:
    """One tensor in a shard, as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """of its first byte, from the start of the file"""

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.row_bytes


def shard_name(shard: int) -> str:
    """`000012.safetensors`"""
    return f"{shard:06d}.safetensors"


def is_shard(name: str) -> bool:
    """Whether `shard_name` gives such names."""
    return name.endswith(".safetensors") and name.removesuffix(".safetensors").isdecimal()


def write_shard(path: Path, blocks: Sequence[Block]) -> WrittenShard:
    """Write one shard, whole or not at all. Its checksum is made, and it becomes durable, while the caller goes on.

    What comes in small pieces is copied, all of the shard at most; no row may change before the checksum is there.
    Raises OSError.
    """
    header = encode_header(blocks, {"format": "pt"})
    views = [memoryview(header), *chain.from_iterable(views_of(block.pieces) for block in blocks)]
    checksum = beside(lambda: _sha256(views))
    write_draft(path, views)
    return WrittenShard(sum(map(len, views)), checksum, beside(lambda: put_in_place(path)))


def _sha256(views: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for view in views:
        digest.update(view)
    return digest.hexdigest()


def encode_header(blocks: Sequence[Block], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes before the tensors."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for block in blocks:
        begin, end = end, end + block.bytes
        dtype = NAMES[block.pieces[0].dtype]
        header[block.name] = {"dtype": dtype, "shape": block.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def views_of(pieces: Sequence[torch.Tensor]) -> Iterator[memoryview]:
    """The bytes of rows that come in pieces: large ones as they are, small ones joined."""
    joined = len(pieces) > 1 and min(piece.nbytes for piece in pieces) < _ALONE
    yield from (bytes_of(some) for some in ([pieces] if joined else [[piece] for piece in pieces]))


def bytes_of(pieces: Sequence[torch.Tensor]) -> memoryview:
    """The bytes of rows that come in pieces."""
    whole = pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces))
    return whole.contiguous().flatten().view(torch.uint8).numpy().data


def read_header(path: Location) -> dict[str, Stored]:
    """The tensors of a shard. Reads the header only.

    Raises StoreError where the file is missing, cut short, too long, or no safetensors file.
    """
    missing = _broken(path, "a shard that the table of samples names", "no such file")
    with reading(path, missing), path.open("rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise _broken(path, "a safetensors header", f"a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        tensors = read_json(text)
        tensors.pop("__metadata__", None)
        found = {name: _stored(entry, 8 + length) for name, entry in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, "a safetensors header", f"one that does not parse ({error!r})") from error
    end = 8 + length + sum(stored.bytes for stored in found.values())
    if size != end:
        raise _broken(path, f"{end} bytes, as its header says", f"{size} bytes")
    return found


def _stored(entry: dict[str, Any], start: int) -> Stored:
    begin, end = entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (begin, end, *entry["shape"])):
        raise ValueError(f"expected whole numbers, found shape {entry['shape']} and offsets {entry['data_offsets']}")
    stored = Stored(entry["dtype"], tuple(entry["shape"]), start + begin)
    if end - begin != stored.bytes:
        raise ValueError(f"shape {list(stored.shape)} of {stored.dtype} is not {end - begin} bytes")
    return stored


def read_into(path: Location, ranges: Sequence[tuple[int, memoryview]]) -> None:
    """Fill each view with the file's bytes from its offset on, and read nothing else. Raises StoreError."""
    with reading(path), path.open("rb", buffering=0) as file:
        for offset, view in ranges:
            file.seek(offset)
            done = 0
            while done < len(view):
                taken = file.readinto(view[done:])
                if not taken:
                    raise _broken(path, f"{len(view)} bytes at {offset}", f"{done} bytes")
                done += taken


def sha256_of(path: Location) -> str:
    """The file's checksum."""
    digest, piece = hashlib.sha256(), bytearray(1 << 20)
    with reading(path), path.open("rb", buffering=0) as file:
        while taken := file.readinto(piece):
            digest.update(memoryview(piece)[:taken])
    return digest.hexdigest()


def _broken(path: Location, expected: str, found: str) -> StoreError:
    return StoreError(
        f"{path} is broken: expected {expected}, found {found}.\n"
        f"See every problem of this capture: hookmap inspect {path.parent.parent} --verify"
    )
