"""Layers that run several times in one forward pass, read and written run by run: as plain hooks that count do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.looped import LOOPED, generate
from support.raises import raises
from torch import nn

import hookmap
from hookmap import CaptureError, InterventionError, SelectionError
from hookmap.model import HookedModel

pytestmark = pytest.mark.slow
PROMPTS = [[5, 17, 3, 44, 9, 40], [11, 2, 41], [30, 4, 23, 49]]
NEW = 5

_opened: dict[str, HookedModel] = {}


def opened(name: str) -> HookedModel:
    if name not in _opened:
        _opened[name] = hookmap.open(LOOPED[name].build())
    return _opened[name]


def keys(name: str, point: str) -> set[tuple[Any, ...]]:
    runs = enumerate(LOOPED[name].runs)
    return {(point, i, *([run] if often > 1 else [])) for i, often in runs for run in range(often)}


@pytest.mark.parametrize("name", LOOPED)
@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_every_run_of_every_layer_is_what_plain_hooks_see_in_it(name: str, engine: Any) -> None:
    looped, hm = LOOPED[name], opened(name)
    together = [PROMPTS] if hm.why_no_pads is None else [[each] for each in PROMPTS]
    given = {"max_new_tokens": NEW, "use_cache": looped.cache, "engine": engine}
    run = hm.capture(PROMPTS, ["resid_pre", "resid_post"], **given)
    assert set(run.keys) == keys(name, "resid_pre") | keys(name, "resid_post")
    number = 0
    for prompts in together:
        sequences, seen = generate(hm.model, looped, prompts, NEW)
        width = max(map(len, prompts))
        for row, prompt in enumerate(prompts):
            pads, count = width - len(prompt), len(prompt) + NEW - 1
            assert run.tokens[number] == tuple(sequences[row, pads:].tolist())
            for key in run.keys:
                call = key[2] if len(key) == 3 else 0
                expected = seen.rows(row, pads, count, key[1], call, looped.cache)[key[0] == "resid_post"]
                assert torch.equal(run.read(number, *key), expected), key
            number += 1


@pytest.mark.parametrize("name", LOOPED)
def test_a_harvest_gives_every_run_and_does_not_stop_before_the_last(name: str) -> None:
    looped, hm = LOOPED[name], opened(name)
    run = hm.capture(PROMPTS[:1], "resid_post", max_new_tokens=0, calls=[0, -1])
    _, seen = generate(hm.model, looped, PROMPTS[:1], 1)
    length = len(PROMPTS[0])
    for layer, often in enumerate(looped.runs):
        for call in dict.fromkeys((0, often - 1)):
            expected = seen.rows(0, 0, length, layer, call, True)[1]
            assert torch.allclose(run.read(0, "resid_post", layer, call), expected, atol=1e-5)
        assert torch.equal(run["resid_post", layer, -1], run["resid_post", layer, often - 1])


def test_chunked_prefill_halved_batches_and_mixed_lengths_count_the_same() -> None:
    hm = opened("dory") if "dory" in LOOPED else opened("middle")
    cache = {} if "dory" in LOOPED else {"use_cache": False}
    whole = hm.capture(PROMPTS[:1], "resid_post", max_new_tokens=NEW, **cache)
    if cache:
        return
    pieces = hm.capture(PROMPTS[:1], "resid_post", max_new_tokens=NEW, prefill_chunk_size=2)
    assert pieces.tokens == whole.tokens and pieces.keys == whole.keys
    assert all(torch.allclose(pieces.read(0, *key), whole.read(0, *key), atol=1e-5) for key in whole.keys)


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_batches_that_are_halved_in_the_middle_of_a_loop_have_each_run_of_each_row(
    engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory runs out in the third run of layer 1, after rows of the first two were seen."""
    hm = hookmap.open(LOOPED["middle"].build())
    prompts = [[n, n + 1, n + 2, n + 5] for n in range(3, 12)]
    given: dict[str, Any] = {"max_new_tokens": 3, "use_cache": False, "engine": engine}
    alone = [hm.capture([each], "resid_post", **given) for each in prompts]
    hm.capture(prompts, "resid_post", **given)  # shows that they may share a batch
    count = [0]

    def begins(*_: Any) -> None:
        count[0] = 0

    def refuses(_: nn.Module, args: Any) -> None:
        count[0] += 1
        if count[0] == 3 and len(args[0]) > 2:
            raise torch.OutOfMemoryError(f"CUDA out of memory with {len(args[0])} rows")

    layer = hm.model.get_submodule("model.layers.1")
    handles = [hm.model.register_forward_pre_hook(begins), layer.register_forward_pre_hook(refuses)]
    run = hm.capture(prompts, "resid_post", **given)
    for handle in handles:
        handle.remove()
    told = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert [text.partition("; ")[0] for text in told] == [f"out of memory with {n} prompts at once" for n in (8, 4)]
    assert set(run.keys) == keys("middle", "resid_post")
    for number, own in enumerate(alone):
        assert run.tokens[number] == own.tokens[0]
        for key in run.keys:
            torch.testing.assert_close(run.read(number, *key), own.read(0, *key), rtol=1e-4, atol=1e-5)


def test_without_a_call_the_error_names_those_that_there_are(tmp_path: Path) -> None:
    hm = opened("middle")
    run = hm.capture(PROMPTS, ["resid_post", "embed"], max_new_tokens=0, store=tmp_path / "run")
    store = hookmap.open_store(tmp_path / "run")
    for held in (run, store):
        with raises(SelectionError, "holds calls 0, 1, 2, 3 of resid_post: say which", '["resid_post", 1, 3]'):
            held["resid_post", 1]
        with raises(SelectionError, "no call 2"):
            held["resid_post", 0, 2]
        with raises(SelectionError, "call 9 of resid_post of layer 1"):
            held["resid_post", 1, 9]
        assert isinstance(held["resid_post", 0, 0], list) and isinstance(held["resid_post", 0], list)
        assert torch.equal(held.read(0, "resid_post", 1, -1), held.read(0, "resid_post", 1, 3))
        assert torch.equal(held.read(0, "resid_post", 1, 3, [2, 4]), held.read(0, "resid_post", 1, 3)[[2, 4]])
        assert held.keys_of("resid_post", 1) == tuple(("resid_post", 1, call) for call in range(4))
        assert "1 (calls 0, 1, 2, 3)" in held._repr_html_()
        assert ("resid_post", 1, 2) in held._ipython_key_completions_()


def test_calls_choose_runs_and_are_refused_where_no_layer_has_them() -> None:
    hm = opened("middle")
    assert hm.capture(PROMPTS[:1], "resid_post", 1, 0, calls="last").keys == (("resid_post", 1, 3),)
    assert hm.capture(PROMPTS[:1], "resid_post", "all", 0, calls=2).keys == (("resid_post", 1, 2),)
    assert hm.estimate(PROMPTS[:1], "resid_post", 1, 0, calls=[0, 2]).tensors == 2
    assert hm.capture(PROMPTS[:1], {"resid_post": [1], "z": [0]}, max_new_tokens=0, calls=0).keys == (
        ("z", 0), ("resid_post", 1, 0),
    )  # fmt: skip
    with raises(SelectionError, "call 4 is out of range"):
        hm.capture(PROMPTS[:1], "resid_post", 1, 0, calls=4)
    with raises(SelectionError, "layer 0 of LlamaForCausalLM runs once", "no call 1"):
        hm.capture(PROMPTS[:1], "resid_post", [0, 1], 0, calls=1)


def test_a_store_holds_each_run_under_its_number_and_goes_on(tmp_path: Path) -> None:
    hm = opened("middle")
    given = {"points": ["resid_pre", "z"], "layers": [0, 1], "calls": [0, 2], "max_new_tokens": 0}
    with pytest.raises(SelectionError):
        hm.capture(PROMPTS, **given)  # layer 0 has no call 2
    given["layers"] = [1]
    run = hm.capture(PROMPTS, **given)
    stored = hm.capture(PROMPTS, **given, store=tmp_path / "run")
    names = [spec.name for spec in stored.manifest.tensors]
    assert names == ["resid_pre.1.call0", "z.1.call0", "resid_pre.1.call2", "z.1.call2"]
    assert stored.manifest.format_version == 2 and stored.manifest.layers == (1,)
    assert hm.capture(PROMPTS, "resid_pre", 0, 0, store=tmp_path / "once").manifest.format_version == 1
    store = hookmap.open_store(tmp_path / "run")
    assert not store.verify() and store.keys == run.keys
    assert all(torch.equal(store.read(n, *key), run.read(n, *key)) for key in run.keys for n in range(3))
    assert [each["call"] for each in store.describe()["tensors"]] == [0, 0, 2, 2]
    copy = hookmap.open_store(run.save(tmp_path / "copy"))
    assert all(torch.equal(copy.read(1, *key), run.read(1, *key)) for key in run.keys)
    with raises(hookmap.StoreError, "tensors"):
        hm.capture(PROMPTS, **{**given, "calls": [0, 1]}, store=tmp_path / "run", resume=True)
    batch = next(iter(store.dataset(["resid_pre"], [1], batch_size=4)))
    assert set(batch) == {"resid_pre.1.call0", "resid_pre.1.call2"}


def test_exports_and_imports_keep_the_runs_apart(tmp_path: Path) -> None:
    from hookmap.stores.export import export
    from hookmap.stores.importing import import_pt

    hm = opened("middle")
    run = hm.capture(PROMPTS, "resid_post", [0, 1], 0, calls="all", store=tmp_path / "run")
    store = hookmap.open_store(tmp_path / "run")
    export(store, "pt", tmp_path / "pt")
    import_pt(tmp_path / "pt" / "activations.pt", tmp_path / "back")
    back = hookmap.open_store(tmp_path / "back")
    assert set(back.keys) == set(run.keys)
    assert all(torch.equal(back.read(2, *key), run.read(2, *key)) for key in run.keys)
    export(store, "numpy", tmp_path / "numpy", point="resid_post", layer=1, call=2)
    assert [file.name for file in (tmp_path / "numpy").glob("resid*")] == ["resid_post.1.call2.npy"]
    with raises(hookmap.StoreError, "Choose: --call N"):
        export(store, "probelab", tmp_path / "lab", point="resid_post")
    export(store, "probelab", tmp_path / "lab", point="resid_post", call=0)
    assert {file.name for file in (tmp_path / "lab").glob("layer*")} == {"layer_0.bin", "layer_1.bin"}
    assert json.loads((tmp_path / "lab" / "meta.json").read_text())["metadata"]["calls"] == [None, 0]
    for layout, names in (("pt", torch.load(tmp_path / "pt" / "activations.pt")), ("lab", [])):
        told = json.loads((tmp_path / layout / "tensors.json").read_text())
        assert [(each["layer"], each["call"]) for each in told][:2] == [(0, None), (1, 0)]
        for each in told if names else ():
            layer, call = each["layer"], each["call"]
            whole = torch.cat([run.read(n, "resid_post", layer, call) for n in range(3)])
            assert torch.equal(names[each["name"]], whole)
    pytest.importorskip("datasets")
    notes = export(store, "saelens", tmp_path / "sae", point="resid_post", layer=1, call=2, context=2)
    assert "the rows are of call 2 of the layer, which TransformerLens's name does not say" in notes
    (told,) = json.loads((tmp_path / "sae" / "tensors.json").read_text())
    assert told == {"name": "blocks.1.hook_resid_post", "point": "resid_post", "layer": 1, "call": 2}


def test_xarray_has_an_axis_of_runs() -> None:
    pytest.importorskip("xarray")
    run = opened("middle").capture(PROMPTS[:1], "resid_post", "all", 0)
    one = run.to_xarray("resid_post", 1)
    assert one.dims[0] == "call" and one.coords["call"].values.tolist() == [0, 1, 2, 3]
    every = run.to_xarray("resid_post")
    assert every.dims[0] == "run" and every.coords["layer"].values.tolist() == [0, 1, 1, 1, 1, 2]
    assert every.coords["call"].values.tolist() == [0, 0, 1, 2, 3, 0]
    assert run.to_xarray("resid_post", 1, call=-1).dims == ("batch", "pos", "d_model")
    assert (one.sel(call=3).values == run.to_xarray("resid_post", 1, call=3).values).all()
    assert run.to_xarray("resid_post", 0).dims == ("batch", "pos", "d_model")


# Writing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOOPED)
@pytest.mark.parametrize("call", ["first", "last"])
def test_a_write_to_one_run_is_what_a_hook_that_counts_writes(name: str, call: str) -> None:
    looped, hm = LOOPED[name], opened(name)
    layer = looped.runs.index(max(looped.runs))
    number = 0 if call == "first" else looped.runs[layer] - 1
    vector = torch.linspace(-1, 1, 32)
    edit = {"do": "steer", "point": "resid_post", "layers": layer, "vector": vector, "strength": 2.0}
    settings = {"max_new_tokens": NEW, "use_cache": looped.cache}
    run = hm.capture(PROMPTS[:1], "resid_post", interventions=[{**edit, "calls": number}], **settings)

    counted = {"calls": -1}

    def begins(*_: Any) -> None:
        counted["calls"] = -1

    def adds(_: nn.Module, args: Any, output: Any) -> Any:
        counted["calls"] += 1
        if counted["calls"] != number:
            return None
        changed = (output[0] if isinstance(output, tuple) else output) + 2.0 * vector
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    module = hm.model.get_submodule(looped.path_of(layer))
    handles = [hm.model.register_forward_pre_hook(begins), module.register_forward_hook(adds)]
    sequences, seen = generate(hm.model, looped, PROMPTS[:1], NEW)
    for handle in handles:
        handle.remove()
    assert run.tokens[0] == tuple(sequences[0].tolist())
    for key in run.keys:
        where = key[2] if len(key) == 3 else 0
        expected = seen.rows(0, 0, len(PROMPTS[0]) + NEW - 1, key[1], where, looped.cache)[1]
        assert torch.allclose(run.read(0, *key), expected, atol=1e-5), key
    plain = hm.capture(PROMPTS[:1], "resid_post", layer, calls=number, **settings)
    assert not torch.equal(plain.read(0, "resid_post", layer, number), run.read(0, "resid_post", layer, number))


def test_a_write_that_names_no_call_writes_each_run_and_wrong_calls_are_told() -> None:
    hm = opened("middle")
    zero = {"do": "ablate", "point": "mlp_out", "layers": 1}
    run = hm.capture(PROMPTS[:1], ["mlp_out"], 1, 0, interventions=[zero], before=True)
    assert all(not run[key].any() for key in run.keys) and len(run.keys) == 4  # type: ignore[union-attr]
    assert run.before is not None and run.before["mlp_out", 1, 0].any()  # type: ignore[union-attr]
    one = hm.capture(PROMPTS[:1], ["mlp_out"], 1, 0, interventions=[{**zero, "calls": "last"}])
    assert [bool(one[key].any()) for key in one.keys] == [True, True, True, False]  # type: ignore[union-attr]
    with raises(SelectionError, "call 7 is out of range"):
        hm.capture(PROMPTS[:1], "mlp_out", 1, 0, interventions=[{**zero, "calls": 7}])
    with raises(InterventionError, "calls"):
        hm.capture(PROMPTS[:1], "mlp_out", 1, 0, interventions=[{**zero, "calls": "first"}])


def test_a_patch_takes_each_run_from_the_same_run_of_its_source(tmp_path: Path) -> None:
    hm = opened("middle")
    clean, other = PROMPTS[0], [7, 8, 9, 10, 11, 12]
    source = hm.capture([clean], "resid_mid", 1, 0, store=tmp_path / "clean")
    patch = {"do": "patch", "point": "resid_mid", "layers": 1, "calls": 2}
    for given in ({"prompt": tuple(clean)}, {"store": str(tmp_path / "clean")}):
        run = hm.capture([other], "resid_mid", 1, 0, interventions=[{**patch, "source": given}])
        assert torch.equal(run.read(0, "resid_mid", 1, 2), source.read(0, "resid_mid", 1, 2))
        assert not torch.equal(run.read(0, "resid_mid", 1, 1), source.read(0, "resid_mid", 1, 1))


@pytest.mark.parametrize(("into", "out_of"), [(2, 0), ([1, 3], [0, 2]), ([3, 1], [0, 2]), ("all", 1), ("last", -2)])
def test_a_patch_takes_the_runs_of_its_source_that_calls_name(into: Any, out_of: Any, tmp_path: Path) -> None:
    """Against plain hooks that count the runs: what leaves layer 1 in one run is put into another."""
    hm = opened("middle")
    clean, other = PROMPTS[0], [7, 8, 9, 10, 11, 12]
    numbers = {"all": [0, 1, 2, 3], "last": [3], -2: [2]}
    written, read = (numbers.get(each, [each] if isinstance(each, int) else each) for each in map(_key, (into, out_of)))
    pairs = dict(zip(written, read * len(written) if len(read) == 1 else read, strict=True))
    layer, ends = hm.model.get_submodule("model.layers.1"), hm.model.get_submodule("model.layers.2")
    kept: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda *seen: kept.append(seen[2].clone()))
    with torch.no_grad():
        hm.model(torch.tensor([clean]), use_cache=False)
    handle.remove()
    count, found = [-1], []

    def replaces(*_: Any) -> Any:
        count[0] += 1
        return kept[pairs[count[0]]] if count[0] in pairs else None

    handles = [layer.register_forward_hook(replaces), ends.register_forward_hook(lambda *seen: found.append(seen[2]))]
    with torch.no_grad():
        hm.model(torch.tensor([other]), use_cache=False)
    for each in handles:
        each.remove()

    hm.capture([clean], "resid_post", 1, 0, store=tmp_path / "clean")
    edit = {"do": "patch", "point": "resid_post", "layers": 1, "calls": into}
    for source in ({"prompt": tuple(clean)}, {"store": str(tmp_path / "clean")}):
        edits = [{**edit, "source": {**source, "calls": out_of}}]
        (tmp_path / "edits.json").write_text(json.dumps(edits))
        for given in (edits, tmp_path / "edits.json"):
            run = hm.capture([other], "resid_post", 2, 0, interventions=given)
            torch.testing.assert_close(run.read(0, "resid_post", 2), found[0][0], rtol=1e-5, atol=1e-5)
    plain = hm.capture([other], "resid_post", 2, 0, interventions=[{**edit, "source": source}])
    assert not torch.allclose(plain.read(0, "resid_post", 2), found[0][0], atol=1e-3)
    if into == 2:
        swept = hm.sweep([clean], [other], 5, 7, point="resid_post", layers=[1], calls=2, source_calls=0, positions=[3])
        logits = hm.capture(
            [other], "logits", max_new_tokens=0, positions="last_prompt",
            interventions=[{**edit, "positions": [3], "source": {**source, "calls": 0}}],
        )["logits"]  # fmt: skip
        assert float(swept.grid.values[0, 0]) == pytest.approx(float(logits[0, 0, 5] - logits[0, 0, 7]), abs=1e-4)
        assert swept.grid.rows == ("1 call 2",)


def _key(calls: Any) -> Any:
    return tuple(calls) if isinstance(calls, list) else calls


def test_runs_of_a_source_that_do_not_pair_are_refused() -> None:
    hm = opened("middle")
    for into, out_of, told in (
        (2, [0, 1], r"1 run of layer 1 \(calls 2\) cannot be written from 2 runs of the source \(calls 0, 1\)"),
        ("all", [0, 1], "4 runs of layer 1"),
        (2, 4, "calls of the source: call 4 is out of range: layer 1 runs 4 times"),
        (2, "first", "calls"),
    ):
        edit = {"do": "patch", "point": "resid_post", "layers": 1, "calls": into}
        edit["source"] = {"prompt": tuple(PROMPTS[0]), "calls": out_of}
        with pytest.raises(hookmap.HookmapError, match=told):
            hm.capture([PROMPTS[0]], "resid_post", 1, 0, interventions=[edit])
    once = {"do": "patch", "point": "resid_post", "layers": 0, "source": {"prompt": tuple(PROMPTS[0]), "calls": 1}}
    with raises(InterventionError, "layer 0 runs once in one forward pass: no call 1"):
        hm.capture([PROMPTS[0]], "resid_post", 1, 0, interventions=[once])


# A depth that is the text's -------------------------------------------------------------------------------------------


def test_a_layer_that_runs_more_often_than_the_map_says_is_no_last_run() -> None:
    hm = hookmap.open(LOOPED["middle"].build())
    layers = hm.model.model.layers
    try:
        layers.times = 4
        with pytest.raises(CaptureError, match=r"layers.1 was called 5 times in forward pass 0, expected 4"):
            hm.capture(PROMPTS[:1], "resid_post", 1, calls="last", max_new_tokens=0)
        layers.times = 2
        with raises(CaptureError, "did not reach"):
            hm.capture(PROMPTS[:1], "resid_post", 1, max_new_tokens=0)
        edit = {"do": "scale", "point": "resid_post", "layers": 1, "calls": 0, "factor": 2.0}
        layers.times = 3
        hm.capture(PROMPTS[:1], "logits", max_new_tokens=0, interventions=[edit])  # proves the write
        layers.times = 4
        with raises(InterventionError, "called 5 times", "4 were expected"):
            hm.capture(PROMPTS[:1], "logits", max_new_tokens=0, interventions=[edit])
    finally:
        layers.times = 3
