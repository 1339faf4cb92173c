"""Prompts of an encoder-decoder: what its encoder reads, and the tokens that its decoder begins with.

A sample's rows are of the decoder's tokens: the one that it starts with, any that are given, and those it generates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from hookmap.datasets.records import DECODER, PromptRecord
from hookmap.errors import TokenizerError
from hookmap.loading import other_inputs
from hookmap.loading.chat_template import Chat, Templating
from hookmap.loading.encoder_decoder import TOKENS, encoder_argument, source, start_token
from hookmap.loading.further_inputs import FurtherInputs
from hookmap.loading.modules import device_of
from hookmap.loading.prompts import NO_TOKENIZER, Prompt, each_of, encode, encode_one, refuse_unread_options

TEXT = "prompt"
DECODER_TEXT, DECODER_IDS = DECODER


def encode_apart(
    prompts: Any, model: nn.Module, tokenizer: Any, chat: Chat | Templating = "auto", *, why_none: str = NO_TOKENIZER
) -> tuple[Prompt, ...]:
    """One or several prompts: what `encode` takes, for the encoder to read; or mappings that say more.

    A mapping has the encoder's `prompt`, or the model's own input as its processor returns it (`input_features`,
    [batch, ...]: one prompt for each of the batch); and the decoder's first tokens, as `decoder_text` or as
    `decoder_token_ids`, for each one or one for all. Raises TokenizerError as `encode` does, and for other mappings.
    """
    if _says_more(prompts):
        prompts = [prompts]
    elif isinstance(prompts, Iterator):
        prompts = list(prompts)
    if not isinstance(prompts, Sequence) or isinstance(prompts, str) or not any(map(_says_more, prompts)):
        if not _are_encoded(prompts):
            _refuse_no_text(model)
        return tuple(as_decoder_reads(each, model) for each in encode(prompts, tokenizer, chat, why_none=why_none))
    how = chat if isinstance(chat, Templating) else Templating(chat)
    refuse_unread_options(prompts, how)

    def read(prompt: Any, number: int) -> tuple[Prompt, ...]:
        if _says_more(prompt):
            return _that_says_more(prompt, number, model, tokenizer, how, why_none)
        if not _are_encoded(prompt):
            _refuse_no_text(model)
        return (as_decoder_reads(encode_one(prompt, number, tokenizer, how, why_none, None), model),)

    return tuple(chain.from_iterable(each_of(prompts, read)))


def trial_prompt(model: nn.Module, decoder_ids: Sequence[int]) -> Prompt:
    """A prompt of these tokens of the decoder, whose encoder reads something random: for trials without a prompt."""
    given = source(model, 1, len(decoder_ids), device_of(model), torch.Generator().manual_seed(0))
    given |= other_inputs.chosen(model, given)
    return Prompt("", tuple(decoder_ids), inputs=FurtherInputs.of(given))


def _are_encoded(prompts: Any) -> bool:
    return isinstance(prompts, Prompt) or (
        isinstance(prompts, (list, tuple)) and all(isinstance(each, Prompt) for each in prompts)
    )


def _says_more(prompt: Any) -> bool:
    """Whether it is a mapping, or a record with one, and no chat message and no table."""
    if isinstance(prompt, PromptRecord):
        return _says_more(prompt.prompt)
    if not isinstance(prompt, Mapping) or "role" in prompt:
        return False
    held = any(isinstance(value, torch.Tensor) for value in prompt.values())
    return held or TEXT in prompt or any(name in prompt for name in DECODER)


def _that_says_more(
    given: Any, number: int, model: nn.Module, tokenizer: Any, how: Templating, why: str
) -> tuple[Prompt, ...]:
    if isinstance(given, PromptRecord):
        whole = _that_says_more(given.prompt, number, model, tokenizer, how, why)
        return tuple(replace(each, id=given.id, labels=given.labels) for each in whole)
    return tuple(_of_mapping(given, number, model, tokenizer, how, why))


def _of_mapping(
    given: Mapping[str, Any], number: int, model: nn.Module, tokenizer: Any, how: Templating, why: str
) -> Iterator[Prompt]:
    decoder = (given.get(DECODER_TEXT), given.get(DECODER_IDS))
    fields = {name: value for name, value in given.items() if name not in (TEXT, DECODER_TEXT, DECODER_IDS)}
    if (TEXT in given) == bool(fields) or None not in decoder:
        raise TokenizerError(
            f"prompt {number} has {', '.join(map(str, given))}: expected {TEXT!r}, or what the encoder reads "
            f"({encoder_argument(model)!r}), and with it {DECODER_TEXT!r} or {DECODER_IDS!r} or neither."
        )
    if TEXT in given:
        _refuse_no_text(model)
        whole: tuple[Prompt, ...] = (encode_one(given[TEXT], number, tokenizer, how, why, None),)
    else:
        whole = tuple(_of_fields(fields, number, model))
    texts, ids = (_for_each(each, len(whole)) for each in decoder)
    for prompt, text, own in zip(whole, texts, ids, strict=True):
        if text is not None and tokenizer is None:
            raise TokenizerError(f"prompt {number}: {DECODER_TEXT} is text: {why}\nOr give {DECODER_IDS}.")
        if text is not None:
            own = tokenizer(text_target=text, add_special_tokens=False)["input_ids"]
        yield as_decoder_reads(prompt, model, tuple(own or ()))


def _of_fields(fields: Mapping[str, Any], number: int, model: nn.Module) -> Iterator[Prompt]:
    """One prompt for each of a batch of what the encoder reads."""
    if (name := encoder_argument(model)) not in fields:
        raise TokenizerError(
            f"prompt {number} has {', '.join(fields)}: the encoder of {type(model).__name__} reads {name}, "
            "[batch, ...]."
        )
    tensors = {key: torch.as_tensor(value) for key, value in fields.items()}
    for place in range(len(tensors[name])):
        own = {key: tensor[place : place + 1] for key, tensor in tensors.items()}
        sizes = tuple(size for key in sorted(own) for size in own[key].shape)
        yield Prompt("", (), inputs=replace(FurtherInputs.of(own), alike=sizes))


def _for_each(value: Any, count: int) -> list[Any]:
    """One for each of `count` prompts: the same for all, or a list of such."""
    one = value is None or isinstance(value, str) or (len(value) > 0 and not isinstance(value[0], (str, Sequence)))
    each = [value] * count if one else list(value)
    if len(each) != count:
        raise TokenizerError(f"{len(each)} decoder texts are given for {count} prompts: expected one, or one for each.")
    return each


def as_decoder_reads(prompt: Prompt, model: nn.Module, first: tuple[int, ...] = ()) -> Prompt:
    """The prompt as the decoder reads it: its start token, then `first`; the encoder's input is beside it."""
    if prompt.inputs is not None and prompt.token_ids:  # it is as the decoder reads it already
        return prompt
    start = start_token(model)
    decoder = first if first[:1] == (start,) else (start, *map(int, first))
    if prompt.inputs is None:
        ids = torch.tensor([prompt.token_ids])
        fields = {TOKENS: ids, "attention_mask": torch.ones_like(ids)}
        inputs = replace(FurtherInputs.of(fields), encoder_tokens=ids.shape[1], alike=(len(decoder),))
        return replace(prompt, token_ids=decoder, inputs=inputs, encoder_token_ids=prompt.token_ids)
    return replace(prompt, token_ids=decoder, inputs=replace(prompt.inputs, alike=(len(decoder), *prompt.inputs.alike)))


def _refuse_no_text(model: nn.Module) -> None:
    if (name := encoder_argument(model)) != TOKENS:
        raise TokenizerError(
            f"the encoder of {type(model).__name__} reads no text but {name}: give them as the model's processor "
            f'returns them, {{"{name}": tensor of [batch, ...]}}, and {DECODER_TEXT} for what the decoder begins with.'
        )
