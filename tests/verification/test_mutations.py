"""A map with one wrong selector fails, whichever point it is of and with or without the relations that name it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from support import invented_coupled, invented_streams, plain_hooks
from support.invented import Ladder
from support.mutants import mutants, survivors
from torch import nn

from hookmap.discovery.discover import discover
from hookmap.verification.verify import redraw, verify

FEW = ("llama", "falcon_7b")
OF_INVENTED = sorted(
    path
    for path in (Path(__file__).parent.parent / "discovery").glob("test_*.py")
    if "support.invented import" in path.read_text()
)
_EYE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4, "intermediate_size": 48,
    "image_size": 28,
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.many) for name in plain_hooks.FAMILIES]
)
@pytest.mark.slow
def test_no_wrong_map_passes(name: str) -> None:
    model = plain_hooks.build(name)
    redraw(model)
    found = discover(model)
    assert verify(model, architecture_map=found).passed
    assert sum(1 for _ in mutants(found, model)) > 10
    assert not survivors(found, model)


@pytest.mark.slow
@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize(
    "make",
    [
        Ladder,  # no boundary exposes its attention weights
        lambda: Ladder(invented_streams.InterpolatedOfEach),
        lambda: Ladder(invented_streams.AdaptedBetween),
        lambda: invented_coupled.Both(invented_coupled.Reversible),
    ],
)
def test_no_wrong_map_of_an_invented_model_passes(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    found = discover(model)
    assert verify(model, architecture_map=found).passed
    assert not survivors(found, model)


@pytest.mark.many
@pytest.mark.parametrize("file", OF_INVENTED, ids=lambda path: path.stem)
def test_no_wrong_map_of_the_invented_models_of_a_file_passes(file: Path) -> None:
    """The count is in what the command prints: held 11 models against 616 wrong maps."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--mutants", str(file)]
    result = subprocess.run(command, cwd=file.parent.parent.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "held " in result.stdout


_TOWERS: dict[str, Callable[[], Any]] = {
    "siglip": lambda: plain_hooks.redrawn(tf.SiglipVisionModel(tf.SiglipVisionConfig(**_EYE))),
    "qwen3_vl": lambda: plain_hooks.build_multimodal("qwen3_vl"),  # its stream has no batch, and its weights no place
    "llava": lambda: plain_hooks.build_multimodal("llava"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name == "qwen3_vl" else pytest.param(name, marks=pytest.mark.many) for name in _TOWERS]
)
def test_no_wrong_map_of_a_tower_passes(name: str) -> None:
    model = _TOWERS[name]().eval()
    redraw(model)
    found = discover(model, part="vision")
    assert verify(model, part="vision").passed
    assert sum(1 for _ in mutants(found, model)) > 10
    assert not survivors(found, model)


@pytest.mark.usefixtures("seeded")
@pytest.mark.slow
def test_keys_in_a_tuple_beside_the_stream_make_no_map_wrong_and_no_wrong_map_right() -> None:
    """No term names them: what reads them is checked with those of the same run."""
    model = invented_coupled.ValuesOfPrevious(invented_coupled.Borrowed).eval()
    found = discover(model)
    result = verify(model, architecture_map=found)
    assert result.passed, [each for each in result.checks if not each.passed]
    assert any("and the tuples that enter rungs.1 determine mixer_out" in each.detail for each in result.checks)
    assert not survivors(found, model)
