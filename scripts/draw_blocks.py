"""Draws the pictures of the docs from the shipped maps: `python scripts/draw_blocks.py`."""

from pathlib import Path

from hookmap.discovery.library import load_map
from hookmap.maps.block_picture import block_svg

PICTURES = {
    "sequential": "Qwen3ForCausalLM",
    "sandwich": "Gemma2ForCausalLM",
    "post_norm": "Olmo2ForCausalLM",
    "parallel": "GPTJForCausalLM",
    "mixer_only": "MambaForCausalLM",
    "moe": "Qwen3MoeForCausalLM",
}


def pictures() -> dict[str, str]:
    """File name -> SVG."""
    maps = {name: load_map(architecture) for name, architecture in PICTURES.items()}
    return {f"{name}.svg": block_svg(found, found.kinds[0]) for name, found in maps.items()}


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent.parent / "docs" / "images"
    for name, svg in pictures().items():
        (folder / name).write_text(svg, encoding="utf-8")
