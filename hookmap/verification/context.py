"""What a check is given: a map, its model, and what one forward pass of the model showed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hookmap.errors import CaptureError, HookmapError, ModelError
from hookmap.loading import modules, other_inputs, towers
from hookmap.loading.encoder_decoder import decoder_embedding, is_encoder_decoder
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName
from hookmap.maps.selectors import Selector, select
from hookmap.maps.templates import BlockKind, BranchInfo
from hookmap.maps.terms import Term
from hookmap.verification.check import Check, Key, relative_error
from hookmap.verification.runner import BATCH, POSITIONS, Given, Hook, at, forward, observe_runs

Crossing = tuple[str, Literal["input", "output"], int]
"""a module, the side on which it was passed, and in which call of the module"""


@dataclass(frozen=True)
class Context:
    """A map, its model, and the points of one forward pass. Every check is a function of this.

    Where layers run several times, it is of their first run, and `in_run` gives the same of another one.
    """

    map: ArchitectureMap
    model: nn.Module
    given: Given
    values: Mapping[Key, Tensor]
    """the points that the pass reached, each [batch, pos, ...]"""
    tolerance: float = 1e-4
    selectors: tuple[Selector, ...] = ()
    """all points of the map on all layers, in the order that the map promises"""
    output: Any = None
    crossings: tuple[Crossing, ...] = ()
    """the boundaries of the modules that the map names, in the order in which they were crossed"""
    layers_run: tuple[int, ...] = ()
    """the layers in the order in which they ran, one entry for each time"""
    number: int = 0
    """which run of each layer it is of"""
    every: Mapping[Selector, Tensor] = field(default_factory=dict)
    """the points of all runs of all layers"""

    def in_run(self, number: int) -> Context:
        """The same of another run, with the layers that run so often."""
        kinds = tuple(kind for kind in self.map.kinds if kind.calls > number)
        layers = {layer for kind in kinds for layer in kind.layers}
        return replace(
            self,
            map=self.map.model_copy(update={"kinds": kinds}),
            values=_of_run(self.every, number, layers),
            selectors=tuple(each for each in self.selectors if each.layer in layers),
            number=number,
        )

    @cached_property
    def states(self) -> Mapping[tuple[str, int, int], Tensor]:
        """(point, layer, run) -> the tensor, of all points of blocks."""
        return {(s.point, s.layer, s.call or 0): tensor for s, tensor in self.every.items() if s.layer is not None}

    @cached_property
    def visits(self) -> list[tuple[int, int]]:
        """(layer, run) in the order in which they ran."""
        counts: dict[int, itertools.count[int]] = {}
        return [(layer, next(counts.setdefault(layer, itertools.count()))) for layer in self.layers_run]

    @cached_property
    def selector(self) -> dict[Key, Selector]:
        return {(each.point, each.layer): each for each in self.selectors if (each.call or 0) == self.number}

    def layers_with(self, point: str) -> list[int]:
        """The layers on which the pass reached this point, in order."""
        return sorted(layer for name, layer in self.values if name == point and layer is not None)

    def pattern(self, layer: int) -> Tensor:
        """The attention weights, [batch, heads, query, key]: a capture has the queries first."""
        return self.values["pattern", layer].movedim(2, 1)

    def limit(self, *keys: Key) -> float:
        """The tolerance, or what the dtypes of these points round by, where a model casts by itself to a coarse one."""
        dtypes = [self.values[key].dtype for key in keys if key in self.values]
        return max(self.tolerance, *(4 * torch.finfo(each).eps for each in dtypes if each.is_floating_point), 0.0)

    def equal(self, name: str, layers: tuple[int, ...], detail: str, found: Tensor, expected: Tensor) -> Check:
        """The check that one tensor is another."""
        error = relative_error(found, expected)
        return Check(name, layers, error <= self.tolerance, detail, error)


def run_once(found: ArchitectureMap, model: nn.Module, seed: int = 0) -> Context:
    """Run the model once on random tokens, or its part on a picture of noise, and read every point on every layer.

    Raises CaptureError where the map names a tensor that is not there.
    """
    selectors = select(found, found.points)
    if found.part:
        return _observed(found, model, _picture(found, model), selectors)
    ids = _random_ids(found, model, seed)
    given = Given(BATCH, POSITIONS, ids)

    def run(_: object) -> Context:
        context = _observed(found, model, given, selectors)
        if not _is_of_the_tokens(context):  # it took the ids for something else (Dia: rows for the codes of each)
            raise _OfOtherPositions(context)
        return context

    try:
        return other_inputs.ran(model, {"input_ids": ids}, run)
    except _OfOtherPositions as error:
        return error.context
    except RuntimeError:  # a model of audio reads several rows of ids for one sequence
        rows = modules.rows_per_sequence(getattr(model, "config", None))
        if rows == 1:
            raise
        return _observed(found, model, Given(BATCH, POSITIONS, ids.repeat_interleave(rows, 0)), selectors)


def _picture(found: ArchitectureMap, model: nn.Module) -> Given:
    """One picture of noise with as many patches as the first stream has; two where each keeps a row of its own."""
    path, tower = towers.tower_of(model)
    entry = min(select(found, found.points), key=lambda each: each.point != "resid_pre")
    first: Exception | None = None
    for picture in towers.given(tower):
        name, pixels = next(iter(picture.items()))
        try:
            one = _stream(model, Given(1, 0, picture=picture, part=path), entry.terms[0])
        except HookmapError:
            raise
        except Exception as error:  # a model's own code raises what it likes
            first = first or error
            continue
        two = {**picture, name: torch.cat([pixels, -pixels.flip(-1)])}
        if pixels.ndim == 4 and len(picture) == 1 and one.shape[0] == 1:
            both = _stream(model, Given(2, 0, picture=two, part=path), entry.terms[0])
            if both.shape[:2] == (2, one.shape[1]):
                return Given(2, one.shape[1], picture=two, part=path)
        return Given(1, one.shape[1], picture=picture, part=path)
    raise first or ModelError(f"nothing says which pictures {type(tower).__name__} reads.")


def _stream(model: nn.Module, given: Given, term: Term) -> Tensor:
    """The term's tensor, [batch, patches, ...]."""
    found: list[Tensor] = []
    forward(model, given, [at(term, found.append)])
    if not found:
        raise CaptureError(f"{term} was not reached by a picture.")
    width = found[0].shape[0] // given.batch if term.flat else 0
    tensor: Tensor = term.arrange(found[0], given.batch, width)
    return tensor


class _OfOtherPositions(Exception):
    """The model ran, and no state of its stream is of the tokens that it was given."""

    def __init__(self, context: Context) -> None:
        super().__init__("no state of the stream is of the tokens")
        self.context = context


def _is_of_the_tokens(context: Context) -> bool:
    states = [tensor for (point, _), tensor in context.values.items() if point in ("resid_pre", "resid_post")]
    return not states or any(tensor.shape[:2] == (BATCH, POSITIONS) for tensor in states)


def missing_modules(found: ArchitectureMap, model: nn.Module) -> list[str]:
    """Paths that the map names and the model does not have."""
    named = {term.module for selector in select(found, found.points, calls=0) for term in selector.terms}
    return sorted(path for path in named if module_at(model, path) is None)


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at this path; None where there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def input_embedding(found: ArchitectureMap, model: nn.Module) -> nn.Module | None:
    """The embedding that the model itself names; where it names none, the one that the map names."""
    if is_encoder_decoder(model):
        own = decoder_embedding(model)
        return module_at(model, found.embedding_path) if own is None and found.embedding_path else own
    if hasattr(model, "get_input_embeddings"):
        return model.get_input_embeddings()  # type: ignore[no-any-return,operator]
    return None if found.embedding_path is None else module_at(model, found.embedding_path)


def branch_modules(found: ArchitectureMap, kind: BlockKind, role: str, layer: int) -> list[str]:
    """Paths of the modules of a layer's branch; `role`: "mixer", "cross_attn" or "mlp"."""
    branch: BranchInfo | None = getattr(kind, role)
    return [found.at_layer(path, layer) for path in (branch.modules if branch else ())]


def modules_of(run: Context, kind: BlockKind, output: str, layer: int) -> list[str]:
    """Paths of the modules of the branch with this output; of a branch beside its role's main ones, what gives it."""
    modules = branch_modules(run.map, kind, PointName.of(PointName.of(output).as_mixer()).branch, layer)
    made = [term.module for term in run.selector[output, layer].terms if term.side == "output"]
    beside = "." in output and not any(f"{path}.".startswith(f"{root}.") for path in made for root in modules)
    return made if beside else modules


def first_and_last(found: ArchitectureMap) -> Iterator[tuple[BlockKind, int]]:
    """Each kind of block with its first and its last layer."""
    for kind in found.kinds:
        for layer in dict.fromkeys((kind.layers[0], kind.layers[-1])):
            yield kind, layer


def _random_ids(found: ArchitectureMap, model: nn.Module, seed: int) -> Tensor:
    embedding = input_embedding(found, model)
    vocabulary = found.d_vocab or 2 if embedding is None else len(next(embedding.parameters()))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (BATCH, POSITIONS), generator=generator)
    return ids.to(modules.device_of(model))


def _observed(found: ArchitectureMap, model: nn.Module, given: Given, selectors: tuple[Selector, ...]) -> Context:
    crossings: list[Crossing] = []
    layers_run: list[int] = []
    hooks = [*_layer_hooks(found, model, layers_run), *_crossing_hooks(selectors, crossings)]
    every, output = observe_runs(model, given, selectors, hooks, output_hidden_states=True)
    values = _of_run(every, 0, {*range(found.num_layers), None})
    computed = {value.dtype for value in values.values() if value.is_floating_point()}
    # In float64 what is computed is exact, however narrow the weights are.
    precise = computed == {torch.float64} or next(model.parameters()).dtype in (torch.float32, torch.float64)
    tolerance = 1e-4 if precise else 4e-2
    return Context(
        found, model, given, values, tolerance, selectors, output, tuple(crossings), tuple(layers_run), every=every
    )


def _of_run(every: Mapping[Selector, Tensor], number: int, layers: Collection[int | None]) -> dict[Key, Tensor]:
    own = {s: tensor for s, tensor in every.items() if (s.call or 0) == number and s.layer in layers}
    return {(s.point, s.layer): tensor for s, tensor in own.items()}


def _crossing_hooks(selectors: tuple[Selector, ...], crossings: list[Crossing]) -> Iterator[Hook]:
    def hook(path: str, side: Literal["input", "output"]) -> Hook:
        calls = itertools.count()
        return Hook(path, side, lambda *_: crossings.append((path, side, next(calls))))

    for path in {term.module for selector in selectors for term in selector.terms}:
        yield hook(path, "input")
        yield hook(path, "output")


def _layer_hooks(found: ArchitectureMap, model: nn.Module, layers_run: list[int]) -> Iterator[Hook]:
    """One hook for each block's module, which may stand in the list several times: its runs take turns."""

    def hook(path: str, numbers: list[int]) -> Hook:
        turns = itertools.cycle(numbers)
        return Hook(path, "input", lambda *_: layers_run.append(next(turns)))

    numbers_of: dict[nn.Module, list[int]] = {}
    for number in range(found.num_layers):
        if (block := module_at(model, _block(found, number))) is not None:
            numbers_of.setdefault(block, []).append(number)
    for numbers in numbers_of.values():
        yield hook(_block(found, numbers[0]), numbers)


def _block(found: ArchitectureMap, layer: int) -> str:
    return found.at_layer(found.layers_path, layer)


def made_into(run: Context, point: str, layer: int | None, below: str = "", width: int | None = None) -> Tensor | None:
    """What one module below a path turned into a point, [..., width]; None where no module did.

    `width`: of what the module read; of the point itself where that is None.
    """
    own, given, found = run.values[point, layer], dict[str, Tensor](), list[Tensor]()
    shape = (*own.shape[:-1], width or own.shape[-1])

    def entered(path: str, args: Any, kwargs: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].numel() == prod(shape) and args[0].shape[-1] == shape[-1]:
            given[path] = args[0].detach().reshape(shape).clone()

    def left(path: str, args: Any, kwargs: Any, output: Any) -> None:
        if path not in given or not isinstance(output, Tensor) or output.numel() != own.numel():
            return
        if torch.equal(output.reshape(own.shape), own):
            found.append(given[path])

    every = run.model.named_modules()
    paths = [path for path, module in every if path.startswith(below) and not any(module.children())]
    sides: tuple[tuple[Literal["input", "output"], Callable[..., None]], ...] = (("input", entered), ("output", left))
    forward(run.model, run.given, [Hook(path, side, partial(act, path)) for path in paths for side, act in sides])
    return found[0] if found else None
