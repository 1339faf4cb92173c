"""What a request changes of the scores, besides what transformers' settings do: as OpenAI and vLLM document it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessor

from hookmap.services.server.grammar import Grammar


@dataclass(frozen=True)
class ScoreChanges:
    """Changes of the scores of each next token. Logprobs are told of the scores before them."""

    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    """token id -> what is added"""
    least: int = 0
    """new tokens before which none of `ends` may come"""
    ends: tuple[int, ...] = ()
    grammar: Grammar | None = None
    """what the text must fit"""

    def __bool__(self) -> bool:
        return bool(self._adds or self.grammar)

    @property
    def _adds(self) -> bool:
        return bool(self.presence or self.frequency or self.bias or self.least)

    def processors(self, prompt: int) -> Sequence[LogitsProcessor]:
        """What `generate` takes. `prompt`: columns of the prompts, pads included."""
        adds = [_Changing(self, prompt)] if self._adds else []
        return [*adds, *([self.grammar.processor(prompt)] if self.grammar else [])]


class _Changing(LogitsProcessor):  # type: ignore[misc]  # transformers' base is not typed
    def __init__(self, changes: ScoreChanges, prompt: int) -> None:
        self._changes, self._prompt = changes, prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        changes, new, found = self._changes, input_ids[:, self._prompt :], scores.clone()
        for token, added in changes.bias.items():
            found[:, token] += added
        if changes.presence or changes.frequency:
            counts = torch.zeros_like(found).scatter_add_(1, new, torch.ones_like(new, dtype=found.dtype))
            found -= changes.frequency * counts + changes.presence * (counts > 0)
        if new.shape[1] < changes.least:
            found[:, list(changes.ends)] = -torch.inf
        return found
