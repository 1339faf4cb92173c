"""Finds the map for a model: read from its dataflow where its config can be had, else one that ships with hookmap.

A shipped map is a claim about some versions of transformers, which it names. It answers where nothing else can: for an
architecture's name.
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

    `x`: a map file, an architecture's name (`Qwen3ForCausalLM`), a model folder, or a hub id. Of a folder and a hub id
    it is what `discover` reads from the dataflow of the transformers that is installed; a hub id's config comes from
    the local cache, or from the hub, or else from the shipped map of that model. Of an architecture's name it is the
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
    """The shipped map; a warning says where it was not proved on the transformers that is here."""
    here = version("transformers")
    if here not in shipped.proved_on:
        log.warning(
            "the shipped map of %s is proved on transformers %s, and %s is installed: there it may be wrong. Read the "
            "installed one: hookmap discover MODEL; or prove the map: hookmap maps check %s",
            shipped.architecture, ", ".join(shipped.proved_on) or "of no version", here, shipped.model_type,
        )  # fmt: skip
    return shipped


def given_map(map: "ArchitectureMap | str | os.PathLike[str] | None") -> "ArchitectureMap | None":
    """A map as a caller may give it: itself, or what `load_map` takes. Raises as that one."""
    return load_map(os.fspath(map)) if isinstance(map, str | os.PathLike) else map


def _not_found(name: str, reason: str, near_to: list[str] | None = None) -> MapNotFoundError:
    hint = shipped_near(*(near_to or [name]))
    return MapNotFoundError(
        f"no map for {name}: {reason.rstrip('.')}. {hint} Make one: hookmap discover {name} -o FILE"
    )
