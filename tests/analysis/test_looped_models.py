"""Lens, attribution, patching, vectors and probes of layers that run several times: each run is a place of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.looped import LOOPED
from support.raises import raises
from torch import Tensor, nn

import hookmap
from hookmap import SelectionError
from hookmap.analysis.grid import load_grid
from hookmap.analysis.patching import sweep
from hookmap.analysis.steering import load_vector
from hookmap.model import HookedModel

pytestmark = pytest.mark.slow
PROMPT = [5, 17, 3, 44, 9, 40]


@pytest.fixture(scope="module")
def hm() -> HookedModel:
    """Llama of three layers, of which the middle one runs four times."""
    return hookmap.open(LOOPED["middle"].build())


def outputs(model: nn.Module, path: str) -> list[Tensor]:
    """What leaves a module in one forward pass, call by call."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0].clone())

    handle = model.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        model(torch.tensor([PROMPT]), use_cache=False)
    handle.remove()
    return seen


def test_a_lens_has_a_row_for_each_run(hm: HookedModel, tmp_path: Path) -> None:
    found = hm.lens([PROMPT])
    assert (found.layers, found.calls) == ((0, 1, 1, 1, 1, 2), (None, 0, 1, 2, 3, None))
    streams = [outputs(hm.model, "model.layers.0")[0], *outputs(hm.model, "model.layers.1")]
    streams += outputs(hm.model, "model.layers.2")
    with torch.no_grad():
        expected = [hm.model.lm_head(hm.model.model.norm(each)).softmax(-1).max(-1) for each in streams]
    assert torch.equal(found.top_ids[..., 0], torch.stack([each.indices for each in expected]))
    assert torch.allclose(found.top_probabilities[..., 0], torch.stack([each.values for each in expected]), atol=1e-5)
    assert float(found.kl[-1].abs().max()) < 1e-5 and float(found.kl[1].abs().min()) > 0
    grid = found.grid()
    assert grid.rows == ("0", "1 call 0", "1 call 1", "1 call 2", "1 call 3", "2")
    assert load_grid(grid.save(tmp_path / "lens")).calls == found.calls
    assert (tmp_path / "lens.csv").read_text().splitlines()[2 + len(PROMPT)].startswith("1,0,1,")
    assert found.as_json()["calls"] == (None, 0, 1, 2, 3, None)
    assert hm.lens([PROMPT], layers=[1, 2], calls=-1).grid().rows == ("1 call 3", "2")
    run = hm.capture([PROMPT], "resid_post", max_new_tokens=0, calls=[0, -1])
    assert hm.lens(run).grid().rows == ("0", "1 call 0", "1 call 3", "2")
    assert hm.lens(run, calls="last").grid().rows == ("0", "1 call 3", "2")
    with raises(SelectionError, "holds no resid_post of layers [(1, 2)]: it holds [0, (1, 0)"):
        hm.lens(run, layers=1, calls=2)


def test_an_attribution_sums_over_all_runs(hm: HookedModel) -> None:
    for name in ("middle", "whole"):
        each = hookmap.open(LOOPED[name].build()) if name == "whole" else hm
        found = each.attribute([PROMPT], positions="all")
        runs = [(i, run if often > 1 else None) for i, often in enumerate(LOOPED[name].runs) for run in range(often)]
        labels = {
            f"{point}[{i}{'' if run is None else f', {run}'}]" for point in ("mixer_out", "mlp_out") for i, run in runs
        }
        assert labels < set(found.parts) and len(found.parts) == len(labels) + 2
        with torch.no_grad():
            logits = each.model(torch.tensor([PROMPT]), use_cache=False).logits[0]
        assert torch.allclose(found.values.sum(0), logits.max(-1).values, atol=1e-4)
        heads = each.attribute([PROMPT], positions="last", heads=True)
        assert torch.allclose(heads.values.sum(0), logits[-1:].max(-1).values, atol=1e-4)
    out = outputs(hm.model, "model.layers.1.mlp")
    norm, head = hm.model.model.norm, hm.model.lm_head
    last = outputs(hm.model, "model.layers.2")[0]
    scale = (last.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    found = hm.attribute([PROMPT], positions="all", target=7)
    for run in range(4):
        by_hand = (out[run] * scale * norm.weight) @ head.weight[7]
        assert torch.allclose(found.values[found.parts.index(f"mlp_out[1, {run}]")], by_hand, atol=1e-4)


def test_a_sweep_patches_each_run_alone(hm: HookedModel) -> None:
    other = [5, 17, 60, 44, 9, 40]
    with torch.no_grad():
        right, wrong = (
            int(hm.model(torch.tensor([p]), use_cache=False).logits[0, -1].argmax()) for p in (PROMPT, other)
        )
    target, against = (right, wrong) if right != wrong else (right, None)
    found = sweep(hm, [PROMPT], [other], target, against, point="resid_post", layers=[1, 2])
    assert found.grid.rows == ("1 call 0", "1 call 1", "1 call 2", "1 call 3", "2")
    assert torch.allclose(found.effect.values[-1, -1], torch.tensor(1.0), atol=1e-3), "the last row is all there is"
    assert float((found.grid.values[0] - found.grid.values[3]).abs().max()) > 1e-4
    last = sweep(hm, [PROMPT], [other], target, against, point="resid_post", layers=1, calls="last")
    assert torch.allclose(last.grid.values[0], found.grid.values[3], atol=1e-4)


def test_a_vector_is_of_one_run_and_is_added_to_it(hm: HookedModel, tmp_path: Path) -> None:
    pairs = [[5, 6, 7], [8, 9, 10]], [[15, 16, 17], [18, 19, 20]]
    with raises(SelectionError, "layer 1: a vector has one direction", 'calls="last"'):
        hm.steering_vector(*pairs)
    made = hm.steering_vector(*pairs, calls="last")
    assert made.layers == (0, 1, 2) and made.about.call == "last"
    run = hm.capture([*pairs[0], *pairs[1]], "resid_post", 1, 0, calls=3, positions="last")
    rows = torch.stack([run.read(n, "resid_post", 1, 3)[0] for n in range(4)])
    assert torch.allclose(made[1], (rows[:2] - rows[2:]).mean(0), atol=1e-6)
    read = load_vector(made.save(tmp_path / "v.safetensors"))
    assert read.about.call == "last" and read.interventions(layers=[1])[0]["calls"] == "last"
    one = hm.capture([PROMPT], "resid_post", 1, 0, interventions=read.interventions(4.0, layers=[1]), before=True)
    assert one.before is not None
    for call in range(4):
        moved = one.read(0, "resid_post", 1, call) - one.before.read(0, "resid_post", 1, call)
        assert torch.allclose(moved, 4.0 * made[1] * (call == 3), atol=1e-5)
    assert hm.steering_vector(*pairs, layers=[0]).about.call is None
    with raises(hookmap.StoreError, "of call -1 alone"):
        pytest.importorskip("gguf")
        from hookmap.analysis.gguf import write_gguf

        write_gguf(hm.steering_vector(*pairs, layers=[1], calls=-1), tmp_path / "v.gguf")


def test_a_probe_is_of_one_run(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from hookmap.activations import Activation, Sample
    from hookmap.analysis.probes.run import probe
    from hookmap.analysis.probes.saved import load_probes
    from hookmap.stores.memory import MemoryStore

    keys = [("resid_post", 1, 0), ("resid_post", 1, 1)]
    store, draw = MemoryStore(keys), torch.Generator().manual_seed(0)
    for number in range(60):
        for key in keys:
            rows = torch.randn(3, 8, generator=draw)
            rows[:, 0] += 4.0 * (1 if number % 2 else -1) * key[2]  # only the second run tells
            store.write(Activation(number, key[0], key[1], 0, rows, key[2]))
        store.finish(
            Sample(number, f"q{number}", "", (number, 2, 3), 3, 3, None, f"s{number}", {"correct": bool(number % 2)})
        )
    found = probe(store, pool="last_prompt", shuffles=3)
    scores = {(place.layer, place.call): place.auroc for place in found.report.places}
    assert scores[1, 1] > 0.95 and scores[1, 0] < 0.75  # type: ignore[operator]
    assert (found.report.best.layer, found.report.best.call) == (1, 1)
    found.save(tmp_path / "probe")
    read = load_probes(tmp_path / "probe" / "probes.safetensors")
    rows = store.read(5, "resid_post", 1, 1)
    assert torch.equal(read.logits(rows, "resid_post", 1, 1), found.probes.logits(rows, "resid_post", 1, 1))
    with raises(SelectionError, "no probe of resid_post.1: there are probes of resid_post.1.call0"):
        read.logits(rows, "resid_post", 1)
    vector = load_vector(tmp_path / "probe" / "vector-resid_post-call1.safetensors")
    assert vector.about.call == 1 and torch.equal(vector[1], read.vector("resid_post", call=1)[1])
