"""What a selection keeps is exactly those rows, features and means of the whole capture."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import plain_hooks
from support.opened import RAGGED
from support.raises import raises
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
import hookmap.datasets
from hookmap.capture.result import Capture
from hookmap.capture.rows import row_selection
from hookmap.model import HookedModel
from hookmap.stores.memory import MemoryStore

NEW = 40
POINTS = ["resid_pre", "resid_mid", "q"]
Rows = list[int]


@pytest.fixture(scope="module")
def hm() -> HookedModel:
    return hookmap.open(plain_hooks.build("opt"), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module", params=[NEW, 0], ids=["generation", "harvest"])
def whole(hm: HookedModel, request: Any) -> tuple[int, Capture]:
    return request.param, hm.capture(RAGGED, POINTS, max_new_tokens=request.param)


def positions_by_hand(spec: Any, prompt: int, rows: int, tokens: tuple[int, ...]) -> Rows:
    fed = list(range(rows))
    return {
        "prompt": lambda: fed[:prompt],
        "generated": lambda: fed[prompt:],
        "last": lambda: fed[-1:],
        "last_prompt": lambda: [prompt - 1],
        "2:5": lambda: fed[2:5],
        "-2:": lambda: fed[prompt - 2 :],
        "0:40:3": lambda: fed[0:40:3],
        "1,0,-1,8": lambda: sorted({1, 0, prompt - 1, 8} & set(fed)),
        "text=be": lambda: [p for p in fed if tokens[p] == 4],
    }[spec]()


@pytest.mark.parametrize(
    "spec", ["prompt", "generated", "last", "last_prompt", "2:5", "-2:", "0:40:3", "1,0,-1,8", "text=be"]
)
def test_positions(hm: HookedModel, whole: tuple[int, Capture], spec: str, tmp_path: Path) -> None:
    new, full = whole
    run = hm.capture(RAGGED, POINTS, max_new_tokens=new, positions=spec, store=tmp_path / "run")
    assert run.tokens == full.tokens
    for number, sample in enumerate(full.samples):
        expected = positions_by_hand(spec, sample.prompt_tokens, sample.rows, sample.token_ids)
        got = run.samples[number]
        assert (got.positions, got.rows) == (tuple(expected), len(expected))
        assert run.steps(number) == tuple(max(0, p - sample.prompt_tokens + 1) for p in expected)
        for key in run.keys:
            if expected:
                assert torch.equal(run.read(number, *key), full.read(number, *key)[expected]), key
                assert torch.equal(
                    run.read(number, *key, tokens=[expected[-1]]), full.read(number, *key)[expected[-1:]]
                )
    assert not hookmap.open_store(tmp_path / "run").verify()


def test_the_tokens_that_match_a_text_are_there() -> None:
    """The tests above would pass on no rows at all if no token matched."""
    hm = hookmap.open(plain_hooks.build("opt"), tokenizer=tiny_tokenizer())
    run = hm.capture("to be or not to be", ["resid_pre"], [0], 3, positions="text=be")
    assert run.samples[0].positions[:2] == (1, 5)  # type: ignore[index]


def test_every_nth_of_a_selection(hm: HookedModel, whole: tuple[int, Capture]) -> None:
    new, full = whole
    run = hm.capture(RAGGED, POINTS, max_new_tokens=new, positions="2:", every=4)
    for number, sample in enumerate(full.samples):
        expected = [p for p in range(sample.rows) if p >= 2 and p % 4 == 0]
        assert run.samples[number].positions == tuple(expected)
        assert torch.equal(run.read(number, "resid_mid", 1), full.read(number, "resid_mid", 1)[expected])


@pytest.mark.parametrize("every", [2, 3, 7])
@pytest.mark.parametrize("spec", ["last", "last_prompt", "1,0,-1,8"])
def test_tokens_that_are_named_stay_whatever_every_is(
    hm: HookedModel, whole: tuple[int, Capture], spec: str, every: int
) -> None:
    """`last` once gave the row before the last, or one of no sample at all."""
    new, full = whole
    run = hm.capture(RAGGED, POINTS, max_new_tokens=new, positions=spec, every=every)
    for number, sample in enumerate(full.samples):
        expected = positions_by_hand(spec, sample.prompt_tokens, sample.rows, sample.token_ids)
        assert run.samples[number].positions == tuple(expected)
        assert torch.equal(run.read(number, "resid_mid", 1), full.read(number, "resid_mid", 1)[expected])
    estimate = hm.estimate(RAGGED, POINTS, max_new_tokens=new, positions=spec, every=every)
    assert estimate.rows >= sum(sample.rows for sample in run.samples)


@pytest.mark.parametrize("positions", ["all", "generated", "1:7"])
def test_the_mean_over_positions(hm: HookedModel, whole: tuple[int, Capture], positions: str) -> None:
    new, full = whole
    run = hm.capture(RAGGED, POINTS, max_new_tokens=new, positions=positions, mean=True)
    for number, sample in enumerate(full.samples):
        chosen = {"all": slice(None), "generated": slice(sample.prompt_tokens, None), "1:7": slice(1, 7)}[positions]
        rows = full.read(number, "resid_mid", 1)[chosen]
        assert run.samples[number].rows == (1 if len(rows) else 0)
        if len(rows):
            assert run.samples[number].positions == "mean"
            torch.testing.assert_close(run.read(number, "resid_mid", 1)[0], rows.double().mean(0).float())
            with raises(hookmap.SelectionError, "one mean over positions"):
                run.read(number, "resid_mid", 1, tokens=[0])
            with raises(hookmap.SelectionError, "one mean"):
                run.steps(number)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "new"), [(100, 0), (2, 100)])
def test_a_mean_in_bfloat16_is_summed_in_float32(tokens: int, new: int) -> None:
    hm = hookmap.open(plain_hooks.build("llama", torch.bfloat16))
    prompt = [[n % 90 + 3 for n in range(tokens)]]
    rows = hm.capture(prompt, ["resid_pre"], [1], new).read(0, "resid_pre", 1)
    mean = hm.capture(prompt, ["resid_pre"], [1], new, mean=True).read(0, "resid_pre", 1)[0]
    assert mean.dtype == torch.bfloat16
    torch.testing.assert_close(mean, rows.double().mean(0).bfloat16(), rtol=2**-8, atol=1e-6)


def test_features_and_dtype(hm: HookedModel, whole: tuple[int, Capture]) -> None:
    new, full = whole
    some = hm.capture(RAGGED, ["resid_mid"], max_new_tokens=new, features=[7, 0, 31], keep_dtype=torch.bfloat16)
    drawn = hm.capture(RAGGED, ["resid_mid"], max_new_tokens=new, features=5, features_seed=3)
    again = hm.capture(RAGGED, ["resid_mid"], max_new_tokens=new, features=5, features_seed=3)
    columns = row_selection(features=5, features_seed=3).columns(32)
    assert columns is not None and len(set(columns)) == 5
    assert columns != row_selection(features=5, features_seed=4).columns(32)
    for number in range(len(RAGGED)):
        rows = full.read(number, "resid_mid", 2)
        assert torch.equal(some.read(number, "resid_mid", 2), rows[:, [7, 0, 31]].bfloat16())
        assert torch.equal(drawn.read(number, "resid_mid", 2), rows[:, columns])
        assert torch.equal(again.read(number, "resid_mid", 2), rows[:, columns])


@pytest.mark.parametrize(
    ("settings", "bytes_of_a_row"),
    [
        ({}, 32 * 4),
        ({"positions": "prompt"}, 32 * 4),
        ({"every": 3}, 32 * 4),
        ({"mean": True}, 32 * 4),
        ({"features": 4}, 4 * 4),
        ({"keep_dtype": "float16"}, 32 * 2),
    ],
)
def test_the_estimate_knows_the_selection(hm: HookedModel, settings: dict[str, Any], bytes_of_a_row: int) -> None:
    for new in (NEW, 0):
        expected = hm.estimate(RAGGED, ["resid_mid"], [1], new, **settings)
        run = hm.capture(RAGGED, ["resid_mid"], [1], new, **settings)
        rows = sum(sample.rows for sample in run.samples)
        assert (expected.rows, expected.bytes) == (rows, rows * bytes_of_a_row)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positions": "lst"}, '"last_prompt", a span such as'),
        ({"positions": []}, "positions"),
        ({"positions": [True]}, "positions"),
        ({"positions": slice(5, 1, -1)}, "positions"),
        ({"positions": "1:2:0"}, "positions '1:2:0'"),
        ({"positions": "-:"}, "positions '-:'"),
        ({"positions": [3, 1, 3]}, "3 given more than once"),
        ({"positions": [0, 9999]}, r"positions 9999: no prompt has them: .*9 tokens, and up to 1 more.*from -9 to 9"),
        ({"positions": [-10]}, "positions -10: no prompt has them"),
        ({"positions": ":-"}, "positions ':-'"),
        ({"positions": "text=zebra"}, "no single token"),
        ({"every": 0}, "every: expected a whole number, at least 1"),
        ({"mean": True, "positions": "last"}, "leave one of them out"),
        ({"features": [1, 1]}, "features: expected"),
        ({"features": [99]}, r"features \[99\] are not in a row here: it has 0 to 31"),
        ({"features": 99}, "Give 32 or fewer"),
        ({"features": 0}, "features: expected"),
        ({"keep_dtype": "int8"}, "keep_dtype: expected float32, bfloat16, float16"),
        ({"keep_dtype": ["int8"]}, "keep_dtype: expected float32, bfloat16, float16"),
        ({"every": 0, "keep_dtype": "int8"}, r"every(.|\n)*keep_dtype"),
        ({"points": ["pattern"], "mean": True}, "pattern has a row for each query"),
    ],
)
def test_a_selection_that_means_nothing_is_refused(hm: HookedModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(hookmap.SelectionError, match=message):
        hm.capture(RAGGED, **{"points": ["resid_mid"], "max_new_tokens": 2, **settings})


@pytest.mark.parametrize("settings", [{"mean": True}, {"positions": "last"}, {"features": 2}])
def test_a_selection_refused_for_its_points_leaves_no_folder(
    hm: HookedModel, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with raises(hookmap.SelectionError, "pattern has a row for each query"):
        hm.capture(RAGGED, ["pattern"], max_new_tokens=2, store=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("positions", ["5:", "generated", "0,3,-1", "2:4", "9:"])
def test_a_kept_query_has_the_weights_of_every_key_it_sees(hm: HookedModel, positions: str) -> None:
    whole = hm.capture(RAGGED, ["pattern"], [1], max_new_tokens=6)
    some = hm.capture(RAGGED, ["pattern"], [1], max_new_tokens=6, positions=positions)
    for number, sample in enumerate(some.samples):
        queries = sample.positions
        assert isinstance(queries, tuple)
        keys = max(queries, default=-1) + 1
        expected = whole["pattern", 1][number][:, list(queries)]
        got = some["pattern", 1][number][..., : max(keys, 0)]
        assert torch.equal(got, expected[..., :keys])
        if queries:
            assert torch.allclose(got.sum(-1), torch.ones(got.shape[:-1]))


def test_one_position_in_memory_holds_no_more_than_its_rows() -> None:
    """A row once kept the block alive in which it came, with places for 32 steps."""
    hm = hookmap.open(plain_hooks.build("llama"))
    run = hm.capture([[1, 2, 3]] * 8, ["resid_pre"], [1], max_new_tokens=40, positions=[20])
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in _pieces(run)}
    assert sum(held.values()) == sum(piece.nbytes for piece in _pieces(run)) == 8 * 32 * 4


def _pieces(run: Capture) -> list[torch.Tensor]:
    assert isinstance(run.store, MemoryStore)
    return [piece for pieces in run.store._pieces.values() for piece in pieces]


@pytest.mark.slow
def test_numbers_of_experts_stay_whole_numbers() -> None:
    hm = hookmap.open(plain_hooks.build("qwen3_moe"))
    whole = hm.capture(RAGGED, ["router_indices"], [1], max_new_tokens=4)
    kept = hm.capture(RAGGED, ["router_indices"], [1], max_new_tokens=4, keep_dtype="bfloat16")
    for sample in range(3):
        rows = kept.read(sample, "router_indices", 1)
        assert rows.dtype == torch.int64 and torch.equal(rows, whole.read(sample, "router_indices", 1))
    with raises(hookmap.SelectionError, "there is no mean"):
        hm.capture(RAGGED, ["router_indices"], [1], max_new_tokens=4, mean=True)


@pytest.mark.parametrize("settings", [{}, {"keep_dtype": "bfloat16"}])
def test_the_estimate_knows_what_routers_compute_in(settings: dict[str, Any]) -> None:
    hm = hookmap.open(plain_hooks.build("qwen3_moe"))
    points = ["router_indices", "router_logits"]
    run = hm.capture(RAGGED, points, [1], 4, **settings)
    size = sum(run.read(sample, point, 1).nbytes for sample in range(3) for point in points)
    assert hm.estimate(RAGGED, points, [1], 4, **settings).bytes == size


def test_a_resumed_run_must_keep_the_same(hm: HookedModel, tmp_path: Path) -> None:
    hm.capture(RAGGED, ["resid_mid"], [1], 2, positions="last", store=tmp_path / "run")
    with pytest.raises(hookmap.StoreError, match=r"settings.kept"):
        hm.capture(RAGGED, ["resid_mid"], [1], 2, positions="prompt", store=tmp_path / "run", resume=True)


def test_a_position_that_some_prompts_have_not_is_said(hm: HookedModel, caplog: pytest.LogCaptureFixture) -> None:
    run = hm.capture(RAGGED, ["resid_pre"], [0], 0, positions=[1, 8])
    assert [sample.positions for sample in run.samples] == [(1,), (1,), (1, 8)]
    assert "position 8 is not in 2 of 3 prompts" in caplog.text and "position 1 " not in caplog.text


@pytest.mark.parametrize("how", [{}, {"mean": True}, {"features": 5}, {"keep_dtype": "float16"}], ids=str)
def test_samples_without_rows_know_how_wide_they_would_be(
    hm: HookedModel, whole: tuple[int, Capture], how: dict[str, Any], tmp_path: Path
) -> None:
    new, _ = whole
    run = hm.capture(RAGGED, [*POINTS, "logits"], max_new_tokens=new, positions="70:", store=tmp_path / "c", **how)
    memory = hm.capture(RAGGED, [*POINTS, "logits"], max_new_tokens=new, positions="70:", **how)
    some = hm.capture(RAGGED, [*POINTS, "logits"], max_new_tokens=new, positions=[0], **{**how, "mean": False})
    assert [sample.rows for sample in run.samples] == [0, 0, 0]
    for key in run.keys:
        expected = some.read(0, *key)[:0]
        for each in (run, memory):
            assert each.read(1, *key).shape == expected.shape and each.read(1, *key).dtype == expected.dtype
            assert each[key].shape == (3, *expected.shape)
    assert not hookmap.open_store(tmp_path / "c").verify()


def test_attention_without_rows_knows_its_heads(hm: HookedModel) -> None:
    run = hm.capture(RAGGED, ["pattern"], [0], 3, positions="70:")
    assert run.store.read(0, "pattern", 0).shape == (0, 4, 11)


def test_a_text_of_several_tokens_selects_the_tokens_of_the_prompt_that_it_lies_in(hm: HookedModel) -> None:
    prompts = ["to be or not to be", "that is or not the question or no"]  # "or not" is two tokens of each
    assert [hm.to_str_tokens(text)[2:4] for text in prompts] == [["or", "not"]] * 2
    whole = hm.capture(prompts, "resid_mid", 1, max_new_tokens=0)
    run = hm.capture(prompts, "resid_mid", 1, max_new_tokens=0, positions="text=or not")
    assert [sample.row_positions for sample in run.samples] == [(2, 3), (2, 3)]
    for number in range(2):
        rows = whole.read(number, "resid_mid", 1)[[2, 3]]
        torch.testing.assert_close(run.read(number, "resid_mid", 1), rows, rtol=1e-5, atol=1e-5)
    twice = hm.capture("be or be or be or", "resid_mid", 1, max_new_tokens=0, positions="text=be or b")
    assert twice.samples[0].row_positions == (0, 1, 2, 3, 4), "occurrences may share tokens"
    for new in (0, 4):
        edit = {"do": "ablate", "point": "resid_mid", "layers": 1, "positions": "text=or not"}
        seen: list[tuple[int, ...]] = []
        watch = hookmap.watch(lambda _, at, seen=seen: seen.append(at.positions), "resid_mid", 1, "text=or not")
        edited = hm.capture(prompts, "resid_mid", 1, max_new_tokens=new, interventions=[edit, watch])
        assert seen == [(2, 3), (2, 3)]
        for number in range(2):
            rows = edited.read(number, "resid_mid", 1)
            assert not rows[[2, 3]].any() and rows[[0, 1, 4]].abs().amax(1).all()
    swap = {
        "do": "patch",
        "point": "resid_mid",
        "layers": 1,
        "positions": "text=be or",
        "source": {"prompt": prompts[0]},
    }
    patched = hm.capture("not be or", "resid_mid", 1, max_new_tokens=0, interventions=[swap])
    source = hm.capture(prompts[0], "resid_mid", 1, max_new_tokens=0).read(0, "resid_mid", 1)
    torch.testing.assert_close(patched.read(0, "resid_mid", 1)[1:3], source[1:3], rtol=1e-5, atol=1e-5)
    with raises(hookmap.SelectionError, "text=or be", "no prompt"):
        hm.capture(prompts, "resid_mid", 1, max_new_tokens=0, positions="text=or be")
    with raises(hookmap.SelectionError, "text=or be", "no prompt"):
        hm.capture(prompts, (), max_new_tokens=0, interventions=[{**edit, "positions": "text=or be"}])


def test_a_prompts_several_sequences_are_samples_of_their_own(hm: HookedModel) -> None:
    prompts = [hookmap.datasets.PromptRecord("to be", "a"), hookmap.datasets.PromptRecord("or not to be", "b")]
    draws: dict[str, Any] = {"do_sample": True, "seed": 3, "max_new_tokens": 5}
    run = hm.capture(prompts, "resid_post", 1, num_return_sequences=3, **draws)
    assert [sample.id for sample in run.samples] == ["a.0", "a.1", "a.2", "b.0", "b.1", "b.2"]
    by_hand = hm.capture([prompt.prompt for prompt in prompts for _ in range(3)], "resid_post", 1, **draws)
    assert run.tokens == by_hand.tokens and len(set(run.tokens)) == 6
    for number in range(6):
        assert torch.equal(run.read(number, "resid_post", 1), by_hand.read(number, "resid_post", 1))
