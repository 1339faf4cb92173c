"""The images of prompts: a file, a data: URI or a PIL image. Nothing is fetched from a network.

They are decoded as transformers decodes them: upright, in RGB, the first frame of an animation.
"""

import base64
import binascii
import hashlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hookmap.datasets.messages import is_address, is_image, parts_of
from hookmap.errors import TokenizerError
from hookmap.extras import needed

MOST_PIXELS = 178_956_970
"""Pillow refuses larger images too: a small file can hold them"""
_VALUES = ("image", "path", "url", "base64")
"""where a part of a message says which image it is"""
_DATA = re.compile(r"data:image/[\w.+-]{1,64}(?:;[\w=.+-]{1,64})*;base64,", re.ASCII)
_IN_MEMORY = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")


@dataclass(frozen=True)
class Limits:
    """Which images are read."""

    files: bool = True
    """whether files are: not those that a client of a server names"""
    most_pixels: int = MOST_PIXELS
    formats: tuple[str, ...] | None = None
    """Pillow's names of the formats; None for all that it reads"""


@dataclass(frozen=True)
class Picture:
    """An image of a prompt."""

    source: Any = field(repr=False)
    """a path, the bytes of a file, or a PIL image"""
    about: Mapping[str, str]
    """its sha256 (of the file; of a PIL image's size and RGB pixels), and the name of its file where it has one"""
    limits: Limits = field(repr=False)

    def load(self) -> Any:
        """The PIL image. Raises TokenizerError where its file has changed."""
        if not isinstance(self.source, Path):
            return _upright(self.source, self.limits)
        data = self.source.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.about["sha256"]:
            raise TokenizerError(f"{self.source} has changed since its prompt was read. Run again.")
        return _upright(data, self.limits)


def image_sources(messages: Any) -> list[Any]:
    """What each image of messages, or of a text with images, is, or where; of those that say one."""
    if isinstance(messages, Mapping):
        return list(messages.get("images", ()))
    parts = (part for message in messages for part in parts_of(message) if is_image(part))
    return [_value(part, "a message") for part in parts if len({*_VALUES, "image_url"} & part.keys()) == 1]


def sha256_of(source: Any) -> str:
    """Of an image, as in `Picture.about`. Raises TokenizerError."""
    return picture_of({"type": "image", "image": source}, "a message", Limits()).about["sha256"]


def picture_of(part: Any, where: str, limits: Limits) -> Picture:
    """The image that a part of a message names. `where`: the part, for messages. Raises TokenizerError."""
    why = f'{where} has an image, which needs Pillow: pip install "hookmap[vision]"'
    pillow = needed("PIL.Image", why, TokenizerError)
    value: Any = None
    try:
        value = _value(part, where)
        return _picture(value, limits, pillow)
    except TokenizerError:
        raise
    except Exception as error:  # decoders of files that anybody may have written raise what they like
        told = _IN_MEMORY.sub("", str(error)).rstrip(".") or type(error).__name__
        if isinstance(value, str | os.PathLike) and not (name := os.fspath(value)).startswith("data:"):
            told = told if name[:80] in told else f"{told}: {name[:200]}"
        raise TokenizerError(f"{where}: its image cannot be read: {told}.") from error


def _value(part: Any, where: str) -> Any:
    """What says which image it is: a path, a URI, the bytes of a file, or a PIL image."""
    if not isinstance(part, Mapping):
        return part
    if isinstance(part.get("bytes"), bytes):  # as Hugging Face data sets and Parquet files hold it
        return part["bytes"]
    if part.get("type") == "image_url":
        url = part.get("image_url")
        return url.get("url") if isinstance(url, Mapping) else url
    named = [name for name in _VALUES if part.get(name) is not None]
    if len(named) != 1:
        raise TokenizerError(
            f"{where}: an image needs one of {', '.join(_VALUES)}, and has {', '.join(named) or 'none'}: "
            '{"type": "image", "path": FILE}'
        )
    value = part[named[0]]
    return base64.b64decode(value, validate=True) if named[0] == "base64" else value


def _picture(value: Any, limits: Limits, library: Any) -> Picture:
    if isinstance(value, library.Image):
        upright = _upright(value, limits)
        digest = hashlib.sha256(f"{upright.width}x{upright.height} ".encode() + upright.tobytes())
        return Picture(value, {"sha256": digest.hexdigest()}, limits)
    source: bytes | Path
    if isinstance(value, bytes):
        source = data = value
    elif isinstance(value, str) and value.startswith("data:"):
        source = data = _decoded(value)
    elif isinstance(value, str | os.PathLike):
        source = _path(value, limits)
        data = source.read_bytes()
    else:
        raise ValueError(f"expected a file, a data: URI or a PIL image, got a {type(value).__name__}")
    _upright(data, limits)
    name = {"name": source.name} if isinstance(source, Path) else {}
    return Picture(source, {**name, "sha256": hashlib.sha256(data).hexdigest()}, limits)


def _decoded(uri: str) -> bytes:
    head = _DATA.match(uri)
    if head is None:
        raise ValueError(f"expected data:image/png;base64,… or the like, got {uri[:40]}…")
    try:
        return base64.b64decode(uri[head.end() :], validate=True)
    except binascii.Error as error:
        raise ValueError(f"its data: URI is no base64 ({error})") from error


def _path(value: str | os.PathLike[str], limits: Limits) -> Path:
    text = os.fspath(value)
    if not limits.files:
        raise ValueError("only data: URIs are read here, no files and no addresses")
    if is_address(text):
        raise ValueError(f"{text[:80]} is an address, and nothing is fetched: download it, and give its path")
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"there is no file {text[:200]}")
    return path


def _upright(source: Any, limits: Limits) -> Any:
    """The PIL image in RGB, turned as its camera says. Raises ValueError for one that is too large."""
    from PIL import Image, ImageOps

    opened = Image.open(io.BytesIO(source), formats=limits.formats) if isinstance(source, bytes) else source
    if opened.width * opened.height > limits.most_pixels:
        raise ValueError(
            f"it has {opened.width} x {opened.height} pixels, and at most {limits.most_pixels} are read: shrink it"
        )
    return ImageOps.exif_transpose(opened).convert("RGB")
