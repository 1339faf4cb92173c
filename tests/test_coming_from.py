"""docs/coming-from.md: its blocks run, and those of other programs give the tensors that hookmap's give."""

import runpy
from pathlib import Path

import pytest
import torch
from support.coming_from import ASKED, CHECKOUT, differing, script

pytestmark = pytest.mark.slow


def test_the_blocks_of_nnsight_and_of_hookmap_give_the_same_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKOUT)

    def answers(program: str) -> dict[str, torch.Tensor]:
        found = runpy.run_path(str(script(program, tmp_path)))
        return {name: found[name] for name in ASKED}

    ours = answers("hookmap")
    assert differing(answers("nnsight"), ours) == []
    assert differing({"steered": ours["ablated"]}, ours) == ["steered"]
