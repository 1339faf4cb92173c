"""Rows that are decoded together, each of its own length. One may join or leave between any two steps.

Prompts that are read together are padded on the left. Their keys and values then stand at the right end of the batch's:
columns before a row's first token are hidden by the attention mask, too.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hookmap.capture.batches import without_loss
from hookmap.loading import generation as gen

_ROOM = 64
"""columns that are made at once, and that must be empty in all rows before they are given back"""
_CACHES = ("cache", "past_key_values")
"""the argument of a model's forward that holds keys and values; transformers 5.24 renamed it"""


class RowsLayer(DynamicLayer):  # type: ignore[misc]  # transformers' base is not typed
    """Keys and values of one layer, [rows, heads, columns, d_head], in tensors that have room for more."""

    def __init__(self) -> None:
        super().__init__()
        self._held: list[torch.Tensor] = []
        self.rows = self.end = 0
        """what is in use"""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Add the newest columns. Returns all of them."""
        new = key_states.shape[-2]
        self._make_room(self.rows, self.end + new)
        for held, states in zip(self._held, (key_states, value_states), strict=True):
            held[: self.rows, :, self.end : self.end + new] = states
        self.end += new
        self._show()
        return self.keys, self.values

    def join(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add rows below the others, whose last columns are these."""
        new, _, length, _ = keys.shape
        if not self._held:
            self._held = [states[:0, :, :0] for states in (keys, values)]
            self.device, self.dtype, self.is_initialized = keys.device, keys.dtype, True
        if length > self.end:
            self._move(length - self.end)
        self._make_room(self.rows + new, self.end)
        for held, states in zip(self._held, (keys, values), strict=True):
            # Zeros where nothing is: the mask hides them, and a product with NaN would not be hidden.
            held[self.rows : self.rows + new, :, : self.end - length] = 0.0
            held[self.rows : self.rows + new, :, self.end - length : self.end] = states
        self.rows += new
        self._show()

    def leave(self, row: int) -> None:
        """Take a row out; the last one takes its place."""
        self.rows -= 1
        for held in self._held:
            held[row, :, : self.end] = held[self.rows, :, : self.end].clone()
        self._show()

    def cut(self, columns: int) -> None:
        """Drop so many columns from the left."""
        self._move(-columns)
        self._show()

    def back(self, columns: int) -> None:
        """Drop all columns behind so many: a pass that was not finished may have added some."""
        self.end = columns
        self._show()

    def get_seq_length(self) -> int:
        return self.end

    def _show(self) -> None:
        self.keys, self.values = (held[: self.rows, :, : self.end] for held in self._held)

    def _move(self, by: int) -> None:
        """Shift all columns to the right, or, below 0, to the left."""
        end = self.end + by
        own = [held[: self.rows, :, max(0, -by) : self.end].clone() for held in self._held]
        self.end = end
        self._make_room(self.rows, end)
        for held, states in zip(self._held, own, strict=True):
            held[: self.rows, :, : max(0, by)] = 0.0
            held[: self.rows, :, max(0, by) : end] = states

    def _make_room(self, rows: int, columns: int) -> None:
        held = self._held[0]
        if rows <= held.shape[0] and columns <= held.shape[2]:
            return
        rows = max(rows, held.shape[0])
        columns = max(held.shape[2], -(-columns // _ROOM) * _ROOM)
        larger = []
        for held in self._held:
            made = held.new_empty((rows, held.shape[1], columns, held.shape[3]))
            kept = (slice(self.rows), slice(None), slice(min(self.end, held.shape[2])))
            made[kept] = held[kept]
            larger.append(made)
        self._held = larger


class RowBatch:
    """The rows of one model that are decoded together. The caller holds the model's lock while it calls."""

    def __init__(self, root: Any, limit: int | None = None) -> None:
        """`limit`: positions of the model; None: no limit is known."""
        self._root, self._limit = root, limit
        taken = inspect.signature(root.forward).parameters
        self._cache_name = next(name for name in _CACHES if name in taken)
        self._positions = "position_ids" in taken
        keep = gen.logits_parameter(root)
        self._more = {"use_cache": True, "return_dict": True, **without_loss(root), **({keep.name: 1} if keep else {})}
        self._cache: DynamicCache | None = None
        self.lengths: list[int] = []
        """tokens of each row whose keys and values are held"""

    @property
    def columns(self) -> int:
        """Of the longest row."""
        return max(self.lengths, default=0)

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, DynamicCache]:
        """Read prompts in one pass, a row each. Returns the last logits, [rows, d_vocab], and what `join` takes."""
        cache, width = fresh_cache(self._root), max(map(len, prompts))
        device = self._root.get_input_embeddings().weight.device
        ids = torch.tensor([[0] * (width - len(tokens)) + list(tokens) for tokens in prompts], device=device)
        pads = torch.tensor([[width - len(tokens)] for tokens in prompts], device=device)
        positions = torch.arange(width, device=device) - pads
        return self._pass(ids, (positions >= 0).long(), positions.clamp(min=0), cache), cache

    def join(self, read: DynamicCache, lengths: Sequence[int]) -> None:
        """Add the rows that were read. `lengths`: tokens of each prompt."""
        if self._cache is None:
            self._cache = fresh_cache(self._root)
            self._cache.layers = [RowsLayer() for _ in read.layers]
        for layer, own in zip(self._cache.layers, read.layers, strict=True):
            layer.join(own.keys, own.values)
        self.lengths += lengths

    def leave(self, row: int) -> int:
        """Take a row out. Returns the number of the row that now has its number: the last one."""
        last = len(self.lengths) - 1
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            self._cache = None  # the memory is given back
            return last
        assert self._cache is not None
        empty = self._cache.layers[0].end - self.columns
        for layer in self._cache.layers:
            layer.leave(row)
            if empty >= _ROOM:
                layer.cut(empty)
        return last

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Feed each row its newest token. Returns the logits that follow, [rows, d_vocab]."""
        assert self._cache is not None
        end = self._cache.layers[0].end
        device = self._root.get_input_embeddings().weight.device
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        mask = (torch.arange(end + 1, device=device) >= end - lengths).long()
        # The position of a row that has ended, and is fed on beside others of its request, may not leave the model's.
        positions = lengths if self._limit is None else lengths.clamp(max=self._limit - 1)
        try:
            logits = self._pass(torch.tensor(tokens, device=device)[:, None], mask, positions, self._cache)
        except BaseException:
            for layer in self._cache.layers:
                layer.back(end)
            raise
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def clear(self) -> None:
        """Take all rows out."""
        self.lengths, self._cache = [], None

    def _pass(self, ids: Any, mask: Any, positions: Any, cache: DynamicCache) -> torch.Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, self._cache_name: cache, **self._more}
        if self._positions:
            inputs["position_ids"] = positions
        with torch.no_grad():
            logits: torch.Tensor = self._root(**inputs).logits
        return logits[:, -1].to(torch.float32, copy=True)


def fresh_cache(root: Any) -> DynamicCache:
    """An empty cache as `generate` makes it."""
    return DynamicCache(config=root.config.get_text_config(decoder=True))


def why_no_rows(root: Any) -> str | None:
    """Why rows of this model cannot join and leave, by its forward and its cache; None where they may."""
    taken = inspect.signature(root.forward).parameters
    if not any(name in taken for name in _CACHES) or "attention_mask" not in taken:
        return "its forward takes no cache, or no attention mask"
    own = getattr(root, "_supports_default_dynamic_cache", None)
    if own is not None and not own():
        return "it has a cache of its own"
    kinds = {type(layer).__name__ for layer in fresh_cache(root).layers if type(layer) is not DynamicLayer}
    if kinds:
        return f"its cache holds more than keys and values of all tokens ({', '.join(sorted(kinds))})"
    return None
