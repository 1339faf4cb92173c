"""Plan a capture: its run, batches, estimate and manifest; then run it into memory or a folder."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

from hookmap.activations import Sink
from hookmap.capture.batches import Generating, Harvesting, read_by
from hookmap.capture.engines import Engine
from hookmap.capture.estimate import Estimate, check_room
from hookmap.capture.features import Featured
from hookmap.capture.interventions.plan import EditPlan
from hookmap.capture.places import check_engine
from hookmap.capture.request import Request
from hookmap.capture.result import Capture
from hookmap.capture.rows import matching_tokens, refuse_nowhere
from hookmap.capture.run import Run, device_of, log, vocabulary_of
from hookmap.errors import CaptureError, InterventionError, StoreError, TokenizerError
from hookmap.loading import generation as gen
from hookmap.loading.encoder_decoder import encoder_vocabulary
from hookmap.loading.further_inputs import signature
from hookmap.loading.memory import MemoryUse
from hookmap.loading.modules import why_it_generates_nothing
from hookmap.loading.prompts import Prompt
from hookmap.loading.weights import weights_of
from hookmap.loading.wrappers import generate_of, generation_config_of
from hookmap.maps.document import ArchitectureMap
from hookmap.stores import open_store
from hookmap.stores.background import BackgroundWriter
from hookmap.stores.before_interventions import BEFORE, Lacking, before_writer
from hookmap.stores.folder import FolderWriter
from hookmap.stores.interface import Store
from hookmap.stores.manifest import Manifest, manifest_of_run
from hookmap.stores.memory import MemoryStore


@dataclass(frozen=True)
class Prepared:
    """A capture that is planned and checked, but has not run."""

    run: Run
    groups: tuple[tuple[int, ...], ...]
    """numbers of the prompts that run together"""
    manifest: Manifest
    map: ArchitectureMap
    expected: Estimate
    why: str
    """why this engine was chosen"""
    apart: str | None = None
    """why prompts of different lengths do not share batches; None where they do"""
    featured: Featured | None = None
    """dictionaries whose features are stored"""

    def capture(self, store: str | os.PathLike[str] | None, resume: bool) -> Capture:
        """Run every batch, into memory or into a folder. Raises what `Hooked.capture` raises."""
        if resume and store is None:
            raise CaptureError("resume=True needs the folder to go on with: give store=FOLDER.")
        check_room(self.expected, store, resume)
        log.info("capture: %s; engine %s (%s)", self.expected, self.run.engine.name, self.why)
        say_apart(self.apart)
        stores = self._in_memory() if store is None else self._in_folder(store, resume)
        manifest = self.manifest
        if self.run.lost and store is None:
            manifest = manifest.model_copy(update={"runs": (self._note(),)})
        rows = {*manifest.keys}
        selectors = [each for each in self.run.selectors if each.key in rows]
        made = [Capture(s, selectors, self.map, getattr(s, "manifest", manifest)) for s in stores]
        made[0].before = made[1] if self._before else None
        return made[0]

    def into(self, sink: Sink, finished: Set[int] = frozenset()) -> None:
        """Run every batch with an unfinished sample, and hand a sink its rows where they are: on the device."""
        self.run.rows_stay = True
        log.info("run: %s; engine %s (%s)", self.expected, self.run.engine.name, self.why)
        self.run.all(self.groups, Lacking(self.of_rows(sink), finished), finished)
        _log_memory(self.run)

    def of_rows(self, sink: Sink) -> Sink:
        """What takes the run's rows for a sink of what is stored."""
        if self.featured is None:
            return sink
        self.run.rows_stay = True  # a dictionary reads them where the model is
        return self.featured.into(sink)

    @property
    def _before(self) -> bool:
        """Whether the rows before the interventions are stored too."""
        return "before" in self.manifest.settings

    def _in_memory(self) -> list[Store]:
        stores = [MemoryStore(self.manifest.keys) for _ in range(1 + self._before)]
        self.run.before = stores[1] if self._before else None
        self.run.all(self.groups, self.of_rows(stores[0]))
        _log_memory(self.run)
        return [*stores]

    def _note(self) -> dict[str, Any]:
        """What the manifest says of this run."""
        run = self.run
        note: dict[str, Any] = {"engine": run.engine.name, "why": self.why, "apart": self.apart}
        note |= {"memory": dict(run.memory.figures()), "halved": run.halved}
        return note | ({"overflow": {"dtype": run.selection.dtype, "rows": dict(run.lost)}} if run.lost else {})

    def _in_folder(self, store: str | os.PathLike[str], resume: bool) -> list[Store]:
        run, manifest = self.run, self.manifest
        if not manifest.keys:
            raise StoreError("a capture folder needs at least one tensor: name points, or leave store= out.")
        with contextlib.ExitStack() as closing:
            folder = (FolderWriter.resume if resume else FolderWriter.create)(store, manifest)
            writers = [closing.enter_context(BackgroundWriter(folder))]
            if self._before:
                writers.append(closing.enter_context(BackgroundWriter(before_writer(store, manifest))))
                run.before = Lacking(writers[1], writers[1].finished)
            finished = reduce(and_, (writer.finished for writer in writers))
            try:
                run.all(self.groups, Lacking(self.of_rows(writers[0]), writers[0].finished), finished)
            except BaseException:
                if run.lost:  # the finished samples stay, and the manifest must name the rows that overflowed
                    with contextlib.suppress(StoreError):
                        for writer in writers:
                            writer.note(self._note())
                raise
            _log_memory(run)
            for writer in writers:
                writer.note(self._note())
        return [open_store(store), *([open_store(Path(store) / BEFORE)] if self._before else [])]


def run_of(
    request: Request,
    engine: Engine,
    tokenizer: Any,
    plan: EditPlan | None,
    options: Mapping[str, Any],
    generation: Mapping[str, Any],
    kinds: tuple[type[Generating], type[Harvesting]] = (Generating, Harvesting),
) -> Run:
    """The run of a request, checked. `options`: all `RunOptions`; `generation`: fields of GenerationConfig.

    `kinds`: what runs where text is generated, and where it is not.
    """
    stop = (options["stop"],) if isinstance(options["stop"], str) else tuple(options["stop"])
    do_sample, seed = options["do_sample"], options["seed"]
    _check_interventions(engine, plan, options["before"])
    check_engine(engine.name, request.selectors)
    gen.check_seed(seed)
    gen.check_stop(stop)
    _check_vocabulary(engine, request.prompts)
    _check_further_inputs(engine, request.prompts)
    _warn_of_lacking_positions(request)
    common = _common(request, engine, tokenizer, options["progress"])
    run: Run
    if new := request.max_new_tokens:
        if (why := why_it_generates_nothing(engine.root)) is not None:
            raise CaptureError(f"{why}. Read texts without generating: max_new_tokens=0.")
        generate_of(engine.runner, engine.root)  # raises where there is none, before anything runs
        own = generation_config_of(engine.runner, engine.root)
        config = gen.settings(own, tokenizer, max_new_tokens=new, do_sample=do_sample, options=generation)
        run = kinds[0](**common, max_new_tokens=new, config=config, stop=stop, seed=seed)
    else:
        _refuse_generation(do_sample, seed, stop, generation)
        run = kinds[1](**common)
    if plan is not None:
        run.edits, run.watches = plan.edits, plan.watches
    return run


def _common(request: Request, engine: Engine, tokenizer: Any, progress: Any) -> dict[str, Any]:
    """Fields of both kinds of run."""
    device = device_of(engine)
    matching = matching_tokens(request.selection, tokenizer, vocabulary_of(engine))
    refuse_nowhere(matching, (prompt.token_ids for prompt in request.prompts))
    return {
        "engine": engine,
        "tokenizer": tokenizer,
        "selectors": request.selectors,
        "prompts": request.prompts,
        "selection": request.selection,
        "matching": matching,
        "progress": progress,
        "memory": MemoryUse(device=device if device.type == "cuda" else None),
    }


def manifest_of(
    request: Request,
    run: Run,
    architecture: str,
    document: Mapping[str, Any],
    name: str | None,
    plan: EditPlan | None,
    before: bool,
    featured: Featured | None = None,
) -> Manifest:
    """The manifest of a run that has not begun. `document`: the map's; `name`: of the model, a hub id or a path."""
    settings: dict[str, Any] = {**run.settings, **request.batch_settings}
    if chosen := request.selection.settings():
        settings["kept"] = chosen
    if plan is not None:
        settings["interventions"] = plan.settings
    if before:
        settings["before"] = True
    if featured is not None:
        settings["dictionaries"] = featured.as_json()
    return manifest_of_run(
        [selector.key for selector in request.selectors] if featured is None else featured.keys,
        model=name,
        architecture=architecture,
        architecture_map=document,
        settings={**settings, **_of_model(run.engine), **_of_prompts(request.prompts)},
    )


def say_apart(why: str | None) -> None:
    """Warn that prompts of different lengths do not share batches. `why`: None where they do."""
    if why is not None:
        log.warning("prompts of different lengths run in batches of their own: %s", why)


def _check_interventions(engine: Engine, plan: EditPlan | None, before: bool) -> None:
    """Raises InterventionError where the engine writes nothing, or there is nothing to be before."""
    if plan is not None and engine.name == "remote":
        raise InterventionError(
            "interventions are not written on a remote model, and no function sees its values while it runs: the "
            "server sends them when the run is over. Open the model here: hookmap.open"
        )
    if before and (plan is None or not plan.edits):
        raise InterventionError("before=True keeps rows of a run with interventions, and there are none: leave it out.")


def _log_memory(run: Run) -> None:
    figures = run.memory.figures()
    log.info("memory: %s", ", ".join(f"{name} {value / 1e6:.0f} MB" for name, value in figures.items()))


def _warn_of_lacking_positions(request: Request) -> None:
    if not request.selectors:
        return
    for position, times in request.selection.lacking(request.lengths, request.read_after).items():
        of = len(request.prompts)
        log.warning("position %d is not in %d of %d prompts: they have no row of it", position, times, of)


def _refuse_generation(do_sample: bool, seed: int | None, stop: tuple[str, ...], options: Mapping[str, Any]) -> None:
    given = {"do_sample": do_sample or None, "seed": seed, "stop": stop or None, **options}
    if named := [name for name, value in given.items() if value is not None]:
        raise CaptureError(f"max_new_tokens=0 generates nothing: leave out {', '.join(named)}.")


def _check_vocabulary(engine: Engine, prompts: Sequence[Prompt]) -> None:
    size = vocabulary_of(engine)
    for number, prompt in enumerate(prompts):
        wrong = [token for token in prompt.token_ids if not 0 <= token < size]
        if not wrong and prompt.encoder_token_ids:
            size = encoder_vocabulary(engine.root)
            wrong = [token for token in prompt.encoder_token_ids if not 0 <= token < size]
        if wrong:
            raise TokenizerError(
                f"prompt {number} has token ids {wrong[:5]}, and the model's vocabulary is 0 to {size - 1}. "
                "Give this model's own tokenizer, or ids that it made."
            )


def _check_further_inputs(engine: Engine, prompts: Sequence[Prompt]) -> None:
    """Raises CaptureError for a field that the model would not read: it would be dropped in silence."""
    names = {name for prompt in prompts for name in signature(prompt.inputs)}
    if unread := sorted(names - read_by(engine.root)):
        raise CaptureError(
            f"{type(engine.root).__name__} reads no {', '.join(unread)}: the prompts are made for another model. "
            "Give them as this one reads them."
        )


def _of_model(engine: Engine) -> dict[str, Any]:
    """The engine, the edits stored in the model, and a digest of its weights."""
    weights = getattr(engine, "weights", None) or weights_of(engine.root)
    found: dict[str, Any] = {"engine": engine.name, "weights": weights}
    if edits := getattr(engine, "stored_edits", ()):
        found["edits_sha256"] = list(edits)
    return found


def _of_prompts(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Digests of the prompts: a capture resumes only with the same ones."""
    return {
        "prompts": len(prompts),
        **({"images": images} if (images := sum(len(prompt.pictures) for prompt in prompts)) else {}),
        "prompts_sha256": _sha256([_content(prompt) for prompt in prompts]),
        "ids_sha256": _sha256([prompt.id for prompt in prompts]),
        "labels_sha256": _sha256([prompt.labels and dict(prompt.labels) for prompt in prompts]),
    }


def _content(prompt: Prompt) -> list[Any]:
    further = [] if prompt.inputs is None else [prompt.inputs.digest]
    return [prompt.text, prompt.token_ids, *further]


def _sha256(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
