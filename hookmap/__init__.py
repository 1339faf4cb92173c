"""hookmap: name a tensor once (`resid_mid`, layers 8, 12, 16) and read it from any Hugging Face causal language model.

`import hookmap` is light: torch and transformers are imported by the first function that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hookmap.errors import (
    CaptureError,
    DataError,
    DeployError,
    DiscoveryError,
    HookmapError,
    InterventionError,
    MapError,
    MapMismatchError,
    MapNotFoundError,
    ModelError,
    SelectionError,
    StoreError,
    TokenizerError,
)

if TYPE_CHECKING:
    from hookmap.architecture_map import ArchitectureMap
    from hookmap.capture import Capture
    from hookmap.datasets import load_prompts
    from hookmap.discovery import discover
    from hookmap.library import load_map
    from hookmap.model import open
    from hookmap.remote_model import open_remote
    from hookmap.scale.model import open_on_ray
    from hookmap.selectors import Selector
    from hookmap.stores import open_store
    from hookmap.verification import verify

__version__ = "0.1.0"

__all__ = [
    "ArchitectureMap",
    "Capture",
    "CaptureError",
    "DataError",
    "DeployError",
    "DiscoveryError",
    "HookmapError",
    "InterventionError",
    "MapError",
    "MapMismatchError",
    "MapNotFoundError",
    "ModelError",
    "SelectionError",
    "Selector",
    "StoreError",
    "TokenizerError",
    "__version__",
    "discover",
    "load_map",
    "load_prompts",
    "open",
    "open_on_ray",
    "open_remote",
    "open_store",
    "verify",
]

# Public name -> the module that holds it, imported when the name is first used (PEP 562).
_HOMES = {
    "ArchitectureMap": "hookmap.architecture_map",
    "Capture": "hookmap.capture",
    "Selector": "hookmap.selectors",
    "discover": "hookmap.discovery",
    "load_map": "hookmap.library",
    "load_prompts": "hookmap.datasets",
    "open": "hookmap.model",
    "open_on_ray": "hookmap.scale.model",
    "open_remote": "hookmap.remote_model",
    "open_store": "hookmap.stores",
    "verify": "hookmap.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hookmap' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
