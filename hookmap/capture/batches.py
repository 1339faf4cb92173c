"""Batches of prompts through the model: generating, or harvesting one forward pass over given texts."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from transformers import GenerationConfig

from hookmap.activations import Sink
from hookmap.capture.engines.observation import Observer
from hookmap.capture.engines.pass_rows import BatchLayout
from hookmap.capture.interventions.edits import Editor
from hookmap.capture.run import Run
from hookmap.errors import CaptureError
from hookmap.loading import generation as gen
from hookmap.loading.encoder_decoder import DECODER_TOKENS, TOKENS, is_encoder_decoder, tokens_argument
from hookmap.loading.further_inputs import joined
from hookmap.loading.prompts import Prompt
from hookmap.loading.sampling import OwnDraws, own_generator
from hookmap.loading.stopping import Finished

WINDOW = 4096
"""prompts that a harvest sorts by length at a time, which bounds how far it leaves their order"""


@dataclass
class Generating(Run):
    """A batch is one call of `generate`: texts, tokens and tensors come from the same forward passes."""

    config: GenerationConfig = field(default_factory=GenerationConfig)
    stop: tuple[str, ...] = ()
    seed: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"generation": gen.as_json(self.config), "seed": self.seed, "stop": list(self.stop)}

    @property
    def why_no_pads(self) -> str | None:
        return "a setting of this generation would count pads as tokens" if gen.counts_pads(self.config) else None

    def batch(self, numbers: Sequence[int], sink: Sink) -> None:
        prompts = [self.prompts[number] for number in numbers]
        layout = layout_of(numbers, prompts)
        observer = self._observer(layout, sink)
        editor = self._editor(observer)

        observers = [observer, *(() if editor is None else editor.observers)]

        def tell(columns: int, finished: list[bool]) -> None:
            for each in observers:
                each.sampled(columns, finished)
            if self.progress is not None:
                with contextlib.ExitStack() as aside:
                    for each in observers:
                        aside.enter_context(each.aside())
                    self._show(columns - layout.width)

        finished = Finished(self.config, self.stop, self.tokenizer, tell, editor.stopped if editor else None)
        with self._turn():
            inputs = self._inputs(prompts, layout, finished)
            sequences = self._generate(observer, inputs, editor)
        if not torch.equal(sequences[:, : layout.width].cpu(), inputs[tokens_argument(self.engine.root)].cpu()):
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

    def _inputs(self, prompts: Sequence[Prompt], layout: BatchLayout, finished: Finished) -> dict[str, Any]:
        inputs = fed(self, prompts, layout, self.config.pad_token_id)
        inputs = generating(self.engine.root, inputs)
        inputs |= {"generation_config": gen.without_stop_strings(self.config), "stopping_criteria": [finished]}
        if self.seed is not None and self.config.do_sample:
            own = [own_generator(self.seed, number, self.device) for number in layout.samples]
            inputs["custom_generate"] = OwnDraws(own)
        return inputs

    def _generate(self, observer: Observer, inputs: dict[str, Any], editor: Editor | None) -> torch.Tensor:
        draws = inputs.get("custom_generate")
        try:
            with draws.expected(self.engine.module) if draws else contextlib.nullcontext():
                return self.engine.generate(observer, inputs, editor)
        except ValueError as error:  # settings that transformers checks only now, such as temperature=0
            _refused_inputs(inputs, error)
            said = f"transformers does not generate with these settings: {error}"
            if " Cache " in said:  # a model without attention, for example
                said += " Its cache is what fails here: use_cache=False generates without one."
            raise CaptureError(said) from error
        except IndexError as error:
            self._too_long(observer.layout.width + self.max_new_tokens, error)
            raise


@dataclass
class Harvesting(Run):
    """A batch is one forward pass over texts of about one length, padded on the right: no token attends to a pad."""

    @property
    def settings(self) -> dict[str, Any]:
        return {"harvest": True}

    def batch(self, numbers: Sequence[int], sink: Sink) -> None:
        prompts = [self.prompts[number] for number in numbers]
        layout = layout_of(numbers, prompts, right=True)
        observer = self._observer(layout, sink)
        editor = self._editor(observer)
        inputs = fed(self, prompts, layout, 0)
        inputs |= {"use_cache": False, **without_loss(self.engine.root)}
        with self._turn():
            try:
                self.engine.forward(observer, inputs, editor)
            except IndexError as error:
                self._too_long(layout.width, error)
            except ValueError as error:
                _refused_inputs(inputs, error)
                raise
        observer.finish(layout.width)
        self._count(observer)
        if editor is not None and editor.counts:
            editor.finish()
        self._end(editor, layout.width)
        for row, prompt in enumerate(prompts):
            self._finish(sink, observer, row, prompt, [])


def layout_of(numbers: Sequence[int], prompts: Sequence[Prompt], right: bool = False) -> BatchLayout:
    """The layout of a batch of these prompts, whose numbers in the run are `numbers`."""
    lengths = tuple(len(prompt.token_ids) for prompt in prompts)
    images = tuple(frozenset(prompt.image_positions) for prompt in prompts)
    tokens = tuple(prompt.token_ids for prompt in prompts)
    return BatchLayout(tuple(numbers), lengths, right, images if any(images) else (), tokens)


def _refused_inputs(inputs: Mapping[str, Any], error: ValueError) -> None:
    """Raises CaptureError where the model says that images and their tokens do not agree."""
    if "image" in str(error).lower() and any("pixel" in name or "image" in name for name in inputs):
        raise CaptureError(f"the model refuses the prompts' images: {error}") from error


def fed(run: Run, prompts: Sequence[Prompt], layout: BatchLayout, pad: int) -> dict[str, Any]:
    """What a batch of these prompts feeds the model: token ids, their mask, and the further inputs of its samples."""
    before = [layout.pads(row) for row in range(len(prompts))]
    inputs = padded([prompt.token_ids for prompt in prompts], layout, pad, run.device)
    if is_encoder_decoder(run.engine.root):  # the rest is the encoder's; the decoder's tokens are never padded
        inputs = {DECODER_TOKENS: inputs[TOKENS]}
    dtype = next(run.engine.root.parameters()).dtype
    return inputs | joined([prompt.inputs for prompt in prompts], layout.lengths, before, run.device, dtype)


def padded(rows: Sequence[Sequence[int]], layout: BatchLayout, pad: int, device: torch.device) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, [batch, width], for these token ids."""
    ids = torch.full((len(rows), layout.width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        place = slice(layout.pads(row), layout.pads(row) + len(tokens))
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def generating(root: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` for these inputs. transformers refuses arguments that the model does not use."""
    used = {"input_ids", *read_by(root)}
    return {name: value for name, value in inputs.items() if name in used} | without_loss(root)


def read_by(root: Any) -> set[str]:
    """Names of the inputs that a model takes."""
    taking = [root.forward, *([root.prepare_inputs_for_generation] if root.can_generate() else [])]
    return {name for each in taking for name in signature(each).parameters}


def without_loss(root: Any) -> dict[str, bool]:
    """Switch off the loss of the routers, which some configs ask for: it counts pads as tokens, and is not captured."""
    configs = (root.config, root.config.get_text_config())
    return {"output_router_logits": False} if any(getattr(c, "output_router_logits", False) for c in configs) else {}


def generation_batches(lengths: Sequence[int], size: int, may_pad: bool = True) -> Iterator[tuple[int, ...]]:
    """Indices of the prompts that run together: neighbours, and where may_pad is False of one length."""
    groups: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(0 if may_pad else length, []).append(number)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield tuple(group[start : start + size])


def harvest_batches(
    lengths: Sequence[int], tokens: int, size: int | None = None, may_pad: bool = True
) -> Iterator[tuple[int, ...]]:
    """Indices of the texts that run together: of about one length, with at most `tokens` tokens, pads included.

    A text longer than `tokens` runs alone. `size`: the most texts of a batch. may_pad=False: all are of one length.
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


Batches = tuple[tuple[tuple[int, ...], ...], str | None]
"""indices of the prompts of each batch; why prompts do not share one, None where they do"""


def batches(
    lengths: Sequence[int], make: Callable[[bool], Iterator[tuple[int, ...]]], why_apart: Callable[[], str | None]
) -> Batches:
    """Choose batches with or without pads. `make`: makes them; `why_apart`: called only where one would have pads."""
    padded = tuple(make(True))
    if all(len({lengths[number] for number in batch}) == 1 for batch in padded):
        return padded, None
    reason = why_apart()
    return (padded, None) if reason is None else (tuple(make(False)), reason)
