"""Which token of each prompt gets which row. Pure."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from hookmap.capture.interventions.edits import EditedTokens
from hookmap.errors import InterventionError
from hookmap.loading.prompts import Prompt

RowOf = Callable[[int], Mapping[int, int]]
"""sample -> position -> row"""


def pairs(prompts: Sequence[Prompt], tokens: EditedTokens, count: int, more: int) -> RowOf:
    """The row of each token, of a source that has `count` of them. `more`: generated tokens that the model reads.

    Raises InterventionError where a prompt does not have one token for each row.
    """

    @cache
    def row_of(sample: int) -> Mapping[int, int]:
        found = _targets(prompts[sample], tokens, more)
        if count == 1:
            return dict.fromkeys(found, 0)
        _refuse_twice(found, prompts, sample, tokens)
        if len(found) != count:
            raise InterventionError(
                f"{len(found)} tokens of prompt {sample} (and of what it may generate) are to be written, and "
                f"the source has {count} rows for them. Give positions, and of a patch source.positions, that pair."
            )
        return dict(zip(found, range(count), strict=True))

    for sample in range(len(prompts)):
        row_of(sample)
    return row_of


def swapped(prompts: Sequence[Prompt], tokens: EditedTokens) -> Callable[[int], tuple[int, ...]]:
    """The two positions of each prompt whose rows are exchanged. Raises InterventionError where they are not two."""
    if len(tokens.positions.singles) != 2:
        raise InterventionError("a swap is of two tokens: give their positions, such as [3, 7].")

    @cache
    def pair_of(sample: int) -> tuple[int, ...]:
        found = _targets(prompts[sample], tokens, 0)
        _refuse_twice(found, prompts, sample, tokens)
        if len(found) == 1:
            raise InterventionError(
                f"prompt {sample} of {len(prompts[sample].token_ids)} tokens has one of positions "
                f"{', '.join(map(str, tokens.positions.singles))}: a swap needs both in the prompt."
            )
        return tuple(found)

    for sample in range(len(prompts)):
        pair_of(sample)
    return pair_of


def _refuse_twice(found: Sequence[int], prompts: Sequence[Prompt], sample: int, tokens: EditedTokens) -> None:
    if twice := [position for position, times in Counter(found).items() if times > 1]:
        raise InterventionError(
            f"positions {', '.join(map(str, tokens.positions.singles))}: two of them are token {twice[0]} of "
            f"prompt {sample}, whose {len(prompts[sample].token_ids)} tokens negative ones count back "
            "from. Name each token once."
        )


def _targets(prompt: Prompt, tokens: EditedTokens, more: int) -> list[int]:
    """Positions of a prompt, and of the tokens it may generate, in the order that `RowSelection.places` gives."""
    length = len(prompt.token_ids)
    every = [*prompt.token_ids, *[-1] * more]
    found = tokens.positions.places(every, length, tokens.matching, prompt.image_positions)
    return [position for position in found if tokens.in_steps(position, length)]
