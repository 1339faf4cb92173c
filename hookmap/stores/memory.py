"""A sink and a store in memory: what `capture` returns when it is given no folder."""

from collections.abc import Iterable, Sequence

import torch

from hookmap.activations import Activation, Key, Sample
from hookmap.stores import sparse
from hookmap.stores.interface import Store, unknown_sample
from hookmap.stores.ledger import Ledger


class MemoryStore(Store):
    """Takes activations (`write`, `finish`) and holds every row; a sample can be read once it is finished."""

    def __init__(self, keys: Iterable[Key]) -> None:
        """`keys`: of the tensors to expect, in forward order."""
        self._ledger = Ledger(tuple(keys))
        self._pieces: dict[tuple[int, Key], list[torch.Tensor]] = {}
        self._samples: dict[int, Sample] = {}

    def write(self, activation: Activation) -> None:
        """Take rows. Raises CaptureError where they are not the next rows of a tensor that is expected."""
        self._ledger.take(activation)
        self._pieces.setdefault((activation.sample, activation.key), []).append(activation.tensor.detach().cpu())

    def finish(self, sample: Sample) -> None:
        """All rows of this sample are written. Raises CaptureError where they are not."""
        self._ledger.finish(sample)
        for key in self.keys:
            pieces = self._pieces.get((sample.sample, key), [])
            if len(pieces) > 1:
                self._pieces[sample.sample, key] = [torch.cat(pieces)]
        self._samples[sample.sample] = sample

    def abandon(self) -> None:
        """Forget the rows of samples that are not finished."""
        for number in self._ledger.abandon():
            for key in self.keys:
                self._pieces.pop((number, key), None)

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys of the tensors that this store holds, in forward order."""
        return self._ledger.keys

    @property
    def samples(self) -> Sequence[Sample]:
        """The finished samples, by number."""
        return tuple(self._samples[number] for number in sorted(self._samples))

    def sample(self, number: int) -> Sample:
        """The finished sample with this number. Raises SelectionError where there is none."""
        if number not in self._samples:
            raise unknown_sample(number, sorted(self._samples))
        return self._samples[number]

    def _rows(self, sample: int, key: Key, rows: Sequence[int]) -> torch.Tensor:
        pieces = self._pieces.get((sample, key))
        if not pieces:  # a sample without rows
            spec = self._ledger.specs.get(key)
            nothing = torch.empty(0, *spec.shape, dtype=spec.dtype) if spec else torch.empty(0, 0)
            return nothing.to_sparse() if spec and spec.sparse else nothing
        if pieces[0].is_sparse:
            return sparse.rows_at(pieces[0], rows)
        if isinstance(rows, range) and rows.step == 1:
            return pieces[0][rows.start : rows.stop].clone()
        return pieces[0][list(rows)]
