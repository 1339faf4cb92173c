"""What is said of tokens: their bytes, also of parts of a character, where they stand in the text, and their ids."""

import base64
import json
from typing import Any

import pytest
import safetensors.torch
import torch
from openai import OpenAI
from support.served import MESSAGES, NAME, Served
from test_server_text import tokenizer

from hookmap.loading.prompts import decode
from hookmap.services.server.spelling import RowBytes, Spelling

TEXT = "größer 日本 👩‍👩‍👧 the cat"
FORCED = "é日👩!"
"""two, three, four and one byte: a token each in the demo model"""


@pytest.mark.parametrize("kind", ["bytes", "byte-level", "metaspace"])
@pytest.mark.parametrize("text", [TEXT, " " + TEXT, "a  b\n\tc", "�x", "ab the.\nUser: é"])
def test_the_bytes_of_the_tokens_of_a_text_are_the_text(kind: str, text: str) -> None:
    tok = tokenizer(kind)
    ids = [*tok(text, add_special_tokens=False)["input_ids"], tok.eos_token_id]
    row, spelling, parts, offsets = RowBytes(Spelling(tok)), Spelling(tok), list[bytes | None](), list[int]()
    for id in ids:
        parts.append(row.of(id))
        offsets.append(row.offset)
        row.add(id)
    whole = decode(ids, tok)
    assert parts[-1] is None, "a special token adds nothing to the text"
    assert b"".join(filter(None, parts)).decode() == whole
    for place, offset in enumerate(offsets):
        before = b"".join(filter(None, parts[:place]))
        assert offset == len(before.decode(errors="ignore"))
    names = [spelling.name(id) for id in ids]
    for name, part in zip(names[:-1], parts, strict=False):
        if name.startswith("bytes:"):
            assert bytes(int(each, 16) for each in name.removeprefix("bytes:\\x").split("\\x")) == part


@pytest.fixture(scope="module")
def bias(served: Served) -> Any:
    """An intervention that makes the demo model write FORCED: a feature of the logits for each step."""
    ids = served.hm.tokenizer(FORCED, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(FORCED.encode())
    edits = [
        {"do": "clamp", "point": "logits", "feature": id, "value": 1e3, "positions": "all", "steps": [step]}
        for step, id in enumerate(ids)
    ]
    return {"hookmap": {"return": "none", "interventions": edits}, "max_tokens": len(ids)}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_chat_logprobs_have_the_bytes_of_half_characters(client: OpenAI, bias: Any, stream: bool) -> None:
    asked: Any = {"max_tokens": bias["max_tokens"], "temperature": 0, "logprobs": True, "top_logprobs": 5}
    asked["extra_body"] = {"hookmap": bias["hookmap"]}
    found = client.chat.completions.create(model=NAME, messages=MESSAGES, stream=stream, **asked)
    if stream:
        chunks = [chunk.choices[0] for chunk in found]
        text = "".join(chunk.delta.content or "" for chunk in chunks)
        told = [each for chunk in chunks if chunk.logprobs for each in chunk.logprobs.content or []]
    else:
        text, told = found.choices[0].message.content, found.choices[0].logprobs.content
    assert text == FORCED
    assert b"".join(bytes(each.bytes) for each in told).decode() == text
    assert [len(each.bytes) for each in told] == [1] * len(FORCED.encode())
    for each in told:
        tops = [(top.token, tuple(top.bytes or ())) for top in each.top_logprobs]
        assert len(set(tops)) == 5, "different tokens have different bytes"


@pytest.mark.slow
@pytest.mark.parametrize("echo", [False, True])
def test_completions_name_each_token_once_and_where_it_stands(served: Served, bias: Any, echo: bool) -> None:
    prompt = "aß"
    body = {"prompt": prompt, "temperature": 0, "logprobs": 9, **bias}
    if echo:  # an echo of logprobs goes with no intervention on logits
        body |= {"echo": True, "max_tokens": 0}
        del body["hookmap"]
    choice = served.post("/v1/completions", **body).json()["choices"][0]
    told, text = choice["logprobs"], prompt if echo else FORCED
    assert choice["text"] == text
    expected, names = [], []
    for place, character in enumerate(text):
        own = character.encode()
        expected += [place] * len(own)
        names += [character] if len(own) == 1 else [f"bytes:\\x{byte:02x}" for byte in own]
    assert (told["text_offset"], told["tokens"]) == (expected, names)
    for tops in told["top_logprobs"][1:] if echo else told["top_logprobs"]:
        assert len(tops) in (9, 10), "none takes the place of another"


@pytest.mark.slow
def test_token_ids_are_told_as_vllm_tells_them(served: Served, client: OpenAI) -> None:
    run = served.hm.capture([MESSAGES], ["embed"], max_new_tokens=6)
    ids, count = list(run.tokens[0]), run.samples[0].prompt_tokens
    asked: Any = {"max_tokens": 6, "temperature": 0, "extra_body": {"return_token_ids": True}}
    found: Any = client.chat.completions.create(model=NAME, messages=MESSAGES, **asked)
    assert (found.prompt_token_ids, found.choices[0].token_ids) == (ids[:count], ids[count:])
    chunks: Any = list(client.chat.completions.create(model=NAME, messages=MESSAGES, stream=True, **asked))
    assert chunks[0].prompt_token_ids == ids[:count]
    assert [id for chunk in chunks for id in chunk.choices[0].token_ids] == ids[count:]
    found = client.completions.create(model=NAME, prompt=["1+1=", "2"], **asked)
    for choice, prompt in zip(found.choices, ["1+1=", "2"], strict=True):
        own = served.hm.capture([prompt], ["embed"], max_new_tokens=6)
        count = own.samples[0].prompt_tokens
        assert [*choice.prompt_token_ids, *choice.token_ids] == list(own.tokens[0])
        assert len(choice.prompt_token_ids) == count
    plain = served.chat(max_tokens=2).text
    assert "token_ids" not in plain, "only who asks gets them"


@pytest.mark.slow
def test_rows_can_be_aligned_without_a_tokenizer(served: Served) -> None:
    record = {"points": ["resid_mid"], "layers": [3], "positions": "generated"}
    inline = served.chat(hookmap={**record, "return": "inline"}).json()["activations_meta"]["samples"][0]
    stored = served.chat(hookmap=record, return_token_ids=True).json()
    session = served.get(f"/v1/activations/sessions/{stored['session_id']}").json()["samples"][0]
    run = served.hm.capture([MESSAGES], ["resid_mid"], [3], max_new_tokens=12)
    texts = [served.hm.tokenizer.decode([id]) for id in run.tokens[0]]
    for told in (inline, stored["activations_meta"]["samples"][0], session):
        assert (told["token_ids"], told["token_texts"]) == (list(run.tokens[0]), texts)
        assert told["positions"] == list(range(run.samples[0].prompt_tokens, len(texts) - 1))
    rows = safetensors.torch.load(base64.b64decode(inline["safetensors"]))["resid_mid.3"]
    assert torch.equal(rows, run.read(0, "resid_mid", 3)[inline["positions"]])
    assert json.dumps(served.chat(hookmap=record).json()["activations_meta"]).count("token_ids") == 0
