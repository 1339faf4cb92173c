"""Where each point is in a model as vLLM runs it, from the dataflow of its twin.

twin -> a pass as it is -> a pass with one stream -> its map -> the same values in the pass as it is -> places
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hookmap.discovery import aten
from hookmap.discovery.dataflow import Dataflow, Operation, record
from hookmap.discovery.discover import assemble
from hookmap.discovery.values import Values
from hookmap.maps.document import ArchitectureMap
from hookmap.vllm.pairs import join, pairs
from hookmap.vllm.places import ModelPlaces
from hookmap.vllm.plain_parts import PlainScans
from hookmap.vllm.shards import sharded
from hookmap.vllm.translate import translated
from hookmap.vllm.twin import build, config_of_twin, is_of_transformers, running

_SEQ = 7
_HOW = "passes of {} on the meta device, with plain operations in place of kernels"


def discover(vllm_config: Any) -> ModelPlaces:
    """The places of all points of the model that vLLM makes of this config. Needs no weights and no cache.

    The map is of the whole model. Where tensors are shared among ranks, the places are those in each of them.

    Raises DiscoveryError where its dataflow has no structure that hookmap understands.
    """
    ranks = vllm_config.parallel_config.tensor_parallel_size
    whole = _places(vllm_config, 1)
    return whole if ranks == 1 else sharded(whole, _places(vllm_config, ranks), ranks)


def _places(vllm_config: Any, ranks: int) -> ModelPlaces:
    """The places in the whole model, or in what one of several ranks has of it."""
    own = config_of_twin(vllm_config, ranks)
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
    of = "transformers' modules inside vLLM" if is_of_transformers(model) else "vLLM's own modules"
    seen = assemble(model, joined.flow, _SEQ, settings, vllm_config.model_config.model, _HOW.format(of))
    update = {"lm_head_path": _lm_head(values), "architecture": vllm_config.model_config.architectures[0]}
    places = translated(seen.model_copy(update=update), joined, values, batch=is_of_transformers(model))
    return replace(places, early=_early(places.map, values))


def _early(found: ArchitectureMap, values: Values) -> frozenset[str]:
    """The modules that run before the first layer does."""
    blocks = {found.at_layer(found.layers_path, layer) for layer in range(found.num_layers)}
    first = min(call.enter for call in values.flow.calls if call.path in blocks)
    return frozenset(call.path for call in values.flow.calls if call.exit < first)


def _lm_head(values: Values) -> str | None:
    """The module whose weight makes the logits: vLLM computes with the weight, and does not call the module."""
    last = [op for op in values.flow.operations if op.name in aten.PRODUCTS][-1]
    paths = (values.parameters[v] for v in map(values.value, _behind_turns(values, last)) if v in values.parameters)
    return next((path.rpartition(".")[0] for path in paths), None)


def _behind_turns(values: Values, op: Operation) -> Iterator[int]:
    """The operands of a product, each as it was before its axes were turned."""
    for tensor in op.inputs:
        while (made := values.flow.producer(tensor)) is not None and made.name in aten.MOVES:
            tensor = made.inputs[0]
        yield tensor


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
    with PlainScans():
        return record(model, {"input_ids": ids})
