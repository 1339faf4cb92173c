"""What a notebook shows of maps, captures and stores, what it completes, and conversion to xarray."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.raises import raises

import hookmap
from hookmap.activations import Activation, Sample
from hookmap.capture.result import Capture
from hookmap.demo import MODEL_PATH
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import parse
from hookmap.stores.manifest import manifest_of_run
from hookmap.stores.memory import MemoryStore
from hookmap.stores.xarray import to_xarray

KEYS = [("resid_post", 3), ("resid_post", 7), ("pattern", 7), ("final_norm", None)]


@pytest.fixture(scope="module")
def gpt2() -> ArchitectureMap:
    return hookmap.load_map("GPT2LMHeadModel")


def invented(m: ArchitectureMap, rows: tuple[int, ...], positions: Any = None, dtype: Any = torch.float32) -> Capture:
    """Row r of sample s of tensor t is 100 t + 10 s + r, in both of its two features."""
    store = MemoryStore(KEYS)
    for number, count in enumerate(rows):
        for place, (point, layer) in enumerate(KEYS):
            value = 100 * place + 10 * number + torch.arange(count)
            tensor = value[:, None].expand(-1, 2).to(dtype)
            if point == "pattern":  # as it is stored: [query, heads, key], zeros behind
                tensor = value[:, None, None].expand(-1, 1, max(rows)).to(dtype)
            store.write(Activation(number, point, layer, 0, tensor.contiguous()))
        ids = tuple(range(count + 1))
        store.finish(Sample(number, f"<b>{number}", "a & b", ids, 1, count, positions))
    return Capture(store, (), m, manifest_of_run(KEYS, model="tiny"))


def test_a_map_is_one_line_and_stays_equal_and_whole(gpt2: ArchitectureMap) -> None:
    assert (
        repr(gpt2)
        == str(gpt2)
        == (f"<ArchitectureMap GPT2LMHeadModel: 12 layers, d_model 768, 1 kind of block, {len(gpt2.points)} points>")
    )
    assert parse(gpt2.to_json()) == gpt2 and json.loads(gpt2.to_json())["num_layers"] == 12


def test_a_map_in_a_notebook_is_a_table_of_its_points(gpt2: ArchitectureMap) -> None:
    html = gpt2._repr_html_()
    assert "<td style='text-align:left'>resid_mid</td><td style='text-align:left'>0–11</td>" in html
    assert html.index(">embed<") < html.index(">resid_mid<") < html.index(">logits<")


def test_a_capture_in_a_notebook_is_its_tensors_and_first_samples_escaped(
    gpt2: ArchitectureMap, tmp_path: Path
) -> None:
    run = invented(gpt2, (3,) * 7)
    assert repr(run) == "<Capture of 7 samples, 21 rows of 4 tensors: resid_post, pattern, final_norm>"
    assert repr(run.store) == "<MemoryStore of 7 samples, 4 tensors: resid_post, pattern, final_norm>"
    folder = hookmap.open_store(run.save(tmp_path / "run"))
    assert repr(folder) == f"<CaptureStore {tmp_path / 'run'} of 7 samples, 4 tensors: resid_post, pattern, final_norm>"
    for shown in (run, run.store, folder):
        html = shown._repr_html_()
        assert "&lt;b&gt;4" in html and "<b>4" not in html and "&lt;b&gt;5" not in html and "2 more" in html
        assert "resid_post</td><td style='text-align:left'>3, 7</td>" in html
    assert run.points == ("resid_post", "pattern", "final_norm") and run.layers == (3, 7)


def test_keys_are_completed_and_each_is_one_that_can_be_read(gpt2: ArchitectureMap) -> None:
    run = invented(gpt2, (2, 2))
    wanted = [("resid_post", 3), ("resid_post", 7), ("pattern", 7), "final_norm"]
    assert run._ipython_key_completions_() == run.store._ipython_key_completions_() == wanted
    assert all(len(run[key]) == len(run.store[key]) == 2 for key in run._ipython_key_completions_())


@pytest.mark.slow
def test_the_bundled_model_in_xarray_has_named_axes() -> None:
    pytest.importorskip("xarray", reason="pip install xarray")
    run = hookmap.open(MODEL_PATH).capture("1+2=", points=["z", "logits"], layers=[2, 5], max_new_tokens=0)
    z, logits = run.to_xarray("z"), run.to_xarray("logits")
    assert z.dims == ("layer", "batch", "pos", "heads", "d_head") and logits.dims == ("batch", "pos", "d_vocab")
    held = run["z", 5]
    assert isinstance(held, torch.Tensor)
    assert torch.equal(torch.from_numpy(z.sel(layer=5).values), held)


def test_axes_are_named_and_numbered_as_the_tokens_are(gpt2: ArchitectureMap) -> None:
    pytest.importorskip("xarray", reason="pip install xarray")
    run = invented(gpt2, (3, 3))
    one = run.to_xarray("resid_post", 7)
    assert one.dims == ("batch", "pos", "d_model") and one.attrs == {"dtype": "float32", "layer": 7}
    assert one.name == "resid_post" and float(one.sel(batch=1, pos=2)[0]) == 112
    assert run.to_xarray("blocks.7.hook_resid_post").equals(one) and run.to_xarray("resid_post", -5).equals(one)
    every = run.to_xarray("resid_post")
    assert every.dims == ("layer", "batch", "pos", "d_model") and float(every.sel(layer=7, batch=1, pos=2)[1]) == 112
    pattern = run.to_xarray("pattern", 7)
    assert pattern.dims == ("batch", "heads", "query", "key") and float(pattern.sel(batch=1, query=2)[0, 0]) == 212
    assert run.store.to_xarray("pattern", 7).dims == ("batch", "query", "heads", "key")
    assert run.store.to_xarray("resid_post", 7).equals(one) and run.store.to_xarray("resid_post").equals(every)
    assert run.to_xarray("final_norm").dims == ("batch", "pos", "d_model")


def test_positions_that_were_kept_are_the_coordinates(gpt2: ArchitectureMap) -> None:
    pytest.importorskip("xarray", reason="pip install xarray")
    kept = invented(gpt2, (2, 2), positions=(0, 2)).to_xarray("resid_post", 3)
    assert list(kept.pos.values) == [0, 2] and float(kept.sel(batch=0, pos=2)[0]) == 1
    assert "pos" not in invented(gpt2, (1, 1), positions="mean").to_xarray("resid_post", 3).coords


def test_samples_of_different_lengths_are_refused_and_given_one_at_a_time(gpt2: ArchitectureMap) -> None:
    pytest.importorskip("xarray", reason="pip install xarray")
    run = invented(gpt2, (3, 2))
    with raises(hookmap.SelectionError, "2 to 3 rows", "sample=N"):
        run.to_xarray("resid_post", 7)
    one = run.to_xarray("resid_post", sample=1)
    assert one.dims == ("layer", "pos", "d_model") and one.shape == (2, 2, 2)
    assert float(one.sel(layer=7, pos=1)[0]) == 111 and int(one.batch) == 1
    assert run.to_xarray("pattern", 7, sample=1).shape == (1, 2, 2)


def test_bfloat16_becomes_float32_exactly(gpt2: ArchitectureMap) -> None:
    pytest.importorskip("xarray", reason="pip install xarray")
    found = invented(gpt2, (3,), dtype=torch.bfloat16).to_xarray("resid_post", 7)
    assert found.dtype == "float32" and found.attrs["dtype"] == "bfloat16" and found.values[0, 2, 0] == 102


def test_without_xarray_the_error_says_what_to_install(gpt2: ArchitectureMap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "xarray", None)
    with raises(hookmap.CaptureError, "pip install xarray"):
        to_xarray(invented(gpt2, (1,)), "resid_post", 7, None)
