"""What a capture takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run is."""

    samples_done: int
    samples: int
    tokens_done: int
    """generated so far in the current batch, for each prompt"""
    tokens: int
    """generated at most for each prompt"""
