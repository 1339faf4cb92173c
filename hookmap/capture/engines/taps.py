"""Where gradients are taken: at which edge of autograd's graph that of each point arrives. Knows tensors, not models.

At an output, at an operation, and where the stream is seen in the middle of a block, it is the tensor itself: all that
reads it counts. At an input the module is passed a copy: what this module reads counts, as it does where the point is
written. The graph begins at the first tap.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hookmap.capture.engines.observation import Observer, Side
from hookmap.capture.engines.parameters import parameters_of
from hookmap.capture.interventions.writable import Mode, ModuleIO, mode_of, passed_on
from hookmap.errors import CaptureError
from hookmap.maps.selectors import Selector
from hookmap.maps.terms import Term


class _Result(NamedTuple):
    """What an operation gave. Autograd, which is above what shows operations, gives it its edge only then."""

    tensor: torch.Tensor
    version: int


class Taps:
    """The taps of one forward pass."""

    def __init__(
        self, selectors: Sequence[Selector], begin: Selector | None, gradients: Observer, logits: Observer
    ) -> None:
        """`begin`: another point before them, where the graph begins. `gradients`: takes what is found.

        `logits`: gets the logits, with their graph.
        """
        self.selectors = tuple(selectors)
        self.gradients, self.logits = gradients, logits
        self._tapped: list[tuple[int, Selector]] = [*enumerate(self.selectors)]
        if begin is not None:
            self._tapped.insert(0, (-1, begin))
        self._calls: dict[tuple[str, Side, Mode], int] = {}
        self._edges: dict[int, tuple[Term, GradientEdge | _Result]] = {}
        """of each selector, the term that was seen last, and its edge"""
        self.found: Sequence[torch.Tensor] = ()
        """of each selector, the gradient of its term's tensor, as it lies there; where the graph is kept"""

    @property
    def observers(self) -> tuple[Observer, ...]:
        """What else looks at the pass."""
        return self.gradients, self.logits

    @property
    def boundaries(self) -> tuple[tuple[str, Side], ...]:
        """The (module path, side) pairs that are tapped or read."""
        tapped = ((term.at, term.side) for _, selector in self._tapped for term in selector.terms)
        return tuple(dict.fromkeys((*tapped, *self.logits.boundaries)))

    def at(self, path: str, side: Side, mode: Mode) -> Iterator[Any]:
        """What is called at a boundary, for points that are written in this mode."""
        found = [
            (number, selector, term)
            for number, selector in self._tapped
            for term in selector.terms
            if (term.at, term.side) == (path, side) and mode_of(selector) == mode
        ]
        if found:
            yield partial(self._pass, (path, side, mode), found)
        if mode == "replace" and (path, side) in self.logits.boundaries:
            yield self.logits.watcher(path, side)

    def _pass(
        self,
        boundary: tuple[str, Side, Mode],
        found: Sequence[tuple[int, Selector, Term]],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> ModuleIO | None:
        if not self.gradients.looks:
            return None
        call = self._calls[boundary] = self._calls.get(boundary, -1) + 1
        begun: ModuleIO = (args, kwargs, output)
        given = begun
        for number, selector, term in found:
            if term.call in (None, call):
                given = self._tap(number, selector, term, given)
        return None if given is begun else given

    def _tap(self, number: int, selector: Selector, term: Term, given: ModuleIO) -> ModuleIO:
        tensor = term.whole(*given)
        if not tensor.is_floating_point():
            raise CaptureError(f"{selector}: its values are whole numbers, which have no gradient: leave it out.")
        if term.operation is not None and term.side == "output":
            self._edges[number] = (term, _Result(tensor, tensor._version))
            return given
        shared = len(selector.terms) > 1 or mode_of(selector) == "in place" or term.operation is not None
        if not tensor.requires_grad:
            if shared:
                raise CaptureError(
                    f"{selector}: autograd does not see how the model computes it: it has no gradient. The model "
                    "detaches what it is computed from."
                )
            tensor = tensor.detach().requires_grad_()
            given = passed_on(term, given, tensor.clone())
        elif term.side == "input" and not shared:
            tensor = tensor.clone()
            given = passed_on(term, given, tensor)
        # Now, because what comes later in the pass may write over the tensor.
        self._edges[number] = (term, get_gradient_edge(tensor))
        return given

    def differentiate(self, total: torch.Tensor, module: torch.nn.Module, keep: bool = False) -> None:
        """Hand the gradients of `total` to `gradients`. Raises CaptureError where a point has none.

        keep: keep autograd's graph, for what is asked of it afterwards (`LocalGraph`).
        """
        if not total.requires_grad:
            raise CaptureError(
                "the metric does not depend on these points: it is computed from something else than the logits, or "
                "detached from them."
            )
        self._check_sums(total)
        edges = [self.edge(number) for number in range(len(self.selectors))]
        found = torch.autograd.grad(total, edges, allow_unused=True, retain_graph=keep)
        if without := [str(s) for s, gradient in zip(self.selectors, found, strict=True) if gradient is None]:
            listed = "\n".join(f"  - {name}" for name in without)
            raise CaptureError(
                f"the metric does not depend on these points, as far as autograd sees:\n{listed}\n"
                "Nothing behind reads the tensor there, or the model detaches it: leave them out."
            )
        self._parameter_at = parameters_of(module)
        self.found = found if keep else ()
        with torch.no_grad():
            for number in range(len(self.selectors)):
                self.gradients.show(number, self.of_point(number, found[number]))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of the batch, and columns that the pass is fed."""
        return self.gradients.kept.batch, len(self.gradients.columns)

    def term(self, number: int) -> Term:
        """The term of a selector at whose tensor its gradient is taken."""
        return self._edges[number][0]

    def of_point(self, number: int, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of a point, [batch, pos, ...], from that of the tensor of its term."""
        term = self.term(number)
        weight = None if term.weight is None else self._parameter_at(term.weight)
        return _of_product(self.selectors[number], term, self.arranged(number, gradient), weight)

    def share(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        """What a tensor as it lies at the selector's term adds to the point, [batch, pos, ...]."""
        term = self.term(number)
        weight = None if term.weight is None else self._parameter_at(term.weight)
        found: torch.Tensor = term.times(self.arranged(number, tensor), weight)
        return found

    def arranged(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as it lies at the selector's term, as [batch, pos, ...]."""
        term = self.term(number)
        found: torch.Tensor = term.arrange(term.view(tensor), *self.shape)
        return found

    def edge(self, number: int) -> GradientEdge:
        """Raises CaptureError where the result of an operation has no edge of its own."""
        edge = self._edges[number][1]
        if isinstance(edge, GradientEdge):
            return edge
        if not edge.tensor.requires_grad or edge.tensor._version != edge.version:
            raise CaptureError(
                f"{self.selectors[number]}: the operation, or one behind it, writes over this tensor, or nothing that "
                "autograd sees is computed from it: it has no gradient of its own. Name what reads it."
            )
        return get_gradient_edge(edge.tensor)

    def _check_sums(self, total: torch.Tensor) -> None:
        """Raises CaptureError where what a sum adds last is read by something else than the sum.

        The gradient of a sum is that of the term which the model computes last: it goes into the sum and nowhere else.
        That of a difference is that of the sum which it is taken from, and which all of it goes through.
        """
        sums = [n for n, s in enumerate(self.selectors) if len(s.terms) > 1 and all(t.scale > 0 for t in s.terms)]
        readers = _readers(total) if sums else Counter[tuple[Any, int]]()
        for number in sums:
            edge = self.edge(number)
            if readers[edge.node, edge.output_nr] != 1:
                raise CaptureError(
                    f"{self.selectors[number]}: no single tensor of the model holds this sum, and the tensor that it "
                    "adds last is read elsewhere too: it has no gradient of its own. Take those of its terms."
                )


def _of_product(selector: Selector, term: Term, gradient: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """The gradient of scale * weight * tensor, from that of the tensor. Raises CaptureError where a factor is 0."""
    if term.scale == 0.0 or (weight is not None and not bool((weight != 0).all())):
        raise CaptureError(
            f"{selector}: the model multiplies the tensor by a factor that is 0 in some feature, so that no gradient "
            "of the product is seen at it. Take that of the tensor before: see `hookmap show`."
        )
    if weight is not None:
        gradient = gradient / weight.to(gradient.device)
    return gradient if term.scale == 1.0 else gradient / term.scale


def _readers(total: torch.Tensor) -> Counter[tuple[Any, int]]:
    """How many operations of the graph of `total` read each tensor, by its edge."""
    found, seen, left = Counter[tuple[Any, int]](), set[Any](), [total.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, number in node.next_functions:
            if following is not None:
                found[following, number] += 1
                left.append(following)
    return found
