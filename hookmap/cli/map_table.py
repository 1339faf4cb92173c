"""A map as a person reads it: one table of points for each kind of block."""

from rich.console import Console
from rich.markup import escape

from hookmap.architecture_map import ArchitectureMap, PointTemplate, TermTemplate
from hookmap.cli.console import table
from hookmap.points import POINTS
from hookmap.show import layer_ranges, same_place


def show_map(m: ArchitectureMap, screen: Console) -> None:
    """Prints the sizes, where each point is, and why the others are not there."""
    kinds = "1 kind of block" if len(m.kinds) == 1 else f"{len(m.kinds)} kinds of block"
    heads = f", {m.num_heads} heads" if m.num_heads else ""
    screen.print(f"\n[bold]{m.architecture}[/]: {m.num_layers} layers, d_model {m.d_model}{heads}, {kinds}\n")
    points = table("point", "layers", "where")
    if "embed" in m.model_points:
        points.add_row("[cyan]embed[/]", "", _where(m.model_points["embed"]))
    for (names, where), layers in sorted(_rows(m).items(), key=lambda row: _order(row[0][0])):
        points.add_row(f"[cyan]{names}[/]", layer_ranges(layers), where)
    for name, point in m.model_points.items():
        if name != "embed":
            points.add_row(f"[cyan]{name}[/]", "", _where(point))
    screen.print(points)
    if m.left_out:
        lists = ", ".join(map(escape, m.left_out))
        screen.print(f"[bold]Not in this map[/]: other blocks that the output is computed through: {lists}")
    if not m.joined:
        screen.print("The model adds to the stream between blocks: resid_pre of the next is not resid_post.")
    for kind in m.kinds:
        for name, point in kind.points.items():
            if point.beside:
                where = ", ".join(map(_term, point.beside))
                screen.print(f"Beside {name} its branch reads {where} (layers {layer_ranges(kind.layers)}).")
    _show_missing(m, screen)
    screen.print()


def _rows(m: ArchitectureMap) -> dict[tuple[str, str], tuple[int, ...]]:
    """(names, where) -> layers: kinds of block that have a point in the same place share a row."""
    rows: dict[tuple[str, str], tuple[int, ...]] = {}
    for kind in m.kinds:
        for names, point in same_place(kind.points):
            key = (" = ".join(names), _where(point))
            rows[key] = (*rows.get(key, ()), *kind.layers)
    return rows


def _order(names: str) -> int:
    """Place of the first of `a = b` in the vocabulary, which is the order of the forward pass."""
    return list(POINTS).index(names.split(" ")[0].partition(".")[0])


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


def _where(point: PointTemplate) -> str:
    return escape(" + ".join(map(_term, point.terms)))


def _term(term: TermTemplate) -> str:
    scale = "" if term.scale == 1.0 else f"{term.scale:g} × "
    place = "" if term.index is None else f"[{term.index!r}]"
    return f"{scale}{term.module or 'model'}.{term.side}{place}"
