"""Models that read images too, on text: the language model's layers, by their full path, hold what plain hooks see."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plain_hooks
from support.plain_hooks import LAYERS, MULTIMODAL
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.errors import HookmapError
from hookmap.verification.verify import verify

pytestmark = pytest.mark.slow

NEW = 4
TEXT = "to be or not to be"


def _if_transformers_runs_it(model: torch.nn.Module, source: Any) -> None:
    """Skips where plain transformers itself raises; hookmap must then raise too, and say what it said."""
    try:
        with torch.no_grad():
            model(torch.tensor([[5, 6, 7]]))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        with pytest.raises(HookmapError, match=re.escape(said)):
            hookmap.discover(source)
        pytest.skip(f"transformers {version('transformers')} itself cannot run {type(model).__name__}: {said}")


def _built(name: str) -> Any:
    """Skips where transformers itself cannot build the model (Llama 4 in 5.0.0)."""
    try:
        return plain_hooks.build_multimodal(name)
    except AttributeError as error:
        pytest.skip(f"transformers {version('transformers')} itself cannot build it: {error}")


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_folder_of_the_whole_model_is_captured_on_text(name: str, tmp_path: Path) -> None:
    family, model = MULTIMODAL[name], _built(name)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    _if_transformers_runs_it(model, tmp_path)
    hm = hookmap.open(tmp_path, device="cpu")
    assert type(hm.model) is type(model) and hm.map.layers_path == family.block
    points = list(family.points)
    layers = [layer for layer in range(LAYERS) if hm.map.unavailable("resid_mid", layer) is None]
    assert layers == list(family.only_layers.get("resid_mid", range(LAYERS)))
    run = hm.capture(TEXT, points, layers, max_new_tokens=NEW)
    prompt = hm.tokenizer(TEXT)["input_ids"]
    assert all(weight.equal(hm.model.state_dict()[path]) for path, weight in model.state_dict().items())
    reference = plain_hooks.generate(hm.model, family, [prompt], max_new_tokens=NEW, do_sample=False)
    assert run.tokens[0] == tuple(reference.sequences[0].tolist())
    for point in points:
        for layer in layers:
            assert run[point, layer].equal(reference.point(family, point, layer)), (point, layer)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_module_and_its_folder_have_one_map(name: str, tmp_path: Path) -> None:
    model = _built(name)
    model.save_pretrained(tmp_path)
    _if_transformers_runs_it(model, model)
    of_module, of_folder = hookmap.discover(model), hookmap.discover(tmp_path)
    assert of_folder.architecture == type(model).__name__
    assert of_folder.kinds == of_module.kinds and of_folder.model_points == of_module.model_points
    assert of_module.embedding_path == of_module.layers_path.replace("layers.{i}", "embed_tokens")
    result = verify(model, architecture_map=of_folder)
    assert result.passed, [check for check in result.checks if not check.passed]


@pytest.mark.parametrize("name", ["llama4", "mllama"])
def test_a_config_alone_is_of_the_language_model_alone_where_there_is_one(name: str) -> None:
    config, whole = MULTIMODAL[name].config(), _built(name)
    assert hookmap.discover(config).layers_path == "model.layers.{i}"
    config.architectures = [type(whole).__name__]
    _if_transformers_runs_it(whole, config)
    assert hookmap.discover(config).layers_path == MULTIMODAL[name].block


def test_a_layer_that_reads_the_image_alone_says_so() -> None:
    found = hookmap.discover(plain_hooks.build_multimodal("mllama"))
    assert found.unavailable("resid_mid", 1) == "this layer is never called on text alone"
