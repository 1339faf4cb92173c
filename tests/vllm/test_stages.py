"""Two processes of vLLM that each have some of the layers: a request's rows are what both have, together."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import on_vllm as support
from support.killed_on_vllm import held_against_until_it_dies
from support.on_vllm import POINTS, Plain, held_against, prompts

import hookmap
from hookmap.activations import Key
from hookmap.errors import SelectionError
from hookmap.maps.terms import Term
from hookmap.vllm.places import ModelPlaces, Place
from hookmap.vllm.spec import PlannedEdits, RequestSpec, RowsKept
from hookmap.vllm.stages import Stage, joined, weights_of_all

VECTOR = (torch.randn(64, generator=torch.Generator().manual_seed(1)) * 2).tolist()
EDITS: dict[str, list[dict[str, Any]]] = {
    "in the first stage": [{"do": "steer", "point": "resid_mid", "layers": [0], "vector": VECTOR, "strength": 4}],
    "in the last stage": [{"do": "ablate", "point": "mlp_out", "layers": [2]}],
    "in both": [{"do": "steer", "point": "resid_mid", "layers": [0, 2], "vector": VECTOR, "strength": 3}],
    "where one hands over": [{"do": "scale", "point": "resid_post", "layers": [1], "factor": -0.5}],
    "where the other takes over": [{"do": "project_out", "point": "resid_pre", "layers": [2], "direction": VECTOR}],
    "without a block": [{"do": "skip", "what": "block", "layers": [2]}],
    "mean of a branch": [{"do": "ablate", "point": "mlp_out", "layers": "all", "to": "mean"}],
    "tokens by their text": [
        {"do": "scale", "point": "resid_post", "layers": [0, 2], "factor": 3.0, "positions": "text=be"}
    ],
}

pytestmark = [pytest.mark.slow, support.TWO_PROCESSES]


@pytest.fixture(scope="module")
def staged(checkpoint: Path) -> Iterator[Any]:
    """A Llama whose layers 0 and 1 are in one process and whose last one is in another, with little room."""
    settings = {**support.SETTINGS, **support.SCARCE, "distributed_executor_backend": "mp"}
    with hookmap.open_on_vllm(checkpoint, eager=True, pipeline_parallel_size=2, **settings) as opened:
        yield opened


def scheduler(model: Any) -> Any:
    return model.engine_of_vllm._llm.llm_engine.engine_core.engine_core.scheduler


def test_rows_of_all_layers_are_those_of_plain_hooks(
    staged: Any, plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, preempted, in_flight = staged.engine_of_vllm._llm.llm_engine.engine_core.engine_core, [], set[int]()
    own, step = core.scheduler._preempt_request, core.step_fn
    monkeypatch.setattr(core.scheduler, "_preempt_request", lambda *a, **k: (preempted.append(a), own(*a, **k))[1])
    monkeypatch.setattr(core, "step_fn", lambda: (in_flight.add(len(core.batch_queue)), step())[1])
    asked = [*prompts(8, 12, seed=1), *prompts(3, 61)]  # 24 tokens a step
    run = staged.capture(asked, POINTS, max_new_tokens=30)
    assert run.tokens == [plain.generated(ids, 30) for ids in asked]
    held_against(plain, run)
    assert preempted and 1 in in_flight  # a batch waits in the last stage while the first one takes another


def test_what_the_stages_have_is_joined(staged: Any) -> None:
    engine = staged.engine_of_vllm
    described = [told(each) for each in engine._each("hookmap_describe")]
    assert [each["stage"] for each in described] == [0, 1]
    first, last = ({(point, layer) for point, layer in each["elsewhere"]} for each in described)
    assert first & last == set()
    assert {key for key in first if key[1] is None} == {("final_norm", None)}
    assert {key for key in last if key[1] is None} == {("embed", None)}
    assert {layer for _, layer in first} == {2, None} and {layer for _, layer in last} == {0, 1, None}
    assert engine.weights["tensors"] == sum(each["weights"]["tensors"] for each in described)
    assert engine.weights["sha256"] not in [each["weights"]["sha256"] for each in described]


def told(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.parametrize("what", EDITS)
def test_edits_give_the_tokens_and_rows_of_the_hooks_engine(staged: Any, checkpoint: Path, what: str) -> None:
    own = hookmap.open(checkpoint, dtype="float32", check=False)
    asked = [[*ids[:5], 4, *ids[5:]] for ids in prompts(3, 11, seed=9)]
    expected = own.generate(asked, EDITS[what], {"points": "resid_post"}, max_new_tokens=6, batch_size=1)
    found = staged.generate(asked, EDITS[what], {"points": "resid_post"}, max_new_tokens=6)
    assert found.tokens == expected.tokens
    for key in expected.keys:
        for sample in range(len(asked)):
            torch.testing.assert_close(
                found.store.read(sample, *key), expected.store.read(sample, *key), rtol=1e-4, atol=1e-4
            )
    assert what == "tokens by their text" or found.tokens != own.generate(asked, max_new_tokens=6, batch_size=1).tokens


def test_captured_edited_and_plain_requests_share_batches(staged: Any, plain: Plain, checkpoint: Path) -> None:
    from vllm import SamplingParams

    engine, asked = staged.engine_of_vllm, prompts(5, 10, seed=4)
    edit = EDITS["in both"]
    prepared = staged.prepare(asked, ["resid_post"], interventions=edit, max_new_tokens=5)
    engine.plan("both", prepared.run.edits)
    specs = [
        RequestSpec(points={"resid_post": [0, 2]}),
        RequestSpec(),
        RequestSpec(points={"mlp_out": [2]}, rows=RowsKept(positions="generated")),
        RequestSpec(points={"resid_post": "all"}, edits=PlannedEdits(plan="both", sample=3)),
        RequestSpec(points={"embed": None, "mlp_out": [1]}, rows=RowsKept(every=3)),
    ]
    for number, (ids, spec) in enumerate(zip(asked, specs, strict=True)):
        engine.add(f"r{number}", ids, SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True), spec)
    ended: dict[str, tuple[int, ...]] = {}
    halves: list[dict[str, torch.Tensor]] = []
    while len(ended) < 5:
        ended |= {each.name: each.tokens for each in engine.step()}
        halves.append(engine.row("r0", 3))
    tokens = [tuple(ids) + ended[f"r{n}"] for n, ids in enumerate(asked)]
    own = hookmap.open(checkpoint, dtype="float32", check=False)
    edited = own.capture([asked[3]], ["resid_post"], interventions=edit, max_new_tokens=5)
    assert tokens == [edited.tokens[0] if n == 3 else plain.generated(ids, 5) for n, ids in enumerate(asked)]
    taken = engine.take([(f"r{n}", 14) for n in (0, 2, 3, 4)])
    engine.call("hookmap_forget", "both")
    assert [error for error, _, _ in taken] == [None] * 4
    assert [positions for _, positions, _ in taken] == [[*range(14)], [*range(10, 14)], [*range(14)], [0, 3, 6, 9, 12]]
    rows = [each for _, _, each in taken]
    assert {*rows[0]} == {"resid_post.0", "resid_post.2"} and {*rows[3]} == {"embed", "mlp_out.1"}
    for layer in (0, 2):
        expected = plain.rows(tokens[0][:14])["resid_post", layer]
        torch.testing.assert_close(rows[0][f"resid_post.{layer}"], expected, rtol=1e-4, atol=1e-4)
        assert any(
            torch.equal(half[f"resid_post.{layer}"][0], rows[0][f"resid_post.{layer}"][3]) for half in halves if half
        )
    expected = plain.rows(tokens[2][:14])["mlp_out", 2][10:]
    torch.testing.assert_close(rows[1]["mlp_out.2"], expected, rtol=1e-4, atol=1e-4)
    for layer in range(3):
        held = rows[2][f"resid_post.{layer}"]
        torch.testing.assert_close(held, edited.read(0, "resid_post", layer), rtol=1e-4, atol=1e-4)


def test_aborted_requests_leave_nothing_in_either_stage(staged: Any, plain: Plain) -> None:
    from vllm import SamplingParams

    engine = staged.engine_of_vllm
    for number in range(3):
        spec = RequestSpec(points={"resid_post": "all"})
        engine.add(f"gone{number}", prompts(1, 8)[0], SamplingParams(max_tokens=40, ignore_eos=True), spec)
    while not engine.row("gone0", 8):
        engine.step()
    assert {*engine.row("gone0", 8)} == {"resid_post.0", "resid_post.1", "resid_post.2"}
    engine.drop([f"gone{number}" for number in range(3)])
    assert engine._each("hookmap_row", "gone0", 8) == [b"", b""]
    held_against(plain, staged.capture(prompts(2, 8), POINTS, max_new_tokens=3))


def test_a_lens_is_that_of_the_hooks_engine(staged: Any, checkpoint: Path) -> None:
    own, ids = hookmap.open(checkpoint, dtype="float32", check=False), prompts(1, 9)[0]
    found, expected = staged.lens([ids], "resid_post"), own.lens([ids], "resid_post")
    assert torch.equal(found.top_ids, expected.top_ids)
    torch.testing.assert_close(found.top_probabilities, expected.top_probabilities, rtol=1e-3, atol=1e-5)


def test_which_points_are_in_which_stage(checkpoint: Path) -> None:
    found = hookmap.discover(checkpoint)
    layers = [found.at_layer(found.layers_path, layer) for layer in range(3)]
    of: dict[Key, tuple[str, ...]] = {
        ("resid_post", 0): (layers[0],),
        ("mlp_out", 2): (f"{layers[2]}.mlp",),
        ("resid_mid", 1): (layers[1], f"{layers[2]}.norm"),
        ("embed", None): ("model.embed_tokens",),
        ("final_norm", None): ("model.norm",),
    }
    places = {key: Place(tuple(Term(path, "output", None) for path in paths)) for key, paths in of.items()}
    model = ModelPlaces(found, places, frozenset({"model.embed_tokens"}))
    first = Stage(0, frozenset({0, 1}), is_first=True, is_last=False).elsewhere(model)
    last = Stage(1, frozenset({2}), is_first=False, is_last=True).elsewhere(model)
    assert first == {("mlp_out", 2), ("resid_mid", 1), ("final_norm", None)}
    assert last == {("resid_post", 0), ("resid_mid", 1), ("embed", None)}
    assert Stage(0, frozenset({0, 1, 2}), is_first=True, is_last=True).elsewhere(model) == frozenset()


def test_a_point_in_two_stages_is_refused(staged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged.engine_of_vllm, "_split", frozenset({("resid_mid", 1)}))
    with pytest.raises(SelectionError, match=r"resid_mid\.1: a sum of tensors that are in different stages"):
        staged.capture([[1, 2, 3]], "resid_mid", max_new_tokens=1)


def test_workers_that_disagree_are_an_error() -> None:
    shared, row = {name: Place(()) for name in "ab"}, torch.ones(2, 4)
    one, other = (None, [0, 1], {"a": row}), (None, [0, 1], {"b": row * 2})
    error, positions, rows = joined([[one], [other]], shared, dict)
    assert (error, positions) == (None, [0, 1]) and rows["a"] is row and torch.equal(rows["b"], row * 2)
    assert joined([[one], [(None, [], {})]], shared, dict)[1:] == ([0, 1], {"a": row})
    assert joined([[one], [("it failed", [], {})]], shared, dict) == ("it failed", [], {})
    error, positions, rows = joined([[one], [(None, [0, 2], {"b": row})]], shared, dict)
    assert error is not None and "rows of other tokens of this request: 2, 2 rows" in error and not [*positions, *rows]


def test_weights_of_several_stages_are_told_from_those_of_others() -> None:
    one, other = ({"tensors": n, "dtypes": [d], "values_of_each": 64, "sha256": d} for n, d in ((2, "a"), (3, "b")))
    both = weights_of_all([one, other])
    assert both is not None and (both["tensors"], both["dtypes"]) == (5, ["a", "b"])
    assert both != weights_of_all([other, one]) and weights_of_all([one]) == one and weights_of_all([one, None]) is None


def test_a_killed_stage_is_an_error_and_what_was_finished_is_right(staged: Any, plain: Plain, tmp_path: Path) -> None:
    """The last of the file: the engine has died."""
    engine = staged.engine_of_vllm
    last = told(engine._each("hookmap_describe")[1])["process"]
    steps, step = 0, engine.step

    def stepping() -> Any:
        nonlocal steps
        steps += 1
        if steps == 60:
            os.kill(last, signal.SIGKILL)
        return step()

    engine.step = stepping
    held_against_until_it_dies(plain, staged, prompts(40, 12), tmp_path / "run", max_new_tokens=12)
