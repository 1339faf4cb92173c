"""What a user may give as prompts -> token ids. Nothing is padded here, and the tokenizer is left as it was."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

from hookmap.datasets import PromptRecord
from hookmap.errors import TokenizerError

Chat = bool | Literal["auto"]


@dataclass(frozen=True)
class Prompt:
    """One prompt as the model reads it."""

    text: str
    """with the chat template filled in; "" where only token ids were given"""
    token_ids: tuple[int, ...]
    id: str | None = None
    labels: Mapping[str, Any] | None = None


NO_TOKENIZER = "the model was given without a tokenizer. Give one: hookmap.open(model, tokenizer=...)"


def encode(prompts: Any, tokenizer: Any, chat: Chat = "auto", *, why_none: str = NO_TOKENIZER) -> tuple[Prompt, ...]:
    """One or several prompts, each a string, a list of chat messages, a list of token ids, or a record of a data set.

    `chat`: "auto" sends messages through the chat template and leaves strings as they are; True makes each string the
    one message of a user; False refuses messages. `why_none`: the reason, where there is no tokenizer.
    Raises TokenizerError with what is missing.
    """
    if hasattr(prompts, "tolist"):  # a tensor or an array of token ids
        prompts = prompts.tolist()
    if isinstance(prompts, str | PromptRecord | Prompt) or (
        isinstance(prompts, Sequence) and prompts and _is_part(prompts[0])
    ):
        prompts = [prompts]
    if isinstance(prompts, Mapping | bytes) or not isinstance(prompts, Iterable):
        raise _not_a_prompt(prompts, 0)
    encoded = tuple(_encode(prompt, number, tokenizer, chat, why_none) for number, prompt in enumerate(prompts))
    if not encoded:
        raise TokenizerError("no prompts given: expected a string, a list of strings, or chat messages, got none.")
    return encoded


def decode(token_ids: Sequence[int], tokenizer: Any) -> str:
    """The text of generated tokens, without special tokens; "" where there is no tokenizer."""
    return "" if tokenizer is None else text_of(tokenizer, token_ids, skip_special_tokens=True)


def text_of(tokenizer: Any, token_ids: Sequence[int], **settings: Any) -> str:
    """What the tokenizer decodes ids to. Those of an embedding that is larger than its vocabulary have no text."""
    try:
        return str(tokenizer.decode(list(token_ids), **settings))
    except (IndexError, KeyError, TypeError, ValueError):  # SentencePiece's and others': fast ones leave them out
        known = known_ids(tokenizer)
        if all(token in known for token in token_ids):
            raise
        return str(tokenizer.decode([token for token in token_ids if token in known], **settings))


def known_ids(tokenizer: Any) -> set[int]:
    """The ids that the tokenizer has; a model's embedding may have more."""
    return set(tokenizer.get_vocab().values())


def _is_part(value: Any) -> bool:
    """Whether a list of such values is one prompt: messages or token ids."""
    return isinstance(value, Mapping) or _is_token(value)


def _is_token(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _token_ids(text: str, number: int, tokenizer: Any, **options: Any) -> tuple[int, ...]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"prompt {number} is no text: half a surrogate pair at character {error.start}, {text[error.start]!r}. "
            "Read the file it comes from as UTF-8."
        ) from error
    return tuple(tokenizer(text, **options)["input_ids"])


def _encode(prompt: Any, number: int, tokenizer: Any, chat: Chat, why_none: str) -> Prompt:
    if isinstance(prompt, Prompt):
        return _checked(prompt, number)
    if isinstance(prompt, PromptRecord):
        own = _encode(prompt.prompt, number, tokenizer, chat, why_none)
        return replace(own, id=prompt.id, labels=prompt.labels)
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, str | Sequence) or isinstance(prompt, bytes):
        raise _not_a_prompt(prompt, number)
    if not isinstance(prompt, str) and all(_is_token(part) for part in prompt):
        return _checked(Prompt("", tuple(map(int, prompt))), number)
    if tokenizer is None:
        raise TokenizerError(f"prompt {number} is text: {why_none}\nOr give lists of token ids as prompts.")
    if isinstance(prompt, str) and chat is not True:
        return _checked(Prompt(prompt, _token_ids(prompt, number, tokenizer)), number)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise _not_a_prompt(prompt, number)
    if chat is False:
        raise TokenizerError(f"prompt {number} is a list of chat messages, and chat=False was given. Use chat='auto'.")
    return _checked(templated(messages, number, tokenizer), number)


def templated(messages: list[Any], number: int, tokenizer: Any, options: Mapping[str, Any] | None = None) -> Prompt:
    """Chat messages as the model reads them. `options`: for the chat template (tools, documents).

    Raises TokenizerError where there is no template, or it refuses them.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TokenizerError(
            f"prompt {number} needs a chat template, and this tokenizer ({type(tokenizer).__name__}) has none. "
            "Give plain text (chat=False), or set tokenizer.chat_template."
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **(options or {}))
    except Exception as error:  # a template is a program of the model's author, and raises what it likes
        raise TokenizerError(f"the chat template refuses prompt {number}: {error}") from error
    # The template writes the special tokens itself.
    return Prompt(text, _token_ids(text, number, tokenizer, add_special_tokens=False))


def _checked(prompt: Prompt, number: int) -> Prompt:
    if not prompt.token_ids:
        raise TokenizerError(
            f"prompt {number} ({prompt.text!r}) has no tokens: a model needs at least one. Give some text."
        )
    return prompt


def _not_a_prompt(prompt: Any, number: int) -> TokenizerError:
    return TokenizerError(
        f"prompt {number}: expected a string, a list of chat messages ({{'role': ..., 'content': ...}}) "
        f"or a list of token ids, got {type(prompt).__name__}: {str(prompt)[:80]}"
    )
