"""Outlier features are held against their definitions, in loops over planted rows."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support import plain_hooks
from support.opened import RAGGED, opened
from support.raises import raises
from support.tiny_tokenizer import WORDS, tiny_tokenizer

import hookmap
from hookmap.activations import Activation, Sample
from hookmap.analysis.outliers import OutlierFeatures, of_statistics
from hookmap.analysis.reductions.reducer import Reducer
from hookmap.analysis.reductions.statistics import Statistics
from hookmap.analysis.reductions.wanted import wanted
from hookmap.cli.main import main
from hookmap.errors import SelectionError


def planted() -> tuple[OutlierFeatures, torch.Tensor]:
    """Eight layers, 5 texts of 10 tokens, 16 features of about 0.05; and what was planted, [layers, 50, 16]."""
    rows = 0.05 * torch.randn(8, 50, 16, generator=torch.Generator().manual_seed(0))
    rows[:2, ::3, 3] = -6.0  # in a quarter of the layers, at 8.5 % of all positions: an outlier feature
    rows[0, :, 4] = 7.0  # at 12.5 % of the positions, in one layer
    rows[:, 0, 5] = 6.5  # in every layer, at 2 % of the positions
    rows[2:4, ::10, 9] = 300.0  # massive, on first tokens
    rows[3, 15, 9] = -400.0  # and once elsewhere
    rows[4, 1, 10] = 99.0  # large, and not massive
    rows[0, 40:] = 20.0
    rows[0, 41, 11] = 500.0  # of a text whose median is 20
    statistics = Statistics(wanted(["min", "max", "outlier", "massive"]), tuple(("resid_post", n) for n in range(8)))
    sink = Reducer(statistics)
    for text in range(5):
        for layer in range(8):
            sink.write(Activation(text, "resid_post", layer, 0, rows[layer, 10 * text :][:10]))
        sink.finish(Sample(text, "", "", tuple(range(10)), 10, 10))
    return of_statistics(statistics), rows


def test_each_definition_is_that_of_its_paper() -> None:
    found, rows = planted()
    outlier, massive = set(), set()
    for feature in range(16):
        large = rows[:, :, feature].abs() >= 6
        if large.any(1).float().mean() >= 0.25 and large.float().mean() >= 0.06:
            outlier.add(feature)
        for layer in range(8):
            for text in rows[layer].split(10):
                size = text[:, feature].abs()
                if bool(((size > 100) & (size >= 1000 * text.abs().median())).any()):
                    massive.add(feature)
    assert outlier == {3} and massive == {9}
    assert {each.feature for each in found.features if each.outlier} == outlier
    assert {each.feature for each in found.features if each.massive} == massive
    own = {each.feature: each for each in found.features}
    assert list(own) == [9, 3]  # the largest first
    assert (own[9].largest, own[9].at, own[9].massive_layers) == (-400.0, 3, (2, 3))
    assert own[9].massive == pytest.approx(11 / 400) and own[9].sink == pytest.approx(10 / 11)
    assert own[3].largest == 20.0 and own[3].layers == 0.25
    assert own[3].positions == pytest.approx(float((rows[:, :, 3].abs() >= 6).double().mean()))
    keys, sizes = found.magnitudes("resid_post", [9, 3])
    torch.testing.assert_close(sizes, rows.abs().amax(1)[:, [9, 3]].double())
    assert len(keys) == 8


def test_what_is_printed_is_json_without_what_is_no_number() -> None:
    document = json.loads(json.dumps(planted()[0].as_json(), allow_nan=False))
    assert [each["feature"] for each in document["features"]] == [9, 3]
    assert document["features"][1]["sink"] is None
    assert document["features"][0]["largest_by_layer"]["resid_post.3"] == 400.0
    assert document["rows"]["resid_post.0"] == 50


def test_statistics_without_them_are_refused() -> None:
    with raises(SelectionError, "outlier", "massive", "mean"):
        of_statistics(opened("llama").reduce(RAGGED, "resid_post", [1], ["mean"]))


def test_a_model_with_one_large_feature() -> None:
    hm = hookmap.open(plain_hooks.build("llama"), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        hm.model.get_input_embeddings().weight[:, 7] = 5000.0
    found = hm.outliers(RAGGED)
    assert found.features[0].feature == 7 and found.features[0].outlier and found.features[0].massive == 1.0
    first = sum(len(each) > 0 for each in RAGGED) / sum(map(len, RAGGED))
    assert found.features[0].sink == pytest.approx(first)


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_the_command(tmp_path: Path) -> None:
    model = plain_hooks.build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 7] = 5000.0
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    run = ["outliers", str(tmp_path / "m"), "--prompt", " ".join(WORDS[:8])]
    shown = CliRunner().invoke(main, run)
    assert shown.exit_code == 0, shown.output
    assert "1 outlier feature" in shown.stderr and shown.stdout == ""
    printed = CliRunner().invoke(main, [*run, "--json"])
    assert json.loads(printed.stdout)["features"][0]["feature"] == 7
    assert CliRunner().invoke(main, ["outliers"]).exit_code == 2
    pytest.importorskip("vl_convert")
    drawn = CliRunner().invoke(main, [*run, "--svg", "o.svg"])
    assert drawn.exit_code == 0 and "feature of resid_post" in (tmp_path / "o.svg").read_text()
