"""One request through the model: the run of a capture, told token by token, that ends when nobody waits for it.

A plain request goes through the same lines with an engine that sets no hook and an observer that watches nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, StoppingCriteria

from hookmap import generation as gen
from hookmap.activations import Activation, Sample, Sink
from hookmap.engines.editing import Editor
from hookmap.engines.observation import BatchLayout, Observer
from hookmap.prompts import Prompt
from hookmap.readout import Readout
from hookmap.runs import Generating
from hookmap.server.summaries import Figures, Summarising, Summary


class CancelledError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Token:
    """One generated token."""

    row: int
    id: int
    logprob: float | None = None
    """of the model's own distribution, before temperature and top_p"""
    top: tuple[tuple[int, float], ...] = ()
    """the likeliest tokens there, and their logprobs"""
    figures: Figures | None = None
    """where the request wants a summary"""


@dataclass
class Answering(Generating):
    """A `Generating` that tells each token of each row. With no selectors and no edits it watches nothing."""

    tell: Callable[[list[Token]], None] = field(default=lambda tokens: None)
    cancelled: Callable[[], bool] = field(default=lambda: False)
    top_logprobs: int | None = None
    """how many likeliest tokens are told with each token; None: no logprobs"""
    summary: Summary | None = None
    readout: Readout | None = None
    """what the summary's lens reads with"""
    summarising: Summarising | None = None
    """of the batch that runs"""

    def _observer(self, layout: BatchLayout, sink: Sink) -> Observer:
        if self.summary is not None:
            kept: dict[str, Any] = {"keys": self._keys, "kept": self.kept, "matching": self.matching}
            what = self.summary, self.readout, self.selectors
            self.summarising = Summarising(*what, layout, sink.write, **kept)
            return self.summarising
        watches = self.selectors or self.edits
        return super()._observer(layout, sink) if watches else _Unwatched((), layout, sink.write)

    def _inputs(self, prompts: Sequence[Prompt], layout: BatchLayout, finished: gen.Finished) -> dict[str, Any]:
        likely = None if self.top_logprobs is None else _Likely(self.top_logprobs)
        inputs = super()._inputs(prompts, layout, finished)
        inputs["stopping_criteria"] = [_Followed(self, finished, layout.samples, likely)]
        if likely is not None:
            inputs["logits_processor"] = [likely]
        return inputs


class Plain:
    """An engine for requests without captures: nothing is hooked."""

    name = "plain"
    alone = False

    def __init__(self, module: nn.Module, root: nn.Module) -> None:
        self.module = module
        self.root = root

    def generate(self, observer: Observer, inputs: dict[str, Any], editor: Editor | None = None) -> torch.Tensor:
        """The model's own `generate`."""
        sequences: torch.Tensor = self.root.generate(**inputs)  # type: ignore[operator]
        return sequences

    def forward(self, observer: Observer, inputs: dict[str, Any], editor: Editor | None = None) -> None:
        """One forward pass."""
        with torch.no_grad():
            self.root(**inputs)


class _Unwatched(Observer):
    """Counts tokens, and has seen no forward pass."""

    def finish(self, columns: int) -> tuple[int, ...]:
        return tuple(columns - self.layout.width if count is None else count for count in self.generated)


class Gathered:
    """A sink that keeps the samples, and passes everything on to another where there is one."""

    def __init__(self, sink: Sink | None = None) -> None:
        self.samples: list[Sample] = []
        self._sink = sink

    def write(self, activation: Activation) -> None:
        """See Sink."""
        if self._sink is not None:
            self._sink.write(activation)

    def finish(self, sample: Sample) -> None:
        """See Sink."""
        self.samples.append(sample)
        if self._sink is not None:
            self._sink.finish(sample)

    def abandon(self) -> None:
        """See Sink."""


class _Likely(LogitsProcessor):  # type: ignore[misc]  # transformers' base is not typed
    """Looks at the distribution before temperature and the like: transformers puts those behind it."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._logprobs = torch.empty(0)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._logprobs = scores.float().log_softmax(-1)
        return scores

    def tokens(self, rows: Sequence[int], chosen: torch.Tensor) -> list[Token]:
        """What was chosen, [batch], with its logprob and the likeliest tokens'."""
        own = self._logprobs.gather(1, chosen[:, None].to(self._logprobs.device))[:, 0].tolist()
        values, ids = self._logprobs.topk(min(self._count, self._logprobs.shape[1]))
        tops = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
        return [Token(*each) for each in zip(rows, chosen.tolist(), own, tops, strict=True)]


class _Followed(StoppingCriteria):  # type: ignore[misc]
    """After each token: ends the run that nobody waits for, and tells the tokens of rows that had not ended."""

    def __init__(self, run: Answering, finished: gen.Finished, rows: tuple[int, ...], likely: _Likely | None) -> None:
        self._run, self._finished, self._rows, self._likely = run, finished, rows, likely
        self._ended = [False] * len(rows)
        self._looked = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        if self._run.cancelled():
            raise CancelledError
        done: torch.Tensor = self._finished(input_ids, scores, **kwargs)
        newest = input_ids[:, -1]
        if self._likely is not None:
            tokens = self._likely.tokens(self._rows, newest)
        else:
            tokens = [Token(row, token) for row, token in zip(self._rows, newest.tolist(), strict=True)]
        if self._run.summarising is not None:
            figures = self._run.summarising.figures(input_ids.shape[1])
            tokens = [replace(token, figures=each) for token, each in zip(tokens, figures, strict=True)]
        self._run.tell([token for token, ended in zip(tokens, self._ended, strict=True) if not ended])
        self._ended = [a or b for a, b in zip(self._ended, done.tolist(), strict=True)]
        self._looked += 1
        if self._looked % 64 == 1:
            self._run.memory.look()
        return done
