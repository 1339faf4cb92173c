"""A capture of ten million samples: what opening, finding, resuming and listing it takes.

`python benchmarks/many_samples.py FOLDER`: a fast disk with 5 GB and 200,000 files to spare. The samples are invented:
one row each, 64 in a group, written by the store's own code for its tables; the shards are real and all alike.
Each step runs in a process of its own; its peak memory is above what the imports took.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from machine import describe

from hookmap.activations import Activation, Sample
from hookmap.stores import open_store
from hookmap.stores.folder import FolderWriter
from hookmap.stores.manifest import MANIFEST, Manifest, manifest_of_run, read_manifest
from hookmap.stores.shard import SHARD_FOLDER, ShardInfo, sha256_of, shard_name
from hookmap.stores.table import SAMPLES, SHARDS, Entry, Span, encode_group, encode_shards

SAMPLES_IN_ALL = 10_000_000
GROUP = 64
KEYS = [("resid_mid", 8), ("resid_mid", 16)]
WIDTH = 8
WORDS = [f"How many apples are {n} apples and {m} more? Say the number alone." for n in range(8) for m in range(8)]


Step: TypeAlias = Callable[[], None]


def sample(number: int) -> Sample:
    ids = tuple(range(number % 1000, number % 1000 + 12))
    return Sample(number, WORDS[number % 64], f"{number % 97}.", ids, 10, rows=1, positions=(9,), id=f"apples/{number}")


def make(folder: Path, count: int) -> None:
    """The first group by the writer, the rest by its own functions for tables: no fsync and no tensors for each."""
    with FolderWriter.create(folder, manifest_of_run(KEYS, model="invented")) as writer:
        for number in range(GROUP):
            for point, layer in KEYS:
                writer.write(Activation(number, point, layer, 0, torch.randn(1, WIDTH)))
        for number in range(GROUP):
            writer.finish(sample(number))
    first = folder / SHARD_FOLDER / shard_name(0)
    data, digest = first.read_bytes(), sha256_of(first)
    with open(folder / SAMPLES, "ab") as samples, open(folder / SHARDS, "ab") as shards:
        for shard in range(1, count // GROUP):
            numbers = range(shard * GROUP, (shard + 1) * GROUP)
            spans = ((Span(shard, 0, len(KEYS), row, 0, 1),) for row in range(GROUP))
            entries = [Entry(sample(number), (*span,)) for number, span in zip(numbers, spans, strict=True)]
            samples.write(encode_group(entries, shard + 1))
            shards.write(encode_shards([ShardInfo(shard, len(data), digest)]))
            (folder / SHARD_FOLDER / shard_name(shard)).write_bytes(data)
    found = json.loads((folder / MANIFEST).read_text())
    found.update(finished=False, sha256=None)
    (folder / MANIFEST).write_text(json.dumps(found))


def opening(folder: Path) -> Step:
    return lambda: check(len(open_store(folder)) % GROUP == 0)


def one_sample(folder: Path) -> Step:
    store = open_store(folder)
    return lambda: check(store.read(len(store) // 3, "resid_mid", 8).shape == (1, WIDTH))


def by_id(folder: Path) -> Step:
    store = open_store(folder)
    return lambda: check(store.by_id(f"apples/{len(store) // 3}").sample == len(store) // 3)


def by_id_again(folder: Path) -> Step:
    store = open_store(folder)
    store.by_id("apples/7")
    return lambda: check(store.by_id(f"apples/{len(store) // 3}").sample == len(store) // 3)


def resuming(folder: Path) -> Step:
    """Until the run knows which samples are left, and the end of it."""
    found: Manifest = read_manifest(folder)

    def run() -> None:
        writer = FolderWriter.resume(folder, found)
        finished = writer.finished
        check(7 in finished and len(finished) not in finished)
        writer.close(finished=False)

    return run


def inspecting(folder: Path) -> Step:
    from click.testing import CliRunner

    from hookmap.cli.main import main

    return lambda: check("more: --texts" in CliRunner().invoke(main, ["inspect", str(folder)]).stderr)


STEPS: dict[str, tuple[str, Callable[[Path], Step]]] = {
    "opening": ("`open_store` and `len`", opening),
    "one_sample": ("the row of one sample, the store being open", one_sample),
    "by_id": ("the first `by_id`", by_id),
    "by_id_again": ("another `by_id`", by_id_again),
    "resuming": ("`FolderWriter.resume`, `finished`, close", resuming),
    "inspecting": ("`hookmap inspect`, the first page", inspecting),
}


def check(right: bool) -> None:
    if not right:
        raise SystemExit("a step does not give what it should")


def one(name: str, folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = STEPS[name][1](folder)
    wall, processor = time.perf_counter(), time.process_time()
    run()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([wall, processor, grown * 1024]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=SAMPLES_IN_ALL)
    parser.add_argument("--keep", action="store_true", help="do not delete it afterwards; it is used again")
    parser.add_argument("--only", choices=STEPS, action="append")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        one(given.step, given.folder)
        return
    folder: Path = given.folder / "ten-million"
    if not folder.exists():
        begun = time.perf_counter()
        make(folder, given.samples)
        print(f"made in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    size = (folder / SAMPLES).stat().st_size
    print(describe(), end="\n\n")
    print(f"{given.samples:,} samples, a table of {size / 1e9:.2f} GB, {given.samples // GROUP:,} shards\n")
    print("| step | s | of it processor, s | peak memory, MB |\n|---|---|---|---|")
    for name in given.only or STEPS:
        command = [sys.executable, __file__, str(folder), "--step", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        wall, processor, peak = json.loads(done.stdout)
        print(f"| {STEPS[name][0]} | {wall:.2g} | {processor:.2g} | {peak / 1e6:.0f} |", flush=True)
    if not given.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
