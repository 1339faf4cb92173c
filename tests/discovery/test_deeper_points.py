"""q, k, v, z, pattern, mlp_post and the router: found by dataflow, held against slices cut by hand and the weights."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from support import plain_hooks
from support.invented import read
from support.opened import RAGGED
from support.raises import raises
from torch import nn

import hookmap
from hookmap.discovery.head_layout import Labels
from hookmap.loading.modules import eager
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import parse
from hookmap.maps.points import POINTS
from hookmap.verification.verify import redraw, verify

pytestmark = pytest.mark.slow

HEADS, D_HEAD = 4, 8
_IDS = torch.tensor([[5, 17, 3, 44, 9, 60, 31, 8, 12], [11, 2, 71, 6, 90, 4, 23, 50, 7]])
_TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}

Cut = Callable[[torch.Tensor], torch.Tensor]


def _split(heads: int, size: int = D_HEAD) -> Cut:
    return lambda t: t.unflatten(-1, (heads, size))


def _llama_like(kv_heads: int, path: str = "self_attn", out: str = "o_proj") -> dict[str, tuple[str, Cut]]:
    return {
        "q": (f"{path}.q_proj", _split(HEADS)),
        "k": (f"{path}.k_proj", _split(kv_heads)),
        "v": (f"{path}.v_proj", _split(kv_heads)),
    }


def _part(part: int, path: str) -> tuple[str, Cut]:
    """[heads, 3, d_head]: GPT-NeoX and BLOOM keep a head's q, k and v together."""
    return path, lambda t: t.unflatten(-1, (HEADS, 3, D_HEAD))[..., part, :]


def _third(part: int) -> tuple[str, Cut]:
    """[q | k | v]: GPT-2 keeps all queries together."""
    return "attn.c_attn", lambda t: t.split(32, -1)[part].unflatten(-1, (HEADS, D_HEAD))


def _grouped(first: int, last: int) -> tuple[str, Cut]:
    """Falcon 40B: two groups of two queries, a key and a value."""
    return "self_attention.query_key_value", lambda t: t.unflatten(-1, (2, 4, D_HEAD))[..., first:last, :].flatten(2, 3)


# Where a person who read the source would cut: (module, cut of its output). By hand, nothing of hookmap.
BY_HAND: dict[str, dict[str, tuple[str, Cut]]] = {
    "gpt2": {"q": _third(0), "k": _third(1), "v": _third(2)},
    "gpt_neox": {n: _part(i, "attention.query_key_value") for i, n in enumerate("qkv")},
    "bloom": {n: _part(i, "self_attention.query_key_value") for i, n in enumerate("qkv")},
    "falcon_sequential": {n: _part(i, "self_attention.query_key_value") for i, n in enumerate("qkv")},
    "falcon_7b": {
        "q": ("self_attention.query_key_value", lambda t: t.unflatten(-1, (6, D_HEAD))[..., :4, :]),
        "k": ("self_attention.query_key_value", lambda t: t.unflatten(-1, (6, D_HEAD))[..., 4:5, :]),
        "v": ("self_attention.query_key_value", lambda t: t.unflatten(-1, (6, D_HEAD))[..., 5:, :]),
    },
    "falcon_40b": {"q": _grouped(0, 2), "k": _grouped(2, 3), "v": _grouped(3, 4)},
    "llama": _llama_like(2),
    "qwen3": _llama_like(2),
    "mistral": _llama_like(2),
    "gemma2": _llama_like(2),
    "olmo2": _llama_like(2),
    "cohere": _llama_like(2),
    "mixtral": _llama_like(2),
    "qwen3_moe": _llama_like(2),
    "phi": _llama_like(4),
    "opt": _llama_like(4),
    "gptj": _llama_like(4, "attn"),
    "bert": {n: (f"attention.self.{m}", _split(HEADS)) for n, m in zip("qkv", ("query", "key", "value"), strict=True)},
    "deepseek_v3": {
        "q": ("self_attn.q_b_proj", _split(HEADS, 12)),
        # The compressed keys and values carry an axis of one beside the batch's.
        "v": ("self_attn.kv_b_proj", lambda t: t.flatten(0, -3).unflatten(-1, (HEADS, 16))[..., 8:]),
    },
}
OUT = {
    "gpt2": "attn.c_proj", "gpt_neox": "attention.dense", "bloom": "self_attention.dense", "phi": "self_attn.dense",
    "falcon_sequential": "self_attention.dense", "falcon_7b": "self_attention.dense", "gptj": "attn.out_proj",
    "falcon_40b": "self_attention.dense", "opt": "self_attn.out_proj", "bert": "attention.output.dense",
}  # fmt: skip
DOWN = {
    "gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "bloom": "mlp.dense_4h_to_h", "phi": "mlp.fc2",
    "falcon_sequential": "mlp.dense_4h_to_h", "falcon_7b": "mlp.dense_4h_to_h", "gptj": "mlp.fc_out",
    "falcon_40b": "mlp.dense_4h_to_h", "opt": "fc2", "bert": "output.dense",
}  # fmt: skip
ROUTED = {"mixtral": ("mlp", 0), "qwen3_moe": ("mlp", 0), "deepseek_v3": ("mlp", 1), "jamba": ("feed_forward", 1)}


@cache
def _opened(name: str) -> tuple[nn.Module, ArchitectureMap]:
    model = plain_hooks.build(name)
    return model, hookmap.discover(model)


def _block(name: str, layer: int) -> str:
    return plain_hooks.FAMILIES[name].block.replace("{i}", str(layer)) + "."


def _run(name: str, points: list[str], modules: list[str], layer: int) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """One eager pass: points by selectors, and inputs and outputs of modules by plain hooks."""
    model, found = _opened(name)
    selected: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    handles = []
    for selector in found.selectors(points, layer):

        def take(_: Any, args: Any, kwargs: Any, output: Any, selector: Any = selector) -> None:
            tensor = selector.resolve(args, kwargs, output).clone()
            flat = selector.terms[0].flat
            selected[selector.point] = tensor.unflatten(0, (2, -1)) if flat else tensor

        handles.append(model.get_submodule(selector.module).register_forward_hook(take, with_kwargs=True))
    for path in modules:

        def look(_: Any, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            # Falcon writes to it in place later.
            plain[path] = (args, kwargs, output.clone() if isinstance(output, torch.Tensor) else output)

        handles.append(model.get_submodule(_block(name, layer) + path).register_forward_hook(look, with_kwargs=True))
    with torch.no_grad(), eager(model):
        output = model(input_ids=_IDS, attention_mask=torch.ones_like(_IDS), use_cache=False, output_attentions=True)
    for handle in handles:
        handle.remove()
    return selected, plain, output


def _product(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x through the module's weights, by hand. transformers' Conv1D keeps them the other way round."""
    weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T  # type: ignore[union-attr,operator]
    with torch.no_grad():
        product = x.flatten(2) @ weight
        return product if module.bias is None else product + module.bias  # type: ignore[no-any-return]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", BY_HAND)
def test_q_k_and_v_are_the_slices_that_a_person_would_cut(name: str, layer: int) -> None:
    cuts = BY_HAND[name]
    selected, plain, _ = _run(name, list(cuts), sorted({path for path, _ in cuts.values()}), layer)
    for point, (path, cut) in cuts.items():
        expected = cut(plain[path][2])
        assert selected[point].shape == expected.shape and expected.dim() == 4, point
        assert torch.equal(selected[point], expected), point


@pytest.mark.parametrize("name", [*BY_HAND])
def test_z_through_the_output_projections_weights_is_the_mixers_output(name: str) -> None:
    path = OUT.get(name, "self_attn.o_proj")
    selected, plain, _ = _run(name, ["z"], [path], 1)
    assert selected["z"].shape[2] == HEADS
    expected = plain[path][2]
    torch.testing.assert_close(
        _product(_opened(name)[0].get_submodule(_block(name, 1) + path), selected["z"]), expected, **_TOLERANCE
    )


@pytest.mark.parametrize("name", [*BY_HAND])
def test_pattern_is_hugging_faces_attentions_and_its_rows_sum_to_one(name: str) -> None:
    selected, _, output = _run(name, ["pattern"], [], 1)
    assert selected["pattern"].shape == (2, HEADS, 9, 9)
    assert torch.equal(selected["pattern"], output.attentions[1])
    torch.testing.assert_close(selected["pattern"].sum(-1), torch.ones(2, HEADS, 9), **_TOLERANCE)


@pytest.mark.parametrize("name", [*BY_HAND])
def test_the_pattern_mixes_v_into_z(name: str) -> None:
    selected, _, _ = _run(name, ["pattern", "v", "z"], [], 1)
    v = selected["v"].movedim(2, 1)
    mixed = selected["pattern"] @ v.repeat_interleave(HEADS // v.shape[1], 1)
    torch.testing.assert_close(mixed.movedim(1, 2), selected["z"], **_TOLERANCE)


@pytest.mark.parametrize("name", [name for name in BY_HAND if name not in ROUTED])
def test_mlp_post_through_the_down_projections_weights_is_the_mlps_output(name: str) -> None:
    path = DOWN.get(name, "mlp.down_proj")
    selected, plain, _ = _run(name, ["mlp_post"], [path], 1)
    assert selected["mlp_post"].shape[:2] == (2, 9)
    module = _opened(name)[0].get_submodule(_block(name, 1) + path)
    expected = plain[path][2].reshape(2, 9, -1)
    torch.testing.assert_close(_product(module, selected["mlp_post"]), expected, **_TOLERANCE)


@pytest.mark.parametrize("name", ROUTED)
def test_the_router_points_are_what_the_experts_are_called_with(name: str) -> None:
    mlp, layer = ROUTED[name]
    points = ["router_logits", "router_indices", "router_weights"]
    selected, plain, _ = _run(name, points, [f"{mlp}.experts"], layer)
    args, kwargs, _ = plain[f"{mlp}.experts"]
    _, indices, weights = (*args, *kwargs.values())
    assert torch.equal(selected["router_indices"].flatten(0, 1), indices)
    assert torch.equal(selected["router_weights"].flatten(0, 1), weights)
    assert selected["router_logits"].shape == (2, 9, 8 if name == "deepseek_v3" else 4)
    kind = _opened(name)[1].kind_of(layer)
    top = selected["router_logits"].topk(2, -1).indices
    same = torch.equal(top.sort(-1).values, selected["router_indices"].sort(-1).values)
    # DeepSeek chooses groups of experts first: the map does not promise what does not hold.
    assert same == ("router_indices = topk(router_logits)" in kind.relations) == (name != "deepseek_v3")


@pytest.mark.parametrize(
    ("name", "layer", "point", "reason"),
    [
        ("mamba", 0, "q", "not attention"),
        ("mamba", 0, "pattern", "not attention"),
        ("mamba", 0, "mlp_post", "no MLP"),
        ("jamba", 0, "z", "not attention"),
        ("jamba", 0, "router_logits", "no mixture of experts"),
        ("jamba", 1, "mlp_post", "mixture of experts"),
        ("llama", 0, "router_weights", "no mixture of experts"),
        ("deepseek_v3", 0, "k", "several projections make it together: kv_a_proj_with_mqa, kv_b_proj"),
    ],
)
def test_what_a_block_lacks_has_a_reason(name: str, layer: int, point: str, reason: str) -> None:
    assert reason in str(_opened(name)[1].unavailable(point, layer))


@pytest.mark.parametrize("name", [*BY_HAND, "jamba", "mamba"])
def test_verification_proves_them(name: str) -> None:
    model = plain_hooks.build(name)
    redraw(model)
    result = verify(model)
    assert result.passed, [check for check in result.checks if not check.passed]
    if name != "mamba":
        checks = {check.name for check in result.checks}
        assert {"inside", "pattern", "attentions", "head"} <= checks


@pytest.mark.parametrize(
    ("name", "point", "heads"),
    [
        ("gpt2", "q", {"groups": 1, "start": 32, "stop": 64, "d_head": 8}),  # the keys
        ("gpt2", "q", {"groups": 4, "start": 0, "stop": 8, "d_head": 8}),  # GPT-NeoX's layout
        ("gpt_neox", "k", {"groups": 4, "start": 0, "stop": 8, "d_head": 8}),  # the queries
        ("gpt_neox", "v", {"groups": 1, "start": 64, "stop": 96, "d_head": 8}),  # GPT-2's layout
        ("llama", "q", {"groups": 1, "start": 0, "stop": 32, "d_head": 4}),
    ],
)
def test_a_wrong_layout_of_heads_fails(name: str, point: str, heads: dict[str, int]) -> None:
    model, found = _opened(name)
    document = found.model_dump()
    document["kinds"][0]["points"][point]["terms"][0]["heads"] = heads
    model = plain_hooks.build(name)
    redraw(model)
    result = verify(model, architecture_map=ArchitectureMap.model_validate(document))
    assert {"head", "inside"} & {check.name for check in result.checks if not check.passed}


def test_the_layout_is_four_numbers_of_data() -> None:
    found = _opened("falcon_40b")[1]
    (term,) = found.kinds[0].points["k"].terms
    assert term.heads is not None
    assert term.heads.model_dump() == {"groups": 2, "start": 16, "stop": 24, "d_head": 8}
    assert parse(found.to_json()) == found
    (plain,) = found.kinds[0].points["resid_pre"].terms
    assert plain.heads is None


def test_671_billion_parameters_are_read_without_weights() -> None:
    moe = hookmap.discover(tf.DeepseekV3Config()).kinds[1]
    (v,) = moe.points["v"].terms
    assert v.rows == "last", "its cache is of compressed keys and values, all expanded again for each token"
    assert v.heads is not None and (v.heads.groups, v.heads.start, v.heads.stop) == (128, 128, 256)
    assert {"q", "z", "pattern", "router_logits", "router_indices", "router_weights"} <= set(moe.points)


class _Braid(nn.Module):
    """Features of different heads lie in turn: no slice of the projection is a head's."""

    def __init__(self, braided: bool) -> None:
        super().__init__()
        self.blend, self.out, self.braided = nn.Linear(24, 72), nn.Linear(24, 24), braided

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.blend(x).chunk(3, -1)
        if self.braided:
            q, k, v = (p.unflatten(-1, (6, 4)).permute(0, 3, 1, 2) for p in parts)
        else:
            q, k, v = (p.unflatten(-1, (4, 6)).transpose(1, 2) for p in parts)
        weights = torch.softmax(q @ k.transpose(2, 3), -1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class _Rung(nn.Module):
    def __init__(self, braided: bool) -> None:
        super().__init__()
        self.mix, self.think = _Braid(braided), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(x)
        return x + self.think(x.tanh())


class _Ladder(nn.Module):
    def __init__(self, braided: bool) -> None:
        super().__init__()
        self.lookup, self.speak = nn.Embedding(50, 24), nn.Linear(24, 50)
        self.rungs = nn.ModuleList(_Rung(braided) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, use_cache: bool = False) -> Any:
        x = self.lookup(input_ids)
        for rung in self.rungs:
            x = rung(x)
        return (self.speak(x),)


def test_the_pieces_of_labels_keep_the_lowest_and_the_highest() -> None:
    labels = Labels(torch.arange(6), torch.arange(6) + 10)
    first, second = labels.map(lambda t: t.chunk(2))
    assert (first.low.tolist(), first.high.tolist()) == ([0, 1, 2], [10, 11, 12])
    assert (second.low.tolist(), second.high.tolist()) == ([3, 4, 5], [13, 14, 15])


def test_an_invented_fused_projection_is_read_and_a_braided_one_is_refused() -> None:
    straight, braided = (hookmap.discover(_Ladder(each)).kinds[0] for each in (False, True))
    (k,) = straight.points["k"].terms
    assert k.module == "rungs.{i}.mix.blend" and k.heads is not None
    assert (k.heads.groups, k.heads.start, k.heads.stop, k.heads.d_head) == (1, 24, 48, 6)
    assert "no even slices" in braided.unavailable["k"]
    (pattern,) = straight.points["pattern"].terms
    assert (pattern.module, pattern.operation) == ("rungs.{i}.mix", "_softmax"), "no module hands it over"


# Names ------------------------------------------------------------------------------------------------------------


def test_all_is_without_them_and_the_maps_points_are_with_them() -> None:
    found = _opened("llama")[1]
    deeper = {name for name, point in POINTS.items() if point.deeper}
    assert not deeper & {selector.point for selector in found.selectors("all")}
    assert {"q", "k", "v", "z", "pattern", "mlp_post"} <= {s.point for s in found.selectors(found.points)}


@pytest.mark.parametrize(
    ("alias", "point"),
    [
        ("blocks.1.attn.hook_q", "q"),
        ("blocks.1.attn.hook_k", "k"),
        ("blocks.1.attn.hook_v", "v"),
        ("blocks.1.attn.hook_z", "z"),
        ("blocks.1.attn.hook_pattern", "pattern"),
        ("blocks.1.mlp.hook_post", "mlp_post"),
    ],
)
def test_transformer_lens_names_are_understood(alias: str, point: str) -> None:
    (selector,) = _opened("llama")[1].selectors(alias)
    assert (selector.point, selector.layer) == (point, 1)


def test_nnterps_attention_probabilities_are_the_pattern() -> None:
    assert {s.point for s in _opened("llama")[1].selectors("attention_probabilities")} == {"pattern"}


# Capturing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gpt2", "qwen3", "falcon_40b", "falcon_sequential", "opt", "deepseek_v3", "qwen3_moe"]
)
def test_a_capture_of_them_is_what_one_pass_over_all_tokens_shows(name: str) -> None:
    """Padded, with a cache, token by token: the same numbers as one plain eager pass over each finished sequence.

    Of modules: what is inside one is in tests/capture/test_points_inside.py and tests/capture/test_expert_points.py.
    """
    model, found = _opened(name)
    deeper = [p for p, point in POINTS.items() if point.deeper and point.per_layer and p in found.kind_of(1).points]
    names = [p for p in deeper if not any(term.is_inside for term in found.selectors(p, 1)[0].terms)]
    run = hookmap.open(model).capture(RAGGED, names, [1], max_new_tokens=5)
    selectors = found.selectors(names, 1)
    for number, tokens in enumerate(run.tokens):
        fed = torch.tensor([tokens[:-1]])
        with eager(model):
            plain = read(model, selectors, fed, attention_mask=torch.ones_like(fed), use_cache=False)
        seen = {s.point: s.terms[0].arrange(tensor, 1, fed.shape[1])[0] for (s, _), tensor in plain.items()}
        if "attn_result" in seen:
            (term,) = found.selectors("attn_result", 1)[0].terms
            weight = model.get_parameter(str(term.parameter)).detach()
            rows = weight.T if str(term.through).endswith(".T") else weight
            z = seen["attn_result"]
            seen["attn_result"] = torch.einsum("phd,hdm->phm", z, rows.reshape(*z.shape[1:], -1))
        for point in names:
            got = run.read(number, point, 1)
            got = got[..., : len(got)] if point == "pattern" else got
            torch.testing.assert_close(got, seen[point], atol=1e-3, rtol=1e-3, msg=f"{point} of sample {number}")


def test_pattern_is_captured_from_a_model_that_was_loaded_with_a_faster_attention() -> None:
    model = plain_hooks.build("llama")
    assert model.config._attn_implementation == "sdpa"
    run = hookmap.open(model).capture([RAGGED[0]], ["pattern"], [1], max_new_tokens=4)
    assert model.config._attn_implementation == "sdpa"
    pattern = run["pattern", 1]
    assert isinstance(pattern, torch.Tensor) and pattern.shape == (1, HEADS, 9, 9)
    with torch.no_grad(), eager(model):
        whole = model(torch.tensor([run.tokens[0][:-1]]), output_attentions=True, use_cache=False)
    torch.testing.assert_close(pattern, whole.attentions[1], **_TOLERANCE)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(1, HEADS, 9), **_TOLERANCE)


def test_patterns_of_samples_of_different_length_have_no_pads() -> None:
    run = hookmap.open(_opened("qwen3")[0]).capture(RAGGED, ["pattern"], [0], max_new_tokens=3)
    patterns = run["pattern", 0]
    assert [p.shape for p in patterns] == [(HEADS, len(ids) + 2, len(ids) + 2) for ids in RAGGED]
    for pattern in patterns:
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:2]), **_TOLERANCE)
        assert not pattern.triu(1).any()


def test_a_sliding_window_keeps_each_key_at_its_position() -> None:
    """The cache drops the first keys: the row of a late query is shorter than the positions before it."""
    torch.manual_seed(0)
    config = tf.MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    run = hookmap.open(model).capture(RAGGED[:2], ["pattern"], [1], max_new_tokens=8)
    for number in range(2):
        tokens = torch.tensor([run.tokens[number][:-1]])
        with torch.no_grad(), eager(model):
            whole = model(tokens, output_attentions=True, use_cache=False).attentions[1][0]
        got = run.read(number, "pattern", 1)[..., : tokens.shape[1]].movedim(1, 0)
        torch.testing.assert_close(got, whole, **_TOLERANCE)
        assert not whole[:, -1, 0].any()  # out of the window


def test_a_selector_of_pattern_says_what_a_faster_attention_lacks() -> None:
    _, found = _opened("llama")
    (selector,) = found.selectors("pattern", 0)
    with raises(hookmap.CaptureError, 'attn_implementation="eager"'):
        selector.resolve((), {}, (torch.zeros(1, 2, 32), None))


def test_the_estimate_is_the_size() -> None:
    model, found = _opened("qwen3_moe")
    names = [p for p in found.points if POINTS[p].deeper]
    hm = hookmap.open(model)
    run = hm.capture([RAGGED[0]], names, [0, 2], max_new_tokens=4)
    tensors = [run.read(0, *key) for key in run.keys]
    assert hm.estimate([RAGGED[0]], names, [0, 2], max_new_tokens=4).bytes == sum(t.nbytes for t in tensors)


def test_they_go_to_a_folder_and_come_back(tmp_path: Any) -> None:
    hm = hookmap.open(_opened("mixtral")[0])
    points = ["q", "z", "pattern", "router_indices", "router_weights"]
    run = hm.capture(RAGGED, points, [1], max_new_tokens=3)
    hm.capture(RAGGED, points, [1], max_new_tokens=3, store=tmp_path / "run")
    store = hookmap.open_store(tmp_path / "run")
    for key in run.keys:
        for number in range(len(RAGGED)):
            assert torch.equal(store.read(number, *key), run.read(number, *key)), key
    assert store.read(0, "router_indices", 1).dtype == torch.int64


class _Capped(tf.LlamaForCausalLM):
    """Caps its logits in float32, as BEAM and xLSTM do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = 30 * torch.tanh(found.logits.float() / 30)
        return found


def test_raw_logits_are_found_before_a_cast_that_widens_them() -> None:
    config = tf.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = _Capped(config).to(torch.bfloat16).eval()
    raw: list[torch.Tensor] = []
    hm = hookmap.open(model)
    with model.lm_head.register_forward_hook(lambda _, args, output: raw.append(output)):
        run = hm.capture([_IDS[0].tolist()], ["logits_raw", "logits"], max_new_tokens=0)
    torch.testing.assert_close(run["logits_raw"], raw[0], atol=0, rtol=0)
    torch.testing.assert_close(run["logits"], 30 * torch.tanh(raw[0].float() / 30), atol=0, rtol=0)
