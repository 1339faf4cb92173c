"""Path patching is its published definition, computed by plain hooks that freeze everything else by hand."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from support import plain_hooks
from support.patched_by_hand import ByHand, path_logits
from support.raises import raises

import hookmap
from hookmap.model import HookedModel

PAIRS = [
    hookmap.Pair([5, 17, 3, 60, 22], [5, 17, 40, 60, 22], 7, 9),
    hookmap.Pair([8, 8, 31, 2, 77, 12], [8, 8, 31, 64, 77, 12], 11, 30),
]
RECEIVERS = {
    "logits": [],
    "q@2.1,q@2.3": [("q", 2, 1), ("q", 2, 3)],
    "k@2.0": [("k", 2, 0)],
    "v@2": [("v", 2, None)],
    "mlp_in@1": [("mlp_in", 1, None)],
    "q@1.0,v@2": [("q", 1, 0), ("v", 2, None)],
}
SENDERS = {"z": 4, "mixer_out": None, "mlp_out": None}


@cache
def opened(family: str) -> HookedModel:
    return hookmap.open(plain_hooks.build(family))


@pytest.mark.slow
@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("to", RECEIVERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_path_is_the_published_definition_by_plain_hooks(family: str, to: str, through: bool) -> None:
    hm = opened(family)
    kv_heads = {"llama": 2, "gpt2": 4}[family]
    by = ByHand(hm.model, family, 4)
    for point, heads in SENDERS.items():
        over = "layers" if heads is None else "heads"
        found = hm.sweep(PAIRS, point=point, over=over, to=to, through_mlps=through, noising=True, batch_size=3)
        rows = [key[1] for key in found.keys]
        assert rows == [0, 1, 2] if to == "logits" else rows[-1] < 2 or to == "mlp_in@1"
        for number, pair in enumerate(PAIRS):
            for row, layer in enumerate(rows):
                for head in range(heads or 1):
                    sender = (point, layer, None if heads is None else head)
                    receivers = [each for each in RECEIVERS[to] if each[1] > layer or each[0] == "mlp_in"]
                    logits = path_logits(by, pair.clean, pair.corrupted, sender, receivers, through, 3, kv_heads)
                    if RECEIVERS[to] and not receivers:
                        logits, _ = by.run(pair.clean)
                    want = float(logits[pair.answer] - logits[pair.wrong])  # type: ignore[index]
                    got = float(found.values[number, row, head, 0])
                    assert got == pytest.approx(want, abs=2e-4), (sender, to, through, number)


@pytest.mark.slow
def test_paths_add_up_to_the_whole_where_nothing_else_carries_it() -> None:
    """From the last attention, held MLPs leave the direct path; through its MLP it is the whole patch."""
    hm = opened("llama")
    whole = hm.sweep(PAIRS, point="z", layers=[2], over="heads")
    through = hm.sweep(PAIRS, point="z", layers=[2], over="heads", to="logits")
    direct = hm.sweep(PAIRS, point="z", layers=[2], over="heads", to="logits", through_mlps=False)
    torch.testing.assert_close(through.values, whole.values, rtol=1e-4, atol=1e-4)
    assert (direct.values - whole.values).abs().max() > 1e-2
    assert "not through MLPs" in repr(direct) and "on the path to logits, through MLPs" in repr(through)


def test_what_is_no_path_is_refused() -> None:
    hm = opened("llama")
    with raises(hookmap.SelectionError, "z of layer 2 is not before q@1.0"):
        hm.sweep(PAIRS, point="z", over="heads", layers=[0, 2], to="q@1.0")
    with raises(hookmap.SelectionError, "'q'", "mlp_in@4", "q@9.6"):
        hm.sweep(PAIRS, point="z", over="heads", to="q")
    with raises(hookmap.SelectionError, "a path begins at z, mixer_out", "not at resid_mid"):
        hm.sweep(PAIRS, point="resid_mid", over="layers", to="logits")
    with raises(hookmap.InterventionError, "to k@2: heads [3]", "0 to 1"):
        hm.sweep(PAIRS, point="z", over="heads", to="k@2.3")
    with raises(hookmap.SelectionError, "no path patching of", "norm the stream itself"):
        hookmap.open(plain_hooks.build("bert")).sweep(PAIRS, point="z", over="heads", to="logits")
