"""Heads at a glance: how much each attention head looks where well-known kinds of head look.

On random tokens that are repeated, a head can look back at the right place only by what it does and not by what the
text means: Olsson et al., "In-context Learning and Induction Heads" (2022), find induction heads so. Where a kind looks
is as in TransformerLens's head detector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import torch

from hookmap.activations import call_of
from hookmap.capture.finiteness import not_finite
from hookmap.capture.options import Layers, TemplateOptions
from hookmap.errors import SelectionError, TokenizerError
from hookmap.loading.encoder_decoder import is_encoder_decoder, start_token
from hookmap.loading.encoder_prompts import trial_prompt
from hookmap.loading.prompts import Prompt, known_ids
from hookmap.wording import counted, did_you_mean, sentence

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

LENGTH, SAMPLES = 50, 4


def _previous(tokens: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(tokens), dtype=torch.bool).roll(-1, 1).tril(-1)


def _duplicate(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens[:, None] == tokens).tril(-1)


def _induction(tokens: torch.Tensor) -> torch.Tensor:
    behind = _duplicate(tokens).roll(1, 1)
    behind[:, 0] = False
    return behind


def _sink(tokens: torch.Tensor) -> torch.Tensor:
    found = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    found[1:, 0] = True
    return found


KINDS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "induction": _induction,
    "previous_token": _previous,
    "duplicate_token": _duplicate,
    "attention_sink": _sink,
}
"""kind of head -> from tokens [pos], the keys that it looks at from each query, [query, key]"""


class Head(NamedTuple):
    """One head and its score."""

    layer: int
    head: int
    score: float
    call: int | None = None
    """which run of its layer; None where it runs once"""

    @property
    def name(self) -> str:
        """`8.3`, or `8 call 1.3`."""
        return f"{_named(self.layer, self.call)}.{self.head}"


def _named(layer: int, call: int | None) -> str:
    return str(layer) if call is None else f"{layer} call {call}"


@dataclass(frozen=True)
class HeadScores:
    """Scores of each kind of head in `KINDS`, from 0 to 1: the mean over queries of the attention on the kind's keys.

    A query counts for a kind where the kind has a key for it:

    - `induction`: the tokens right behind earlier occurrences of the query's token
    - `previous_token`: the token right before the query
    - `duplicate_token`: earlier occurrences of the query's token
    - `attention_sink`: the first token, of every later query
    """

    scores: Mapping[str, torch.Tensor]
    """kind -> float32 [rows, heads], on the CPU: a row for each layer, nan where a layer has fewer heads"""
    layers: tuple[int, ...]
    """the layer of each row"""
    calls: tuple[int | None, ...]
    """which run of its layer each row is of; None where it runs once"""
    missing: Mapping[int, str]
    """layers without attention weights, and why they have none"""
    tokens: tuple[tuple[int, ...], ...]
    """the token ids of each text that the heads read"""

    def __getitem__(self, kind: str) -> torch.Tensor:
        """The scores of one kind, [rows, heads]. Raises SelectionError for another name."""
        if kind not in self.scores:
            near = sentence(did_you_mean(kind, self.scores, n=1))
            raise SelectionError(f"no kind of head {kind!r}: expected one of {', '.join(self.scores)}.{near}")
        return self.scores[kind]

    @property
    def rows(self) -> tuple[str, ...]:
        """What each row is called: `8`, or `8 call 1`."""
        return tuple(_named(layer, call) for layer, call in zip(self.layers, self.calls, strict=True))

    def top(self, kind: str, count: int = 5) -> tuple[Head, ...]:
        """The heads with the largest scores of a kind, in descending order."""
        found = self[kind]
        order = found.nan_to_num(-1.0).flatten().argsort(descending=True, stable=True).tolist()
        places = [divmod(place, found.shape[1]) for place in order]
        heads = [Head(self.layers[r], h, float(found[r, h]), self.calls[r]) for r, h in places if found[r, h] >= 0]
        return tuple(heads[:count])

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data; `null` where a layer has fewer heads."""
        scores = {
            kind: [[None if value != value else value for value in row] for row in found.tolist()]
            for kind, found in self.scores.items()
        }
        missing = {str(layer): reason for layer, reason in self.missing.items()}
        return {"layers": self.layers, "calls": self.calls, "scores": scores, "missing": missing, "tokens": self.tokens}

    def __repr__(self) -> str:
        rows, heads = next(iter(self.scores.values())).shape
        read = counted(len(self.tokens), "text")
        return f"<HeadScores of {counted(rows, 'row')} × {counted(heads, 'head')}, on {read}>"


def head_scores(
    hm: Hooked,
    prompts: Any = None,
    layers: Layers = "all",
    *,
    length: int | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    **template: Unpack[TemplateOptions],
) -> HeadScores:
    """See `HookedModel.head_scores`."""
    if prompts is None and template:
        raise TokenizerError(
            f"{', '.join(template)}: of the chat template, and without prompts heads read random tokens. "
            "Give prompts, or leave it out."
        )
    texts = _repeated(hm, length, samples, seed) if prompts is None else hm.encode(prompts, **template)
    selectors = hm.selectors("pattern", layers)  # raises SelectionError where no layer has it
    chosen = tuple(dict.fromkeys(s.layer for s in selectors if s.layer is not None))
    sums: dict[str, list[torch.Tensor]] = {}
    queries = dict.fromkeys(KINDS, 0)
    for text in texts:
        run = hm.capture([text], "pattern", chosen, max_new_tokens=0)
        (tokens,) = run.tokens
        keys_of = {kind: looks(torch.tensor(tokens)) for kind, looks in KINDS.items()}
        for kind, keys in keys_of.items():
            queries[kind] += int(keys.any(1).sum())
        patterns = [run[key][0] for key in run.keys]  # [heads, query, key]
        for kind, keys in keys_of.items():
            found = [(pattern.double() * keys).sum((1, 2)) for pattern in patterns]
            sums[kind] = [a + b for a, b in zip(sums[kind], found, strict=True)] if kind in sums else found
        if not all(bool(total.isfinite().all()) for total in sums["attention_sink"]):
            raise not_finite(hm, text, "scores of heads")
    heads = max(len(total) for total in sums["induction"])
    scores = {}
    for kind, totals in sums.items():
        scores[kind] = torch.full((len(totals), heads), float("nan"))
        for row, total in enumerate(totals):
            scores[kind][row, : len(total)] = total / queries[kind] if queries[kind] else float("nan")
    every = range(hm.map.num_layers) if layers == "all" else ()
    reasons = {n: hm.map.unavailable("pattern", n) or "" for n in every if n not in chosen}
    calls = tuple(call_of(key) for key in run.keys)
    rows = tuple(key[1] for key in run.keys if key[1] is not None)
    return HeadScores(scores, rows, calls, reasons, tuple(tuple(text.token_ids) for text in texts))


def _repeated(hm: Hooked, length: int | None, samples: int, seed: int) -> list[Prompt]:
    """Random tokens, different from each other, and the same again; in front what the tokenizer begins a text with."""
    for name, value in (("length", length), ("samples", samples)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise SelectionError(f"{name}: expected a whole number, at least 1, got {value!r}.")
    drawn = _plain_tokens(hm)
    if length is not None and length > len(drawn):
        raise SelectionError(
            f"length {length}: the tokenizer has {len(drawn)} tokens that differ. Give so many or less."
        )
    count, draw = min(LENGTH, len(drawn)) if length is None else length, torch.Generator().manual_seed(seed)
    begins, found = _begins_with(hm), []
    for _ in range(samples):
        once = [drawn[place] for place in torch.randperm(len(drawn), generator=draw)[:count].tolist()]
        ids = (*begins, *once, *once)
        found.append(trial_prompt(hm.root, ids) if is_encoder_decoder(hm.root) else Prompt("", ids))
    return found


def _plain_tokens(hm: Hooked) -> list[int]:
    """The ids of tokens of text: none that the tokenizer was given besides, such as those of a chat template."""
    if hm.tokenizer is None:
        return [*range(hm.vocabulary)]
    added = set(hm.tokenizer.get_added_vocab().values()) | set(hm.tokenizer.all_special_ids)
    return sorted(token for token in known_ids(hm.tokenizer) - added if token < hm.vocabulary)


def _begins_with(hm: Hooked) -> tuple[int, ...]:
    if is_encoder_decoder(hm.root):
        return (start_token(hm.root),)
    if hm.tokenizer is None:
        return ()
    ids, own = hm.tokenizer("a")["input_ids"], hm.tokenizer("a", add_special_tokens=False)["input_ids"]
    return tuple(ids[: next(n for n in range(len(ids) + 1) if ids[n : n + len(own)] == own)])
