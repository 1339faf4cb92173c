"""Blocks that are no layers of the decoder (heads for later tokens), and points that no module exposes by itself."""

import json
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import plain_hooks
from support.invented import DEPTH, D, Ladder, Rung, check, note
from support.raises import raises
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import hookmap

# Multi-token prediction -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe"])
def test_weights_of_prediction_heads_in_a_checkpoint_are_no_layers(name: str, tmp_path: Path) -> None:
    """DeepSeek-V3 and GLM-4.5 publish theirs as layer n of n, Qwen3-Next as `mtp`; transformers builds neither."""
    plain_hooks.build(name).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    last = f"model.layers.{plain_hooks.LAYERS - 1}."
    extra = {k.replace(last, f"model.layers.{plain_hooks.LAYERS}."): v for k, v in weights.items() if last in k}
    extra |= {k.replace(last, "mtp.layers.0."): v for k, v in weights.items() if last in k}
    assert extra
    copies = {key: weight.clone() for key, weight in extra.items()}
    save_file({**weights, **copies}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    hm = hookmap.open(tmp_path, device="cpu")
    assert hm.map.num_layers == plain_hooks.LAYERS == hookmap.discover(tmp_path).num_layers
    bare = hookmap.open(plain_hooks.build(name)).capture([[5, 17, 3]], ["resid_post"], [-1], max_new_tokens=2)
    run = hm.capture([[5, 17, 3]], ["resid_post"], [-1], max_new_tokens=2)
    torch.testing.assert_close(run["resid_post", 2], bare["resid_post", 2])


class Silent(Rung):
    """A block like those of the stack, that is none of it: the tape knows nothing of it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.blend(self.calm(x))
        return y + self.think(self.cool(y))


class Foresight(nn.Module):
    """One head for a later token: the last states and the next embeddings, joined, through a block of its own."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.of_state, self.of_word = nn.LayerNorm(D), nn.LayerNorm(D)
        self.join, self.rung = nn.Linear(2 * D, D), Silent(i)

    def forward(self, state: Tensor, words: Tensor) -> Tensor:
        return self.rung(self.join(torch.cat([self.of_state(state), self.of_word(words)], -1)))


class Foreseeing(Ladder):
    """DeepSeek-V3's heads as a model that runs them: each on the states of the one before, sharing the output head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.ahead = nn.ModuleList(Foresight(i) for i in range(heads))

    def forward(self, tokens: Tensor) -> Any:
        words = self.lookup(tokens)
        note(None, embed=words)
        state = self.climb(words)
        logits, later = self.finish(state), []
        for head in self.ahead:
            state = head(state, words.roll(-1, 1))
            later.append(self.speak(state))
        return {"logits": logits, "later": later}


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("heads", [1, 2])
def test_heads_for_later_tokens_that_run_are_no_decoder_layers(heads: int) -> None:
    found = check(Foreseeing(heads))
    assert (found.layers_path, found.num_layers) == ("rungs.{i}", DEPTH)
    assert found.final_norm_path == "still" and found.model_points["logits"].terms[0].index == "logits"


# Points that no module exposes by itself ------------------------------------------------------------------------------


def by_source(model: nn.Module, block: str, name: str) -> Tensor:
    """The value of one line of a block's own code, as nnsight's `.source` gives it."""
    wrapped = nnsight.NNsight(model)
    with wrapped.trace(torch.tensor([[5, 17, 3, 60]])):
        value = getattr(wrapped.get(block).source, name).output.save()
    found: Tensor = value
    return found


@pytest.mark.parametrize(
    ("family", "block", "point", "line"),
    [
        # hidden_states = residual + hidden_states, which a reshape follows: a norm sees the sum with one axis for both.
        ("opt", "model.decoder.layers.1", "resid_mid", "hidden_states_2"),
        # hidden_states = residual + hidden_states * self.residual_multiplier: also the input of the second norm.
        ("granite", "model.layers.1", "resid_mid", "hidden_states_1"),
        # hidden_states = residual + hidden_states_attention + hidden_states_mlp
        ("cohere", "model.layers.1", "resid_post", "hidden_states_1"),
    ],
)
def test_a_selector_is_the_line_of_source_that_makes_the_point(family: str, block: str, point: str, line: str) -> None:
    """A map names boundaries alone: the names of lines follow the text of one version of transformers."""
    model = plain_hooks.build(family)
    hm = hookmap.open(model)
    run = hm.capture([[5, 17, 3, 60]], [point], [1], max_new_tokens=1)
    torch.testing.assert_close(run[point, 1], by_source(model, block, line).reshape(1, 4, -1), rtol=0, atol=0)
    (term,) = hm.map.selectors(point, 1)[0].terms
    assert term.flat == (family == "opt")


class _NoSecondNorm(LlamaDecoderLayer):
    """Its second norm is a function: the stream in the middle is handed to no module."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        read = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(hidden_states=read, **kwargs)[0]
        normed: Tensor = hidden_states * (hidden_states.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return hidden_states + self.mlp(normed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_middle_that_no_module_sees_is_the_sum_that_the_block_computes(dtype: torch.dtype) -> None:
    model: Any = plain_hooks.build("llama", dtype)
    for layer in model.model.layers:
        layer.__class__ = _NoSecondNorm
    hm = hookmap.open(model)
    assert [str(term) for term in hm.map.selectors("resid_mid", 1)[0].terms] == [
        "model.layers.1.input[0]", "model.layers.1.self_attn.output[0]",
    ]  # fmt: skip
    summed = plain_hooks.family_of(
        plain_hooks.FAMILIES["llama"].config, "model.layers.{i}",
        resid_mid=(plain_hooks.Place("", "input"), plain_hooks.Place("self_attn", "output")),
    )  # fmt: skip
    ragged = [[5, 17, 3, 60], [11, 2]]
    reference = plain_hooks.generate(model, summed, ragged, max_new_tokens=4, do_sample=False)
    for engine in ("hooks", "nnsight"):
        run = hm.capture(ragged, ["resid_mid"], max_new_tokens=4, engine=engine)
        for number, ids in enumerate(ragged):
            for at in range(plain_hooks.LAYERS):
                expected = reference.point(summed, "resid_mid", at)[number, 4 - len(ids) :]
                assert torch.equal(run.read(number, "resid_mid", at), expected)
    with raises(hookmap.InterventionError, "resid_mid", "no single tensor of the model holds it"):
        hm.generate(ragged, [{"do": "scale", "point": "resid_mid", "layers": 1, "factor": 2.0}], None, 2)
