"""The computation from the residual stream after the last block to the logits, as steps that run on any stream.

The steps are read from the model's own dataflow, in order: modules (such as the final norm and the unembedding), casts,
constant factors, a bias that is added, and the tanh of a soft-cap. Any other computation is refused with the reason.
The steps are proved on the opened model: they must give its own logits.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from hookmap.capture.engines.model_lock import lock_of
from hookmap.capture.finiteness import not_finite
from hookmap.discovery import aten
from hookmap.discovery.dataflow import Dataflow, ModuleCall, Operation, TensorRef, record
from hookmap.errors import SelectionError
from hookmap.loading import modules, other_inputs
from hookmap.loading.encoder_decoder import is_encoder_decoder, with_source
from hookmap.loading.encoder_prompts import trial_prompt
from hookmap.maps.calls import last_run
from hookmap.maps.selectors import Selector

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

_SAME = {*aten.RESHAPES, *aten.ALIASES, "clone", "slice", "alias_update"}
_PROOF_TOKENS = 6
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class UnembeddingStep:
    """A module, or one operation on a tensor."""

    name: str
    """the path of the module; or `mul`, `div`, `tanh` or `cast`; or `+` and the path of a bias"""
    module: nn.Module | None = None
    number: float | None = None
    dtype: torch.dtype | None = None
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.module is not None:
            return _run(self.module, x)
        if self.name == "cast":
            return x.to(self.dtype)
        if self.name == "tanh":
            return torch.tanh(x)
        if self.bias is not None:
            return x + self.bias.to(x.device)
        assert self.number is not None
        return x * self.number if self.name == "mul" else x / self.number

    def __str__(self) -> str:
        if self.module is not None:
            return self.name
        if self.name == "cast":
            return str(self.dtype).removeprefix("torch.")
        return self.name if self.number is None else f"{'×' if self.name == 'mul' else '÷'} {self.number:g}"


class Unembeds(Protocol):
    """What computes logits from the residual stream."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the stream."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """[batch, pos, d_model] -> [batch, pos, d_vocab]."""


@dataclass(frozen=True)
class Unembedding:
    """The steps from the stream to the logits, in the four parts that attributions need."""

    before: tuple[UnembeddingStep, ...]
    """up to the final norm"""
    norm: UnembeddingStep | None
    """the final norm; None where the model has none"""
    after: tuple[UnembeddingStep, ...]
    """up to the unembedding and its constant factor; linear in most models"""
    cap: tuple[UnembeddingStep, ...]
    """the soft-cap and what follows it; empty where there is none"""
    dtype: torch.dtype = torch.float32
    """of the model's stream"""

    @property
    def before_cap(self) -> tuple[UnembeddingStep, ...]:
        """All steps up to the soft-cap."""
        return (*self.before, *((self.norm,) if self.norm else ()), *self.after)

    @property
    def steps(self) -> tuple[UnembeddingStep, ...]:
        """All steps, in order."""
        return (*self.before_cap, *self.cap)

    @property
    def tolerance(self) -> float:
        """How much two computations of the same logits may differ, relative to the largest logit."""
        weights = (p.dtype for s in self.steps if s.module is not None for p in s.module.parameters())
        return max(_TOLERANCE.get(dtype, 4e-2) for dtype in (self.dtype, *weights) if dtype.is_floating_point)

    def __call__(self, stream: torch.Tensor) -> torch.Tensor:
        """Logits [.., pos, d_vocab] of a stream [.., pos, d_model], in the model's dtype."""
        return apply(self.steps, stream)

    def __str__(self) -> str:
        return " → ".join(map(str, self.steps))


def apply(steps: Sequence[UnembeddingStep], x: torch.Tensor) -> torch.Tensor:
    """Run the steps one after the other, without gradients."""
    with torch.no_grad():
        for step in steps:
            x = step(x)
    return x


_proved: weakref.WeakKeyDictionary[nn.Module, Unembedding] = weakref.WeakKeyDictionary()


def unembedding_of(hm: Hooked) -> Unembedding:
    """The steps of an opened model. They are read and proved once.

    Raises SelectionError with the reason where they cannot be read, or do not give the model's own logits, and
    CaptureError where the stream is not finite.
    """
    if hm.model not in _proved:
        last = hm.map.selectors("resid_post", last_run(hm.map)[0], "last")[-1]
        hm.map.selectors("logits")  # raises the reason where the model has none
        with lock_of(hm.model).exclusive():
            unembedding = read(modules.unwrap(hm.model), last, hm.map.final_norm_path, hm.map.lm_head_path)
        _proved[hm.model] = _prove(hm, unembedding)
    return _proved[hm.model]


def read(model: nn.Module, last: Selector, norm_path: str | None, head_path: str | None) -> Unembedding:
    """The steps behind the last block, found by running the model once on a few tokens.

    `last`: the selector of the last layer's resid_post. Raises SelectionError with the reason.
    """
    config = getattr(model, "config", None)
    given = with_source(model, modules.inputs(modules.device_of(model), modules.sequence_length(config, model)))
    given |= other_inputs.chosen(model, given)
    with modules.eager(model), modules.plain_experts(model):
        flow = record(model, given, modules.accepted(model, given))
    end = max((_time(flow, term.module, term.side) for term in last.terms), default=-1)
    logits = flow.calls[0].outputs.get("logits")
    if logits is None or end < 0:
        raise _refused(model, "its output has no logits" if logits is None else f"{last.module} is called nowhere")
    try:
        return _cut(tuple(_walk(model, flow, logits, end, {norm_path, head_path} - {None})), norm_path)
    except SelectionError as error:
        try:  # a head that computes more than its named modules is taken as one step
            return _cut(tuple(_walk(model, flow, logits, end, set())), norm_path)
        except SelectionError:
            raise error from None


def _time(flow: Dataflow, path: str, side: str) -> int:
    return max((c.enter if side == "input" else c.exit for c in flow.calls if c.path == path), default=-1)


def _walk(model: nn.Module, flow: Dataflow, tensor: int, end: int, named: set[Any]) -> list[UnembeddingStep]:
    """The steps from the end of the last block to the logits, found backwards from the logits."""
    steps: list[UnembeddingStep] = []
    while (op := flow.producer(tensor)) is not None and op.time > end:
        if (call := _module(flow, tensor, end, named)) is not None:
            entered = [t for t in call.entered.values() if flow.tensors[t].dtype.is_floating_point]
            if len(entered) != 1:
                raise _refused(model, f"{call.path} reads {len(entered)} tensors")
            steps.append(UnembeddingStep(call.path, module=call.module))
            tensor = entered[0]
            continue
        step, tensor = _step(model, flow, op)
        steps += [step] if step is not None else []
    return steps[::-1]


def _module(flow: Dataflow, tensor: int, end: int, named: set[Any]) -> ModuleCall | None:
    """The outermost module that returns this tensor, contains no named module, and ran after the last block."""
    for call in flow.calls:
        inside = any(path != call.path and path.startswith(f"{call.path}.") for path in named)
        if call.enter > end and tensor in call.outputs.values() and call.path and not inside:
            return call
    return None


def _step(model: nn.Module, flow: Dataflow, op: Operation) -> tuple[UnembeddingStep | None, int]:
    """One operation as a step (None where it changes only the shape), and the tensor that it reads."""
    first = op.args[0] if op.args else None
    if op.name in _SAME:
        return None, op.inputs[-1 if op.name == "alias_update" else 0]
    if isinstance(first, TensorRef) and op.name == "_to_copy":
        return UnembeddingStep("cast", dtype=op.kwargs.get("dtype")) if op.kwargs.get("dtype") else None, first.id
    if isinstance(first, TensorRef) and op.name == "tanh":
        return UnembeddingStep("tanh"), first.id
    if isinstance(first, TensorRef) and op.name in ("mul", "div") and isinstance(op.args[1], (int, float)):
        return UnembeddingStep(op.name, number=float(op.args[1])), first.id
    if op.name == "add" and len(op.inputs) == 2 and (bias := _bias(model, flow, op.inputs[1])) is not None:
        return bias, op.inputs[0]
    raise _refused(model, f"`{op.name}` of {len(op.inputs)} tensors stands between the last block and the logits")


def _bias(model: nn.Module, flow: Dataflow, tensor: int) -> UnembeddingStep | None:
    """The one parameter or buffer of a tensor's shape, where no operation makes the tensor (BART's final bias)."""
    info = flow.tensors[tensor]
    shape, own = info.shape, {**dict(model.named_parameters()), **dict(model.named_buffers())}
    fits = [(name, each) for name, each in own.items() if tuple(each.shape) == shape]
    if info.producer is not None or len(fits) != 1:
        return None
    (name, bias), *_ = fits
    return UnembeddingStep(f"+ {name}", bias=bias.detach())


def _cut(steps: tuple[UnembeddingStep, ...], norm_path: str | None) -> Unembedding:
    norm = next((n for n, step in enumerate(steps) if step.module is not None and step.name == norm_path), None)
    before, rest = ((), steps) if norm is None else (steps[:norm], steps[norm + 1 :])
    cap = next((n for n, step in enumerate(rest) if step.name == "tanh"), len(rest))
    if 0 < cap < len(rest) and rest[cap - 1].name == "div":
        cap -= 1  # a soft-cap is c * tanh(x / c)
    return Unembedding(before, None if norm is None else steps[norm], rest[:cap], rest[cap:])


def _run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run the module on a stream that may be on another device."""
    output = module(x.to(modules.device_of(module)))
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _prove(hm: Hooked, unembedding: Unembedding) -> Unembedding:
    """Check that the steps give the model's own logits, for the whole sequence and for each position alone."""
    size = hm.map.d_vocab or _PROOF_TOKENS
    tokens = [(1 + 37 * n) % size for n in range(_PROOF_TOKENS)]
    prompt: Any = trial_prompt(hm.root, tokens) if is_encoder_decoder(hm.root) else tokens
    where = last_run(hm.map)
    run = hm.capture([prompt], ["resid_post", "logits"], [where[0]], max_new_tokens=0, calls="last")
    stream, logits = run.read(0, "resid_post", *where), run.read(0, "logits").float()
    if not bool(stream.isfinite().all()) or bool(logits.isnan().any()):
        raise not_finite(hm, tokens, "lens")
    unembedding = replace(unembedding, dtype=stream.dtype)
    whole = unembedding(stream[None])[0].float().cpu()
    if whole.shape != logits.shape:
        raise _refused(hm.model, f"the steps {unembedding} give {list(whole.shape)}, the model {list(logits.shape)}")
    alone = torch.stack([unembedding(row[None, None])[0, 0] for row in stream]).float().cpu()
    worst = max(float((found - logits).abs().max()) for found in (whole, alone)) / float(logits.abs().max())
    if not worst <= unembedding.tolerance:
        raise _refused(
            hm.model, f"the steps {unembedding} give other logits than the model: {worst:.2g} of the largest"
        )
    return _with_norm(unembedding, stream)


def _with_norm(unembedding: Unembedding, stream: torch.Tensor) -> Unembedding:
    """Where the map names no final norm, the first module is it if its output does not depend on the stream's scale."""
    first = unembedding.after[0] if len(unembedding.after) > 1 else None
    if unembedding.norm is not None or first is None or first.module is None:
        return unembedding
    once, fourfold = apply((first,), stream[None]).float(), apply((first,), 4 * stream[None]).float()
    invariant = bool((fourfold - once).abs().max() <= 1e-2 * once.abs().max())
    return replace(unembedding, norm=first, after=unembedding.after[1:]) if invariant else unembedding


def _refused(model: nn.Module, reason: str) -> SelectionError:
    return SelectionError(
        f"no lens for {type(model).__name__}: {reason}. Expected a final norm, an unembedding, constant factors and a "
        "soft-cap behind the last block. Its streams can still be read: hookmap capture --points resid_post"
    )
