"""What a model reads of a sample besides its token ids: pixels, kinds of tokens, an encoder's input. Any field by name.

A field is a tensor as the model takes it in a batch of one. It has an entry for each token, [1, tokens, ...], or a size
of its own in its first axis: [images, channels, height, width], [patches, features].
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Fields = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class FurtherInputs:
    """The fields of one sample."""

    names: frozenset[str]
    make: Callable[[], Fields] = field(compare=False, repr=False)
    """makes them; called when a batch with the sample runs, so that a large data set's are not all in memory"""
    digest: str
    """of their content: a capture resumes only with the same"""
    encoder_tokens: int = 0
    """tokens that an encoder reads; those of one batch are padded to the longest"""
    alike: tuple[int, ...] = ()
    """sizes that samples of one batch have in common: those that are not padded"""

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets the fields themselves."""
        held = dict(self.make())
        return _held, (self.names, held, self.digest, self.encoder_tokens, self.alike)

    @classmethod
    def of(cls, fields: Fields) -> "FurtherInputs":
        """Those that are in memory."""
        held = dict(fields)
        return cls(frozenset(held), lambda: held, digest_of(held))


def _held(names: frozenset[str], fields: Fields, *rest: Any) -> FurtherInputs:
    return FurtherInputs(names, lambda: fields, *rest)


def digest_of(fields: Fields) -> str:
    """sha256 of names, dtypes, shapes and numbers."""
    found = hashlib.sha256()
    for name, tensor in sorted(fields.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def joined(
    samples: Sequence[FurtherInputs | None],
    lengths: Sequence[int],
    before: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The fields of a batch, in the order of its samples. They have the same names: `signature`.

    lengths: tokens of each sample; before: pads before its first token. A field of tokens is padded as the tokens are.
    Others are laid one behind the other, with zeros behind what is shorter in a further axis. Floating-point numbers
    get `dtype`, the model's.
    """
    every = [{} if sample is None else sample.make() for sample in samples]
    found: dict[str, Any] = {}
    for name in every[0] if every else ():
        parts = [fields[name] for fields in every]
        if _of_tokens(parts, lengths):
            width = max(start + length for start, length in zip(before, lengths, strict=True))
            parts = [_placed(part, 1, start, width) for part, start in zip(parts, before, strict=True)]
        whole = torch.cat(_widened(parts))
        found[name] = whole.to(device, dtype if whole.is_floating_point() else None)
    return found


def signature(sample: FurtherInputs | None) -> frozenset[str]:
    """What samples of one batch have in common."""
    return frozenset() if sample is None else sample.names


def _of_tokens(parts: Sequence[torch.Tensor], lengths: Sequence[int]) -> bool:
    return all(tuple(part.shape[:2]) == (1, length) for part, length in zip(parts, lengths, strict=True))


def _widened(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """All of one size in each axis but the first."""
    found = list(parts)
    for axis in range(1, found[0].ndim):
        width = max(part.shape[axis] for part in found)
        found = [_placed(part, axis, 0, width) for part in found]
    return found


def _placed(tensor: torch.Tensor, axis: int, start: int, width: int) -> torch.Tensor:
    """The tensor between zeros, `width` wide in this axis, from `start` on."""
    if tensor.shape[axis] == width:
        return tensor
    whole = tensor.new_zeros([*tensor.shape[:axis], width, *tensor.shape[axis + 1 :]])
    whole.narrow(axis, start, tensor.shape[axis]).copy_(tensor)
    return whole
