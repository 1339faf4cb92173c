"""Peak memory of `hookmap probe` beside the size of the capture: `python benchmarks/probe_memory.py [GB]`.

Writes a capture of random rows of that size (12 layers, d 1,024, 160 rows a sample), probes it in a process of its own
with each pool, and removes it.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from hookmap.activations import Activation, Sample
from hookmap.stores.folder import FolderWriter
from hookmap.stores.manifest import manifest_of_run

LAYERS, WIDTH, ROWS, PROMPT = 12, 1024, 160, 100
RUNS = (
    ("--pool", "last"),
    ("--pool", "mean"),
    ("--pool", "each", "--positions", "-64:0", "--method", "mean_difference"),
)
KEYS = [("resid_post", layer) for layer in range(LAYERS)]
CODE = "import sys; from hookmap.cli.main import main; main(sys.argv[1:])"


def write(folder: Path, samples: int) -> int:
    """Random rows; half of the samples are called correct. Returns bytes on disk."""
    with FolderWriter.create(folder, manifest_of_run(KEYS, model=None)) as writer:
        for number in range(samples):
            for point, layer in KEYS:
                writer.write(Activation(number, point, layer, 0, torch.randn(ROWS, WIDTH)))
            ids = (number, *range(ROWS))
            writer.finish(Sample(number, f"q{number}", "", ids, PROMPT, ROWS, None, None, {"correct": number % 2 == 0}))
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def probe(store: Path, *options: str) -> tuple[float, float]:
    """Peak of resident memory in GB, and seconds, of a process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", CODE, "probe", str(store), *options], stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"hookmap probe {' '.join(options)} failed with status {status}")
    return used.ru_maxrss / 1e6, time.perf_counter() - start


if __name__ == "__main__":
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 2.5
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "capture"
        start = time.perf_counter()
        size = write(store, max(20, round(gigabytes * 1e9 / (LAYERS * WIDTH * ROWS * 4))))
        print(f"capture {size / 1e9:.2f} GB on disk, written in {time.perf_counter() - start:.0f} s", flush=True)
        for options in RUNS:
            peak, seconds = probe(store, *options)
            print(f"{' '.join(options):60} peak {peak:.2f} GB, {seconds:.0f} s", flush=True)
