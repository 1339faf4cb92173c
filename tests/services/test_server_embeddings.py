"""/v1/embeddings: rows of a named point, held against transformers' own hidden states."""

import base64
from typing import Any

import numpy as np
import pytest
import torch
from support.served import Served, demo

pytest.importorskip("openai")

TEXTS = ["Tom has 3 apples.", "1+1="]


def hidden(text: str, layer: int) -> torch.Tensor:
    """transformers' own hidden state before a block, [pos, d_model]."""
    ids = demo().tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return demo().root(ids, output_hidden_states=True).hidden_states[layer][0]


def test_a_vector_is_the_mean_row_of_the_asked_layer(served: Served, client: Any) -> None:
    found = client.embeddings.create(model="hookmap-demo", input=TEXTS, extra_body={"layer": 4})
    assert [each.index for each in found.data] == [0, 1] and found.object == "list"
    for each, text in zip(found.data, TEXTS, strict=True):
        # The client asks for base64 by itself. `resid_post` of block 4 is what enters block 5.
        np.testing.assert_allclose(each.embedding, hidden(text, 5).mean(0), rtol=1e-4, atol=1e-5)
    read = sum(len(demo().tokenizer(text)["input_ids"]) for text in TEXTS)
    assert (found.usage.prompt_tokens, found.usage.total_tokens) == (read, read)


def test_the_last_token_floats_base64_and_token_ids_agree(served: Served) -> None:
    asked = {"input": TEXTS[0], "point": "resid_pre", "layer": -1, "pooling": "last"}
    answer = served.post("/v1/embeddings", **asked).json()
    (vector,) = [each["embedding"] for each in answer["data"]]
    np.testing.assert_allclose(vector, hidden(TEXTS[0], 19)[-1], rtol=1e-4, atol=1e-5)
    coded = served.post("/v1/embeddings", **asked, encoding_format="base64").json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(coded), "<f4").tolist() == vector
    ids = demo().tokenizer(TEXTS[0])["input_ids"]
    for given in (ids, [ids]):
        assert served.post("/v1/embeddings", **{**asked, "input": given}).json()["data"] == answer["data"]
    assert answer["model"] == "hookmap-demo" and len(vector) == 64


def test_the_default_is_the_mean_of_the_last_layer_s_stream(served: Served) -> None:
    default = served.post("/v1/embeddings", input=TEXTS[1]).json()["data"]
    asked = {"point": "resid_post", "layer": 19, "pooling": "mean", "dimensions": 64}
    assert served.post("/v1/embeddings", input=TEXTS[1], **asked).json()["data"] == default


def test_points_of_the_whole_model_and_of_heads_are_vectors_too(served: Served) -> None:
    vector = served.post("/v1/embeddings", input=TEXTS[0], point="final_norm").json()["data"][0]["embedding"]
    np.testing.assert_allclose(vector, hidden(TEXTS[0], 20).mean(0), rtol=1e-4, atol=1e-5)
    run = demo().capture([TEXTS[0]], points="q", layers=3, chat=False, max_new_tokens=1)
    heads = served.post("/v1/embeddings", input=TEXTS[0], point="q", layer=3).json()["data"][0]["embedding"]
    np.testing.assert_allclose(heads, run["q", 3][0].mean(0).flatten(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_many_texts_come_in_their_order(served: Served) -> None:
    texts = [f"{number} and {number}" for number in range(20)]
    data = served.post("/v1/embeddings", input=texts, layer=0).json()["data"]
    assert [each["index"] for each in data] == list(range(20)), "more than a request may have choices"
    for number in (0, 13, 19):
        np.testing.assert_allclose(data[number]["embedding"], hidden(texts[number], 1).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": "a", "dimensions": 32}, "dimensions"),
        ({"input": "a", "point": "final_norm", "layer": 3}, "layer"),
        ({"input": "a", "point": "pattern", "layer": 3}, "point"),
        ({"input": "a", "point": "nowhere"}, "point"),
        ({"input": "a", "layer": 20}, "layer"),
        ({"input": "a " * 600}, "input"),
        ({"input": "a " * 10**5}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "normalize": True}, "normalize"),
    ],
)
def test_what_cannot_be_given_is_refused(served: Served, body: dict[str, Any], param: str | None) -> None:
    answer = served.post("/v1/embeddings", **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
