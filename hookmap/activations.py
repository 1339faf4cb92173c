"""What a capture yields: rows of one point of one layer, for one sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

Key = tuple[str, int | None] | tuple[str, int, int]
"""(point, layer), or (point, layer, call) of a layer that runs several times in one forward pass, the call 0-based.

The layer is None for points of the whole model: embed, final_norm, logits.
"""


def key_of(point: str, layer: int | None, call: int | None = None) -> Key:
    """The key of these; `call`: None where the layer runs once."""
    return (point, layer) if layer is None or call is None else (point, layer, call)


def call_of(key: Key) -> int | None:
    """The call in a key; None where the layer runs once."""
    return key[2] if len(key) == 3 else None


@dataclass(frozen=True)
class Activation:
    """Consecutive rows of one tensor of one sample, as one forward pass saw them."""

    sample: int
    """which prompt of the run, 0-based"""
    point: str
    layer: int | None
    start: int
    """which row of the sample the first one is, 0-based; row n is of token n, unless the run selects positions"""
    tensor: "torch.Tensor"
    """[tokens, d], in the model's own dtype, a copy that nobody else writes to"""
    call: int | None = None
    """which run of the layer in one forward pass; None where it runs once"""

    @property
    def key(self) -> Key:
        return key_of(self.point, self.layer, self.call)


@dataclass(frozen=True)
class Sample:
    """One prompt and what the run made of it."""

    sample: int
    prompt: str
    text: str
    """the generated part only, without special tokens"""
    token_ids: tuple[int, ...]
    """prompt, then generated tokens, end of sequence included, no padding"""
    prompt_tokens: int
    """how many of `token_ids` are the prompt"""
    rows: int
    """rows of each captured tensor: the tokens that were fed to the model. The last generated token never is."""
    positions: tuple[int, ...] | Literal["mean"] | None = None
    """which token each row is of, ascending; None: row n is of token n; "mean": the one row is a mean over tokens"""
    id: str | None = None
    """the caller's own name of the sample, the same in every run over the same data"""
    labels: Mapping[str, Any] | None = None
    """what the data set says of the sample besides its prompt, as plain JSON data"""
    image_positions: tuple[int, ...] | None = None
    """which of `token_ids` stand for parts of an image, ascending; None where the prompt has no image"""
    pictures: tuple[Mapping[str, str], ...] | None = None
    """of each image, in order: its sha256, and the name of its file where it has one"""
    encoder_token_ids: tuple[int, ...] | None = None
    """of an encoder-decoder: what its encoder read of the prompt. `token_ids` are the decoder's then, and have rows"""

    @property
    def row_positions(self) -> Sequence[int]:
        """Which token each row is of; none where its row is a mean."""
        return () if self.positions == "mean" else range(self.rows) if self.positions is None else self.positions


def size_of(rows: "torch.Tensor") -> int:
    """Bytes of rows, dense or sparse, as a shard holds them."""
    if not rows.is_sparse:
        return rows.nbytes
    return int(rows._nnz()) * (rows.dtype.itemsize + 4) + 8 * rows.shape[0]


class Sink(Protocol):
    """What takes activations as they come: memory, or a folder of shards."""

    def write(self, activation: Activation) -> None:
        """Take rows; they come in order of `start` within a sample, tensors interleaved."""

    def finish(self, sample: Sample) -> None:
        """All rows of this sample are written."""

    def abandon(self) -> None:
        """Forget the rows of samples that are not finished: they come again, from their first row on."""
