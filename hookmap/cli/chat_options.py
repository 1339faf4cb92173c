"""The options of the chat template. They have the same defaults in every command, and in Python."""

import json
from typing import Any

import click

from hookmap.cli.options import option_group

chat_options = option_group(
    click.option(
        "--chat/--no-chat",
        default=None,
        help="Send texts through the chat template, each as a user's message.  [default: as they are]",
    ),
    click.option(
        "--add-generation-prompt/--no-add-generation-prompt",
        default=None,
        help="Begin the assistant's turn behind messages.  [default: unless an assistant's message is the last]",
    ),
    click.option(
        "--continue-final-message/--no-continue-final-message",
        default=None,
        help="Leave the last message open.  [default: if it is an assistant's, and text is generated]",
    ),
    click.option(
        "--chat-template-kwargs", metavar="JSON", help="What the template reads: '{\"enable_thinking\": false}'."
    ),
)
"""how prompts go through the chat template; `templating` reads them"""
_NAMES = ("chat", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")


def templating(given: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The options as typed, else as in the settings, as `HookedModel.capture` takes them. `given` loses them.

    Raises click.BadParameter.
    """
    typed = {name: given.pop(name) for name in _NAMES}
    if typed["chat_template_kwargs"] is not None:
        typed["chat_template_kwargs"] = read_kwargs(typed["chat_template_kwargs"])
    found = {name: settings.get(name) if value is None else value for name, value in typed.items()}
    return {name: value for name, value in found.items() if value is not None}


def read_kwargs(text: str) -> dict[str, Any]:
    """Parse a JSON object. Raises click.BadParameter."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise click.BadParameter(
            f"{text!r}: write a JSON object such as '{{\"enable_thinking\": false}}'",
            param_hint="--chat-template-kwargs",
        )
    return found


def of_default_prompt(tokenizer: Any, how: dict[str, Any]) -> dict[str, Any]:
    """The options for the default prompt: it is a question, so it goes through the chat template if there is one."""
    return how if "chat" in how or not getattr(tokenizer, "chat_template", None) else {**how, "chat": True}


def tell(tokenizer: Any, how: dict[str, Any], texts: bool) -> None:
    """If a chat model is to continue plain texts, say on stderr how to send them as a user's message."""
    if texts and "chat" not in how and getattr(tokenizer, "chat_template", None):
        click.echo("note: texts are read as they are; --chat sends each as a user's message", err=True)
