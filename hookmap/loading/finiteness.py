"""Which points belong to the stream, and the words for a stream that is not finite."""

import torch
from torch import nn

from hookmap.maps.points import PointName

_STREAM = ("embed", "resid_pre", "mixer_out", "resid_mid", "mlp_out", "resid_post", "final_norm")


def is_stream(point: str) -> bool:
    """Whether a point's rows are finite in a sound run: masked scores and words that are none may be infinite."""
    return PointName.of(point).base in _STREAM


def in_words(name: str, position: int, dtype: torch.dtype, module: nn.Module) -> str:
    """That a tensor is the first which is not finite, and what helps. `dtype`: of the tensor; `module`: the model."""
    where = f"the stream is not finite: {name} is the first to hold an infinity or nan, at position {position}"
    wrong = (
        path
        for path, weight in module.named_parameters()
        if weight.is_floating_point() and weight.device.type != "meta" and not bool(weight.isfinite().all())
    )
    if (path := next(wrong, None)) is not None:
        return f"{where}. The weight {path} holds an infinity or nan, too: load the model again"
    if dtype == torch.float32:
        return f"{where}. Its weights are finite, and float32 has the widest range: look at what is computed there"
    wider = "bfloat16 or float32" if dtype == torch.float16 else "float32"
    named, most = str(dtype).removeprefix("torch."), f"{torch.finfo(dtype).max:.6g}"
    return (
        f'{where}. The model computes in {named}, up to {most}: open it in {wider}, dtype="float32" (--dtype float32)'
    )
