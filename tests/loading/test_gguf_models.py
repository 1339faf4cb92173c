"""Models in GGUF files, as llama.cpp's users have them, against the model that the file was written from."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from support.raises import raises

import hookmap
from hookmap.cli.main import main

gguf = pytest.importorskip("gguf")
from support import gguf_file  # noqa: E402 - needs the package
from support.tiny_tokenizer import tiny_tokenizer  # noqa: E402

PROMPT = "the cat"


@pytest.fixture(scope="module")
def model() -> Any:
    return gguf_file.tiny_qwen2()


def residuals(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What leaves each block of the model, by plain hooks."""
    found: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda *seen: found.append(seen[2])) for block in model.model.layers]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_a_gguf_file_is_opened_with_its_own_weights(kind: str, model: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    held = gguf_file.write(model, path, gguf.GGMLQuantizationType[kind])
    expected = gguf_file.tiny_qwen2()
    expected.load_state_dict(held)
    hm = hookmap.open(path, device="cpu", dtype=torch.float32)
    run = hm.capture(PROMPT, points="resid_post", layers="all", max_new_tokens=5)
    ids = torch.tensor(run.tokens)
    generated = expected.generate(ids[:, :-5], max_new_tokens=5, do_sample=False)
    assert generated.tolist() == ids.tolist()
    for layer, want in enumerate(residuals(expected, ids[:, :-1])):
        torch.testing.assert_close(run["resid_post", layer][:, : want.shape[1]], want, rtol=1e-4, atol=1e-4)
    assert hm.map.model_id == str(path)


@pytest.mark.slow
def test_its_weights_are_said_to_be_dequantised(model: Any, tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "model.gguf"
    gguf_file.write(model, path)
    with caplog.at_level(logging.WARNING, logger="hookmap"):
        hm = hookmap.open(path, device="cpu")
    assert "dequantised" in caplog.text
    assert hm.capture([{"role": "user", "content": "the"}], points="embed", max_new_tokens=0).texts


@pytest.mark.slow
def test_discover_and_capture_take_a_gguf_file(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_file.write(model, path)
    assert hookmap.discover(path).num_layers == 3
    shown = CliRunner().invoke(main, ["discover", str(path), "-o", str(tmp_path / "map.json")])
    assert shown.exit_code == 0, shown.output
    assert hookmap.load_map(tmp_path / "map.json").selectors("resid_mid", 2) == hookmap.open(
        path, device="cpu"
    ).map.selectors("resid_mid", 2)
    out = tmp_path / "capture"
    arguments = ["capture", str(path), "--points", "resid_mid", "--layers", "1", "--prompt", PROMPT, "-o", str(out)]
    captured = CliRunner().invoke(main, [*arguments, "--max-new-tokens", "2"])
    assert captured.exit_code == 0, captured.output
    assert hookmap.open_store(out)["resid_mid", 1].shape[-1] == 32


def test_a_gguf_file_under_another_name_gets_the_command_that_names_it(model: Any, tmp_path: Path) -> None:
    """As Ollama keeps them: sha256-…"""
    gguf_file.write(model, tmp_path / "model.gguf")
    (tmp_path / "model.gguf").rename(tmp_path / "sha256-1234")
    with raises(hookmap.ModelError, "end in .gguf", "ln -s", "sha256-1234 sha256-1234.gguf"):
        hookmap.open(tmp_path / "sha256-1234", device="cpu")


@pytest.mark.parametrize("ask", [hookmap.open, hookmap.discover])
def test_what_is_wrong_with_a_gguf_file_is_said(ask: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with raises(hookmap.ModelError, "cannot load the model", "broken.gguf"):
        ask(tmp_path / "broken.gguf")
    with raises(hookmap.ModelError, "there is no file", "absent.gguf"):
        ask(tmp_path / "absent.gguf")
    with raises(hookmap.ModelError, "holds GGUF files (broken.gguf)", "Give one file"):
        ask(tmp_path)
    with raises(hookmap.ModelError, "owner/name-GGUF/model.gguf"):
        ask("owner/name-GGUF/model.gguf")
    with raises(hookmap.MapError, "a model. Its map: hookmap discover"):
        hookmap.load_map(tmp_path / "broken.gguf")


def test_a_tokenizer_beside_the_file_is_the_models(model: Any, tmp_path: Path) -> None:
    gguf_file.write(model, tmp_path / "model.gguf")
    own = tiny_tokenizer()
    own.save_pretrained(tmp_path)
    hm = hookmap.open(tmp_path / "model.gguf", device="cpu")
    assert hm.tokenizer.get_vocab() == own.get_vocab()
    assert hm.tokenizer.chat_template == own.chat_template


@pytest.mark.slow
def test_its_config_is_read_once(model: Any, tmp_path: Path) -> None:
    """Of a large file it takes seconds. What is counted is how often the file is opened."""
    path = tmp_path / "model.gguf"
    gguf_file.write(model, path)
    counting, opened = True, [0]

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if counting and event == "open" and str(arguments[0]) == str(path):
            opened[0] += 1

    sys.addaudithook(count)
    hookmap.discover(path)
    once = opened[0]
    hookmap.discover(path)
    assert 0 < once == opened[0], "a map is of the config alone"
    hookmap.open(path, tokenizer=tiny_tokenizer(), device="cpu")
    weights, opened[0] = opened[0] - once, 0
    tf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    counting = False
    assert weights == opened[0] - once, "transformers reads the config, and then the weights"
