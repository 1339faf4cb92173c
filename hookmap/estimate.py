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
        noun = "sample" if self.samples == 1 else "samples"
        return f"{self.samples} {noun}, {self.tensors} tensors of up to {self.rows} rows, up to {size:.3g} {unit}"


def estimate(
    architecture_map: ArchitectureMap,
    selectors: Sequence[Selector],
    lengths: Sequence[int],
    max_new_tokens: int,
    itemsize: int,
    batch_size: int,
) -> Estimate:
    """Pure. `lengths`: tokens of each prompt; `itemsize`: bytes of one number in the model's dtype."""
    rows = sum(length + max_new_tokens - 1 for length in lengths)
    width = sum(_width(architecture_map, selector.point) for selector in selectors)
    passes = max_new_tokens * -(-len(lengths) // batch_size)
    return Estimate(len(lengths), rows, len(selectors), rows * width * itemsize, passes)


def _width(architecture_map: ArchitectureMap, point: str) -> int:
    if "d_vocab" in POINTS[point.partition(".")[0]].axes and architecture_map.d_vocab:
        return architecture_map.d_vocab
    return architecture_map.d_model
