"""The figures that come with each token are those of the rows that `capture` keeps, and of `lens`."""

import base64
import json
from typing import Any

import pytest
import safetensors.torch
import torch
from support.served import MESSAGES, Served

from hookmap.services.server.summaries import offered

pytestmark = pytest.mark.slow


def figures(served: Served, summary: dict[str, Any], **body: Any) -> list[dict[str, Any]]:
    """Those of a request, which are the same streamed and in one piece."""
    asked = {"hookmap": {"return": "none", "summary": summary}, **body}
    whole = served.chat(**asked).json()["activations_summary"]
    lines = served.chat(**asked, stream=True).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line and not line.endswith("[DONE]")]
    each = [chunk["activations_summary"] for chunk in chunks if "activations_summary" in chunk]
    assert all(len(told) == 1 for told in each), "a token's figures come with it"
    streamed = [told for (told,) in each]
    assert streamed == whole
    return streamed


@pytest.mark.parametrize("point", ["resid_post", "z", "mlp_in"])
def test_norms_are_of_the_row_that_each_token_was_predicted_from(served: Served, point: str) -> None:
    told = figures(served, {"point": point, "layers": [12, 3]}, max_tokens=6)
    run = served.hm.capture([MESSAGES], [point], [3, 12], max_new_tokens=6)
    (sample,) = run.samples
    assert [each["position"] for each in told] == list(range(sample.prompt_tokens - 1, sample.rows))
    for each, token in zip(told, sample.token_ids[sample.prompt_tokens :], strict=True):
        assert (each["point"], each["of"], each["layers"]) == (point, "norm", [3, 12])
        assert each["token"] == served.hm.tokenizer.decode([token])
        rows = [run.read(0, point, layer)[each["position"]] for layer in (3, 12)]
        assert each["values"] == pytest.approx([float(row.float().norm()) for row in rows], rel=1e-6)


@pytest.mark.parametrize("point", ["resid_post", "resid_mid", "mlp_out"])
def test_the_lens_is_that_of_the_same_row(served: Served, point: str) -> None:
    told = figures(served, {"point": point, "of": "lens"}, max_tokens=6)
    run = served.hm.capture([MESSAGES], [point, "resid_post"], max_new_tokens=6)
    lens = served.hm.lens(run, point)
    assert len(told) == 6
    for each in told:
        column = lens.positions.index(each["position"])
        assert each["layers"] == list(lens.layers)
        assert each["tokens"] == [row[column] for row in lens.words]
        assert each["values"] == pytest.approx(lens.top_probabilities[:, column, 0].tolist(), rel=1e-4)
    if point == "resid_post":
        assert [each["tokens"][-1] for each in told] == [each["token"] for each in told], "greedy: the last layer's"


def test_each_choice_has_its_own_figures_beside_what_is_kept(served: Served) -> None:
    """Rows of other points at a few positions are kept of the same run, and something is written to it."""
    steer = {"do": "steer", "point": "resid_post", "layers": [4], "vector": [3.0] * 64, "strength": 2.0}
    kept: dict[str, Any] = {"points": ["mlp_out"], "layers": [2], "positions": "generated", "interventions": [steer]}
    asked: dict[str, Any] = {"n": 2, "temperature": 4.0, "seed": 3, "max_tokens": 5}
    body = {**kept, "summary": {"point": "resid_post", "layers": [4, 9]}, "return": "inline"}
    answer = served.chat(**asked, hookmap=body).json()
    options: dict[str, Any] = {"do_sample": True, "temperature": 4.0, "top_k": 0, "top_p": 1.0}
    run = served.hm.capture(
        [MESSAGES] * 2, ["resid_post"], [4, 9], max_new_tokens=5, seed=3, batch_size=2, interventions=[steer], **options
    )
    assert [choice["message"]["content"] for choice in answer["choices"]] == run.texts
    assert answer["activations_meta"]["tensors"][0]["shape"] == [4, 64]
    told = answer["activations_summary"]
    assert sorted(each["choice"] for each in told) == [0] * 5 + [1] * 5
    for each in told:
        rows = [run.read(each["choice"], "resid_post", layer)[each["position"]] for layer in (4, 9)]
        assert each["values"] == pytest.approx([float(row.norm()) for row in rows], rel=1e-6)


def test_what_the_lens_runs_is_no_part_of_what_is_kept(served: Served) -> None:
    """It calls the model's own norm and head between the forward passes, which a capture of them must not see."""
    kept: dict[str, Any] = {"points": ["final_norm", "logits"]}
    body = {**kept, "summary": {"point": "resid_mid", "of": "lens"}, "return": "inline"}
    answer = served.chat(max_tokens=4, hookmap=body).json()
    run = served.hm.capture([MESSAGES], **kept, max_new_tokens=4)
    held = safetensors.torch.load(base64.b64decode(answer["activations_meta"]["samples"][0]["safetensors"]))
    for point in kept["points"]:
        assert torch.equal(held[point], run.read(0, point))


def test_completions_have_them_for_every_prompt(served: Served) -> None:
    body = {"prompt": ["1+1", "Tom has"], "max_tokens": 3, "temperature": 0}
    summary = {"return": "none", "summary": {"point": "resid_mid", "layers": 5}}
    told = served.post("/v1/completions", **body, hookmap=summary).json()["activations_summary"]
    run = served.hm.capture(body["prompt"], ["resid_mid"], [5], max_new_tokens=3, batch_size=1)
    assert [each["choice"] for each in told] == [0, 0, 0, 1, 1, 1]
    for each in told:
        row = run.read(each["choice"], "resid_mid", 5)[each["position"]]
        assert each["values"] == pytest.approx([float(row.norm())], rel=1e-6)


@pytest.mark.parametrize("of", ["norm", "lens"])
def test_the_prompts_rows_have_figures_where_they_are_asked_for(served: Served, of: str) -> None:
    """They come with the first token, each beside the token that was read there and the one that came next."""
    summary = {"point": "resid_post", "of": of, "layers": [3, 12, 19], "prompt": True}
    asked: dict[str, Any] = {"n": 2, "temperature": 4.0, "seed": 3, "max_tokens": 3}
    answer = served.chat(**asked, hookmap={"return": "none", "summary": summary}).json()
    options: dict[str, Any] = {"do_sample": True, "temperature": 4.0, "top_k": 0, "top_p": 1.0}
    run = served.hm.capture([MESSAGES] * 2, ["resid_post"], max_new_tokens=3, seed=3, batch_size=2, **options)
    decode = served.hm.tokenizer.decode
    for sample in run.samples:
        told = [each for each in answer["activations_summary"] if each["choice"] == sample.sample]
        ids, count = sample.token_ids, sample.prompt_tokens
        assert [each["position"] for each in told] == list(range(sample.rows))
        assert [each["token_id"] for each in told] == list(ids[1:])
        assert [each.get("read_id") for each in told] == [*ids[:count], None, None]
        assert [each.get("read") for each in told[:count]] == [decode([id]) for id in ids[:count]]
        for number, layer in enumerate([3, 12, 19]):
            rows = run.read(sample.sample, "resid_post", layer)
            if of == "norm":
                expected = rows.float().norm(dim=1)
            else:
                model = served.hm.model
                with torch.no_grad():
                    shares = model.lm_head(model.model.norm(rows)).float().softmax(-1)
                expected = shares.amax(-1)
                assert [each["tokens"][number] for each in told] == [decode([id]) for id in shares.argmax(-1).tolist()]
            assert [each["values"][number] for each in told] == pytest.approx(expected.tolist(), rel=1e-4)


def test_the_lens_tells_several_tokens_and_follows_one(served: Served) -> None:
    follow = served.hm.tokenizer.encode("7")[0]
    summary = {"point": "resid_post", "of": "lens", "top": 5, "follow": follow}
    told = served.chat(max_tokens=2, hookmap={"return": "none", "summary": summary}).json()["activations_summary"]
    run, model = served.hm.capture([MESSAGES], ["resid_post"], max_new_tokens=2), served.hm.model
    for each in told:
        for layer in each["layers"]:
            with torch.no_grad():
                row = run.read(0, "resid_post", layer)[each["position"]]
                shares = model.lm_head(model.model.norm(row)).float().softmax(-1)
            best = shares.topk(5)
            assert [one["token_id"] for one in each["top"][layer]] == best.indices.tolist()
            assert [one["probability"] for one in each["top"][layer]] == pytest.approx(best.values.tolist(), rel=1e-4)
            assert each["top"][layer][0]["token"] == each["tokens"][layer]
            assert each["ranks"][layer] == shares.argsort(descending=True).tolist().index(follow) + 1
            assert each["probabilities"][layer] == pytest.approx(float(shares[follow]), rel=1e-4)


@pytest.mark.parametrize(
    ("summary", "told"),
    [
        ({"point": "resid_mdi"}, "did you mean resid_mid"),
        ({"point": "resid_mid", "layers": [99]}, "99"),
        ({"point": "resid_mid", "layers": []}, "no layer"),
        ({"point": "pattern"}, "no length"),
        ({"point": "q_rot"}, "eager attention only"),
        ({"point": "logits"}, "not of a layer"),
        ({"point": "mlp_in", "of": "lens"}, "not in the space of the residual stream"),
        ({"point": "resid_mid", "of": "mean"}, "'norm' or 'lens'"),
        ({"point": "resid_mid", "top": 5}, "of the lens"),
        ({"point": "resid_mid", "of": "lens", "follow": 259}, "0 to 258"),
        ({"point": "resid_mid", "of": "lens", "top": 21}, "less than or equal to 20"),
        ({}, "Field required"),
    ],
)
def test_what_has_no_figures_is_refused(served: Served, summary: dict[str, Any], told: str) -> None:
    answer = served.chat(hookmap={"return": "none", "summary": summary})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert told in error["message"] and error["param"].startswith("hookmap.summary")


@pytest.mark.slow
def test_the_structure_offers_what_can_be_asked(served: Served) -> None:
    found = served.get("/v1/model/structure").json()["summary"]
    assert found == offered(served.hm.map)
    assert {"resid_mid", "z", "mlp_post"} <= set(found["norm"]) and "pattern" not in found["norm"]
    assert "resid_post" in found["lens"] and "mlp_in" not in found["lens"]
    for of, points in found.items():
        for point in points:
            summary = {"point": point, "of": of}
            assert served.chat(hookmap={"return": "none", "summary": summary}, max_tokens=1).status_code == 200, summary
