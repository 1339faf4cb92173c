"""What is built on captures, with images: the store, files of prompts, the command line, writes, sweeps and lenses."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.pictured import image, message, save
from support.raises import raises

import hookmap
from hookmap.analysis.grid import load_grid
from hookmap.analysis.steering import load_vector
from hookmap.cli.main import main
from hookmap.loading.prompts import encode
from hookmap.services.server.editing import read
from hookmap.services.server.errors import ApiError
from hookmap.stores.export import export

NEW = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llava", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def hm(folder: Path) -> Any:
    return hookmap.open(folder, device="cpu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of messages whose images are beside it, and one prompt that is text."""
    (tmp_path / "data").mkdir()
    for number, name in enumerate(("cat.png", "dog.jpg")):
        image(number).save(tmp_path / "data" / name)
    rows = [
        {"messages": message("to be", "or not"), "id": "none"},
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "cat.png"}]}], "id": "cat"},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "url": "dog.jpg"},
                        {"type": "text", "text": "that is"},
                        {"type": "image", "path": str(tmp_path / "data" / "cat.png")},
                    ],
                }
            ],
            "id": "both",
        },
    ]
    file = tmp_path / "data" / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments)


@pytest.mark.slow
def test_a_store_says_which_tokens_are_of_which_image(hm: Any, data: Path, tmp_path: Path) -> None:
    prompts = hookmap.load_prompts(data)
    made = hm.capture(prompts, "resid_post", max_new_tokens=NEW, store=tmp_path / "run")
    store = hookmap.open_store(tmp_path / "run")
    in_memory = hm.capture(prompts, "resid_post", max_new_tokens=NEW)
    digests = {name: hashlib.sha256((data.parent / name).read_bytes()).hexdigest() for name in ("cat.png", "dog.jpg")}
    cat, dog = ({"name": name, "sha256": digest} for name, digest in digests.items())
    assert [sample.pictures for sample in store] == [None, (cat,), (dog, cat)]
    for number, sample in enumerate(store):
        own = tuple(n for n, token in enumerate(sample.token_ids) if token == hm.model.config.image_token_id)
        assert (sample.image_positions or ()) == own and len(own) == 16 * number
        assert sample == in_memory.samples[number]
        assert store.read(number, "resid_post", 1).equal(in_memory.read(number, "resid_post", 1))
    assert store.manifest.settings["images"] == 3
    assert store.verify() == [] and made.texts == store.texts
    (told,) = (each for each in store.describe()["texts"] if each["sample"] == 1)
    assert told["pictures"] == (cat,) and len(told["image_positions"]) == 16


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["all", "1:40"])
def test_exports_say_which_rows_are_of_images(hm: Any, data: Path, tmp_path: Path, positions: str) -> None:
    """Read with NumPy, torch, datasets and json; held against the ids of the tokens."""
    hm.capture(
        hookmap.load_prompts(data), "resid_post", [1], max_new_tokens=NEW, positions=positions, store=tmp_path / "run"
    )
    store, mark = hookmap.open_store(tmp_path / "run"), hm.model.config.image_token_id
    kept = [range(s.rows) if s.positions is None else s.positions for s in store]
    expected = [[s.token_ids[position] == mark for position in own] for s, own in zip(store, kept, strict=True)]
    flat = np.array([each for sample in expected for each in sample])
    assert 0 < flat.sum() < len(flat)
    for layout in ("pt", "numpy", "probelab"):
        out = tmp_path / layout
        export(store, layout, out, point="resid_post")
        assert np.array_equal(np.load(out / "image_rows.npy", allow_pickle=False), flat)
        lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        assert [len(line.get("image_positions", [])) for line in lines] == [0, 16, 32]
        assert lines[1]["pictures"][0]["name"] == "cat.png"
    datasets = pytest.importorskip("datasets")
    export(store, "datasets", tmp_path / "datasets")
    found = datasets.load_from_disk(str(tmp_path / "datasets"))
    rows = [None if not any(own) else [n for n, here in enumerate(own) if here] for own in expected]
    assert [row["image_rows"] for row in found] == rows
    export(store, "saelens", tmp_path / "saelens", point="resid_post", layer=1, context=4)
    found = datasets.load_from_disk(str(tmp_path / "saelens"))
    assert found.column_names == ["blocks.1.hook_resid_post", "token_ids"]
    ids = np.array([row["token_ids"] for row in found])
    assert np.array_equal(np.load(tmp_path / "saelens" / "image_rows.npy"), ids == mark)


def test_an_export_of_means_says_that_no_row_is_of_an_image(hm: Any, data: Path, tmp_path: Path) -> None:
    hm.capture(hookmap.load_prompts(data), "resid_post", [1], max_new_tokens=0, mean=True, store=tmp_path / "run")
    notes = export(hookmap.open_store(tmp_path / "run"), "numpy", tmp_path / "out")
    assert notes[0] == "rows are means over tokens, of images and of text: there is no image_rows.npy"
    assert not (tmp_path / "out" / "image_rows.npy").exists()


def test_a_capture_resumes_with_the_same_images_only(hm: Any, data: Path, tmp_path: Path) -> None:
    prompts = hookmap.load_prompts(data)
    hm.capture(prompts, "resid_post", max_new_tokens=NEW, store=tmp_path / "run")
    hm.capture(prompts, "resid_post", max_new_tokens=NEW, store=tmp_path / "run", resume=True)
    image(9).save(data.parent / "cat.png")
    with raises(hookmap.StoreError, "prompts_sha256"):
        hm.capture(prompts, "resid_post", max_new_tokens=NEW, store=tmp_path / "run", resume=True)


@pytest.mark.slow
def test_the_command_line_takes_files_of_messages_and_single_images(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("--points", "resid_post", "--layers", "1", "--max-new-tokens", "2", "--device", "cpu")
    done = run("capture", str(folder), *common, "--prompts", str(data), "--positions", "image", "-o", "files")
    assert done.exit_code == 0, done.stderr
    assert [sample.rows for sample in hookmap.open_store("files")] == [0, 16, 32]
    cat = str(data.parent / "cat.png")
    done = run("capture", str(folder), *common, "--prompt", "to be", "--image", cat, "-o", "one")
    assert done.exit_code == 0, done.stderr
    shown = run("inspect", "one")
    assert shown.exit_code == 0 and "images: cat.png (16 tokens)" in shown.stderr
    done = run("capture", str(folder), *common, "--prompt", "<image> to be", "--image", cat, "--no-chat", "-o", "plain")
    assert done.exit_code == 0, done.stderr
    assert hookmap.open_store("plain").samples[0].prompt == "<image> to be"
    done = run(
        "lens", str(folder), "--prompt", "to be", "--image", cat, "--json", "--positions", "all", "--device", "cpu"
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["tokens"].count("[image]") == 16
    rows = [{"question": "to be", "picture": "data/cat.png"}, {"question": "or not", "picture": None}]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("--prompts", "questions.jsonl", "--image-column", "picture", "--chat")
    done = run("capture", str(folder), *common, *columns, "-o", "columns")
    assert done.exit_code == 0, done.stderr
    assert [len(sample.image_positions or ()) for sample in hookmap.open_store("columns")] == [16, 0]
    for arguments, told in (
        (("--prompt", "a", "--prompt", "b", "--image", cat), "--image goes with one --prompt"),
        (("--prompt", "a", "--image", "nowhere.png"), "there is no file nowhere.png"),
    ):
        done = run("capture", str(folder), *common, *arguments, "-o", "none")
        assert done.exit_code in (1, 2) and told in done.stderr and not Path("none").exists()
    Path("hookmap.yaml").write_text(f"prompts: {data}\npositions: image\n")
    done = run("capture", str(folder), *common, "-o", "settings")
    assert done.exit_code == 0, done.stderr
    assert [sample.rows for sample in hookmap.open_store("settings")] == [0, 16, 32]


@pytest.mark.slow
def test_commands_of_one_prompt_take_images(
    folder: Path, hm: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cat, dog = (str(data.parent / name) for name in ("cat.png", "dog.jpg"))

    def user(file: str, *then: dict[str, Any]) -> list[dict[str, Any]]:
        parts = [{"type": "image", "path": file}, {"type": "text", "text": "to be"}]
        return [{"role": "user", "content": parts}, *then]

    def ran(*arguments: str) -> Any:
        done = run(*arguments, str(folder), "--device", "cpu")
        assert done.exit_code == 0, done.stderr
        return done

    answered = hm.encode(user(cat, {"role": "assistant", "content": "or"}), continue_final_message=True)
    done = ran("lens", "--prompt", "to be", "--image", cat, "--answer", "or", "--json", "--positions", "all")
    assert json.loads(done.stdout)["tokens"] == list(hm.lens(answered).tokens)
    done = ran("attribute", "--prompt", "to be", "--image", cat, "--answer", "or", "--json")
    assert json.loads(done.stdout)["logit"] == pytest.approx(hm.attribute(answered).logit.tolist(), abs=1e-4)
    plain = hm.encode({"text": "<image> to be or", "images": [cat]})
    done = ran("lens", "--prompt", "<image> to be", "--image", cat, "--answer", " or", "--json", "--no-chat")
    assert json.loads(done.stdout)["tokens"] == list(hm.lens(plain, positions="-16:").tokens)

    both = ("--clean", "to be", "--corrupted", "to be", "--image", cat, "--corrupted-image", dog)
    found = ran("patch", *both, "--layers", "0", "--max-new-tokens", "3").stdout.splitlines()
    texts = [hm.generate(user(file), max_new_tokens=3).texts[0] for file in (cat, dog)]
    edit = {"do": "patch", "point": "resid_pre", "layers": 0, "source": {"prompt": user(cat)}}
    texts.append(hm.generate(user(dog), [edit], max_new_tokens=3).texts[0])
    assert [line.split(None, 1)[1] for line in found] == texts and texts[2] != texts[1]
    sweep = ("--sweep", "--target", "be", "--against", "not", "--positions", "image", "--layers", "1", "-o", "sweep")
    ran("patch", *both, *sweep)
    swept = hm.sweep(user(cat), user(dog), "be", "not", positions="image", layers=[1])
    assert torch.allclose(load_grid("sweep.safetensors").values, swept.effect.values, atol=1e-4)

    Path(data.parent / "pairs.jsonl").write_text(
        json.dumps({"positive": user("cat.png"), "negative": user("dog.jpg")}) + "\n"
    )
    ran("vector", "make", "--pairs", str(data.parent / "pairs.jsonl"), "--layers", "1", "-o", "v.safetensors")
    vector = hm.steering_vector([user(cat)], [user(dog)], layers=[1])
    assert torch.allclose(load_vector("v.safetensors")[1], vector[1], atol=1e-5)
    steer = ("--vector", "v.safetensors", "--strength", "9", "--prompt", "to be", "--max-new-tokens", "3", "--json")
    (told,) = json.loads(ran("steer", *steer, "--image", cat).stdout)
    expected = [hm.generate(user(cat), edits, max_new_tokens=3).texts[0] for edits in ((), vector.interventions(9.0))]
    assert [told["without"], told["with"]] == expected
    for command, arguments, why in (
        ("lens", ("--image", cat), "--image goes with --prompt"),
        ("steer", ("--vector", "v.safetensors", "--image", cat), "--image goes with one --prompt"),
        ("patch", ("--clean", "a", "--corrupted", "b", "--corrupted-image", cat), "which is the clean prompt's?"),
    ):
        done = run(command, str(folder), *arguments)
        assert done.exit_code == 2 and why in done.stderr


def test_every_image_of_a_file_that_cannot_be_read_is_told_at_once(hm: Any, data: Path) -> None:
    """And what else is wrong with its prompts, as far as the model's own tokenizer and processor tell."""
    broken = data.parent / "broken.png"
    broken.write_bytes(b"no image")

    def shown(*files: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [{"type": "image", "path": file} for file in files]}]}

    rows = [shown("nowhere.png", "broken.png"), shown("cat.png"), {"prompt": "to be"}, shown("there.png")]
    rows.append({"messages": [{"role": "user", "content": [{"type": "video", "video": "film.mp4"}]}]})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(hookmap.TokenizerError) as refused:
        hm.capture(hookmap.load_prompts(data), "resid_post")
    text = str(refused.value)
    assert text.startswith("3 prompts cannot be read:\n  - prompt 0, message 0: ")
    for told in ("nowhere.png", "broken.png", "prompt 3, message 0: its image cannot be read: there is no file",
                 "prompt 4, message 0 has a video"):  # fmt: skip
        assert told in text, told
    assert "prompt 1" not in text and "prompt 2" not in text


def test_one_reason_of_all_prompts_is_told_once(hm: Any) -> None:
    with pytest.raises(hookmap.TokenizerError, match=r"^prompt 0 is text: .*\n.*\nThis is so of 30 prompts\.$"):
        encode(["to be"] * 30, None)


def test_a_column_of_a_data_set_holds_the_images_of_its_texts(hm: Any, data: Path) -> None:
    rows = [
        {"question": "to be", "image": "cat.png", "id": "one"},
        {"question": "or not", "image": ["cat.png", "dog.jpg"]},
        {"question": "that is", "image": None},
    ]
    file = data.parent / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = hookmap.load_prompts(file, images="image", labels="all")
    found = hm.encode(prompts, chat=True)
    folder = data.parent
    assert [prompt.token_ids for prompt in found[:2]] == [
        prompt.token_ids
        for prompt in hm.encode(
            [message(folder / "cat.png", "to be"), message(folder / "cat.png", folder / "dog.jpg", "or not")]
        )
    ]
    assert found[0].id == "one" and found[0].labels is None and found[2].inputs is None
    as_it_is = [{"question": "<image> to be", "image": {"bytes": (folder / "cat.png").read_bytes(), "path": None}}]
    (prompt,) = hm.encode(hookmap.load_prompts(as_it_is, images="image"))
    assert len(prompt.image_positions) == 16 and prompt.text == "<image> to be"
    with raises(hookmap.TokenizerError, "chat=True, --chat, makes a user's message of both"):
        hm.encode(prompts)
    with raises(hookmap.DataError, "messages", "expected a text"):
        hookmap.load_prompts([{"messages": message("to be"), "image": "cat.png"}], images="image")
    with raises(hookmap.DataError, "no column 'picture'"):
        hookmap.load_prompts(file, images="picture")


def test_interventions_write_at_the_tokens_of_images_and_of_text(hm: Any) -> None:
    prompts = [message("to be", image(0)), message(image(1), image(2), "or not")]
    plain = hm.capture(prompts, "resid_post", 0, max_new_tokens=NEW)
    for where in ("image", "text"):
        edit = {"do": "scale", "point": "resid_post", "layers": [0], "factor": 2.0, "positions": where}
        found = hm.capture(prompts, "resid_post", 0, max_new_tokens=1, interventions=[edit])
        for number in range(2):
            at = torch.zeros(plain.samples[number].prompt_tokens, dtype=torch.bool)
            at[list(plain.samples[number].image_positions)] = True
            written = at if where == "image" else ~at
            old = plain.read(number, "resid_post", 0)[: len(at)]
            expected = torch.where(written[:, None], 2 * old, old)
            assert torch.allclose(found.read(number, "resid_post", 0), expected, rtol=1e-4, atol=1e-5)
    with raises(hookmap.SelectionError, "no prompt has an image"):
        hm.capture("to be", "resid_post", 0, max_new_tokens=1, interventions=[{**edit, "positions": "image"}])


def test_a_patch_takes_rows_of_another_image(hm: Any, data: Path, tmp_path: Path) -> None:
    """With the stream that enters layer 0 at the tokens of the cat, the run with the dog is that with the cat."""
    cat, dog = (message("to be", data.parent / name, "or not") for name in ("cat.png", "dog.jpg"))
    source = [{"role": "user", "content": [{**part} for part in cat[0]["content"]]}]
    source[0]["content"][1] = {"type": "image", "path": "cat.png"}
    edit = {"do": "patch", "point": "resid_pre", "layers": [0], "positions": "image", "source": {"prompt": source}}
    file = data.parent / "edits.json"
    file.write_text(json.dumps([edit]))
    patched = hm.capture(dog, "resid_post", max_new_tokens=1, interventions=file, store=tmp_path / "run")
    expected = hm.capture(cat, "resid_post", max_new_tokens=1)
    for layer in range(3):
        assert torch.allclose(patched["resid_post", layer], expected["resid_post", layer], rtol=1e-4, atol=1e-5)
    digest = hashlib.sha256((data.parent / "cat.png").read_bytes()).hexdigest()
    assert hookmap.open_store(tmp_path / "run").manifest.settings["interventions"][0]["images_sha256"] == [digest]
    with raises(hookmap.InterventionError, "image", "path of a file"):
        hm.capture(dog, interventions=[{**edit, "source": {"prompt": message(image(0))}}])


def test_a_patch_takes_rows_of_a_text_with_images_that_no_template_reads(hm: Any, data: Path, tmp_path: Path) -> None:
    source = {"text": "<image> to be", "images": ["cat.png"]}
    edit = {"do": "patch", "point": "resid_pre", "layers": [0], "positions": "image", "source": {"prompt": source}}
    (data.parent / "edits.json").write_text(json.dumps([edit]))
    cat, dog = ({**source, "images": [data.parent / name]} for name in ("cat.png", "dog.jpg"))
    patched = hm.capture(
        dog, "resid_post", max_new_tokens=1, interventions=data.parent / "edits.json", store=tmp_path / "run"
    )
    expected = hm.capture(cat, "resid_post", max_new_tokens=1)
    for layer in range(3):
        assert torch.allclose(patched["resid_post", layer][0], expected["resid_post", layer][0], rtol=1e-4, atol=1e-5)
    digest = hashlib.sha256((data.parent / "cat.png").read_bytes()).hexdigest()
    assert hookmap.open_store(tmp_path / "run").manifest.settings["interventions"][0]["images_sha256"] == [digest]
    with raises(ApiError, "no image is read there"):
        read([edit], hm, None)  # type: ignore[arg-type]  # no session is named


def test_a_sweep_over_two_images_with_one_text_brings_the_answer_back(hm: Any) -> None:
    clean, corrupted = message("to be", image(0), "or not"), message("to be", image(1), "or not")
    with raises(hookmap.InterventionError, "the same"):
        hm.sweep(clean, clean, 5)
    found = hm.sweep(clean, corrupted, 5, 7, layers=[0, 2], positions="image")
    assert found.grid.tokens == ("[image]",) * 16 and found.grid.values.shape == (2, 16)
    places = hm.encode(clean)[0].image_positions
    for row, layer in enumerate((0, 2)):
        rows = hm.capture(clean, "resid_pre", layer, max_new_tokens=0)["resid_pre", layer][0, places[3]]
        ablate = {
            "do": "ablate", "point": "resid_pre", "layers": [layer], "positions": [places[3]], "to": "mean",
                "vector": rows.tolist(),
        }  # fmt: skip
        logits = hm.capture(corrupted, "logits", max_new_tokens=0, positions="last", interventions=[ablate])["logits"]
        assert torch.allclose(found.grid.values[row, 3], logits[0, 0, 5] - logits[0, 0, 7], atol=1e-4)


def test_lenses_and_attributions_read_prompts_with_images(hm: Any) -> None:
    prompt = message("to be", image(0), "or not")
    found = hm.lens(prompt)
    run_ = hm.capture(prompt, ["resid_post", "logits"], max_new_tokens=0)
    assert found.tokens.count("[image]") == 16 and found.tokens[0] == "<user>"
    assert torch.allclose(found.top_probabilities[-1, :, 0], run_["logits"][0].softmax(-1).max(-1).values, atol=1e-5)
    assert hm.lens(run_).tokens == found.tokens
    parts = hm.attribute(prompt)
    assert torch.allclose(parts.values.sum(0), parts.logit, rtol=1e-4, atol=1e-4)
    assert torch.allclose(parts.logit, run_["logits"][0, -1].max(), rtol=1e-4)
    vector = hm.steering_vector([prompt], [message("to be", image(1), "or not")], layers=[1])
    rows = [hm.capture(each, "resid_post", 1, max_new_tokens=0)["resid_post", 1][0, -1] for each in (
        prompt, message("to be", image(1), "or not"))]  # fmt: skip
    assert torch.allclose(vector[1], rows[0] - rows[1], atol=1e-5)


@pytest.mark.slow
def test_inspects_messages_have_images(hm: Any, folder: Path, data: Path) -> None:
    model = pytest.importorskip("inspect_ai.model", reason='pip install "hookmap[eval]"')
    from hookmap.evaluation.inspect_provider import HookmapAPI

    cat = str(data.parent / "cat.png")
    provider = HookmapAPI(str(folder), device="cpu")

    def ask(*parts: Any) -> Any:
        content = [model.ContentText(text="to be"), *parts]
        config = model.GenerateConfig(max_tokens=NEW, temperature=0)
        return asyncio.run(provider.generate([model.ChatMessageUser(content=content)], [], "none", config))

    expected = hm.capture(message("to be", Path(cat)), (), max_new_tokens=NEW)
    answer = ask(model.ContentImage(image=cat))
    assert answer.completion == expected.texts[0] and answer.usage.input_tokens == expected.samples[0].prompt_tokens
    with raises(hookmap.TokenizerError, "audio", "text and images"):
        ask(model.ContentAudio(audio="x.wav", format="wav"))
