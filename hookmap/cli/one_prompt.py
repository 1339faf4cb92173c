"""What commands about one prompt share: the model, opened, and the prompt with what was answered so far."""

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hookmap.model import HookedModel

DEFAULT_PROMPT = "Tom has 3 apples. He buys 4 more. How many apples does Tom have?"
DEFAULT_ANSWER = "Tom has 3+4=<<3+4="


def options(command: Any) -> Any:
    """Adds the options that `opened` and `tokens` take."""
    command = loading(command)
    for option in reversed(_PROMPT):
        command = option(command)
    return command


def loading(command: Any) -> Any:
    """Adds the options that `opened` takes."""
    for option in reversed(_LOADING):
        command = option(command)
    return command


_PROMPT = (
    click.option("--prompt", metavar="TEXT", help="What the model reads."),
    click.option("--answer", metavar="TEXT", help="What it is taken to have answered so far; follows the prompt."),
    click.option(
        "--chat/--no-chat", default=None, help="Send the prompt through the chat template.  [default: if there is one]"
    ),
)
_LOADING = (
    click.option("--tokenizer", metavar="MODEL", help="A folder or a hub id.  [default: the model's own]"),
    click.option("--map", "map_", metavar="MAP", help="A map file, instead of discovering one."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        help="Of the weights.  [default: auto, the checkpoint's own]",
    ),
    click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, auto.  [default: a GPU where there is one]"),
    click.option(
        "--trust-remote-code", is_flag=True, default=None, help="Run the modelling code that the model brings."
    ),
)


def opened(model: str | None, given: dict[str, Any], quiet: bool) -> "HookedModel":
    """The model that was named, or the one of the settings."""
    from hookmap.cli.console import working
    from hookmap.cli.settings import choose_model, load_settings

    settings = load_settings()
    model = choose_model(model, settings)
    with working("importing torch and transformers", quiet=quiet):
        import hookmap.model
    with working(f"loading {model}", quiet=quiet, spinner=False):
        return hookmap.open(
            model,
            map=given["map_"] or settings.get("map"),
            tokenizer=given["tokenizer"] or settings.get("tokenizer"),
            dtype=given["dtype"] or settings.get("dtype", "auto"),
            device=given["device"] or settings.get("device"),
            trust_remote_code=bool(given["trust_remote_code"] or settings.get("trust_remote_code")),
        )


def tokens(hm: "HookedModel", given: dict[str, Any]) -> list[int]:
    """The prompt's token ids, and the answer's behind them."""
    from hookmap.prompts import encode

    prompt, answer, chat = given["prompt"], given["answer"], given["chat"]
    if not prompt:
        prompt, answer = DEFAULT_PROMPT, DEFAULT_ANSWER if answer is None else answer
        click.echo(f"prompt: {prompt} (the default; give your own with --prompt and --answer)", err=True)
    if chat is None:
        chat = bool(getattr(hm.tokenizer, "chat_template", None))
    (encoded,) = encode(prompt, hm.tokenizer, chat or "auto")
    behind = hm.tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
    return [*encoded.token_ids, *behind]


def save_pictures(chart: Any, files: tuple[str | None, ...]) -> None:
    """Write the chart to each file that was named; stderr says so."""
    from hookmap.pictures import save_picture

    for file in files:
        if file is not None:
            click.echo(f"wrote {save_picture(chart(), file)}", err=True)
