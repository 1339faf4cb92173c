"""The shipped maps: discovered at full size without weights, and verified on a narrow copy, one architecture each.

`build` makes one; `build_all` makes many, in parallel and resuming, and says of each how it ended.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hookmap.architecture_map import ArchitectureMap

Status = Literal["SUPPORTED", "UNAVAILABLE", "ERROR", "SILENTLY WRONG"]


@dataclass(frozen=True)
class Entry:
    """How one model type came out."""

    model_type: str
    status: Status
    architecture: str = ""
    kinds: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    """per-layer points that every called layer has"""
    missing: dict[str, str] = field(default_factory=dict)
    """point -> why some layer lacks it"""
    detail: str = ""
    seconds: float = 0.0


def build(config: Any, model_id: str | None = None) -> ArchitectureMap:
    """The map of a config, with what verified it. Raises DiscoveryError where a check fails: nothing wrong is kept."""
    from hookmap.discovery import discover
    from hookmap.errors import DiscoveryError
    from hookmap.verification import verify

    found = discover(config)
    result = verify(config, architecture_map=found)
    if not result.passed:
        failed = "; ".join(check.detail for check in result.checks if not check.passed)
        raise DiscoveryError(f"the map of {found.architecture} does not verify: {failed}")
    checks = dict.fromkeys(f"{check.name}: {check.detail.split(' in layer')[0]}" for check in result.checks)
    return found.model_copy(
        update={
            "scope": "model" if model_id else "architecture",
            "model_id": model_id,
            "verified_by": (f"on {result.on}", *checks),
        }
    )


def model_types() -> tuple[str, ...]:
    """Every model type that transformers' causal language models have."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build_all(
    types: Iterable[str], folder: Path, workers: int = 2, report: Callable[[Entry], None] = lambda entry: None
) -> list[Entry]:
    """Build the maps of these model types into `folder`, each in a process of its own."""
    entries: list[Entry] = []
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=8) as pool:
        for entry in pool.imap_unordered(partial(build_type, folder=folder), types):
            entries.append(entry)
            report(entry)
    return sorted(entries, key=lambda entry: entry.model_type)


def build_type(model_type: str, folder: Path) -> Entry:
    """Build one model type's map from its default config, and write it down if it is right."""
    from transformers import CONFIG_MAPPING

    from hookmap.errors import HookmapError

    begun = time.monotonic()
    try:
        found = build(CONFIG_MAPPING[model_type]())
    except HookmapError as error:
        wrong = "does not verify" in str(error)
        return Entry(
            model_type, "SILENTLY WRONG" if wrong else "ERROR", detail=str(error), seconds=time.monotonic() - begun
        )
    except Exception as error:  # transformers' own failures to make a config
        return Entry(model_type, "ERROR", detail=f"{type(error).__name__}: {error}", seconds=time.monotonic() - begun)
    found.save(folder / f"{found.architecture}.json")
    return _entry(model_type, found, time.monotonic() - begun)


def _entry(model_type: str, found: ArchitectureMap, seconds: float) -> Entry:
    called = [kind for kind in found.kinds if kind.points]
    everywhere = [p for p in found.points if called and all(p in kind.points for kind in called)]
    missing = {p: reason for kind in found.kinds for p, reason in kind.unavailable.items()}
    status: Status = "SUPPORTED" if called else "UNAVAILABLE"
    names = tuple(kind.name for kind in found.kinds)
    return Entry(model_type, status, found.architecture, names, tuple(everywhere), missing, "", seconds)


def save_report(entries: Iterable[Entry], path: Path) -> None:
    """The entries as JSON."""
    path.write_text(json.dumps([asdict(entry) for entry in entries], indent=1) + "\n", encoding="utf-8")
