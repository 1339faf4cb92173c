"""expert_post, expert_out and shared_expert_out: held against arithmetic expert by expert."""

from functools import cache
from typing import Any

import pytest
import torch
from support import experts_by_hand
from support.opened import RAGGED
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.errors import CaptureError, InterventionError
from hookmap.maps.parsing import parse
from hookmap.model import HookedModel
from hookmap.verification.verify import verify

POINTS = ["router_indices", "expert_post", "expert_out"]
FUSED = ["qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "gpt_oss"]
IMPLEMENTATIONS = ["grouped_mm", "eager", "batched_mm"]


@cache
def opened(name: str) -> HookedModel:
    return hookmap.open(experts_by_hand.build(name), tokenizer=tiny_tokenizer())


def experts_of(hm: HookedModel, layer: int) -> Any:
    return hm.model.get_submodule(f"model.layers.{layer}.mlp.experts")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FUSED)
def test_they_are_what_each_chosen_expert_computes_while_generating(name: str, implementation: str) -> None:
    hm = opened(name)
    hm.model.set_experts_implementation(implementation)
    hm.capture(RAGGED, ["mlp_out"], [1], max_new_tokens=1)  # how pads are seen is tried before the first batch
    with experts_by_hand.watched(experts_of(hm, 1)) as seen:
        run = hm.capture(RAGGED, POINTS, [1], max_new_tokens=4)
    longest = max(map(len, RAGGED))
    for row, prompt in enumerate(RAGGED):
        x, chosen = ([each[n].unflatten(0, (len(RAGGED), -1))[row] for each in seen] for n in (0, 1))
        post, out = experts_by_hand.rows(experts_of(hm, 1), torch.cat(x), torch.cat(chosen))
        pads = longest - len(prompt)
        assert torch.equal(run.read(row, "router_indices", 1), torch.cat(chosen)[pads:])
        torch.testing.assert_close(run.read(row, "expert_post", 1), post[pads:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run.read(row, "expert_out", 1), out[pads:], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
def test_weighted_and_summed_they_are_what_the_mlp_gives(name: str) -> None:
    hm = opened(name)
    run = hm.capture(RAGGED, [p for p in hm.map.points if "expert" in p or "router" in p or p == "mlp_out_raw"], [1])
    for row in range(len(RAGGED)):
        total = (run.read(row, "expert_out", 1) * run.read(row, "router_weights", 1)[..., None]).sum(1)
        if name in ("qwen2_moe", "deepseek_v3"):
            total = total + run.read(row, "shared_expert_out", 1)
        torch.testing.assert_close(total, run.read(row, "mlp_out_raw", 1), rtol=1e-4, atol=1e-5)
    has_shared = hm.map.unavailable("shared_expert_out", 1) is None
    assert has_shared == (name in ("qwen2_moe", "deepseek_v3"))


def test_the_shared_expert_is_seen_behind_its_gate() -> None:
    hm = opened("qwen2_moe")
    mlp: Any = hm.model.get_submodule("model.layers.1.mlp")
    run = hm.capture(RAGGED, ["mlp_in", "shared_expert_out"], [1], max_new_tokens=2)
    for row in range(len(RAGGED)):
        x = run.read(row, "mlp_in", 1)
        with torch.no_grad():
            expected = torch.sigmoid(mlp.shared_expert_gate(x)) * mlp.shared_expert(x)
        torch.testing.assert_close(run.read(row, "shared_expert_out", 1), expected, rtol=1e-4, atol=1e-5)


def test_experts_that_all_tokens_go_through_are_told_apart() -> None:
    """Llama 4 gives every token to every expert, times 0 where the router did not choose it."""
    hm = opened("llama4")
    if (reason := hm.map.unavailable("expert_post", 1)) is not None:
        pytest.skip(reason)
    run = hm.capture(RAGGED, [*POINTS, "mlp_in", "router_logits"], [1], max_new_tokens=2)
    experts: Any = hm.model.get_submodule("model.layers.1.feed_forward.experts")
    for row in range(len(RAGGED)):
        x, chosen = run.read(row, "mlp_in", 1), run.read(row, "router_indices", 1)
        scores = torch.sigmoid(run.read(row, "router_logits", 1).gather(-1, chosen))
        both = torch.einsum("tkd,tkdf->tkf", x[:, None] * scores[..., None], experts.gate_up_proj[chosen])
        gate, up = both.chunk(2, -1)
        post = up * torch.nn.functional.silu(gate)
        torch.testing.assert_close(run.read(row, "expert_post", 1), post.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_experts_in_a_module_of_their_own_some_without_a_token_are_found() -> None:
    """JetMoE sorts its tokens in one module, and multiplies them in another, also those of experts that have none."""
    hm = opened("jetmoe")
    run = hm.capture(RAGGED, [*POINTS, "mlp_in"], [1], max_new_tokens=3)
    own: Any = hm.model.get_submodule("model.layers.1.mlp")
    for row in range(len(RAGGED)):
        x, chosen = run.read(row, "mlp_in", 1), run.read(row, "router_indices", 1)
        gate, up = torch.einsum("td,tkfd->tkf", x, own.input_linear.weight[chosen]).chunk(2, -1)
        post = own.activation(gate) * up
        out = torch.einsum("tkf,tkdf->tkd", post, own.output_linear.weight[chosen])
        torch.testing.assert_close(run.read(row, "expert_post", 1), post.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run.read(row, "expert_out", 1), out.detach(), rtol=1e-4, atol=1e-5)


def test_nothing_else_of_the_run_changes() -> None:
    hm = opened("qwen3_moe")
    hm.model.set_experts_implementation("grouped_mm")
    plain = hm.capture(RAGGED, ["resid_post"], [1], max_new_tokens=4)
    beside = hm.capture(RAGGED, ["resid_post", *POINTS], [1], max_new_tokens=4)
    assert plain.texts == beside.texts
    for row in range(len(RAGGED)):
        assert torch.equal(plain.read(row, "resid_post", 1), beside.read(row, "resid_post", 1))


@pytest.mark.slow
def test_nnsights_engine_shows_the_same() -> None:
    model = experts_by_hand.build("deepseek_v3")
    hm = hookmap.open(model, tokenizer=tiny_tokenizer())
    runs = [
        hm.capture(RAGGED, [*POINTS, "attn_result", "k_latent"], [1], max_new_tokens=3, engine=engine)
        for engine in ("hooks", "nnsight")
    ]
    for key in runs[0].keys:
        for row in range(len(RAGGED)):
            assert torch.equal(runs[0].read(row, *key), runs[1].read(row, *key))


def test_a_store_keeps_them(tmp_path: Any) -> None:
    hm = opened("qwen3_moe")
    hm.capture(RAGGED, ["expert_post"], [1], max_new_tokens=2, store=tmp_path / "run")
    store, run = hookmap.open_store(tmp_path / "run"), hm.capture(RAGGED, ["expert_post"], [1], max_new_tokens=2)
    for row in range(len(RAGGED)):
        assert torch.equal(store.read(row, "expert_post", 1), run.read(row, "expert_post", 1))


def test_experts_that_a_kernel_computes_are_refused_with_what_to_ask_for() -> None:
    """A product that is none of PyTorch's stands where the experts' weights are used."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def kernel(self: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    ALL_EXPERTS_FUNCTIONS.register("a_kernel", kernel)
    hm = hookmap.open(experts_by_hand.build("qwen3_moe"), tokenizer=tiny_tokenizer())
    hm.model.config._experts_implementation = "a_kernel"
    with pytest.raises(CaptureError, match='experts_implementation="grouped_mm"'):
        hm.capture(RAGGED, ["expert_out"], [1], max_new_tokens=1)


def test_they_are_not_written() -> None:
    edits = [{"do": "ablate", "point": "expert_out", "layers": [1]}]
    with pytest.raises(InterventionError, match="write router_weights"):
        opened("qwen3_moe").capture(RAGGED, ["resid_post"], [1], max_new_tokens=1, interventions=edits)


def test_the_document_is_read_back_and_a_term_says_where_it_is() -> None:
    found = opened("deepseek_v3").map
    assert parse(found.to_document()) == found
    post, out, result = (found.selectors(name, [1])[0] for name in ("expert_post", "expert_out", "attn_result"))
    assert str(post) == "expert_post[1] = model.layers.1.mlp.experts.down_proj.input"
    assert str(out) == "expert_out[1] = model.layers.1.mlp.experts.down_proj.output"
    assert str(result) == "attn_result[1] = model.layers.1.self_attn.o_proj.input[0] @ weight.T"


@pytest.mark.slow
def test_experts_whose_weights_no_module_shows_are_proved() -> None:
    checks = verify(experts_by_hand.build("jetmoe")).checks
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    assert sum(check.name == "experts" for check in checks) == 4
