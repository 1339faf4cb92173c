"""Is a map true of a model? Numbers from plain PyTorch hooks, compared with Hugging Face and with arithmetic.

Nothing that discovery used is used here: the model runs with data, hooks read what the map names, and three kinds of
evidence are asked for: Hugging Face's own hidden states, the additions of the block, and causes (a branch's weights
are changed, and what the map says comes after them must move, and nothing else).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hookmap.errors import ModelError
from hookmap.loading import modules
from hookmap.maps.document import ArchitectureMap
from hookmap.verification import subject
from hookmap.verification.check import Check
from hookmap.verification.checks import checks_of, overflow


@dataclass(frozen=True)
class Verification:
    """All checks of one map on one model."""

    architecture_map: ArchitectureMap
    on: str
    """what ran: the model's own weights, or random ones at narrow width"""
    checks: tuple[Check, ...] = ()

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "architecture": self.architecture_map.architecture,
            "model_id": self.architecture_map.model_id,
            "on": self.on,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
        }


def verify(
    source: Any,
    *,
    architecture_map: ArchitectureMap | None = None,
    part: subject.Part = "text",
    random_weights: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Verification:
    """Run a model and check its map (found by discovery where none is given).

    `source`, `part`: as for `discover`; a given map says itself which part it is of. A torch module, an nnsight model,
    and a hub id or folder whose weights can be loaded are verified with their own weights; a config, a model without
    reachable weights, and anything under `random_weights`, as a narrow copy of full depth with random weights: the
    result says which. A part that reads pictures runs on one of noise. Raises ModelError or DiscoveryError where there
    is nothing to check.
    """
    config = subject.config(source, trust_remote_code)
    model, on = subject.runnable(source, config, random_weights, trust_remote_code)
    if modules.device_of(model).type == "meta":
        raise ModelError("the model is on the meta device, without weights: give its config to `verify` instead.")
    is_copy = on != subject.OWN_WEIGHTS
    if is_copy:
        redraw(model, seed)
    found = architecture_map or subject.discovered(source if config is None else config, trust_remote_code, part)
    subject.check_architecture(found, model)
    found, checked = subject.for_narrow_copy(found, model) if is_copy else (found, found)
    with modules.eager(model), modules.plain_experts(model):
        # In float64, as the checks are made, nothing overflows.
        if subject.is_narrow(model) and (wrong := overflow(checked, model, seed)) is not None:
            return Verification(found, on, (wrong,))
        with subject.precisely(model):
            return Verification(found, on, tuple(checks_of(checked, model, seed)))


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Random weights under which each branch adds about as much as the stream holds.

    Under the usual initialisation (std 0.02) a branch adds so little that a wrong tensor hides in the tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.dtype.is_floating_point:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            value = noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else parameter + 0.1 * noise
            parameter.copy_(value)
