"""`echo`: the logprobs of the prompt's own tokens, read in the forward pass over the prompt."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hookmap.capture.estimate import in_words
from hookmap.errors import CaptureError
from hookmap.model import HookedModel
from hookmap.services.server.errors import ApiError
from hookmap.services.server.tokens import Token

_CHUNK = 64
"""positions whose distributions are computed at once: each is as large as the vocabulary"""


def check_room(hm: HookedModel, tokens: int, most: int) -> None:
    """Raises ApiError 413 where the logits of so many tokens take more than `most` bytes; all are held at once."""
    held = tokens * hm.vocabulary * next(hm.root.parameters()).itemsize
    if held > most:
        raise ApiError(
            413,
            f"echo with logprobs holds the logits of {tokens} tokens at once (n times the longest prompt), "
            f"{in_words(held)}, and a request may hold {in_words(most)} ({most} bytes; asked: {held}). "
            "Send shorter prompts, or a smaller n.",
            param="echo",
            code="echo_too_large",
        )


class Echo:
    """Reads one prompt after the other. `count`: the number of likeliest tokens that are reported with each token."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._read: list[Token] = []

    @contextlib.contextmanager
    def listening(self, root: nn.Module, prompt: Sequence[int]) -> Iterator[None]:
        """Inside this context the model must be fed this prompt, and give the logits of all of its tokens."""
        me = threading.get_ident()

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == me and not self._read:
                logits = output["logits"] if isinstance(output, Mapping) else output[0]
                self._read = self._tokens(prompt, logits[0])

        handle = root.register_forward_hook(hook)
        self._read = []
        try:
            yield
        finally:
            handle.remove()

    def tokens(self, row: int) -> list[Token]:
        """The prompt's tokens, for one of its choices. The first has no logprob."""
        return [replace(each, row=row) for each in self._read]

    def _tokens(self, prompt: Sequence[int], logits: torch.Tensor) -> list[Token]:
        """`logits`: [pos, d_vocab]."""
        if len(logits) != len(prompt):
            raise CaptureError(f"the model gave logits of {len(logits)} of {len(prompt)} tokens: there is no echo.")
        found = [Token(0, prompt[0], prompt=True)]
        for start in range(0, len(prompt) - 1, _CHUNK):
            after = list(prompt[start + 1 : start + 1 + _CHUNK])
            logprobs = logits[start : start + len(after)].float().log_softmax(-1)
            own = logprobs.gather(1, torch.tensor(after, device=logprobs.device)[:, None])
            ranks = ((logprobs > own).sum(1) + 1).tolist()
            best = logprobs.topk(min(self._count, logprobs.shape[1]))
            tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            found += [
                Token(0, id, logprob, tuple(zip(*top, strict=True)), rank, prompt=True)
                for id, logprob, top, rank in zip(after, own[:, 0].tolist(), tops, ranks, strict=True)
            ]
        return found
