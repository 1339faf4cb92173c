"""The shipped maps: a changing part of the sweep, the hard blocks one by one, and the commands that compare."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from packaging.version import Version

from hookmap.cli.commands.maps import command
from hookmap.discovery.discover import discover
from hookmap.loading.narrow import narrow
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import load
from hookmap.maps.shipped import mappings_folder
from hookmap.sweep.build import LEDGER, build_type, classes, done, speaks_for_its_class, sweep
from hookmap.sweep.configs import COMPLETIONS, config_of
from hookmap.verification.verify import verify

pytestmark = pytest.mark.slow


def _proved(model_type: str, **settings: Any) -> ArchitectureMap:
    """The map of a narrow copy, every point of it verified."""
    config = _shallow(narrow(config_of(model_type)), settings.pop("layers", None))
    for name, value in settings.items():
        setattr(config, name, value)
    found = discover(config)
    result = verify(config, architecture_map=found)
    assert result.passed, [check for check in result.checks if not check.passed]
    return found


def _shallow(config: Any, layers: int | None) -> Any:
    """The first `layers` of the copy, where a config says the kind of each layer in lists."""
    if layers is not None:
        depth = config.num_hidden_layers
        for name, value in vars(config).items():
            if isinstance(value, list) and len(value) == depth:
                setattr(config, name, value[:layers])
        config.num_hidden_layers = layers
    return config


def _where(found: ArchitectureMap, point: str, layer: int = 0) -> list[str]:
    (selector,) = found.selectors(point, layer)
    return [str(term) for term in selector.terms]


@pytest.mark.parametrize("model_type", ("bart", "codegen", "dbrx", "openai-gpt", "xlm"))
def test_a_shipped_map_is_what_discovery_finds(model_type: str) -> None:
    """`make test` checks one type of each family besides; the whole is `hookmap maps check`."""
    entry = build_type(model_type, shipped=mappings_folder())
    assert (entry.status, entry.changes) == ("SUPPORTED", ()), entry.detail


_NEWEST = "5.24.0"


@pytest.mark.parametrize("path", sorted(mappings_folder().rglob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_map_is_proved_on_the_newest_transformers(path: Path) -> None:
    assert ".schema" in path.name or _NEWEST in load(path).proved_on


def test_a_class_speaks_in_the_config_that_it_was_made_for() -> None:
    """`sarvam_mla` and `exaone` use the class of another model, and come before or after it."""
    for name, model_type in {"DeepseekV3ForCausalLM": "deepseek_v3", "LlamaForCausalLM": "llama"}.items():
        assert load(mappings_folder() / f"{name}.json").model_type == model_type
        others = [of for of, architecture in classes().items() if architecture == name and of != model_type]
        assert others and [of for of in (model_type, *others) if speaks_for_its_class(of)] == [model_type]


@pytest.mark.parametrize(
    "name", ["Dots1ForCausalLM", "Glm4MoeForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM"]
)
def test_a_map_says_how_many_experts_a_token_uses(name: str) -> None:
    """As the config does. Dots 1 and GLM-4 first choose groups of experts by their two best."""
    shipped = load(mappings_folder() / f"{name}.json")
    wanted = config_of(shipped.model_type).num_experts_per_tok
    found = {kind.mlp.experts_per_token for kind in shipped.kinds if kind.mlp is not None and kind.mlp.type == "moe"}
    assert found == {wanted}


def test_a_check_records_the_version_and_keeps_the_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "GPT2LMHeadModel.json"
    shipped = load(mappings_folder() / path.name)
    earlier = shipped.proofs[0].model_copy(update={"transformers": ("5.9.0", "5.22.2")})
    shipped.model_copy(update={"proofs": (earlier,)}).save(path)
    assert build_type("gpt2", shipped=tmp_path).status == "SUPPORTED"
    assert load(path).proved_on == ("5.9.0", "5.22.2"), "nothing is written unless it is asked for"
    build_type("gpt2", shipped=tmp_path, record=True)
    assert load(path).proved_on == tuple(sorted({"5.9.0", "5.22.2", version("transformers")}, key=Version))
    assert load(path).kinds == shipped.kinds


def test_another_map_loses_the_proofs_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "GPT2LMHeadModel.json"
    document = load(mappings_folder() / path.name).model_dump()
    document["kinds"][0]["points"]["resid_mid"]["terms"][0]["scale"] = 0.5
    ArchitectureMap.model_validate(document).save(path)
    assert build_type("gpt2", shipped=tmp_path, record=True).changes
    assert load(path).kinds[0].points["resid_mid"].terms[0].scale == 0.5, "a check never mends a map"
    build_type("gpt2", folder=tmp_path)
    assert load(path).proved_on == (version("transformers"),)


def test_a_completion_is_needed_and_says_why() -> None:
    assert set(COMPLETIONS) <= set(classes())
    assert all(completion.why for completion in COMPLETIONS.values())


# The hard ones -------------------------------------------------------------------------------------------------------


def test_hyper_connections_keep_their_streams_whole() -> None:
    found = _proved("deepseek_v4", layers=4)
    assert {kind.axes for kind in found.kinds} == {("batch", "pos", "stream", "d_model")}
    assert _where(found, "resid_pre") == ["model.layers.0.input[0]"]
    assert _where(found, "resid_mid") == ["model.layers.0.ffn_hc.input[0]"]
    assert _where(found, "mixer_in") == ["model.layers.0.input_layernorm.output"]
    assert _where(found, "mixer_out_raw") == ["model.layers.0.self_attn.output[0]"]
    assert found.unavailable("mixer_out", 0) is not None
    # hidden_states[-1]; hc_head.input_norm, which the streams pass first, only makes the weights that mix them.
    assert found.final_norm_path == "model.norm"


def test_altup_streams_stand_before_the_batch_and_are_captured_behind_the_positions() -> None:
    found = _proved("gemma3n_text")
    assert found.kinds[0].axes == ("batch", "pos", "stream", "d_model")
    (selector,) = found.selectors("resid_pre", 3)
    assert selector.terms[0].axes == ("stream", "batch", "pos", "d_model")
    assert "several residual streams" in (found.unavailable("resid_mid", 0) or "")
    assert found.final_norm_path == "model.norm"  # last_hidden_state, behind the mixing of the streams


def test_a_stream_of_positions_first_is_captured_batch_first() -> None:
    found = _proved("xlnet")
    (selector,) = found.selectors("resid_mid", 1)
    assert selector.terms[0].axes == ("pos", "batch", "d_model")
    assert found.kinds[0].axes == ("batch", "pos", "d_model")


@pytest.mark.parametrize(("model_type", "rows"), [("cpmant", "last"), ("prophetnet", "first")])
def test_a_stream_with_positions_of_its_own_gives_the_tokens_rows(model_type: str, rows: str) -> None:
    (selector,) = _proved(model_type, layers=3 if model_type == "cpmant" else None).selectors("resid_mid", 0)
    assert selector.terms[0].rows == rows


def test_blocks_spread_over_several_lists_are_read_together() -> None:
    found = _proved("xlm")
    assert len(found.kinds) == 1
    assert _where(found, "resid_mid", 2) == ["transformer.ffns.2.input[0]"]
    assert _where(found, "mixer_out", 2) == ["transformer.attentions.2.output[0]"]


def test_a_reversible_block_is_read_on_the_stream_that_its_branches_read() -> None:
    found = _proved("reformer")
    assert _where(found, "resid_pre") == ["reformer.encoder.layers.0.input['hidden_states']"]


def test_a_layer_that_runs_several_times_is_read_in_each_run() -> None:
    found = _proved("hrm_text", num_layers_per_stack=2)
    assert {term.call for selector in found.selectors("resid_pre") for term in selector.terms} == set(range(6))


def test_shared_blocks_are_never_a_place_of_one_layer() -> None:
    found = _proved("zamba", layers=8)
    shared = [s for s in found.selectors() if any(".shared_transf" in term.module for term in s.terms)]
    assert not shared and len(found.kinds) > 1


def test_two_mixers_in_one_branch_are_one_mixer() -> None:
    kind = _proved("falcon_h1", layers=3).kinds[0]
    assert kind.mixer is not None and len(kind.mixer.modules) == 2 and kind.branch_order == "sequential"


def test_three_additions_number_the_middles() -> None:
    found = _proved("gemma4_text")
    assert {"resid_mid.0", "resid_mid.1"} <= set(found.kinds[0].points)


def test_a_root_may_be_a_power() -> None:
    """Gemma 4's RMSNorm multiplies by pow(-0.5), and stands around both branches and before the head."""
    found = _proved("gemma4_text")
    assert {kind.norm_placement for kind in found.kinds} == {"sandwich"} and found.final_norm_path == "model.norm"
    assert _where(found, "mixer_out_raw") == ["model.layers.0.self_attn.output[0]"]
    assert _where(found, "mixer_out") == ["model.layers.0.post_attention_layernorm.output"]


def test_layers_that_are_never_called_on_text_say_so() -> None:
    found = _proved("mllama")
    assert found.unavailable("resid_pre", 3) == "this layer is never called on text alone"
    assert _where(found, "resid_mid", 2) == ["model.layers.2.post_attention_layernorm.input[0]"]


@pytest.mark.parametrize("model_type", ["bart", "blenderbot-small", "trocr"])
def test_the_decoder_of_an_encoder_decoder_stands_alone(model_type: str) -> None:
    assert ".decoder.layers." in _proved(model_type).layers_path


def test_a_longer_list_that_only_chooses_is_not_the_model() -> None:
    """BLT's patcher says where a patch ends; its decoder leads to the output, and the model adds between its blocks."""
    config = narrow(config_of("blt"))
    config.patcher_config.num_hidden_layers = 4
    config.global_config.num_hidden_layers = config.decoder_config.num_hidden_layers = 2
    found = discover(config)
    assert (found.layers_path, found.num_layers, found.joined) == ("model.local_decoder.layers.{i}", 2, False)
    assert not any("patcher" in path for path in (found.layers_path, *found.left_out))


def test_several_rows_of_codes_make_one_sequence() -> None:
    assert "rows of logits" in _proved("musicgen").model_unavailable["logits"]


# The commands --------------------------------------------------------------------------------------------------------


def test_a_sweep_writes_maps_and_goes_on_where_it_was(tmp_path: Path) -> None:
    (entry,) = sweep(["gpt2"], tmp_path, jobs=1)
    assert entry.status == "SUPPORTED" and done(tmp_path) == {"gpt2": entry}
    with (tmp_path / LEDGER).open("a") as ledger:
        ledger.write('{"model_type": "cut sho')
    assert set(done(tmp_path)) == {"gpt2"}
    result = CliRunner().invoke(command, ["build", "gpt2", "-o", str(tmp_path), "--resume", "--json", "--jobs", "1"])
    assert result.exit_code == 0 and json.loads(result.stdout)[0]["seconds"] == entry.seconds


def test_a_sweep_of_models_that_read_images_too_has_a_ledger_and_a_table_of_its_own(tmp_path: Path) -> None:
    """GIT is a causal language model to transformers as well; Mllama's class is another there."""
    assert classes(multimodal=True)["mllama"] == "MllamaForConditionalGeneration" != classes()["mllama"]
    table = tmp_path / "table.md"
    arguments = ["build", "--multimodal", "git", "-o", str(tmp_path), "--table", str(table), "--jobs", "1"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert done(tmp_path) == {} and done(tmp_path, multimodal=True)["git"].status == "SUPPORTED"
    assert table.read_text().startswith("# Every model of transformers that reads images or sounds and text\n")
    assert load(tmp_path / "GitForCausalLM.json").num_layers == 6
    refused = CliRunner().invoke(command, ["check", "--multimodal", "gpt2"])
    assert "no model of images or sounds and text of transformers is of the type 'gpt2'" in " ".join(
        refused.output.split()
    )
