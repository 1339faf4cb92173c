"""Batches of prompts through the model into a sink: generating, or harvesting one forward pass over given texts."""

import contextlib
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from transformers import GenerationConfig

from hookmap.activations import Sample, Sink
from hookmap.capture.engines import Engine
from hookmap.capture.engines.model_lock import lock_of
from hookmap.capture.engines.observation import Observer
from hookmap.capture.engines.pass_rows import BatchLayout
from hookmap.capture.interventions.edits import Edit, Editor
from hookmap.capture.overflow import in_words
from hookmap.capture.rows import DTYPES, RowSelection
from hookmap.errors import CaptureError
from hookmap.loading import generation as gen
from hookmap.loading import skeleton
from hookmap.loading.memory import MemoryUse
from hookmap.loading.prompts import Prompt, decode
from hookmap.maps.points import PointName
from hookmap.maps.selectors import Selector

log = logging.getLogger("hookmap")

WINDOW = 4096
"""prompts that a harvest sorts by length at a time, so that it is no more than these out of order"""


@dataclass(frozen=True)
class Progress:
    """Where a run is."""

    samples_done: int
    samples: int
    tokens_done: int
    """generated so far in the current batch, for each prompt"""
    tokens: int
    """generated at most for each prompt"""


@dataclass
class Run(ABC):
    """One capture. A subclass says what a batch is."""

    engine: Engine
    tokenizer: Any
    selectors: tuple[Selector, ...]
    prompts: Sequence[Prompt]
    selection: RowSelection
    matching: frozenset[int]
    progress: Callable[[Progress], None] | None
    memory: MemoryUse
    halved: list[str] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    """of each tensor, rows that became infinite in the dtype that is kept"""
    """what was done about memory that ran out, in words"""
    done: int = 0
    max_new_tokens: int = 0
    edits: tuple[Edit, ...] = ()
    before: Sink | None = None
    """takes the rows as they were before the edits"""
    _most: int | None = None
    """prompts that fit together, once more did not"""

    @abstractmethod
    def batch(self, numbers: Sequence[int], sink: Sink) -> None:
        """Run these prompts together and hand their rows to the sink."""

    def all(self, groups: Sequence[Sequence[int]], sink: Sink, finished: Set[int] = frozenset()) -> None:
        """Each batch that is not finished yet, whole: what a sample is may depend on who runs with it."""
        for group in groups:
            if any(number not in finished for number in group):
                self.together(group, sink)
                self.memory.look()
            self.done += len(group)
            self._show(0)

    def together(self, numbers: Sequence[int], sink: Sink) -> None:
        """A batch, or parts of it one after another, once it was more than the memory."""
        size = min(len(numbers), self._most or len(numbers))
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            if not self._fits(part, sink):
                self._most = len(part) // 2
                self.together(numbers[start:], sink)
                return

    def _fits(self, numbers: Sequence[int], sink: Sink) -> bool:
        """Run a batch, unless memory runs out, which only a batch of one prompt must not."""
        try:
            self.batch(numbers, sink)
            return True
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
        return False

    @property
    def device(self) -> torch.device:
        """Where token ids are fed."""
        return device_of(self.engine)

    def _editor(self, observer: Observer) -> Editor | None:
        if not self.edits:
            return None
        before = None if self.before is None else self._observer(observer.layout, self.before)
        return Editor(self.edits, observer, before)

    def _end(self, editor: Editor | None, columns: int) -> None:
        """What `_observer`'s caller does at the end, of the rows before the edits."""
        if editor is not None and editor.before is not None:
            editor.before.finish(columns)
            self._count(editor.before, "before/")

    def _count(self, observer: Observer, where: str = "") -> None:
        """What was lost of a finished batch; told the first time."""
        if observer.lost and not self.lost:
            told = in_words(observer.lost, DTYPES[str(self.selection.dtype)])
            log.warning("%s These are stored as infinities; the manifest counts all of them.", told)
        self.lost.update({f"{where}{lost.name}": lost.rows for lost in observer.lost})

    def _observer(self, layout: BatchLayout, sink: Sink) -> Observer:
        return Observer(
            self.selectors, layout, sink.write, keys=self._keys, selection=self.selection, matching=self.matching
        )

    @property
    def _keys(self) -> int:
        """How long rows of attention weights become."""
        return max(len(prompt.token_ids) for prompt in self.prompts) + max(0, self.max_new_tokens - 1)

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        return running(self.engine, reads_attention(self.selectors))

    def _finish(self, sink: Sink, observer: Observer, row: int, prompt: Prompt, new: list[int]) -> None:
        rows, positions = observer.rows(row)
        text, ids, known = decode(new, self.tokenizer), (*prompt.token_ids, *new), len(prompt.token_ids)
        number = observer.layout.samples[row]
        sample = Sample(number, prompt.text, text, ids, known, rows, positions, prompt.id, prompt.labels)
        sink.finish(sample)
        if self.before is not None and self.edits:
            self.before.finish(sample)

    def _too_long(self, longest: int, error: IndexError) -> None:
        """Raises CaptureError where the model has not so many positions, and the error again where it has."""
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


@dataclass
class Generating(Run):
    """A batch is one `generate`: text, tokens and every tensor come out of the same forward passes."""

    config: GenerationConfig = field(default_factory=GenerationConfig)
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def batch(self, numbers: Sequence[int], sink: Sink) -> None:
        """See `Run.batch`."""
        prompts = [self.prompts[number] for number in numbers]
        layout = BatchLayout(tuple(numbers), tuple(len(prompt.token_ids) for prompt in prompts))
        observer = self._observer(layout, sink)
        editor = self._editor(observer)

        observers = [observer] if editor is None or editor.before is None else [observer, editor.before]

        def tell(columns: int, finished: list[bool]) -> None:
            with contextlib.ExitStack() as aside:
                for each in observers:
                    each.sampled(columns, finished)
                    aside.enter_context(each.aside())
                self._show(columns - layout.width)

        finished = gen.Finished(self.config, self.stop, self.tokenizer, tell)
        with self._turn():
            inputs = self._inputs(prompts, layout, finished)
            sequences = self._generate(observer, inputs, editor)
        if not torch.equal(sequences[:, : layout.width].cpu(), inputs["input_ids"].cpu()):
            raise CaptureError(
                f"{type(self.engine.runner).__name__}.generate ran on other tokens than the prompt's: its rows are not "
                "the prompt's. Give the prompt as the model reads it, and generate without what changes it."
            )
        counts = observer.finish(sequences.shape[1])
        self._count(observer)
        if editor is not None:
            editor.finish()
        self._end(editor, sequences.shape[1])
        for row, prompt in enumerate(prompts):
            self._finish(
                sink, observer, row, prompt, sequences[row, layout.width : layout.width + counts[row]].tolist()
            )

    def _inputs(self, prompts: Sequence[Prompt], layout: BatchLayout, finished: gen.Finished) -> dict[str, Any]:
        inputs = padded([prompt.token_ids for prompt in prompts], layout, self.config.pad_token_id, self.device)
        inputs = generating(self.engine.root, inputs, self.config, self.tokenizer)
        inputs |= {"generation_config": self.config, "stopping_criteria": [finished]}
        if self.seed is not None and self.config.do_sample:
            own = [gen.own_generator(self.seed, number, self.device) for number in layout.samples]
            inputs["custom_generate"] = gen.OwnDraws(own)
        return inputs

    def _generate(self, observer: Observer, inputs: dict[str, Any], editor: Editor | None) -> torch.Tensor:
        draws = inputs.get("custom_generate")
        try:
            with draws.expected(self.engine.module) if draws else contextlib.nullcontext():
                return self.engine.generate(observer, inputs, editor)
        except ValueError as error:  # settings that transformers looks at only now, such as temperature=0
            said = f"transformers does not generate with these settings: {error}"
            if " Cache " in said:  # such as that of a model without attention
                said += " Its cache is what fails here: use_cache=False generates without one."
            raise CaptureError(said) from error
        except IndexError as error:
            self._too_long(inputs["input_ids"].shape[1] + self.max_new_tokens, error)
            raise


@dataclass
class Harvesting(Run):
    """A batch is one forward pass over texts of about one length. Padded behind: no token of a text sees a pad."""

    def batch(self, numbers: Sequence[int], sink: Sink) -> None:
        """See `Run.batch`."""
        prompts = [self.prompts[number] for number in numbers]
        layout = BatchLayout(tuple(numbers), tuple(len(prompt.token_ids) for prompt in prompts), right=True)
        observer = self._observer(layout, sink)
        editor = self._editor(observer)
        inputs = padded([prompt.token_ids for prompt in prompts], layout, 0, self.device)
        inputs |= {"use_cache": False, **without_loss(self.engine.root)}
        with self._turn():
            try:
                self.engine.forward(observer, inputs, editor)
            except IndexError as error:
                self._too_long(layout.width, error)
        observer.finish(layout.width)
        self._count(observer)
        self._end(editor, layout.width)
        for row, prompt in enumerate(prompts):
            self._finish(sink, observer, row, prompt, [])


@contextlib.contextmanager
def running(engine: Engine, pattern: bool = False) -> Iterator[None]:
    """Run the model: alone where the run changes it for a while, or its engine needs that.

    `pattern`: the run reads attention weights.
    """
    module, lock = engine.module, lock_of(engine.module)
    if not pattern and not engine.exclusive:
        with lock.shared():
            if not any(part.training for part in module.modules()):
                yield
                return
    with lock.exclusive(), gen.evaluating(module), contextlib.ExitStack() as eager:
        if pattern:  # the faster implementations of attention never have its weights as a tensor
            eager.enter_context(skeleton.eager(module))
        yield


def padded(rows: Sequence[Sequence[int]], layout: BatchLayout, pad: int, device: torch.device) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, [batch, width], of these token ids."""
    ids = torch.full((len(rows), layout.width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        place = slice(layout.pads(row), layout.pads(row) + len(tokens))
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def generating(root: Any, inputs: dict[str, Any], config: GenerationConfig, tokenizer: Any) -> dict[str, Any]:
    """What `generate` is given for these inputs: transformers refuses what the model does not use."""
    used = {name for each in (root.prepare_inputs_for_generation, root.forward) for name in signature(each).parameters}
    given = {name: value for name, value in inputs.items() if name == "input_ids" or name in used}
    if config.stop_strings:
        given["tokenizer"] = tokenizer
    return given | without_loss(root)


def without_loss(root: Any) -> dict[str, bool]:
    """A config may ask for the loss of the routers, which counts pads in no way that works; a capture reads none."""
    configs = (root.config, root.config.get_text_config())
    return {"output_router_logits": False} if any(getattr(c, "output_router_logits", False) for c in configs) else {}


def generation_batches(lengths: Sequence[int], size: int, may_pad: bool = True) -> Iterator[tuple[int, ...]]:
    """Numbers of the prompts that run together: neighbours; of one length, where the model may not be padded."""
    groups: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(0 if may_pad else length, []).append(number)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield tuple(group[start : start + size])


def harvest_batches(
    lengths: Sequence[int], tokens: int, size: int | None = None, may_pad: bool = True
) -> Iterator[tuple[int, ...]]:
    """Numbers of the texts that run together: of about one length, `tokens` at most with their pads.

    A text that is longer than `tokens` runs alone. `size`: texts at most. may_pad: else they are of exactly one length.
    """
    for start in range(0, len(lengths), WINDOW):
        batch: list[int] = []
        for number in sorted(range(start, min(start + WINDOW, len(lengths))), key=lambda n: lengths[n]):
            full = lengths[number] * (len(batch) + 1) > tokens or len(batch) == size
            if batch and (full or (not may_pad and lengths[number] != lengths[batch[0]])):
                yield tuple(batch)
                batch = []
            batch.append(number)
        if batch:
            yield tuple(batch)


def reads_attention(selectors: Sequence[Selector]) -> bool:
    """Whether a run of these reads attention weights, for which it computes attention in another way."""
    return any("key" in PointName.of(selector.point).definition.axes for selector in selectors)


Batches = tuple[tuple[tuple[int, ...], ...], str | None]
"""numbers of the prompts that run together; why those of different lengths run apart, where they do"""


def batches(
    lengths: Sequence[int], make: Callable[[bool], Iterator[tuple[int, ...]]], why_apart: Callable[[], str | None]
) -> Batches:
    """`make`: the batches, padded or not. `why_apart`: asked only where a batch would have pads."""
    padded = tuple(make(True))
    if all(len({lengths[number] for number in batch}) == 1 for batch in padded):
        return padded, None
    reason = why_apart()
    return (padded, None) if reason is None else (tuple(make(False)), reason)


def device_of(engine: Engine) -> torch.device:
    """Where token ids are fed; of a model whose weights are elsewhere, from where they are sent."""
    device = skeleton.device_of(engine.root.get_input_embeddings())  # type: ignore[operator]
    return torch.device("cpu") if device.type == "meta" else device


def vocabulary_of(engine: Engine) -> int:
    """How many token ids the model can be fed."""
    return len(engine.root.get_input_embeddings().weight)  # type: ignore[operator]
