"""A tree of the model with its points marked where they are, read in the order of the forward pass.

Pure: map (+ the names and classes of the model's modules, where a model is at hand) -> a rich tree. Layers of one kind
are one branch. A point at a module's input stands on the line before the module, at its output on the line after it,
at an operation of its own forward among its children.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from rich.markup import escape
from rich.tree import Tree

from hookmap.maps.contents import MapContents
from hookmap.maps.describe import alike, differing_constants, layers_text, order_of, same_place, where_of_all
from hookmap.maps.templates import BlockKind, PointTemplate

_LAST = 10**9


@dataclass
class _Module:
    """One module: the points before, inside and after it, and its children in the order in which they are shown."""

    name: str = ""
    class_name: str = ""
    before: list[tuple[int, str]] = field(default_factory=list)
    inside: list[tuple[int, str]] = field(default_factory=list)
    after: list[tuple[int, str]] = field(default_factory=list)
    children: "dict[str, _Module]" = field(default_factory=dict)
    kinds: "list[tuple[str, _Module, Sequence[BlockKind]]]" = field(default_factory=list)
    """of the layer list only: label and block of the kinds that share a branch of the tree"""

    def child(self, path: str) -> "_Module":
        """The descendant at `path`, made if nobody has named it yet."""
        module = self
        for name in filter(None, path.split(".")):
            module = module.children.setdefault(name, _Module(name))
        return module

    def order(self) -> int:
        """Place of its first point in the forward pass; modules without points come last."""
        own = [order for order, _ in (*self.before, *self.inside, *self.after)]
        return min([*own, *(child.order() for child in self.children.values())], default=_LAST)


def tree(
    architecture_map: MapContents,
    modules: Mapping[str, str] | None = None,
    groups: Sequence[Sequence[BlockKind]] | None = None,
) -> Tree:
    """The tree. `modules`: path -> class name of every module, e.g. of a model on the meta device; without it, the
    tree holds the modules that the map names. `groups`: the kinds of block, those together that share a branch of it;
    `describe.alike` unless given."""
    m = architecture_map
    groups = alike(m.kinds) if groups is None else groups
    layer_list, _, _ = m.layers_path.rpartition(".")
    named = (m.embedding_path, layer_list, m.final_norm_path, m.lm_head_path)
    modules = modules or {path: "" for path in named if path}
    root = _Module()
    blocks = tuple(f"{m.at_layer(m.layers_path, layer)}." for layer in range(m.num_layers))
    for path, class_name in modules.items():
        if f"{path}.".startswith(blocks):
            root.child(layer_list or m.layers_path)  # in the place of the first block
        else:
            root.child(path).class_name = class_name
    _mark(root, m.model_points, prefix="")
    _collapse_numbered(root)
    root.child(layer_list or m.layers_path).kinds = [_block(m, kinds, modules) for kinds in groups]
    top = Tree(_title(m), guide_style="dim")
    _grow(top, root)
    _missing(top, m.model_unavailable)
    for line in order_of(m):
        top.add(f"[dim]{escape(line)}[/]")
    if any(differing_constants(kinds) for kinds in groups):
        top.add("[dim]Constants that differ from layer to layer are in brackets: --layers shows each layer's.[/]")
    if m.left_out:
        top.add(f"[yellow]○ not in this map[/]  [dim]other lists of blocks: {escape(', '.join(m.left_out))}[/]")
    return top


def _title(m: MapContents) -> str:
    sizes = [f"{m.num_layers} layers", f"d_model {m.d_model}"]
    sizes += [f"{m.num_heads} heads"] if m.num_heads else []
    sizes += [f"d_vocab {m.d_vocab}"] if m.d_vocab else []
    name = f"  [dim]{escape(m.model_id)}[/]" if m.model_id else ""
    return f"[bold]{escape(m.architecture)}[/]{name}  [dim]{', '.join(sizes)}[/]"


def _block(
    m: MapContents, kinds: Sequence[BlockKind], modules: Mapping[str, str]
) -> tuple[str, _Module, Sequence[BlockKind]]:
    """Label and modules of kinds of block that are alike; the first layer stands for all of them."""
    kind = kinds[0]
    prefix = m.at_layer(m.layers_path, kind.layers[0])
    block = _Module()
    for path, class_name in modules.items():
        if path.startswith(f"{prefix}."):
            block.child(path.removeprefix(f"{prefix}.")).class_name = class_name
    for branch in filter(None, (kind.mixer, kind.cross_attn, kind.mlp)):
        for path in branch.modules:
            module = block.child(path.removeprefix(m.layers_path).removeprefix("."))
            if path == branch.modules[-1]:
                module.class_name = module.class_name or branch.module_class or ""
    _mark(block, *(each.points for each in kinds), prefix=m.layers_path)
    # Modules are defined in any order (Qwen3 defines its norms last); a block reads best in the order of its forward.
    block.children = dict(sorted(block.children.items(), key=lambda item: item[1].order()))
    _collapse_numbered(block)
    parts = [b.type for b in (kind.mixer, kind.mlp) if b]
    if kind.cross_attn is not None:
        parts.insert(1, "cross-attention")
    what = f"{' + '.join(parts)}, {kind.branch_order.replace('_', ' ')}, {kind.norm_placement} norm"
    what += f", runs {kind.calls} times" if kind.calls > 1 else ""
    layers = layers_text(layer for each in kinds for layer in each.layers)
    return f"[bold]{layers}[/]: {escape(kind.block_class)}  [dim]{escape(what)}[/]", block, kinds


def _mark(root: _Module, *points: Mapping[str, PointTemplate], prefix: str) -> None:
    """Puts every point before or after the module of its last term; names of one tensor share a line.

    `points`: of each of some kinds of block that are alike.
    """
    for names, point in same_place(points[0]):
        last = point.terms[-1]
        path = last.module.removeprefix(prefix).removeprefix(".")
        module = root.child(path)
        where = where_of_all([each[names[0]] for each in points], prefix)
        line = f"[cyan]● {escape(' = '.join(names))}[/]  [dim]{escape(where)}[/]"
        lines = module.inside if last.operation else module.before if last.side == "input" else module.after
        lines.append((point.order, line))


def _grow(branch: Tree, module: _Module) -> None:
    """Adds to `branch` the points at the module's input, its children and what is inside, the points at its output."""
    for line in _in_order(module.before):
        branch.add(line)
    inside = sorted(module.inside, key=itemgetter(0))
    for child in module.children.values():
        while inside and inside[0][0] < child.order() < _LAST:
            branch.add(inside.pop(0)[1])
        if child.kinds:  # the list may hold more than blocks: an embedding before them, a norm behind
            others = {name: other for name, other in child.children.items() if other.order() < _LAST}
            first = {name: other for name, other in others.items() if other.order() == 0}
            _grow(branch, _Module(children=first))
            for label, block, kinds in child.kinds:
                layers = branch.add(label)
                _grow(layers, block)
                _missing_of(layers, kinds)
            _grow(branch, _Module(children={name: other for name, other in others.items() if name not in first}))
            continue
        class_name = f"  [dim]{escape(child.class_name)}[/]" if child.class_name else ""
        for line in _in_order(child.before):
            branch.add(line)
        _grow(branch.add(f"{escape(child.name)}{class_name}"), _Module(inside=child.inside, children=child.children))
        for line in _in_order(child.after):
            branch.add(line)
    for line in (*(line for _, line in inside), *_in_order(module.after)):
        branch.add(line)


def _in_order(lines: Sequence[tuple[int, str]]) -> list[str]:
    return [line for _, line in sorted(lines, key=itemgetter(0))]


def _missing_of(tree_: Tree, kinds: Sequence[BlockKind]) -> None:
    """Points that are not there in these kinds of block; a reason that only some of them give has their layers."""
    layers: dict[tuple[str, str], tuple[int, ...]] = {}
    for kind in kinds:
        for name, reason in kind.unavailable.items():
            layers[name, reason] = (*layers.get((name, reason), ()), *kind.layers)
    count = sum(len(kind.layers) for kind in kinds)
    by_place: dict[str, dict[str, str]] = {}
    for (name, reason), where in layers.items():
        by_place.setdefault("" if len(where) == count else f" ({layers_text(where)})", {})[name] = reason
    for place, unavailable in by_place.items():
        _missing(tree_, {name: f"{reason}{place}" for name, reason in unavailable.items()})


def _missing(tree_: Tree, unavailable: Mapping[str, str]) -> None:
    """Points that are not there, those with the same reason on one line."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in unavailable.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        tree_.add(f"[yellow]○ no {escape(', '.join(names))}[/]  [dim]{escape(reason)}[/]")


def _collapse_numbered(module: _Module) -> None:
    """Numbered children of one class without points (64 experts) become one line."""
    numbered = [c for c in module.children.values() if c.name.isdecimal() and c.order() == _LAST]
    if len(numbered) > 2 and len({c.class_name for c in numbered}) == 1 and len(numbered) == len(module.children):
        first = numbered[0]
        first.name = f"{first.name}–{numbered[-1].name}"
        module.children = {first.name: first}
    for child in module.children.values():
        _collapse_numbered(child)
