"""Tokens as users name them, and as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from hookmap.activations import Sample
from hookmap.errors import SelectionError
from hookmap.loading.prompts import text_of

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked


def token_id(hm: Hooked, token: int | str, name: str = "target") -> int:
    """The id of a token: an id, or a text that the tokenizer makes one token of.

    `name`: of the argument, for the message. Raises SelectionError where the model has no such token.
    """
    size = hm.map.d_vocab or 0
    if isinstance(token, int) and 0 <= token < size:
        return token
    if isinstance(token, int) or hm.tokenizer is None:
        raise SelectionError(
            f"{name} {token!r}: expected a token id from 0 to {size - 1}, or, with a tokenizer, a text of one token."
        )
    ids = hm.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise SelectionError(
            f"{name} {token!r} is {len(ids)} tokens ({ids}): give a text of one token (with the space before it, where "
            "the tokenizer has it so), or a token id."
        )
    return int(ids[0])


def token_text(hm: Hooked, token: int) -> str:
    """The text of a token; its id where there is no tokenizer."""
    return str(token) if hm.tokenizer is None else text_of(hm.tokenizer, [token])


IMAGE = "[image]"


def token_texts(hm: Hooked, ids: Sequence[int], positions: Iterable[int], images: Iterable[int]) -> tuple[str, ...]:
    """The texts of the tokens at these positions; `[image]` where one stands for a part of an image."""
    seen = frozenset(images)
    return tuple(IMAGE if position in seen else token_text(hm, ids[position]) for position in positions)


def row_positions(sample: Sample) -> tuple[int, ...]:
    """The position of each row of a sample. Raises SelectionError where its row is a mean over positions."""
    if sample.positions == "mean":
        raise SelectionError(f"sample {sample.sample} is a mean over positions: a lens needs rows of tokens.")
    return tuple(sample.row_positions)
