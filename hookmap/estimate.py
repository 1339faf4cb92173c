"""How large a capture gets, before it begins. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from hookmap.architecture_map import ArchitectureMap
from hookmap.points import POINTS
from hookmap.selectors import Selector


@dataclass(frozen=True)
class Estimate:
    """How large a capture gets at most: an earlier end of sequence makes it smaller."""

    samples: int
    rows: int
    """of each tensor, over all samples: prompt + generated - 1"""
    tensors: int
    bytes: int
    forward_passes: int

    def __str__(self) -> str:
        size, unit = float(self.bytes), "B"
        for unit in ("B", "kB", "MB", "GB", "TB"):
            if size < 1000 or unit == "TB":
                break
            size /= 1000
        samples = "1 sample" if self.samples == 1 else f"{self.samples} samples"
        tensors = "1 tensor" if self.tensors == 1 else f"{self.tensors} tensors"
        return f"{samples}, {tensors} of up to {self.rows} rows, up to {size:.3g} {unit}"


def estimate(
    architecture_map: ArchitectureMap,
    selectors: Sequence[Selector],
    lengths: Sequence[int],
    max_new_tokens: int,
    itemsize: int,
    batch_size: int,
    d_mlp: int | None = None,
) -> Estimate:
    """Pure. `lengths`: tokens of each prompt; `itemsize`: bytes of one number in the model's dtype.

    `d_mlp`: width of `mlp_post`, which no map knows.
    """
    rows = sum(length + max_new_tokens - 1 for length in lengths)
    keys = max(lengths, default=0) + max_new_tokens - 1
    width = sum(_width(architecture_map, selector, keys, d_mlp) for selector in selectors)
    passes = max_new_tokens * -(-len(lengths) // batch_size)
    return Estimate(len(lengths), rows, len(selectors), rows * width * itemsize, passes)


def _width(architecture_map: ArchitectureMap, selector: Selector, keys: int, d_mlp: int | None) -> int:
    """Numbers in one row of a point."""
    axes = POINTS[selector.point.partition(".")[0]].axes
    mlp = architecture_map.kind_of(selector.layer).mlp if selector.layer is not None else None
    heads = selector.terms[-1].heads
    if heads is not None:
        return heads.groups * (heads.stop - heads.start)
    widths = {
        "d_vocab": architecture_map.d_vocab,
        "key": keys * (architecture_map.num_heads or 1),
        "d_mlp": d_mlp,
        "experts": mlp.experts if mlp else None,
        "k": mlp.experts_per_token if mlp else None,
    }
    return next((width for axis in axes if (width := widths.get(axis))), architecture_map.d_model)
