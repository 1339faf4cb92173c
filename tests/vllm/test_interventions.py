"""Interventions on vLLM give the tokens and rows that they give on transformers."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import own_functions
from support.on_vllm import Plain, held_against, prompts
from support.vllm_edits import EDITS, asked

import hookmap
from hookmap.capture.interventions.edits import Edit
from hookmap.capture.interventions.functions import Called
from hookmap.errors import CaptureError, InterventionError

NEW = 6
WATCHED = ["resid_pre", "resid_mid", "mixer_out", "mlp_out", "resid_post", "z"]


@pytest.fixture(scope="module")
def own(checkpoint: Path) -> Any:
    return hookmap.open(checkpoint, dtype="float32", check=False)


@pytest.fixture(scope="module")
def unedited(own: Any) -> Any:
    return own.capture(asked(), WATCHED, max_new_tokens=NEW, batch_size=1)


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_those_of_the_hooks_engine(on_vllm: Any, own: Any, unedited: Any, name: str) -> None:
    expected = own.generate(asked(), EDITS[name], {"points": WATCHED}, max_new_tokens=NEW, batch_size=1)
    found = on_vllm.generate(asked(), EDITS[name], {"points": WATCHED}, max_new_tokens=NEW)
    assert found.tokens == expected.tokens
    changed = 0.0
    for key in expected.keys:
        for sample in range(len(asked())):
            wanted, before = expected.store.read(sample, *key), unedited.store.read(sample, *key)
            torch.testing.assert_close(found.store.read(sample, *key), wanted, rtol=1e-4, atol=1e-4)
            rows = unedited.samples[sample].prompt_tokens
            changed = max(changed, float((wanted[:rows] - before[:rows]).abs().max()))
    if name not in ("steer generated tokens",):
        assert changed > 0.1


def test_different_edits_share_a_batch_with_plain_requests(on_vllm: Any, own: Any, plain: Plain) -> None:
    from vllm import SamplingParams

    from hookmap.capture.interventions.documents import read_interventions
    from hookmap.capture.interventions.plan import plan_edits
    from hookmap.loading.chat_template import Templating
    from hookmap.vllm.spec import PlannedEdits, RequestSpec

    engine, ids = on_vllm.engine_of_vllm, asked()[0]
    names = ["steer the stream", "zero a branch", "scale heads"]
    for name in names:
        planned = plan_edits(on_vllm, read_interventions(EDITS[name]), on_vllm.encode([ids]), NEW, Templating())
        engine.plan(name, planned.edits)
    specs = [RequestSpec(edits=PlannedEdits(plan=name)) for name in names] + [RequestSpec()]
    for number, spec in enumerate(specs):
        engine.add(f"e{number}", ids, SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True), spec)
    ended: dict[str, tuple[int, ...]] = {}
    while len(ended) < 4:
        ended |= {each.name: each.tokens for each in engine.step()}
    expected = [own.generate([ids], EDITS[name], max_new_tokens=NEW).tokens[0] for name in names]
    expected.append(plain.generated(ids, NEW))
    assert [(*ids, *ended[f"e{n}"]) for n in range(4)] == expected
    assert len(set(expected)) > 2
    engine.take([(f"e{n}", 0) for n in range(3)])


def test_what_one_request_edits_is_in_no_other_requests_cache(on_vllm: Any, own: Any, plain: Plain) -> None:
    ids, edit = prompts(1, 40, seed=7)[0], EDITS["steer the stream"]
    free = plain.generated(ids, NEW)
    steered = own.generate([ids], edit, max_new_tokens=NEW).tokens[0]
    assert free != steered
    on_vllm.engine_of_vllm._llm.reset_prefix_cache()  # what is in the cache first stays in it
    for _ in range(2):
        assert on_vllm.generate([ids], edit, max_new_tokens=NEW).tokens == [steered]
        assert on_vllm.generate([ids], max_new_tokens=NEW).tokens == [free]


def test_preempted_requests_are_edited_again(on_vllm: Any, own: Any) -> None:
    many, edit = prompts(8, 12, seed=11), EDITS["several"]
    expected = own.generate(many, edit, max_new_tokens=30, batch_size=1)
    assert on_vllm.generate(many, edit, max_new_tokens=30).tokens == expected.tokens


def test_a_mean_over_a_prompt_that_is_read_in_pieces_is_refused(on_vllm: Any) -> None:
    long = prompts(1, 40, seed=3)
    with pytest.raises(InterventionError, match="sample 0: vLLM read the prompt in pieces, and its mean is asked for"):
        on_vllm.generate(long, EDITS["mean of a branch"], max_new_tokens=2)
    with pytest.raises(InterventionError, match="sample 0: vLLM read the prompt in pieces: the two tokens of a swap"):
        on_vllm.generate(long, [{**EDITS["swap"][0], "positions": [1, 30]}], max_new_tokens=2)


def test_functions_of_ones_own_are_called_as_the_hooks_engine_calls_them(on_vllm: Any, own: Any) -> None:
    told: list[Any] = []

    def noted(rows: torch.Tensor, at: Any) -> torch.Tensor:
        told.append((at.point, at.layer, at.heads, at.sample, at.positions, at.tokens, at.steps))
        return own_functions.turned(rows, at)

    edits = [
        hookmap.apply(noted, "resid_post", 1, positions="text=be"),
        hookmap.apply(noted, "z", [0], heads=[1], steps=[1, 2]),
        hookmap.apply(own_functions.TURNED, "mlp_out", 2),
    ]
    seen, runs = [], []
    for model, more in ((own, {"batch_size": 1}), (on_vllm, {})):
        runs.append(model.generate(asked(), edits, {"points": WATCHED}, max_new_tokens=NEW, **more))
        seen.append(sorted(told))
        told.clear()
    assert runs[0].tokens == runs[1].tokens != own.generate(asked(), max_new_tokens=NEW).tokens
    assert {each[3] for each in seen[0]} == {*range(len(asked()))}
    pieces = [[(*each[:4], *row) for each in mine for row in zip(*each[4:], strict=True)] for mine in seen]
    assert sorted(pieces[0]) == sorted(pieces[1])


def test_a_function_that_fails_ends_its_run_alone(on_vllm: Any, plain: Plain) -> None:
    for name, said in ((own_functions.BROKEN, "step 2: expected rows of shape"), (own_functions.STOPPING, "at.stop()")):
        with pytest.raises(CaptureError, match=re.escape(said)):
            on_vllm.generate([[1, 2]], [hookmap.apply(name, "resid_post", 0)], max_new_tokens=5)
    held_against(plain, on_vllm.capture(prompts(1, 5), max_new_tokens=2, points=["resid_post"]), ["resid_post"])


def test_workers_in_other_processes_import_what_they_are_told_to(on_vllm: Any) -> None:
    from hookmap.vllm.plans import Functions, from_wire, to_wire

    def edit(fn: Any) -> Any:
        given = hookmap.apply(fn, "resid_post", 0)
        [selector] = on_vllm.selectors("resid_post", [0])
        return [Edit(selector, Called(given, selector), tokens_told=True)]

    allowed = Functions(frozenset({own_functions.TURNED}))
    plan = from_wire(*to_wire(edit(own_functions.turned), allowed), on_vllm.map, allowed)
    assert plan.edits[0].operation.given.fn is own_functions.turned and plan.reads_tokens
    for fn, told in (
        (lambda rows, at: rows, "cannot import .*lambda.*functions="),
        (own_functions.broken, r'functions=\["support.own_functions:broken"\]'),
    ):
        with pytest.raises(InterventionError, match=told):
            to_wire(edit(fn), allowed)
    sent = to_wire(edit(own_functions.turned), allowed)
    with pytest.raises(InterventionError, match="was not told to import it"):
        from_wire(*sent, on_vllm.map, Functions())


def test_points_without_a_place_are_refused(on_vllm: Any, plain: Plain) -> None:
    with pytest.raises(InterventionError, match="no function sees the values"):
        on_vllm.generate([[1, 2]], [hookmap.watch(lambda rows, at: None, point="resid_post", layers=0)])
    with pytest.raises(InterventionError, match="before=True"):
        on_vllm.capture([[1, 2]], "resid_post", interventions=EDITS["skip a branch"], before=True)
    held_against(plain, on_vllm.capture(prompts(1, 5), max_new_tokens=2, points=["resid_post"]), ["resid_post"])
