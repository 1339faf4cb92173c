"""docs/coming-from.md as scripts: what each program's blocks give, on the demo model or on a really trained one."""

import re
from pathlib import Path

import torch

CHECKOUT = Path(__file__).resolve().parents[2]
READ = ("post", "mid", "generated", "ablated", "steered", "patched", "lens")
SWEPT = (0, 15)
"""layers of the sweep on a really trained model"""
ASKED = (*READ, "clamped", "gradient", "swept", "loss", "stacked", "parts", "added")


def script(program: str, folder: Path) -> Path:
    """A file that holds the page's blocks of this program. They name files of the checkout: run it there."""
    page = (CHECKOUT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```python\n# {program}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    path = folder / f"page_{program}.py"
    path.write_text("\n".join(blocks), encoding="utf-8")
    return path


def on_real(program: str, source: str, folder: Path) -> Path:
    """The same on SmolLM2, in float32; of the sweep over all heads, two layers."""
    path = script(program, folder)
    text = path.read_text(encoding="utf-8")
    for old, new in (
        ("hookmap/demo/model", source),
        ("[:, 8]", "[:, 3]"),  # where the digit is
        ('"positions": [8]', '"positions": [3]'),
        ("torch.linspace(-1, 1, 64)", "torch.linspace(-1, 1, 576)"),
        (f'hookmap.open("{source}", ', f'hookmap.open("{source}", dtype="float32", '),
        ("dispatch=True)", "dispatch=True, torch_dtype=torch.float32)"),
        ('over="heads")', f'over="heads", layers={list(SWEPT)})'),
        ("for n, layer in enumerate(layers):", f"for n, layer in [(n, layers[n]) for n in {SWEPT}]:"),
        ("for layer in range(bridge.cfg.n_layers):", f"for layer in {SWEPT}:"),
    ):
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return path


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], close: float = 1e-4) -> list[str]:
    """The variables that are not the same tensor, within float32's rounding over a few dozen sums."""
    return [name for name in found if not same(found[name], expected[name], close)]


def same(found: torch.Tensor, expected: torch.Tensor, close: float) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=close, atol=close)
