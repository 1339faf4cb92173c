"""How each row of a batch that runs chooses its next token: with transformers' own processors, by its own settings."""

from collections.abc import Sequence
from typing import Any

import torch

from hookmap.capture.run import device_of, running
from hookmap.loading import generation as gen
from hookmap.model import HookedModel
from hookmap.services.server.jobs import Job
from hookmap.services.server.shared_run import Choice


class Sampler:
    """Chooses the tokens that follow one prompt."""

    def __init__(self, hm: HookedModel, job: Job, prompt: Sequence[int]) -> None:
        shared = None if job.changes else gen.of_one_row(job.config)
        self._key = None if shared is None else str(sorted(shared.items()))
        """rows with one key are processed together; None: they look back at their own tokens"""
        self._draws, self._stops = bool(job.config.do_sample), bool(job.config.stop_strings)
        self._processors = [*job.changes.processors(len(prompt)), processors_of(hm, job, prompt)]

    def ends(self, choice: Choice, token: int) -> bool:
        """Whether a stop string of the model's own settings ends the choice with this token."""
        return self._stops and choice.ending.own(torch.tensor([[*choice.tokens, token]]))[0]

    @staticmethod
    def choose(
        logits: torch.Tensor, rows: "Sequence[tuple[Sampler, Choice]]"
    ) -> tuple[list[int], dict[int, Exception]]:
        """The next token of each row, and what went wrong with some. `logits`: [rows, d_vocab], in float32."""
        together = dict[str | int, list[int]]()
        for row, (sampler, _) in enumerate(rows):
            together.setdefault(row if sampler._key is None else sampler._key, []).append(row)
        chosen, wrong = [0] * len(rows), dict[int, Exception]()
        for own in together.values():
            sampler = rows[own[0]][0]
            try:
                found = sampler._chosen(logits[own], [rows[row][1] for row in own])
            except Exception as error:  # of one request: the others go on
                wrong |= dict.fromkeys(own, error)
                continue
            for row, token in zip(own, found.tolist(), strict=True):
                chosen[row] = token
        return chosen, wrong

    def _chosen(self, scores: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
        read = [(0,)] * len(choices) if self._key is not None else [choice.tokens for choice in choices]
        ids = torch.tensor(read, device=scores.device)
        for change in self._processors:
            scores = change(ids, scores)
        if not self._draws:
            return scores.argmax(-1)
        likely = scores.softmax(-1)
        if all(choice.generator is None for choice in choices):
            return torch.multinomial(likely, 1)[:, 0]
        each = zip(likely, choices, strict=True)
        return torch.cat([torch.multinomial(row, 1, generator=choice.generator) for row, choice in each])


def processors_of(hm: HookedModel, job: Job, prompt: Sequence[int]) -> Any:
    """What `generate` would change the scores with, in its order."""
    found = list[Any]()

    def keep(model: Any, input_ids: torch.Tensor, logits_processor: Any, *_: Any, **__: Any) -> torch.Tensor:
        found.append(logits_processor)
        return input_ids

    ids = torch.tensor([list(prompt)], device=device_of(hm.hooks))
    config = gen.without_stop_strings(job.config)
    given = {"attention_mask": torch.ones_like(ids), "generation_config": config, "custom_generate": keep}
    with running(hm.hooks):
        hm.hooks.root.generate(ids, **given)  # type: ignore[operator]
    return found[0]
