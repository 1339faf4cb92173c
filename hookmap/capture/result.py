"""The result of a capture: its texts, tokens and tensors, in memory or in a folder."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hookmap.activations import Key, Sample, call_of, key_of
from hookmap.capture.stacks import Stack, accumulated, decomposed
from hookmap.errors import SelectionError
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import RESIDUAL_AXES, PointName, axes_of, parse_point
from hookmap.maps.selectors import Selector
from hookmap.stores.folder import write_store
from hookmap.stores.interface import Store, Tokens, as_html, completions, place_of
from hookmap.stores.joining import Rows, call_and_tokens, flat_rows, layers_meant, stacked
from hookmap.stores.manifest import Manifest
from hookmap.wording import counted


class Capture:
    """A finished run: its texts, its tokens, and a tensor for each point and layer, in memory or in its folder."""

    def __init__(
        self, store: Store, selectors: Sequence[Selector], architecture_map: ArchitectureMap, manifest: Manifest
    ) -> None:
        self.store = store
        self.selectors = tuple(selectors)
        self.map = architecture_map
        self.manifest = manifest
        self.before: Capture | None = None
        """the same rows right before the interventions, where before=True asked for them"""

    @property
    def samples(self) -> Sequence[Sample]:
        """One sample for each prompt, in the order of the prompts."""
        return self.store.samples

    @property
    def texts(self) -> list[str]:
        """The text generated for each prompt, without the prompt and special tokens."""
        return self.store.texts

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        """The token ids of each prompt and of the text generated after it."""
        return self.store.tokens

    @property
    def keys(self) -> tuple[Key, ...]:
        """(point, layer) of each tensor, in forward order; (point, layer, call) of layers that run several times."""
        return self.store.keys

    @property
    def points(self) -> tuple[str, ...]:
        """Names of the captured points, each once, in forward order."""
        return self.store.points

    @property
    def layers(self) -> tuple[int, ...]:
        """Captured layers, ascending."""
        return self.store.layers

    def steps(self, sample: int = 0) -> tuple[int, ...]:
        """For each row of a sample, the step that made it: 0 for rows of the prompt, n for the n-th generated token."""
        found = self.store.sample(sample)
        if found.positions == "mean":
            raise SelectionError(f"sample {sample} is one mean over positions: its row has no step.")
        return tuple(max(0, position - found.prompt_tokens + 1) for position in found.row_positions)

    def __getitem__(self, where: str | Key) -> torch.Tensor | list[torch.Tensor]:
        """`run["resid_mid", 8]`: [batch, pos, d] where all samples have as many rows, else a list of [pos, d].

        `run["resid_mid", 8, 2]` is of the layer's call 2, where it runs several times in one forward pass.

        `run["resid_mid"]` is of every layer captured, in the order of `keys_of`: [layers, batch, pos, d], or a list of
        [layers, pos, d]; a layer that runs several times has an entry for each run.

        `run["pattern", 8]` is [batch, heads, query, key], or a list of [heads, query, key].
        `run["blocks.8.hook_resid_mid"]` and `run["logits"]` are understood too, and negative layers count from the
        end. Raises SelectionError for a tensor that was not captured.
        """
        if (keys := layers_meant(self, where)) is not None:
            return stacked((self[key] for key in keys), len(keys), str(where))
        key = self.key(*place_of(where))
        found = self.store[key]
        if "key" not in PointName.of(key[0]).definition.axes:
            return found
        ends = [sample.rows if sample.positions is None else _end(sample) for sample in self.samples]
        if isinstance(found, list):
            return [rows[..., :end].movedim(1, 0) for rows, end in zip(found, ends, strict=True)]
        return found[..., : max(ends)].movedim(2, 1)

    def read(
        self,
        sample: int,
        point: str,
        layer: int | None = None,
        call: "int | Tokens" = None,
        tokens: Tokens = None,
    ) -> torch.Tensor:
        """Rows of one sample, [pos, d], without reading the others; of `pattern` [query, heads, key], zeros behind.

        `call`: of a layer that runs several times.
        """
        run, tokens = call_and_tokens(call, tokens)
        key = self.key(point, layer, run)
        return self.store.read(sample, key[0], key[1], call_of(key), tokens)

    def rows(self, point: str, layer: int | None = None, call: int | None = None) -> Rows:
        """All rows of all samples behind each other, [rows, d], and where those of each sample begin; see `Store.rows`.

        `values, offsets = run.rows("resid_post", 8)`: sample i has `values[offsets[i] : offsets[i + 1]]`.
        """
        key = self.key(point, layer, call)
        return flat_rows(self.store, self.store.key(key[0], key[1], call_of(key)))

    def accumulated_resid(self, mid: bool = False) -> Stack:
        """The residual stream as it grows: `resid_pre` of each layer captured, and `resid_post` of the last.

        mid: `resid_mid` of each layer, too, where it was captured. Gives (labels, values): values
        [parts, batch, pos, d_model]. Raises SelectionError with the points to capture.
        """
        return accumulated(self, mid)

    def decompose_resid(self, layer: int | None = None) -> Stack:
        """The stream that enters a layer, or that leaves the last one, as what the embedding and each branch added.

        Gives (labels, values): `resid_pre[0]`, `mixer_out[0]`, `mlp_out[0]`, …; values [parts, batch, pos, d_model],
        whose sum is `resid_pre` of `layer`, or `resid_post` of the last layer: checked for each sample, within the
        rounding of the stream's dtype.
        Raises SelectionError with the points to capture, and with the reason where the stream is no sum (a norm on the
        stream itself, a factor, several streams, a branch that the map does not have).
        """
        return decomposed(self, layer)

    def to_xarray(
        self, point: str, layer: int | None = None, sample: int | None = None, call: int | None = None
    ) -> Any:
        """`run.to_xarray("resid_mid", 8)`: a DataArray with the axes batch, pos, d_model (`z`: batch, pos, heads, …).

        Without `layer`, every layer captured, with the axis layer in front; with `sample`, that one alone, without
        batch. Of a layer that runs several times, `call` is one of its runs; without it the axis call is in front. Of
        all layers that is the axis run, with the coordinates layer and call. The other coordinates are samples'
        numbers and tokens' positions. bfloat16 becomes float32, exactly.
        Raises SelectionError where samples have different numbers of rows, CaptureError without xarray.
        """
        from hookmap.stores.xarray import to_xarray

        return to_xarray(self, point, layer, sample, call)

    def keys_of(self, point: str, layer: int | None = None, call: int | None = None) -> tuple[Key, ...]:
        """The keys of one point: of this layer and call, or of every layer and call captured. Raises SelectionError."""
        if call is not None:
            key = self.key(point, layer, call)
            return (self.store.key(key[0], key[1], call_of(key)),)
        return self.store.keys_of(*self._named(point, layer))

    def sample(self, number: int) -> Sample:
        """The sample with this number. Raises SelectionError where there is none."""
        return self.store.sample(number)

    def axes(self, point: str, layer: int | None, ndim: int) -> tuple[str, ...]:
        """Names of the `ndim` axes of `self[point, layer]`. Where a model has several streams, the map names them."""
        axes = axes_of(point, ndim)
        several = axes == RESIDUAL_AXES and layer is not None and ndim != len(axes)
        return self.map.kind_of(layer).axes if several and layer is not None else axes

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the run to a new capture folder, for `hookmap.open_store`. Raises StoreError."""
        write_store(self.store, path, self.manifest)
        return Path(path)

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        rows = sum(sample.rows for sample in self.samples)
        samples = counted(len(self), "sample")
        tensors = counted(len(self.keys), "tensor")
        return f"<Capture of {samples}, {rows} rows of {tensors}: {', '.join(self.points)}>"

    def _repr_html_(self) -> str:
        return as_html(repr(self), self.keys, self.samples)

    def _ipython_key_completions_(self) -> list[Any]:
        return completions(self.keys)

    def key(self, point: str, layer: int | None = None, call: int | None = None) -> Key:
        """The key of a name of ours, TransformerLens or nnterp, as `keys` has it where it was captured.

        Negative layers and calls count from the end. Raises SelectionError.
        """
        point, layer = self._named(point, layer)
        if layer is None or not 0 <= layer < self.map.num_layers:
            return key_of(point, layer, call)
        runs = self.map.kind_of(layer).calls
        if runs == 1:
            return key_of(point, layer, None if call in (0, -1) else call)
        return key_of(point, layer, call + runs if call is not None and -runs <= call < 0 else call)

    def _named(self, point: str, layer: int | None) -> tuple[str, int | None]:
        """The point that this name means, and the layer, which it may hold, from 0 up."""
        parsed = parse_point(point)
        if isinstance(parsed, str):
            raise SelectionError(parsed)
        layer = parsed.layer if layer is None else layer
        if layer is not None and -self.map.num_layers <= layer < 0:
            layer += self.map.num_layers
        return parsed.point, layer


def _end(sample: Sample) -> int:
    """One more than the last stored position: no query of the sample attends to a later key."""
    return max((p for p in sample.positions or () if isinstance(p, int)), default=-1) + 1
