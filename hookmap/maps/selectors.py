"""Map + points + layers -> forward-ordered selectors. Pure: no model, no torch.

A selector says at which module's boundary a point's tensor is; a point that no single boundary exposes has several
terms, and is the sum over them of `scale * tensor`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hookmap.activations import Key, key_of
from hookmap.errors import CaptureError, SelectionError
from hookmap.maps.calls import WantedRuns, wanted_runs
from hookmap.maps.contents import MapContents
from hookmap.maps.describe import layers_text
from hookmap.maps.places import template_of
from hookmap.maps.points import POINTS, PointName, is_place, parse_point
from hookmap.maps.requests import Request, layers_in, requests
from hookmap.maps.templates import PointTemplate, TermTemplate
from hookmap.maps.terms import Term


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
    def is_logits(self) -> bool:
        """Whether it is the logits, which a model may be told to compute for some tokens only."""
        return "d_vocab" in PointName.of(self.point).definition.axes

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

    chosen: Term | None = None

    def term(t: TermTemplate) -> Term:
        return Term(
            path(t.module), t.side, t.index, t.scale, t.flat, t.axes, t.rows, t.call_in(run, runs), t.heads,
            weight=None if t.weight is None else path(t.weight),
            calls=runs if runs > 1 and t.call is None else None,
            operation=t.operation, occurrence=t.occurrence, visits=t.visits,
            experts=None if t.experts is None else path(t.experts), chosen=chosen,
            through=None if t.through is None else path(t.through),
        )  # fmt: skip

    if layer is not None and any(t.experts is not None for t in template.terms):
        indices = PointName.of(point).numbered("router_indices")
        if (choice := m.kind_of(layer).points.get(indices)) is None:
            raise SelectionError(f"{point}[{layer}]: the map has no {indices}, in whose order its rows are.")
        chosen = term(choice.terms[0])
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
