"""Maps, steering vectors, probes and dictionaries on the Hugging Face hub: one repository, or one folder of it, each.

The files are those that `save` writes: JSON and safetensors. Nothing is pickled, and nothing is asked of a repository
but files of known names.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from hookmap.analysis.dictionaries.dictionary import Dictionary
from hookmap.analysis.dictionaries.loading import CONFIG, WEIGHTS, load_dictionary
from hookmap.analysis.dictionaries.saving import save_dictionary
from hookmap.analysis.probes.saved import Probes, load_probes
from hookmap.analysis.steering import SteeringVector, load_vector
from hookmap.errors import SelectionError, StoreError
from hookmap.loading.hub import explain, is_hub_id, quiet, reachable
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import load

Shared = ArchitectureMap | SteeringVector | Probes | Dictionary
MAP, VECTOR, PROBES = "map.json", "vector.safetensors", "probes.safetensors"
_READ: dict[tuple[str, ...], Callable[[Path], Shared]] = {
    (MAP,): load,
    (VECTOR,): load_vector,
    (PROBES,): load_probes,
    (CONFIG, WEIGHTS): load_dictionary,
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
    """Upload a map, a steering vector, probes or a dictionary in one commit, and give the commit's address.

    repo_id: `owner/name`, made where it is not there, `private` or not. folder: in it; several things of one kind each
    need their own. revision: a branch that is there. token: else the one of `hf auth login`. A repository without a
    README.md gets one that says how to load this. Raises SelectionError for another thing or a wrong folder, StoreError
    where the hub refuses.
    """
    inside = _inside(folder)
    _refuse_bad_id(repo_id)
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as scratch:
        _write(thing, Path(scratch))
        api = HfApi(token=token)
        try:
            with quiet():
                api.create_repo(repo_id, private=private, exist_ok=True)
                if not api.file_exists(repo_id, "README.md", revision=revision):
                    (Path(scratch) / "README.md").write_text(_card(thing, repo_id, inside), encoding="utf-8")
                done = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=scratch,
                    path_in_repo=inside or None,
                    revision=revision,
                    commit_message=commit_message or f"{_what(thing)}, by hookmap",
                )
        except Exception as error:  # the hub's client has errors of several libraries
            raise StoreError(f"cannot upload to {repo_id}: {explain(error, repo_id)}") from error
    return str(done.commit_url)


def from_pretrained(repo_id: str, *, folder: str = "", revision: str | None = None, token: str | None = None) -> Shared:
    """The map, steering vector, probes or dictionary that `push_to_hub` put there; from the local cache without a hub.

    Raises SelectionError for a wrong id or folder, StoreError where the repository holds none, or several, or a broken
    file, or cannot be reached; MapError for a broken map.
    """
    inside = _inside(folder)
    _refuse_bad_id(repo_id)
    from huggingface_hub import snapshot_download

    names = [name for files in _READ for name in files]
    try:
        with quiet():
            root = snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                allow_patterns=[f"{inside}/{name}" if inside else name for name in names],
                local_files_only=not reachable(),
            )
    except Exception as error:
        raise StoreError(f"cannot load {repo_id}: {explain(error, repo_id)}") from error
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


def _write(thing: Shared, folder: Path) -> None:
    if isinstance(thing, ArchitectureMap):
        thing.save(folder / MAP)
    elif isinstance(thing, SteeringVector):
        thing.save(folder / VECTOR)
    elif isinstance(thing, Probes):
        thing.save(folder / PROBES)
    elif isinstance(thing, Dictionary):
        save_dictionary(thing, folder)
    else:
        raise SelectionError(
            f"expected a map, a steering vector, probes or a dictionary, got a {type(thing).__name__}. "
            "A capture's folder: hf upload REPOSITORY DIR --repo-type dataset"
        )


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
    return "Dictionary"


def _card(thing: Shared, repo_id: str, folder: str) -> str:
    inside = f', folder="{folder}"' if folder else ""
    code = f'from hookmap.analysis.hub import from_pretrained\n\nfound = from_pretrained("{repo_id}"{inside})'
    about: Any = getattr(thing, "about", None)
    model = thing.model_id if isinstance(thing, ArchitectureMap) else getattr(about, "model", None)
    named = isinstance(model, str) and "/" in model and is_hub_id(model)  # no path of the uploader's own machine
    of = f"{_what(thing)}{f', of {model}' if named else ''}. Made with hookmap."
    return _CARD.format(title=repo_id.rpartition("/")[2], what=of, code=code)
