"""`hookmap show`: a tree of the model with its points marked."""

from typing import TYPE_CHECKING

import click

from hookmap.cli import model_options

if TYPE_CHECKING:
    from hookmap.maps.document import ArchitectureMap
    from hookmap.maps.templates import BlockKind


@click.command()
@click.argument("model", required=False, metavar="[MAP|MODEL]")
@click.option("--svg", metavar="FILE", type=click.Path(dir_okay=False), help="Draw the blocks to FILE instead.")
@click.option("--operations", is_flag=True, help="List the operations inside modules instead, by name.")
@click.option("--weights", is_flag=True, help="List the weights beside points instead, by name.")
@click.option(
    "--layers",
    metavar="LAYERS",
    help="Only 8,12,16 or 0-3 or -1, or all: each kind by itself.  [default: kinds that differ in constants are one; "
    "with --operations and --weights, 0]",
)
@model_options.trust_remote_code
def command(
    model: str | None,
    svg: str | None,
    operations: bool,
    weights: bool,
    layers: str | None,
    trust_remote_code: bool | None,
) -> None:
    """Draw a model's tree with its points.

    The tree is of MODEL, or of a map. Layers of one kind are one branch, in the order of the forward pass, and so are
    kinds that differ in a constant or a reason alone. ● is a point, ○ a point that is not there, and why.

    \b
    hookmap show LlamaForCausalLM
    hookmap show BeamForCausalLM --layers 0,7
    hookmap show path/to/model --svg block.svg
    hookmap show path/to/model --operations --layers 8
    hookmap show path/to/model --weights --layers 8

    The tree goes to stdout.
    """
    from hookmap.cli.console import console
    from hookmap.cli.parsing import parse_layers
    from hookmap.cli.settings import choose_model, load_settings
    from hookmap.maps.describe import alike, apart
    from hookmap.maps.selectors import layers_of
    from hookmap.maps.tree import tree

    wanted = None if layers is None else parse_layers(layers)
    settings = load_settings()
    model = choose_model(model, settings)
    if operations and weights:
        raise click.UsageError("--operations or --weights, one at a time")
    if operations or weights:
        listed = _list_operations if operations else _list_weights
        listed(model, [0] if wanted is None else wanted, model_options.trusted(trust_remote_code, settings))
        return
    found, modules = _find(model, model_options.trusted(trust_remote_code, settings))
    groups = alike(found.kinds) if wanted is None else apart(found, layers_of(found, wanted))
    if svg:
        _draw(found, groups, svg)
        return
    console(stderr=False).print(tree(found, modules, groups))


def _list_operations(model: str, layers: "str | list[int]", trust_remote_code: bool) -> None:
    """A line for each operation: its name, the shapes of what it reads and gives, and what reads that."""
    from itertools import groupby

    from hookmap.cli.console import working
    from hookmap.discovery.operations import operations_of

    with working(f"reading the dataflow of {model}"):
        rows, tokens = operations_of(model, layers, trust_remote_code=trust_remote_code)
    click.echo(f"shapes of one text of {tokens} tokens; with eager attention", err=True)
    for (path, kind), own in groupby(rows, key=lambda row: (row.module, row.module_class)):
        click.echo(f"{path} ({kind})")
        for row in own:
            shapes = [" ".join(str(list(shape)) for shape in side) for side in (row.inputs, row.outputs)]
            short = [reader.removeprefix(f"{path}.").removeprefix(path) for reader in row.readers]
            click.echo(f"  {row.name}  {shapes[0]} -> {shapes[1]}" + (f"  to {', '.join(short)}" if short else ""))


def _list_weights(model: str, layers: "str | list[int]", trust_remote_code: bool) -> None:
    """A line for each parameter beside a point: its name, the point, its path, and its axes as `x @ W`."""
    import hookmap
    from hookmap.cli.console import working
    from hookmap.discovery.weights import listed

    with working(f"reading the dataflow of {model}"):
        found = hookmap.discover(model, trust_remote_code=trust_remote_code)
        rows = listed(model, found, layers, trust_remote_code)
    for row in rows:
        click.echo("  ".join(row))


def _draw(found: "ArchitectureMap", groups: "list[list[BlockKind]]", svg: str) -> None:
    """One picture for each branch of the tree: FILE, and FILE-2, FILE-3, … for the further kinds of a hybrid."""
    from pathlib import Path

    import hookmap
    from hookmap.maps.block_picture import block_svg

    path = Path(svg)
    for number, kinds in enumerate((kinds for kinds in groups if kinds[0].points), start=1):
        target = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            target.write_text(block_svg(found, *kinds), encoding="utf-8")
        except OSError as error:
            raise hookmap.MapError(
                f"cannot write {target}: {error.strerror or error}. Write it elsewhere: --svg FILE"
            ) from error
        click.echo(f"wrote {target} ({kinds[0].name})", err=True)


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
