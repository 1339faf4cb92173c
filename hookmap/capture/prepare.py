"""A capture, decided before it runs: prompts, selectors and an engine -> batches and a manifest."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

from hookmap.capture.batches import Batches, Generating, Harvesting
from hookmap.capture.engines import Engine
from hookmap.capture.estimate import Estimate, check_room
from hookmap.capture.interventions.plan import Plan
from hookmap.capture.options import Progress
from hookmap.capture.result import Capture
from hookmap.capture.rows import RowSelection, matching_tokens
from hookmap.capture.run import Run, device_of, log, vocabulary_of
from hookmap.errors import CaptureError, InterventionError, StoreError, TokenizerError
from hookmap.loading import generation as gen
from hookmap.loading.memory import MemoryUse
from hookmap.loading.prompts import Prompt
from hookmap.loading.weights import weights_of
from hookmap.loading.wrappers import generate_of, generation_config_of
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.selectors import Selector
from hookmap.stores import open_store
from hookmap.stores.background import BackgroundWriter
from hookmap.stores.before import BEFORE, Lacking, before_writer
from hookmap.stores.folder import FolderWriter
from hookmap.stores.interface import Store
from hookmap.stores.manifest import Manifest, manifest_of_run
from hookmap.stores.memory import MemoryStore

BATCH_SIZE = 8
BATCH_TOKENS = 4096
_COUNTED = "a setting of this generation would count pads as tokens"


@dataclass(frozen=True)
class Prepared:
    """A capture, decided and checked: what remains is to run its batches."""

    run: Run
    groups: tuple[tuple[int, ...], ...]
    """numbers of the prompts that run together"""
    manifest: Manifest
    map: ArchitectureMap
    expected: Estimate
    why: str
    """this engine"""
    apart: str | None = None
    """why prompts of different lengths run apart, where they do"""

    def capture(self, store: str | os.PathLike[str] | None, resume: bool) -> Capture:
        """Run every batch, into memory or a folder. Raises what `Hooked.capture` does."""
        if resume and store is None:
            raise CaptureError("resume=True needs the folder to go on with: give store=FOLDER.")
        check_room(self.expected, store, resume)
        log.info("capture: %s; engine %s (%s)", self.expected, self.run.engine.name, self.why)
        say_apart(self.apart)
        stores = self._in_memory() if store is None else self._in_folder(store, resume)
        manifest = self.manifest
        if self.run.lost and store is None:
            manifest = manifest.model_copy(update={"runs": (self._note(),)})
        made = [Capture(s, self.run.selectors, self.map, getattr(s, "manifest", manifest)) for s in stores]
        made[0].before = made[1] if self._before else None
        return made[0]

    @property
    def _before(self) -> bool:
        """Whether rows from before the interventions are kept too."""
        return "before" in self.manifest.settings

    def _in_memory(self) -> list[Store]:
        stores = [MemoryStore(self.manifest.keys) for _ in range(1 + self._before)]
        self.run.before = stores[1] if self._before else None
        self.run.all(self.groups, stores[0])
        _tell(self.run)
        return [*stores]

    def _note(self) -> dict[str, Any]:
        """What the run has to tell of itself."""
        run = self.run
        note: dict[str, Any] = {"engine": run.engine.name, "why": self.why, "apart": self.apart}
        note |= {"memory": dict(run.memory.figures()), "halved": run.halved}
        return note | ({"overflow": {"dtype": run.selection.dtype, "rows": dict(run.lost)}} if run.lost else {})

    def _in_folder(self, store: str | os.PathLike[str], resume: bool) -> list[Store]:
        run, manifest = self.run, self.manifest
        if not run.selectors:
            raise StoreError("a capture folder needs at least one tensor: name points, or leave store= out.")
        with contextlib.ExitStack() as closing:
            folder = (FolderWriter.resume if resume else FolderWriter.create)(store, manifest)
            writers = [closing.enter_context(BackgroundWriter(folder))]
            if self._before:
                writers.append(closing.enter_context(BackgroundWriter(before_writer(store, manifest))))
                run.before = Lacking(writers[1], writers[1].finished)
            finished = reduce(and_, (writer.finished for writer in writers))
            try:
                run.all(self.groups, Lacking(writers[0], writers[0].finished), finished)
            except BaseException:
                if run.lost:  # its finished samples stay, and the manifest has to say what they lost
                    with contextlib.suppress(StoreError):
                        for writer in writers:
                            writer.note(self._note())
                raise
            _tell(run)
            for writer in writers:
                writer.note(self._note())
        return [open_store(store), *([open_store(Path(store) / BEFORE)] if self._before else [])]


def prepare(
    engine: Engine,
    why: str,
    architecture_map: ArchitectureMap,
    tokenizer: Any,
    name: str | None,
    prompts: tuple[Prompt, ...],
    selectors: Sequence[Selector],
    selection: RowSelection,
    batches: Callable[[str | None], Batches],
    size: Callable[[Sequence[Sequence[int]]], Estimate],
    *,
    max_new_tokens: int,
    do_sample: bool,
    seed: int | None,
    stop: tuple[str, ...],
    batch_size: int | None,
    batch_tokens: int,
    progress: Callable[[Progress], None] | None,
    generation: Mapping[str, Any],
    plan: Plan | None = None,
    before: bool = False,
) -> Prepared:
    """See `Hooked.capture`. `why`: this engine. `batches`: given what of the run forbids pads, which run together.

    `size`: of a run in these batches.
    """
    _check_interventions(engine, plan, before)
    gen.check_seed(seed)
    gen.check_stop(stop)
    _check_vocabulary(engine, prompts)
    device = device_of(engine)
    memory = MemoryUse(device=device if device.type == "cuda" else None)
    common = (
        engine,
        tokenizer,
        tuple(selectors),
        prompts,
        selection,
        matching_tokens(selection, tokenizer, vocabulary_of(engine)),
    )
    lengths = [len(prompt.token_ids) for prompt in prompts]
    for position, times in selection.lacking(lengths, max(0, max_new_tokens - 1)).items() if selectors else ():
        log.warning("position %d is not in %d of %d prompts: they have no row of it", position, times, len(prompts))
    run: Run
    if max_new_tokens:
        generate_of(engine.runner, engine.root)  # says so before anything runs, where there is none
        own = generation_config_of(engine.runner, engine.root)
        config = gen.settings(own, tokenizer, max_new_tokens=max_new_tokens, do_sample=do_sample, options=generation)
        run = Generating(*common, progress, memory, max_new_tokens=max_new_tokens, config=config, stop=stop, seed=seed)
        groups, apart = batches(_COUNTED if gen.counts_pads(config) else None)
        settings: dict[str, Any] = {"generation": gen.as_json(config), "seed": seed, "stop": list(stop)}
        settings["batch_size"] = batch_size or BATCH_SIZE
    else:
        _refuse_generation(do_sample, seed, stop, generation)
        run = Harvesting(*common, progress, memory)
        groups, apart = batches(None)
        settings = {"harvest": True, "batch_tokens": batch_tokens, "batch_size": batch_size}
    if chosen := selection.settings():
        settings["kept"] = chosen
    keys = [(selector.point, selector.layer) for selector in selectors]
    if plan is not None:
        settings["interventions"] = plan.settings
        run.edits = plan.edits
    expected = size(groups)
    if before:
        settings["before"] = True
        expected = expected.twice()
    manifest = manifest_of_run(
        keys,
        model=name,
        architecture=architecture_map.architecture,
        architecture_map=architecture_map.model_dump(mode="json"),
        settings={**settings, **_of_model(engine), **_of_prompts(prompts)},
    )
    return Prepared(run, groups, manifest, architecture_map, expected, why, apart)


def say_apart(why: str | None) -> None:
    """Log that a run takes more batches than its size asks for."""
    if why is not None:
        log.warning("prompts of different lengths run in batches of their own: %s", why)


def _check_interventions(engine: Engine, plan: Plan | None, before: bool) -> None:
    """Before anything runs. Raises InterventionError."""
    if plan is not None and engine.name != "hooks":
        raise InterventionError(
            f'interventions are written with hooks, and this run\'s engine is {engine.name}: give engine="hooks". '
            "(What is stored in an nnsight model does not apply then.)"
        )
    if before and plan is None:
        raise InterventionError("before=True keeps rows of a run with interventions, and there are none: leave it out.")


def _tell(run: Run) -> None:
    figures = run.memory.figures()
    log.info("memory: %s", ", ".join(f"{name} {value / 1e6:.0f} MB" for name, value in figures.items()))


def _refuse_generation(do_sample: bool, seed: int | None, stop: tuple[str, ...], options: Mapping[str, Any]) -> None:
    given = {"do_sample": do_sample or None, "seed": seed, "stop": stop or None, **options}
    if named := [name for name, value in given.items() if value is not None]:
        raise CaptureError(f"max_new_tokens=0 generates nothing: leave out {', '.join(named)}.")


def _check_vocabulary(engine: Engine, prompts: Sequence[Prompt]) -> None:
    size = vocabulary_of(engine)
    for number, prompt in enumerate(prompts):
        if wrong := [token for token in prompt.token_ids if not 0 <= token < size]:
            raise TokenizerError(
                f"prompt {number} has token ids {wrong[:5]}, and the model's vocabulary is 0 to {size - 1}. "
                "The tokenizer is another model's."
            )


def _of_model(engine: Engine) -> dict[str, Any]:
    """What runs beside the weights' name: which engine, edits stored in the model, and the weights themselves."""
    found: dict[str, Any] = {"engine": engine.name, "weights": weights_of(engine.root)}
    if edits := getattr(engine, "stored_edits", ()):
        found["edits_sha256"] = list(edits)
    return found


def _of_prompts(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Digests of all that a sample takes over from its prompt."""
    return {
        "prompts": len(prompts),
        "prompts_sha256": _sha256([[prompt.text, prompt.token_ids] for prompt in prompts]),
        "ids_sha256": _sha256([prompt.id for prompt in prompts]),
        "labels_sha256": _sha256([prompt.labels and dict(prompt.labels) for prompt in prompts]),
    }


def _sha256(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
