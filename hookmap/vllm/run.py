"""A capture on vLLM: requests join the running batch as others leave it, and finished samples go to the sink."""

import contextlib
import time
from collections import deque
from collections.abc import Sequence, Set
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch

from hookmap.activations import Activation, Sample, Sink, call_of
from hookmap.capture.batches import Generating, Harvesting
from hookmap.capture.interventions.operations import Averaged
from hookmap.capture.overflow import Cast, Overflow, in_words
from hookmap.capture.rows import DTYPES, NUMBERS, ids_of
from hookmap.capture.run import Run, log, vocabulary_of
from hookmap.errors import CaptureError, InterventionError
from hookmap.loading import generation as gen
from hookmap.loading.prompts import Prompt, decode
from hookmap.maps.points import PointName
from hookmap.stores.ledger import tensor_name
from hookmap.vllm.engine import Ended, VllmEngine
from hookmap.vllm.plans import pairs_of
from hookmap.vllm.session import IN_PIECES
from hookmap.vllm.spec import PlannedEdits, RequestSpec, RowsKept

if TYPE_CHECKING:
    _Base = Run
else:
    _Base = object

HELD_BYTES = 2**26
HELD_SECONDS = 1.0
"""finished samples go to the sink together once they are so large or so old: a group costs the disk a few files"""
TAKEN_AT_ONCE = 2
"""requests whose rows are asked for together: the disk writes those of some while others are taken"""
_SERVED = frozenset(
    "do_sample temperature top_k top_p min_p repetition_penalty min_new_tokens eos_token_id stop_strings".split()
)


class _OnVllm(_Base):
    """What both kinds of run share. `batch` is a list of requests; there are no batches otherwise."""

    engine: VllmEngine  # type: ignore[assignment]
    at_once: int | None = None
    """prompts that run together, at most; None: as many as vLLM lets run"""
    tokens_at_once: int | None = None
    """of prompts that are read together, at most, where nothing is generated; one that is longer runs alone"""

    def all(self, groups: Sequence[Sequence[int]], sink: Sink, finished: Set[int] = frozenset()) -> None:
        """See `Run.all`. Requests run in the order of the prompts, as many together as vLLM lets run."""
        numbers = [number for group in groups for number in group]
        self.done = len(finished.intersection(numbers)) if isinstance(finished, frozenset | set) else 0
        waiting = [number for number in numbers if number not in finished]
        self.done = len(numbers) - len(waiting)
        self._show(0)
        self.batch(waiting, sink)

    def batch(self, numbers: Sequence[int], sink: Sink) -> None:
        """See `Run.batch`. A deque may get more numbers in `going_on`."""
        with self.engine.lock:
            Serving(self, sink).serve(numbers)

    def stepped(self, number: int, output: Any) -> None:
        """vLLM tells what it has added to a request: called where an engine serves many runs at once."""

    def going_on(self) -> None:
        """Called after each step, also where no request of this run was in it. What it raises ends the run."""

    def parameters(self, number: int) -> Any:
        """vLLM's SamplingParams of a prompt."""
        raise NotImplementedError


class VllmGenerating(_OnVllm, Generating):
    """Generates after each prompt."""

    def parameters(self, number: int) -> Any:
        """See `_OnVllm.parameters`. Raises CaptureError for settings that vLLM does not have, or refuses."""
        from vllm.exceptions import VLLMValidationError

        from hookmap.vllm.parameters import OwnParameters

        seed = None if self.seed is None else (self.seed * 1_000_003 + number) % 2**63
        try:
            return OwnParameters(**self._settings, seed=seed if self.config.do_sample else None)
        except (ValueError, VLLMValidationError) as error:
            raise CaptureError(f"vLLM refuses these settings: {error}") from error

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """Those of all prompts."""
        if unserved := gen.unserved(self.config, _SERVED):
            raise CaptureError(
                f"{', '.join(unserved)}: vLLM has no such setting. It has "
                f"{', '.join(sorted(_SERVED))}; for others open the model with hookmap.open."
            )
        config, given = self.config, dict[str, Any]()
        vocabulary = vocabulary_of(self.engine)  # type: ignore[arg-type]  # an engine of vLLM's
        stops = [
            *self.stop,
            *([config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings or ()),
        ]
        if stops and not self.engine.reads_text:
            raise CaptureError(
                f"stop={stops!r}: vLLM has no tokenizer to find strings with. Open the model with tokenizer=, and "
                "without skip_tokenizer_init."
            )
        if stops and config.min_new_tokens:
            raise CaptureError(
                f"min_new_tokens={config.min_new_tokens}: vLLM would look for stop strings behind so many tokens alone."
                " Leave it or stop out, or open the model with hookmap.open."
            )
        if config.do_sample:
            # what transformers takes where neither the model nor the caller says
            unset = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
            given = {name: _or(getattr(config, name), default) for name, default in unset.items()}
        return dict(
            {"temperature": 0.0, **given},
            max_tokens=self.max_new_tokens,
            min_tokens=config.min_new_tokens or 0,
            repetition_penalty=_or(config.repetition_penalty, 1.0),
            stop=stops,
            stop_token_ids=[end for end in gen.end_tokens(config) if 0 <= end < vocabulary],
            ignore_eos=True,
            detokenize=bool(stops),
            skip_special_tokens=False,
            include_stop_str_in_output=True,
            output_kind=_final(),
        )


class VllmHarvesting(_OnVllm, Harvesting):
    """Reads each prompt; the token that vLLM generates after it is left out."""

    def parameters(self, number: int) -> Any:
        """See `_OnVllm.parameters`."""
        from hookmap.vllm.parameters import OwnParameters

        return OwnParameters(temperature=0.0, max_tokens=1, detokenize=False, ignore_eos=True, output_kind=_final())


def refuse_longer(prompts: Sequence[Prompt], new: int, longest: int) -> None:
    """Raises CaptureError for prompts that vLLM would refuse, or whose answers it would cut without a word.

    `new`: tokens to generate. `longest`: vLLM's max_model_len, which counts one more than what is only read.
    """
    most = longest - max(1, new)
    if not (over := [number for number, prompt in enumerate(prompts) if len(prompt.token_ids) > most]):
        return
    which = f"prompt {over[0]} is" if len(over) == 1 else f"prompt {over[0]} and {len(over) - 1} more are"
    asked = f"tokens and max_new_tokens={new}" if new else "tokens and the one that vLLM generates after what it reads"
    raise CaptureError(
        f"{which} too long: {len(prompts[over[0]].token_ids)} {asked} do not fit into "
        f"max_model_len={longest}. Shorten the prompt{', give a smaller max_new_tokens' if new else ''}, or open the "
        "model with a larger max_model_len."
    )


class Serving:
    """The requests of one run."""

    def __init__(self, run: Any, sink: Sink) -> None:
        self._run, self._sink = run, sink
        self._engine = run.engine.channel(lambda name, output: run.stepped(self._running[name], output))
        self.name = uuid4().hex[:12]
        self._running: dict[str, int] = {}
        """name of a request -> number of its prompt"""
        self._held: list[tuple[list[Activation], Sample]] = []
        self._held_bytes, self._held_since = 0, 0.0
        self._alone: list[int] = []
        """prompts that have to be read in one piece, and were not"""
        selection = run.selection
        self._rows = RowsKept(positions=_as_given(selection), every=selection.every, mean=selection.mean)
        self._points: dict[str, Any] = {}
        for selector in run.selectors:
            self._points.setdefault(selector.point, []).append(selector.layer)
        self._points = {name: None if layers == [None] else layers for name, layers in self._points.items()}
        self._averages = any(isinstance(edit.operation, Averaged) for edit in run.edits)

    def serve(self, numbers: Sequence[int]) -> None:
        """Run these prompts, and hand their rows to the sink. A deque may get more while they run.

        Raises CaptureError.
        """
        waiting = numbers if isinstance(numbers, deque) else deque(numbers)
        if self._run.edits:
            self._engine.plan(self.name, self._run.edits)
        try:
            self._serve(waiting, min(self._engine.in_flight, self._run.at_once or self._engine.in_flight))
            self._serve(deque(self._alone), 1)
            self.flush()
        except BaseException:
            self._give_up()
            raise
        finally:
            if self._run.edits:
                with contextlib.suppress(CaptureError):  # the engine has died, and told so
                    self._engine.call("hookmap_forget", self.name)

    def _serve(self, waiting: deque[int], at_once: int) -> None:
        while waiting or self._running:
            while waiting and len(self._running) < at_once and self._fits(waiting[0]):
                self._add(waiting.popleft())
            if ended := self._engine.step():
                self._end(ended, last=at_once == 1)
                self._run.memory.look()
            self._run.going_on()
            if self._held and time.monotonic() - self._held_since > HELD_SECONDS:
                self.flush()

    def _fits(self, number: int) -> bool:
        """Whether this prompt may be read beside those that run."""
        most: int | None = self._run.tokens_at_once
        tokens = (len(self._run.prompts[each].token_ids) for each in (number, *self._running.values()))
        if most is None or not self._running or not isinstance(self._run, Harvesting):
            return True
        return sum(tokens) <= most

    def _add(self, number: int) -> None:
        run, prompt, name = self._run, self._run.prompts[number], f"{self.name}.{number}"
        try:
            self._engine.add(name, prompt.token_ids, run.parameters(number), self.spec(number))
        except CaptureError as error:
            raise CaptureError(f"prompt {number}: {error}") from error
        self._running[name] = number

    def spec(self, number: int) -> RequestSpec:
        """What the request of a prompt asks of hookmap's worker."""
        run, prompt = self._run, self._run.prompts[number]
        edits = None
        if run.edits:
            only, images = pairs_of(run.edits, number), sorted(prompt.image_positions)
            edits = PlannedEdits(plan=self.name, sample=number, only=only, images=images)
        return RequestSpec(
            points=self._points, rows=self._rows, matching=ids_of(run.matching), edits=edits,
            images=sorted(prompt.image_positions),
        )  # fmt: skip

    def _end(self, ended: Sequence[Ended], last: bool) -> None:
        """Take the rows of requests that have ended."""
        mine = [each for each in ended if each.name in self._running]
        for start in range(0, len(mine), TAKEN_AT_ONCE):
            self._take(mine[start : start + TAKEN_AT_ONCE], last)

    def _take(self, ended: Sequence[Ended], last: bool) -> None:
        run = self._run
        mine = [(each, self._running.pop(each.name)) for each in ended]
        new = {each.name: () if isinstance(run, Harvesting) else each.tokens for each, _ in mine}
        counts = [
            (each.name, len(run.prompts[number].token_ids) + max(0, len(new[each.name]) - 1)) for each, number in mine
        ]
        asks = bool(self._points or run.edits)
        taken = self._engine.take(counts) if asks else [(None, [], {})] * len(mine)
        for (each, number), (error, positions, rows) in zip(mine, taken, strict=True):
            if error is not None and error.startswith(IN_PIECES) and not last:
                self._alone.append(number)
                continue
            if error is not None:
                kind = InterventionError if error.startswith(IN_PIECES) else CaptureError
                raise kind(f"sample {number}: {error}")
            self.hold(number, new[each.name], positions, rows)

    def hold(self, number: int, new: Sequence[int], positions: list[int], rows: dict[str, torch.Tensor]) -> None:
        """A sample is finished: it goes to the sink with the next group."""
        run, prompt, selection = self._run, self._run.prompts[number], self._run.selection
        kept: Any = None if selection.everything else tuple(positions)
        if selection.mean:
            kept = "mean" if positions else ()
        count = min(1, len(positions)) if selection.mean else len(positions)
        if not run.selectors:
            kept, count = None, len(prompt.token_ids) + max(0, len(new) - 1)
        activations, lost = [], []
        for selector in run.selectors:
            key = selector.key
            tensor, over = self._cast(key, number, rows[tensor_name(key)], positions)
            lost += over
            activations.append(Activation(number, key[0], key[1], 0, tensor, call_of(key)))
        self._count(lost)
        sample = Sample(
            number, prompt.text, decode(new, run.tokenizer), (*prompt.token_ids, *new), len(prompt.token_ids), count,
            kept, prompt.id, prompt.labels,
        )  # fmt: skip
        if not self._held:
            self._held_since = time.monotonic()
        self._held.append((activations, sample))
        self._held_bytes += sum(each.tensor.nbytes for each in activations)
        if self._held_bytes >= HELD_BYTES:
            self.flush()

    def _cast(
        self, key: Any, number: int, rows: torch.Tensor, positions: list[int]
    ) -> tuple[torch.Tensor, list[Overflow]]:
        selection = self._run.selection
        if (columns := selection.columns(rows.shape[-1])) is not None:
            rows = rows[..., columns]
        if selection.dtype is None or PointName.of(key[0]).base in NUMBERS:
            return rows, []
        cast = Cast(DTYPES[selection.dtype])
        found = cast(rows, lambda: [(0, place) for place in range(len(rows))])
        if not (lost := cast.lost()):
            return found, []
        at = None if selection.mean else positions[lost[0][1]]
        return found, [Overflow(tensor_name(key), len(lost), number, at)]

    def _count(self, lost: Sequence[Overflow]) -> None:
        run = self._run
        if not lost:
            return
        told = in_words(lost, DTYPES[str(run.selection.dtype)])
        if run.selection.overflow == "refuse":
            raise CaptureError(f"{told} This sample is not kept. overflow='warn' (--overflow warn) keeps it.")
        if not run.lost:
            log.warning("%s These are stored as infinities; the manifest counts all of them.", told)
        run.lost.update({each.name: each.rows for each in lost})

    def flush(self) -> None:
        """Hand what is held to the sink: first all rows, then all ends, so that it is one group on the disk."""
        held, self._held, self._held_bytes = self._held, [], 0
        for activations, _ in held:
            for each in activations:
                self._sink.write(each)
        for _, sample in held:
            self._sink.finish(sample)
        self._run.done += len(held)
        self._run._show(0)

    def _give_up(self) -> None:
        """Something failed: what is finished is kept, what runs is aborted."""
        try:
            self.flush()
        finally:
            with contextlib.suppress(CaptureError):  # the engine has died, and told so
                self._engine.drop(list(self._running))


def _as_given(selection: Any) -> Any:
    """The positions of a selection as a user gives them."""
    return selection.settings().get("positions", "all")


def _or(value: Any, default: float) -> Any:
    """The value; the default for None, and not for 0."""
    return default if value is None else value


def _final() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY
