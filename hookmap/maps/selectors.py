"""Map + points + layers -> forward-ordered selectors. Pure: no model, no torch.

A selector says at which module's boundary a point's tensor is; a point that no single boundary exposes has several
terms, and is the sum over them of `scale * tensor`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from numbers import Integral
from typing import Any, Literal

from hookmap.errors import CaptureError, SelectionError
from hookmap.maps.contents import MapContents
from hookmap.maps.describe import layers_text
from hookmap.maps.points import POINTS, PointName, parse_point, takes_layers
from hookmap.maps.templates import Heads, PointTemplate, boundary


@dataclass(frozen=True)
class Term:
    """One tensor at one module's boundary, times a constant."""

    module: str
    """path from the model's root, "" for the root"""
    side: Literal["input", "output"]
    index: int | str | None
    """place in the positional (int) or keyword (str) arguments, or in the output; None: the output is the tensor"""
    scale: float = 1.0
    flat: bool = False
    """the module sees [batch * pos, d], not [batch, pos, d]"""
    axes: tuple[str, ...] | None = None
    """the tensor's axes there, where they are not (batch, pos, ...)"""
    rows: Literal["all", "first", "last"] = "all"
    """which positions are the tokens', where the tensor has more than the model was fed"""
    call: int | None = None
    """which call of the module in one forward pass, 0-based, where it is called several times"""
    heads: Heads | None = None
    """which features of the tensor's last axis are the point's heads"""

    def resolve(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
        """The unscaled tensor, given what a plain PyTorch forward hook of `module` sees.

        Raises CaptureError where the arguments or the output have no such place.
        """
        where: Any
        if self.side == "input":
            where = kwargs if isinstance(self.index, str) else args
            place = 0 if self.index is None else self.index
        elif self.index is None:
            return self._tensor(output)
        else:
            where, place = output, self.index
        if hasattr(where, "shape"):
            raise self._wrong(f"a bare tensor of shape {list(where.shape)}")
        try:
            if isinstance(place, str) and is_dataclass(where) and not isinstance(where, Mapping):
                return self._tensor(getattr(where, place))
            return self._tensor(where[place])
        except (LookupError, TypeError, AttributeError) as error:
            found = str(sorted(where)) if isinstance(where, Mapping) else type(where).__name__
            if isinstance(where, Sequence):
                found += f" of {len(where)}"
            raise self._wrong(found) from error

    def arrange(self, tensor: Any, batch: int, width: int) -> Any:
        """What `resolve` gave as `[batch, width, ...]`: a view of the `width` tokens that the model was fed."""
        if self.flat and tensor.shape[0] == batch * width:
            tensor = tensor.reshape(batch, width, *tensor.shape[1:])
        if self.axes is not None:
            tensor = tensor.movedim((self.axes.index("batch"), self.axes.index("pos")), (0, 1))
        if self.rows != "all" and tensor.shape[1] > width:
            tensor = tensor[:, :width] if self.rows == "first" else tensor[:, -width:]
        return tensor

    def _tensor(self, value: Any) -> Any:
        if not hasattr(value, "shape"):
            raise self._wrong(type(value).__name__)
        return value if self.heads is None else self._split(value, self.heads)

    def _split(self, value: Any, heads: Heads) -> Any:
        """[..., width] -> [..., heads, d_head], a view."""
        pitch, rest = divmod(value.shape[-1], heads.groups)
        if rest or heads.stop > pitch:
            raise self._wrong(f"{value.shape[-1]} features, which do not hold {heads}")
        if value.ndim > 3:  # DeepSeek's keys and values have an axis of one beside the batch's
            value = value.flatten(0, -3)
        grouped = value.unflatten(-1, (heads.groups, pitch))[..., heads.start : heads.stop]
        return grouped.unflatten(-1, (-1, heads.d_head)).flatten(-3, -2)

    def _wrong(self, found: str) -> CaptureError:
        why = "The map was made for another version of this model: run `hookmap discover` again."
        if self.axes is not None and "key" in self.axes:
            why = 'Attention weights need eager attention: load the model with attn_implementation="eager".'
        return CaptureError(
            f"{self} is not there: expected a tensor at index {self.index!r} of the {self.side}, found {found}. {why}"
        )

    def __str__(self) -> str:
        return boundary(self.module or "model", self.side, self.index, self.scale)


@dataclass(frozen=True)
class Selector:
    """Where one point of one layer is. `module`, `side`, `index`, `scale` are those of its last term."""

    point: str
    layer: int | None
    """None for points of the whole model: embed, final_norm, logits"""
    terms: tuple[Term, ...]
    forward_index: int
    """a selector with a smaller number is complete earlier in the forward pass"""

    @property
    def module(self) -> str:
        return self.terms[-1].module

    @property
    def side(self) -> Literal["input", "output"]:
        return self.terms[-1].side

    @property
    def index(self) -> int | str | None:
        return self.terms[-1].index

    @property
    def scale(self) -> float:
        return self.terms[-1].scale

    def resolve(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
        """The unscaled tensor; see `Term.resolve`. A point with several terms has no single module: use `.terms`."""
        if len(self.terms) > 1:
            raise CaptureError(f"{self} is a sum of {len(self.terms)} tensors: resolve each of .terms and add them.")
        return self.terms[0].resolve(args, kwargs, output)

    def __str__(self) -> str:
        where = " + ".join(map(str, self.terms))
        return f"{self.point}{'' if self.layer is None else f'[{self.layer}]'} = {where}"


def select(
    architecture_map: MapContents,
    points: str | Iterable[str] | Mapping[str, Any] = "all",
    layers: str | int | Iterable[int] = "all",
) -> tuple[Selector, ...]:
    """Selectors of `points` on `layers`, each once, in the order in which the forward pass reaches them.

    `points`: names (ours, TransformerLens's or nnterp's), or "all": every point that exists, on the layers that have
    it. `layers`: 0-based, negative from the end, or "all": every layer; a named point must exist on each of them,
    save that a model of several kinds of block skips, under "all", the layers without it.
    A mapping gives each point layers of its own, `{"resid_post": [3, 8], "z": "all"}`; `layers` is then left out.
    Raises SelectionError with every problem at once.
    """
    problems: list[str] = []
    wanted: dict[tuple[str, int | None], PointTemplate] = {}
    asked = _asked(architecture_map, points, layers, problems)
    if not asked:
        problems.append("no points given: name at least one, or 'all'")
    for name, its_layers in asked:
        if not isinstance(name, str):
            problems.append(f"point {name!r} is not a name: give names such as 'resid_mid', or 'all'")
            continue
        parsed = parse_point(name)
        if isinstance(parsed, str):
            problems.append(parsed)
        elif PointName.of(parsed.point).definition.per_layer:
            own = _parse_layers(architecture_map, its_layers if parsed.layer is None else [parsed.layer], problems)
            if not own and not problems:
                problems.append(f"no layers given for {name}: name at least one, or 'all'")
            missing = []
            for layer in own:
                reason = unavailable(architecture_map, parsed.point, layer)
                if reason is None:
                    wanted[parsed.point, layer] = architecture_map.kind_of(layer).points[parsed.point]
                else:
                    missing.append((layer, reason))
            some = _is_all(its_layers) and parsed.layer is None and len(missing) < len(own)
            if not some and not _is_all(points):
                problems += _missing(architecture_map, parsed.point, missing)
        elif reason := unavailable(architecture_map, parsed.point):
            problems.append(f"{architecture_map.architecture} has no {parsed.point}: {reason}")
        else:
            wanted[parsed.point, None] = architecture_map.model_points[parsed.point]
    if problems:
        raise SelectionError(_report(architecture_map, list(dict.fromkeys(problems))))
    made = [of_template(architecture_map, point, layer, template) for (point, layer), template in wanted.items()]
    names_order = {name: position for position, name in enumerate(POINTS)}
    return tuple(sorted(made, key=lambda s: (s.forward_index, names_order[PointName.of(s.point).base], s.point)))


def _asked(architecture_map: MapContents, points: Any, layers: Any, problems: list[str]) -> list[tuple[Any, Any]]:
    """Each point as it was given, with its layers as they were given."""
    layers = list(layers) if isinstance(layers, Iterator) else layers  # each point reads them
    if isinstance(points, Mapping):
        found = list(points.items())
        if not _is_all(layers):
            problems.append("points name layers of their own: leave layers out")
        for name, own in found:
            if own is not None and not _is_all(own) and isinstance(name, str) and not takes_layers(name):
                problems.append(f"{name} says itself where it is, and takes no layers: give {{{name!r}: 'all'}}")
        return found
    _parse_layers(architecture_map, layers, problems)  # what is wrong with them is told beside unknown points
    if _is_all(points):
        points = [name for name in architecture_map.points if not PointName.of(name).definition.deeper]
    elif isinstance(points, str) or not isinstance(points, Iterable):
        points = [points]
    return [(name, layers) for name in points]


def unavailable(architecture_map: MapContents, point: str, layer: int | None = None) -> str | None:
    """Why `point` does not exist on `layer` (or on no layer at all, where `layer` is None); None where it does."""
    parsed = parse_point(point)
    if isinstance(parsed, str):
        return parsed
    name = parsed.point
    if not PointName.of(name).definition.per_layer:
        if name in architecture_map.model_points:
            return None
        return architecture_map.model_unavailable.get(name, "the dataflow shows no such tensor")
    layer = parsed.layer if layer is None else layer
    if layer is None:
        reasons = [unavailable(architecture_map, name, kind.layers[0]) for kind in architecture_map.kinds]
        return None if None in reasons else reasons[0]
    problems: list[str] = []
    chosen = _parse_layers(architecture_map, [layer], problems)
    if problems:
        return problems[0]
    kind = architecture_map.kind_of(chosen[0])
    if name in kind.points:
        return None
    return kind.unavailable.get(name, "the dataflow shows no such tensor")


def _parse_layers(architecture_map: MapContents, layers: Any, problems: list[str]) -> list[int]:
    count = architecture_map.num_layers
    if _is_all(layers):
        return list(range(count))
    if hasattr(layers, "tolist"):  # an array or a tensor of numbers
        layers = layers.tolist()
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        layers = [layers]
    chosen = []
    for given in layers:
        layer = int(given) if isinstance(given, Integral) else given
        if isinstance(given, bool) or not isinstance(layer, int):
            problems.append(f"layer {given!r} is not a whole number: give numbers from 0 to {count - 1}, or 'all'")
        elif not -count <= layer < count:
            problems.append(f"layer {layer} is out of range: the model has layers 0 to {count - 1} (or -{count} to -1)")
        else:
            chosen.append(layer % count)
    return list(dict.fromkeys(chosen))


def _is_all(given: Any) -> bool:
    return isinstance(given, str) and given == "all"


def _missing(architecture_map: MapContents, point: str, missing: list[tuple[int, str]]) -> list[str]:
    by_reason: dict[str, list[int]] = {}
    for layer, reason in missing:
        by_reason.setdefault(reason, []).append(layer)
    lines = []
    for reason, found in by_reason.items():
        verb = "has" if len(found) == 1 else "have"
        stream = [p for p in architecture_map.kind_of(found[0]).points if p.startswith("resid_")]
        use = f" Use {' or '.join(stream)}." if stream else ""
        lines.append(f"{layers_text(found)} of {architecture_map.architecture} {verb} no {point}: {reason}.{use}")
    return lines


def _report(architecture_map: MapContents, problems: list[str]) -> str:
    see = f"See what there is: hookmap show {architecture_map.model_id or architecture_map.architecture}"
    if len(problems) == 1:
        return f"{problems[0]}\n{see}"
    return f"{len(problems)} problems with this selection:\n" + "\n".join(f"  - {p}" for p in problems) + f"\n{see}"


def of_template(m: MapContents, point: str, layer: int | None, template: PointTemplate) -> Selector:
    """The selector of one template on one layer; None for points of the whole model."""

    def path(text: str) -> str:
        return text if layer is None else text.replace("{i}", str(layer))

    terms = tuple(
        Term(path(t.module), t.side, t.index, t.scale, t.flat, t.axes, t.rows, t.call, t.heads) for t in template.terms
    )
    return Selector(point, layer, terms, _forward_index(m, point, layer, template.order))


def _forward_index(m: MapContents, point: str, layer: int | None, order: int) -> int:
    """Block points stand between the embedding and the final norm, each block in a span of its own."""
    span = 1 + max(t.order for kind in m.kinds for t in (*kind.points.values(), *m.model_points.values()))
    if layer is not None:
        return (layer + 1) * span + order
    return order if point == "embed" else (m.num_layers + 1) * span + order
