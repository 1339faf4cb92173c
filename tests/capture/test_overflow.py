"""Rows that are infinite in the dtype that is kept: told, counted, or refused; finished samples stay."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.enlarged import enlarged
from support.plain_hooks import watching
from support.raises import raises
from torch import nn

import hookmap
from hookmap.cli.main import main
from hookmap.errors import CaptureError, SelectionError

IDS = [[6, 5, 7, 8, 9], [65, 13, 16]]
HUGE = ("resid_post", 1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """bfloat16; one feature of block 1's output is beyond float16, in some rows."""
    return enlarged(1.5e5, torch.bfloat16)


@pytest.fixture(scope="module")
def hm(model: nn.Module) -> Any:
    return hookmap.open(model)


def too_large(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """[pos], by a plain hook: whether a row of block 1's output becomes infinite in float16."""
    with watching(model, {"rows": ("model.layers.1", "output")}) as seen:
        model(torch.tensor([ids]))
    found = seen["rows"][0][0]
    return found.isfinite().all(-1) & found.half().isinf().any(-1)


@pytest.mark.parametrize("how", [{"max_new_tokens": 0}, {"max_new_tokens": 6}, {"max_new_tokens": 6, "batch_size": 1}])
def test_what_is_lost_is_told_and_counted(
    model: nn.Module, hm: Any, how: dict[str, Any], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING, "hookmap"):
        run = hm.capture(IDS, ["resid_pre", "resid_post"], [0, 1], keep_dtype="float16", store=tmp_path / "c", **how)
    lost = [too_large(model, list(sample.token_ids[: sample.rows])) for sample in run.samples]
    count = int(sum(mask.sum() for mask in lost))
    assert 0 < count < sum(map(len, lost))
    for sample, mask in enumerate(lost):
        assert torch.equal(run.read(sample, *HUGE).isinf().any(-1), mask)
    note = json.loads((tmp_path / "c/manifest.json").read_text())["runs"][0]
    assert note["overflow"] == {"dtype": "float16", "rows": {"resid_post.1": count}}
    (told,) = [record.getMessage() for record in caplog.records]
    first = int(lost[0].nonzero()[0])
    assert "65504" in told and "resid_post.1" in told and f"position {first} of sample 0" in told
    assert "Keep bfloat16" in told


@pytest.mark.parametrize(
    "keep", [{"mean": True, "positions": "generated"}, {"positions": "last"}, {"positions": "generated", "every": 2}]
)
def test_it_is_counted_in_each_way_of_keeping(hm: Any, keep: dict[str, Any]) -> None:
    wide = hm.capture(IDS, *HUGE, max_new_tokens=8, **keep)
    run = hm.capture(IDS, *HUGE, max_new_tokens=8, keep_dtype="float16", **keep)
    expected = sum(int(wide.read(n, *HUGE).half().isinf().any(-1).sum()) for n in range(2))
    assert expected
    assert run.manifest.runs[0]["overflow"]["rows"] == {"resid_post.1": expected}


def test_nothing_is_said_where_nothing_is_lost(hm: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hookmap"):
        for dtype, layer in (("bfloat16", 1), ("float32", 1), ("float16", 0)):
            run = hm.capture(IDS, "resid_post", layer, max_new_tokens=3, keep_dtype=dtype, overflow="refuse")
            assert run.manifest.runs == ()
    assert not caplog.records


def test_an_infinity_of_the_model_itself_is_no_loss(model: nn.Module) -> None:
    """What the model computes is kept as it is, whatever the dtype."""
    infinite = copy.deepcopy(model)
    with torch.no_grad():
        infinite.model.layers[1].mlp.down_proj.weight[7] = torch.inf
    run = hookmap.open(infinite).capture(IDS[:1], *HUGE, max_new_tokens=0, keep_dtype="float16", overflow="refuse")
    assert not run[HUGE].isfinite().all() and run.manifest.runs == ()


def test_refused_the_finished_samples_stay_and_the_run_can_go_on(model: nn.Module, hm: Any, tmp_path: Path) -> None:
    harmless, huge = IDS[1], IDS[0]
    assert not too_large(model, harmless).any()
    how: dict[str, Any] = {"max_new_tokens": 0, "keep_dtype": "float16", "batch_size": 1, "store": tmp_path / "c"}
    with raises(CaptureError, "65504", "resid_post.1", "overflow='warn'"):
        hm.capture([harmless, huge], *HUGE, overflow="refuse", **how)
    assert [s.sample for s in hookmap.open_store(tmp_path / "c").samples] == [0]
    run = hm.capture([harmless, huge], *HUGE, resume=True, **how)
    assert [s.sample for s in run.samples] == [0, 1] and run.manifest.finished
    assert run.manifest.runs[-1]["overflow"]["rows"] == {"resid_post.1": int(too_large(model, huge).sum())}


def test_rows_before_interventions_are_counted_by_themselves(hm: Any) -> None:
    zero = [{"do": "ablate", "point": "resid_post", "layers": [1], "to": "zero"}]
    run = hm.capture(IDS, *HUGE, max_new_tokens=2, keep_dtype="float16", interventions=zero, before=True)
    assert set(run.manifest.runs[0]["overflow"]["rows"]) == {"before/resid_post.1"}


def test_inspect_shows_what_is_not_finite(model: nn.Module, hm: Any, tmp_path: Path) -> None:
    folder = str(tmp_path / "c")
    hm.capture(IDS, "resid_post", [0, 1], max_new_tokens=0, keep_dtype="float16", store=folder)
    count = int(sum(too_large(model, ids).sum() for ids in IDS))
    for more in ((), ("--verify",)):
        shown = CliRunner().invoke(main, ["inspect", folder, *more])
        assert shown.exit_code == 0, shown.output
        line = next(line for line in shown.stderr.splitlines() if line.split()[:2] == ["resid_post", "1"])
        assert f" {count} " in line
        assert f"became infinite in the dtype kept: {count} of resid_post.1" in shown.stderr
        assert "the first is resid_post.1, sample 0, position 0" in " ".join(shown.stderr.split())
    tensors = json.loads(CliRunner().invoke(main, ["inspect", folder, "--json"]).stdout)["tensors"]
    assert [tensor["not_finite"] for tensor in tensors] == [0, count]
    assert CliRunner().invoke(main, ["inspect", folder, "--no-norms"]).exit_code == 0


def test_inspect_says_that_one_row_rules_the_mean(tmp_path: Path, model: nn.Module) -> None:
    sink = copy.deepcopy(model)
    with torch.no_grad():
        sink.model.layers[1].mlp.down_proj.weight[7] /= 1.5e5
        sink.model.embed_tokens.weight[IDS[0][0]] *= 1000
    hookmap.open(sink).capture(IDS, "resid_pre", 0, max_new_tokens=0, store=tmp_path / "c")
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "c")]).stderr
    assert "times as long as the median" in " ".join(shown.split()) and "--positions 1:" in shown


def test_a_word_that_is_no_choice_is_refused(hm: Any) -> None:
    with raises(SelectionError, "overflow: expected warn or refuse, got 'drop'"):
        hm.capture(IDS, *HUGE, overflow="drop")
