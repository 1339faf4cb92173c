"""Models whose layers run several times in one forward pass, and plain hooks that count the runs.

Nothing of hookmap is used here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from support.plain_hooks import FAMILIES, redrawn
from torch import nn

_SIZES = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


class Rounds(nn.ModuleList):
    """A list of layers that gives all of them, and then `again` of them `times` more."""

    def __init__(self, layers: nn.ModuleList, again: slice, times: int) -> None:
        super().__init__(layers)
        self.again, self.times = again, times

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        layers = list(self)[index]
        stop = self.again.stop or len(layers)
        return [*layers[:stop], *layers[self.again] * self.times, *layers[stop:]]


def rounds(again: slice, times: int) -> nn.Module:
    """Llama, with some layers that run again. It has no cache of each run: generate with use_cache=False."""
    torch.manual_seed(7)
    model = redrawn(tf.LlamaForCausalLM(FAMILIES["llama"].config()))
    model.model.layers = Rounds(model.model.layers, again, times)
    return model


def dory() -> nn.Module:
    """Two layers, then two that run twice with the input fed back, then one."""
    torch.manual_seed(7)
    return redrawn(
        tf.DoryForCausalLM(
            tf.DoryConfig(
                **_SIZES, **_ENDS, intermediate_size=48, num_key_value_heads=2, head_dim=8, num_hidden_layers=5,
                n_input_layers=2, n_recurrent_layers=2, n_output_layers=1, sliding_window=16,
            )
        )
    )  # fmt: skip


def inkling() -> nn.Module:
    """Layers 2 and 3 of six run three times, each round gated."""
    torch.manual_seed(7)
    return redrawn(
        tf.Inkling2LoopForCausalLM(
            tf.Inkling2LoopTextConfig(
                **_SIZES, **_ENDS, unpadded_vocab_size=97, num_key_value_heads=2, head_dim=8,
                swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=16, d_rel=4,
                rel_extent=32, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, num_hidden_layers=6,
                n_layers_per_attn_res_block=2, loop_layer_index_start=2, loop_layer_index_end=4, loop_gate_rank=4,
            )
        )
    )  # fmt: skip


def hrm() -> nn.Module:
    """Two stacks of two layers in cycles: the lower one's run six times, the upper one's twice."""
    torch.manual_seed(7)
    sizes = {"intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 16, "num_layers_per_stack": 2}
    return redrawn(tf.HrmTextForCausalLM(tf.HrmTextConfig(**_SIZES, **_ENDS, **sizes)))


@dataclass(frozen=True)
class Looped:
    """A model, the path of its layers, how often each runs, and what `{i}` is where that is no number."""

    build: Callable[[], nn.Module]
    path: str
    runs: tuple[int, ...]
    cache: bool = True
    names: tuple[str, ...] = ()

    def path_of(self, layer: int) -> str:
        return self.path.replace("{i}", self.names[layer] if self.names else str(layer))


_LLAMA = "model.layers.{i}"
_STACKS = ("L_module.layers.0", "L_module.layers.1", "H_module.layers.0", "H_module.layers.1")
LOOPED = {
    "whole": Looped(lambda: rounds(slice(None), 1), _LLAMA, (2, 2, 2), cache=False),
    "middle": Looped(lambda: rounds(slice(1, 2), 3), _LLAMA, (1, 4, 1), cache=False),
}
if hasattr(tf, "DoryConfig"):  # from 5.24 on
    LOOPED |= {
        "dory": Looped(dory, _LLAMA, (1, 1, 2, 2, 1)),
        "inkling2_loop": Looped(inkling, _LLAMA, (1, 1, 3, 3, 1, 1)),
        "hrm_text": Looped(
            hrm, "model.{i}", (6, 6, 2, 2), names=tuple(f"{stack}_module.layers.{i}" for stack in "LH" for i in (0, 1))
        ),
    }


class Seen:
    """What enters and leaves each layer: `passes[n][layer]` has a pair for each run in forward pass n."""

    def __init__(self, model: nn.Module, looped: Looped) -> None:
        self.passes: list[dict[int, list[list[torch.Tensor]]]] = []
        self._handles = [model.register_forward_pre_hook(lambda *_: self.passes.append({}))]
        for i in range(len(looped.runs)):
            layer = model.get_submodule(looped.path_of(i))
            self._handles += [
                layer.register_forward_pre_hook(self._enters(i), with_kwargs=True),
                layer.register_forward_hook(self._leaves(i)),
            ]

    def _enters(self, i: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.passes[-1].setdefault(i, []).append([(args[0] if args else kwargs["hidden_states"]).clone()])

        return hook

    def _leaves(self, i: int) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            self.passes[-1][i][-1].append((output[0] if isinstance(output, tuple) else output).clone())

        return hook

    def rows(self, sample: int, pads: int, count: int, layer: int, run: int, cache: bool) -> list[torch.Tensor]:
        """[rows that enter, rows that leave] of one sample in one run; `count`: of its tokens that were fed."""
        found = []
        for side in (0, 1):
            parts = [each[layer][run][side][sample] for each in self.passes]
            if not cache:  # every pass is fed everything: a token is read where it comes for the first time
                parts = [parts[0], *(part[-1:] for part in parts[1:])]
            found.append(torch.cat(parts)[pads : pads + count])
        return found

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def generate(model: nn.Module, looped: Looped, prompts: list[list[int]], tokens: int) -> tuple[torch.Tensor, Seen]:
    """A plain `generate` of left-padded prompts under the hooks; the sequences, pads and all."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(each)) + each for each in prompts])
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts])
    seen = Seen(model, looped)
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "use_cache": looped.cache}
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=mask, **settings)
    seen.remove()
    return made, seen
