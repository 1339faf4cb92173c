"""Models as people have them: quantised, compiled, wrapped by PEFT, dispatched by accelerate, in half precision.

Each is captured as plain PyTorch hooks on the same model see it, and its map is the plain model's.
"""

import dataclasses
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from click.testing import CliRunner
from support import plain_hooks
from support.plain_hooks import FAMILIES, LAYERS, Family
from support.raises import raises
from support.served import demo, serving
from support.tiny_tokenizer import tiny_tokenizer
from torch import nn

import hookmap
from hookmap.analysis.steering import load_vector
from hookmap.cli.main import main
from hookmap.discovery.dataflow import record
from hookmap.loading.config_fields import with_fields
from hookmap.maps.diff import differences
from hookmap.services.server.joining import why_no_joins
from hookmap.verification.verify import verify

pytestmark = pytest.mark.slow

NEW = 4
IDS = [[5, 17, 3, 60, 22, 9]]
ARCHITECTURES = ["llama", "gpt2", "qwen3_moe"]


def same_as_plain_hooks(
    x: Any, name: str, root: nn.Module | None = None, prefix: str = "", **settings: Any
) -> hookmap.Capture:
    """Every point that a person hooks by hand. `root`: the module that generates; `prefix`: how the paths begin."""
    family = _at(FAMILIES[name], prefix)
    hm = hookmap.open(x, **settings)
    run = hm.capture(IDS, list(family.points), max_new_tokens=NEW)
    reference = plain_hooks.generate(root or hm.model, family, IDS, max_new_tokens=NEW, do_sample=False)
    assert run.tokens[0] == tuple(reference.sequences[0].tolist())
    for point in family.points:
        for layer in range(LAYERS):
            got, expected = run[point, layer], reference.point(family, point, layer)
            assert got.dtype == expected.dtype and got.equal(expected), (point, layer)
    return run


def _at(family: Family, prefix: str) -> Family:
    points = {
        name: tuple(dataclasses.replace(place, module=prefix + place.module) for place in places)
        for name, places in family.points.items()
    }
    return dataclasses.replace(family, points=points)


def plain_map(name: str, **settings: Any) -> hookmap.ArchitectureMap:
    return hookmap.discover(plain_hooks.build(name, **settings))


def saved(name: str, folder: Path, **settings: Any) -> Path:
    plain_hooks.build(name, **settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# Quantised ------------------------------------------------------------------------------------------------------------

# bitsandbytes packs blocks of 64 numbers.
_WIDE: dict[str, dict[str, int]] = {
    "gpt2": {"n_embd": 64},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
    "qwen3_moe": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
}
_QUANTISED = {
    # Columns with an outlier, which it looks for over the whole batch, would make one position depend on the others.
    "8 bit": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "4 bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
}


def quantised(bits: str, name: str, folder: Path) -> nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    settings = transformers.BitsAndBytesConfig(**_QUANTISED[bits])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved(name, folder, **_WIDE[name]), quantization_config=settings, device_map="cpu", dtype=torch.float32
    )
    assert any("bit" in type(module).__name__ for module in model.modules())
    loaded: nn.Module = model.eval()
    return loaded


@pytest.mark.parametrize("bits", _QUANTISED)
@pytest.mark.parametrize("name", _WIDE)
def test_the_map_of_a_quantised_model_is_the_unquantised_ones(bits: str, name: str, tmp_path: Path) -> None:
    model, expected = quantised(bits, name, tmp_path), plain_map(name, **_WIDE[name])
    found = hookmap.discover(model)
    _is_the_same_but_for_packed_weights(expected, found)
    assert found.config_hash == expected.config_hash and verify(model).passed
    same_as_plain_hooks(model, name)


def _is_the_same_but_for_packed_weights(plain: hookmap.ArchitectureMap, found: hookmap.ArchitectureMap) -> None:
    """What heads give is computed from the rows of a weight, which has none where it is packed."""
    assert all(": attn_result: " in each for each in differences(plain, found)), list(differences(plain, found))
    with raises(hookmap.HookmapError, "the weights of the output projection are packed"):
        found.selectors("attn_result", 1)


@pytest.mark.parametrize("bits", _QUANTISED)
def test_a_quantised_folder_opens_quantised(bits: str, tmp_path: Path) -> None:
    quantised(bits, "llama", tmp_path / "plain").save_pretrained(tmp_path / "quantised")
    hm = hookmap.open(tmp_path / "quantised", device="cpu")
    assert any("bit" in type(module).__name__ for module in hm.model.modules())
    expected = plain_map("llama", **_WIDE["llama"])
    _is_the_same_but_for_packed_weights(expected, hm.map)
    assert not list(differences(expected, hookmap.discover(tmp_path / "quantised"))), "of its config: unquantised"
    with raises(hookmap.HookmapError, "no attn_result", "packed"):
        hm.capture(IDS, ["attn_result"], [1])
    same_as_plain_hooks(hm.model, "llama")


def test_a_quantised_layer_of_any_library_is_read_as_the_product_that_it_stands_for() -> None:
    model = plain_hooks.build("llama")
    for block in model.model.layers:
        block.mlp.down_proj = _Int8(block.mlp.down_proj)
    assert not list(differences(plain_map("llama"), hookmap.discover(model)))
    assert "forward" not in vars(model.model.layers[0].mlp.down_proj), "discovery leaves the layer as it was"
    same_as_plain_hooks(model, "llama")


class _Int8(nn.Module):
    """A quantised layer as many libraries write it: whole numbers, a scale for each row, an operation of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [x @ (row * scale) for row, scale in zip(self.packed, self.scale, strict=True)]
        return torch.stack(rows, dim=-1)


# Compiled, wrapped, dispatched ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_compiled_model_is_read_inside_its_wrapper(name: str) -> None:
    model = plain_hooks.build(name)
    compiled = torch.compile(model, backend="eager")
    assert not list(differences(plain_map(name), hookmap.discover(compiled)))
    same_as_plain_hooks(compiled, name, root=model)


# PEFT reads a name that transformers 5.23 has renamed.
_PEFT = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def lora(name: str, model: nn.Module) -> Any:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    targets = {"gpt2": ["c_attn"]}.get(name, ["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=name == "gpt2"))
    with torch.no_grad():
        for path, weight in wrapped.named_parameters():
            if "lora_B" in path:
                weight.normal_(0, 0.5)
    return wrapped.eval()


@_PEFT
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_lora_is_part_of_what_is_captured(name: str) -> None:
    wrapped = lora(name, plain_hooks.build(name))
    found, expected = hookmap.discover(wrapped), plain_map(name)
    assert found.architecture == expected.architecture, "of the model, whatever PEFT's wrapper is called"
    assert found.layers_path == f"base_model.model.{expected.layers_path}"
    assert set(found.points) == set(expected.points)
    run = same_as_plain_hooks(wrapped, name, prefix="base_model.model.")
    bare = hookmap.open(plain_hooks.build(name)).capture(IDS, ["mixer_out"], [1], max_new_tokens=NEW)
    rows = len(IDS[0])
    assert not torch.allclose(run["mixer_out", 1][:, :rows], bare["mixer_out", 1][:, :rows], atol=1e-2)


@_PEFT
def test_a_lora_on_the_output_projection_leaves_no_rows_of_one_weight() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    wrapped = peft.get_peft_model(plain_hooks.build("llama"), peft.LoraConfig(r=4, target_modules=["o_proj"])).eval()
    with raises(hookmap.HookmapError, "no attn_result", "no one projection reads the heads' outputs"):
        hookmap.discover(wrapped).selectors("attn_result", 1)


@_PEFT
def test_latents_are_compressed_by_the_model_and_not_by_an_adapter() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    targets = ["q_b_proj", "kv_b_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets)
    found = hookmap.discover(peft.get_peft_model(plain_hooks.build("deepseek_v3"), config).eval())
    places = [selector.module for selector in found.selectors(["q_latent", "k_latent"], [1])]
    assert [place.rpartition(".")[2] for place in places] == ["q_a_layernorm", "kv_a_layernorm"]


@_PEFT
def test_a_lora_on_a_quantised_model(tmp_path: Path) -> None:
    wrapped = lora("llama", quantised("4 bit", "llama", tmp_path))
    assert set(hookmap.discover(wrapped).points) == set(plain_map("llama").points) - {"attn_result"}
    same_as_plain_hooks(wrapped, "llama", prefix="base_model.model.")


_DEVICES = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.layers.2": "disk", "model.norm": "cpu", "lm_head": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("how", ["hooks on the CPU", "disk", "all kept away"])
def test_a_model_dispatched_over_devices(how: str, tmp_path: Path) -> None:
    """accelerate moves each module's inputs, and the weights that are kept elsewhere, as they are needed."""
    if how == "disk":
        places = {"device_map": _DEVICES, "offload_folder": tmp_path / "offload", "dtype": torch.float32}
        folder = saved("llama", tmp_path / "model")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **places).eval()
        assert any(weight.is_meta for weight in model.parameters())
    elif how == "all kept away":
        model = accelerate.cpu_offload(plain_hooks.build("llama"), execution_device=torch.device("cpu"))
        assert all(weight.is_meta for weight in model.parameters())
    else:
        places = dict.fromkeys(_DEVICES, "cpu")
        model = accelerate.dispatch_model(plain_hooks.build("llama"), places, main_device="cpu", force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in model.modules())
    assert not list(differences(plain_map("llama"), hookmap.discover(model)))
    run = same_as_plain_hooks(model, "llama")
    whole = hookmap.open(plain_hooks.build("llama")).capture(IDS, ["resid_post"], [2], max_new_tokens=NEW)
    torch.testing.assert_close(run["resid_post", 2], whole["resid_post", 2])
    _edits_as_a_plain_hook_does(model)


def test_a_weight_that_comes_while_its_module_runs_is_no_other_ones() -> None:
    """accelerate drops a parameter for another: Python gives the dropped one's id to what comes next."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(300)))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    flow = record(model, {"input": torch.zeros(2, 4)})
    read = {(op.call, flow.parameters[t]) for op in flow.operations for t in op.inputs if t in flow.parameters}
    assert read == {(c.index, f"{c.path}.{name}") for c in flow.calls if c.path for name in ("weight", "bias")}


def test_what_heads_give_where_weights_are_kept_away() -> None:
    model = accelerate.cpu_offload(plain_hooks.build("llama"), execution_device=torch.device("cpu"))
    run = hookmap.open(model).capture(IDS, ["z", "attn_result"], [1], max_new_tokens=2)
    weight = plain_hooks.build("llama").get_parameter("model.layers.1.self_attn.o_proj.weight").detach()
    z = run.read(0, "z", 1)
    expected = torch.einsum("phd,hdm->phm", z, weight.T.reshape(*z.shape[1:], -1))
    torch.testing.assert_close(run.read(0, "attn_result", 1), expected)
    assert verify(model).passed


def _edits_as_a_plain_hook_does(model: nn.Module) -> None:
    mlp: Any = model.get_submodule("model.layers.1.mlp")
    hook = mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    reference = plain_hooks.generate(model, FAMILIES["llama"], IDS, max_new_tokens=NEW, do_sample=False)
    hook.remove()
    ablated: Any = [{"do": "ablate", "point": "mlp_out", "layers": 1}]
    run = hookmap.open(model).generate(IDS, ablated, max_new_tokens=NEW)
    assert run.tokens[0] == tuple(reference.sequences[0].tolist())


# Configs ------------------------------------------------------------------------------------------------------------


def test_fields_of_the_config_are_set_when_a_model_is_opened(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    hm = hookmap.open(folder, device="cpu", config={"rms_norm_eps": 0.5, "output_hidden_states": True})
    assert hm.root.config.rms_norm_eps == 0.5 and hm.root.config.output_hidden_states
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, rms_norm_eps=0.5, dtype="auto").eval()
    rows = plain_hooks.generate(plain, FAMILIES["llama"], IDS, max_new_tokens=1, do_sample=False)
    found = hm.capture(IDS, "resid_post", 1, max_new_tokens=1)["resid_post", 1]
    assert found.equal(rows.point(FAMILIES["llama"], "resid_post", 1))
    assert not found.equal(hookmap.open(folder, device="cpu").capture(IDS, "resid_post", 1, 1)["resid_post", 1])


def test_fields_that_a_config_does_not_have_are_refused_all_at_once(tmp_path: Path) -> None:
    wrong = {"rms_norm_ep": 0.5, "hidden_size": "wide", "vocab_size.x": 3}
    with pytest.raises(hookmap.ModelError) as told:
        hookmap.open(saved("llama", tmp_path), config=wrong)
    for said in ("3 fields", "rms_norm_ep: LlamaConfig has no such field; did you mean rms_norm_eps",
                 "hidden_size: TypeError", "vocab_size.x: vocab_size is no config"):  # fmt: skip
        assert said in str(told.value)
    with raises(hookmap.ModelError, "Set it on the module: module.config.FIELD = VALUE"):
        hookmap.open(plain_hooks.build("llama"), config={"rms_norm_eps": 0.5})


def test_fields_of_a_config_inside_a_config() -> None:
    config = transformers.Gemma3Config()
    made = with_fields(config, {"text_config.sliding_window": 7, "text_config": {"rms_norm_eps": 0.5}})
    assert (made.text_config.sliding_window, made.text_config.rms_norm_eps) == (7, 0.5)
    assert config.text_config.sliding_window != 7, "the config given stays as it was"


def test_fields_of_the_config_on_the_command_line_and_in_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved("llama", tmp_path / "model")
    asked = ["lens", str(folder), "--prompt", "to be", "--json", "--no-chat"]
    plain = CliRunner().invoke(main, asked)
    typed = CliRunner().invoke(main, [*asked, "--config", "rms_norm_eps=0.5"])
    (tmp_path / "hookmap.yaml").write_text("config: {rms_norm_eps: 0.5}\n")
    written = CliRunner().invoke(main, asked)
    (tmp_path / "hookmap.yaml").unlink()
    variable = CliRunner(env={"HOOKMAP_CONFIG": '{"rms_norm_eps": 0.5}'}).invoke(main, asked)
    assert plain.exit_code == typed.exit_code == written.exit_code == variable.exit_code == 0, typed.output
    assert plain.stdout != typed.stdout == written.stdout == variable.stdout
    wrong = CliRunner().invoke(main, [*asked, "--config", "rms_norm_eps"])
    assert wrong.exit_code == 2 and "expected FIELD=VALUE" in wrong.output


def test_the_model_s_own_stop_strings_end_a_row_as_transformers_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = demo().model, demo().tokenizer
    tokens = tokenizer(text := "Tom has 3 apples. He buys 4 more.", return_tensors="pt")["input_ids"]
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 12, "do_sample": False}
    free: Any = model.generate(tokens, **settings)[0].tolist()
    new = len(free) - tokens.shape[1]
    words = tokenizer.batch_decode([[token] for token in free[-new:]])
    lengths = []
    assert why_no_joins(demo()) is None, "requests join each other's batch"
    # A text that comes, one that begins in the prompt, and one that never comes.
    for strings in (["never", "".join(words[1:3])], [text[-1] + words[0]], ["never"]):
        monkeypatch.setattr(model.generation_config, "stop_strings", strings)
        expected: Any = model.generate(tokens, tokenizer=tokenizer, **settings)[0].tolist()
        run = demo().capture(tokens.tolist(), "resid_post", 1, max_new_tokens=12)
        assert run.tokens[0] == tuple(expected)
        assert run["resid_post", 1].shape[1] == len(expected) - 1
        likeliest = demo().capture(tokens.tolist(), (), max_new_tokens=12, do_sample=True, top_k=1, seed=0)
        assert likeliest.tokens == run.tokens
        lengths.append(len(expected) - tokens.shape[1])
        with serving(tmp_path / str(len(lengths))) as server:
            asked = {"prompt": tokens[0].tolist(), "max_tokens": 12}
            for ways in ({"temperature": 0}, {"top_k": 1, "seed": 0}, {"temperature": 0, "echo": True}):
                answer = server.post("/v1/completions", **asked, **ways).json()
                assert answer["usage"]["completion_tokens"] == lengths[-1]
    assert lengths == [3, 1, new]
    assert len(demo().capture(tokens.tolist(), (), max_new_tokens=12, stop=words[1]).tokens[0]) == tokens.shape[1] + 2
    for other, said in ((None, r"stop_strings=.* need a tokenizer"), (tiny_tokenizer(), r"transformers cannot look")):
        with pytest.raises(hookmap.CaptureError, match=said):
            hookmap.open(model, tokenizer=other).capture(tokens.tolist(), (), max_new_tokens=1)


def test_a_config_that_asks_for_the_routers_loss_reads_and_generates_padded_batches() -> None:
    model = plain_hooks.build("qwen3_moe", output_router_logits=True)
    plain = plain_hooks.build("qwen3_moe")
    ids = [IDS[0], [4, 8]]
    for new in (0, NEW):
        run, expected = (hookmap.open(x).capture(ids, "router_logits", 1, max_new_tokens=new) for x in (model, plain))
        assert run.tokens == expected.tokens
        for row in range(2):
            assert run.read(row, "router_logits", 1).equal(expected.read(row, "router_logits", 1))


class Bare(transformers.LlamaForCausalLM):
    """As in small code bases: no attention mask, and inputs prepared by hand."""

    def forward(self, input_ids: torch.Tensor, labels: Any = None, return_dict: Any = None) -> Any:
        return super().forward(input_ids, use_cache=False)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}


def test_a_model_without_attention_mask_and_with_its_own_preparation(tmp_path: Path) -> None:
    plain = plain_hooks.build("llama")
    model: Any = Bare(plain.config)
    model.load_state_dict(plain.state_dict())
    model.generation_config.pad_token_id = 0
    alone = [
        model.eval().generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False) for ids in (IDS[0], [4, 8])
    ]
    hm = hookmap.open(model, tokenizer=tiny_tokenizer())
    run = hm.capture([IDS[0], [4, 8]], "resid_post", 1, max_new_tokens=NEW)
    assert [list(tokens) for tokens in run.tokens] == [one[0].tolist() for one in alone]
    assert hm.generate([4, 8], [{"do": "ablate", "point": "mlp_out", "layers": 1}], max_new_tokens=1).tokens
    with serving(tmp_path, hm, points=("resid_post",), layers=(1,)) as server:
        answer = server.post("/v1/completions", prompt=[4, 8], max_tokens=NEW, temperature=0).json()
    assert answer["choices"][0]["text"] == tiny_tokenizer().decode(alone[1][0, 2:].tolist(), skip_special_tokens=True)


def test_a_model_of_state_space_layers_alone_is_read_without_a_cache() -> None:
    config = transformers.GraniteMoeHybridConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, shared_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["mamba", "mamba"], mamba_n_heads=4, mamba_d_head=16,
        mamba_d_state=8, mamba_chunk_size=8, num_local_experts=2, num_experts_per_tok=1,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.GraniteMoeHybridForCausalLM(config).eval()
    rows: list[torch.Tensor] = []
    hook = model.model.layers[1].register_forward_hook(lambda module, args, output: rows.append(output))
    with torch.no_grad():
        model(torch.tensor(IDS), use_cache=False)
    hook.remove()
    hm = hookmap.open(model)
    found = hm.capture(IDS, "resid_post", 1, max_new_tokens=0)["resid_post", 1]
    torch.testing.assert_close(found, rows[0][0] if isinstance(rows[0], tuple) else rows[0])
    with raises(hookmap.CaptureError, "use_cache=False generates without one"):
        hm.capture(IDS, "resid_post", 1, max_new_tokens=2)
    assert len(hm.capture(IDS, "resid_post", 1, max_new_tokens=2, use_cache=False).tokens[0]) == len(IDS[0]) + 2


def test_a_model_that_reads_several_rows_of_codes_is_refused_by_name() -> None:
    from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

    config = MusicgenDecoderConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4, num_codebooks=2
    )
    with raises(hookmap.ModelError, "MusicgenForCausalLM", "ModuleList"):
        hookmap.open(transformers.MusicgenForCausalLM(config))


# Half precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_loaded_in_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    run = same_as_plain_hooks(folder, name, dtype=dtype, device="cpu")
    assert run["resid_mid", 1].dtype == dtype
    by_name = hookmap.open(folder, dtype=str(dtype).removeprefix("torch."), device="cpu")
    assert next(by_name.model.parameters()).dtype == dtype
    assert not list(differences(plain_map(name), by_name.map))


# Tokenizers and files -------------------------------------------------------------------------------------------------


class Listed(transformers.PreTrainedTokenizer):
    """As SentencePiece's: an id that it does not have is an IndexError."""

    words = tuple(f"w{number}" for number in range(40))

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]


def test_an_embedding_that_is_larger_than_the_tokenizer() -> None:
    tokenizer = Listed()
    with pytest.raises(IndexError):
        tokenizer.decode([60])
    hm = hookmap.open(plain_hooks.build("llama"), tokenizer=tokenizer)
    ids = [5, 60, 15, 22]
    run = hm.capture([ids], "resid_post", 1, max_new_tokens=0, positions="text=5")
    assert run.samples[0].positions == (0, 2)
    assert hm.lens(ids, layers=[1]).tokens == ("w5", "", "w15", "w22")
    run = hm.capture([ids], "resid_post", 1, max_new_tokens=20, stop="w0 w0 w0")
    assert any(token >= 40 for token in run.tokens[0][4:]), "the model says something that the tokenizer has not"
    assert run.texts[0].split() == [f"w{token}" for token in run.tokens[0][4:] if token < 40]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4cac19f9\nsize 12345\n"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_git_lfs_pointer_of_a_model_is_named(name: str, tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    (folder / name).write_text(POINTER)
    with pytest.raises(hookmap.ModelError, match=rf"{name} is a Git LFS pointer, not the file.*git -C .* lfs pull"):
        hookmap.open(folder, device="cpu")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_git_lfs_pointer_of_a_tokenizer_is_named(name: str, tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    (folder / "tokenizer.model").write_text(POINTER)  # not read where there is a tokenizer.json
    hm = hookmap.open(folder, device="cpu")
    assert hm.capture("to be", "resid_post", 1, max_new_tokens=0)
    (folder / name).write_text(POINTER)
    with pytest.raises(hookmap.TokenizerError, match=rf"{name}.* Git LFS pointer.*lfs pull"):
        hookmap.open(folder, device="cpu").capture("to be", "resid_post", 1, max_new_tokens=0)


def test_other_git_lfs_pointers_are_named(tmp_path: Path) -> None:
    for name in ("map.json", "prompts.jsonl", "vector.safetensors"):
        (tmp_path / name).write_text(POINTER)
    with raises(hookmap.MapError, "map.json is a Git LFS pointer"):
        hookmap.load_map(tmp_path / "map.json")
    with raises(hookmap.DataError, "prompts.jsonl is a Git LFS pointer"):
        list(hookmap.load_prompts(tmp_path / "prompts.jsonl"))
    with raises(hookmap.StoreError, "vector.safetensors is a Git LFS pointer"):
        load_vector(tmp_path / "vector.safetensors")


def test_a_folder_that_holds_an_adapter_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with raises(hookmap.ModelError, "PEFT adapter", "AutoPeftModelForCausalLM"):
        hookmap.open(tmp_path)
