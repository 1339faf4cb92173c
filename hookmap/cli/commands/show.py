"""`hookmap show`: a tree of the model with its points marked."""

from typing import TYPE_CHECKING

import click

from hookmap.cli import model_options

if TYPE_CHECKING:
    from hookmap.maps.document import ArchitectureMap


@click.command()
@click.argument("model", required=False, metavar="[MAP|MODEL]")
@click.option("--svg", metavar="FILE", type=click.Path(dir_okay=False), help="Draw the blocks to FILE instead.")
@model_options.trust_remote_code
def command(model: str | None, svg: str | None, trust_remote_code: bool | None) -> None:
    """Draw a model's tree with its points.

    The tree is of MODEL, or of a map. Layers of one kind are one branch, in the order of the forward pass. ● is a
    point, ○ a point that is not there, and why.

    \b
    hookmap show LlamaForCausalLM
    hookmap show path/to/model --svg block.svg

    The tree goes to stdout.
    """
    from hookmap.cli.console import console
    from hookmap.cli.settings import choose_model, load_settings
    from hookmap.maps.tree import tree

    settings = load_settings()
    model = choose_model(model, settings)
    found, modules = _find(model, model_options.trusted(trust_remote_code, settings))
    if svg:
        _draw(found, svg)
        return
    console(stderr=False).print(tree(found, modules))


def _draw(found: "ArchitectureMap", svg: str) -> None:
    """One picture for each kind of block: FILE, and FILE-2, FILE-3, … for the further kinds of a hybrid."""
    from pathlib import Path

    import hookmap
    from hookmap.maps.block_picture import block_svg

    path = Path(svg)
    for number, kind in enumerate((kind for kind in found.kinds if kind.points), start=1):
        target = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            target.write_text(block_svg(found, kind), encoding="utf-8")
        except OSError as error:
            raise hookmap.MapError(
                f"cannot write {target}: {error.strerror or error}. Write it elsewhere: --svg FILE"
            ) from error
        click.echo(f"wrote {target} ({kind.name})", err=True)


def _find(model: str, trust_remote_code: bool) -> "tuple[ArchitectureMap, dict[str, str]]":
    """The map, and the model's modules where there is a model and not a map alone."""
    from pathlib import Path

    import hookmap
    from hookmap.cli.console import working
    from hookmap.cli.offline import shipped_map
    from hookmap.discovery.discover import config_of
    from hookmap.loading import configs
    from hookmap.maps.shipped import shipped_architectures

    if Path(model).is_file() or model.endswith(".json") or model in shipped_architectures():
        return hookmap.load_map(model), {}
    try:
        with working(f"reading the dataflow of {model}"):
            found = hookmap.discover(model, trust_remote_code=trust_remote_code)
            config, _ = config_of(model, trust_remote_code)
            built = configs.build(config, trust_remote_code=trust_remote_code)
    except hookmap.ModelError as error:
        return shipped_map(model, error), {}
    return found, {path: type(module).__name__ for path, module in built.named_modules()}
