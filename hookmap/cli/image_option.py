"""`--image`: the images of one prompt."""

from collections.abc import Sequence
from typing import Any

import click

image_option = click.option(
    "--image",
    "images",
    metavar="FILE",
    multiple=True,
    help="An image before the text of --prompt, in one message; repeatable. With --no-chat, the text marks its place.",
)


def with_images(text: str, files: Sequence[str], chat: bool | None) -> Any:
    """The prompt of a text and its images: a user's message, or with chat=False what the model's processor reads."""
    if chat is False:
        return {"text": text, "images": list(files)}
    parts = [{"type": "image", "path": file} for file in files]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
