"""Peak memory of a capture above plain `generate`: `python benchmarks/memory.py`.

All layers x 2 points of the narrow model, 512 and 2,048 new tokens, to disk. Each way runs in a process of its own;
the figure is the peak of its resident memory from the moment the model is loaded and has generated once.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WARM, PROMPT = 8, list(range(5, 37))


def child(way: str, new: int) -> None:
    import torch
    from capture import POINTS
    from narrow import ALL, build, plain

    import hookmap

    torch.set_num_threads(1)
    model = build("narrow", torch.float32, "cpu")
    hm = hookmap.open(model)
    folder = Path(tempfile.mkdtemp())

    def run(count: int, name: str) -> None:
        if way == "plain":
            plain(model, count)
        else:
            hm.capture([PROMPT], POINTS, ALL, count, store=folder / name, engine=way)  # type: ignore[arg-type]

    run(WARM, "warm")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    run(new, "run")
    shutil.rmtree(folder)
    print((status("VmHWM") - before) / 1e3)


def status(name: str) -> int:
    """Of this process, kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))


def main() -> None:
    from machine import describe

    print(describe(), end="\n\n")
    print("| way | peak at 512 tokens, MB | at 2,048 tokens, MB |\n|---|---|---|")
    for way in ("plain", "hooks", "nnsight"):
        peaks = [measured(way, new) for new in (512, 2048)]
        name = "plain generate" if way == "plain" else f"hookmap, {way} engine"
        print(f"| {name} | {peaks[0]:.0f} | {peaks[1]:.0f} |")


def measured(way: str, new: int) -> float:
    command = [sys.executable, __file__, way, str(new)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else main()
