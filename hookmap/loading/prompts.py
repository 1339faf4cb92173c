"""Prompts in any form that a user may give -> token ids. Pads nothing, and does not change the tokenizer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import IOBase
from numbers import Integral
from typing import Any, TypeVar

import torch

from hookmap.datasets.files import columns_of
from hookmap.datasets.messages import has_images
from hookmap.datasets.records import DECODER, PromptRecord, load_prompts, told
from hookmap.errors import DataError, TokenizerError
from hookmap.loading.chat_template import Chat, Templating, fill
from hookmap.loading.further_inputs import FurtherInputs
from hookmap.loading.image_reader import ImageReader
from hookmap.loading.pictures import Limits


@dataclass(frozen=True)
class Prompt:
    """One prompt as the model reads it."""

    text: str
    """after the chat template; "" where only token ids were given"""
    token_ids: tuple[int, ...]
    id: str | None = None
    labels: Mapping[str, Any] | None = None
    inputs: FurtherInputs | None = None
    """what the model reads besides the token ids"""
    image_positions: tuple[int, ...] = ()
    """which tokens stand for parts of an image"""
    pictures: tuple[Mapping[str, str], ...] = ()
    """of each image, in order: its sha256, and the name of its file where it has one"""
    encoder_token_ids: tuple[int, ...] | None = None
    """of an encoder-decoder: the text's, which the encoder reads; `token_ids` are the decoder's then"""

    @property
    def size(self) -> int:
        """Tokens that the model reads of it: an encoder-decoder reads those of its encoder, too."""
        return len(self.token_ids) + (self.inputs.encoder_tokens if self.inputs else 0)


_T = TypeVar("_T")
ANY = Limits()
NO_TOKENIZER = "the model was given without a tokenizer. Give one: hookmap.open(model, tokenizer=...)"


def encode(
    prompts: Any,
    tokenizer: Any,
    chat: Chat | Templating = "auto",
    *,
    why_none: str = NO_TOKENIZER,
    reader: ImageReader | None = None,
) -> tuple[Prompt, ...]:
    """One or several prompts, each a string, a list of chat messages, a list of token ids, or a record of a data set.

    With images: messages with parts {"type": "image", "path": FILE}; {"text": …, "images": […]}, as the processor reads
    it without a chat template; or what a processor made of one prompt, {"input_ids": …, "pixel_values": …, …}.

    A string is read as it is, with the tokenizer's own special tokens, unless it begins with the text of the one that
    begins a sequence; messages go through the chat template, which writes its own. `chat`: True makes each string the
    one message of a user; False refuses messages; or all of how they go through the template.
    `why_none`: the reason, where there is no tokenizer. `reader`: makes prompts with images. Raises
    TokenizerError with what is missing, and DataError for a table of which no column is named.
    """
    how = chat if isinstance(chat, Templating) else Templating(chat)
    if (columns := columns_of(prompts)) is not None:
        raise DataError(
            f"the prompts are a table with the columns {', '.join(map(str, columns)) or 'none'}: say which holds them, "
            "prompt_column=NAME, or give hookmap.load_prompts(table, prompt=NAME, id=NAME, labels=[…])."
        )
    prompts = _listed(prompts)
    if is_one(prompts):
        prompts = [prompts]
    if isinstance(prompts, Mapping | bytes | set | frozenset | IOBase) or not isinstance(prompts, Iterable):
        raise _not_a_prompt(prompts, 0)
    prompts = list(prompts)
    refuse_unread_options(prompts, how)
    encoded = each_of(prompts, lambda prompt, number: encode_one(prompt, number, tokenizer, how, why_none, reader))
    if not encoded:
        raise TokenizerError("no prompts given: expected a string, a list of strings, or chat messages, got none.")
    return encoded


def refuse_unread_options(prompts: Sequence[Any], how: Templating) -> None:
    """Raises TokenizerError for options of the chat template where no prompt goes through it."""
    names = how.of_template
    if not names or not prompts or not all(_is_read_as_it_is(each, how) for each in prompts):
        return
    them = "it" if len(names) == 1 else "them"
    raise TokenizerError(
        f"{', '.join(names)}: only the chat template reads {them}, and no prompt here goes through it. "
        + (
            f"Token ids are read as they are: leave {them} out, or give text or messages."
            if how.chat is True
            else "Give chat=True (--chat), which sends each text as a user's message, or give messages, or leave "
            f"{them} out."
        )
    )


def _is_read_as_it_is(prompt: Any, how: Templating) -> bool:
    """Whether no chat template is filled for it."""
    if isinstance(prompt, PromptRecord):
        return _is_read_as_it_is(prompt.prompt, how)
    if isinstance(prompt, Prompt) or (isinstance(prompt, Mapping) and "role" in prompt):
        return False
    if isinstance(prompt, Mapping):
        text = prompt.get("prompt", prompt.get("text"))  # an encoder's text, a text with images, or no text
        return text is None or _is_read_as_it_is(text, how)
    prompt = _listed(prompt)
    if isinstance(prompt, str):
        return how.chat is not True
    return isinstance(prompt, Sequence) and bool(prompt) and all(map(_is_token, prompt))


def each_of(prompts: Iterable[Any], read: Callable[[Any, int], _T]) -> tuple[_T, ...]:
    """What `read` makes of each prompt and its number. Raises one TokenizerError with all that cannot be read."""
    found, problems = list[_T](), dict[int, str]()
    for number, prompt in enumerate(prompts):
        try:
            found.append(read(prompt, number))
        except TokenizerError as error:
            problems[number] = str(error)
    if not problems:
        return tuple(found)
    own = {text.replace(f"prompt {number}", "prompt") for number, text in problems.items()}
    first = next(iter(problems.values()))
    if len(problems) == 1:
        raise TokenizerError(first)
    if len(own) == 1:  # one reason, the model's rather than the prompts'
        raise TokenizerError(f"{first}\nThis is so of {len(problems)} prompts.")
    raise TokenizerError(f"{len(problems)} prompts cannot be read:\n{told(problems.values())}")


def is_one(prompts: Any) -> bool:
    """Whether it is one prompt, not a list of prompts: a text, messages, token ids or a record."""
    if isinstance(prompts, str | PromptRecord | Prompt) or is_sample(prompts):
        return True
    return isinstance(prompts, Sequence) and bool(prompts) and _is_part(prompts[0])


def is_sample(value: Any) -> bool:
    """Whether it is one prompt with its images, or with the model's other inputs."""
    return isinstance(value, Mapping) and "role" not in value and ("input_ids" in value or "images" in value)


def records(prompts: Any, column: str | None) -> Any:
    """The prompts as they were given, or, where a column is named, those of a data set. Raises DataError."""
    return prompts if column is None else load_prompts(prompts, prompt=column)


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


def encode_text(text: str, tokenizer: Any, special: bool = True) -> tuple[int, ...]:
    """The token ids of a text; `special`: with the tokenizer's own special tokens. Raises TokenizerError."""
    return _ids_of_text(text, 0, tokenizer) if special else _token_ids(text, 0, tokenizer, add_special_tokens=False)


def known_ids(tokenizer: Any) -> set[int]:
    """The ids that the tokenizer has; a model's embedding may have more."""
    return set(tokenizer.get_vocab().values())


def _is_part(value: Any) -> bool:
    """Whether a list of such values is one prompt: messages or token ids."""
    return (isinstance(value, Mapping) and not is_sample(value)) or _is_token(value)


def _is_token(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _listed(value: Any) -> Any:
    """A tensor, an array or a column as a list."""
    for name in ("tolist", "to_pylist"):
        if hasattr(value, name):
            return getattr(value, name)()
    return value


def _ids_of_text(text: str, number: int, tokenizer: Any) -> tuple[int, ...]:
    """Token ids with the tokenizer's special tokens; none is added that the text has already."""
    begin = getattr(tokenizer, "bos_token", None)
    if begin and text.startswith(begin):
        ids = _token_ids(text, number, tokenizer, add_special_tokens=False)
        if ids[:1] == (tokenizer.bos_token_id,):
            return ids
    return _token_ids(text, number, tokenizer)


def _token_ids(text: str, number: int, tokenizer: Any, **options: Any) -> tuple[int, ...]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"prompt {number} is no text: half a surrogate pair at character {error.start}, {text[error.start]!r}. "
            "Read the file it comes from as UTF-8."
        ) from error
    return tuple(tokenizer(text, **options)["input_ids"])


def encode_one(
    prompt: Any, number: int, tokenizer: Any, how: Templating, why_none: str, reader: ImageReader | None
) -> Prompt:
    """Prompt `number`: see `encode`."""
    if isinstance(prompt, Prompt):
        return _checked(prompt, number)
    if isinstance(prompt, PromptRecord):
        own = encode_one(prompt.prompt, number, tokenizer, how, why_none, reader)
        return replace(own, id=prompt.id, labels=prompt.labels)
    if is_sample(prompt):
        return _checked(_of_sample(prompt, number, how, reader), number)
    if isinstance(prompt, Mapping) and (named := [name for name in DECODER if name in prompt]):
        raise TokenizerError(
            f"prompt {number} has {' and '.join(named)}, which is what the decoder of an encoder-decoder begins with, "
            "and this model reads one text. Put it behind the prompt, or leave it out."
        )
    prompt = _listed(prompt)
    if not isinstance(prompt, str | Sequence) or isinstance(prompt, bytes):
        raise _not_a_prompt(prompt, number)
    if not isinstance(prompt, str) and all(_is_token(part) for part in prompt):
        return _checked(Prompt("", tuple(map(int, prompt))), number)
    if tokenizer is None and (isinstance(prompt, str) or not has_images(prompt)):
        raise TokenizerError(f"prompt {number} is text: {why_none}\nOr give lists of token ids as prompts.")
    if isinstance(prompt, str) and how.chat is not True:
        return _checked(Prompt(prompt, _ids_of_text(prompt, number, tokenizer)), number)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise _not_a_prompt(prompt, number)
    if how.chat is False:
        raise TokenizerError(
            f"prompt {number} is a list of chat messages, and chat=False was given. Leave chat out (chat='auto')."
        )
    return _checked(templated(messages, number, tokenizer, how, reader), number)


def templated(
    messages: list[Any],
    number: int,
    tokenizer: Any,
    how: Templating,
    reader: ImageReader | None = None,
    limits: Limits = ANY,
) -> Prompt:
    """Chat messages as the model reads them. `limits`: which images are read.

    Raises TokenizerError as `hookmap.loading.chat_template.fill` does.
    """
    if has_images(messages):
        read = _reader(reader, number).messages(messages, number, how, limits)
        return Prompt(read.text, read.token_ids, None, None, read.inputs, read.image_positions, read.pictures)
    text = fill(messages, number, tokenizer, how)
    # The template writes the special tokens itself.
    return Prompt(text, _token_ids(text, number, tokenizer, add_special_tokens=False))


def _of_sample(sample: Mapping[str, Any], number: int, how: Templating, reader: ImageReader | None) -> Prompt:
    """A prompt with images and without messages, or what a processor made of one. Raises TokenizerError."""
    if "input_ids" in sample:
        return _of_fields(sample, number, reader)
    text, images = sample.get("text"), sample["images"]
    images = images if isinstance(images, list | tuple) else [images]
    if not isinstance(text, str) or not images or sample.keys() - {"text", "images"}:
        raise TokenizerError(
            f'prompt {number}: expected {{"text": …, "images": [FILE, …]}}, got {", ".join(map(str, sample))}.'
        )
    if how.chat is True:
        parts = [{"type": "image", "image": image} for image in images]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        return templated([message], number, None, how, reader)
    read = _reader(reader, number).text(text, images, number, ANY)
    return Prompt(read.text, read.token_ids, None, None, read.inputs, read.image_positions, read.pictures)


def _of_fields(sample: Mapping[str, Any], number: int, reader: ImageReader | None) -> Prompt:
    """What a processor made of one prompt. A pad may not be among its tokens."""
    fields = {str(name): torch.as_tensor(value) for name, value in sample.items() if value is not None}
    ids, mask = fields.pop("input_ids"), fields.pop("attention_mask", None)
    if ids.ndim != 2 or len(ids) != 1 or ids.is_floating_point() or (mask is not None and not bool(mask.all())):
        raise TokenizerError(
            f"prompt {number}: expected the inputs of one prompt without pads, input_ids [1, tokens], got "
            f"{list(ids.shape)}. Give each prompt by itself: hookmap makes the batches."
        )
    token_ids = tuple(ids[0].tolist())
    places = reader.places(token_ids) if reader is not None and fields else ()
    return Prompt("", token_ids, inputs=FurtherInputs.of(fields) if fields else None, image_positions=places)


def _reader(reader: ImageReader | None, number: int) -> ImageReader:
    if reader is None:
        raise TokenizerError(
            f"prompt {number} has an image, and only text is read here. Give the text alone; or what the model's "
            "processor makes of both, as a mapping."
        )
    return reader


def _checked(prompt: Prompt, number: int) -> Prompt:
    if not prompt.token_ids:
        raise TokenizerError(
            f"prompt {number} ({prompt.text!r}) has no tokens: a model needs at least one. Give some text."
        )
    return prompt


def _not_a_prompt(prompt: Any, number: int) -> TokenizerError:
    return TokenizerError(
        f"prompt {number}: expected a string, a list of chat messages ({{'role': ..., 'content': ...}}) "
        f"or a list of token ids, got {type(prompt).__name__}: {str(prompt)[:80]}. "
        "Records with columns, and files: hookmap.load_prompts."
    )
