"""`hookmap show`: a tree of the model with its points marked."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hookmap.architecture_map import ArchitectureMap


@click.command()
@click.argument("model", required=False, metavar="[MAP|MODEL]")
@click.option("--trust-remote-code", is_flag=True, default=None, help="Run the modelling code that the model brings.")
def command(model: str | None, trust_remote_code: bool | None) -> None:
    """Draw the tree of MODEL, or of a map, with its points in their places.

    Layers of one kind are one branch, in the order of the forward pass. ● is a point, ○ a point that is not there, and
    why. The tree goes to stdout.
    """
    from hookmap.cli.console import console
    from hookmap.cli.settings import choose_model, load_settings
    from hookmap.show import tree

    settings = load_settings()
    model = choose_model(model, settings)
    found, modules = _find(model, bool(trust_remote_code or settings.get("trust_remote_code")))
    console(stderr=False).print(tree(found, modules))


def _find(model: str, trust_remote_code: bool) -> "tuple[ArchitectureMap, dict[str, str]]":
    """The map, and the model's modules where there is a model and not a map alone."""
    from pathlib import Path

    import hookmap
    from hookmap import skeleton
    from hookmap.cli.console import working
    from hookmap.cli.offline import shipped_map
    from hookmap.library import shipped_architectures

    if Path(model).is_file() or model.endswith(".json") or model in shipped_architectures():
        return hookmap.load_map(model), {}
    try:
        with working(f"reading the dataflow of {model}"):
            found = hookmap.discover(model, trust_remote_code=trust_remote_code)
            config = skeleton.load_config(model, trust_remote_code)
            built = skeleton.build(config, trust_remote_code=trust_remote_code)
    except hookmap.ModelError as error:
        return shipped_map(model, error), {}
    return found, {path: type(module).__name__ for path, module in built.named_modules()}
