"""Pairs of prompts as a model reads them: aligned token by token, and with a metric of their answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hookmap.analysis.metrics import Bound, bind, named
from hookmap.datasets.pairs import Pair, read_pairs
from hookmap.datasets.records import told
from hookmap.errors import InterventionError
from hookmap.loading.prompts import Prompt

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs, and both prompts of each, which are equally long."""

    hm: Hooked
    pairs: tuple[Pair, ...]
    clean: tuple[Prompt, ...]
    corrupted: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each pair's prompts."""
        return tuple(len(prompt.token_ids) for prompt in self.clean)

    def bound(self, metric: Any) -> tuple[Bound, Bound]:
        """A metric of the clean prompts and of the corrupted ones, both with the right answers.

        metric: a name of `hookmap.metrics.NAMES`, one of its objects, or a function of (logits, at).
        Raises SelectionError and TokenizerError.
        """
        if isinstance(metric, str):
            right, wrong = ([getattr(pair, name) for pair in self.pairs] for name in ("answer", "wrong"))
            metric = named(metric, right, wrong, list(self.clean))
        return bind(self.hm, metric, self.clean), bind(self.hm, metric, self.corrupted)


def encode_pairs(hm: Hooked, given: Any, template: Mapping[str, Any]) -> EncodedPairs:
    """One pair, several, or those of a file, as the model reads them. `template`: `TemplateOptions`.

    Raises DataError, TokenizerError, and InterventionError with every pair whose prompts do not align.
    """
    pairs = tuple(read_pairs(given))
    clean, corrupted = (
        tuple(prompt for pair in pairs for prompt in hm.encode([getattr(pair, side)], **template))
        for side in ("clean", "corrupted")
    )
    if problems := [*_misaligned(pairs, clean, corrupted)]:
        raise InterventionError(
            "a token's place must mean the same in both prompts of a pair:\n"
            f"{told(problems)}\nChange the prompts so that they are equally long and differ in what is studied alone."
        )
    return EncodedPairs(hm, pairs, clean, corrupted)


def _misaligned(pairs: tuple[Pair, ...], clean: tuple[Prompt, ...], corrupted: tuple[Prompt, ...]) -> Iterator[str]:
    """What is wrong with each pair whose prompts do not align."""
    for number, (pair, one, other) in enumerate(zip(pairs, clean, corrupted, strict=True)):
        name = f"pair {number}" + ("" if pair.id is None else f" ({pair.id})")
        if len(one.token_ids) != len(other.token_ids):
            yield (
                f"{name}: the clean prompt has {len(one.token_ids)} tokens and the corrupted one {len(other.token_ids)}"
            )
        elif one.image_positions != other.image_positions:
            yield f"{name}: the tokens that stand for images are at other places"
        elif one.token_ids == other.token_ids and one.inputs == other.inputs:
            yield f"{name}: the clean and the corrupted prompt are the same"
