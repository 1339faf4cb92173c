"""Functions as a user has them in a module: a server and vLLM's workers import them by name."""

from typing import Any

import torch

TURNED = "support.own_functions:turned"
BROKEN = "support.own_functions:broken"
STOPPING = "support.own_functions:stopping"


def turned(rows: torch.Tensor, at: Any) -> torch.Tensor:
    """A change that depends on the position and on the token of each row."""
    factors = [(-1.0) ** position * (1 + token % 3) for position, token in zip(at.positions, at.tokens, strict=True)]
    return rows * torch.tensor(factors, dtype=rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))


def broken(rows: torch.Tensor, at: Any) -> torch.Tensor:
    """Gives another shape at the second new token."""
    return rows[:, :-1] if at.step == 2 else rows


def stopping(rows: torch.Tensor, at: Any) -> torch.Tensor:
    """Ends the sample."""
    at.stop()
    return rows
