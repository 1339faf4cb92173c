"""Chat messages -> the text that a model reads: its chat template, filled in. What would be left out is refused."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hookmap.datasets.messages import is_image
from hookmap.errors import TokenizerError

Chat = bool | Literal["auto"]

_KINDS = {"image": "an image", "video": "a video", "audio": "audio", "file": "a file"}
_BESIDE = ("image", "images", "video", "videos", "audio", "audios")
"""fields of a message that hold what is no text"""
_TO_TEMPLATE = ("tools", "documents")
"""arguments of `apply_chat_template` itself that a template reads"""
_PROBE = "hookmap probe"


@dataclass(frozen=True)
class Templating:
    """How prompts go through the chat template. The names are those of transformers and vLLM."""

    chat: Chat = "auto"
    """see `hookmap.loading.prompts.encode`"""
    add_generation_prompt: bool | None = None
    """whether the assistant's turn begins after the messages; None: see `ending`"""
    continue_final_message: bool | None = None
    """whether the last message is left open, so that it goes on; None: see `ending`"""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """other variables of the template: enable_thinking, tools, documents, …"""
    generates: bool = False
    """whether text is generated after the prompt; else it is only read"""

    def __post_init__(self) -> None:
        if not isinstance(self.chat, bool) and self.chat != "auto":
            raise TokenizerError(f"chat: expected 'auto', True or False, got {self.chat!r}.")

    @property
    def of_template(self) -> tuple[str, ...]:
        """The options given that say how the template is filled, and nothing where no template is."""
        named = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
        return tuple(name for name in named if getattr(self, name) not in (None, {}))

    def ending(self, messages: Sequence[Mapping[str, Any]]) -> tuple[bool, bool]:
        """Whether the assistant's turn begins after these messages, and whether the last of them goes on.

        Unless something else is said: an assistant's last message stays as it is where the prompt is only read, and
        goes on where text is generated; behind any other the assistant's turn begins. Raises TokenizerError.
        """
        answered = messages[-1]["role"] == "assistant"
        goes_on, begins = self.continue_final_message, self.add_generation_prompt
        if goes_on and begins:
            raise TokenizerError(
                "add_generation_prompt and continue_final_message: a new turn begins, or the last message goes on. "
                "Give one of them."
            )
        if goes_on is None:
            goes_on = answered and self.generates and begins is None
        if begins is None:
            begins = not goes_on and (not answered or self.generates)
        return begins, goes_on


def fill(messages: Sequence[Mapping[str, Any]], number: int, tokenizer: Any, how: Templating) -> str:
    """The text of prompt `number`. Raises TokenizerError where there is no template, or it does not read all of it."""
    return str(_applied(messages, number, tokenizer, how, False, {"tokenize": False}))


def fill_with_images(
    messages: Sequence[Mapping[str, Any]], number: int, processor: Any, how: Templating, images: Sequence[Any] | None
) -> Any:
    """Prompt `number`, whose messages have images, through a processor's template: its text, or the model's inputs.

    `images`: of all messages, in order; without them the text is made. Raises TokenizerError, as `fill`.
    """
    if images is None:
        return str(_applied(messages, number, processor, how, True, {"tokenize": False}))
    rest = iter(images)
    whole = [
        {**message, "content": [{"type": "image", "image": next(rest)} if is_image(part) else part for part in content]}
        if not isinstance(content := message.get("content"), str) and isinstance(content, Sequence)
        else message
        for message in messages
    ]
    return _applied(
        whole, number, processor, how, True, {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    )


def _applied(
    messages: Sequence[Mapping[str, Any]],
    number: int,
    tokenizer: Any,
    how: Templating,
    images: bool,
    form: Mapping[str, Any],
) -> Any:
    """What `apply_chat_template` makes. `images`: whether messages may have them; `form`: of what is made."""
    template = _template(tokenizer)
    if not template:
        raise TokenizerError(
            f"prompt {number} needs a chat template, and this {type(tokenizer).__name__} has none. "
            + (
                'Give {"text": …, "images": […]} in place of messages.'
                if images
                else "Give plain text (without chat), "
            )
            + ("" if images else "or set tokenizer.chat_template.")
        )
    options = dict(how.chat_template_kwargs or {})
    _check_options(options, template, tokenizer)
    for place, message in enumerate(messages):
        _check_content(message, f"prompt {number}, message {place}", images)
    begins, goes_on = how.ending(messages)
    try:
        return tokenizer.apply_chat_template(
            _as_read(messages, template, tokenizer, images),
            add_generation_prompt=begins,
            continue_final_message=goes_on,
            **form,
            **options,
        )
    except Exception as error:  # a template is a program of the model's author, and raises what it likes
        reader = type(tokenizer).__name__ if form["tokenize"] else "the chat template"
        raise TokenizerError(f"{reader} refuses prompt {number}: {error}") from error


def _template(tokenizer: Any) -> str:
    """Its text; of several, all of them."""
    found = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(map(str, found.values())) if isinstance(found, Mapping) else str(found)


def _check_options(options: Mapping[str, Any], template: str, tokenizer: Any) -> None:
    own = inspect.signature(type(tokenizer).apply_chat_template).parameters
    wrong = [n for n in options if not str(n).isidentifier() or (n in own and n not in _TO_TEMPLATE)]
    if wrong:
        raise TokenizerError(
            f"chat_template_kwargs: {', '.join(map(str, wrong))} cannot be given: no template reads it."
        )
    if unread := [name for name in options if not re.search(rf"\b{name}\b", template)]:
        raise TokenizerError(
            f"chat_template_kwargs: the chat template reads no {', '.join(unread)}, so that nothing would change. "
            "Leave it out, or see tokenizer.chat_template for what it reads."
        )


def _check_content(message: Mapping[str, Any], where: str, images: bool) -> None:
    """Raises TokenizerError for what is neither text nor image: its placeholder would be read as if it were all."""
    content = message.get("content")
    found = [_kind(name) for name in _BESIDE if message.get(name)]
    if not isinstance(content, str) and isinstance(content, Sequence):
        found += [_kind_of(part) for part in content if not (_is_text(part) or (images and is_image(part)))]
    elif isinstance(content, Mapping) and "type" in content:
        found.append(_kind_of(content))
    if found:
        raise TokenizerError(
            f"{where} has {' and '.join(dict.fromkeys(found))}: hookmap reads text, and images as parts of content, "
            '{"type": "image", "path": FILE}; the model would take a placeholder for it. Leave it out.'
        )
    if "content" not in message and not message.get("tool_calls"):
        raise TokenizerError(f"{where} has no content: expected {{'role': …, 'content': …}}, got {sorted(message)}.")


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _kind_of(part: Any) -> str:
    if not isinstance(part, Mapping):
        return f"a part that is a {type(part).__name__}"
    names = [str(part["type"])] if "type" in part else [str(name) for name in part]
    return next((_kind(name) for name in names if _kind(name)), f"a part of {', '.join(names) or 'nothing'}")


def _kind(name: str) -> str:
    """`image_url`, `input_image`, `images` -> an image; "" for another name."""
    return next((told for kind, told in _KINDS.items() if kind in name), "")


def _as_read(
    messages: Sequence[Mapping[str, Any]], template: str, tokenizer: Any, images: bool
) -> list[dict[str, Any]]:
    """The messages with texts as strings or as parts, whichever the template reads; with `images`, lists as parts."""
    contents = [message.get("content") for message in messages]
    listed = any(isinstance(content, Sequence) and not isinstance(content, str) for content in contents)
    parts = images or ((listed or "type" in template) and _reads(tokenizer, [{"type": "text", "text": _PROBE}]))
    strings = not parts or _reads(tokenizer, _PROBE)
    return [{**message, **_content(message, parts, strings)} for message in messages]


def _content(message: Mapping[str, Any], parts: bool, strings: bool) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {} if strings else {"content": [{"type": "text", "text": content}]}
    if not isinstance(content, Sequence):
        return {}
    if parts:
        return {"content": [_part(part) for part in content]}
    return {"content": "\n".join(part if isinstance(part, str) else str(part["text"]) for part in content)}


def _part(part: Any) -> dict[str, Any]:
    if is_image(part):
        return {"type": "image", **({"image": part["image"]} if "image" in part else {})}
    return {"type": "text", "text": part if isinstance(part, str) else str(part["text"])}


def _reads(tokenizer: Any, content: Any) -> bool:
    """Whether the template writes out a text that comes so."""
    try:
        text = str(tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    except Exception:  # as in `fill`
        return False
    return _PROBE in text and "'type'" not in text
