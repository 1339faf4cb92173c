"""Map + points + layers -> forward-ordered selectors. Pure: no model, no torch.

A selector says at which module's boundary a point's tensor is; a point that no single boundary exposes has several
terms, and is the sum over them of `scale * tensor`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from typing import Any, Literal

from hookmap.activations import Key, key_of
from hookmap.errors import CaptureError, SelectionError
from hookmap.maps.calls import WantedRuns, wanted_runs
from hookmap.maps.contents import MapContents
from hookmap.maps.describe import layers_text
from hookmap.maps.grammar import operation_text
from hookmap.maps.places import template_of
from hookmap.maps.points import POINTS, PointName, is_place, parse_point
from hookmap.maps.requests import Request, layers_in, requests
from hookmap.maps.templates import Heads, PointTemplate, TermTemplate, boundary


@dataclass(frozen=True)
class Term:
    """One tensor at the boundary of a module, or of an operation in its forward, times a constant and a parameter.

    The term's share of the point is `times(tensor, parameter)`, of the arranged tensor.
    """

    module: str
    """path from the model's root, "" for the root"""
    side: Literal["input", "output"]
    index: int | str | None
    """place in the positional (int) or keyword (str) arguments, or in the output; None: the output is the tensor; of an
    operation, among its tensors"""
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
    weight: str | None = None
    """path of the parameter that the model multiplies it by: a number, or one for each feature"""
    calls: int | None = None
    """how often the module is called in one forward pass, of a layer that runs several times, where the map says it"""
    operation: str | None = None
    """the operator whose input or output it is, in the module's own forward"""
    occurrence: int | None = None
    """which operation of that name in it, 0-based; None: the only one"""
    visits: int | None = None
    """how many operations of that name the forward has, where that is known"""

    @cached_property
    def bare(self) -> bool:
        """Whether the tensor is the point's share of the model's own, [batch, pos, ...], as it lies there."""
        arranged = self.flat or self.axes is not None or self.rows != "all"
        return not arranged and self.scale == 1.0 and self.weight is None

    @property
    def at(self) -> str:
        """The module's path, and the operation in it: `model.layers.3.self_attn:bmm#1`."""
        return self.module + operation_text(self.operation, self.occurrence)

    @property
    def is_view(self) -> bool:
        """Whether `resolve` gives a view that the model has not: heads of a tensor. No gradient flows through it."""
        return self.heads is not None

    def resolve(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
        """The unscaled tensor, given what a plain PyTorch forward hook of `module` sees.

        Of an operation, `args` are its tensors, and `output` what it gave. Where `is_view`, `retain_grad` belongs on
        `whole`. Raises CaptureError where the arguments or the output have no such place.
        """
        return self.view(self.whole(args, kwargs, output))

    def view(self, whole: Any) -> Any:
        """What `resolve` gives of the whole tensor; of the whole tensor's gradient, the gradient of that."""
        return whole if self.heads is None else self._split(whole, self.heads)

    def whole(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
        """The tensor as the model has it, which gradients flow through; `resolve` may give a view of part of it."""
        where: Any
        if self.side == "input":
            where = kwargs if isinstance(self.index, str) else args
            place = 0 if self.index is None else self.index
        elif self.index is None:
            return self._tensor(output)
        else:
            where, place = output, self.index
        if type(where) is not tuple and hasattr(where, "shape"):
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
            tensor, axes = self._unmerged(tensor, self.axes, batch)
            tensor = tensor.movedim((axes.index("batch"), axes.index("pos")), (0, 1))
        if self.rows != "all" and tensor.shape[1] > width:
            tensor = tensor[:, :width] if self.rows == "first" else tensor[:, -width:]
        return tensor

    def _unmerged(self, tensor: Any, axes: tuple[str, ...], batch: int) -> tuple[Any, list[str]]:
        """The tensor with each axis `batch*heads` as two, and their names."""
        found: list[str] = []
        for name in axes:
            parts = name.split("*")
            if len(parts) > 1:
                if tensor.shape[len(found)] % batch:
                    raise self._wrong(f"{tensor.shape[len(found)]} {name} of {batch} rows")
                tensor = tensor.unflatten(len(found), (batch, -1))
            found += parts
        return tensor, found

    def times(self, tensor: Any, parameter: Any = None) -> Any:
        """`scale * tensor`, and times the parameter of `weight`, whose value in the model is `parameter`."""
        if self.weight is not None:
            if parameter is None:
                raise CaptureError(f"{self}: the value of {self.weight} is needed, a parameter of the model.")
            tensor = tensor * parameter.detach().to(tensor.device)
        return tensor if self.scale == 1.0 else tensor * self.scale

    def _tensor(self, value: Any) -> Any:
        if not hasattr(value, "shape"):
            raise self._wrong(type(value).__name__)
        return value

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
        module = (self.module or "model") + operation_text(self.operation, self.occurrence)
        return boundary(module, self.side, self.index, self.scale, weight=self.weight)


@dataclass(frozen=True)
class Selector:
    """Where one point of one layer is. `module`, `side`, `index`, `scale` are those of its last term."""

    point: str
    layer: int | None
    """None for points of the whole model: embed, final_norm, logits"""
    terms: tuple[Term, ...]
    forward_index: int
    """a selector with a smaller number is complete earlier in the forward pass"""
    call: int | None = None
    """which run of the layer in one forward pass, 0-based; None where it runs once"""
    write: Term | None = None
    """where it is written, if that is not where it is read"""
    width: int | None = None
    """numbers in one row, or for each key of it, where that was measured"""

    @property
    def has_keys(self) -> bool:
        """Whether a row has an axis of keys, which grows while the model generates."""
        named = "key" in PointName.of(self.point).definition.axes
        return named or any("key" in (term.axes or ()) for term in self.terms)

    @property
    def key(self) -> Key:
        """(point, layer), or (point, layer, call) of a layer that runs several times."""
        return key_of(self.point, self.layer, self.call)

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

    @property
    def is_view(self) -> bool:
        """Whether `resolve` gives a view that the model has not; see `Term.is_view`."""
        return any(term.is_view for term in self.terms)

    def resolve(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
        """The unscaled tensor; see `Term.resolve`. A point with several terms has no single module: use `.terms`."""
        return self._term.resolve(args, kwargs, output)

    def whole(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
        """The tensor that gradients flow through; see `Term.whole`."""
        return self._term.whole(args, kwargs, output)

    def view(self, whole: Any) -> Any:
        """What `resolve` gives of the whole tensor, or of its gradient; see `Term.view`."""
        return self._term.view(whole)

    @property
    def _term(self) -> Term:
        """The only one. Raises CaptureError where there are several."""
        if len(self.terms) > 1:
            raise CaptureError(f"{self} is a sum of {len(self.terms)} tensors: resolve each of .terms and add them.")
        return self.terms[0]

    def __str__(self) -> str:
        where = " + ".join(map(str, self.terms))
        name = self.point + ("" if self.layer is None else f"[{', '.join(map(str, self.key[1:]))}]")
        return f"{name} = {where}"


def select(
    architecture_map: MapContents,
    points: str | Iterable[str] | Mapping[str, Any] = "all",
    layers: str | int | Iterable[int] = "all",
    calls: str | int | Iterable[int] = "all",
) -> tuple[Selector, ...]:
    """Selectors of `points` on `layers`, each once, in the order of the forward pass.

    `points`: names (ours, TransformerLens's or nnterp's), or "all": every point that exists, on the layers that have
    it. `layers`: 0-based, negative from the end, or "all": every layer; a named point must exist on each of them,
    save that a model of several kinds of block skips, under "all", the layers without it.
    A mapping gives each point layers of its own, `{"resid_post": [3, 8], "z": "all"}`; `layers` is then left out.
    `calls`: which runs of layers that run several times in one forward pass: "all", "last", or numbers, 0-based,
    negative from the end. A layer that runs once has call 0. A named layer must run that often; "all" layers leaves out
    those that do not, as long as one does.
    Raises SelectionError with every problem at once.
    """
    m = architecture_map
    wanted = wanted_runs(m, calls)
    answers = [each for request in requests(m, points, layers) for each in _resolve(m, request, wanted)]
    problems = list(dict.fromkeys(each for each in (*wanted.problems, *answers) if isinstance(each, str)))
    if problems:
        raise SelectionError(_report(m, problems))
    found = {each.key: each for each in answers if isinstance(each, Selector)}
    vocabulary = {name: place for place, name in enumerate(POINTS)}
    last = len(vocabulary)
    return tuple(
        sorted(
            found.values(), key=lambda s: (s.forward_index, vocabulary.get(PointName.of(s.point).base, last), s.point)
        )
    )


def _resolve(m: MapContents, request: Request | str, calls: WantedRuns) -> Iterator[Selector | str]:
    if isinstance(request, str):
        yield request
        return
    point = request.point
    reasons = {layer: unavailable(m, point, layer) for layer in request.layers}
    present = [layer for layer, reason in reasons.items() if reason is None]
    if len(present) == len(reasons) or request.may_lack == "all" or (present and request.may_lack == "some"):
        yield from _of_runs(m, request, present, calls)
    else:
        yield from _missing(m, point, reasons)


def _of_runs(m: MapContents, request: Request, layers: list[int | None], calls: WantedRuns) -> Iterator[Selector | str]:
    """The selectors of one point on layers that have it, at the wanted runs."""
    lacking: dict[tuple[int, int], list[int]] = {}
    found = []
    for layer in layers:
        if layer is None:
            found.append(of_template(m, request.point, None, _template(m.model_points, request.point)))
            continue
        kind = m.kind_of(layer)
        runs, without = calls.of(kind.calls)
        template = _template(kind.points, request.point)
        found += [of_template(m, request.point, layer, template, run) for run in runs]
        for number in without:
            lacking.setdefault((number, kind.calls), []).append(layer)
    if not calls.problems and (request.named or (not found and request.may_lack != "all")):
        for (number, often), those in lacking.items():
            verb, times = "runs" if len(those) == 1 else "run", "once" if often == 1 else f"{often} times"
            yield f"{layers_text(those)} of {m.architecture} {verb} {times} in one forward pass: no call {number}"
    yield from found


def layers_of(architecture_map: MapContents, layers: Any) -> tuple[int, ...]:
    """The layers from 0 up that are meant, as `select` takes them. Raises SelectionError with every problem at once."""
    chosen, problems = layers_in(architecture_map, layers)
    if problems:
        raise SelectionError(_report(architecture_map, problems))
    return chosen


def unavailable(architecture_map: MapContents, point: str, layer: int | None = None) -> str | None:
    """Why `point` does not exist on `layer` (or on no layer at all, where `layer` is None); None where it does."""
    m = architecture_map
    parsed = parse_point(point)
    if isinstance(parsed, str):
        return parsed
    name, layer = parsed.point, parsed.layer if layer is None else layer
    if not PointName.of(name).definition.per_layer:
        return _why_not(name, m.model_points, m.model_unavailable)
    if layer is None:
        reasons = [_why_not(name, kind.points, kind.unavailable) for kind in m.kinds]
        return None if None in reasons else reasons[0]
    chosen, problems = layers_in(m, [layer])
    if problems:
        return problems[0]
    kind = m.kind_of(chosen[0])
    return _why_not(name, kind.points, kind.unavailable)


def _template(points: Mapping[str, PointTemplate], name: str) -> PointTemplate:
    """Where the point is: as the map says, or as its name itself says."""
    return points[name] if name in points else template_of(name)


def _why_not(name: str, points: Mapping[str, PointTemplate], unavailable: Mapping[str, str]) -> str | None:
    if is_place(name):
        return None
    return None if name in points else unavailable.get(name, PointName.of(name).definition.absent)


def _missing(m: MapContents, point: str, reasons: Mapping[int | None, str | None]) -> Iterator[str]:
    """One line for each reason, with the layers that have it."""
    layers_of: dict[str, list[int]] = {}
    for layer, reason in reasons.items():
        if layer is None:
            yield f"{m.architecture} has no {point}: {reason}"
        elif reason is not None:
            layers_of.setdefault(reason, []).append(layer)
    for reason, layers in layers_of.items():
        verb = "has" if len(layers) == 1 else "have"
        stream = [name for name in m.kind_of(layers[0]).points if name.startswith("resid_")]
        use = f" Use {' or '.join(stream)}." if stream else ""
        yield f"{layers_text(layers)} of {m.architecture} {verb} no {point}: {reason}.{use}"


def _report(m: MapContents, problems: list[str]) -> str:
    see = f"See what there is: hookmap show {m.model_id or m.architecture}"
    if len(problems) == 1:
        return f"{problems[0]}\n{see}"
    return f"{len(problems)} problems with this selection:\n" + "\n".join(f"  - {p}" for p in problems) + f"\n{see}"


def of_template(m: MapContents, point: str, layer: int | None, template: PointTemplate, run: int = 0) -> Selector:
    """The selector of one template on one layer, in one of its runs; None for points of the whole model."""
    runs = 1 if layer is None else m.kind_of(layer).calls

    def path(text: str) -> str:
        return text if layer is None else m.at_layer(text, layer)

    def term(t: TermTemplate) -> Term:
        return Term(
            path(t.module), t.side, t.index, t.scale, t.flat, t.axes, t.rows, t.call_in(run, runs), t.heads,
            weight=None if t.weight is None else path(t.weight),
            calls=runs if runs > 1 and t.call is None else None,
            operation=t.operation, occurrence=t.occurrence, visits=t.visits,
        )  # fmt: skip

    terms = tuple(map(term, template.terms))
    write = None if template.write is None else term(template.write)
    index = _forward_index(m, point, layer, template.order, run)
    return Selector(point, layer, terms, index, run if runs > 1 else None, write)


def _forward_index(m: MapContents, point: str, layer: int | None, order: int, run: int = 0) -> int:
    """Block points come between the embedding and the final norm, each run of a block in its own range of numbers."""
    span = 1 + max(t.order for kind in m.kinds for t in (*kind.points.values(), *m.model_points.values()))
    if is_place(point):  # behind the points of its block
        order = span - 1
        if layer is None and (layer := _layer_of(m, template_of(point).terms[0].module)) is None:
            return (len(m.order) + 1) * span + order
    if layer is not None:
        return (m.order.index((layer, run)) + 1) * span + order
    return order if point == "embed" else (len(m.order) + 1) * span + order


def _layer_of(m: MapContents, path: str) -> int | None:
    """The layer whose block holds the module at this path; None where none does."""
    blocks = (m.at_layer(m.layers_path, layer) for layer in range(m.num_layers))
    return next((layer for layer, block in enumerate(blocks) if f"{path}.".startswith(f"{block}.")), None)
