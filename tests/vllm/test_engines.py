"""Two engines of vLLM that each have the whole model and some of the requests (data parallel)."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support import on_vllm as support
from support import vllm_server
from support.killed_on_vllm import held_against_until_it_dies
from support.on_vllm import POINTS, Plain, held_against, prompts

import hookmap
from hookmap.errors import CaptureError
from hookmap.vllm.spec import RequestSpec

VECTOR = (torch.randn(64, generator=torch.Generator().manual_seed(1)) * 2).tolist()
EDIT = {"do": "steer", "point": "resid_post", "layers": [1], "vector": VECTOR, "strength": 3}

pytestmark = [pytest.mark.slow, support.TWO_PROCESSES]


@pytest.fixture(scope="module")
def spread(checkpoint: Path) -> Iterator[Any]:
    """A Llama in two engines, with little room."""
    settings = {**support.SETTINGS, **support.SCARCE}
    with hookmap.open_on_vllm(checkpoint, eager=True, data_parallel_size=2, **settings) as opened:
        yield opened


def engines_with(engine: Any, name: str) -> list[int]:
    """The engines that have a row of a request's first token, as they say themselves."""
    answers = engine._everywhere("hookmap_row", name, 0)
    return [number for number, workers in enumerate(answers) if any(workers)]


def test_rows_of_both_engines_are_those_of_plain_hooks(spread: Any, plain: Plain) -> None:
    asked = [*prompts(16, 12, seed=1), *prompts(3, 61)]  # 24 tokens a step, and eight requests in each engine
    run = spread.capture(asked, POINTS, max_new_tokens=30)
    assert run.tokens == [plain.generated(ids, 30) for ids in asked]
    held_against(plain, run)
    assert spread.engine_of_vllm._engine_of == {} and spread.engine_of_vllm._running == [0, 0]


def test_the_engines_share_the_requests(spread: Any) -> None:
    from vllm import SamplingParams

    engine = spread.engine_of_vllm
    channel, names = engine.channel(lambda name, output: None), [f"r{n}" for n in range(6)]
    for name, ids in zip(names, prompts(6, 9), strict=True):
        spec = RequestSpec(points={"resid_post": "all"})
        channel.add(name, ids, SamplingParams(max_tokens=60, ignore_eos=True), spec)
    ended = [each.name for _ in range(100) for each in channel.step()]
    has = {name: engines_with(engine, name) for name in names}
    assert sorted(has.values()) == [[0]] * 3 + [[1]] * 3
    assert {*engine.row("r1", 3)} == {"resid_post.0", "resid_post.1", "resid_post.2"}
    channel.drop([name for name in names if name not in ended])
    channel.take([(name, 68) for name in ended])
    assert [engines_with(engine, name) for name in names] == [[]] * 6
    assert engine._engine_of == {}


def test_edits_and_captures_of_both_engines_are_those_of_the_hooks_engine(spread: Any, checkpoint: Path) -> None:
    own, asked = hookmap.open(checkpoint, dtype="float32", check=False), prompts(6, 11, seed=9)
    for edit in (EDIT, {"do": "ablate", "point": "mlp_out", "layers": "all", "to": "mean"}):
        expected = own.generate(asked, edit, {"points": "resid_post"}, max_new_tokens=6, batch_size=1)
        found = spread.generate(asked, edit, {"points": "resid_post"}, max_new_tokens=6)
        assert found.tokens == expected.tokens != own.generate(asked, max_new_tokens=6, batch_size=1).tokens
        for sample in range(len(asked)):
            for key in expected.keys:
                torch.testing.assert_close(
                    found.store.read(sample, *key), expected.store.read(sample, *key), rtol=1e-4, atol=1e-4
                )


def test_threads_share_the_engines(spread: Any, plain: Plain, checkpoint: Path) -> None:
    given = prompts(12, 20, seed=3, shared=8)

    def ask(number: int) -> Any:
        if number % 3 == 2:
            return spread.generate([given[number]], max_new_tokens=12)
        edits = {"interventions": [EDIT]} if number % 3 else {}
        return spread.capture([given[number]], ["resid_mid", "resid_post"], max_new_tokens=12, **edits)

    with ThreadPoolExecutor(12) as together:
        runs = list(together.map(ask, range(12)))
    own = hookmap.open(checkpoint, dtype="float32", check=False)
    for number, run in enumerate(runs):
        if number % 3 == 1:
            assert (
                run.tokens == own.capture([given[number]], "resid_post", interventions=[EDIT], max_new_tokens=12).tokens
            )
            continue
        assert run.tokens == [plain.generated(given[number], 12)]
        if number % 3 == 0:
            held_against(plain, run, points=("resid_mid", "resid_post"))


def test_vllms_server_with_two_engines(plain: Plain, checkpoint: Path, tmp_path: Path) -> None:
    folder, given = tmp_path / "sessions", prompts(12, 20, seed=3, shared=8)
    serving = {"serving": {"sessions": str(folder)}}
    with vllm_server.vllms(checkpoint, folder, serving, "--data-parallel-size=2") as server:

        def ask(number: int) -> dict[str, Any]:
            captured = {"points": ["resid_mid", "resid_post"]}
            fields: Any = ({"hookmap": captured}, {"hookmap": {**captured, "interventions": [EDIT]}}, {})[number % 3]
            answer = server.complete(given[number], **fields)
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

        with ThreadPoolExecutor(12) as together:
            answers = list(together.map(ask, range(12)))
        several = server.complete(given[0], n=2, temperature=0.7, seed=3, hookmap={"points": ["resid_post"]})
        outside = server.post(
            "/v1/completions", prompt=given[0], max_tokens=2, hookmap={"points": ["resid_post"]},
            headers={"X-data-parallel-rank": "7"},
        )  # fmt: skip
    own = hookmap.open(checkpoint, dtype="float32", check=False)
    for number, answer in enumerate(answers):
        if number % 3 == 2:
            assert answer["choices"][0]["token_ids"] == list(plain.generated(given[number], 12)[20:])
            continue
        store = hookmap.open_store(server.sessions / answer["session_id"])
        if number % 3 == 0:
            held_against(plain, store, points=("resid_mid", "resid_post"))
        else:
            edited = own.capture([given[number]], ["resid_post"], interventions=[EDIT], max_new_tokens=12)
            assert store.samples[0].token_ids == edited.samples[0].token_ids
            assert (store.read(0, "resid_post", 2) - edited.read(0, "resid_post", 2)).abs().max() < 1e-3
    assert several.status_code == 200, several.text
    both = hookmap.open_store(server.sessions / several.json()["session_id"])
    assert len({sample.token_ids for sample in both.samples}) == 2
    held_against(plain, both, points=["resid_post"])
    assert outside.status_code == 400 and "data_parallel_rank 7" in outside.text


def test_one_process_answers_the_requests(checkpoint: Path) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from hookmap.services import vllm_serving
    from hookmap.vllm.plugin import register

    register()
    vllm_serving.register()
    asked = AsyncEngineArgs(str(checkpoint), enforce_eager=True, additional_config={"hookmap": {}}, **support.SETTINGS)
    asked._api_process_count = 2
    with pytest.raises(CaptureError, match=r"--api-server-count 2: .* add --api-server-count 1"):
        asked.create_engine_config(UsageContext.OPENAI_API_SERVER)


def test_a_killed_engine_is_an_error_and_what_was_finished_is_right(spread: Any, plain: Plain, tmp_path: Path) -> None:
    """The last of the file: the engines have died."""
    engine = spread.engine_of_vllm
    worker = json.loads(engine._everywhere("hookmap_describe")[1][0])["process"]
    finished, channel = 0, engine.channel

    def watched(told: Any) -> Any:
        own = channel(told)
        step = own.step

        def stepping() -> Any:
            nonlocal finished
            ended = step()
            before, finished = finished, finished + len(ended)
            if before < 4 <= finished:
                os.kill(worker, signal.SIGKILL)
            return ended

        own.step = stepping
        return own

    engine.channel = watched
    held_against_until_it_dies(plain, spread, prompts(60, 12), tmp_path / "run", max_new_tokens=20)
