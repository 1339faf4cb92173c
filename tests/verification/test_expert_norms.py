"""An expert may end with a norm of its own (Muse Spark): told from rows that are only scaled."""

import pytest
import torch

from hookmap.verification.weights import rms_norm_misfit


def _normed(rows: torch.Tensor) -> torch.Tensor:
    return rows * rows.square().mean(-1, keepdim=True).rsqrt()


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_norm_of_what_an_expert_gives_is_one(where: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(36, 16, generator=generator)
    weights = 1 + 0.5 * torch.randn(16, generator=generator)
    normed = _normed(rows * weights) if where == "before" else _normed(rows) * weights
    assert rms_norm_misfit(rows, normed) < 1e-5


def test_rows_times_the_routers_weights_are_no_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(36, 16, generator=generator)
    normed = _normed(rows) * (1 + 0.5 * torch.randn(16, generator=generator))
    assert rms_norm_misfit(rows, normed * torch.rand(36, 1, generator=generator)) > 0.1
    assert rms_norm_misfit(rows, rows) > 0.01
    assert rms_norm_misfit(rows, normed.roll(1, 0)) > 0.1
