"""What a user's object runs around the transformers model inside it: its own `forward`, its own `generate`.

PEFT does a part of some adapters there, and so may a module of the user's own. Rows and tokens are what the object
itself gives, so it is the object that runs, as long as each of its passes is one pass of the model on the same tokens.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from hookmap.errors import CaptureError, ModelError
from hookmap.loading.encoder_decoder import is_encoder_decoder, with_source
from hookmap.loading.modules import accepted, device_of, eager, inputs, model_inside, plain_experts

_TOKENS = 6
_WITHOUT = "Without the wrapper: open the model in it (of a PEFT model: model.get_base_model())."


def runner_of(module: nn.Module) -> nn.Module:
    """What is called to run `module`: itself, or what `torch.compile` was given."""
    compiled = module._modules.get("_orig_mod")
    return module if compiled is None else compiled


def named(runner: nn.Module) -> str:
    """The wrapper's class, and of a PEFT model which adapters it has."""
    adapters = getattr(runner, "peft_config", None)
    kinds = [getattr(each, "peft_type", None) for each in adapters.values()] if isinstance(adapters, dict) else []
    told = ", ".join(sorted({str(getattr(kind, "value", kind)) for kind in kinds if kind}))
    return f"{type(runner).__name__} ({told})" if told else type(runner).__name__


def generation_config_of(runner: nn.Module, root: nn.Module) -> Any:
    """The object's default generation settings: a wrapper may have its own."""
    own = getattr(runner, "generation_config", None)
    return root.generation_config if own is None else own


def generate_of(runner: nn.Module, root: nn.Module) -> Callable[..., torch.Tensor]:
    """The object's own `generate`. Raises CaptureError where it has none: the model's would leave its forward out.

    Of an encoder-decoder it is transformers' for all models: Whisper's own detects a language, cuts long sounds into
    pieces, and does not return the tokens that the decoder began with.
    """
    from transformers import GenerationMixin

    if runner is root and is_encoder_decoder(root):
        return functools.partial(GenerationMixin.generate, root)
    own = getattr(runner, "generate", None)
    if callable(own):
        found: Callable[..., torch.Tensor] = own
        return found
    raise CaptureError(
        f"{type(runner).__name__} has no `generate`, and the one of the {type(root).__name__} in it would leave out "
        f"what {type(runner).__name__}.forward does. Give it a `generate`; read texts without generating "
        f"(max_new_tokens=0); or open the {type(root).__name__} itself."
    )


@contextlib.contextmanager
def hooked_forward(runner: nn.Module, root: nn.Module) -> Iterator[None]:
    """Inside, a wrapper that calls `root.forward` and not `root`, as some of PEFT's do, comes by root's hooks too."""
    if runner is root:
        yield
        return
    inside = 0
    own = root.forward
    holders = [m for m in runner.modules() if m is root or getattr(m.__dict__.get("forward"), "__self__", None) is root]
    before = [holder.__dict__.get("forward") for holder in holders]

    def enter(*_: Any) -> None:
        nonlocal inside
        inside += 1

    def leave(*_: Any) -> None:
        nonlocal inside
        inside -= 1

    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if inside else root(*args, **kwargs)

    functools.update_wrapper(forward, own)
    handles = [root.register_forward_pre_hook(enter), root.register_forward_hook(leave, always_call=True)]
    for holder in holders:
        holder.forward = forward
    try:
        yield
    finally:
        for holder, former in zip(holders, before, strict=True):
            del holder.forward
            if former is not None:
                holder.forward = former  # accelerate sets one of its own
        for handle in handles:
            handle.remove()


def check_wrapper(runner: nn.Module) -> None:
    """Raises ModelError where a pass of the wrapper is not one pass of the model in it on the same tokens."""
    root = model_inside(runner)
    if root is None or root is runner:
        return
    own, whole = _Pass(root, root), _Pass(runner, root)
    if not (own.ran and whole.ran):
        return  # discovery says what is wrong with it
    wrapper, model = named(runner), type(root).__name__
    if not whole.calls[root]:
        raise ModelError(f"{wrapper} does not call the {model} in it. Expected one call a pass. {_WITHOUT}")
    if whole.width != _TOKENS:
        raise ModelError(
            f"{wrapper} runs its {model} on {whole.width} positions for {_TOKENS} tokens, and rows of positions that "
            f"are no tokens have no place in a capture. {_WITHOUT}"
        )
    often = max(count - max(1, own.calls[module]) for module, count in whole.calls.items())
    if often > 0:
        raise ModelError(
            f"{wrapper} runs its {model}, or parts of it, {often + 1} times in one pass, and which of them is the "
            f"layer's cannot be told. {_WITHOUT}"
        )
    if whole.changes_logits():
        raise ModelError(f"{wrapper} gives other logits than the {model} in it, which is what is read. {_WITHOUT}")


class _Pass:
    """One pass of a wrapper on a few tokens, as the model in it sees it."""

    def __init__(self, runner: nn.Module, root: nn.Module) -> None:
        self.calls = dict.fromkeys(root.modules(), 0)
        """how often each module of the model was called"""
        self.width: int | None = None
        """positions that the model was called on"""
        self.ran = False
        self._inner: Any = None
        self._outer: Any = None
        """logits"""
        self._root = root
        given = with_source(runner, inputs(device_of(runner), _TOKENS))
        names = accepted(runner, given)
        handles: list[Any] = [root.register_forward_hook(self._left)]
        try:
            handles += [each.register_forward_pre_hook(self._entered, with_kwargs=True) for each in self.calls]
            with torch.no_grad(), eager(runner), plain_experts(runner), hooked_forward(runner, root):
                output = runner(**{parameter: given[name] for name, parameter in names.items()})
            self._outer = getattr(output, "logits", None)
            self.ran = True
        except Exception:  # a model's own code raises what it likes; the caller asks whether it ran
            pass
        finally:
            for handle in handles:
                handle.remove()

    def changes_logits(self) -> bool:
        """Whether the wrapper gives other logits than the model gave it, where both can be seen."""
        inner, outer = self._inner, self._outer
        if not isinstance(inner, torch.Tensor) or not isinstance(outer, torch.Tensor) or outer.is_meta:
            return False
        return not torch.equal(inner, outer)

    def _entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls[module] += 1
        if module is self._root:
            given = (each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor) and each.ndim > 1)
            self.width = next((each.shape[1] for each in given), None)

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inner = getattr(output, "logits", None)
