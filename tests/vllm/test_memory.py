"""A capture on vLLM into a folder holds the requests that run together, and not the tokens that have run."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import resource
import sys
import hookmap
from support.on_vllm import POINTS, SETTINGS, prompts

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

folder, stores = sys.argv[1:]
with hookmap.open_on_vllm(folder, eager=True, max_num_seqs=16, **SETTINGS) as model:
    sizes = []
    for count in (100, 900):
        run = model.capture(prompts(count, 90), POINTS, max_new_tokens=0, store=f"{stores}/{count}")
        sizes.append(peak())
    written = sum(run.read(0, *key).nbytes for key in run.keys) * len(run)
print(written, sizes[1] - sizes[0])
"""


def test_memory_is_flat_in_tokens(checkpoint: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint), str(tmp_path)], cwd=Path(__file__).parent.parent,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    written, grown = map(int, run.stdout.split()[-2:])
    assert written > 250 * 2**20
    assert grown < 25 * 2**20, grown / written
