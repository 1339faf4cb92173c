"""Prompts with images, made by the model's own processor: what it tells the model is what `generate` would be given."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from hookmap.datasets.messages import has_images, is_image, parts_of
from hookmap.errors import TokenizerError
from hookmap.loading.chat_template import Templating, fill_with_images
from hookmap.loading.further_inputs import Fields, FurtherInputs
from hookmap.loading.pictures import Limits, Picture, picture_of

HELD = 2**28
"""bytes of fields that are kept until their batch runs; those of a larger data set are made again"""
_NOT_FURTHER = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class Read:
    """A prompt with images, as its processor makes it."""

    text: str
    """before the processor writes a token for each part of an image"""
    token_ids: tuple[int, ...]
    inputs: FurtherInputs
    image_positions: tuple[int, ...]
    pictures: tuple[Mapping[str, str], ...]


class ImageReader:
    """Makes prompts of messages or texts with images."""

    def __init__(self, load: Callable[[], Any] | None, model: nn.Module) -> None:
        """`load`: loads the processor, when the first image comes; raises TokenizerError. None where there is none."""
        self._load, self._model = load, model
        self._processor: Any = None
        self._recent: OrderedDict[str, Fields] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def processor(self) -> Any:
        """The processor. Raises TokenizerError."""
        with self._lock:
            if self._processor is None:
                if self._load is None:
                    raise TokenizerError(
                        "the model was given without a processor. Give one: hookmap.open(model, processor=...)"
                    )
                self._processor = self._load()
            return self._processor

    def _begin(self, where: str) -> None:
        """Raises TokenizerError where the model, or its processor, takes no image."""
        model = type(self._model)
        if not any("pixel" in name or "image" in name for name in signature(model.forward).parameters):
            raise TokenizerError(f"{where} has an image, and {model.__name__} reads text only. Give the text alone.")
        try:
            self.processor  # noqa: B018  # before the images are read
        except TokenizerError as error:
            raise TokenizerError(f"{where} has an image: {error}") from error

    def messages(self, messages: Sequence[Mapping[str, Any]], number: int, how: Templating, limits: Limits) -> Read:
        """Prompt `number`, of chat messages, through the processor's chat template. Raises TokenizerError."""
        first = next(n for n, message in enumerate(messages) if has_images([message]))
        self._begin(f"prompt {number}, message {first}")
        pictures = _pictures(
            (
                (part, f"prompt {number}, message {place}")
                for place, message in enumerate(messages)
                for part in parts_of(message)
                if is_image(part)
            ),
            limits,
        )
        text = fill_with_images(messages, number, self.processor, how, None)

        def run() -> Any:
            return fill_with_images(messages, number, self.processor, how, [picture.load() for picture in pictures])

        return self._read(text, number, pictures, run)

    def text(self, text: str, images: Sequence[Any], number: int, limits: Limits) -> Read:
        """Prompt `number`, of a text that the processor reads as it is. Raises TokenizerError."""
        self._begin(f"prompt {number}")
        pictures = _pictures(((image, f"prompt {number}") for image in images), limits)

        def run() -> Any:
            loaded = [picture.load() for picture in pictures]
            try:
                return self.processor(text=text, images=[loaded], return_tensors="pt")
            except Exception as error:
                raise ValueError(
                    f"{error} (The text has the model's own mark where an image is; chat=True, --chat, makes a user's "
                    "message of both.)"
                ) from error

        return self._read(text, number, pictures, run)

    def places(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The positions of the tokens that stand for parts of an image."""
        own = self._image_tokens()
        return tuple(position for position, token in enumerate(token_ids) if token in own)

    def _read(self, text: str, number: int, pictures: Sequence[Picture], run: Callable[[], Any]) -> Read:
        made = self._run(number, run)
        ids = made["input_ids"]
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or len(ids) != 1:
            raise TokenizerError(f"prompt {number}: {type(self.processor).__name__} makes no one row of token ids.")
        fields = self._fields(made, number)
        token_ids = tuple(ids[0].tolist())
        places = self.places(token_ids)
        if self._image_tokens() and not places:
            raise TokenizerError(
                f"prompt {number} has an image, and its text has no place for it: {text[:80]!r}. Give messages, or "
                "write the model's own mark for an image where it belongs."
            )
        about = tuple(picture.about for picture in pictures)
        digest = hashlib.sha256(repr((text, [each["sha256"] for each in about])).encode()).hexdigest()
        self._keep(digest, fields)

        def make() -> Fields:
            with self._lock:
                return self._recent.get(digest) or self._fields(self._run(number, run), number)

        return Read(text, token_ids, FurtherInputs(frozenset(fields), make, digest), places, about)

    def _run(self, number: int, run: Callable[[], Any]) -> Any:
        try:
            with self._lock, torch.no_grad():
                return run()
        except TokenizerError:
            raise
        except Exception as error:  # a processor is a program of the model's author, and raises what it likes
            raise TokenizerError(f"{type(self.processor).__name__} refuses prompt {number}: {error}") from error

    def _fields(self, made: Mapping[str, Any], number: int) -> dict[str, torch.Tensor]:
        found = {name: value for name, value in made.items() if name not in _NOT_FURTHER}
        if others := [name for name, value in found.items() if not isinstance(value, torch.Tensor)]:
            raise TokenizerError(
                f"prompt {number}: {type(self.processor).__name__} makes {', '.join(others)} as "
                f"{type(found[others[0]]).__name__}, and a batch is made of tensors: such prompts cannot be captured."
            )
        return found

    def _keep(self, digest: str, fields: Fields) -> None:
        with self._lock:
            self._recent[digest] = fields
            while sum(map(_bytes, self._recent.values())) > HELD:
                self._recent.popitem(last=False)

    def _image_tokens(self) -> frozenset[int]:
        """The tokens that the model replaces by what it sees; those of the processor where its config names none."""
        named = (getattr(self._model.config, name, None) for name in ("image_token_id", "image_token_index"))
        found = [token for token in named if isinstance(token, int)]
        if not found:
            found = [token for token in [getattr(self._processor, "image_token_id", None)] if isinstance(token, int)]
        return frozenset(found)


def _pictures(images: Iterable[tuple[Any, str]], limits: Limits) -> list[Picture]:
    """Of one prompt, each with its place. Raises one TokenizerError with all that cannot be read."""
    found, problems = list[Picture](), list[str]()
    for image, where in images:
        try:
            found.append(picture_of(image, where, limits))
        except TokenizerError as error:
            problems.append(str(error))
    if problems:
        raise TokenizerError("\n".join(dict.fromkeys(problems)))
    return found


def _bytes(fields: Fields) -> int:
    return sum(tensor.nbytes for tensor in fields.values())
