"""Features of dictionaries as a point: what the dictionary encodes of the rows, sparse in memory and on disk."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.opened import RAGGED, opened
from support.raises import raises

import hookmap
from hookmap.analysis.dictionaries.dictionary import About, Dictionary
from hookmap.analysis.dictionaries.loading import as_dictionary
from hookmap.analysis.dictionaries.packing import from_bytes
from hookmap.analysis.dictionaries.saving import save_dictionary
from hookmap.cli.main import main
from hookmap.errors import SelectionError, StoreError
from hookmap.model import HookedModel
from hookmap.services.ray.model import _named
from hookmap.stores.reader import CaptureStore

F = 500


def dictionary(d: int, seed: int = 0, layer: int = 1, **options: Any) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    encoder = torch.randn(d, F, generator=generator) / d**0.5
    bias = torch.full((F,), -2.0)
    about = About("resid_post", layer)
    return Dictionary(encoder, encoder.T.contiguous(), bias, torch.zeros(d), about=about, **options)


@pytest.fixture(scope="module")
def hm() -> HookedModel:
    return opened("gpt2")


@pytest.fixture(scope="module")
def relu(hm: HookedModel) -> Dictionary:
    return dictionary(hm.map.d_model)


@pytest.mark.parametrize("new", [0, 4], ids=["harvest", "generation"])
def test_features_are_those_of_the_rows(hm: HookedModel, relu: Dictionary, new: int, tmp_path: Path) -> None:
    topk = dictionary(hm.map.d_model, seed=1, activation="topk", k=3)
    both = ["resid_post", "features"]
    kept = hm.capture(RAGGED, both, 1, new, dictionaries=[relu, topk])
    assert kept.keys == (("resid_post", 1), ("features", 1), ("features.1", 1))
    alone = hm.capture(RAGGED, "features", max_new_tokens=new, dictionaries=[relu, topk], store=tmp_path / "run")
    assert alone.keys == (("features", 1), ("features.1", 1)) and alone.selectors == ()
    store = hookmap.open_store(tmp_path / "run")
    assert store.verify() == []
    for name, encodes in (("features", relu), ("features.1", topk)):
        for number in range(len(RAGGED)):
            expected = encodes.encode(kept.read(number, "resid_post", 1))
            assert 0 < int((expected != 0).sum()) < expected.numel() / 4
            for run in (kept, alone, store):
                found = run.read(number, name, 1)
                assert found.is_sparse
                torch.testing.assert_close(found.to_dense(), expected)
                some = run.read(number, name, 1, tokens=[0, 2])
                torch.testing.assert_close(some.to_dense(), expected[[0, 2]])
        flat = store.rows(name, 1)
        assert torch.equal(flat.values.to_dense(), torch.cat([part.to_dense() for part in alone[name, 1]]))
    same = hm.capture([RAGGED[0], RAGGED[0]], both, 1, 0, dictionaries=relu)
    features, rows = same["features", 1], same["resid_post", 1]
    assert isinstance(features, torch.Tensor) and isinstance(rows, torch.Tensor)
    assert torch.equal(features.to_dense(), relu.encode(rows))


def test_the_store_holds_indices_and_values(hm: HookedModel, relu: Dictionary, tmp_path: Path) -> None:
    run = hm.capture(RAGGED, "features", max_new_tokens=0, dictionaries=[relu], store=tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["format_version"] == 3 and manifest["tensors"][0]["sparse"] is True
    assert manifest["settings"]["dictionaries"] == [
        {"tensor": "features.1", "of": "resid_post.1", "features": F, "sha256": relu.digest}
    ]
    (shard,) = (tmp_path / "run" / "shards").iterdir()
    held = load_file(shard)
    assert {*held} == {"features.1.values", "features.1.indices", "features.1.offsets"}
    every = torch.cat([part.to_dense() for part in run["features", 1]])
    assert torch.equal(held["features.1.values"], every[every != 0])
    assert torch.equal(held["features.1.indices"].long(), every.nonzero()[:, 1])
    assert held["features.1.offsets"].tolist() == [0, *(every != 0).sum(1).cumsum(0).tolist()]
    store = hookmap.open_store(tmp_path / "run")
    assert isinstance(store, CaptureStore)
    assert store.describe()["bytes"] == sum(each.nbytes for each in held.values())
    norms = store.row_norms("features", 1)
    assert norms.mean == pytest.approx(float(every.double().norm(dim=1).mean())) and norms.not_finite == 0
    plain = hm.capture(RAGGED, "resid_post", 1, 0, store=tmp_path / "plain")
    assert plain.manifest.format_version == 1 and "sparse" not in (tmp_path / "plain" / "manifest.json").read_text()


def test_a_copy_and_a_saved_capture_hold_the_same(hm: HookedModel, relu: Dictionary, tmp_path: Path) -> None:
    run = hm.capture(RAGGED, ["features", "resid_post"], 1, max_new_tokens=0, dictionaries=[relu])
    saved = hookmap.open_store(run.save(tmp_path / "saved"))
    said = CliRunner().invoke(main, ["store", "repair", str(tmp_path / "saved"), "-o", str(tmp_path / "copy")])
    assert said.exit_code == 0, said.output
    for store in (saved, hookmap.open_store(tmp_path / "copy")):
        for number in range(len(RAGGED)):
            assert torch.equal(store.read(number, "features", 1).to_dense(), run.read(number, "features", 1).to_dense())
    assert CliRunner().invoke(main, ["inspect", str(tmp_path / "copy"), "--verify"]).exit_code == 0


def test_a_run_that_stopped_goes_on(hm: HookedModel, relu: Dictionary, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stops(state: Any) -> None:
        if state.samples_done == 1:
            raise Stop

    options: dict[str, Any] = {"max_new_tokens": 3, "batch_size": 1, "dictionaries": [relu]}
    whole = hm.capture(RAGGED, "features", store=tmp_path / "whole", **options)
    with pytest.raises(Stop):
        hm.capture(RAGGED, "features", store=tmp_path / "run", progress=stops, **options)
    with raises(StoreError, "dictionaries"):
        other = dictionary(hm.map.d_model, seed=5)
        hm.capture(RAGGED, "features", store=tmp_path / "run", resume=True, **{**options, "dictionaries": [other]})
    found = hm.capture(RAGGED, "features", store=tmp_path / "run", resume=True, **options)
    for number in range(len(RAGGED)):
        assert torch.equal(found.read(number, "features", 1).to_dense(), whole.read(number, "features", 1).to_dense())


def test_a_broken_shard_is_told(hm: HookedModel, relu: Dictionary, tmp_path: Path) -> None:
    hm.capture(RAGGED, "features", max_new_tokens=0, dictionaries=[relu], store=tmp_path / "run")
    (shard,) = (tmp_path / "run" / "shards").iterdir()
    sound = load_file(shard)
    broken = {
        "indices": sound["features.1.indices"] + F,
        "offsets": sound["features.1.offsets"].flip(0),
        "values": sound["features.1.values"].double(),
    }
    for name, tensor in broken.items():
        save_file({**sound, f"features.1.{name}": tensor}, shard)
        store = hookmap.open_store(tmp_path / "run")
        with raises(StoreError, "features.1", "inspect"):
            store.read(0, "features", 1)
        assert store.verify()
    save_file({name: tensor for name, tensor in sound.items() if not name.endswith("values")}, shard)
    with raises(StoreError, "no such tensor"):
        hookmap.open_store(tmp_path / "run").read(0, "features", 1)


def test_statistics_of_features_are_those_of_dense_ones(hm: HookedModel, relu: Dictionary, tmp_path: Path) -> None:
    names = ["mean", "variance", "max", "kurtosis", "norm", "histogram"]
    options: dict[str, Any] = {"reductions": names, "edges": [0.0, 0.5, 1.0], "by": "position"}
    found = hm.reduce(RAGGED, "features", dictionaries=[relu], **options)
    run = hm.capture(RAGGED, ["resid_post", "features"], 1, 0, dictionaries=[relu], store=tmp_path / "run")
    rows = torch.cat([relu.encode(part) for part in run["resid_post", 1]]).double()
    own = found["features", 1]
    torch.testing.assert_close(own["mean"], rows.mean(0))
    torch.testing.assert_close(own["variance"], rows.var(0, correction=0))
    torch.testing.assert_close(own["max"].double(), rows.max(0).values)
    assert own["norm.mean"] == pytest.approx(float(rows.norm(dim=1).mean()))
    first = torch.stack([relu.encode(part[:1])[0] for part in run["resid_post", 1]]).double()
    torch.testing.assert_close(own.by("position")["mean"][0], first.mean(0))
    from hookmap.analysis.reductions.run import reduce_store

    stored = reduce_store(hookmap.open_store(tmp_path / "run"), "features", **options)["features", 1]
    torch.testing.assert_close(stored["kurtosis"], own["kurtosis"], equal_nan=True)
    with raises(SelectionError, "covariance", "features"):
        hm.reduce(RAGGED, "features", dictionaries=[relu], reductions="covariance")


def test_memory_is_not_that_of_dense_rows(hm: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a few rows are dense at a time, however many a pass has."""
    from hookmap.analysis.dictionaries import dictionary as module

    seen: list[int] = []
    own = Dictionary.encode

    def encode(self: Dictionary, rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return own(self, rows)

    monkeypatch.setattr(module, "CHUNK", 4 * F)
    monkeypatch.setattr(Dictionary, "encode", encode)
    hm.capture(RAGGED, "features", max_new_tokens=0, dictionaries=[dictionary(hm.map.d_model)])
    assert max(seen) == 4 and sum(seen) == sum(map(len, RAGGED))


def test_bad_input_is_refused(hm: HookedModel, relu: Dictionary, tmp_path: Path) -> None:
    with raises(SelectionError, "features", "dictionaries="):
        hm.capture(RAGGED, "features", 1)
    with raises(SelectionError, "load_dictionary", "as_dictionary"):
        hm.capture(RAGGED, "features", dictionaries=["sae"])
    with raises(SelectionError, "mean", "keep_dtype", "features"):
        hm.capture(RAGGED, "features", dictionaries=[relu], mean=True, keep_dtype="float16", features=3)
    with raises(SelectionError, "7 numbers"):
        hm.capture(RAGGED, "features", max_new_tokens=0, dictionaries=[dictionary(7)])
    with raises(SelectionError, "layer"):
        hm.capture(RAGGED, "features", dictionaries=[dictionary(hm.map.d_model, layer=99)])
    with raises(SelectionError, "dictionary="):
        hm.examples(RAGGED, "features", dictionaries=[relu])
    theirs = as_dictionary(SimpleNamespace(encode=relu.encode, decode=relu.decode, d_in=relu.d_in), "resid_post", 1)
    with raises(SelectionError, "Foreign", "load_dictionary"):
        _named("features", "all", 0, {"dictionaries": [theirs]})
    hm.capture(RAGGED, "features", max_new_tokens=0, dictionaries=[relu], store=tmp_path / "run")
    store = hookmap.open_store(tmp_path / "run")
    assert isinstance(store, CaptureStore)
    with raises(SelectionError, "sparse"):
        store.dataset("features", 1)
    said = CliRunner().invoke(main, ["store", "export", str(tmp_path / "run"), "--to", "numpy", "-o", "out"])
    assert said.exit_code and "sparse" in said.output


def test_a_dictionary_is_sent_to_workers_as_it_is(relu: Dictionary) -> None:
    """By way of bytes of safetensors: nothing is pickled."""
    d = relu.d_in
    some = torch.randn(F, generator=torch.Generator().manual_seed(2))
    gated = replace(
        relu, activation="gated", gate={"bias": some, "magnitude": some / 9, "magnitude_bias": some},
        input_bias=torch.ones(d), normalisation="layer_norm",
    )  # fmt: skip
    skips = dictionary(d, activation="topk", k=3, by_norms=True, skip=torch.eye(d))
    jumps = dictionary(d, activation="jumprelu", threshold=some.abs())
    rows = torch.randn(9, d, generator=torch.Generator().manual_seed(3))
    for each in (relu, gated, skips, jumps):
        (packed,) = _named("features", "all", 0, {"dictionaries": each})["dictionaries"]
        again = from_bytes(packed)
        assert isinstance(packed, bytes) and again.about == each.about and again.digest == each.digest
        assert torch.equal(again.encode(rows), each.encode(rows))
        assert torch.equal(again.reconstruct(rows), each.reconstruct(rows))


@pytest.mark.slow
def test_the_command_keeps_features(tmp_path: Path) -> None:
    save_dictionary(dictionary(64, layer=8), tmp_path / "sae")
    made = ["capture", "--points", "features", "--dictionary", str(tmp_path / "sae"), "--prompt", "Tom has 3 apples."]
    said = CliRunner().invoke(main, [*made, "--max-new-tokens", "0", "-o", str(tmp_path / "run")])
    assert said.exit_code == 0, said.output
    assert hookmap.open_store(tmp_path / "run").read(0, "features", 8).shape == (17, F)
    assert "features" in CliRunner().invoke(main, ["inspect", str(tmp_path / "run")]).output
