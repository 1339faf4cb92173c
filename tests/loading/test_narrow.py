"""A narrow copy: what it takes is known before it is made, and every part of it is narrow."""

from typing import Any

import pytest
import torch
import transformers
from support.raises import raises

from hookmap.discovery.discover import discover
from hookmap.errors import DiscoveryError, ModelError
from hookmap.loading import configs
from hookmap.loading.narrow import MOST_BYTES, narrow, narrow_copy
from hookmap.sweep.configs import config_of
from hookmap.verification.verify import verify


def _never_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whatever is built is built on the meta device, and where it was asked for."""
    asked: list[str] = []
    build = configs.build

    def on_meta(config: Any, device: str = "meta", *rest: Any, **more: Any) -> Any:
        asked.append(device)
        return build(config, "meta", *rest, **more)

    monkeypatch.setattr(configs, "build", on_meta)
    return asked


def _bytes(model: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def test_a_copy_that_is_too_large_is_refused_with_the_figure_and_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _never_on_the_cpu(monkeypatch)
    config = transformers.GPT2Config(n_positions=10**11, n_layer=2)
    with raises(ModelError, "would take 23,841.9 GiB, and at most 4 GiB are allowed", "wpe.weight"):
        verify(config)
    assert set(asked) == {"meta"}


@pytest.mark.skipif(not hasattr(transformers, "InklingConfig"), reason="transformers is older than Inkling")
@pytest.mark.slow
def test_a_vision_tower_that_widens_with_depth_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inkling's default tower of 24 layers is 3 TB, and its text model's 66 layers stay."""
    asked = _never_on_the_cpu(monkeypatch)
    config = transformers.InklingForConditionalGeneration.config_class()
    model, small = narrow_copy(config)
    assert _bytes(model) < MOST_BYTES and asked == ["meta", "meta", "cpu"]
    assert small.get_text_config().num_hidden_layers == config.get_text_config().num_hidden_layers
    assert _bytes(model) < 1e9


@pytest.mark.parametrize("name", ["Gemma3Config", "Llama4Config", "MllamaConfig", "Qwen2_5_VLConfig", "Mistral3Config"])
def test_every_nested_config_is_narrow(name: str) -> None:
    small = narrow(getattr(transformers, name)())
    parts = [part for part in vars(small).values() if hasattr(part, "to_dict")]
    assert len(parts) > 1
    for part in parts:
        for field in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
            size = getattr(part, field, None)
            assert size is None or size <= {"num_attention_heads": 4, "vocab_size": 512}.get(field, 128), (part, field)


def test_a_part_that_is_a_plain_dictionary_is_narrow_too() -> None:
    config = transformers.LlamaConfig()
    config.backbone_config = {"hidden_size": 4096, "depth": 9, "name": "x"}
    assert narrow(config).backbone_config == {"hidden_size": 64, "depth": 9, "name": "x"}
    assert config.backbone_config["hidden_size"] == 4096


@pytest.mark.skipif(not hasattr(transformers, "Gemma4AssistantConfig"), reason="transformers is older than Gemma 4")
def test_a_config_with_values_for_each_layer_is_refused_for_what_its_forward_asks() -> None:
    # Such a config refuses `==`. Gemma 4's assistants read another model's caches.
    with raises(DiscoveryError, "shared_kv_states"):
        discover(config_of("gemma4_assistant"))
