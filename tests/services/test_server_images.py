"""Images in requests: as data: URIs alone, bounded, and the answer is what plain `generate` makes of them."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.pictured import image, message, save
from support.served import Served, serving
from transformers import AutoProcessor

import hookmap


def uri(picture: Any, kind: str = "PNG") -> str:
    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def asked(*parts: Any) -> list[dict[str, Any]]:
    """One message of texts and of images given as URIs."""
    content = [
        {"type": "image_url", "image_url": {"url": part, "detail": "low"}}
        if part.startswith(("data:", "http", "/", "file:"))
        else {"type": "text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llava", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    hm = hookmap.open(folder, device="cpu")
    limits = {"layers": (1,), "points": ("resid_post",), "image_pixels": 100_000}
    with serving(tmp_path_factory.mktemp("sessions"), hm, **limits) as found:
        yield found


@pytest.mark.slow
def test_the_answer_and_the_rows_are_those_of_generate_with_pixels(served: Served, folder: Path) -> None:
    messages = asked("to be", uri(image(0)), uri(image(1, 30, 12)), "or not")
    answer = served.chat(
        messages=messages, max_tokens=4, n=2, hookmap={"points": "resid_post", "layers": [1], "positions": "image"}
    ).json()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        message("to be", image(0), image(1, 30, 12), "or not"),
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip
    seen: list[torch.Tensor] = []
    block = served.hm.model.get_submodule("model.language_model.layers.1")
    hook = block.register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    tokens = served.hm.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0]
    hook.remove()
    new = tokens[inputs["input_ids"].shape[1] :]
    assert [c["message"]["content"] for c in answer["choices"]] == [served.hm.tokenizer.decode(new)] * 2
    assert answer["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    store = hookmap.open_store(served.sessions.folder(answer["activations_meta"]["session_id"]))
    marks = (inputs["input_ids"][0] == served.hm.model.config.image_token_id).nonzero()[:, 0]
    assert store.samples[0].positions == store.samples[0].image_positions == tuple(marks.tolist())
    assert [sorted(each) for each in store.samples[0].pictures] == [["sha256"], ["sha256"]]
    assert torch.allclose(store.read(0, "resid_post", 1), seen[0].reshape(-1, 32)[marks], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_plain_request_with_an_image_shares_no_batch_and_streams(served: Served) -> None:
    messages = asked(uri(image(0), "JPEG"), "to be")
    whole = served.chat(messages=messages, max_tokens=4).json()["choices"][0]["message"]["content"]
    stream = served.chat(messages=messages, max_tokens=4, stream=True).text
    assert stream.endswith("data: [DONE]\n\n") and all(word in stream for word in whole.split())
    other = served.chat(messages=asked(uri(image(9), "JPEG"), "to be"), max_tokens=4, logprobs=True).json()
    own = served.chat(messages=messages, max_tokens=4, logprobs=True).json()
    first = [each["choices"][0]["logprobs"]["content"][0]["logprob"] for each in (own, other)]
    assert first[0] != first[1], "the image changes the answer"


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("https://example.com/x.png", "only data: URIs are read here, no files and no addresses"),
        ("file:///etc/passwd", "only data: URIs are read here"),
        ("/etc/passwd", "only data: URIs are read here"),
        ("data:image/png;base64,aGk=", "cannot identify image file"),
        ("data:text/plain;base64,aGk=", "expected data:image/png;base64"),
        (uri(image(0), "BMP"), "cannot identify image file"),
        (uri(Image.new("1", (400, 400))), "400 x 400 pixels, and at most 100000 are read"),
    ],
    ids=["address", "file", "path", "no image", "no image type", "another format", "too many pixels"],
)
def test_what_is_no_small_image_in_the_request_is_refused(served: Served, part: str, told: str) -> None:
    answer = served.chat(messages=asked(part, "to be"))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages") and told in error["message"], error


def test_the_images_of_a_request_share_the_pixels_that_it_may_have(served: Served) -> None:
    picture = uri(Image.new("1", (300, 300)))
    assert served.chat(messages=asked(picture, "to be"), max_tokens=1).status_code == 200
    answer = served.chat(messages=asked(picture, picture, "to be"), max_tokens=1)
    assert answer.status_code == 400 and "at most 50000" in answer.json()["error"]["message"]


def test_other_ways_to_name_a_file_are_refused(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    image(0).save(file)
    for content in (
        [{"type": "image", "path": str(file)}],
        [{"type": "image", "image": str(file)}],
        [{"type": "video", "path": str(file)}],
        [{"type": "input_audio", "input_audio": {}}],
    ):
        answer = served.chat(messages=[{"role": "user", "content": content}])
        assert answer.status_code == 400 and "parts of type image_url" in answer.json()["error"]["message"]
    for prompt in (
        [{"role": "user", "content": [{"type": "image", "path": str(file)}]}],
        [{"text": "<image>", "images": [str(file)]}],
    ):
        patch = {"do": "patch", "point": "resid_pre", "layers": [1], "source": {"prompt": prompt}}
        answer = served.chat(messages=asked("to be"), hookmap={"interventions": [patch]})
        assert answer.status_code == 400, answer.text
        assert "no image is read there" in answer.text or "messages with a role" in answer.text
