"""Pipeline parallel: each stage has some of the layers. Which points are in which, and the answers of all, joined."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hookmap.activations import Key
from hookmap.maps.document import ArchitectureMap
from hookmap.vllm.places import ModelPlaces, Place

Answer = Sequence[Any]
"""what a worker has of a request: what went wrong or None, the positions kept, and the rows"""
Taken = tuple[str | None, list[int], dict[str, torch.Tensor]]
"""what went wrong, the positions kept, and rows by the names of tensors"""


@dataclass(frozen=True)
class Stage:
    """What one process of a pipeline has of the model."""

    number: int
    layers: frozenset[int]
    is_first: bool
    is_last: bool

    @classmethod
    def of(cls, model: nn.Module, found: ArchitectureMap) -> Stage:
        """That of this process. `model`: as it is here, with vLLM's placeholders for the layers of others."""
        from vllm.distributed import get_pp_group
        from vllm.model_executor.models.utils import PPMissingLayer

        group, layers = get_pp_group(), range(found.num_layers)
        here = [n for n in layers if not isinstance(model.get_submodule(_block(found, n)), PPMissingLayer)]
        return cls(group.rank_in_group, frozenset(here), group.is_first_rank, group.is_last_rank)

    def elsewhere(self, found: ModelPlaces) -> frozenset[Key]:
        """The points that this stage does not have as a whole.

        That a module exists does not say that it runs here: a tied embedding is in the last stage, too, and GPT-2's
        final norm is in all.
        """
        layer_at = {_block(found.map, layer): layer for layer in range(found.map.num_layers)}

        def has(path: str) -> bool:
            for block, layer in layer_at.items():
                if f"{path}.".startswith(f"{block}."):
                    return layer in self.layers
            return self.is_first if path in found.early else self.is_last

        paths = {term.module for place in found.places.values() for term in place.terms}
        here = {path for path in paths if has(path)}
        return frozenset(k for k, place in found.places.items() if any(t.module not in here for t in place.terms))


def _block(found: ArchitectureMap, layer: int) -> str:
    return found.at_layer(found.layers_path, layer)


def make_room_for_what_comes_in(runner: Any) -> None:
    """Tensors for what the stage before sends: vLLM 0.32 makes them when it warms up, which it leaves out for an eager
    model on a CPU, and dies in the first step."""
    from vllm.distributed import get_pp_group

    if not get_pp_group().is_first_rank and getattr(runner, "intermediate_tensors", "no such thing") is None:
        runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def joined(stages: Sequence[Sequence[Answer]], shared: Mapping[str, Place], read: Callable[[Any], Any]) -> Taken:
    """What all workers have of one request. `stages`: of each, its ranks of tensor parallelism, in their order.

    `shared`: how ranks share each point. `read`: makes a dict of an answer's rows. What went wrong in one worker is
    told for all; so is a request of which workers kept other tokens.
    """
    answers = [answer for ranks in stages for answer in ranks]
    if (error := next((answer[0] for answer in answers if answer[0] is not None), None)) is not None:
        return error, [], {}
    rows: dict[str, torch.Tensor] = {}
    kept: list[list[int]] = []
    for ranks in stages:
        parts = [read(found) if found else {} for _, _, found in ranks]
        kept += [list(positions) for (_, positions, _), part in zip(ranks, parts, strict=True) if part]
        rows |= {name: shared[name].whole([each[name] for each in parts]) for name in parts[0]}
    if any(each != kept[0] for each in kept):
        counts = ", ".join(str(len(each)) for each in kept)
        return f"vLLM's workers have rows of other tokens of this request: {counts} rows. Please report this.", [], {}
    return None, kept[0] if kept else [], rows


def weights_of_all(stages: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The fingerprint of the weights of all stages; None where one has none."""
    known = [each for each in stages if each is not None]
    if len(known) < len(stages):
        return None
    if len(known) == 1:
        return known[0]
    digest = hashlib.sha256("".join(each["sha256"] for each in known).encode()).hexdigest()
    dtypes = sorted({dtype for each in known for dtype in each["dtypes"]})
    return {**known[0], "tensors": sum(each["tensors"] for each in known), "dtypes": dtypes, "sha256": digest}
