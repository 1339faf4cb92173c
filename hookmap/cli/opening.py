"""What the commands that run a model share: its options, how it is opened, and how its prompts are read."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from hookmap.model import HookedModel

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--tokenizer", metavar="MODEL", help="A folder or a hub id.  [default: the model's own]"),
    click.option("--map", "map", metavar="MAP", help="A map file, instead of discovering one."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        help="Of the weights.  [default: auto, the checkpoint's own]",
    ),
    click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, auto.  [default: a GPU where there is one]"),
    click.option("--trust-remote-code", is_flag=True, default=None, help="Run the modelling code that it brings."),
)


def model_options(command: Command) -> Command:
    """MODEL and the options that say how it is loaded; the command gets them as `model` and `**opening`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return click.argument("model", required=False)(command)


def open_model(model: str | None, opening: dict[str, Any], settings: dict[str, Any]) -> "HookedModel":
    """The model that was typed, or that hookmap.yaml or the environment name, or the demo model."""
    from hookmap.cli.console import working
    from hookmap.cli.settings import choose_model

    chosen = choose_model(model, settings)
    given: dict[str, Any] = {name: value or settings.get(name) for name, value in opening.items()}
    given |= {"dtype": given["dtype"] or "auto", "trust_remote_code": bool(given["trust_remote_code"])}
    with working("importing torch and transformers"):
        import hookmap.model
    with working(f"loading {chosen}", spinner=False):  # transformers shows a bar of its own
        return hookmap.open(chosen, **given)


def chat_text(hm: "HookedModel", text: str, chat: bool | None, prefix: str = "") -> str:
    """The prompt as the model reads it, with the beginning of the answer behind it."""
    if chat is None:
        chat = bool(getattr(hm.tokenizer, "chat_template", None))
    if not chat:
        return text + prefix
    return hm.encode(text, True)[0].text + prefix
