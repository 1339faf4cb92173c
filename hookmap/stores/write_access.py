"""May this process write a capture in this folder? And what to say when the disk refuses."""

import errno
import os
import re
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind: two writers are then the user's to avoid
    fcntl = None  # type: ignore[assignment]

from hookmap.errors import StoreError
from hookmap.stores.durable_files import AppendedFile, temporary
from hookmap.stores.location import local
from hookmap.stores.manifest import MANIFEST
from hookmap.stores.shard import SHARD_FOLDER
from hookmap.stores.table import SAMPLES, SHARDS
from hookmap.wording import counted


def lock(file: AppendedFile, folder: Path, option: str = "-o") -> None:
    """Let one writer in at a time: lock `file` until this process ends, however it ends. Raises StoreError.

    option: the command line's, which names the folder.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise StoreError(
            f"{folder} is being written by another process. Wait for it to end, or give another folder: {option} DIR"
        ) from None


def refuse_used(folder: Path) -> None:
    """Refuse a folder whose content could be lost, and what is no local folder. Raises StoreError."""
    if re.match(r"[a-z0-9+.-]{2,}:/", str(folder)):  # a Path has lost the second slash
        raise StoreError(f"{folder} is a URL: captures are written to local folders only. Write to one, then copy it.")
    local(folder)
    if (folder / MANIFEST).exists():
        raise StoreError(
            f"{folder} already holds a capture. Go on with it (the same command with --resume), "
            f"look at it (hookmap inspect {folder}), or write to another folder: -o DIR"
        )
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file: expected a new or empty folder. Write to another one: -o DIR")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise StoreError(f"cannot write to {folder}: no permission in {there}. Write to another folder: -o DIR")
    if there != folder:
        return
    # What `create` itself leaves when it is killed before the manifest is there, holds nothing and is no obstacle.
    ours = {SHARD_FOLDER, SAMPLES, SHARDS, temporary(folder / MANIFEST).name}
    strange = sorted(file.name for file in folder.iterdir() if file.name not in ours)
    full = [name for name in (SAMPLES, SHARDS) if (folder / name).is_file() and (folder / name).stat().st_size]
    full += [SHARD_FOLDER] if (folder / SHARD_FOLDER).is_dir() and any((folder / SHARD_FOLDER).iterdir()) else []
    if strange or full:
        raise StoreError(
            f"{folder} is not empty and is no capture: it holds {', '.join((strange + full)[:5])}. "
            "Nothing was written. Write to a new folder: -o DIR"
        )


def cannot_write(folder: Path, error: OSError, kept: int) -> StoreError:
    """The error for a disk that refuses a write: what is kept, and how to go on."""
    wrong = f"cannot write to {folder}: {error.strerror or error}."
    if not (folder / MANIFEST).exists():
        return StoreError(f"{wrong} Nothing was written. Write to another folder: -o DIR")
    samples = f"{counted(kept, 'finished sample')} {'is' if kept == 1 else 'are'}"
    mend = f"Make room (df -h {folder})" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Correct that"
    return StoreError(
        f"{wrong} {samples} kept and can be read; what was in flight is not.\n"
        f"{mend}, then go on: the same `hookmap capture` command with -o {folder} --resume"
    )
