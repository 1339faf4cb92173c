"""Verification of what a branch reads: `mixer_in` and `mlp_in` are changed while the model runs.

Three questions, of the first and the last layer of each kind: does the tensor determine the branch (another run's
tensor there gives that run's output, whatever else the branch could reach stays), is it behind the norms (the branch's
own weights read it as it is), and does a change at one position move what it should (an MLP's own position, a mixer's
later ones).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hookmap.loading import modules
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName
from hookmap.maps.selectors import Selector, Term, of_template
from hookmap.maps.templates import BlockKind
from hookmap.verification.runner import CheckedRun, Error, Key, Result


def checks_reads(
    found: ArchitectureMap, model: nn.Module, ids: Tensor, values: dict[Key, Tensor], error: Error, tolerance: float
) -> Iterator[Result]:
    """Every check of `mixer_in` and `mlp_in` that this map has. `values`: points of one forward pass on `ids`."""
    checker = _Reads(found, model, ids, values, error, tolerance)
    tests = [
        (point, output, layer)
        for kind in found.kinds
        for point, output in _pairs(kind)
        for layer in dict.fromkeys((kind.layers[0], kind.layers[-1]))
        if (point, layer) in values and (output, layer) in values
    ]
    entered = checker.enters([(point, layer) for point, _, layer in tests])
    other = checker.record([(name, layer) for point, output, layer in tests for name in (point, output)])
    for test in tests:
        yield checker.behind_norms(*test, entered[test[0], test[2]])
        yield checker.determines(*test, other)
        yield from checker.weights_behind(*test, other)
        yield checker.positions(*test)


def _pairs(kind: BlockKind) -> Iterator[tuple[str, str]]:
    """What each branch reads -> its bare output, or what it adds where no boundary exposes that."""
    for point in kind.points:
        name = PointName.of(point)
        if name.base not in ("mixer_in", "mlp_in") or name.number == "0":
            continue
        raw, out = name.end("out_raw"), name.end("out")
        if raw in kind.points or out in kind.points:
            yield point, raw if raw in kind.points else out


class _Reads(CheckedRun):
    def record(self, names: list[Key]) -> dict[Key, list[Tensor]]:
        """The terms of these points in a run on other tokens, as they cross their boundaries."""
        found: dict[Key, dict[int, Tensor]] = {name: {} for name in names}
        with ExitStack() as stack:
            for name, parts in found.items():
                stack.enter_context(self._watching(self._read(*name), _keep(parts)))
            self._run(self.ids.flip((0, 1)))
        return {name: [parts[n] for n in sorted(parts)] for name, parts in found.items()}

    def determines(self, point: str, output: str, layer: int, other: dict[Key, list[Tensor]]) -> Result:
        """The tensors at `point` in a run on other tokens, written into a run on these, give the other run's output."""
        given, made = other[point, layer], self._selector(output, layer)

        def write(number: int, tensor: Tensor) -> None:
            tensor.copy_(given[number])

        error = self.error(self._changed(point, output, layer, write), self._total(made, other[output, layer]))
        beside = self.map.kind_of(layer).points[point].beside
        others = "".join(f" and {term.module or 'model'}.{term.side}[{term.index!r}]" for term in beside)
        verb = "determine" if others else "determines"
        detail = f"{point}{others} {verb} {output}: of other tokens it gives theirs"
        return "reads", (layer,), error <= self.tolerance, detail, error

    def behind_norms(self, point: str, output: str, layer: int, readers: list[str]) -> Result:
        """Weights of the branch read the tensor as it is; or else, twice as large, it gives another output.

        In front of a norm it would not; and some branches cut or mix the tensor before any weights.
        """
        if readers:
            return "reads", (layer,), True, f"{point} enters {readers[0]}", None
        error = self.error(
            self._changed(point, output, layer, lambda _, tensor: tensor.mul_(2)), self.values[output, layer]
        )
        right = error > 0.01
        said = (
            f"{output} depends on the size of {point}"
            if right
            else f"{point} is in front of a norm: twice it is no other"
        )
        return "reads", (layer,), right, said, None

    def weights_behind(self, point: str, output: str, layer: int, other: dict[Key, list[Tensor]]) -> Iterator[Result]:
        """Of the same tensors at `point`, other weights of the branch make another output: it is not made before."""
        roots = self._roots(point, layer)
        changed = {
            name: (parameter * 1.5 + 0.01).detach()
            for name, parameter in self.model.named_parameters()
            if any(name.startswith(f"{root}.") for root in roots)
            and parameter.dtype.is_floating_point
            and not parameter.is_meta
        }
        if not changed:
            return
        given, made = other[point, layer], self._selector(output, layer)

        def write(number: int, tensor: Tensor) -> None:
            tensor.copy_(given[number])

        before = self._total(made, other[output, layer])
        moved = self.error(self._changed(point, output, layer, write, changed), before) > self.tolerance
        said = f"other weights make another {output} of {point}" if moved else f"no weights stand behind {point}"
        yield "reads", (layer,), moved, said, None

    def enters(self, names: list[Key]) -> dict[Key, list[str]]:
        """Point -> the modules of its branch, with weights, that read the tensor as it is."""
        readers: dict[Key, list[str]] = {name: [] for name in names}
        with ExitStack() as stack:
            for point, layer in names:
                parts: dict[int, Tensor] = {}
                stack.enter_context(self._watching(self._selector(point, layer), _keep(parts)))
                for path in self._weighty(point, layer):
                    hook = self._matching(parts, readers[point, layer], path)
                    handle = self.model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            self._run(self.ids)
        return readers

    def _weighty(self, point: str, layer: int | None) -> list[str]:
        """Paths of the branch's modules that have a matrix of their own."""
        roots = self._roots(point, layer)
        return [
            name
            for name, module in self.model.named_modules()
            if any(f"{name}.".startswith(f"{root}.") for root in roots)
            and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        ]

    def _roots(self, point: str, layer: int | None) -> list[str]:
        kind = self.map.kind_of(layer or 0)
        branch = kind.mixer if point.startswith("mixer") else kind.mlp
        return [path.replace("{i}", str(layer)) for path in (branch.modules if branch else ())]

    def _matching(self, parts: dict[int, Tensor], found: list[str], path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            given = list(_tensors((args, kwargs)))
            if any(self._is(value, tensor) for value in parts.values() for tensor in given):
                found.append(path)

        return hook

    def positions(self, point: str, output: str, layer: int) -> Result:
        """Other numbers at one position of `point`: an MLP moves there alone, a mixer behind it too."""
        terms, place = self._selector(point, layer).terms, self.ids.shape[1] // 3

        def write(number: int, tensor: Tensor) -> None:
            if number >= len(terms):
                return
            rows = terms[number].arrange(tensor, *self.ids.shape)
            rows[:, place] = rows[:, place].flip(-1)

        found = self._changed(point, output, layer, write)
        before = self.values[output, layer]
        change = (found.float() - before.float()).abs().flatten(2).amax((0, 2))
        moved = (change > self.tolerance * before.float().square().mean().sqrt()).nonzero().flatten().tolist()
        if point.startswith("mlp"):
            right = moved in ([place], [place, place + 1])
        else:
            right = bool(moved) and moved[-1] > place
        detail = f"{point} changed at position {place} moves {output} at {moved}"
        return "positions", (layer,), right, detail, None

    # Running ----------------------------------------------------------------------------------------------------

    def _changed(
        self,
        point: str,
        output: str,
        layer: int,
        write: Callable[[int, Tensor], Any],
        weights: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """`output` where `write` changes the tensors at `point` as they pass, under other `weights` if there are."""
        made = self._selector(output, layer)
        parts: dict[int, Tensor] = {}
        with self._watching(self._read(point, layer), write), self._watching(made, _keep(parts)):
            self._run(self.ids, weights)
        return self._total(made, [parts[n] for n in sorted(parts)])

    def _total(self, made: Selector, parts: list[Tensor]) -> Tensor:
        arranged = [t.arrange(part, *self.ids.shape) * t.scale for t, part in zip(made.terms, parts, strict=True)]
        return torch.stack(arranged).sum(0)

    def _read(self, point: str, layer: int | None) -> Selector:
        """The point, and behind its own terms those that its branch reads beside it."""
        template = self.map.kind_of(layer or 0).points[point]
        both = template.model_copy(update={"terms": (*template.terms, *template.beside)})
        return of_template(self.map, point, layer, both)

    def _selector(self, point: str, layer: int | None) -> Selector:
        return of_template(self.map, point, layer, self.map.kind_of(layer or 0).points[point])

    @contextmanager
    def _watching(self, selector: Selector, use: Callable[[int, Tensor], Any]) -> Iterator[None]:
        """`use` gets each term's tensor itself, as it crosses the boundary: what it writes there is what is read."""
        handles = []
        for number, term in enumerate(selector.terms):
            module = self.model.get_submodule(term.module)
            hook = _hook(term, number, use)
            register = module.register_forward_pre_hook if term.side == "input" else module.register_forward_hook
            handles.append(register(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, ids: Tensor, weights: dict[str, Tensor] | None = None) -> None:
        given = {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids), "use_cache": False}
        kwargs = {parameter: given[name] for name, parameter in modules.accepted(self.model, given).items()}
        with torch.no_grad():
            torch.func.functional_call(self.model, weights or {}, (), kwargs, tie_weights=False)

    def _is(self, value: Tensor, tensor: Tensor) -> bool:
        """Whether a module's input holds these numbers: also as one axis of batch and positions, or those turned."""
        if tensor.numel() != value.numel() or not tensor.is_floating_point():
            return False
        turned = value.transpose(0, 1)
        return any(self.error(each.reshape(tensor.shape), tensor) <= self.tolerance for each in (value, turned))


def _hook(term: Term, number: int, use: Callable[[int, Tensor], Any]) -> Callable[..., None]:
    calls = [-1]

    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        calls[0] += 1
        if term.call in (None, calls[0]):
            use(number, term.resolve(args, kwargs, output))

    return hook


def _keep(parts: dict[int, Tensor]) -> Callable[[int, Tensor], Any]:
    def keep(number: int, tensor: Tensor) -> None:
        parts[number] = tensor.detach().clone()

    return keep


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
