"""Where each point is in a model as vLLM runs it, from the dataflow of its twin.

twin -> a pass as it is -> a pass with one stream -> its map -> the same values in the pass as it is -> places
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hookmap.discovery.dataflow import Dataflow, record
from hookmap.discovery.discover import assemble
from hookmap.discovery.values import Values
from hookmap.vllm.pairs import join, pairs
from hookmap.vllm.places import ModelPlaces
from hookmap.vllm.translate import translated
from hookmap.vllm.twin import build, config_of_twin, running

_SEQ = 7
_HOW = "two passes of vLLM's own modules on the meta device, with plain operations in place of kernels"


def discover(vllm_config: Any) -> ModelPlaces:
    """The places of all points of the model that vLLM makes of this config. Needs no weights and no cache.

    Raises DiscoveryError where its dataflow has no structure that hookmap understands.
    """
    own = config_of_twin(vllm_config)
    settings = own.model_config.hf_config
    with running(own):
        model = build(own)
        _as_transformers(model)
        values = Values(_pass(model))
        found = pairs(values)
        undo = join(found)
        try:
            joined = Values(_pass(model)) if found else values
        finally:
            undo()
    seen = assemble(model, joined.flow, _SEQ, settings, vllm_config.model_config.model, _HOW)
    return translated(seen, joined, values)


def _as_transformers(model: nn.Module) -> None:
    """Makes the model take token ids `[1, pos]` and return logits, as a causal language model of transformers does."""
    inner: Any = model.forward

    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        hidden = inner(input_ids, positions, None, None)
        compute: Any = model.compute_logits
        logits: torch.Tensor = compute(hidden)
        return logits

    model.forward = forward


def _pass(model: nn.Module) -> Dataflow:
    ids = torch.arange(_SEQ, device="meta").unsqueeze(0)
    return record(model, {"input_ids": ids})
