"""Maps without torch: where each point of a model is, and which parameters write or read it, for other tools.

Nothing here imports torch, transformers or nnsight; pydantic and jsonschema are enough. A map says where tensors are.
To read them, a tool hangs plain PyTorch hooks at `term.module` and asks `term.resolve(args, kwargs, output)`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hookmap.errors import MapNotFoundError, SelectionError
from hookmap.maps import parsing
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName, parse_point
from hookmap.maps.relations import Relation, raw
from hookmap.maps.selectors import Selector
from hookmap.maps.shipped import likely_map, mappings_folder, shipped_architectures, shipped_models, shipped_near
from hookmap.maps.templates import BlockKind, Heads, PointTemplate

__all__ = ["ArchitectureMap", "WeightPath", "architectures", "load_map", "weights"]

_AXES = {"Linear": ("out", "in"), "Conv1D": ("in", "out"), "Embedding": ("vocabulary", "d_model")}
"""class of a module that is one product -> the axes of its `weight`"""


@dataclass(frozen=True)
class WeightPath:
    """One parameter beside a point."""

    path: str
    """in `model.named_parameters()`, and in the checkpoint where that names it alike"""
    side: Literal["writes", "reads"]
    """whether it makes the point's tensor, or reads it"""
    axes: tuple[str, ...]
    """of the parameter as the model keeps it: (out, in) or (in, out); empty where the map does not say"""
    heads: Heads | None
    """which features of the `out` axis (writes) or the `in` axis (reads) are the point's; None: all"""


def architectures() -> tuple[str, ...]:
    """Names of the architectures that have a shipped map."""
    return shipped_architectures()


def load_map(x: str | Path) -> ArchitectureMap:
    """The map for `x`, from files alone; `hookmap.load_map` reads a model's dataflow instead, and needs torch.

    `x`: a map file, an architecture's name (`Qwen3ForCausalLM`), the hub id of a model that has a shipped map, or a
    model folder, whose `config.json` names the architecture: that is the shipped map at the config's size, a guess, and
    where heads lie is left out of it. A map file that `hookmap discover MODEL -o FILE` wrote is exact.
    Raises MapNotFoundError where there is none, MapError where the file is broken.
    """
    path, name = Path(x), str(x)
    if path.is_file():
        return parsing.load(path)
    if path.is_dir():
        if found := likely_map(name):
            return found
        raise MapNotFoundError(
            f"{path} is no model folder whose config.json names an architecture with a shipped map that serves every "
            f"size. Make its map, with torch: hookmap discover {path} -o FILE"
        )
    if name in shipped_architectures():
        return parsing.load(mappings_folder() / f"{name}.json")
    if name in shipped_models():
        return parsing.load(mappings_folder() / "models" / f"{name.replace('/', '--', 1)}.json")
    raise MapNotFoundError(
        f"no map for {name}: it is no file, no folder, and nothing that has a shipped map. {shipped_near(name)} "
        f"Make one, with torch: hookmap discover {name} -o FILE"
    )


def weights(m: ArchitectureMap, point: str, layer: int | None = None) -> tuple[WeightPath, ...]:
    """The parameters that write to a point or read from it, as far as the map itself names their modules.

    `weights(m, "attn_out", 8)` is what heads are written with, `weights(m, "mlp_out", 8)` the MLP's last product,
    `weights(m, "q", 8)` W_Q, `weights(m, "embed")` the embedding. `HookedModel.weights` gives tensors, and knows more
    (experts, norms, readers of `attn_in`): it asks the dataflow.
    Raises SelectionError where the point is not there, or the map names no module of weights beside it.
    """
    named = parse_point(point)
    if isinstance(named, str):
        raise SelectionError(named)
    layer = named.layer if layer is None else layer
    selectors = m.selectors([named.point], "all" if layer is None else [layer])
    if len({selector.layer for selector in selectors}) > 1:
        raise SelectionError(f"{point} is a tensor of each layer: say which, as in weights(m, {point!r}, 8).")
    found = dict.fromkeys(_of_model(m, named.point) if selectors[0].layer is None else _of_layer(m, selectors[0]))
    if not found:
        raise SelectionError(
            f"the map names no weights beside {point}. With torch: hookmap.open(MODEL).weights({point!r}, layer)"
        )
    return tuple(found)


def _of_model(m: ArchitectureMap, point: str) -> Iterator[WeightPath]:
    template = m.model_points[point]
    if axes := _axes(template):
        yield WeightPath(f"{template.terms[-1].module}.weight", _side(template.terms[-1].side), axes, None)
    elif point in ("logits", "logits_raw") and m.lm_head_path:
        yield WeightPath(f"{m.lm_head_path}.weight", "writes", (), None)


def _of_layer(m: ArchitectureMap, selector: Selector) -> Iterator[WeightPath]:
    """Of the products that the point's own term is at, and of those that the block's relations state."""
    assert selector.layer is not None
    kind = m.kind_of(selector.layer)
    products = {
        m.at_layer(template.terms[-1].module, selector.layer): axes
        for template in kind.points.values()
        if (axes := _axes(template))
    }
    heads = selector.terms[-1].heads
    for term in selector.terms:
        if term.through is not None:
            axes = ("out", "in") if term.through.endswith(".T") else ("in", "out")
            yield WeightPath(str(term.parameter), "writes", axes, heads)
        elif not term.is_inside and term.module in products:
            yield WeightPath(f"{term.module}.weight", _side(term.side), products[term.module], heads)
    for relation in _applied(m, kind):
        template = relation.function if "{i" in relation.function else f"{m.layers_path}.{relation.function}"
        path = m.at_layer(template, selector.layer)
        if _is(m, selector, relation.total):
            yield WeightPath(f"{path}.weight", "writes", products.get(path, ()), None)
        if _is(m, selector, relation.terms[0].name):
            yield WeightPath(f"{path}.weight", "reads", products.get(path, ()), heads)


def _axes(template: PointTemplate) -> tuple[str, ...]:
    """Of the weight of the product that a point is at; empty where it is at no product's boundary."""
    term = template.terms[-1]
    inside = term.operation is not None or term.experts is not None
    return () if inside or len(template.terms) > 1 else _AXES.get(template.evidence.rpartition(" ")[2], ())


def _applied(m: ArchitectureMap, kind: BlockKind) -> list[Relation]:
    """`mlp_out_raw = mlp.down_proj(mlp_post)`. A map at another size has lost those of heads; the shipped has them."""
    texts = dict.fromkeys(kind.relations)
    if m.scope == "architecture" and m.architecture in shipped_architectures():
        shipped = {each.name: each for each in load_map(m.architecture).kinds}
        texts |= dict.fromkeys(shipped[kind.name].relations if kind.name in shipped else ())
    parsed = [Relation.parse(text) for text in texts]
    return [each for each in parsed if each is not None and each.form == "applied" and each.function != "topk"]


def _is(m: ArchitectureMap, selector: Selector, name: str) -> bool:
    """Whether the point of this name is the selector's, or its raw form, or the same tensor by another name."""
    if name in (selector.point, raw(PointName.of(selector.point).as_mixer())):
        return True
    if m.unavailable(name, selector.layer) is not None:
        return False
    return any(each.terms == selector.terms for each in m.selectors([name], [selector.layer]))


def _side(side: Literal["input", "output"]) -> Literal["writes", "reads"]:
    return "writes" if side == "output" else "reads"
