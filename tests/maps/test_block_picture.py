"""The pictures of blocks show every point where the map has it, and those in the docs are of today's maps."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from hookmap.discovery.library import load_map
from hookmap.maps.block_picture import block_svg

CHECKOUT = Path(__file__).resolve().parents[2]
STREAM = ("resid_pre", "resid_mid", "resid_post")
BRANCHES = ("mixer_in", "mixer_out", "mlp_in", "mlp_out")


def _texts(svg: str) -> list[str]:
    return [element.text or "" for element in Xml.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "GPTJForCausalLM", "Gemma2ForCausalLM", "MambaForCausalLM"])
def test_every_point_of_the_block_is_in_the_picture_once(name: str) -> None:
    found = load_map(name)
    kind = found.kinds[0]
    texts = _texts(block_svg(found, kind))
    for point in (*STREAM, *BRANCHES):
        assert texts.count(point) == (point in kind.points), point
    norms = {"GPTJForCausalLM": 2, "Gemma2ForCausalLM": 4, "MambaForCausalLM": 1, "Qwen3ForCausalLM": 2}
    assert texts.count("norm") == norms[name]


def test_the_pictures_of_the_docs_are_of_the_shipped_maps() -> None:
    spec = importlib.util.spec_from_file_location("draw_blocks", CHECKOUT / "scripts" / "draw_blocks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wanted = module.pictures()
    drawn = {name: (CHECKOUT / "docs" / "images" / name).read_text(encoding="utf-8") for name in wanted}
    assert drawn == wanted, "draw them again: python scripts/draw_blocks.py"
