"""Invented blocks as a model of transformers: with a config, and `generate`."""

from __future__ import annotations

from typing import Any

import torch
from support import invented_streams, odd_streams
from support.invented import Ladder, taped
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class LadderConfig(PretrainedConfig):
    model_type = "invented_ladder"

    def __init__(
        self, block: str = "Joined", num_hidden_layers: int = 3, added_outside: bool = False, **kwargs: Any
    ) -> None:
        self.block, self.num_hidden_layers, self.added_outside = block, num_hidden_layers, added_outside
        super().__init__(**kwargs)


class LadderForCausalLM(PreTrainedModel, GenerationMixin):
    """A ladder of invented blocks that generates, without a cache."""

    config_class = LadderConfig

    def __init__(self, config: LadderConfig) -> None:
        super().__init__(config)
        module = odd_streams if config.added_outside else invented_streams
        self.ladder = Ladder(getattr(module, config.block), config.num_hidden_layers)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As the blocks have drawn them."""

    def get_input_embeddings(self) -> nn.Module:
        return self.ladder.lookup

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False, **kwargs: Any) -> CausalLMOutputWithPast:
        x = self.ladder.lookup(input_ids)
        states = [x]
        for rung in self.ladder.rungs:
            x = x + rung(x) if self.config.added_outside else rung(x)
            states.append(x)
        states[-1] = self.ladder.still(x)
        return CausalLMOutputWithPast(
            logits=self.ladder.speak(states[-1]), hidden_states=tuple(states) if output_hidden_states else None
        )

    def says(self, ids: Tensor) -> dict[tuple[str, int | None], Tensor]:
        """What the blocks write of themselves."""
        with torch.no_grad(), taped() as tape:
            self(ids)
        return {key: runs[-1] for key, runs in tape.items()}
