"""Sampled answers that repeat: each request draws with a seed of its own, whatever else runs beside it."""

import hashlib

from inspect_ai.solver import Generate, Solver, TaskState, generate, solver


def own_seed(seed: int, name: str) -> int:
    """The seed of one request, of 62 bits, out of that of the run and the request's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 2


@solver(name="generate_seeded")
def _seeded(seed: int) -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        return await generate(state, seed=own_seed(seed, f"{state.sample_id}/{state.epoch}"))

    return solve


def generating(seed: int | None) -> Solver:
    """inspect's `generate`, with a seed a sample where there is one for the run."""
    return generate() if seed is None else _seeded(seed)
