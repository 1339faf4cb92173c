"""Makes the pictures of docs/probes.md and docs/experiments.md, and prints the tables beside them.

python scripts/draw_evaluation.py [FOLDER]   a few minutes; in FOLDER what was done once is not done again
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from hookmap.cli.main import main

DOCS = Path(__file__).resolve().parent.parent / "docs"
PROBES = (
    ("probe sums --label odd -o all", "auroc.png", "probe-auroc.png"),
    (
        "probe sums --label odd --layers 0,4,8,12,16,19 --pool each --positions -12: --method mean_difference "
        "-o by-position",
        "auroc-resid_post.png",
        "probe-positions.png",
    ),
)
EXPERIMENT = ("differences", "auroc-mean_answer-resid_post")


def run(command: str) -> None:
    """`hookmap COMMAND`, in this process."""
    print(f"$ hookmap {command}", flush=True)
    main(command.split(), standalone_mode=False)


def draw() -> None:
    """In the working directory."""
    if not Path("sums").exists():
        exec(compile(problems_of_the_page(), "probes.md", "exec"), {})  # noqa: S102 - our own page
    for command, made, picture in PROBES:
        run(command)
        shutil.copy(Path(command.split()[-1]) / made, DOCS / "images" / picture)
    run("experiment demo -o emotions")
    for name in EXPERIMENT:
        shutil.copy(Path("emotions") / f"{name}.png", DOCS / "images" / f"experiment-{name}.png")


def problems_of_the_page() -> str:
    """The page's capture of sums, with five times as many problems and the bundled model from anywhere."""
    from hookmap.demo import MODEL_PATH

    page = (DOCS / "probes.md").read_text(encoding="utf-8")
    blocks: list[str] = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (code,) = (text for text in blocks if "(120, " in text)
    return code.replace("(120, ", "(600, ").replace("hookmap/demo/model", str(MODEL_PATH))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as fresh:
        os.chdir(sys.argv[1] if len(sys.argv) > 1 else fresh)
        draw()
        os.chdir(DOCS)
