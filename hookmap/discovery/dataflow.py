"""Records one forward pass as a graph of tensors, operations and module calls. Knows nothing of language models.

A `TorchDispatchMode` sees every operation below autograd; hooks on every module record when it ran and which tensors
crossed its boundary. On the meta device no weight exists and no arithmetic is done, so a model of any size is read in
seconds.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from hookmap.loading.modules import no_autocast_on_meta

Place = int | str | None
"""Where a tensor stands in the arguments or the output of a module: position, name, or None for the whole output."""

# A larger tensor with data (a dequantised weight, say) is not kept alive: its number is forgotten when it dies.
_KEEP_ALIVE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TensorRef:
    """A tensor in an operation's recorded arguments."""

    id: int


@dataclass(frozen=True)
class TensorInfo:
    """One value that a tensor had; an in-place operation makes a new one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    producer: int | None
    """index of the operation that made it; None for weights and inputs"""


@dataclass(frozen=True)
class Operation:
    """One call of an ATen operator, with tensors replaced by `TensorRef`."""

    name: str
    """overload packet, such as `add` for aten.add.Tensor and aten.add_.Tensor alike"""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    time: int
    call: int
    """index of the innermost module call around it"""


@dataclass
class ModuleCall:
    """One call of one module: when, and which tensors crossed its boundary."""

    index: int
    path: str
    module: nn.Module
    parent: int | None
    enter: int
    exit: int = -1
    entered: dict[Place, int] = field(default_factory=dict)
    """tensors in the arguments when it began"""
    inputs: dict[Place, int] = field(default_factory=dict)
    """those of them that were not written to in place by the time it returned, as a forward hook finds them"""
    outputs: dict[Place, int] = field(default_factory=dict)


@dataclass
class Dataflow:
    """The graph of one forward pass. Times are one clock over operations, entries and exits."""

    tensors: list[TensorInfo] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)
    """the model's own inputs, such as `input_ids`"""
    positions: int | None = None
    """positions of the stream, where the inputs are no tokens and do not tell"""
    batchless: bool = False
    """the stream may be [pos, d_model], without an axis of the batch"""
    tokens: str = "input_ids"
    """the input that holds the token of each position of the stream: of an encoder-decoder, the decoder's"""
    parameters: dict[int, str] = field(default_factory=dict)
    """tensor -> path of the parameter or buffer that it is"""

    def producer(self, tensor: int) -> Operation | None:
        index = self.tensors[tensor].producer
        return None if index is None else self.operations[index]


def record(
    model: nn.Module, inputs: dict[str, Any], names: Mapping[str, str] | None = None, part: nn.Module | None = None
) -> Dataflow:
    """Run the model once, without gradients, and return its dataflow. Leaves the model as it was.

    `names`: input -> the parameter of `forward` that takes it, where not all are given under their own names. `part`:
    the module in it that runs, where not all of it does.
    """
    names = {name: name for name in inputs} if names is None else names
    modules = dict.fromkeys(model.modules())
    flow = _recorded(model, modules, inputs, names, part)
    if all(module in modules for module in model.modules()):
        return flow
    # Its first pass replaced modules, which the record cannot know, and the next ones run those.
    return _recorded(model, dict.fromkeys(model.modules()), inputs, names, part)


def _recorded(
    model: nn.Module,
    modules: Iterable[nn.Module],
    inputs: dict[str, Any],
    names: Mapping[str, str],
    part: nn.Module | None,
) -> Dataflow:
    recorder = _Recorder(model)
    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(recorder.leave, with_kwargs=True))
    try:
        with torch.no_grad(), no_autocast_on_meta(), recorder, _OneOfAList():
            for name, value in inputs.items():
                if isinstance(value, torch.Tensor):
                    recorder.flow.inputs[name] = recorder.identify(value)
            (part or model)(**{parameter: inputs[name] for name, parameter in names.items()})
    finally:
        for handle in handles:
            handle.remove()
    return recorder.flow


def leaves(value: Any) -> Iterator[tuple[Place, torch.Tensor]]:
    """The tensors of a module's arguments or output with their places; one level deep, as selectors reach."""
    if isinstance(value, torch.Tensor):
        yield None, value
    elif isinstance(value, Mapping):
        yield from ((key, item) for key, item in value.items() if isinstance(item, torch.Tensor))
    elif isinstance(value, (tuple, list)):
        yield from ((place, item) for place, item in enumerate(value) if isinstance(item, torch.Tensor))
    elif dataclasses.is_dataclass(value):
        for each in dataclasses.fields(value):
            if isinstance(item := getattr(value, each.name), torch.Tensor):
                yield each.name, item


class _OneOfAList(TorchFunctionMode):
    """Reads `x[..., [2]]` as `x[..., 2:3]`: a list becomes a tensor, whose numbers are lost on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and len(args) == 2:
            args = (args[0], _list_as_slice(args[1]))
        return func(*args, **(kwargs or {}))


def _list_as_slice(index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    lists = [part for part in parts if isinstance(part, list)]
    plain = all(part is None or part is Ellipsis or isinstance(part, (slice, list)) for part in parts)
    if len(lists) != 1 or not plain or len(lists[0]) != 1 or type(lists[0][0]) is not int:
        return index
    (number,) = lists[0]
    one = slice(number, number + 1 if number != -1 else None)
    return tuple(one if isinstance(part, list) else part for part in parts)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives every value of every tensor a number, and records the graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow = Dataflow()
        self._model = model
        self._clock = 0
        self._ids: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []
        self._finalizers: list[Any] = []
        self._by_storage: dict[int, list[torch.Tensor]] = {}
        self._written: dict[int, list[torch.Tensor]] = {}
        self._stack: list[int] = []
        self._paths: dict[int, list[str]] = {}
        # Held: a tensor that a module gives up while it runs would leave its `id` to another.
        self._named = list(itertools.chain(model.named_parameters(), model.named_buffers()))
        self._parameters = {id(tensor): path for path, tensor in self._named}
        self._turns: dict[str, itertools.count[int]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(path)

    def identify(self, tensor: torch.Tensor) -> int:
        """The number of this tensor's present value."""
        known = self._ids.get(id(tensor))
        return self._new_value(tensor, None) if known is None else known

    def _new_value(self, tensor: torch.Tensor, producer: int | None) -> int:
        number = len(self.flow.tensors)
        self.flow.tensors.append(TensorInfo(tuple(tensor.shape), tensor.dtype, producer))
        if id(tensor) not in self._ids:
            self._keep(tensor)
        if producer is None and (path := self._parameters.get(id(tensor)) or self._brought(tensor)) is not None:
            self.flow.parameters[number] = path
        self._ids[id(tensor)] = number
        return number

    def _brought(self, tensor: torch.Tensor) -> str | None:
        """The path of a parameter that came when its module was called: accelerate keeps some on a disk till then."""
        if not self._stack:
            return None
        call = self.flow.calls[self._stack[-1]]
        own = (name for name, parameter in call.module._parameters.items() if parameter is tensor)
        return next((f"{call.path}.{name}" if call.path else name for name in own), None)

    def _keep(self, tensor: torch.Tensor) -> None:
        """Keeps the tensor alive, or forgets it when it dies: Python uses the `id` of a dead object again."""
        large = tensor.device.type != "meta" and tensor.numel() * tensor.element_size() > _KEEP_ALIVE_BYTES
        if large:
            key, ids = id(tensor), self._ids
            self._finalizers.append(weakref.ref(tensor, lambda _, key=key: ids.pop(key, None)))  # type: ignore[misc]
            return
        self._alive.append(tensor)
        if (storage := _storage(tensor)) is not None:
            self._by_storage.setdefault(storage, []).append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [self.identify(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        refs = tree_map_only(torch.Tensor, lambda t: TensorRef(self.identify(t)), (args, kwargs))
        asked = func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta"
        result = _meta_scalar(args[0]) if asked else func(*args, **kwargs)
        produced = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
        self._append(func._schema.name.split("::")[-1].rstrip("_"), refs, inputs, produced)
        written = list(_written_arguments(func, args, kwargs))
        for tensor in written:
            self._renew_aliases(tensor)
        for tensor in produced if not written else ():
            self._read_again(tensor)
        return result

    def _append(self, name: str, refs: Any, inputs: list[int], produced: list[torch.Tensor]) -> None:
        index = len(self.flow.operations)
        outputs = tuple(self._new_value(tensor, index) for tensor in produced)
        call = self._stack[-1] if self._stack else -1
        self.flow.operations.append(Operation(name, refs[0], refs[1], tuple(inputs), outputs, self._tick(), call))

    def _renew_aliases(self, written: torch.Tensor) -> None:
        """Gives every other live view of this memory a new value, too; a view of other parts of it keeps its own."""
        storage = _storage(written)
        if storage is not None:
            self._written.setdefault(storage, []).append(written)
        for other in self._by_storage.get(storage, []) if storage is not None else []:
            if other is not written and not _apart(other, written):
                self._update(other, written)

    def _read_again(self, view: torch.Tensor) -> None:
        """A new view of what was written into a buffer, `buffer[:, i]`, holds what the view that was written holds."""
        storage = _storage(view)
        written = self._written.get(storage, []) if storage is not None else []
        if (same := next((each for each in written if _is_same(each, view)), None)) is not None and same is not view:
            self._update(view, same)

    def _update(self, other: torch.Tensor, source: torch.Tensor) -> None:
        old, new = self.identify(other), self.identify(source)
        refs: Any = ((TensorRef(old), TensorRef(new), _covers(other, source)), {})
        self._append("alias_update", refs, [old, new], [other])

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _path(self, module: nn.Module) -> str:
        """The path of this call; of a shared module's paths, one inside the caller and numbered, or several in turn."""
        paths = self._paths[id(module)]
        if self._stack and len(paths) > 1:
            parent = self.flow.calls[self._stack[-1]].path
            inside = [path for path in paths if not parent or path.startswith(parent + ".")]
            paths = inside or paths
            paths = [path for path in paths if path.rpartition(".")[2].isdecimal()] or paths
        turn = self._turns.setdefault(paths[0], itertools.count()) if len(paths) > 1 else itertools.count()
        return paths[next(turn) % len(paths)]

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        parent = self._stack[-1] if self._stack else None
        call = ModuleCall(len(self.flow.calls), self._path(module), module, parent, self._tick())
        call.entered = self._boundary(args) | self._boundary(kwargs)
        self.flow.calls.append(call)
        self._stack.append(call.index)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self.flow.calls[self._stack.pop()]
        call.exit = self._tick()
        now = self._boundary(args) | self._boundary(kwargs)
        call.inputs = {place: tensor for place, tensor in call.entered.items() if now.get(place) == tensor}
        call.outputs = self._boundary(output)

    def _boundary(self, value: Any) -> dict[Place, int]:
        return {place: self.identify(tensor) for place, tensor in leaves(value)}


def _storage(tensor: torch.Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have none
        return None


def _covers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two views of one memory hold the same numbers, in this or another shape."""
    return a.numel() == b.numel() and _extent(a) == _extent(b)


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and _extent(a) == _extent(b)


def _extent(view: torch.Tensor) -> tuple[int, int]:
    """The first and the last place in memory that a view reads."""
    start = int(view.storage_offset())
    return start, start + sum((int(n) - 1) * int(step) for n, step in zip(view.shape, view.stride(), strict=True))


def _apart(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two views of one memory have no place in common, such as `buffer[:, 0]` and `buffer[:, 1]`."""
    (start, end), (other_start, other_end) = _extent(a), _extent(b)
    if end < other_start or other_end < start:
        return True
    if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return False
    steps = sorted(((step, size) for size, step in zip(a.shape, a.stride(), strict=True) if size > 1), reverse=True)
    return not _meet(abs(start - other_start), steps)


def _meet(distance: int, steps: list[tuple[int, int]]) -> bool:
    """Whether some number of each step, fewer than its size, forward or back, covers the distance."""
    if not steps:
        return distance == 0
    (step, size), rest = steps[0], steps[1:]
    near = {distance // step, -(-distance // step)} if step else {0}
    return any(abs(count) < size and _meet(distance - count * step, rest) for count in near)


def _meta_scalar(tensor: torch.Tensor) -> bool | int | float:
    """What `.item()` returns where there is no data: one, with which most masks and counters do as usual."""
    if tensor.dtype is torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1


def _written_arguments(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if isinstance(value, torch.Tensor):
                yield value
