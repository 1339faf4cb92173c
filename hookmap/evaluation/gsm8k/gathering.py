"""Copy the captures of all batches into one, with ids and labels. Resumes after a kill."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hookmap.activations import Activation, call_of
from hookmap.errors import StoreError
from hookmap.stores import open_store
from hookmap.stores.folder import FolderWriter
from hookmap.stores.manifest import MANIFEST
from hookmap.stores.reader import CaptureStore


@dataclass(frozen=True)
class Taken:
    """A sample of a batch's capture, with its new number, id and labels."""

    capture: str
    """the batch's folder"""
    sample: int
    number: int
    id: str
    labels: Mapping[str, Any]


def is_gathered(target: Path) -> bool:
    """Whether the target capture exists and is finished."""
    return (target / MANIFEST).is_file() and open_store(target).finished


def gather(batches: Path, target: Path, taken: Sequence[Taken], settings: Mapping[str, Any]) -> None:
    """Copy every row of `taken` into the capture `target`, tensors as they are. Raises StoreError.

    settings: of the run, for the manifest.
    """
    stores: dict[str, CaptureStore] = {}
    for one in taken:
        if not one.capture.isdecimal():
            raise StoreError(f"{batches}: the log names a capture {one.capture!r}, expected a number.")
        if one.capture not in stores:
            stores[one.capture] = open_store(batches / one.capture)
    if not stores:
        return
    manifest = next(iter(stores.values())).manifest
    kept = {name: manifest.settings[name] for name in ("kept",) if name in manifest.settings}
    fresh = type(manifest).model_validate(
        manifest.model_dump() | {"finished": False, "sha256": None, "settings": {**settings, **kept}, "runs": ()}
    )
    writing = FolderWriter.resume if (target / MANIFEST).exists() else FolderWriter.create
    with writing(target, fresh) as writer:
        finished = writer.finished  # made anew at each asking
        for one in taken:
            if one.number not in finished:
                _copy(stores[one.capture], one, writer)


def _copy(store: CaptureStore, one: Taken, writer: FolderWriter) -> None:
    old = store.sample(one.sample)
    for key in store.keys:
        rows = store.rows_at(one.sample, key, range(old.rows))
        writer.write(Activation(one.number, key[0], key[1], 0, rows, call_of(key)))
    writer.finish(replace(old, sample=one.number, id=one.id, labels=one.labels))
