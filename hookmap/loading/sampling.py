"""Seeded sampling: each row of a batch draws from a generator of its own, so that its tokens depend on no other row."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor

from hookmap.errors import CaptureError


def own_seed(seed: int, of: int | str) -> int:
    """The seed, of 62 bits, that one sample of a run draws with, or one request; the first sample's is the run's own.

    `of`: the sample's number, 0-based, or a request's name. Nothing else decides it: no batch, and not what ran before.
    """
    if of == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{of}".encode()).digest()[:8], "big") >> 2


def own_generator(seed: int, number: int, device: torch.device) -> torch.Generator:
    """What sample `number` draws from: the numbers of torch's own generator after `torch.manual_seed(own_seed)`."""
    return torch.Generator(device).manual_seed(own_seed(seed, number))


class OwnDraws:
    """A way of generating for `generate(custom_generate=...)`: each row draws from a generator of its own.

    So a row draws what it draws alone, whatever is in the batch, and torch's generators are not touched.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        """One generator for each row, on the device of the token ids."""
        self._generators = generators
        self._ran = False

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> torch.Tensor:
        """transformers' own loop, in which the drawn token is the only one that is left to take."""
        self._ran = True
        logits_processor.append(_Drawn(self._generators))  # behind temperature and the like
        generation_config.do_sample = False  # `generate`'s own copy
        sequences: torch.Tensor = model._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, **inputs
        )
        return sequences

    @contextlib.contextmanager
    def expected(self, module: Any) -> Iterator[None]:
        """Raises CaptureError where the `generate` of `module` that runs inside has a loop of its own."""
        why = (
            f"{type(module).__name__}.generate has a loop of its own, and takes no custom_generate: it cannot draw "
            "with a seed. Leave seed= out, generate greedily, or open the transformers model in it."
        )
        try:
            yield
        except TypeError as error:
            if "custom_generate" in str(error):
                raise CaptureError(why) from error
            raise
        if not self._ran:
            raise CaptureError(why)


class _Drawn(LogitsProcessor):  # type: ignore[misc]  # transformers' base is not typed
    """0 for the token that a row draws, -inf for all others."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        rows = zip(scores.softmax(-1), self._generators, strict=True)
        drawn = torch.stack([torch.multinomial(row, 1, generator=own) for row, own in rows])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)
