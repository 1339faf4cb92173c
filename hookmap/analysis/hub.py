"""Maps, steering vectors, probes, dictionaries and captures on the Hugging Face hub: one repository, or a folder, each.

The files are those that `save` writes: JSON and safetensors. Nothing is pickled, and nothing is asked of a repository
but files of known names.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from hookmap.analysis.dictionaries.dictionary import Dictionary
from hookmap.analysis.dictionaries.loading import CONFIG, WEIGHTS, load_dictionary
from hookmap.analysis.dictionaries.saving import save_dictionary
from hookmap.analysis.probes.saved import Probes, load_probes
from hookmap.analysis.steering import SteeringVector, load_vector
from hookmap.capture.result import Capture
from hookmap.errors import SelectionError, StoreError
from hookmap.loading.hub import explain, is_hub_id, quiet, reachable
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import load
from hookmap.stores import open_store
from hookmap.stores.before_interventions import BEFORE
from hookmap.stores.manifest import MANIFEST
from hookmap.stores.reader import CaptureStore
from hookmap.stores.shard import SHARD_FOLDER
from hookmap.stores.table import SAMPLES, SHARDS
from hookmap.wording import counted

Found = ArchitectureMap | SteeringVector | Probes | Dictionary | CaptureStore
Shared = Found | Capture
RepoType = Literal["model", "dataset"]
MAP, VECTOR, PROBES = "map.json", "vector.safetensors", "probes.safetensors"
_CAPTURE = (MANIFEST, SAMPLES, SHARDS, f"{SHARD_FOLDER}/*.safetensors")
"""the files of a capture, and of the rows before interventions inside it"""
_READ: dict[tuple[str, ...], Callable[[Path], Found]] = {
    (MAP,): load,
    (VECTOR,): load_vector,
    (PROBES,): load_probes,
    (CONFIG, WEIGHTS): load_dictionary,
    (MANIFEST, SAMPLES): open_store,
}
"""files of a kind -> what reads the first of them, or for several their folder"""
_CARD = """---
library_name: hookmap
tags: [hookmap, interpretability]
---

# {title}

{what}

```python
{code}
```
"""


def push_to_hub(
    thing: Shared,
    repo_id: str,
    *,
    folder: str = "",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "",
) -> str:
    """Upload a map, a steering vector, probes, a dictionary or a capture in one commit, and give the commit's address.

    A finished capture, or the store of one, goes to a dataset repository, all else to a model repository.
    repo_id: `owner/name`, made where it is not there, `private` or not. folder: in it; several things of one kind each
    need their own. revision: a branch that is there. token: else the one of `hf auth login`. A folder without a
    README.md gets one that says how to load this; shards of a capture that was there before are deleted. Raises
    SelectionError for another thing or a wrong folder, StoreError where a capture is not finished or the hub refuses.
    """
    inside = _inside(folder)
    _refuse_bad_id(repo_id)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    where: dict[str, Any] = {"repo_id": repo_id, "repo_type": _repo_type(thing)}
    with tempfile.TemporaryDirectory() as scratch:
        files = {str(PurePosixPath(inside, name)): path for name, path in _files(thing, Path(scratch)).items()}
        api = HfApi(token=token)
        try:
            with quiet():
                api.create_repo(**where, private=private, exist_ok=True)
                there = api.list_repo_files(**where, revision=revision)
                if (readme := str(PurePosixPath(inside, "README.md"))) not in there:
                    files[readme] = Path(scratch, "README.md")
                    files[readme].write_text(_card(thing, repo_id, inside), encoding="utf-8")
                done = api.create_commit(
                    **where,
                    operations=[
                        *(CommitOperationAdd(name, path) for name, path in files.items()),
                        *(CommitOperationDelete(name) for name in _left_over(there, inside, files)),
                    ],
                    revision=revision,
                    commit_message=commit_message or f"{_what(thing)}, by hookmap",
                )
        except Exception as error:  # the hub's client has errors of several libraries
            raise StoreError(f"cannot upload to {repo_id}: {explain(error, repo_id)}") from error
    return str(done.commit_url)


def from_pretrained(
    repo_id: str,
    *,
    folder: str = "",
    revision: str | None = None,
    token: str | None = None,
    repo_type: RepoType = "model",
) -> Found:
    """What `push_to_hub` put there; from the local cache without a hub. A capture comes as `open_store` gives it.

    repo_type: "dataset" for a capture. Raises SelectionError for a wrong id, folder or repo_type, StoreError where the
    repository holds none of them, or several, or a broken file, or cannot be reached; MapError for a broken map.
    """
    inside = _inside(folder)
    _refuse_bad_id(repo_id)
    from huggingface_hub import snapshot_download

    if repo_type not in get_args(RepoType):
        raise SelectionError(f"repo_type {repo_type!r}: expected one of {', '.join(get_args(RepoType))}.")
    names = [*(name for files in _READ for name in files), *_CAPTURE, *(f"{BEFORE}/{name}" for name in _CAPTURE)]
    try:
        with quiet():
            root = snapshot_download(
                repo_id,
                repo_type=repo_type,
                revision=revision,
                token=token,
                allow_patterns=[f"{inside}/{name}" if inside else name for name in names],
                local_files_only=not reachable(),
            )
    except Exception as error:
        other = "" if repo_type == "dataset" else ' A capture is in a dataset repository: repo_type="dataset".'
        raise StoreError(f"cannot load {repo_id}: {explain(error, repo_id)}{other}") from error
    path = Path(root, inside)
    found = [files for files in _READ if all((path / name).is_file() for name in files)]
    where = f"{repo_id}/{inside}" if inside else repo_id
    if len(found) != 1:
        held = " and ".join(", ".join(files) for files in found) or "none of them"
        known = ", or ".join(" with ".join(files) for files in _READ)
        raise StoreError(
            f"{where}: expected {known}, found {held}. Name the folder: from_pretrained({repo_id!r}, folder=…)"
        )
    (files,) = found
    return _READ[files](path / files[0] if len(files) == 1 else path)


def _files(thing: Shared, scratch: Path) -> dict[str, Path]:
    """Name in the repository -> file. What is not in a folder already is written to `scratch`."""
    store = thing.store if isinstance(thing, Capture) else thing
    if isinstance(store, CaptureStore):
        return _files_of_capture(store)
    if isinstance(thing, ArchitectureMap):
        thing.save(scratch / MAP)
    elif isinstance(thing, SteeringVector):
        thing.save(scratch / VECTOR)
    elif isinstance(thing, Probes):
        thing.save(scratch / PROBES)
    elif isinstance(thing, Dictionary):
        save_dictionary(thing, scratch)
    elif isinstance(thing, Capture):
        return _files_of_capture(open_store(thing.save(scratch / "capture")))
    else:
        raise SelectionError(
            f"expected a map, a steering vector, probes, a dictionary or a capture, got a {type(thing).__name__}. "
            "Other files: hf upload REPOSITORY FILE"
        )
    return {file.name: file for file in scratch.iterdir()}


def _files_of_capture(store: CaptureStore) -> dict[str, Path]:
    folder = store.path
    if not isinstance(folder, Path):
        raise StoreError(f"{folder} is not on this machine: copy it to a folder, and open that.")
    if not store.finished:
        raise StoreError(f"{folder} is not finished: go on with it, hookmap capture … -o {folder} --resume")
    patterns = [*_CAPTURE, *(f"{BEFORE}/{name}" for name in _CAPTURE)]
    found = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return {file.relative_to(folder).as_posix(): file for file in found}


def _left_over(there: Iterable[str], inside: str, files: Mapping[str, Path]) -> list[str]:
    """Files of an earlier capture in the same place, which the new one would be thought to have."""
    if str(PurePosixPath(inside, MANIFEST)) not in files:
        return []
    patterns = [str(PurePosixPath(inside, before, name)) for before in ("", BEFORE) for name in _CAPTURE]
    return [name for name in there if name not in files and any(fnmatchcase(name, each) for each in patterns)]


def _inside(folder: str) -> str:
    """The folder in a repository, `a/b`. Raises SelectionError for one that leads out of it."""
    path = PurePosixPath(folder)
    wrong = path.is_absolute() or ".." in path.parts or "\\" in folder or any(c in folder for c in "*?[]\0")
    if wrong:
        raise SelectionError(
            f"{folder!r} is no folder in a repository: expected names with / between, such as vectors/joy."
        )
    return "" if folder in ("", ".") else str(path)


def _refuse_bad_id(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SelectionError(f"{repo_id!r} is no repository: expected owner/name.") from error


def _what(thing: Shared) -> str:
    if isinstance(thing, ArchitectureMap):
        return f"Map of {thing.architecture}"
    if isinstance(thing, SteeringVector):
        return f"Steering vector of {thing.about.point}"
    if isinstance(thing, Probes):
        return "Probes"
    if isinstance(thing, Dictionary):
        return "Dictionary"
    return f"Capture of {', '.join(thing.points)} ({counted(len(thing.samples), 'sample')})"


def _repo_type(thing: Shared) -> RepoType:
    return "dataset" if isinstance(thing, (Capture, CaptureStore)) else "model"


def _card(thing: Shared, repo_id: str, folder: str) -> str:
    inside = f', folder="{folder}"' if folder else ""
    inside += ', repo_type="dataset"' if _repo_type(thing) == "dataset" else ""
    code = f'from hookmap.analysis.hub import from_pretrained\n\nfound = from_pretrained("{repo_id}"{inside})'
    about: Any = getattr(thing, "manifest", getattr(thing, "about", None))
    model = thing.model_id if isinstance(thing, ArchitectureMap) else getattr(about, "model", None)
    named = isinstance(model, str) and "/" in model and is_hub_id(model)  # no path of the uploader's own machine
    of = f"{_what(thing)}{f', of {model}' if named else ''}. Made with hookmap."
    return _CARD.format(title=repo_id.rpartition("/")[2], what=of, code=code)
