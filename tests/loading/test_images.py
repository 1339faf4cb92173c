"""Prompts with images: against the processor's own inputs, plain hooks, and plain `generate` with `pixel_values`."""

import base64
import hashlib
import importlib.util
import io
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import plain_hooks
from support.pictured import PICTURED, image, message, save
from support.raises import raises
from transformers import AutoProcessor
from transformers.image_utils import load_image

import hookmap
from hookmap.capture.engines.hooks import HooksEngine
from hookmap.capture.engines.nnsight import NNsightEngine
from hookmap.loading import checkpoints, image_reader
from hookmap.loading.chat_template import Templating
from hookmap.loading.pictures import Limits

# PaliGemma's processor makes a NumPy array of a tensor as no NumPy since 2.0 likes it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

NEW = 4
FAMILIES = [name if name in ("llava",) else pytest.param(name, marks=pytest.mark.slow) for name in PICTURED]


def inputs_of(processor: Any, prompt: Any) -> Any:
    """What a user of transformers gives to `generate`."""
    if isinstance(prompt, dict):
        made = processor(text=prompt["text"], images=[prompt["images"]], return_tensors="pt")
    else:
        form = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        made = processor.apply_chat_template(prompt, add_generation_prompt=True, **form)
    made.pop("labels", None)
    return made


def seen(hm: Any, inputs: Any, new: int = NEW) -> tuple[list[int], list[torch.Tensor]]:
    """The tokens that plain `generate` makes, and what plain hooks see leave each block, [pos, d]."""
    blocks = [hm.model.get_submodule(hm.map.layers_path.replace("{i}", str(n))) for n in range(hm.map.num_layers)]
    rows: list[list[torch.Tensor]] = [[] for _ in blocks]

    def watch(number: int) -> Any:
        return lambda module, args, out: rows[number].append((out[0] if isinstance(out, tuple) else out)[0].clone())

    hooks = [block.register_forward_hook(watch(number)) for number, block in enumerate(blocks)]
    try:
        if new:
            tokens = hm.model.generate(**inputs, max_new_tokens=new, do_sample=False)[0].tolist()
        else:
            tokens = inputs["input_ids"][0].tolist()
            with torch.no_grad():
                hm.model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return tokens, [torch.cat(each) for each in rows]


def prompts_of(name: str) -> list[Any]:
    """Of different lengths, with one and with two images, and of different sizes."""
    if name == "paligemma":  # it has no chat template
        return [
            {"text": "<image>to be", "images": [image(0)]},
            {"text": "<image><image>or not to be", "images": [image(1, 30, 12), image(2)]},
            {"text": "<image>that is the question", "images": [image(3)]},
        ]
    return [
        message("to be", image(0), "or not"),
        message(image(1, 30, 12), image(2), "that is the question"),
        message("to be or not to be", image(3)),
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any, Any]]:
    folder = save(request.param, tmp_path_factory.mktemp("model"))
    yield request.param, hookmap.open(folder, device="cpu"), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("new", [NEW, 0])
def test_one_prompt_is_bit_for_bit_what_generate_does_with_the_processors_inputs(
    opened: tuple[str, Any, Any], new: int
) -> None:
    name, hm, processor = opened
    for prompt in prompts_of(name):
        inputs = inputs_of(processor, prompt)
        run = hm.capture(prompt, "resid_post", max_new_tokens=new)
        tokens, rows = seen(hm, inputs, new)
        assert run.tokens == [tuple(tokens)]
        for layer, expected in enumerate(rows):
            assert run["resid_post", layer][0].equal(expected), layer
        marks = inputs["input_ids"][0] == hm.model.config.image_token_id
        assert run.samples[0].image_positions == tuple(marks.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("new", [NEW, 0])
def test_a_batch_of_prompts_with_different_numbers_of_images_has_the_rows_of_each_alone(
    opened: tuple[str, Any, Any], new: int
) -> None:
    name, hm, processor = opened
    prompts = [*prompts_of(name), "to be or not"]
    run = hm.capture(prompts, "resid_post", max_new_tokens=new)
    assert [sample.image_positions is None for sample in run.samples] == [False, False, False, True]
    for number, prompt in enumerate(prompts[:-1]):
        tokens, rows = seen(hm, inputs_of(processor, prompt), new)
        assert run.tokens[number] == tuple(tokens)
        for layer, expected in enumerate(rows):
            assert torch.allclose(run.read(number, "resid_post", layer), expected, rtol=1e-4, atol=1e-5)


def test_positions_select_the_rows_of_images_and_of_text(opened: tuple[str, Any, Any]) -> None:
    name, hm, _ = opened
    prompt = prompts_of(name)[1]
    whole = hm.capture(prompt, "resid_post", max_new_tokens=NEW)
    places = whole.samples[0].image_positions
    for chosen, wanted in (
        ("image", list(places)),
        ("text", [p for p in range(whole.samples[0].rows) if p not in places]),
    ):
        part = hm.capture(prompt, "resid_post", max_new_tokens=NEW, positions=chosen)
        assert list(part.samples[0].positions) == wanted
        assert part["resid_post", 1][0].equal(whole["resid_post", 1][0][wanted])


# What is read, and what is refused ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return hookmap.open(save("llava", tmp_path_factory.mktemp("llava")), device="cpu")


def data_uri(picture: Any, kind: str = "PNG") -> str:
    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def test_a_file_a_data_uri_and_a_pil_image_are_one_image(llava: Any, tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    image(5).save(file)
    uri = data_uri(image(5))
    encoded = uri.partition(",")[2]
    parts = [
        {"type": "image", "image": image(5)},
        {"type": "image", "path": str(file)},
        {"type": "image", "path": file},
        {"type": "image", "url": str(file)},
        {"type": "image", "url": uri},
        {"type": "image", "base64": encoded},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": uri},
    ]
    text = {"type": "text", "text": "to be"}
    prompts = llava.encode([[{"role": "user", "content": [part, text]}] for part in parts])
    pixels = [prompt.inputs.make()["pixel_values"] for prompt in prompts]
    assert all(each.equal(pixels[0]) for each in pixels) and len({prompt.token_ids for prompt in prompts}) == 1
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert [prompt.pictures for prompt in prompts[1:4]] == [({"name": "cat.png", "sha256": digest},)] * 3
    assert [prompt.pictures for prompt in prompts[4:]] == [({"sha256": digest},)] * 4


def test_a_photograph_is_turned_as_transformers_turns_it(llava: Any, tmp_path: Path) -> None:
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    image(6, 40, 16).save(file, exif=exif)
    expected = llava.reader.processor(text="<image>", images=[load_image(str(file))], return_tensors="pt")
    (prompt,) = llava.encode(message("to be", file))
    assert prompt.inputs.make()["pixel_values"].equal(expected["pixel_values"])


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"path": "nowhere.png"}, "message 0: its image cannot be read: there is no file nowhere.png"),
        ({"url": "https://example.com/x.png"}, "is an address, and nothing is fetched: download it"),
        ({"url": "file:///etc/passwd"}, "is an address, and nothing is fetched"),
        ({"url": "data:text/html;base64,aGk="}, "expected data:image/png;base64"),
        ({"url": "data:image/png;base64,???"}, "is no base64"),
        ({"url": "data:image/png;base64,aGk="}, "cannot identify image file"),
        ({"image": 3}, "expected a file, a data: URI or a PIL image, got a int"),
        ({}, "an image needs one of image, path, url, base64, and has none"),
        ({"path": "a", "url": "b"}, "and has path, url"),
    ],
)
def test_what_is_no_image_is_refused(llava: Any, part: dict[str, Any], told: str) -> None:
    messages = [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "to be"}]}]
    with pytest.raises(hookmap.TokenizerError, match=re.escape(told)):
        llava.capture(messages, "resid_post", max_new_tokens=0)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(llava: Any) -> None:
    part = {"type": "image", "url": data_uri(Image.new("1", (5000, 5000)))}
    messages = [{"role": "user", "content": [part]}]
    with raises(hookmap.TokenizerError, "5000 x 5000 pixels, and at most 1000000"):
        llava.reader.messages(messages, 0, Templating(), Limits(most_pixels=10**6))


def test_video_audio_and_images_beside_a_message_are_refused_by_name(llava: Any) -> None:
    for part, told in (({"type": "video", "path": "x.mp4"}, "a video"), ({"type": "audio", "path": "x"}, "audio")):
        content = [{"type": "image", "image": image(0)}, part]
        with pytest.raises(hookmap.TokenizerError, match=f"message 0 has {told}: hookmap reads text, and images as"):
            llava.encode([{"role": "user", "content": content}])
    with raises(hookmap.TokenizerError, "message 0 has an image"):
        llava.encode([{"role": "user", "content": "to be", "images": ["x.png"]}])


def test_a_text_without_a_place_for_its_image_is_refused(llava: Any) -> None:
    with raises(hookmap.TokenizerError, "LlavaProcessor refuses prompt 0:", "0 <image> tokens and 1 images"):
        llava.encode({"text": "to be", "images": [image(0)]})
    (prompt,) = llava.encode({"text": "to be", "images": image(0)}, chat=True)
    assert prompt.text == "<user> <image> to be <assistant>" and len(prompt.image_positions) == 16
    inputs = dict(inputs_of(llava.reader.processor, message(image(0), "to be")))
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"]] * 2)
    for new in (0, 2):
        with raises(hookmap.CaptureError, "images: Image features"):
            llava.capture(inputs, "resid_post", max_new_tokens=new)
    with raises(hookmap.SelectionError, "no prompt has an image"):
        llava.capture("to be", "resid_post", max_new_tokens=0, positions="image")


def test_a_model_opened_without_a_processor_says_so_and_takes_one(llava: Any) -> None:
    prompt = message("to be", image(0))
    with raises(hookmap.TokenizerError, "without a processor"):
        hookmap.open(llava.model).encode(prompt)
    given = hookmap.open(llava.model, processor=llava.reader.processor)
    assert given.encode(prompt)[0].token_ids == llava.encode(prompt)[0].token_ids
    assert given.tokenizer is llava.reader.processor.tokenizer


def test_a_folder_without_a_processor_says_so(tmp_path: Path, llava: Any) -> None:
    llava.model.save_pretrained(tmp_path)
    llava.tokenizer.save_pretrained(tmp_path)
    hm = hookmap.open(tmp_path, device="cpu")
    with raises(hookmap.TokenizerError, "prompt 0, message 0 has an image:", "processor"):
        hm.encode(message("to be", image(0)))
    assert hm.encode("to be")


def test_the_processors_own_output_is_a_prompt(llava: Any) -> None:
    prompt = message("to be", image(0), "or not")
    inputs = inputs_of(llava.reader.processor, prompt)
    for given in (inputs, dict(inputs), [inputs]):
        run = llava.capture(given, "resid_post", max_new_tokens=NEW)
        own = llava.capture(prompt, "resid_post", max_new_tokens=NEW)
        assert run.tokens == own.tokens and run["resid_post", 2].equal(own["resid_post", 2])
        assert run.samples[0].image_positions == own.samples[0].image_positions
    two = {name: torch.cat([value, value]) for name, value in inputs.items()}
    with raises(hookmap.TokenizerError, "without pads"):
        llava.capture(two, "resid_post", max_new_tokens=0)


def test_fields_of_a_large_data_set_are_made_again_and_an_altered_file_is_noticed(
    llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cat.png"
    image(5).save(file)
    prompts = [message("to be", file), message("to be", image(7)), message("or not", file)]
    held = llava.capture(prompts, "resid_post", max_new_tokens=2)
    monkeypatch.setattr(image_reader, "HELD", 0)
    encoded = llava.encode(prompts)
    again = llava.capture(encoded, "resid_post", max_new_tokens=2)
    assert again["resid_post", 2].equal(held["resid_post", 2])
    image(6).save(file)
    with raises(hookmap.TokenizerError, "cat.png has changed since its prompt was read"):
        llava.capture(encoded, "resid_post", max_new_tokens=2)


def test_prompts_travel_to_another_process(llava: Any) -> None:
    (prompt,) = llava.encode(message("to be", image(0)))
    there = pickle.loads(pickle.dumps(prompt))  # noqa: S301 - as Ray sends it
    assert there == prompt and there.inputs.make()["pixel_values"].equal(prompt.inputs.make()["pixel_values"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_a_batch_that_is_halved_and_each_engine_have_the_rows_of_each_alone(
    llava: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [*prompts_of("llava"), message("to be", image(8), image(9), image(10))]
    alone = [llava.capture(prompt, "resid_post", max_new_tokens=NEW) for prompt in prompts]
    llava.capture(prompts, "resid_post", max_new_tokens=NEW)  # shows that they may share a batch
    kind: Any = {"hooks": HooksEngine, "nnsight": NNsightEngine}[engine]
    generate, sizes = kind.generate, list[int]()

    def two_fit(self: Any, observer: Any, inputs: Any, editor: Any = None) -> torch.Tensor:
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("three are too many")
        sizes.append(len(inputs["pixel_values"]))
        return generate(self, observer, inputs, editor)

    monkeypatch.setattr(kind, "generate", two_fit)
    run = llava.capture(prompts, "resid_post", max_new_tokens=NEW, engine=engine)
    assert sizes == [3, 4], "the images of two prompts each"
    for number, expected in enumerate(alone):
        assert run.tokens[number] == expected.tokens[0]
        assert torch.allclose(run.read(number, "resid_post", 2), expected["resid_post", 2][0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("new", [NEW, 0])
def test_positions_of_two_axes_and_patches_of_images_given_as_fields(name: str, new: int) -> None:
    """Qwen's processors need torchvision. What they make, made here: patches of all images, and the grid of each."""
    hm = hookmap.open(plain_hooks.build_multimodal(name))
    draw = torch.Generator().manual_seed(0)
    mark, begin, end = 90, 92, 93

    def fields(before: list[int], grids: list[tuple[int, int]], behind: list[int]) -> dict[str, torch.Tensor]:
        ids = [*before]
        for height, width in grids:
            ids += [begin, *[mark] * (height * width), end]
        found = {"input_ids": torch.tensor([[*ids, *behind]])}
        found["mm_token_type_ids"] = (found["input_ids"] == mark).long()
        found["image_grid_thw"] = torch.tensor([[1, height, width] for height, width in grids])
        patches = int(found["image_grid_thw"].prod(-1).sum())
        found["pixel_values"] = torch.randn(patches, 3 * 2 * 4 * 4, generator=draw)
        return found

    prompts = [
        fields([5, 6], [(2, 3)], [7]),
        fields([5], [(2, 2), (3, 2)], [8, 9, 10, 11]),
        fields([5, 6, 7, 8, 9, 10], [(4, 2)], [7, 8]),
    ]
    run = hm.capture(prompts, "resid_post", max_new_tokens=new)
    for number, prompt in enumerate(prompts):
        inputs = {**prompt, "attention_mask": torch.ones_like(prompt["input_ids"])}
        tokens, rows = seen(hm, inputs, new)
        one = hm.capture(prompt, "resid_post", max_new_tokens=new)
        assert one.tokens == [tuple(tokens)] == [run.tokens[number]]
        assert len(one.samples[0].image_positions) == len(prompt["pixel_values"])
        for layer, expected in enumerate(rows):
            assert one["resid_post", layer][0].equal(expected)
            assert torch.allclose(run.read(number, "resid_post", layer), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_without_pillow_or_torchvision_the_command_to_type_is_told(
    llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = save("llava", tmp_path / "llava")
    prompt = message("to be", image(0))
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: None)
    with pytest.raises(hookmap.TokenizerError, match=re.escape('images need Pillow: pip install "hookmap[vision]"')):
        hookmap.open(own, device="cpu").encode(prompt)
    monkeypatch.undo()
    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is installed")
    (own / "processor_config.json").write_text(
        json.dumps(
            {
                "processor_class": "Qwen2VLProcessor",
                "image_processor": {"image_processor_type": "Qwen2VLImageProcessor"},
                "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"},
            }
        )
    )
    with raises(hookmap.TokenizerError, "torchvision"):
        hookmap.open(own, device="cpu").encode(prompt)
