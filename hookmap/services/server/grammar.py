"""`response_format`: each next token goes on with text that fits a JSON Schema. llguidance says which tokens do."""

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from hookmap.errors import CaptureError
from hookmap.extras import needed
from hookmap.model import HookedModel
from hookmap.services.server.errors import bad

PARAM = "response_format"
_WHY = 'response_format needs llguidance where the server runs: pip install "hookmap[grammar]"'
_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""how JSON is written: with white space in one way only, or an answer could consist of it"""
_TOKENIZERS: "weakref.WeakKeyDictionary[torch.nn.Module, Any]" = weakref.WeakKeyDictionary()
"""llguidance's own tokenizer of each model: a second or so to make"""


@dataclass(frozen=True)
class Grammar:
    """What a text must fit."""

    tokenizer: Any
    """llguidance's"""
    rules: str
    ends: frozenset[int]
    """tokens that end an answer"""

    def processor(self, prompt: int) -> LogitsProcessor:
        """What `generate` takes. `prompt`: columns of the prompts, pads included."""
        return _Following(self, prompt)


def grammar_of(asked: Mapping[str, Any] | None, hm: HookedModel, ends: Sequence[int]) -> Grammar | None:
    """What a `response_format` asks for; None where that is any text. `ends`: tokens that end an answer.

    Raises ApiError.
    """
    schema = _schema_of(asked)
    if schema is None:
        return None
    try:
        library = needed("llguidance", _WHY)
    except CaptureError as error:
        raise bad(str(error), PARAM, "not_installed") from error
    if not ends:
        raise bad(f"{PARAM}: this model has no token that ends an answer.", PARAM)
    if hm.root not in _TOKENIZERS:
        try:
            made = needed("llguidance.hf", _WHY).from_tokenizer(hm.tokenizer, hm.vocabulary, list(ends))
        except Exception as error:  # a tokenizer without Rust's own, or one that it cannot read
            raise bad(f"{PARAM}: llguidance cannot read this model's tokenizer ({error}).", PARAM) from error
        _TOKENIZERS[hm.root] = made
    tokenizer = _TOKENIZERS[hm.root]
    try:
        rules = library.LLMatcher.grammar_from_json_schema(schema, overrides=_WRITTEN)
        wrong, told = library.LLMatcher.validate_grammar_with_warnings(rules, tokenizer)
    except ValueError as error:
        wrong, told = True, [str(error)]
    if wrong:
        raise bad(f"{PARAM}: this schema cannot be followed: {' '.join(told):.500}", PARAM)
    return Grammar(tokenizer, rules, frozenset(ends))


def _schema_of(asked: Mapping[str, Any] | None) -> str | None:
    """The JSON Schema, as JSON. Raises ApiError."""
    kind = (asked or {}).get("type", "text" if not asked else None)
    if kind == "text":
        return None
    if kind == "json_object":
        return '{"type": "object"}'
    if kind != "json_schema":
        raise bad(f"{PARAM}.type: expected text, json_object or json_schema, got {kind!r:.40}.", f"{PARAM}.type")
    given = (asked or {}).get("json_schema")
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict):
        raise bad(f"{PARAM}.json_schema.schema: expected a JSON Schema, an object.", f"{PARAM}.json_schema.schema")
    return json.dumps(schema)


class _Following(LogitsProcessor):  # type: ignore[misc]  # transformers' base is not typed
    """Leaves each row the tokens with which its text goes on to fit. Rows of one prompt may part."""

    def __init__(self, grammar: Grammar, prompt: int) -> None:
        self._grammar, self._prompt = grammar, prompt
        self._matchers: dict[tuple[int, ...], Any] = {}
        """by the new tokens that each has read"""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        allowed = torch.ones(scores.shape, dtype=torch.bool)
        for row, new in enumerate(input_ids[:, self._prompt :].tolist()):
            if self._grammar.ends.isdisjoint(new):  # what follows an end are pads
                fits = np.frombuffer(self._matcher(tuple(new)).compute_bitmask(), np.uint8)
                bits = torch.from_numpy(np.unpackbits(fits, bitorder="little").astype(bool))[: scores.shape[1]]
                allowed[row] = False
                allowed[row, : len(bits)] = bits
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def _matcher(self, new: tuple[int, ...]) -> Any:
        """One that has read these tokens. Raises ApiError where the schema is too much for it."""
        if new not in self._matchers:
            before = self._matchers.get(new[:-1]) if new else None
            if before is None:
                found = needed("llguidance", _WHY).LLMatcher(self._grammar.tokenizer, self._grammar.rules, log_level=0)
                found.consume_tokens(list(new))
            else:
                found = before.deep_copy()
                found.consume_token(new[-1])
            if found.is_error():
                told = found.get_error().partition("\n")[0]
                raise bad(f"{PARAM}: this schema cannot be followed: {told:.300}", PARAM)
            self._matchers[new] = found
            self._matchers = {key: each for key, each in self._matchers.items() if len(key) >= len(new) - 1}
        return self._matchers[new]
