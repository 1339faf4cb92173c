"""The bytes that each token adds to a text: also of a token that is part of a character, and has no text of its own.

Joined, the bytes of a row's tokens are its text.
"""

import codecs
import re
from typing import Any

from hookmap.loading.prompts import text_of

_HALF = "\ufffd"
"""what a tokenizer decodes the bytes of an incomplete character to"""
_ONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""how SentencePiece names a token that is one byte"""


def _byte_of_sign() -> dict[str, int]:
    """The byte that each sign stands for in the names of byte-level tokens (GPT-2's and all after it)."""
    itself = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(256 + place): byte for place, byte in enumerate(moved)}


_SIGNS = _byte_of_sign()


class Spelling:
    """How a tokenizer spells each of its tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self._found: dict[int, tuple[bytes | None, bytes | None]] = {}

    def of(self, id: int, begins: bool) -> bytes | None:
        """The bytes that a token adds to a text. None: it adds none (a special token), or nobody knows which.

        `begins`: whether no text stands before it; some tokenizers leave a space out there.
        """
        if id not in self._found:
            self._found[id] = (None, None) if id in self._special else self._spelt(id)
        return self._found[id][not begins]

    def text(self, id: int) -> str:
        """The text of a token by itself."""
        return text_of(self._tokenizer, [id])

    def name(self, id: int) -> str:
        r"""Its text, or of a part of a character its bytes as OpenAI writes them, `bytes:\xe6\x97`."""
        text = self.text(id)
        if _HALF not in text or (own := self.of(id, begins=False)) is None or own.decode(errors="ignore") == text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)

    def _spelt(self, id: int) -> tuple[bytes | None, bytes | None]:
        text = self.text(id)
        if _HALF in text:
            return (self._of_part(id, text),) * 2
        twice = text_of(self._tokenizer, [id, id])
        later = twice[len(text) :] if twice.startswith(text) else text
        return text.encode(), later.encode()

    def _of_part(self, id: int, text: str) -> bytes | None:
        """The bytes that its name says, where the tokenizer decodes them to the same text."""
        name = str(self._tokenizer.convert_ids_to_tokens(id))
        one = _ONE_BYTE.fullmatch(name)
        told = [bytes([int(one[1], 16)])] if one else []
        if all(sign in _SIGNS for sign in name):
            told.append(bytes(_SIGNS[sign] for sign in name))
        told.append(name.encode())
        return next((each for each in told if each.decode(errors="replace") == text), None)


class RowBytes:
    """The bytes of the tokens of one row, one after the other."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False
        self.offset = 0
        """whole characters before the next token: of a part of a character, where that character stands"""

    def of(self, id: int) -> bytes | None:
        """Those of a token that may stand here."""
        return self._spelling.of(id, begins=not self._begun)

    def add(self, id: int) -> None:
        """The token stands here."""
        own = self.of(id)
        self._begun |= bool(own)
        self.offset += len(self._characters.decode(own or b""))

    def echo(self, id: int, text: str) -> None:
        """A token of the prompt stands here. `text`: the prompt as the answer repeats it, special tokens too."""
        if self.of(id) is None and text.startswith(special := self._spelling.text(id), self.offset):
            self.offset += len(special)
            self._begun |= bool(special)
        else:
            self.add(id)
