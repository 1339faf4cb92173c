"""How fast the store writes and reads, against `dd` and a plain read: `python benchmarks/store.py [FOLDER]`.

235 MB of bf16: 28 layers x 2 points x 1,024 numbers x 2,048 tokens. The ways take turns, and each ratio is the median
over the rounds of a way's speed divided by that of `dd` (or of the plain read) in the same round. Every write is a
process of its own, so that its peak memory is its own; its time does not count the imports.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe

from hookmap.activations import Activation, Sample
from hookmap.stores import open_store
from hookmap.stores.background import BackgroundWriter
from hookmap.stores.folder import FolderWriter
from hookmap.stores.manifest import manifest_of_run

LAYERS, POINTS, WIDTH, TOKENS, ROUNDS = 28, ("resid_pre", "resid_mid"), 1024, 2048, 5
KEYS = [(point, layer) for layer in range(LAYERS) for point in POINTS]
SIZE = len(KEYS) * WIDTH * 2 * TOKENS
WAYS = {
    "token by token": (1, False),
    "token by token, a thread writes": (1, True),
    "32 tokens at a time, a thread writes": (32, True),
}


def write(path: Path, way: str) -> None:
    """Write the capture, and print the seconds and the bytes of peak memory that it took."""
    step, background = WAYS[way]
    torch.set_num_threads(1)
    rows = {key: torch.randn(step, WIDTH).bfloat16() for key in KEYS}
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    begun = time.perf_counter()
    writer = FolderWriter.create(path, manifest_of_run(KEYS))
    with BackgroundWriter(writer) if background else writer as sink:
        for start in range(0, TOKENS, step):
            for point, layer in KEYS:
                sink.write(Activation(0, point, layer, start, rows[point, layer].clone()))
        sink.finish(Sample(0, "", "", tuple(range(TOKENS + 1)), 1, TOKENS))
    seconds = time.perf_counter() - begun
    print(json.dumps([seconds, memory("VmHWM") - before]))


def memory(name: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def dd(path: Path) -> float:
    """Seconds in which dd writes as many bytes, 16 MiB at a time, and syncs once."""
    block = 2**24
    begun = time.perf_counter()
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={block}", f"count={SIZE // block}", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)
    return (time.perf_counter() - begun) * SIZE / (SIZE // block * block)


def cool(path: Path) -> None:
    """Let the kernel forget what it holds of these files."""
    for file in path.rglob("*.safetensors"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(path: Path) -> None:
    """All shards, one after the other, 1 MiB at a time."""
    piece = bytearray(1 << 20)
    for file in sorted(path.rglob("*.safetensors")):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(piece):
                pass


def one_slice(path: Path) -> None:
    """All rows of one point of one layer."""
    assert open_store(path).read(0, "resid_mid", 14).shape == (TOKENS, WIDTH)


def training(path: Path) -> None:
    """All rows of all tensors in random order, as a probe or an autoencoder takes them."""
    rows = 0
    for batch in open_store(path).dataset(POINTS, batch_size=256, shuffle_rows=512):
        rows += len(batch["resid_mid.0"])
    assert rows == TOKENS


def one_training(path: Path) -> None:
    """All rows of one point of one layer in random order: a 56th of the bytes."""
    assert sum(len(batch["resid_mid.14"]) for batch in open_store(path).dataset("resid_mid", 14)) == TOKENS


def seconds_of(run: Callable[[Path], None], path: Path) -> float:
    cool(path)
    begun = time.perf_counter()
    run(path)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, help="on the disk to measure; a temporary folder by default")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        write(given.folder, given.write)
        return
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    written: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    read: dict[str, list[float]] = {}
    speeds = []
    for number in range(ROUNDS + 1):
        base = dd(folder / "dd")
        (folder / "dd").unlink()
        if number:
            speeds.append(SIZE / base)
        for way in WAYS:
            path = folder / "capture"
            command = [sys.executable, __file__, str(path), "--write", way]
            seconds, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            if number:
                written[way].append((seconds, base / seconds, peak))
            if way != list(WAYS)[-1]:
                shutil.rmtree(path)
        on_disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        for run in (plain_read, one_slice, training, one_training):
            read.setdefault(run.__name__, []).append(seconds_of(run, path))
        shutil.rmtree(path)
    shutil.rmtree(folder)
    print(describe(), end="\n\n")
    print(
        f"{SIZE / 1e6:.0f} MB; median of {ROUNDS} interleaved rounds; dd with fsync: {median(speeds) / 1e6:.0f} MB/s\n"
    )
    print("| way | over dd | MB/s | peak memory, MB |")
    print("|---|---|---|---|")
    for way, found in written.items():
        seconds, ratios, peaks = zip(*found, strict=True)
        print(f"| {way} | {median(ratios):.2f} | {SIZE / median(seconds) / 1e6:.0f} | {median(peaks) / 1e6:.0f} |")
    print(f"\nBytes on disk over bytes of the tensors: {on_disk / SIZE:.4f}.")
    plain = read["plain_read"]
    print("\n| cold read | ms | MB/s | over a plain read |")
    print("|---|---|---|---|")
    for name, what, size in (
        ("plain_read", "all shards, one after the other", SIZE),
        ("training", "the data set: all tensors, all rows at random", SIZE),
        ("one_slice", "one point of one layer", SIZE // len(KEYS)),
        ("one_training", "the data set: one point of one layer, all rows at random", SIZE // len(KEYS)),
    ):
        ratio = median([size / SIZE * base / mine for base, mine in zip(plain, read[name], strict=True)])
        print(f"| {what} | {median(read[name]) * 1e3:.0f} | {size / median(read[name]) / 1e6:.0f} | {ratio:.2f} |")


def median(values: "list[float] | tuple[float, ...]") -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
