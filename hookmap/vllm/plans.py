"""Interventions on their way to vLLM's workers: planned where the user is, applied where the model is. No pickle."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load, save

from hookmap.activations import Key, key_of
from hookmap.capture.interventions import operations
from hookmap.capture.interventions.edits import Edit, EditedTokens, RowOperation, TokenAt
from hookmap.capture.interventions.functions import Called, apply
from hookmap.capture.interventions.importable import function_of, name_of
from hookmap.capture.rows import RowSelection, ids_of
from hookmap.errors import InterventionError
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.selectors import select

_KINDS: dict[str, Any] = {
    each.__name__: each
    for each in (
        operations.AsEntered,
        operations.Averaged,
        operations.Clamped,
        operations.Entering,
        operations.Filled,
        operations.Mapped,
        operations.Noised,
        operations.Patched,
        operations.ProjectedOut,
        operations.Resampled,
        operations.Scaled,
        operations.Steered,
        operations.Swapped,
    )
}
"""what a worker computes, besides functions of one's own"""
_OF_SAMPLES = {operations.Patched: "row_of", operations.Swapped: "pair_of"}
"""operations that differ from sample to sample, and the field that says how"""
_HANDED: dict[str, Any] = {}
"""functions on their way to a worker in this process"""


@dataclass(frozen=True)
class Functions:
    """How functions of one's own reach the workers."""

    allowed: frozenset[str] = frozenset()
    """names, "package.module:function", that workers in other processes import; their operator gave them"""
    handed: bool = False
    """whether the worker is in this process, and takes any function as it is"""

    def sent(self, called: Called) -> dict[str, str]:
        """What tells a worker of the function. Raises InterventionError, which says what to do."""
        if self.handed:
            _HANDED[token := uuid4().hex] = called.given.fn
            return {"handed": token}
        name = name_of(called.given.fn, sorted(self.allowed))
        at = f"{called.selector}: vLLM's workers are other processes"
        if name is None:
            raise InterventionError(
                f"{at}, which cannot import {called.given.name}. Define it in a module that they can import and name "
                'it when the model is opened, functions=["package.module:function"]; or open it with processes=False.'
            )
        if name not in self.allowed:
            raise InterventionError(
                f"{at}, which import only the functions that are named when they are started: "
                f'hookmap.open_on_vllm(…, functions=["{name}"]), or `hookmap serve --function {name}`.'
            )
        return {"name": name}

    def taken(self, sent: Mapping[str, str]) -> Any:
        """The function, in the worker. Raises InterventionError for one that is not allowed."""
        if "handed" in sent:
            return _HANDED.pop(sent["handed"])
        if sent["name"] not in self.allowed:
            raise InterventionError(f"{sent['name']}: this worker was not told to import it.")
        return function_of(sent["name"])


@dataclass
class WorkerEdit:
    """One operation on one point of one layer, as a worker applies it."""

    key: Key
    operation: RowOperation
    tokens: EditedTokens
    heads: tuple[int, ...] | None
    means: bool
    last: bool
    pairs: dict[int, Mapping[int, int]] | None = None
    """of a patch and of a swap: sample -> position -> row of the source, or which of the two it is"""

    @property
    def whole(self) -> bool:
        """Whether the tokens that it writes must be in one step."""
        return isinstance(self.operation, operations.Swapped)

    def selects(self, sample: int, position: int, token: int, prompt_tokens: int, images: frozenset[int]) -> bool:
        """Whether this token of a request is written."""
        if self.pairs is not None:
            return self.tokens.in_steps(position, prompt_tokens) and position in self.pairs.get(sample, {})
        return self.tokens.select(position, token, prompt_tokens, images)

    def apply(self, rows: torch.Tensor, where: Sequence[TokenAt], means: torch.Tensor | None) -> torch.Tensor:
        """The new rows, [n, ...]. `where`: of each, its token."""
        if self.heads is None:
            return self.operation(rows, where, means)
        chosen, changed = list(self.heads), rows.clone()
        own = None if means is None else means[:, chosen]
        changed[:, chosen] = self.operation(rows[:, chosen], where, own).to(rows.dtype)
        return changed


@dataclass
class WorkerPlan:
    """What the requests of one run write."""

    edits: list[WorkerEdit] = field(default_factory=list)

    @property
    def reads_tokens(self) -> bool:
        """Whether an edit selects by token ids."""
        return any(edit.tokens.positions.reads_tokens or isinstance(edit.operation, Called) for edit in self.edits)


def to_wire(edits: Sequence[Edit], functions: Functions) -> tuple[str, bytes]:
    """Edits as JSON, and their tensors as safetensors. Raises InterventionError for functions that cannot be sent."""
    documents, tensors = [], dict[str, torch.Tensor]()
    entering = {id(edit.operation): number for number, edit in enumerate(edits)}
    for number, edit in enumerate(edits):
        operation, plain = edit.operation, dict[str, Any]()
        is_function = isinstance(operation, Called)
        if isinstance(operation, Called):
            plain = dict(functions.sent(operation))
        own_fields: tuple[Any, ...] = fields(operation) if is_dataclass(operation) and not is_function else ()
        for each in own_fields:
            value = getattr(operation, each.name)
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{each.name}"] = value.detach().cpu().contiguous()
            elif isinstance(value, operations.Entering):
                plain[each.name] = entering[id(value)]
            elif each.name != _OF_SAMPLES.get(type(operation)):
                plain[each.name] = value
        matching = ids_of(edit.tokens.matching)
        tokens = asdict(edit.tokens) | {"matching": matching}
        own = {name: getattr(edit, name) for name in ("heads", "means", "last")}
        key = list(edit.selector.key)
        documents.append({"key": key, "do": type(operation).__name__, "numbers": plain, "tokens": tokens, **own})
    return json.dumps(documents), save(tensors)


def from_wire(text: str, data: bytes, architecture_map: ArchitectureMap, functions: Functions) -> WorkerPlan:
    """The plan that `to_wire` wrote. Raises InterventionError for an operation that is not known, or not allowed."""
    tensors = load(data)
    plan = WorkerPlan()
    for number, document in enumerate(json.loads(text)):
        key, heads = key_of(*document["key"]), None if document["heads"] is None else tuple(document["heads"])
        kind = _KINDS.get(document["do"])
        if document["do"] == Called.__name__:
            kind, document["numbers"] = _called(functions.taken(document["numbers"]), key, heads, architecture_map), {}
        if kind is None:
            raise InterventionError(f"{document['do']}: vLLM's worker knows {', '.join(_KINDS)}.")
        given = document["numbers"] | {
            name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.partition(".")[0] == str(number)
        }
        if "entering" in given:
            given["entering"] = plan.edits[given["entering"]].operation
        pairs: dict[int, Mapping[int, int]] | None = None
        if kind in _OF_SAMPLES:
            pairs = {}
            given[_OF_SAMPLES[kind]] = pairs.__getitem__ if kind is operations.Patched else partial(_places, pairs)
        tokens = document["tokens"]
        read = EditedTokens(
            _selection(tokens["positions"]),
            None if tokens["steps"] is None else _selection(tokens["steps"]),
            frozenset(tokens["matching"]),
        )
        means, last = document["means"], document["last"]
        plan.edits.append(WorkerEdit(key, kind(**given), read, heads, means, last, pairs))
    return plan


def _called(fn: Any, key: Key, heads: tuple[int, ...] | None, architecture_map: ArchitectureMap) -> Any:
    layers = "all" if key[1] is None else [key[1]]
    selector = next(each for each in select(architecture_map, {key[0]: layers}) if each.key == key)
    return partial(Called, apply(fn, key[0], layers, heads=heads), selector)


def pairs_of(edits: Sequence[Edit], sample: int) -> dict[str, dict[str, int]]:
    """Of each patch and swap, by its number, what it does to a sample; see `RequestSpec`."""
    found: dict[str, dict[str, int]] = {}
    for number, edit in enumerate(edits):
        if isinstance(edit.operation, operations.Patched):
            found[str(number)] = {str(at): row for at, row in edit.operation.row_of(sample).items()}
        elif isinstance(edit.operation, operations.Swapped):
            found[str(number)] = {str(at): place for place, at in enumerate(edit.operation.pair_of(sample))}
    return found


def _places(pairs: Mapping[int, Mapping[int, int]], sample: int) -> tuple[int, ...]:
    """The two positions of a swap."""
    return tuple(pairs[sample])


def _selection(plain: Mapping[str, Any]) -> RowSelection:
    lists: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    return RowSelection(**lists)
