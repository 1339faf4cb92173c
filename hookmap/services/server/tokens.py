"""Tokens as an answer reports them, with the logprobs of the model's own distribution where asked for."""

import copy
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessor, RepetitionPenaltyLogitsProcessor

from hookmap.services.server.summaries import Figures

LEAST = -9999.0
"""stands for -inf, which JSON has not; vLLM's value. `max(LEAST, x)`, in this order, is LEAST for NaN, too"""


@dataclass(frozen=True)
class Token:
    """One generated token, or one of the prompt."""

    row: int
    id: int
    logprob: float | None = None
    """in the model's own distribution, before temperature, top_p and penalties"""
    top: tuple[tuple[int, float], ...] = ()
    """the likeliest tokens at this place, and their logprobs"""
    rank: int | None = None
    """of a token of the prompt: 1 for the likeliest"""
    figures: Figures | None = None
    """where the request asked for a summary"""
    prompt: bool = False
    """whether it is a token of the prompt, sent by an echo"""


class Likely(LogitsProcessor):  # type: ignore[misc]  # transformers' base is not typed
    """Remembers the distribution before temperature and the like, which transformers applies after this processor."""

    def __init__(self) -> None:
        self._logprobs = torch.empty(0)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._logprobs = scores.float().log_softmax(-1)
        return scores

    def token(self, place: int, row: int, chosen: int, count: int) -> Token:
        """The token chosen for this row of the batch, with its logprob and those of the `count` likeliest tokens."""
        own = self._logprobs[place]
        values, ids = own.topk(min(count, len(own)))
        return Token(row, chosen, float(own[chosen]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


class Finite(LogitsProcessor):  # type: ignore[misc]  # transformers' base is not typed
    """Notes the rows whose scores leave no choice: NaN or infinity is among them, or nothing else than -inf.

    Their scores become zeros, so that the other rows of the batch go on.
    """

    def __init__(self) -> None:
        self.wrong: list[bool] = []
        """for each row of the batch, of the newest step"""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        right = scores.amax(-1).isfinite()  # the largest of scores with NaN is NaN
        self.wrong = [not each for each in right.tolist()]
        return scores.masked_fill(~right[:, None], 0.0) if any(self.wrong) else scores


def beside(likely: Likely, config: GenerationConfig) -> tuple[GenerationConfig, list[LogitsProcessor]]:
    """Settings and processors that draw the same tokens, with `likely` before the repetition penalty.

    transformers would apply the settings' own penalty before the processors that it is given.
    """
    penalty = config.repetition_penalty
    if penalty in (None, 1.0):
        return config, [likely]
    config = copy.copy(config)
    config.repetition_penalty = 1.0  # not None: then it would be the model's own
    return config, [likely, RepetitionPenaltyLogitsProcessor(penalty)]


def told(likely: Likely | None, place: int, row: int, chosen: int, count: int | None) -> Token:
    """The newest token of the row at `place` of the batch. `count`: of the likeliest tokens; None: no logprobs."""
    return Token(row, chosen) if likely is None or count is None else likely.token(place, row, chosen, count)
