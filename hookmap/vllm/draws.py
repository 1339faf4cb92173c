"""Seeded requests on a CPU: vLLM takes back the draw after a piece of a prompt by a generator's offset.

Generators of a CPU have none, and vLLM 0.32 dies of it. This one is taken back to its state before the step.
"""

from collections.abc import Mapping
from typing import Any

import torch


class CpuGenerator(torch.Generator):
    """A generator whose last step can be taken back."""

    before: torch.Tensor

    def get_offset(self) -> int:
        """Not a place: what vLLM subtracts from it."""
        return 4

    def set_offset(self, offset: int) -> torch.Generator:
        """Take back what was drawn since `before`."""
        return self.set_state(self.before)


def prepare(runner: Any, ends: Mapping[str, int]) -> None:
    """Before a step of a V1 runner: generators of requests whose prompt ends later can be taken back.

    `ends`: of each request, which of its tokens is the first behind this step's.
    """
    batch = runner.input_batch
    for name, end in ends.items():
        request = runner.requests[name]
        if request.generator is None or end >= request.num_tokens:
            continue
        if not isinstance(request.generator, CpuGenerator):
            own = CpuGenerator()
            own.set_state(request.generator.get_state())
            request.generator = batch.generators[batch.req_id_to_index[name]] = own
        request.generator.before = request.generator.get_state()
