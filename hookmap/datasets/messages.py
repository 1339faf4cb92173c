"""The parts of chat messages that are images, and where their files are. Opens none."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_image(part: Any) -> bool:
    """Whether a part of a message is an image, as transformers or OpenAI write it."""
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def is_address(text: str) -> bool:
    """Whether it has a scheme, as https:// is."""
    return _ADDRESS.match(text) is not None


def has_images(messages: Any) -> bool:
    """Whether a part of these messages is an image."""
    return any(is_image(part) for message in messages for part in parts_of(message))


def parts_of(message: Any) -> Sequence[Any]:
    """The parts of a message's content; none where it is a text."""
    content = message.get("content") if isinstance(message, Mapping) else ()
    return content if isinstance(content, Sequence) and not isinstance(content, str) else ()


def relative_to(prompt: Any, folder: Path) -> Any:
    """The prompt, with paths of its images relative to this folder: that of the file it is from."""
    if isinstance(prompt, Mapping) and "images" in prompt:
        images = (str(folder / each) if _is_path("path", each) else each for each in prompt["images"])
        return {**prompt, "images": list(images)}
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or not has_images(prompt):
        return prompt
    return [
        {**message, "content": [_relative(part, folder) if is_image(part) else part for part in parts_of(message)]}
        if has_images([message])
        else message
        for message in prompt
    ]


def _relative(part: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The part, its path in this folder."""
    return {name: str(folder / value) if _is_path(name, value) else value for name, value in part.items()}


def _is_path(name: str, value: Any) -> bool:
    where = name in ("path", "url", "image") and isinstance(value, str)
    return where and not value.startswith("data:") and not is_address(value)
