"""Custom code that runs its blocks several times: refused unless trusted, then captured run by run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import looped_code
from support.raises import raises
from torch import Tensor, nn

import hookmap

pytestmark = pytest.mark.slow
TURNS = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    looped_code.write_model(tmp_path / "spool", TURNS)
    return tmp_path / "spool"


def test_looped_code_that_is_not_trusted_is_not_executed(folder: Path) -> None:
    for use in (hookmap.open, hookmap.discover, hookmap.verify):
        with raises(hookmap.HookmapError, "trust-remote-code"):
            use(folder)
    assert not (folder / "ran").exists()


def test_its_map_says_the_order_and_what_is_between(folder: Path) -> None:
    found = hookmap.discover(folder, trust_remote_code=True)
    assert found.layer_names == looped_code.LAYERS
    assert found.runs == "0, 3 x (1-2), 3"
    assert found.between == {
        "0 -> 1": "bind(cat(weights, resid_post[0]))",
        "2 -> 1": "bind(cat(resid_post[2], resid_post[0]))",
    }
    assert hookmap.open(folder, trust_remote_code=True, device="cpu").map.kinds == found.kinds
    assert hookmap.verify(folder, trust_remote_code=True).passed
    assert hookmap.verify(folder, trust_remote_code=True, random_weights=True).passed


def test_each_run_is_captured_under_generate_as_plain_hooks_see_it(folder: Path) -> None:
    hm = hookmap.open(folder, trust_remote_code=True, device="cpu")
    points = ["resid_pre", "mixer_in", "mixer_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"]
    run = hm.capture("to be or not", points, max_new_tokens=4)
    seen: dict[tuple[str, int], list[Tensor]] = {}
    ids = torch.tensor([run.tokens[0][:-1]])  # the model keeps no cache: one pass over all tokens shows the same
    handles = list(_hooks(hm.model, seen))
    with torch.no_grad():
        hm.model(ids)
    for handle in handles:
        handle.remove()
    assert {key: len(tensors) for key, tensors in seen.items() if key[1] in (1, 2)} == {
        (point, layer): TURNS for point in points for layer in (1, 2)
    }
    for (point, layer), tensors in seen.items():
        assert len(run.keys_of(point, layer)) == len(tensors)
        for call, expected in enumerate(tensors):
            torch.testing.assert_close(run[point, layer, call], expected, msg=f"{point} of layer {layer}, run {call}")


def _hooks(model: nn.Module, seen: dict[tuple[str, int], list[Tensor]]) -> Any:
    """Hooks that write each point down, run by run; a block's norm runs first for the mixer, then for the MLP."""

    def keep(layer: int, name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            if name == "calm":
                first = len(seen.get(("mixer_in", layer), [])) == len(seen.get(("mlp_in", layer), []))
                write(layer, "mixer_in" if first else "mlp_in", output)
                if not first:
                    write(layer, "resid_mid", args[0])
            elif name:
                write(layer, {"strand": "mixer_out", "slim": "mlp_out"}[name], output)
            else:
                write(layer, "resid_pre", args[0])
                write(layer, "resid_post", output)

        return hook

    def write(layer: int, point: str, tensor: Tensor) -> None:
        seen.setdefault((point, layer), []).append(tensor.detach().clone())

    for layer, path in enumerate(looped_code.LAYERS):
        for name in ("", "calm", "strand", "slim"):
            module = model.get_submodule(f"{path}.{name}".rstrip("."))
            yield module.register_forward_hook(keep(layer, name))
