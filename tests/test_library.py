"""The shipped maps: found by file, architecture, folder and hub id; resized where only sizes differ, else refused."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from documents import hybrid, uniform
from hypothesis import given
from hypothesis import strategies as st

import hookmap
from hookmap.architecture_map import parse
from hookmap.errors import MapError, MapMismatchError, MapNotFoundError
from hookmap.library import load_map, mappings_folder, resize, shipped_architectures, shipped_models

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
}


def folder_with(tmp_path: Path, config: Any) -> Path:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("name", [*shipped_architectures(), *shipped_models()])
def test_every_shipped_map_is_valid_and_of_what_its_file_is_called(name: str) -> None:
    found = load_map(name)
    assert name in (found.architecture, found.model_id)
    assert found.selectors("all", "all")


def test_the_readme_model_has_a_map_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = load_map("willcb/Qwen3-0.6B")
    assert (found.architecture, found.num_layers, found.d_model) == ("Qwen3ForCausalLM", 28, 1024)


def test_a_shipped_map_resized_to_a_folder_says_what_discovery_says(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, QWEN3)
    shipped, discovered = load_map(folder), hookmap.discover(folder)
    assert shipped.selectors("all", "all") == discovered.selectors("all", "all")
    for field in ("num_layers", "d_model", "num_heads", "d_vocab", "architecture", "layers_path"):
        assert getattr(shipped, field) == getattr(discovered, field)


def test_a_default_written_out_is_no_difference_and_a_structural_field_is(tmp_path: Path) -> None:
    load_map(folder_with(tmp_path, {**QWEN3, "attention_bias": False, "hidden_act": "silu", "rms_norm_eps": 1e-6}))
    with pytest.raises(MapMismatchError) as caught:
        load_map(folder_with(tmp_path, {**QWEN3, "parallel_residual": True}))
    assert "parallel_residual: the map's is 'the default', this model's is True" in str(caught.value)
    assert f"hookmap discover {tmp_path}" in str(caught.value)


@pytest.mark.parametrize(
    "sizes",
    [
        {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "query_pre_attn_scalar": 144},
        {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "state_size": 8, "conv_kernel": 3},
        {"model_type": "falcon", "architectures": ["FalconForCausalLM"], "ffn_hidden_size": 96, "num_kv_heads": None},
        {"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True},
    ],
    ids=lambda sizes: sizes["model_type"],
)
def test_sizes_of_other_parts_change_no_place(sizes: dict[str, Any], tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 61}
    folder = folder_with(tmp_path, {**small, **sizes})
    assert load_map(folder).selectors("all", "all") == hookmap.discover(folder).selectors("all", "all")


@given(st.integers(1, 200), st.integers(1, 9000))
def test_a_resized_map_has_the_same_points_on_every_layer(layers: int, width: int) -> None:
    small = parse(uniform(layers=4))
    large = resize(small, layers, width)
    assert (large.num_layers, large.d_model, large.points) == (layers, width, small.points)
    assert [s.module for s in large.selectors("mlp_out")] == [f"model.layers.{i}.mlp" for i in range(layers)]
    assert parse(large.to_json()) == large, "still a valid document"
    assert small == parse(uniform(layers=4)), "the original is untouched"


def test_heads_of_another_size_are_not_guessed(tmp_path: Path) -> None:
    own = hookmap.discover(folder_with(tmp_path, QWEN3))
    assert own.unavailable("q") is None
    other = resize(own, 5, 64)
    assert "depends on the size" in str(other.unavailable("q"))
    assert other.unavailable("resid_mid") is None
    assert parse(other.to_json()) == other, "still a valid document"


def test_which_layers_of_a_hybrid_are_of_which_kind_is_never_guessed() -> None:
    with pytest.raises(MapMismatchError, match=r"several kinds of block .* Run: hookmap discover org/model"):
        resize(parse(hybrid()), 12, 16, model_id="org/model")
    assert resize(parse(hybrid()), 6, 99).d_model == 99, "another width of the same layers is no question"


def test_a_scale_that_may_depend_on_the_depth_is_never_guessed() -> None:
    document = uniform()
    document["kinds"][0]["points"]["mlp_out"]["terms"][0]["scale"] = 0.35
    with pytest.raises(MapMismatchError, match=r"scales its branches by \[0.35\]"):
        resize(parse(document), 12, 16)


def test_a_resized_map_claims_no_verification_and_no_config() -> None:
    document = {**uniform(), "verified_by": ["order"], "config_hash": "abc", "model_id": "a/b"}
    found = resize(parse(document), 9, 16, model_id="c/d")
    assert (found.verified_by, found.config_hash, found.model_id) == ((), None, "c/d")


def test_a_map_file_is_loaded(tmp_path: Path) -> None:
    parse(hybrid()).save(tmp_path / "m.json")
    assert load_map(tmp_path / "m.json") == load_map(str(tmp_path / "m.json")) == parse(hybrid())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Qwen3ForCausalML", "Shipped maps near it: Qwen3ForCausalLM"),
        ("my-map.json", "there is no map file my-map.json. Make one: hookmap discover MODEL -o my-map.json"),
        ("nobody/nothing", "hookmap discover nobody/nothing -o FILE"),
        ("willcb/Qwen3-0.6b", "willcb/Qwen3-0.6B"),
        ("somebody/gpt2", "openai-community/gpt2"),
        ("somebody/zzzzzzzz", "shipped maps has a name near it: hookmap maps list"),
    ],
)
def test_what_has_no_map_gets_near_matches_and_the_command_to_make_one(name: str, message: str) -> None:
    with pytest.raises(MapNotFoundError) as caught:
        load_map(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "expected a JSON object"),
        ({"architectures": ["NobodysForCausalLM"]}, "its architecture is NobodysForCausalLM"),
        ({}, "its architecture is not in its config"),
    ],
)
def test_a_folder_without_a_usable_config_says_why(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(MapError, match=message):
        load_map(folder_with(tmp_path, config))


def test_a_folder_that_is_no_model_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(MapNotFoundError, match=r"expected a config.json in it, found notes.txt"):
        load_map(tmp_path)


def test_the_maps_are_small() -> None:
    """By the kind of block: BEAM scales every layer by a number of its own, so each of its 50 is a kind."""
    paths = [p for p in mappings_folder().rglob("*.json") if not p.name.endswith(".schema.json")]
    assert max(p.stat().st_size / len(load_map(p).kinds) for p in paths) < 25_000
