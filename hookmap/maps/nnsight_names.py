"""A map -> the names under which raw nnsight code can say the points. Pure.

    model = nnsight.TransformersModel(module, tokenizer=tokenizer, rename=m.rename())
    model.model.layers[8].resid_mid.input     # in any model whose map has resid_mid at a module's input

nnsight renames modules: whether the point is the module's `.input` or its `.output`, the selector's `.side` says.
"""

from hookmap.maps.contents import MapContents
from hookmap.maps.templates import PointTemplate, is_template


def rename(architecture_map: MapContents) -> dict[str, list[str]]:
    """Module path, relative to the block (or to the root) -> the points that are exactly its input or output.

    Left out: a point that is a sum, a scaled or reordered tensor or a part of one; one of the block's own boundary
    (`resid_pre` is `layers[i].input`), or of a module in a list beside the block's; and a name that would mean another
    module or side in another kind of block.
    """
    m = architecture_map
    places: dict[str, set[tuple[str, str]]] = {}
    for kind in m.kinds:
        for point, template in kind.points.items():
            place = _whole(template) if kind.calls == 1 else None  # nnsight's name is of one call
            inner = place[0].removeprefix(m.layers_path).lstrip(".") if place else ""
            own = place and inner and not is_template(inner)
            places.setdefault(point, set()).add((inner, place[1]) if place and own else ("", ""))
    for point, template in m.model_points.items():
        place = _whole(template)
        places[point] = {place if place else ("", "")}
    names: dict[str, list[str]] = {}
    for point, found in places.items():
        ((module, _), *others) = found
        if module and not others and "." not in point:
            names.setdefault(module, []).append(point)
    return names


def _whole(template: PointTemplate) -> tuple[str, str] | None:
    """Module and side, where the point is exactly that tensor."""
    term = template.terms[0]
    usual = (
        term.scale == 1.0
        and term.weight is None
        and (term.operation, term.experts, term.through) == (None, None, None)
        and not term.flat
        and term.axes is None
        and term.heads is None
        and term.rows == "all"
    )
    if len(template.terms) > 1 or not usual or term.call is not None:
        return None
    return (term.module, term.side) if term.index in (None, 0) else None
