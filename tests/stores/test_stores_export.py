"""Other programs read the same rows out of an export, and an import takes tensors and nothing else."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.raises import raises
from support.store_runs import Run, resid, tree, write_or_resume

from hookmap.cli.main import main
from hookmap.errors import SelectionError, StoreError
from hookmap.stores import open_store
from hookmap.stores.export import export
from hookmap.stores.importing import import_pt

RUN = Run(resid(), [[(0, 3, 7), (1, 5, 6)], [(2, 2, 30)]], shard_tokens=12)
MID = ("resid_mid", 1)


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    write_or_resume(tmp_path / "c", RUN)
    return tmp_path / "c"


def all_rows(key: tuple[str, int | None]) -> torch.Tensor:
    return torch.cat([RUN.rows(number, key) for number in sorted(RUN.samples)])


def test_pt_is_a_dict_of_plain_tensors(capture: Path, tmp_path: Path) -> None:
    assert export(open_store(capture), "pt", tmp_path / "out") == []
    found = torch.load(tmp_path / "out" / "activations.pt", weights_only=True)
    assert set(found) == {"resid_pre.0", "resid_mid.0", "resid_pre.1", "resid_mid.1", "offsets"}
    assert torch.equal(found["resid_mid.1"], all_rows(MID)) and found["offsets"].tolist() == [0, 7, 13, 43]
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [RUN.samples[number].prompt for number in range(3)]


def test_numpy_is_one_array_for_each_tensor(capture: Path, tmp_path: Path) -> None:
    notes = export(open_store(capture), "numpy", tmp_path / "out", point="resid_mid")
    assert notes == ["torch.bfloat16 became float32: the values are the same"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "offsets.npy", "resid_mid.0.npy", "resid_mid.1.npy", "samples.jsonl", "tensors.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "tensors.json").read_text()) == [
        {"name": f"resid_mid.{layer}", "point": "resid_mid", "layer": layer, "call": None} for layer in (0, 1)
    ]
    found = np.load(tmp_path / "out" / "resid_mid.1.npy", allow_pickle=False)
    assert found.dtype == np.float32 and np.array_equal(found, all_rows(MID).float().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_numpy_keeps_the_dtypes_that_it_knows(tmp_path: Path, dtype: torch.dtype) -> None:
    run = replace(RUN, tensors=resid(dtype=dtype))
    write_or_resume(tmp_path / "c", run)
    assert export(open_store(tmp_path / "c"), "numpy", tmp_path / "out") == []
    found = np.load(tmp_path / "out" / "resid_mid.1.npy")
    expected = torch.cat([run.rows(number, MID) for number in range(3)])
    assert torch.equal(torch.from_numpy(found), expected)


@pytest.mark.slow
def test_datasets_has_a_row_for_each_sample(capture: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    export(open_store(capture), "datasets", tmp_path / "out")
    found = datasets.load_from_disk(str(tmp_path / "out"))
    assert len(found) == 3 and found[1]["token_ids"] == list(RUN.samples[1].token_ids)
    assert found[0]["text"] == RUN.samples[0].text and found[0]["id"] is None
    for number in range(3):
        assert np.array_equal(np.array(found[number]["resid_mid.1"]), RUN.rows(number, MID).float().numpy())


def test_saelens_has_sequences_of_one_length_under_the_hooks_name(capture: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    notes = export(open_store(capture), "saelens", tmp_path / "out", point="resid_mid", layer=1, context=6)
    assert notes[0] == "1 rows at the ends of samples fill no sequence of 6 and are left out"
    found = datasets.load_from_disk(str(tmp_path / "out"))
    assert found.column_names == ["blocks.1.hook_resid_mid", "token_ids"] and len(found) == 1 + 1 + 5
    assert found.features["blocks.1.hook_resid_mid"].shape == (6, 16)
    found.set_format(type="torch", columns=found.column_names)  # as SAELens's ActivationsStore reads it
    rows, ids = found[3]["blocks.1.hook_resid_mid"], found[3]["token_ids"]
    assert torch.equal(rows, RUN.rows(2, MID)[6:12].float()) and ids.tolist() == list(RUN.samples[2].token_ids[6:12])


def test_probelab_has_a_file_for_each_layer_of_a_point(capture: Path, tmp_path: Path) -> None:
    assert export(open_store(capture), "probelab", tmp_path / "out", point="resid_mid") == []
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["format"], meta["layers"], meta["n_samples"]) == ("memmap_v1", [0, 1], 3)
    shape = (meta["total_tokens"], meta["hidden_dim"])
    found = np.memmap(tmp_path / "out" / "layer_1.bin", dtype=np.int16, mode="r", shape=shape).copy()
    assert torch.equal(torch.from_numpy(found).view(torch.bfloat16), all_rows(MID))
    assert np.fromfile(tmp_path / "out" / "offsets.bin", dtype=np.int64).tolist() == [0, 7, 13, 43]
    assert np.fromfile(tmp_path / "out" / "detection_mask.bin", dtype=np.uint8).tolist() == [1] * 43


WHOLE = replace(RUN, tensors={**resid(), ("logits", None): (torch.bfloat16, 40)})


@pytest.mark.parametrize("point", ["resid_mid", "hook_resid_mid", "blocks.1.hook_resid_mid"])
@pytest.mark.parametrize("layout", ["pt", "numpy", "saelens", "probelab"])
def test_a_point_is_exported_beside_a_tensor_of_the_whole_model(tmp_path: Path, layout: str, point: str) -> None:
    if layout == "saelens":
        pytest.importorskip("datasets")
    write_or_resume(tmp_path / "c", WHOLE)
    write_or_resume(tmp_path / "d", RUN)
    how = {"layer": 1, "context": 6} if layout == "saelens" else {}
    export(open_store(tmp_path / "c"), layout, tmp_path / "out", point=point, **how)
    export(open_store(tmp_path / "d"), layout, tmp_path / "alone", point=point, **how)
    assert tree(tmp_path / "out").keys() == tree(tmp_path / "alone").keys()
    changing = ("state.json", ".arrow")  # the names that datasets gives
    for name, data in tree(tmp_path / "out").items():
        assert name.endswith(changing) or data == tree(tmp_path / "alone")[name], name


def test_tensors_of_the_whole_model_are_exported_and_given_to_train_on(tmp_path: Path) -> None:
    write_or_resume(tmp_path / "c", WHOLE)
    store = open_store(tmp_path / "c")
    export(store, "numpy", tmp_path / "out", point="logits")
    assert sorted(f.name for f in (tmp_path / "out").glob("l*.npy")) == ["logits.npy"]
    with raises(SelectionError, "logits is a tensor of the whole model"):
        export(store, "numpy", tmp_path / "two", point="logits", layer=1)
    assert set(next(iter(store.dataset(["logits", "hook_resid_mid"])))) == {"logits", "resid_mid.0", "resid_mid.1"}


@pytest.mark.parametrize(
    ("layout", "what", "message"),
    [
        ("saelens", {}, "SAELens caches one tensor, in sequences of one length"),
        ("probelab", {}, "probelab holds the layers of one point: got resid_mid, resid_pre"),
        ("hdf5", {}, "unknown layout 'hdf5': expected one of pt, numpy, datasets, saelens, probelab"),
        ("numpy", {"layer": 9}, "nothing to export: no such tensor"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(
    capture: Path, tmp_path: Path, layout: str, what: dict[str, int], message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        export(open_store(capture), layout, tmp_path / "out", **what)
    assert list(tmp_path.iterdir()) == [capture]


def test_a_point_that_is_not_held_is_refused(capture: Path, tmp_path: Path) -> None:
    with raises(SelectionError, "this capture does not hold mlp_out"):
        export(open_store(capture), "numpy", tmp_path / "out", point="mlp_out")


def test_a_capture_without_samples_is_refused(tmp_path: Path) -> None:
    write_or_resume(tmp_path / "c", replace(RUN, batches=[]))
    with raises(StoreError, "nothing to export: no finished sample"):
        export(open_store(tmp_path / "c"), "numpy", tmp_path / "out")


def test_nothing_is_written_over(capture: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with raises(StoreError, "exists already"):
        export(open_store(capture), "numpy", tmp_path / "out")


# --- import ----------------------------------------------------------------------------------------------------------


A, B = torch.arange(20.0).reshape(5, 4), -torch.arange(20.0).reshape(5, 4)
LAYOUTS: dict[str, Callable[[], object]] = {
    "point.layer": lambda: {"resid_pre.8": A, "resid_mid.8": B},
    "layer_8.point": lambda: {"layer_8.resid_pre": A, "layer_8.resid_mid": B},
    "pairs": lambda: {("resid_pre", 8): A, (8, "resid_mid"): B},
    "TransformerLens": lambda: {"blocks.8.hook_resid_pre": A, "blocks.8.hook_resid_mid": B},
    "by layer": lambda: {8: {"resid_pre": A, "resid_mid": B}},
    "by layer, named": lambda: {"layer_8": {"resid_pre": A, "resid_mid": B}},
    "by point": lambda: {"resid_pre": {8: A}, "resid_mid": {"8": B}},
    "batched": lambda: {"resid_pre.8": A[None], "resid_mid.8": B[None]},
    "lists": lambda: {"resid_pre.8": [A], "resid_mid.8": [B]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dicts_of_tensors_are_imported(tmp_path: Path, layout: str) -> None:
    torch.save(LAYOUTS[layout](), tmp_path / "old.pt")
    assert import_pt(tmp_path / "old.pt", tmp_path / "c") == (1, [])
    store = open_store(tmp_path / "c")
    assert store.verify() == [] and store.keys == (("resid_pre", 8), ("resid_mid", 8))
    assert torch.equal(store.read(0, "resid_pre", 8), A) and torch.equal(store.read(0, "resid_mid", 8), B)


def test_an_export_is_imported_again(capture: Path, tmp_path: Path) -> None:
    export(open_store(capture), "pt", tmp_path / "out")
    assert import_pt(tmp_path / "out" / "activations.pt", tmp_path / "again", model="tiny") == (3, [])
    store = open_store(tmp_path / "again")
    for number in range(3):
        for key in RUN.keys:
            assert torch.equal(store.read(number, *key), RUN.rows(number, key))


def test_what_is_no_tensor_of_a_point_is_told(tmp_path: Path) -> None:
    torch.save({"resid_mid.8": A, "prompts": ["a"], "weird": B, "meta": {"seed": 1}}, tmp_path / "old.pt")
    assert import_pt(tmp_path / "old.pt", tmp_path / "c") == (1, ["prompts", "weird", "meta.seed"])


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda found, path: path.write_bytes(pickle.dumps(found))])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, save: Callable[[object, Path], None]) -> None:
    save({"resid_mid.8": A, "x": Malicious(tmp_path / "run")}, tmp_path / "old.pt")
    done = CliRunner().invoke(main, ["store", "import", str(tmp_path / "old.pt"), "-o", str(tmp_path / "c")])
    assert done.exit_code == 1 and "old.pt" in done.output and "weights_only" not in done.output
    assert not (tmp_path / "run").exists() and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([A], "holds a list: expected a dict of tensors with keys"),
        ({"weird": A}, "holds no tensor of a known point: .*Found: weird"),
        ({"resid_mid.8": A, "layer_8.resid_mid": A}, "is there twice, under two names"),
        ({"resid_mid.8": A, "resid_pre.8": A[:3]}, r"resid_pre, layer 8: rows \[3\]"),
        ({"resid_mid.8": A[0]}, "has no rows"),
        ({"resid_mid.8": A, "offsets": torch.tensor([0, 9])}, "do not divide 5 rows"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, saved: object, message: str) -> None:
    torch.save(saved, tmp_path / "old.pt")
    with pytest.raises(StoreError, match=f"(?s){message}"):
        import_pt(tmp_path / "old.pt", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_command_exports_and_imports(capture: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    done = CliRunner().invoke(main, ["store", "export", str(capture), "--to", "pt", "-o", str(out)])
    assert done.exit_code == 0 and done.stdout == f"{out}\n"
    done = CliRunner().invoke(main, ["store", "import", str(out / "activations.pt"), "-o", str(again)])
    assert done.exit_code == 0 and "3 samples" in done.output
