"""docs/coming-from.md as scripts: what each program's blocks give."""

import re
from pathlib import Path

import torch

CHECKOUT = Path(__file__).resolve().parents[2]
READ = ("post", "mid", "generated", "ablated", "steered", "patched", "lens")
ASKED = (*READ, "clamped", "gradient", "swept", "loss", "stacked", "parts", "added")


def script(program: str, folder: Path) -> Path:
    """A file that holds the page's blocks of this program. They name files of the checkout: run it there."""
    page = (CHECKOUT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```python\n# {program}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    path = folder / f"page_{program}.py"
    path.write_text("\n".join(blocks), encoding="utf-8")
    return path


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], close: float = 1e-4) -> list[str]:
    """The variables that are not the same tensor, within float32's rounding over a few dozen sums."""
    return [name for name in found if not same(found[name], expected[name], close)]


def same(found: torch.Tensor, expected: torch.Tensor, close: float) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=close, atol=close)
