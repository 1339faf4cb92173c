"""Turns tokens into the text that may be sent: no half characters, no special tokens, never a stop string."""

from collections.abc import Sequence
from typing import Any

from hookmap.loading.prompts import decode

_HALF = "\ufffd"
"""a tokenizer decodes the bytes of an incomplete character to it"""


class Decoder:
    """Decodes one row as it grows. All that `add` returned, followed by `end`, is the text of all tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = 0
        """the number of tokens whose text was returned"""
        self._start = 0
        """where decoding begins: early enough that a token's leading space is decided as in the whole text"""

    def add(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        before, now = self._texts()
        if len(now) <= len(before) or now.endswith(_HALF):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return now[len(before) :]

    def end(self) -> str:
        """The rest: characters that were never completed."""
        before, now = self._texts()
        self._told = len(self._ids)
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        before = decode(self._ids[self._start : self._told], self._tokenizer)
        return before, decode(self._ids[self._start :], self._tokenizer)


class Cutter:
    """Cuts a text before the first stop string, and holds back what may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The text that may be sent now; none after a stop string."""
        if self.stopped or not self._stop:
            return "" if self.stopped else text
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            sent, self._held = self._held[: min(found)], ""
            return sent
        keep = max((beginning_at_end(self._held, stop) for stop in self._stop), default=0)
        sent, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return sent

    def end(self) -> str:
        """The text that was held back and did not become a stop string."""
        sent, self._held = self._held, ""
        return sent


class RowText:
    """The text of one row: decoded and cut."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._decoder, self._cutter = Decoder(tokenizer), Cutter(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self._cutter.stopped

    def add(self, token: int) -> str:
        """The text that may be sent after this token."""
        return "" if self.stopped else self._cutter.add(self._decoder.add(token))

    def end(self) -> str:
        """The rest of the text, once the row has ended."""
        if self.stopped:
            return ""
        last = self._cutter.add(self._decoder.end())
        return last if self.stopped else last + self._cutter.end()

    def whole(self, tokens: Sequence[int]) -> str:
        """The text of all tokens at once; the same as one by one."""
        return "".join([*(self.add(token) for token in tokens), self.end()])


def beginning_at_end(text: str, of: str) -> int:
    """The length of the longest proper beginning of `of` with which `text` ends."""
    return next((size for size in range(min(len(of) - 1, len(text)), 0, -1) if text.endswith(of[:size])), 0)
