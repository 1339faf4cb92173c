"""docs/coming-from.md: the blocks of each peer, run in its environment, give the tensors that hookmap's give."""

import os
import runpy
import subprocess
from pathlib import Path

import pytest
from programs import PEERS
from safetensors.torch import load_file
from support.coming_from import ASKED, CHECKOUT, READ, differing, script

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
    peer, (written, asked) = PEERS[name], NAMES[name]
    if not peer.python.exists():
        pytest.skip(f"{name} is not installed: make test-peers")
    monkeypatch.chdir(CHECKOUT)
    page, file = script(written, tmp_path), tmp_path / "found.safetensors"
    with page.open("a", encoding="utf-8") as end:
        end.write(_SAVE.format(asked=ASKED, file=str(file)))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([peer.python, page], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(file)
    assert set(theirs) == asked
    assert differing(theirs, runpy.run_path(str(script("hookmap", tmp_path)))) == []
