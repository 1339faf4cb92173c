"""docs/coming-from.md: the blocks of each peer, run in its environment, give the tensors that hookmap's give.

`make real` runs TransformerLens's on a really trained model, too.
"""

import os
import runpy
import subprocess
from pathlib import Path

import pytest
import torch
from programs import PEERS
from safetensors.torch import load_file
from support.coming_from import ASKED, CHECKOUT, READ, SWEPT, differing, on_real, script

_SAVE = """
import torch
from safetensors.torch import save_file
found = {{name: globals()[name] for name in {asked} if name in globals()}}
save_file({{name: torch.as_tensor(of).detach().contiguous() for name, of in found.items()}}, {file!r})
"""
NAMES = {"transformer-lens": ("TransformerLens", set(ASKED)), "nnterp": ("nnterp", {*READ} - {"mid"})}


@pytest.mark.parametrize("name", NAMES)
def test_the_blocks_of_a_peer_give_the_tensors_of_hookmaps(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKOUT)
    written, asked = NAMES[name]
    theirs = said(name, script(written, tmp_path))
    assert set(theirs) == asked
    assert differing(theirs, runpy.run_path(str(script("hookmap", tmp_path)))) == []


@pytest.mark.real
def test_on_a_really_trained_model_transformer_lens_gives_the_same_tensors_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "HOOKMAP_REAL_MODEL" not in os.environ:
        pytest.skip("no real model here: run `make real`")
    monkeypatch.chdir(CHECKOUT)
    source = os.environ["HOOKMAP_REAL_MODEL"]
    theirs = said("transformer-lens", on_real("TransformerLens", source, tmp_path))
    theirs["swept"] = theirs["swept"][:, SWEPT]
    assert set(theirs) == set(ASKED)
    assert differing(theirs, runpy.run_path(str(on_real("hookmap", source, tmp_path))), 1e-3) == []


def said(name: str, page: Path) -> dict[str, torch.Tensor]:
    """What a script leaves in the peer's environment."""
    peer, file = PEERS[name], page.with_suffix(".safetensors")
    if not peer.python.exists():
        pytest.skip(f"{name} is not installed: make test-peers")
    with page.open("a", encoding="utf-8") as end:
        end.write(_SAVE.format(asked=ASKED, file=str(file)))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([peer.python, page], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, torch.Tensor] = load_file(file)
    return found
