"""When a row of generated tokens is finished: at an end of sequence or a stop string."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StopStringCriteria

from hookmap.errors import CaptureError
from hookmap.loading.generation import end_tokens
from hookmap.loading.prompts import text_of

Told = Callable[[int, list[bool]], None]
"""(columns of the batch now, whether each row got its last token with this one)"""


class Ending:
    """When a row is finished: at an end of sequence or a stop string, the run's or the model's own."""

    def __init__(self, config: GenerationConfig, stop: Sequence[str], tokenizer: Any) -> None:
        """Raises CaptureError for stop strings without a tokenizer."""
        if stop and tokenizer is None:
            raise CaptureError("stop strings need a tokenizer: hookmap.open(model, tokenizer=...)")
        self._ends = frozenset(end_tokens(config))
        self._stop = tuple(stop)
        self._tokenizer = tokenizer
        self._own = _stopping(tokenizer, config.stop_strings)
        # A token is a byte at least, so that a stop string that has just ended is inside this many tokens.
        self.reach = max((len(text.encode()) for text in stop), default=0) + 4
        """newest tokens that matter"""

    def own(self, input_ids: torch.Tensor) -> list[bool]:
        """Which rows of token ids, [batch, columns], end with a stop string of the model, as transformers decides."""
        if self._own is None:
            return [False] * len(input_ids)
        found: list[bool] = self._own(input_ids, None).tolist()
        return found

    def at(self, newest: Sequence[int]) -> bool:
        """Whether a row is finished. `newest`: its last `reach` generated tokens, or all of them."""
        if newest[-1] in self._ends:
            return True
        if not self._stop:
            return False
        return any(stop in text for text in self._texts(list(newest)) for stop in self._stop)

    def _texts(self, newest: list[int]) -> Iterator[str]:
        """Of the newest tokens; more than one where they may begin inside a character, which has four bytes at most.

        A tokenizer that writes bytes as tokens (Llama 2's) decodes none of the bytes behind half a character.
        """
        for first in range(4):
            text = text_of(self._tokenizer, newest[first:])
            yield text
            if "\ufffd" not in text:
                return


def _stopping(tokenizer: Any, strings: Any) -> StopStringCriteria | None:
    if not strings:
        return None
    try:
        return StopStringCriteria(tokenizer, strings)
    except Exception as error:  # it takes tokenizers apart, not each of which can be
        raise CaptureError(
            f"the model's own generation settings have stop_strings={strings!r}, and transformers cannot look for them "
            f"with this {type(tokenizer).__name__}: {type(error).__name__}: {error}"
        ) from error


class Finished(StoppingCriteria):  # type: ignore[misc]  # transformers' base is not typed
    """Ends rows at an end of sequence or a stop string, and reports after each token which rows ended."""

    def __init__(
        self,
        config: GenerationConfig,
        stop: Sequence[str],
        tokenizer: Any,
        tell: Told,
        stopped: Callable[[int], bool] | None = None,
    ) -> None:
        """`stopped`: whether somebody else has ended this row."""
        self._ending = Ending(config, stop, tokenizer)
        self._tell = tell
        self._stopped = stopped or (lambda row: False)
        self._prompt: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        columns = input_ids.shape[1]
        if self._prompt is None:
            self._prompt = columns - 1
        newest = input_ids[:, max(self._prompt, columns - self._ending.reach) :].tolist()
        own = self._ending.own(input_ids)
        done = [
            its or self._stopped(number) or self._ending.at(row)
            for number, (its, row) in enumerate(zip(own, newest, strict=True))
        ]
        self._tell(columns, done)
        return torch.tensor(done, device=input_ids.device)
