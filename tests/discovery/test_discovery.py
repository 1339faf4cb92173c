"""Discovery finds every point of every family where a person who read the source would hook it."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from support import plain_hooks
from support.invented import read
from support.opened import EACH_FAMILY
from support.raises import raises
from torch import Tensor, nn
from torch.nn import functional as F

from hookmap.discovery.discover import discover
from hookmap.errors import DiscoveryError, ModelError
from hookmap.loading.configs import build
from hookmap.loading.modules import inputs
from hookmap.maps.document import ArchitectureMap
from hookmap.verification.verify import verify

# What the mixer and the MLP read, and the last norm, by hand; `plain_hooks` has the rest.
_IN = {
    "gpt2": ("ln_1", "ln_2", "transformer.ln_f", "transformer.wte"),
    "opt": ("self_attn_layer_norm", "final_layer_norm", "model.decoder.final_layer_norm", "model.decoder.embed_tokens"),
    "gpt_neox": ("input_layernorm", "post_attention_layernorm", "gpt_neox.final_layer_norm", "gpt_neox.embed_in"),
    "gptj": ("ln_1", "ln_1", "transformer.ln_f", "transformer.wte"),
    "falcon_7b": ("input_layernorm", "input_layernorm", "transformer.ln_f", "transformer.word_embeddings"),
    "falcon_40b": ("ln_attn", "ln_mlp", "transformer.ln_f", "transformer.word_embeddings"),
    "falcon_sequential": (
        "input_layernorm",
        "post_attention_layernorm",
        "transformer.ln_f",
        "transformer.word_embeddings",
    ),
    "phi": ("input_layernorm", "input_layernorm", "model.final_layernorm", "model.embed_tokens"),
    "bloom": ("input_layernorm", "post_attention_layernorm", "transformer.ln_f", "transformer.word_embeddings"),
    "mamba": ("norm", None, "backbone.norm_f", "backbone.embeddings"),
    "jamba": ("input_layernorm", "pre_ff_layernorm", "model.final_layernorm", "model.embed_tokens"),
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm", "model.norm", "model.embed_tokens"),
    "gemma3": ("input_layernorm", "pre_feedforward_layernorm", "model.norm", "model.embed_tokens"),
    "olmo2": (None, None, "model.norm", "model.embed_tokens"),  # its norms stand after the branches
    "cohere": ("input_layernorm", "input_layernorm", "model.norm", "model.embed_tokens"),
    "bert": (None, None, None, "bert.embeddings.word_embeddings"),  # the last block's own norm is the last one
}
_LLAMA_IN = ("input_layernorm", "post_attention_layernorm", "model.norm", "model.embed_tokens")
_PARALLEL = {"gpt_neox", "gptj", "falcon_7b", "falcon_40b", "phi", "cohere"}
_IDS = torch.tensor([[5, 17, 3, 44, 9, 60, 31, 8], [11, 2, 71, 6, 90, 4, 23, 50]])


def _hooked(model: nn.Module, places: dict[str, tuple[str, str]]) -> dict[str, torch.Tensor]:
    """One plain forward pass; name -> a copy of the tensor at (module, side)."""
    with plain_hooks.watching(model, places) as seen:
        logits = model(input_ids=_IDS, use_cache=False).logits
    return {name: tensors[-1] for name, tensors in seen.items()} | {"logits": logits}


def _selected(model: nn.Module, found: ArchitectureMap) -> dict[tuple[str, int | None], torch.Tensor]:
    """One plain forward pass; every selector of the map, resolved in a plain forward hook."""
    selectors = found.selectors()
    parts = read(model, selectors, _IDS, use_cache=False)
    return {
        (s.point, s.layer): sum(parts[s, n] * t.scale for n, t in enumerate(s.terms))  # type: ignore[misc]
        for s in selectors
    }


def _by_hand(name: str) -> dict[tuple[str, int], list[plain_hooks.Place]]:
    family = plain_hooks.FAMILIES[name]
    places: dict[tuple[str, int], list[plain_hooks.Place]] = {}
    mixer_in, mlp_in, _, _ = _IN.get(name, _LLAMA_IN)
    for layer in range(plain_hooks.LAYERS):
        for point, parts in family.points.items():
            if layer in family.only_layers.get(point, range(plain_hooks.LAYERS)):
                places[point, layer] = list(parts)
        for point, norm in (("mixer_in", mixer_in), ("mlp_in", mlp_in)):
            if norm is not None:
                places[point, layer] = [plain_hooks.Place(f"{family.block}.{norm}", "output")]
    return places


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_every_point_is_where_a_person_would_hook_it(name: str) -> None:
    model = plain_hooks.build(name)
    found = discover(model)
    selected = _selected(model, found)
    by_hand = _by_hand(name)
    _, _, final_norm, embedding = _IN.get(name, _LLAMA_IN)
    places = {
        f"{p.module}|{p.side}|{i}": (p.module.replace("{i}", str(i)), p.side)
        for (_, i), ps in by_hand.items()
        for p in ps
    }
    ends = {"embed": (embedding, "output")}
    if final_norm is not None:
        ends["final_norm"] = (final_norm, "output")
    hooked = _hooked(model, {**places, **ends})
    for (point, layer), parts in by_hand.items():
        expected = sum(hooked[f"{p.module}|{p.side}|{layer}"] * p.scale for p in parts)
        assert torch.equal(selected[point, layer].reshape(expected.shape), expected), (point, layer)  # type: ignore[union-attr]
    for point in (*ends, "logits"):
        assert torch.equal(selected[point, None], hooked[point]), point


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_the_map_without_weights_is_the_map_with_them(name: str) -> None:
    """The meta pass of the config and the pass of the loaded model read the same structure."""
    model = plain_hooks.build(name)
    of_config, of_module = discover(model.config), discover(model)
    assert of_config.discovered_by != of_module.discovered_by
    assert of_config.kinds == of_module.kinds
    assert of_config.model_points == of_module.model_points


@pytest.mark.parametrize("name", sorted(_PARALLEL))
def test_a_parallel_block_has_no_middle_and_says_why(name: str) -> None:
    found = discover(plain_hooks.FAMILIES[name].config())
    assert found.unavailable("resid_mid", 0) == "attention and MLP run in parallel"
    assert found.kinds[0].branch_order == "parallel"
    assert found.pre_mlp_path is None


def test_a_mixer_only_block_has_no_mlp_and_no_attention() -> None:
    found = discover(plain_hooks.FAMILIES["mamba"].config())
    assert found.unavailable("resid_mid", 1) == "this block has no MLP"
    assert "not attention" in (found.unavailable("attn_out", 1) or "")
    assert found.kinds[0].mixer is not None and found.kinds[0].mixer.type == "recurrent"


def test_a_hybrid_has_a_kind_for_each_kind_of_block() -> None:
    found = discover(plain_hooks.FAMILIES["jamba"].config())
    by_name = {kind.name: kind for kind in found.kinds}
    assert {name: kind.layers for name, kind in by_name.items()} == {
        "recurrent+dense": (0, 2),
        "attention+moe": (1,),
    }
    moe = by_name["attention+moe"].mlp
    assert moe is not None and (moe.experts, moe.experts_per_token) == (4, 2)


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("llama", "pre"),
        ("gemma2", "sandwich"),
        ("olmo2", "post"),
        ("gpt2", "pre"),
        ("mamba", "pre"),
        ("cohere", "pre"),
        ("bert", "post"),
    ],
)
def test_the_placement_of_norms_is_read(name: str, placement: str) -> None:
    assert {kind.norm_placement for kind in discover(plain_hooks.FAMILIES[name].config()).kinds} == {placement}


def test_a_post_norm_block_keeps_the_sum_apart_from_the_middle() -> None:
    config = tf.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, is_decoder=True
    )
    kind = discover(config).kinds[0]
    assert tuple(r for r in kind.relations if r.startswith("resid_")) == (
        "resid_mid_sum = resid_pre + mixer_out",
        "resid_mid = norm(resid_mid_sum)",
        "resid_post = norm(resid_mid + mlp_out)",
    )
    (term,) = kind.points["resid_mid_sum"].terms
    assert (term.module, term.side) == ("bert.encoder.layer.{i}.attention.output.LayerNorm", "input")


def test_the_old_keys_are_what_they_were() -> None:
    found = json.loads(discover(plain_hooks.FAMILIES["qwen3_moe"].config()).to_json())
    assert found["architecture"] == "Qwen3MoeForCausalLM"
    assert found["layer_access_pattern"] == "model.layers[i]"
    assert found["pre_attention_path"] == "model.layers.{i}.input_layernorm"
    assert found["pre_mlp_path"] == "model.layers.{i}.post_attention_layernorm"


@pytest.mark.slow
def test_671_billion_parameters_need_no_weights() -> None:
    """DeepSeek-V3 at its published size; 1.3 TB of weights that are never allocated."""
    found = discover(tf.DeepseekV3Config())
    assert (found.num_layers, found.d_model) == (61, 7168)
    assert [kind.layers for kind in found.kinds] == [(0, 1, 2), tuple(range(3, 61))]
    moe = found.kinds[1].mlp
    assert moe is not None and (moe.experts, moe.experts_per_token) == (256, 8)


@pytest.mark.slow
def test_every_source_gives_the_same_map(tmp_path: Path) -> None:
    from nnsight import TransformersModel
    from support.tiny_tokenizer import tiny_tokenizer

    model = plain_hooks.build("qwen3")
    model.save_pretrained(tmp_path)
    expected = discover(model.config).kinds
    wrapped = TransformersModel(model, tokenizer=tiny_tokenizer())
    for source in (tmp_path, str(tmp_path), model, wrapped):
        assert discover(source).kinds == expected, source


def test_a_loaded_model_is_left_as_it_was() -> None:
    model = plain_hooks.build("gemma2")
    model.train()
    model.config._attn_implementation = "sdpa"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    discover(model)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("experts", ("eager", "batched_mm", "deepgemm", "sonicmoe"))
def test_experts_that_a_library_computes_are_read_as_pytorch_computes_them(experts: str) -> None:
    """Neither library is here: transformers' own forward raises with them."""
    model = plain_hooks.build("mixtral")
    expected = discover(model)
    try:
        model.set_experts_implementation(experts)
    except ValueError as error:
        pytest.skip(f"this transformers has no such experts: {error}")
    assert discover(model).kinds == expected.kinds
    assert verify(model, architecture_map=expected).passed
    assert model.config._experts_implementation == experts


class Canvas(nn.Module):
    """Refines a canvas of 29 tokens of its own, which looks at the blocks of the ids (as DiffusionGemma does)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(97, 16)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(3))
        self.canvas = nn.Parameter(torch.randn(1, 29, 16))
        self.look = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.canvas + self.look(self.canvas, x, x)[0], self.words.weight)


def test_logits_of_other_positions_are_refused() -> None:
    with raises(DiscoveryError, "its logits, [1, 29, 97], are of other positions"):
        discover(Canvas())


def test_a_module_that_is_no_language_model_is_refused() -> None:
    with raises(DiscoveryError, "did not run"):
        discover(nn.Linear(3, 3))
    with raises(DiscoveryError, "expected a hub id"):
        discover(42)


def test_an_unknown_model_says_what_was_tried(tmp_path: Path) -> None:
    with raises(ModelError, "expected a config.json"):
        discover(tmp_path)
    with raises(ModelError, "nobody/nothing"):
        discover("nobody/nothing")


class _Odd(nn.Module):
    """Unfamiliar names, keyword inputs, a dictionary out; a middle that no module reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blend, self.think = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, *, flux: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = torch.softmax(flux @ flux.transpose(1, 2), -1)
        flux = flux + self.blend(weights @ flux) * 0.5
        return {"flux": flux + self.think(torch.tanh(flux))}


class _OddModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lookup = nn.Embedding(50, 24)
        self.rungs = nn.ModuleList(_Odd(24) for _ in range(3))
        self.speak = nn.Linear(24, 50)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> tuple[torch.Tensor]:
        flux = self.lookup(input_ids)
        for rung in self.rungs:
            flux = rung(flux=flux)["flux"]
        return (self.speak(flux),)


def test_an_invented_architecture_simply_works() -> None:
    torch.manual_seed(0)
    model = _OddModel().eval()
    found = discover(model)
    assert found.layers_path == "rungs.{i}"
    (mixer_out,) = found.selectors("mixer_out", 1)
    assert (mixer_out.module, mixer_out.scale) == ("rungs.1.blend", 0.5)
    (middle,) = found.selectors("resid_mid", 1)
    assert [str(t) for t in middle.terms] == ["rungs.1.input['flux']", "0.5 * rungs.1.blend.output"] or (
        middle.module == "rungs.1.think"
    )
    assert found.unavailable("final_norm") is not None


def test_an_in_place_write_makes_a_new_value() -> None:
    """Falcon adds the attention's output into the MLP's output in place: the two must not be one value."""
    model = build(plain_hooks.FAMILIES["falcon_7b"].config())
    from hookmap.discovery.dataflow import record
    from hookmap.discovery.values import Values

    flow = record(model, inputs("meta", 7))
    values = Values(flow)
    call = next(c for c in flow.calls if c.path == "transformer.h.0.mlp")
    block = next(c for c in flow.calls if c.path == "transformer.h.0")
    mlp_out = values.value(next(iter(call.outputs.values())))
    readers = [op.name for op in values.consumers[mlp_out] if call.exit < op.time < block.exit]
    assert readers[0] == "add" and readers.count("add") == 1
