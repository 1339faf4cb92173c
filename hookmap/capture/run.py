"""A capture as it runs: one batch after another, in smaller parts where memory runs out."""

import contextlib
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from hookmap.activations import Sample, Sink
from hookmap.capture.engines import Engine
from hookmap.capture.engines.model_lock import lock_of
from hookmap.capture.engines.observation import Observer
from hookmap.capture.engines.pass_rows import BatchLayout
from hookmap.capture.halving import in_parts
from hookmap.capture.interventions.edits import Edit, Editor
from hookmap.capture.interventions.watching import Watch, Watching
from hookmap.capture.options import Progress
from hookmap.capture.overflow import in_words
from hookmap.capture.rows import DTYPES, RowSelection
from hookmap.errors import CaptureError
from hookmap.loading import modules
from hookmap.loading.encoder_decoder import embedding_of_tokens
from hookmap.loading.memory import MemoryUse
from hookmap.loading.modules import evaluating
from hookmap.loading.prompts import Prompt, decode
from hookmap.maps.points import PointName
from hookmap.maps.selectors import Selector

log = logging.getLogger("hookmap")


@dataclass
class Run(ABC):
    """One capture. A subclass defines what a batch is."""

    engine: Engine
    tokenizer: Any
    selectors: tuple[Selector, ...]
    prompts: Sequence[Prompt]
    selection: RowSelection
    matching: frozenset[int]
    progress: Callable[[Progress], None] | None
    memory: MemoryUse
    halved: list[str] = field(default_factory=list)
    """each time that memory ran out, and what was done, in words"""
    lost: Counter[str] = field(default_factory=Counter)
    """rows of each tensor that became infinite in keep_dtype"""
    done: int = 0
    max_new_tokens: int = 0
    edits: tuple[Edit, ...] = ()
    watches: tuple[Watch, ...] = ()
    before: Sink | None = None
    """sink of the rows before the edits"""
    rows_stay: bool = False
    """whether the sink gets rows on the device that they were made on; else on the host"""
    _most: int | None = None
    """how many prompts fit into memory together, once a larger batch did not"""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the samples, for the manifest: a capture resumes only with the same settings."""

    @property
    def why_no_pads(self) -> str | None:
        """Why this run must not pad its batches; None where it may, as far as its own settings go."""
        return None

    @abstractmethod
    def batch(self, numbers: Sequence[int], sink: Sink) -> None:
        """Run these prompts together and hand their rows to the sink."""

    def all(self, groups: Sequence[Sequence[int]], sink: Sink, finished: Set[int] = frozenset()) -> None:
        """Run each batch with an unfinished sample, as a whole: a sample may depend on the others of its batch."""
        for group in groups:
            if any(number not in finished for number in group):
                self.together(group, sink)
                self.memory.look()
            self.done += len(group)
            self._show(0)

    def together(self, numbers: Sequence[int], sink: Sink) -> None:
        """Run a batch, in parts one after another where it is more than the memory."""
        self._most = in_parts(numbers, lambda part: self._part(part, sink), self._most)

    def _part(self, numbers: Sequence[int], sink: Sink) -> Sequence[int]:
        """Run these prompts together. Returns them where memory ran out. Raises CaptureError for one prompt alone."""
        try:
            self.batch(numbers, sink)
            return ()
        except torch.OutOfMemoryError as error:
            told = str(error).partition("\n")[0]
            if len(numbers) == 1:
                raise CaptureError(
                    f"out of memory on {self.device} with one prompt of {len(self.prompts[numbers[0]].token_ids)} "
                    f"tokens: give a shorter prompt or a smaller max_new_tokens, or load the model in a smaller dtype. "
                    f"({told})"
                ) from error
        # Outside of `except`: the traceback would keep the tensors of the run that failed.
        sink.abandon()
        if self.before is not None:
            self.before.abandon()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.halved.append(f"out of memory with {len(numbers)} prompts at once; going on with {len(numbers) // 2}")
        log.warning("%s (%s)", self.halved[-1], told)
        return numbers

    @property
    def device(self) -> torch.device:
        """The device of the token ids."""
        return device_of(self.engine)

    def _editor(self, observer: Observer) -> Editor | None:
        if not self.edits and not self.watches:
            return None
        before = None if self.before is None else self._observer(observer.layout, self.before)
        watching = partial(Watching, self.watches, observer.layout) if self.watches else None
        return Editor(self.edits, observer, before, watching)

    def _end(self, editor: Editor | None, columns: int) -> None:
        """Finish the rows before the edits, and those that functions watch."""
        for each in () if editor is None else editor.observers:
            each.finish(columns)
        if editor is not None and editor.before is not None:
            self._count(editor.before, "before/")

    def _count(self, observer: Observer, where: str = "") -> None:
        """Count the rows of a finished batch that overflowed; warn the first time."""
        if observer.lost and not self.lost:
            told = in_words(observer.lost, DTYPES[str(self.selection.dtype)])
            log.warning("%s These are stored as infinities; the manifest counts all of them.", told)
        self.lost.update({f"{where}{lost.name}": lost.rows for lost in observer.lost})

    def _observer(self, layout: BatchLayout, sink: Sink) -> Observer:
        return Observer(
            self.selectors,
            layout,
            sink.write,
            keys=self._keys,
            selection=self.selection,
            matching=self.matching,
            rows_stay=self.rows_stay,
        )

    @property
    def _keys(self) -> int:
        """Length of the longest row of attention weights."""
        return max(len(prompt.token_ids) for prompt in self.prompts) + max(0, self.max_new_tokens - 1)

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        written = (edit.selector for edit in self.edits)
        watched = (watch.selector for watch in self.watches)
        return running(self.engine, reads_attention((*self.selectors, *written, *watched)))

    def _finish(self, sink: Sink, observer: Observer, row: int, prompt: Prompt, new: list[int]) -> None:
        number = observer.layout.samples[row]
        sample = sample_of(number, prompt, decode(new, self.tokenizer), new, *observer.rows(row))
        sink.finish(sample)
        if self.before is not None and self.edits:
            self.before.finish(sample)

    def expected(self, number: int) -> Sample:
        """What the sample of this prompt will be, where nothing is generated."""
        prompt, selection = self.prompts[number], self.selection
        known = (len(prompt.token_ids), self.matching, prompt.image_positions)
        places = sorted(selection.places(prompt.token_ids, *known))
        if selection.mean:
            return sample_of(number, prompt, "", [], min(1, len(places)), "mean")
        places = places[-1:] if selection.one_row else places
        return sample_of(number, prompt, "", [], len(places), None if selection.everything else tuple(places))

    def _too_long(self, longest: int, error: IndexError) -> None:
        """Raises CaptureError where the model has fewer positions, and the given error otherwise."""
        limit = getattr(self.engine.root.config, "max_position_embeddings", None)
        if limit is None or longest <= limit:
            raise error
        raise CaptureError(
            f"{longest} tokens (prompt and max_new_tokens) do not fit into the {limit} positions of "
            f"{type(self.engine.root).__name__}: shorten the prompt, or give a smaller max_new_tokens."
        ) from error

    def _show(self, tokens_done: int) -> None:
        if self.progress is not None:
            self.progress(Progress(self.done, len(self.prompts), tokens_done, self.max_new_tokens))


def sample_of(number: int, prompt: Prompt, text: str, new: Sequence[int], rows: int, positions: Any) -> Sample:
    """The sample that a prompt has become. `new`: the tokens generated, whose text is `text`."""
    pictured = (prompt.image_positions, prompt.pictures or None) if prompt.inputs is not None else (None, None)
    own = (prompt.id, prompt.labels, *pictured, prompt.encoder_token_ids)
    ids = (*prompt.token_ids, *new)
    return Sample(number, prompt.text, text, ids, len(prompt.token_ids), rows, positions, *own)


@contextlib.contextmanager
def running(engine: Engine, pattern: bool = False) -> Iterator[None]:
    """Hold the model's lock during a run: exclusively where the run changes the model, or its engine needs it.

    `pattern`: whether the run captures attention weights.
    """
    module, lock = engine.module, lock_of(engine.module)
    if not pattern and not engine.exclusive:
        with lock.shared():
            if not any(part.training for _, part in modules.each_module(module)):
                yield
                return
    with lock.exclusive(), evaluating(module), contextlib.ExitStack() as eager:
        if pattern:  # only eager attention computes the weights as a tensor
            eager.enter_context(modules.eager(module))
        yield


def reads_attention(selectors: Sequence[Selector]) -> bool:
    """Whether one of these reads or writes what only eager attention has as a tensor."""
    return any(each.has_keys or PointName.of(each.point).definition.eager for each in selectors)


def device_of(engine: Engine) -> torch.device:
    """The device of the token ids. CPU for a model whose weights are on another machine."""
    device = modules.device_of(engine.root.get_input_embeddings())  # type: ignore[operator]
    return torch.device("cpu") if device.type == "meta" else device


def vocabulary_of(engine: Engine) -> int:
    """The size of the model's vocabulary, by its embedding."""
    return len(embedding_of_tokens(engine.root).weight)
