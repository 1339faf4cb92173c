"""Options of commands that load a model, and the opening of that model."""

import json
from typing import TYPE_CHECKING, Any

import click

import hookmap
from hookmap.cli.options import option_group

if TYPE_CHECKING:
    from hookmap.model import HookedModel

trust_remote_code = click.option(
    "--trust-remote-code/--no-trust-remote-code", default=None, help="Run the modelling code that the model brings."
)

loading = option_group(
    click.option("--tokenizer", metavar="MODEL", help="A folder or a hub id.  [default: the model's own]"),
    click.option("--map", "map_", metavar="MAP", help="A map file, instead of discovering one."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        help="Of the weights.  [default: auto, the checkpoint's own]",
    ),
    click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, auto.  [default: a GPU where there is one]"),
    click.option(
        "--config",
        metavar="FIELD=VALUE",
        multiple=True,
        callback=lambda context, option, given: fields_of(given),
        help="A field over its config.json's, such as sliding_window=64; may be given several times.",
    ),
    trust_remote_code,
    click.option(
        "--check/--no-check",
        default=None,
        help="Hold a map that is not proved against one forward pass.  [default: check]",
    ),
)
"""which model and how it is loaded; `opened` reads them"""


def fields_of(given: tuple[str, ...]) -> dict[str, Any] | None:
    """Parse each `FIELD=VALUE`: the value as JSON if it is valid JSON, else as text. Raises click.BadParameter."""
    found: dict[str, Any] = {}
    for each in given:
        field, is_there, value = each.partition("=")
        if not field or not is_there:
            raise click.BadParameter(f"{each!r}: expected FIELD=VALUE, such as sliding_window=64")
        try:
            found[field] = json.loads(value)
        except ValueError:
            found[field] = value
    return found or None


def trusted(typed: bool | None, settings: dict[str, Any]) -> bool:
    """Whether a model's own code may run: as typed, else as in the settings, else no."""
    return bool(settings.get("trust_remote_code") if typed is None else typed)


def opened(model: str | None, given: dict[str, Any], quiet: bool = False, *, texts: bool = True) -> "HookedModel":
    """Open the model that was named, or the one of the settings. `texts`: whether it needs a tokenizer."""
    from hookmap.cli.console import working

    model, options = chosen(model, given, quiet)
    with working(f"loading {model}", quiet=quiet, spinner=False):  # transformers shows a bar of its own
        if texts:  # before the weights, which may take minutes
            options["tokenizer"] = _tokenizer(model, options)
        return hookmap.open(model, **options)


def _tokenizer(model: str, options: dict[str, Any]) -> Any:
    from hookmap.loading.checkpoints import load_tokenizer
    from hookmap.loading.configs import load_config, model_class

    model_class(load_config(model, options["trust_remote_code"]))  # where there is no such model, that is what is wrong
    return load_tokenizer(options["tokenizer"] or model, trust_remote_code=options["trust_remote_code"])


def chosen(model: str | None, given: dict[str, Any], quiet: bool = False) -> tuple[str, dict[str, Any]]:
    """The model's name, and the other arguments of `hookmap.open`."""
    from hookmap.cli.console import working
    from hookmap.cli.settings import choose_model, load_settings

    settings = load_settings()
    model = choose_model(model, settings)
    with working("importing torch and transformers", quiet=quiet):
        import hookmap.model  # noqa: F401
    return model, loads(given, settings)


def loads(given: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `hookmap.open`: as typed, else as in the settings."""
    return {
        "map": given["map_"] or settings.get("map"),
        "tokenizer": given["tokenizer"] or settings.get("tokenizer"),
        "dtype": given["dtype"] or settings.get("dtype", "auto"),
        "device": given["device"] or settings.get("device"),
        "config": {**(settings.get("config") or {}), **(given["config"] or {})} or None,
        "trust_remote_code": trusted(given["trust_remote_code"], settings),
        "check": settings.get("check", True) if given["check"] is None else given["check"],
    }
