"""What a sink knows about the rows it took; it refuses rows that would silently be stored wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hookmap.activations import Activation, Key, Sample
from hookmap.errors import CaptureError
from hookmap.stores.number_set import NumberSet


@dataclass(frozen=True)
class RowSpec:
    """Shape and dtype of one row of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """without the token axis: (d_model,) for the residual stream"""
    sparse: bool = False


def tensor_name(key: Key) -> str:
    """`resid_mid.8`; `resid_mid.8.call2` of a layer that runs several times; `logits` for one of the whole model."""
    if len(key) == 3:
        return f"{key[0]}.{key[1]}.call{key[2]}"
    return key[0] if key[1] is None else f"{key[0]}.{key[1]}"


@dataclass
class Ledger:
    """Rows taken so far for each open sample, and the dtype and shape of each tensor."""

    keys: tuple[Key, ...]
    specs: dict[Key, RowSpec] = field(default_factory=dict)
    finished: NumberSet = field(default_factory=NumberSet)
    open: dict[int, dict[Key, int]] = field(default_factory=dict)
    """sample -> key -> rows taken"""

    def take(self, activation: Activation) -> None:
        """Note rows. Raises CaptureError where they are not the next rows of a tensor that is expected."""
        key = activation.key
        taken = self.open.get(activation.sample)
        if taken is None:
            if activation.sample in self.finished:
                raise CaptureError(f"sample {activation.sample} is finished and gets rows of {tensor_name(key)}.")
            taken = self.open[activation.sample] = dict.fromkeys(self.keys, 0)
        if key not in taken:
            expected = ", ".join(map(tensor_name, self.keys))
            raise CaptureError(f"{tensor_name(key)} is not captured here: expected {expected}.")
        if activation.start != taken[key]:
            raise CaptureError(
                f"{tensor_name(key)} of sample {activation.sample}: expected the rows from {taken[key]} on, "
                f"got rows from {activation.start} on. Rows would be lost or doubled."
            )
        self._check_spec(key, activation.tensor)
        taken[key] += activation.tensor.shape[0]

    def finish(self, sample: Sample) -> None:
        """Note the end of a sample. Raises CaptureError that names every tensor with missing or surplus rows."""
        if sample.sample in self.finished:
            raise CaptureError(f"sample {sample.sample} is finished twice.")
        taken = self.open.get(sample.sample, dict.fromkeys(self.keys, 0))
        wrong = ", ".join(f"{tensor_name(key)} has {rows}" for key, rows in taken.items() if rows != sample.rows)
        if wrong:
            raise CaptureError(f"sample {sample.sample} should have {sample.rows} rows of each tensor: {wrong}.")
        self.open.pop(sample.sample, None)
        self.finished.add(sample.sample)

    def adopt(self, specs: Mapping[Key, RowSpec], samples: Sequence[int]) -> None:
        """Note samples that another ledger checked. Raises CaptureError where they contradict this one."""
        if twice := [sample for sample in samples if sample in self.finished]:
            raise CaptureError(f"samples {twice} are finished twice.")
        for key, spec in specs.items():
            if (known := self.specs.setdefault(key, spec)) != spec:
                raise CaptureError(
                    f"{tensor_name(key)}: expected rows of {known.dtype} {list(known.shape)}, as before, "
                    f"got {spec.dtype} {list(spec.shape)}."
                )
        self.finished.update(samples)

    def abandon(self) -> list[int]:
        """Forget the samples that are open. Returns their numbers."""
        numbers, self.open = list(self.open), {}
        return numbers

    def _check_spec(self, key: Key, tensor: torch.Tensor) -> None:
        shape = tuple(tensor.shape)  # of a torch.Size, a slice takes ten times as long
        known = self.specs.get(key)
        if (
            known is not None
            and known.dtype == tensor.dtype
            and known.shape == shape[1:]
            and shape[1:]
            and known.sparse == tensor.is_sparse
        ):
            return
        if len(shape) < 2:
            raise CaptureError(f"{tensor_name(key)}: expected [tokens, d], got shape {list(shape)}.")
        if known is not None:
            raise CaptureError(
                f"{tensor_name(key)}: expected rows of {known.dtype} {list(known.shape)}, as before, "
                f"got {tensor.dtype} {list(shape[1:])}."
            )
        self.specs[key] = RowSpec(tensor.dtype, shape[1:], tensor.is_sparse)
