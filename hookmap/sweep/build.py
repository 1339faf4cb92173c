"""The shipped maps: discovered at full size without weights, and verified on a narrow copy, one architecture each.

`build` makes one map. `sweep` makes or checks many in parallel, goes on where it was stopped, and gives an `Entry` for
each model type.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from hookmap.errors import DiscoveryError, MapError, MapNotFoundError, ModelError
from hookmap.maps.contents import Proof
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import load

Status = Literal["SUPPORTED", "UNAVAILABLE", "ERROR", "SILENTLY WRONG"]
LEDGER = ".sweep.jsonl"
"""the file in the maps' folder with one line for each finished model type: a killed sweep goes on from it"""
MULTIMODAL_LEDGER = ".sweep-multimodal.jsonl"
"""the same of the models that read images or sounds too"""
_SECONDS = 900
"""the longest that one model type may take"""


class _Refuted(DiscoveryError):
    """Discovery made a map, and verification says that it is wrong."""


@dataclass(frozen=True)
class Kind:
    """One kind of block, as the table shows it."""

    name: str
    layers: int
    order: str
    norms: str
    axes: tuple[str, ...]
    points: tuple[str, ...]
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """The result for one model type.

    SUPPORTED: there is a map, and every point in it is proved. UNAVAILABLE: discovery did not understand the model, and
    `detail` says why. ERROR: transformers itself could not build or run it, in its own words. SILENTLY WRONG: discovery
    made a map that verification refutes; it is not written.
    """

    model_type: str
    architecture: str
    status: Status
    kinds: tuple[Kind, ...] = ()
    model_points: tuple[str, ...] = ()
    model_missing: dict[str, str] = field(default_factory=dict)
    detail: str = ""
    changes: tuple[str, ...] = ()
    """how the map found now differs from the shipped one, where the two are compared"""
    seconds: float = 0.0


def build(config: Any, model_id: str | None = None) -> ArchitectureMap:
    """The map of a config, with the checks that it passed. Raises DiscoveryError where one fails."""
    from hookmap.discovery.discover import discover
    from hookmap.verification.verify import verify

    found = discover(config)
    result = verify(config, architecture_map=found)
    if not result.passed:
        failed = "; ".join(check.detail for check in result.checks if not check.passed)
        raise _Refuted(f"the map of {found.architecture} does not verify: {failed}")
    found = result.architecture_map
    said = dict.fromkeys((check.name, check.detail.split(" in layer")[0]) for check in result.checks)
    checks = Counter(name for name, _ in said)
    return found.model_copy(
        update={
            "scope": "model" if model_id else "architecture",
            "model_id": model_id,
            "proofs": (Proof(transformers=(version("transformers"),), on=result.on, checks=dict(checks)),),
        }
    )


def build_models(folder: Path, report: Callable[[str], None] = lambda name: None) -> None:
    """Write the maps of well-known models, made from their published shapes, into `folder`."""
    from transformers import CONFIG_MAPPING

    from hookmap.sweep.published import PUBLISHED

    folder.mkdir(parents=True, exist_ok=True)
    for name, (model_type, settings) in PUBLISHED.items():
        found = build(CONFIG_MAPPING[model_type](**settings), model_id=name)
        # The shape is only a part of the published config, so the map claims no hash.
        of_shape = found.model_copy(update={"scope": "architecture", "config_hash": None})
        path = folder / f"{name.replace('/', '--')}.json"
        with_earlier_proofs(of_shape, path).save(path)
        report(name)


def with_earlier_proofs(found: ArchitectureMap, path: Path) -> ArchitectureMap:
    """The map, proved also on the versions of transformers that the file at `path` names, if that is the same map."""
    from packaging.version import Version

    from hookmap.maps.diff import differences

    try:
        before = load(path)
    except (MapError, MapNotFoundError):
        return found
    if list(differences(before, found)):
        return found
    of_version = {version: proof for proof in (*before.proofs, *found.proofs) for version in proof.transformers}
    versions: dict[str, list[str]] = {}
    for name in sorted(of_version, key=Version):
        versions.setdefault(of_version[name].model_dump_json(exclude={"transformers"}), []).append(name)
    proofs = tuple(
        of_version[names[0]].model_copy(update={"transformers": tuple(names)}) for names in versions.values()
    )
    return found.model_copy(update={"proofs": proofs})


def classes(multimodal: bool = False) -> dict[str, str]:
    """Every model type of transformers' causal language models -> its class.

    `multimodal`: of those that read images or sounds too, as a whole.
    """
    from transformers.models.auto import modeling_auto as auto

    from hookmap.sweep.configs import first

    names = auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES if multimodal else auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {name: first(found) for name, found in _pairs(names)}


def _pairs(mapping: Any) -> Iterable[tuple[str, Any]]:
    pairs: Iterable[tuple[str, Any]] = mapping.items()
    return pairs


def tenth(number: int, types: Iterable[str] | None = None) -> tuple[str, ...]:
    """Every tenth model type in alphabetical order, from the `number`-th on (0 to 9)."""
    return tuple(sorted(classes() if types is None else types))[number % 10 :: 10]


def sweep(
    types: Iterable[str],
    folder: Path | None,
    shipped: Path | None = None,
    jobs: int = 2,
    report: Callable[[Entry], None] = lambda entry: None,
    record: bool = False,
    multimodal: bool = False,
) -> list[Entry]:
    """Discover and verify the maps of these model types, in `jobs` processes.

    `folder`: where right maps and the ledger are written; None writes nothing. `shipped`: the folder of the maps to
    compare with. `record`: write the version of transformers into each shipped map that is found again. `report` is
    called with each entry as it is finished. `multimodal`: as for `classes`.
    """
    entries: list[Entry] = []
    build_one = partial(build_type, folder=folder, shipped=shipped, record=record, multimodal=multimodal)
    # Not ProcessPoolExecutor: with a limit of tasks per child it hangs in Python up to 3.14 (python/cpython#115634).
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=12) as pool:
        for entry in pool.imap_unordered(build_one, types):
            entries.append(entry)
            if folder is not None:
                with ledger_of(folder, multimodal).open("a", encoding="utf-8") as ledger:
                    ledger.write(json.dumps(asdict(entry)) + "\n")
            report(entry)
    return sorted(entries, key=lambda entry: entry.model_type)


def ledger_of(folder: Path, multimodal: bool = False) -> Path:
    """The file of the finished model types."""
    return folder / (MULTIMODAL_LEDGER if multimodal else LEDGER)


def done(folder: Path, multimodal: bool = False) -> dict[str, Entry]:
    """The last entry of each model type that sweeps into `folder` have finished. A line cut short is left out."""
    found: dict[str, Entry] = {}
    path = ledger_of(folder, multimodal)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = _entry_of(json.loads(line))
        except ValueError:
            continue
        found[entry.model_type] = entry
    return found


def _entry_of(document: dict[str, Any]) -> Entry:
    kinds = tuple(Kind(**{**k, "axes": tuple(k["axes"]), "points": tuple(k["points"])}) for k in document.pop("kinds"))
    model_points, changes = tuple(document.pop("model_points")), tuple(document.pop("changes"))
    return Entry(**document, kinds=kinds, model_points=model_points, changes=changes)


def build_type(
    model_type: str,
    folder: Path | None = None,
    shipped: Path | None = None,
    record: bool = False,
    multimodal: bool = False,
) -> Entry:
    """Build one model type's map, compare it with the shipped one, and write it if it is right."""
    begun = time.monotonic()
    try:
        with _at_most(_SECONDS):
            found = _build_alone(model_type, multimodal)
    except Exception as error:
        entry = Entry(model_type, classes(multimodal)[model_type], _status(error), detail=_said(error))
    else:
        is_shipped = speaks_for_its_class(model_type, multimodal)
        entry = _entry(model_type, found, _filed(found, folder, shipped, record) if is_shipped else ())
    return replace(entry, seconds=round(time.monotonic() - begun, 1))


def _status(error: Exception) -> Status:
    if isinstance(error, _Refuted):
        return "SILENTLY WRONG"
    # With a cause, the error is the model's own, raised while it ran, and discovery has no part in it.
    return "UNAVAILABLE" if isinstance(error, DiscoveryError) and error.__cause__ is None else "ERROR"


def _said(error: Exception) -> str:
    ours = isinstance(error, DiscoveryError | ModelError)
    return str(error) if ours else f"{type(error).__name__}: {error}"


def _filed(found: ArchitectureMap, folder: Path | None, shipped: Path | None, record: bool) -> tuple[str, ...]:
    """Write the map into `folder`, or its version of transformers into the shipped one: how it differs from that."""
    if folder is not None:
        path = folder / f"{found.architecture}.json"
        with_earlier_proofs(found, path).save(path)
    if shipped is None:
        return ()
    changes = _changes(found, shipped)
    if record and not changes:
        path = shipped / f"{found.architecture}.json"
        proofs = with_earlier_proofs(found, path).proofs
        load(path).model_copy(update={"proofs": proofs}).save(path)
    return changes


def _build_alone(model_type: str, multimodal: bool) -> ArchitectureMap:
    """Build it in one thread, since a sweep has a process for each core, and without transformers' warnings."""
    import logging
    import warnings

    import torch

    from hookmap.sweep.configs import config_of

    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(config_of(model_type, multimodal))


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raises TimeoutError after so many seconds. Without effect where the system has no alarm (Windows)."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def speaks_for_its_class(model_type: str, multimodal: bool = False) -> bool:
    """Of several model types of one class, the last of its own folder in transformers.

    `deepseek_v3` and not `sarvam_mla`, which came later and uses the class; `llama4_text` after `llama4`.
    """
    import transformers
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    of = classes(multimodal)
    folder = getattr(transformers, of[model_type]).__module__.split(".")[2]
    types = [name for name, architecture in of.items() if architecture == of[model_type]]
    return [name for name in types if model_type_to_module_name(name) == folder][-1:] == [model_type]


def _changes(found: ArchitectureMap, shipped: Path) -> tuple[str, ...]:
    from hookmap.maps.diff import differences

    path = shipped / f"{found.architecture}.json"
    return tuple(differences(load(path), found)) if path.exists() else ("there is no shipped map",)


def _entry(model_type: str, found: ArchitectureMap, changes: tuple[str, ...]) -> Entry:
    status: Status = "SUPPORTED" if any(kind.points for kind in found.kinds) else "UNAVAILABLE"
    return Entry(
        model_type,
        found.architecture,
        status,
        kinds=tuple(_kinds(found)),
        model_points=tuple(found.model_points),
        model_missing=dict(found.model_unavailable),
        detail=_not_covered(found) if status == "SUPPORTED" else "no point of a block was found",
        changes=changes,
    )


def _not_covered(found: ArchitectureMap) -> str:
    lists = f"not in the map: {', '.join(f'`{path}`' for path in found.left_out)}" if found.left_out else ""
    return lists if found.joined else f"{lists}; the model adds to the stream between blocks".lstrip("; ")


def _kinds(found: ArchitectureMap) -> Iterator[Kind]:
    for kind in found.kinds:
        yield Kind(
            kind.name,
            len(kind.layers),
            kind.branch_order,
            kind.norm_placement,
            kind.axes,
            tuple(kind.points),
            dict(kind.unavailable),
        )
