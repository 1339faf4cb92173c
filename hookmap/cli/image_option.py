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


def of_one_text(texts: Sequence[str], files: Sequence[str], chat: bool | None) -> list[Any]:
    """The one prompt of a command that takes several. Raises click.UsageError."""
    if len(texts) != 1:
        raise click.UsageError(
            "--image goes with one --prompt. Of several: hookmap capture --prompts FILE, with messages that have them"
        )
    return [with_images(texts[0], files, chat)]


def with_images(text: str, files: Sequence[str], chat: bool | None, answer: str | None = None) -> Any:
    """The prompt of a text and its images: a user's message, or with chat=False what the model's processor reads.

    `answer`: what the assistant's message begins with; with chat=False it follows the text.
    """
    if chat is False:
        return {"text": text + (answer or ""), "images": list(files)}
    parts = [{"type": "image", "path": file} for file in files]
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return [*messages, {"role": "assistant", "content": answer}] if answer else messages
