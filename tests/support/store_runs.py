"""Runs whose every row is known beforehand, for the tests of the stores. Also a program: it writes one such run.

`python tests/support/store_runs.py FOLDER [background]` writes `demo_run()` to FOLDER, or goes on with what is there,
and prints either "finished" or the error.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hookmap.activations import Activation, Key, Sample, Sink
from hookmap.errors import HookmapError
from hookmap.stores.background import BackgroundWriter
from hookmap.stores.folder import FolderWriter
from hookmap.stores.manifest import MANIFEST, Manifest, manifest_of_run


@dataclass(frozen=True)
class Run:
    """Batches of samples; each sample has a prompt length and a number of rows."""

    tensors: dict[Key, tuple[torch.dtype, int]]
    batches: list[list[tuple[int, int, int]]]
    """(sample, prompt tokens, rows)"""
    shard_tokens: int = 8
    shard_bytes: int = 1 << 20
    shuffle: int | None = None
    """None: as a model does it, pass by pass; else the seed of an arbitrary order"""
    settings: dict[str, object] = field(default_factory=lambda: {"seed": 0})

    @property
    def keys(self) -> tuple[Key, ...]:
        return tuple(self.tensors)

    @property
    def manifest(self) -> Manifest:
        return manifest_of_run(
            self.keys,
            model="tiny",
            architecture="Tiny",
            settings=self.settings,
            shard_tokens=self.shard_tokens,
            shard_bytes=self.shard_bytes,
        )

    @property
    def samples(self) -> dict[int, Sample]:
        found = (self.sample(*one) for batch in self.batches for one in batch)
        return {sample.sample: sample for sample in found}

    def sample(self, number: int, prompt_tokens: int, rows: int) -> Sample:
        ids = tuple(random.Random(number).randrange(50_000) for _ in range(rows + 1))
        return Sample(number, f"prompt {number} \n é 漢", f"text {number}\u2028", ids, prompt_tokens, rows)

    def rows(self, number: int, key: Key) -> torch.Tensor:
        """All rows that this sample has of this tensor: normal numbers, seeded by the two."""
        dtype, width = self.tensors[key]
        seed = torch.Generator().manual_seed(1000 * number + self.keys.index(key))
        rows = self.samples[number].rows
        return (torch.randn(rows, width, generator=seed) * 3).to(dtype)

    def write(self, sink: Sink, skip: frozenset[int] = frozenset()) -> None:
        """Write all batches; leave out batches all of whose samples are in `skip`."""
        for batch in self.batches:
            if not {number for number, _, _ in batch} <= skip:
                for activation in self._activations(batch):
                    sink.write(activation)
                for one in batch:
                    sink.finish(self.sample(*one))

    def _activations(self, batch: list[tuple[int, int, int]]) -> Iterator[Activation]:
        whole = {(number, key): self.rows(number, key) for number, _, _ in batch for key in self.keys}
        passes = self._passes(batch) if self.shuffle is None else self._shuffled(batch, self.shuffle)
        for number, key, start, stop in passes:
            yield Activation(number, *key, start, whole[number, key][start:stop].clone())

    def _passes(self, batch: list[tuple[int, int, int]]) -> Iterator[tuple[int, Key, int, int]]:
        """The prompts in one pass, then a token of each unfinished sample in each pass."""
        for step in range(max(rows - prompt + 1 for _, prompt, rows in batch)):
            for key in self.keys:
                for number, prompt, rows in batch:
                    start, stop = (0, prompt) if step == 0 else (prompt + step - 1, prompt + step)
                    if stop <= rows:
                        yield number, key, start, stop

    def _shuffled(self, batch: list[tuple[int, int, int]], seed: int) -> Iterator[tuple[int, Key, int, int]]:
        chance = random.Random(seed)
        left = {(number, key): 0 for number, _, _ in batch for key in self.keys}
        rows = {number: count for number, _, count in batch}
        while left:
            number, key = chance.choice(sorted(left, key=str))
            start = left.pop((number, key))
            stop = min(rows[number], start + chance.randint(1, 5))
            yield number, key, start, stop
            if stop < rows[number]:
                left[number, key] = stop


def resid(layers: int = 2, width: int = 16, dtype: torch.dtype = torch.bfloat16) -> dict[Key, tuple[torch.dtype, int]]:
    return {(point, layer): (dtype, width) for layer in range(layers) for point in ("resid_pre", "resid_mid")}


def demo_run() -> Run:
    """12 batches of 1 to 3 samples, some 40 kB a batch."""
    chance = random.Random(0)
    batches, number = [], 0
    for _ in range(12):
        batch = []
        for _ in range(chance.randint(1, 3)):
            prompt = chance.randint(1, 12)
            batch.append((number, prompt, prompt + chance.randint(0, 20)))
            number += 1
        batches.append(batch)
    return Run(resid(width=64), batches)


def write_or_resume(path: Path, run: Run, background: bool = False) -> None:
    """What a run with --resume does: begin, or go on. `background`: by a thread, with next to nothing in flight."""
    started = (path / MANIFEST).exists()
    writer = (FolderWriter.resume if started else FolderWriter.create)(path, run.manifest)
    with BackgroundWriter(writer, in_flight=20_000) if background else writer as sink:
        run.write(sink, skip=sink.finished)


def tree(path: Path) -> dict[str, bytes]:
    """Every file under `path`, by its name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


if __name__ == "__main__":
    try:
        write_or_resume(Path(sys.argv[1]), demo_run(), background=len(sys.argv) > 2)
        sys.stdout.write("finished\n")
    except HookmapError as problem:
        sys.stdout.write(f"{problem}\n")
