"""Finds the map for what a user names: a file, a model or an architecture.

A model's map is read from its dataflow, under the transformers that is installed. A shipped map is proved on the
versions of transformers that it names; it is used where only an architecture's name is given.
"""

import logging
import os
from importlib.metadata import version
from pathlib import Path

from hookmap.discovery.discover import discover
from hookmap.errors import MapNotFoundError, ModelError
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import load
from hookmap.maps.shipped import mappings_folder, shipped_architectures, shipped_near

log = logging.getLogger("hookmap")


def load_map(x: str | Path) -> ArchitectureMap:
    """The map for `x`, without weights.

    `x`: a map file, an architecture's name (`Qwen3ForCausalLM`), a model folder, or a hub id. For a folder and a hub
    id it is what `discover` reads from the dataflow under the installed transformers; a hub id's config comes from the
    local cache, else from the hub, else from the shipped map of that model. For an architecture's name it is the
    shipped map, with a warning where it is not proved on the installed transformers. Raises MapNotFoundError with what
    was tried, MapError where the file is broken, DiscoveryError where the dataflow is not understood.
    """
    path, name = Path(x), str(x)
    if path.is_file():
        return load(path)
    if not path.is_dir():
        if name in shipped_architectures():
            return _claimed(load(mappings_folder() / f"{name}.json"))
        if name.endswith(".json"):
            raise MapNotFoundError(f"there is no map file {name}. Make one: hookmap discover MODEL -o {name}")
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise _not_found(
                name, "it is no file, no folder, no hub id (org/name) and no architecture with a shipped map"
            )

    try:
        return discover(path if path.is_dir() else name)
    except ModelError as error:
        raise _not_found(name, str(error)) from error


def _claimed(shipped: ArchitectureMap) -> ArchitectureMap:
    """The shipped map, with a warning where it is not proved on the installed transformers."""
    here = version("transformers")
    if here not in shipped.proved_on:
        log.warning(
            "the shipped map of %s is proved on transformers %s, and %s is installed: there it may be wrong. Read the "
            "installed one: hookmap discover MODEL; or prove the map: hookmap maps check %s",
            shipped.architecture, ", ".join(shipped.proved_on) or "of no version", here, shipped.model_type,
        )  # fmt: skip
    return shipped


def given_map(map: "ArchitectureMap | str | os.PathLike[str] | None") -> "ArchitectureMap | None":
    """The map that a caller gave: an ArchitectureMap as it is, or what `load_map` takes. Raises as `load_map` does."""
    return load_map(os.fspath(map)) if isinstance(map, str | os.PathLike) else map


def _not_found(name: str, reason: str, near_to: list[str] | None = None) -> MapNotFoundError:
    hint = shipped_near(*(near_to or [name]))
    return MapNotFoundError(
        f"no map for {name}: {reason.rstrip('.')}. {hint} Make one: hookmap discover {name} -o FILE"
    )
