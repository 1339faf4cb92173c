"""Rows of a session as a safetensors file that is written while it is sent: one piece is in memory at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hookmap.activations import Key
from hookmap.stores.interface import Store, Tokens, rows_of
from hookmap.stores.ledger import tensor_name
from hookmap.stores.shard import Block, bytes_of, encode_header

PIECE = 4 * 2**20
"""bytes of rows that are in memory at once; at least one row"""


@dataclass(frozen=True)
class Download:
    """One tensor of one sample as a file; made by `download_of`."""

    store: Store
    sample: int
    key: Key
    rows: Sequence[int]
    head: bytes
    row_bytes: int
    piece: int = PIECE

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.head) + len(self.rows) * self.row_bytes

    def between(self, start: int, end: int) -> Iterator[bytes]:
        """The file's bytes from `start` to before `end`, in pieces. Raises StoreError."""
        head, skipped = self.head[start:end], max(0, start - len(self.head))
        left = end - start - len(head)
        if not left:
            yield head
            return
        first, inside = divmod(skipped, self.row_bytes)
        step = max(1, self.piece // self.row_bytes)
        for row in range(first, len(self.rows), step):
            data = bytes_of([self.store.rows_at(self.sample, self.key, self.rows[row : row + step])])
            piece = data[inside : inside + left]
            yield head + piece
            head, inside, left = b"", 0, left - len(piece)
            if not left:
                return


def download_of(
    store: Store, sample: int, point: str, layer: int | None, tokens: Tokens, call: int | None = None
) -> Download:
    """The file of these tokens' rows. Raises SelectionError for what the store does not hold."""
    key = store.key(point, layer, call)
    rows = rows_of(tokens, store.sample(sample))
    row = store.rows_at(sample, key, range(0))
    block = Block(tensor_name(key), len(rows), [row])
    return Download(store, sample, key, rows, encode_header([block]), block.bytes // max(1, len(rows)))
