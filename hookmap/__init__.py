"""hookmap: name a tensor once (`resid_mid`, layers 8, 12, 16) and read it from any Hugging Face causal language model.

`import hookmap` is light: torch and transformers are imported by the first function that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hookmap._version import __version__
from hookmap.errors import (
    CaptureError,
    DataError,
    DeployError,
    DiscoveryError,
    HookmapDeprecationWarning,
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
    from hookmap import metrics
    from hookmap.analysis.dictionaries.loading import load_dictionary
    from hookmap.analysis.examples.files import open_examples
    from hookmap.analysis.jacobian_lens import load_jacobian_lens
    from hookmap.analysis.reductions.files import open_statistics
    from hookmap.capture.interventions.functions import apply, watch
    from hookmap.capture.result import Capture
    from hookmap.datasets.pairs import Pair, load_pairs
    from hookmap.datasets.records import load_prompts
    from hookmap.discovery.discover import discover
    from hookmap.discovery.library import load_map
    from hookmap.maps.document import ArchitectureMap
    from hookmap.maps.selectors import Selector
    from hookmap.model import open
    from hookmap.services.nnsight_server import open_remote
    from hookmap.services.ray.model import open_on_ray
    from hookmap.stores import open_store
    from hookmap.verification.verify import verify
    from hookmap.vllm.model import open_on_vllm

__all__ = [
    "ArchitectureMap",
    "Capture",
    "CaptureError",
    "DataError",
    "DeployError",
    "DiscoveryError",
    "HookmapDeprecationWarning",
    "HookmapError",
    "InterventionError",
    "MapError",
    "MapMismatchError",
    "MapNotFoundError",
    "ModelError",
    "Pair",
    "SelectionError",
    "Selector",
    "StoreError",
    "TokenizerError",
    "__version__",
    "apply",
    "discover",
    "load_dictionary",
    "load_jacobian_lens",
    "load_map",
    "load_pairs",
    "load_prompts",
    "metrics",
    "open",
    "open_examples",
    "open_on_ray",
    "open_on_vllm",
    "open_remote",
    "open_statistics",
    "open_store",
    "verify",
    "watch",
]

# Public name -> the module that holds it, imported when the name is first used (PEP 562).
_HOMES = {
    "ArchitectureMap": "hookmap.maps.document",
    "Capture": "hookmap.capture.result",
    "Pair": "hookmap.datasets.pairs",
    "Selector": "hookmap.maps.selectors",
    "apply": "hookmap.capture.interventions.functions",
    "discover": "hookmap.discovery.discover",
    "load_dictionary": "hookmap.analysis.dictionaries.loading",
    "load_jacobian_lens": "hookmap.analysis.jacobian_lens",
    "load_map": "hookmap.discovery.library",
    "load_pairs": "hookmap.datasets.pairs",
    "load_prompts": "hookmap.datasets.records",
    "open": "hookmap.model",
    "open_examples": "hookmap.analysis.examples.files",
    "open_on_ray": "hookmap.services.ray.model",
    "open_on_vllm": "hookmap.vllm.model",
    "open_remote": "hookmap.services.nnsight_server",
    "open_statistics": "hookmap.analysis.reductions.files",
    "open_store": "hookmap.stores",
    "verify": "hookmap.verification.verify",
    "watch": "hookmap.capture.interventions.functions",
}


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return import_module("hookmap.metrics")
    if name not in _HOMES:
        raise AttributeError(f"module 'hookmap' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
