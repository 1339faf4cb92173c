"""The shipped maps, by file and by architecture; what has a config is read from its dataflow; sizes and resizing."""

import json
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.documents import hybrid, uniform
from support.raises import raises

import hookmap
from hookmap.discovery import library
from hookmap.discovery.library import load_map
from hookmap.errors import MapError, MapMismatchError, MapNotFoundError
from hookmap.maps.contents import Proof
from hookmap.maps.parsing import load, parse
from hookmap.maps.shipped import mappings_folder, resize, shipped_architectures, shipped_models

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


def file_of(name: str) -> Path:
    return mappings_folder() / (f"models/{name.replace('/', '--')}.json" if "/" in name else f"{name}.json")


@pytest.mark.parametrize("name", [*shipped_architectures(), *shipped_models()])
def test_every_shipped_map_is_valid_and_of_what_its_file_is_called(name: str) -> None:
    found = load(file_of(name))
    assert name in (found.architecture, found.model_id)
    assert found.selectors("all", "all")


@pytest.mark.slow
def test_the_readme_model_has_a_map_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = load_map("willcb/Qwen3-0.6B")
    assert (found.architecture, found.num_layers, found.d_model) == ("Qwen3ForCausalLM", 28, 1024)


@pytest.mark.slow
def test_a_folder_is_read_from_the_dataflow_and_no_file_is_asked(tmp_path: Path) -> None:
    """Also where the config differs from the shipped map's in more than sizes."""
    folder = folder_with(tmp_path, {**QWEN3, "parallel_residual": True})
    assert load_map(folder) == load_map(str(folder)) == hookmap.discover(folder)


@pytest.mark.slow
def test_a_model_that_cannot_be_asked_for_is_read_from_its_published_shape(caplog: pytest.LogCaptureFixture) -> None:
    """What is in the file is not the answer: the installed transformers is."""
    shipped = load(mappings_folder() / "models" / "openai-community--gpt2.json")
    found = load_map("openai-community/gpt2")
    assert "The one inside its shipped map is read instead" in caplog.text
    assert found.transformers_version == version("transformers") and "one forward pass" in found.discovered_by
    assert (found.scope, found.config_hash) == ("architecture", None), "a shape is less than the published config"
    assert (found.num_layers, found.d_model) == (shipped.num_layers, shipped.d_model)


def test_where_only_a_file_can_answer_and_it_is_not_proved_here_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load_map("GPT2LMHeadModel")
    proved = load(mappings_folder() / "GPT2LMHeadModel.json")
    assert ("may be wrong" in caplog.text) == (version("transformers") not in proved.proved_on)
    caplog.clear()
    proved.model_copy(update={"proofs": (Proof(transformers=("5.0.1", "5.1.0")),)}).save(
        tmp_path / "GPT2LMHeadModel.json"
    )
    monkeypatch.setattr(library, "mappings_folder", lambda: tmp_path)
    assert load_map("GPT2LMHeadModel").proved_on == ("5.0.1", "5.1.0")
    (said,) = caplog.messages
    assert f"proved on transformers 5.0.1, 5.1.0, and {version('transformers')} is installed" in said
    assert "hookmap discover MODEL" in said and "hookmap maps check gpt2" in said


@pytest.mark.slow
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
    with raises(MapMismatchError, "several kinds of block", "Run: hookmap discover org/model"):
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
    assert (found.proofs, found.config_hash, found.model_id) == ((), None, "c/d")


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
        ("{", "no map for .*JSON"),
        ("[]", "no map for "),
        ({"architectures": ["NobodysForCausalLM"]}, "no map for .*config.json"),
        ({"model_type": "nobodys"}, "nobodys"),
    ],
)
def test_a_folder_without_a_usable_config_says_why(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(MapError, match=message):
        load_map(folder_with(tmp_path, config))


def test_a_folder_that_is_no_model_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(MapNotFoundError, match=r"expected a config.json in it, found notes.txt"):
        load_map(tmp_path)


@pytest.mark.slow
def test_the_maps_are_small() -> None:
    """By the kind of block: BEAM scales every layer by a number of its own, so each of its 50 is a kind."""
    paths = [p for p in mappings_folder().rglob("*.json") if not p.name.endswith(".schema.json")]
    assert max(p.stat().st_size / len(load_map(p).kinds) for p in paths) < 25_000
