"""Where activations go, and where they are read from again: memory, or a folder of safetensors shards.

    interface.py   what every store answers: samples, texts, tokens, read, [point, layer], norms
    ledger.py      what every sink checks: rows in order, one dtype and shape per tensor, nothing missing at the end
    memory.py      a store and sink in memory
    folder.py      writes a capture folder step by step; whole_writer.py one that is complete or none
    reader.py      reads a capture folder; integrity.py checks one
    background.py  the same from a thread; dataset.py gives rows in random order
    copying.py     repairs and merges captures; export.py and importing.py know other programs' layouts
    location.py    a folder here, or one that fsspec reaches
    durable_files.py   where bytes reach the disk: whole files, and lines that a crash cannot take back
    write_access.py    who may write to a folder, and what to say when the disk refuses

The parts of a folder: manifest.py, table.py and table_index.py, shard.py, buffer.py. What its writers share:
group_writer.py, before_interventions.py, closing.py, number_set.py.

The format, byte by byte, is in docs/store.md. This package knows activations, and nothing of models and maps.
"""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hookmap.stores.reader import CaptureStore


def open_store(path: "str | PathLike[str]") -> "CaptureStore":
    """The capture in folder `path`, finished or still being written; reads the manifest and the table, no tensor.

    `path`: of a folder here, or a URL that fsspec understands (`s3://bucket/run`): it is read by ranges, not copied.
    Raises StoreError where the folder is no capture, or a broken one.
    """
    from hookmap.stores.reader import CaptureStore  # torch is imported here, not by `import hookmap`

    return CaptureStore(path)
