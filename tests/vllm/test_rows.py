"""Rows are right under everything that vLLM does with a request. Each of these was seen to fail without its guard."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.on_vllm import LAYERS, POINTS, Plain, held_against, prompts

import hookmap
from hookmap.errors import CaptureError, SelectionError


def preemptions(model: Any) -> int:
    """How many requests vLLM has preempted so far."""
    return int(model.engine_of_vllm._llm.llm_engine.engine_core.engine_core.scheduler.hookmap_preempted)


@pytest.fixture(scope="module", autouse=True)
def counted(on_vllm: Any) -> None:
    """Counts the preemptions of the scheduler."""
    scheduler = on_vllm.engine_of_vllm._llm.llm_engine.engine_core.engine_core.scheduler
    scheduler.hookmap_preempted, own = 0, scheduler._preempt_request

    def preempt(*args: Any, **kwargs: Any) -> Any:
        scheduler.hookmap_preempted += 1
        return own(*args, **kwargs)

    scheduler._preempt_request = preempt


def test_rows_and_tokens_are_those_of_plain_hooks(on_vllm: Any, plain: Plain) -> None:
    asked = [[1, 5, 9, 4, 7], [1, 8, 3, 6, 12, 11, 9, 9, 4], [2, 7]]
    run = on_vllm.capture(asked, POINTS, max_new_tokens=7)
    assert run.tokens == [plain.generated(ids, 7) for ids in asked]
    held_against(plain, run)


def test_prompts_that_are_read_in_pieces_have_every_row_once(on_vllm: Any, plain: Plain) -> None:
    run = on_vllm.capture(prompts(3, 61), POINTS, max_new_tokens=4)  # 24 tokens a step
    held_against(plain, run)


def test_preempted_requests_have_every_row_once(on_vllm: Any, plain: Plain) -> None:
    before = preemptions(on_vllm)
    asked = prompts(8, 12, seed=1)
    run = on_vllm.capture(asked, POINTS, max_new_tokens=30)
    assert preemptions(on_vllm) > before
    held_against(plain, run)


def test_a_request_that_is_preempted_has_not_ended(on_vllm: Any) -> None:
    from vllm import SamplingParams

    from hookmap.vllm.spec import RequestSpec

    engine, before = on_vllm.engine_of_vllm, preemptions(on_vllm)
    session = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker._session
    names = [f"pushed out {number}" for number in range(8)]
    for name, ids in zip(names, prompts(8, 12, seed=1), strict=True):
        parameters = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
        engine.add(name, ids, parameters, RequestSpec(points={"resid_post": [0]}))
    while preemptions(on_vllm) == before:
        engine.step()
    held = list(session.requests)
    assert len(held) == 8
    assert all(map(session._rows.known, held))  # the worker may forget what has ended
    engine.drop(names)
    on_vllm.generate([[1, 2]], max_new_tokens=1)  # in the next step the runner is told of those that have ended
    assert session.requests == {} and not any(map(session._rows.known, held))


def test_a_prefix_in_the_cache_is_computed_for_captured_requests(on_vllm: Any, plain: Plain) -> None:
    asked = prompts(3, 40, seed=2, shared=36)
    on_vllm.generate(asked, max_new_tokens=2)
    run = on_vllm.capture(asked, POINTS, max_new_tokens=2)
    held_against(plain, run)


def test_a_row_that_was_never_computed_is_an_error(on_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts(1, 40, seed=3)
    on_vllm.generate(asked, max_new_tokens=2)
    engine = on_vllm.engine_of_vllm._llm.llm_engine
    add = engine.add_request

    def reading(name: str, prompt: Any, parameters: Any) -> Any:
        parameters.skip_reading_prefix_cache = False
        return add(name, prompt, parameters)

    monkeypatch.setattr(engine, "add_request", reading)
    with pytest.raises(CaptureError, match="tokens 0 to 31 were not computed for this request"):
        on_vllm.capture(asked, "resid_post", max_new_tokens=2)


def test_requests_with_different_points_and_rows_share_a_batch(on_vllm: Any, plain: Plain) -> None:
    from vllm import SamplingParams

    from hookmap.vllm.spec import RequestSpec, RowsKept

    engine = on_vllm.engine_of_vllm
    asked = prompts(4, 10, seed=4)
    specs = [
        RequestSpec(points={"resid_post": [0]}),
        RequestSpec(),
        RequestSpec(points={"resid_post": [0, 2], "mlp_out": [1]}, rows=RowsKept(positions="generated")),
        RequestSpec(points={"mlp_out": [1]}, rows=RowsKept(every=3)),
    ]
    ended: dict[str, tuple[int, ...]] = {}
    for number, (ids, spec) in enumerate(zip(asked, specs, strict=True)):
        engine.add(f"r{number}", ids, SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True), spec)
    while len(ended) < 4:
        ended |= {each.name: each.tokens for each in engine.step()}
    tokens = [tuple(ids) + ended[f"r{n}"] for n, ids in enumerate(asked)]
    assert tokens == [plain.generated(ids, 5) for ids in asked]
    expected = [plain.rows(each[:14]) for each in tokens]
    taken = engine.take([("r0", 14), ("r2", 14), ("r3", 14)])
    assert [error for error, _, _ in taken] == [None] * 3
    assert [positions for _, positions, _ in taken] == [[*range(14)], [*range(10, 14)], [0, 3, 6, 9, 12]]
    assert {*taken[1][2]} == {"resid_post.0", "resid_post.2", "mlp_out.1"}
    torch.testing.assert_close(taken[0][2]["resid_post.0"], expected[0]["resid_post", 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(taken[1][2]["resid_post.2"], expected[2]["resid_post", 2][10:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(taken[2][2]["mlp_out.1"], expected[3]["mlp_out", 1][::3], rtol=1e-4, atol=1e-4)


def test_each_of_several_sequences_of_a_request_has_its_own_rows(on_vllm: Any, plain: Plain) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from hookmap.vllm.spec import RequestSpec

    engine, ids = on_vllm.engine_of_vllm, prompts(1, 9, seed=5)[0]
    parameters = SamplingParams(
        temperature=1.0, seed=3, n=3, max_tokens=6, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )
    engine.add("several", ids, parameters, RequestSpec(points={"resid_post": [1]}))
    found = []
    while not found:
        found = [output for output in engine._llm.llm_engine.step() if output.finished]
    made = [tuple(each.token_ids) for each in sorted(found[0].outputs, key=lambda each: each.index)]
    assert len(set(made)) == 3
    import json

    taken = engine.call("hookmap_take", json.dumps([["several", [14, 14, 14]]]), False)
    for (error, _, rows), new in zip(taken, made, strict=True):
        assert error is None
        expected = plain.rows((*ids, *new[:-1]))["resid_post", 1]
        torch.testing.assert_close(rows["resid_post.1"], expected, rtol=1e-4, atol=1e-4)


def test_a_stop_string_ends_the_rows(on_vllm: Any, plain: Plain) -> None:
    ids = prompts(1, 6, seed=6)[0]
    free = plain.generated(ids, 12)
    text = on_vllm.tokenizer.decode([free[9]])
    run = on_vllm.capture([ids], POINTS, max_new_tokens=12, stop=text)
    ends = next(n for n in range(6, 18) if text in on_vllm.tokenizer.decode(list(free[6 : n + 1])))
    assert run.tokens == [free[: ends + 1]]
    held_against(plain, run)


def test_aborted_requests_leave_nothing_behind(on_vllm: Any, plain: Plain) -> None:
    from vllm import SamplingParams

    from hookmap.vllm.spec import RequestSpec

    engine = on_vllm.engine_of_vllm
    engine.add("gone", prompts(1, 8)[0], SamplingParams(max_tokens=40), RequestSpec(points={"resid_post": [0]}))
    engine.step()
    engine.drop(["gone"])
    session = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker._session
    assert session.requests == {}
    held_against(plain, on_vllm.capture(prompts(2, 8), POINTS, max_new_tokens=3))


def test_logprobs_do_not_move_rows(on_vllm: Any, plain: Plain) -> None:
    from vllm import SamplingParams

    from hookmap.vllm.spec import RequestSpec

    engine, ids = on_vllm.engine_of_vllm, prompts(1, 30, seed=8)[0]
    parameters = SamplingParams(temperature=0.0, max_tokens=4, logprobs=2, prompt_logprobs=2, ignore_eos=True)
    engine.add("probable", ids, parameters, RequestSpec(points={"resid_post": [2]}))
    ended: list[Any] = []
    while not ended:
        ended = engine.step()
    [(error, _, rows)] = engine.take([("probable", 33)])
    assert error is None
    expected = plain.rows((*ids, *ended[0].tokens[:-1]))["resid_post", 2]
    torch.testing.assert_close(rows["resid_post.2"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "last"},
        {"positions": "last_prompt"},
        {"positions": "2:9:2"},
        {"positions": [0, -1]},
        {"positions": "generated", "mean": True},
        {"mean": True},
        {"every": 4},
        {"features": [5, 0, 63]},
        {"features": 7, "features_seed": 3},
        {"positions": "text=be"},
    ],
)
def test_selections_are_those_of_the_hooks_engine(on_vllm: Any, checkpoint: Path, options: dict[str, Any]) -> None:
    asked = [[*ids[:5], 4, *ids[5:]] for ids in prompts(2, 11, seed=9)]
    own = hookmap.open(checkpoint, dtype="float32", check=False)
    expected = own.capture(asked, ["resid_mid", "mlp_out"], [0, 2], max_new_tokens=6, **options)
    found = on_vllm.capture(asked, ["resid_mid", "mlp_out"], [0, 2], max_new_tokens=6, **options)
    assert found.samples == expected.samples
    for key in expected.keys:
        for sample in range(2):
            torch.testing.assert_close(
                found.store.read(sample, *key), expected.store.read(sample, *key), rtol=1e-4, atol=1e-4
            )


def test_points_name_layers_of_their_own(on_vllm: Any) -> None:
    run = on_vllm.capture([[1, 2, 3]], {"resid_post": [2], "z": [0]}, max_new_tokens=2)
    assert run.keys == (("z", 0), ("resid_post", 2))
    assert run["z", 0].shape == (1, 4, 2, 32)


def test_a_harvest_has_a_row_for_each_token(on_vllm: Any, plain: Plain) -> None:
    run = on_vllm.capture(prompts(3, 9), POINTS, max_new_tokens=0)
    assert run.texts == ["", "", ""]
    assert [sample.rows for sample in run.samples] == [9, 9, 9]
    held_against(plain, run)


def test_nonsense_in_a_request_fails_that_request_alone(on_vllm: Any, plain: Plain) -> None:
    from vllm import SamplingParams

    from hookmap.vllm.spec import RequestSpec

    engine, ids = on_vllm.engine_of_vllm, prompts(1, 5)[0]
    given = [
        ({"points": {"resid_pots": [0]}}, "resid_pots"),
        ({"points": {"resid_post": [9]}}, "layer 9 is out of range"),
        ({"point": "resid_post"}, "Extra inputs are not permitted"),
        ({"points": {"resid_post": "0"}}, "points.resid_post"),
        ("{", "no request of hookmap's"),
        ({"edits": {"plan": "never given"}}, "no plan 'never given'"),
    ]
    for number, (document, _) in enumerate(given):
        parameters = SamplingParams(temperature=0.0, max_tokens=2, extra_args={"hookmap": document})
        engine.add(f"bad{number}", ids, parameters, RequestSpec())
    ended: set[str] = set()
    while len(ended) < len(given):
        ended |= {each.name for each in engine.step()}
    taken = engine.take([(f"bad{number}", 6) for number in range(len(given))])
    for (error, _, _), (_, said) in zip(taken, given, strict=True):
        assert error is not None and said in error
    held_against(plain, on_vllm.capture([ids], POINTS, max_new_tokens=2))


def test_what_is_not_there_is_refused_before_anything_runs(on_vllm: Any) -> None:
    with pytest.raises(SelectionError, match="logits"):
        on_vllm.capture([[1, 2]], "logits", max_new_tokens=2)
    with pytest.raises(CaptureError, match="no_repeat_ngram_size: vLLM has no such setting"):
        on_vllm.capture([[1, 2]], "resid_post", max_new_tokens=2, no_repeat_ngram_size=2)
    with pytest.raises(CaptureError, match="runs on vLLM"):
        on_vllm.capture([[1, 2]], "resid_post", max_new_tokens=2, engine="hooks")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1.0}, "temperature must be non-negative"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_k": -3}, "top_k must be 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be greater than zero"),
        ({"min_new_tokens": 5}, "min_tokens must be less than or equal to max_tokens=2"),
    ],
)
def test_settings_that_vllm_refuses_are_told(on_vllm: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(CaptureError, match=f"vLLM refuses these settings: {said}"):
        on_vllm.capture([[1, 2]], "resid_post", max_new_tokens=2, do_sample=True, **settings)


def test_sampling_needs_no_other_setting(on_vllm: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "seed": 5}
    bare, told = (
        on_vllm.capture(prompts(3, 5), "resid_post", [0], **options, **more) for more in ({}, {"temperature": 1.0})
    )
    assert bare.tokens == told.tokens


def test_sampling_with_a_seed_is_repeatable(on_vllm: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.3, "top_k": 0, "seed": 5}
    one, two = (on_vllm.capture(prompts(3, 5), "resid_post", [LAYERS - 1], **options) for _ in range(2))
    other = on_vllm.capture(prompts(3, 5), "resid_post", [LAYERS - 1], **{**options, "seed": 6})
    assert one.tokens == two.tokens != other.tokens


def test_memory_is_that_of_the_requests_that_run_together(on_vllm: Any) -> None:
    def held() -> dict[Any, int]:
        engine = on_vllm.engine_of_vllm._llm.llm_engine.engine_core.engine_core
        session = engine.model_executor.driver_worker.worker._session
        assert session.requests == {}
        return {key: len(slab) for key, slab in session.slabs.slabs.items()}

    on_vllm.capture(prompts(16, 9), "resid_post", max_new_tokens=4)
    before = held()
    on_vllm.capture(prompts(64, 9), "resid_post", max_new_tokens=4)
    assert held() == before
    assert before["resid_post", 0] < 64 * 12


def test_a_seeds_draws_do_not_depend_on_how_a_prompt_is_cut(on_vllm: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.3, "top_k": 0, "seed": 5}
    [own] = prompts(1, 13, seed=12)
    # Of 24 tokens a step, 4 are left beside the one prompt, and all that it needs beside the other.
    beside = [on_vllm.capture([first, own], "resid_post", [0], **options) for first in prompts(1, 20) + prompts(1, 3)]
    assert beside[0].tokens[1] == beside[1].tokens[1]
