"""`response_format`: the text fits the schema, and everything else of the request is as without it."""

import base64
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
import safetensors.torch
import torch
from support.served import MESSAGES, Served, demo, serving

from hookmap.services.server.scores import ScoreChanges

pytest.importorskip("llguidance", reason='pip install "hookmap[grammar]"')

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "answer": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"enum": ["apples", "pears"]},
        "sure": {"type": "boolean"},
    },
    "required": ["answer", "unit", "sure"],
    "additionalProperties": False,
}


def of(schema: dict[str, Any]) -> dict[str, Any]:
    """The `response_format` of a schema."""
    return {"type": "json_schema", "json_schema": {"name": "counted", "schema": schema, "strict": True}}


STRICT = of(SCHEMA)
LONG = {"response_format": STRICT, "max_tokens": 80}


def fits(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    jsonschema.validate(found, SCHEMA)
    return found


@pytest.mark.slow
def test_every_answer_fits_the_schema(served: Served) -> None:
    whole = served.chat(**LONG).json()["choices"][0]
    fits(whole["message"]["content"])
    assert whole["finish_reason"] == "stop"
    lines = served.chat(**LONG, stream=True).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == whole["message"]["content"], "a stream has the same text"
    drawn = served.chat(**LONG, temperature=3.0, seed=1, n=6).json()["choices"]
    assert len({fits(choice["message"]["content"])["answer"] for choice in drawn}) > 1


@pytest.mark.slow
def test_of_two_texts_the_likelier_one_comes(served: Served) -> None:
    """Greedy takes the likeliest of the tokens that fit: the model's own logits say which."""
    for words in (["yes", "no"], ["4", "7"], ["a", "z"]):
        answer = served.chat(response_format=of({"enum": words}), return_token_ids=True).json()
        text = json.loads(answer["choices"][0]["message"]["content"])
        ids = [*answer["prompt_token_ids"], *demo().tokenizer('"')["input_ids"]]
        with torch.no_grad():
            logits = demo().root(torch.tensor([ids])).logits[0, -1]
        first = [demo().tokenizer(word)["input_ids"][0] for word in words]
        assert text == words[int(logits[first].argmax())]


@pytest.mark.slow
def test_json_object_is_any_object(served: Served) -> None:
    answer = served.chat(response_format={"type": "json_object"}, max_tokens=60).json()["choices"][0]
    text = answer["message"]["content"]
    assert text.startswith("{")
    assert answer["finish_reason"] == "length" or isinstance(json.loads(text), dict)
    assert served.chat(response_format={"type": "text"}).json()["choices"] == served.chat().json()["choices"]


@pytest.mark.slow
@pytest.mark.parametrize("changed", [False, True], ids=["plain", "ablated"])
def test_captures_and_interventions_are_right(served: Served, changed: bool) -> None:
    record: dict[str, Any] = {"points": ["resid_post"], "layers": [8], "return": "inline"}
    if changed:
        record["interventions"] = [{"do": "ablate", "point": "mlp_out", "layers": [3]}]
    answer = served.chat(**LONG, hookmap=record, return_token_ids=True, logprobs=True).json()
    choice = answer["choices"][0]
    fits(choice["message"]["content"])
    ids = torch.tensor([[*answer["prompt_token_ids"], *choice["token_ids"]]])
    hook = demo().root.model.layers[3].mlp.register_forward_hook(lambda m, a, out: out * 0 if changed else None)
    with torch.no_grad():
        plain = demo().root(ids, output_hidden_states=True)
    hook.remove()
    held = safetensors.torch.load(base64.b64decode(answer["activations_meta"]["samples"][0]["safetensors"]))
    torch.testing.assert_close(held["resid_post.8"], plain.hidden_states[9][0, :-1], atol=1e-3, rtol=1e-3)
    told = [each["logprob"] for each in choice["logprobs"]["content"]]
    before = len(answer["prompt_token_ids"]) - 1
    own = plain.logits[0, before:-1].log_softmax(-1).gather(1, ids[0, before + 1 :, None])[:, 0]
    torch.testing.assert_close(torch.tensor(told), own, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 16])
def test_beside_others_and_alone_the_text_is_the_same(tmp_path: Path, batch: int) -> None:
    with serving(tmp_path, batch=batch) as served, ThreadPoolExecutor(4) as people:
        expected = served.chat(**LONG).json()["choices"][0]["message"]["content"]
        plain = served.chat(max_tokens=30).json()["choices"][0]["message"]["content"]
        asked = [LONG if number % 2 else {"max_tokens": 30} for number in range(6)]
        answers = list(people.map(lambda body: served.chat(**body).json(), asked))
    for number, answer in enumerate(answers):
        assert answer["choices"][0]["message"]["content"] == (expected if number % 2 else plain)


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"type": "grammar"}, "response_format.type", "json_schema"),
        ({"type": "json_schema"}, "response_format.json_schema.schema", "JSON Schema"),
        (of({"type": "strin"}), "response_format", "strin"),
        (of({"$ref": "http://127.0.0.1/a"}), "response_format", "fetch"),
        (of({"type": "string", "pattern": "("}), "response_format", "("),
    ],
)
def test_what_cannot_be_followed_is_refused(served: Served, asked: dict[str, Any], param: str, says: str) -> None:
    answer = served.chat(response_format=asked)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and says in error["message"], error


def test_what_would_break_it_is_refused_beside_it(served: Served) -> None:
    for more in ({"min_tokens": 3}, {"ignore_eos": True}, {"stop_token_ids": [3]}):
        answer = served.chat(response_format=STRICT, **more)
        (name,) = more
        assert answer.status_code == 400 and name in answer.json()["error"]["message"]


@pytest.mark.slow
def test_a_schema_that_is_too_much_ends_its_own_request_only(served: Served) -> None:
    """llguidance takes the schema, and gives up behind the first token; others go on."""
    hard = {"type": "string", "pattern": "^(a?){3000}a{3000}$"}
    alone = served.chat(max_tokens=40).json()["choices"]
    with ThreadPoolExecutor(2) as people:
        other = people.submit(served.chat, max_tokens=40)
        answer = served.chat(response_format=of(hard), max_tokens=100)
        assert other.result().json()["choices"] == alone
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "response_format"), error
    assert "cannot be followed: lexer error" in error["message"] and "\n" not in error["message"]


def test_without_the_library_it_is_refused_with_the_command(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    answer = served.chat(response_format=STRICT)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "response_format")
    assert 'pip install "hookmap[grammar]"' in error["message"]
    assert served.chat(max_tokens=1).status_code == 200
    assert not ScoreChanges(), "nothing runs for a request without"


@pytest.mark.slow
def test_openai_s_client_parses_into_a_model(served: Served, client: Any) -> None:
    from pydantic import BaseModel

    class Counted(BaseModel):
        unit: Literal["apples", "pears"]
        sure: bool

    chat: Any = {"model": "hookmap-demo", "messages": MESSAGES, "temperature": 0, "max_tokens": 80}
    parsed = client.chat.completions.parse(**chat, response_format=Counted).choices[0]
    assert isinstance(parsed.message.parsed, Counted)
    asked = {"model": "hookmap-demo", "input": MESSAGES, "temperature": 0, "max_output_tokens": 80}
    form = {"format": {"type": "json_schema", "name": "counted", "schema": SCHEMA, "strict": True}}
    answer = client.responses.create(**asked, text=form)
    fits(answer.output_text)
    assert answer.text.format.type == "json_schema"
    body = {**asked, "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "strin"}}}}
    assert served.post("/v1/responses", **body).json()["error"]["param"] == "text.format"
