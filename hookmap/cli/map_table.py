"""A map as a table of its points, for a person."""

from rich.console import Console
from rich.markup import escape

from hookmap.cli.console import table
from hookmap.maps.describe import layer_ranges, layers_text, order_of, places
from hookmap.maps.document import ArchitectureMap
from hookmap.wording import counted


def show_map(m: ArchitectureMap, screen: Console) -> None:
    """Print the model's sizes, where each point is, and why other points are unavailable."""
    kinds = counted(len(m.kinds), "kind of block", "kinds of block")
    heads = f", {m.num_heads} heads" if m.num_heads else ""
    screen.print(f"\n[bold]{m.architecture}[/]: {m.num_layers} layers, d_model {m.d_model}{heads}, {kinds}\n")
    points = table("point", "layers", "where")
    for names, layers, where in places(m):
        points.add_row(f"[cyan]{names}[/]", layer_ranges(layers), escape(where))
    screen.print(points)
    if m.left_out:
        lists = ", ".join(map(escape, m.left_out))
        screen.print(f"[bold]Not in this map[/]: other blocks that the output is computed through: {lists}")
    for line in order_of(m):
        screen.print(escape(line))
    for kind in m.kinds:
        if kind.calls > 1:
            verb = "run" if len(kind.layers) > 1 else "runs"
            screen.print(
                f"{layers_text(kind.layers).capitalize()} {verb} {kind.calls} times in one forward pass, calls 0 to "
                f"{kind.calls - 1}: each point is there in each of them."
            )
        for name, point in kind.points.items():
            if point.beside:
                where = escape(", ".join(term.text(times=" × ") for term in point.beside))
                screen.print(f"Beside {name} its branch reads {where} (layers {layer_ranges(kind.layers)}).")
    _show_missing(m, screen)
    screen.print()


def _show_missing(m: ArchitectureMap, screen: Console) -> None:
    layers: dict[tuple[str, str], tuple[int, ...]] = {}
    for kind in m.kinds:
        for name, reason in kind.unavailable.items():
            layers[name, reason] = (*layers.get((name, reason), ()), *kind.layers)
    names: dict[tuple[str, str], list[str]] = {(reason, ""): [name] for name, reason in m.model_unavailable.items()}
    for (name, reason), where in layers.items():
        label = "" if len(where) == m.num_layers else f" on layers {layer_ranges(where)}"
        names.setdefault((reason, label), []).append(name)
    if names:
        screen.print("\n[bold]not there[/]")
    for (reason, label), found in names.items():
        screen.print(f"  {', '.join(found)}{label}: [dim]{escape(reason)}[/]")
