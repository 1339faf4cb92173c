"""Generated tokens as they are told, with the logprobs of the model's own distribution where they are asked for."""

import copy
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessor, RepetitionPenaltyLogitsProcessor

from hookmap.services.server.summaries import Figures

LEAST = -9999.0
"""logprob of what cannot come, as in vLLM: JSON has no -inf. `max(LEAST, x)` in this order is LEAST for NaN, too"""


@dataclass(frozen=True)
class Token:
    """One generated token, or one of the prompt."""

    row: int
    id: int
    logprob: float | None = None
    """of the model's own distribution, before temperature, top_p and penalties"""
    top: tuple[tuple[int, float], ...] = ()
    """the likeliest tokens there, and their logprobs"""
    figures: Figures | None = None
    """where the request wants a summary"""
    prompt: bool = False
    """whether it is one of the prompt, which an echo tells"""


class Likely(LogitsProcessor):  # type: ignore[misc]  # transformers' base is not typed
    """Looks at the distribution before temperature and the like: transformers puts those behind it."""

    def __init__(self) -> None:
        self._logprobs = torch.empty(0)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._logprobs = scores.float().log_softmax(-1)
        return scores

    def token(self, place: int, row: int, chosen: int, count: int) -> Token:
        """What was chosen in this place of the batch, with its logprob and the `count` likeliest tokens'."""
        own = self._logprobs[place]
        values, ids = own.topk(min(count, len(own)))
        return Token(row, chosen, float(own[chosen]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def beside(likely: Likely, config: GenerationConfig) -> tuple[GenerationConfig, list[LogitsProcessor]]:
    """Settings and processors with which the same tokens are drawn, and `likely` stands before the repetition penalty.

    transformers puts the penalty that the settings name before the processors that it is given.
    """
    penalty = config.repetition_penalty
    if penalty in (None, 1.0):
        return config, [likely]
    config = copy.copy(config)
    config.repetition_penalty = 1.0  # not None: then it would be the model's own
    return config, [likely, RepetitionPenaltyLogitsProcessor(penalty)]


def told(likely: Likely | None, place: int, row: int, chosen: int, count: int | None) -> Token:
    """The newest token in a place of the batch. `count`: of the likeliest tokens; None: no logprobs."""
    return Token(row, chosen) if likely is None or count is None else likely.token(place, row, chosen, count)
