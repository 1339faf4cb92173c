"""Rows that are not in a shard yet, and when there are enough for one. Pure: touches no file.

Rows of a batch arrive step by step, sample by sample, tensor by tensor. A cut lays each sample's rows side by side.
"""

from collections.abc import Sequence

import torch

from hookmap.activations import Activation, Key, size_of
from hookmap.stores.ledger import tensor_name
from hookmap.stores.shard import Block
from hookmap.stores.sparse import parts_of
from hookmap.stores.table import Span

HARD = 2
"""a shard is cut inside a forward pass only at this many times `shard_bytes`"""


class Buffer:
    """The rows of the next shard. When it is full depends only on what was written to it."""

    def __init__(self, keys: Sequence[Key], shard_tokens: int, shard_bytes: int) -> None:
        self._keys = keys
        self._shard_tokens = shard_tokens
        self._shard_bytes = shard_bytes
        self._pass: set[tuple[int, Key]] = set()  # what the forward pass in progress has brought
        self.clear()

    def clear(self) -> None:
        """Drop all rows: they are in a shard now."""
        self._pieces: dict[Key, dict[int, list[tuple[int, torch.Tensor]]]] = {}
        self._rows: dict[Key, int] = {}
        self._bytes = 0

    def __bool__(self) -> bool:
        return self._bytes > 0

    def full_before(self, activation: Activation) -> bool:
        """Whether to cut before taking these rows: the buffer is full, and they begin a new forward pass."""
        if (activation.sample, activation.key) not in self._pass:
            return False
        return self._bytes >= self._shard_bytes or max(self._rows.values(), default=0) >= self._shard_tokens

    @property
    def overfull(self) -> bool:
        """Whether to cut now: one forward pass (a long prompt, a large batch) exceeds the size of a shard."""
        return self._bytes >= HARD * self._shard_bytes

    def add(self, activation: Activation) -> None:
        """Take rows."""
        key = activation.key
        part = (activation.sample, key)
        if part in self._pass:
            self._pass.clear()
        self._pass.add(part)
        tensor = activation.tensor
        if tensor.requires_grad or not tensor.is_cpu:  # asked first: both calls make a new tensor, a token each
            tensor = tensor.detach().cpu()
        rows, size = tensor.shape[0], size_of(tensor)
        if not rows:
            return
        if not tensor.is_sparse and tensor.untyped_storage().nbytes() > size:
            tensor = tensor.clone()  # a view would keep what it is a view of in memory
        self._pieces.setdefault(key, {}).setdefault(activation.sample, []).append((activation.start, tensor))
        self._rows[key] = self._rows.get(key, 0) + rows
        self._bytes += size

    def blocks(self) -> list[Block]:
        """The tensors of the shard, in forward order, each sample's rows side by side, samples by number."""
        blocks = []
        for key in self._keys:
            if found := self._pieces.get(key):
                pieces = [tensor for sample in sorted(found) for _, tensor in found[sample]]
                if pieces[0].is_sparse:
                    parts = parts_of(torch.cat(pieces))._asdict()
                    blocks += [Block(f"{tensor_name(key)}.{name}", len(part), [part]) for name, part in parts.items()]
                else:
                    blocks.append(Block(tensor_name(key), self._rows[key], pieces))
        return blocks

    def spans(self, shard: int) -> dict[int, list[Span]]:
        """Where each sample's rows will be in the shard: one span for each run of tensors that place them equally."""
        spans: dict[int, list[Span]] = {}
        for place, key in enumerate(self._keys):
            row, found = 0, self._pieces.get(key, {})
            for sample in sorted(found):
                start, (last, tensor) = found[sample][0][0], found[sample][-1]
                rows = last + tensor.shape[0] - start  # the ledger saw to it that they follow each other
                new = Span(shard, place, place + 1, row, start, rows)
                row += rows
                known = spans.setdefault(sample, [])
                if known and known[-1] == new._replace(first=known[-1].first, end=place):
                    known[-1] = known[-1]._replace(end=place + 1)
                else:
                    known.append(new)
        return spans
