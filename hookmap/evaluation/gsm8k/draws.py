"""Sampled answers that repeat: each request draws with a seed of its own, whatever else runs beside it."""

from inspect_ai.solver import Generate, Solver, TaskState, generate, solver

from hookmap.loading.sampling import own_seed


@solver(name="generate_seeded")
def _seeded(seed: int) -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        return await generate(state, seed=own_seed(seed, f"{state.sample_id}/{state.epoch}"))

    return solve


def generating(seed: int | None) -> Solver:
    """inspect's `generate`, with a seed a sample where there is one for the run."""
    return generate() if seed is None else _seeded(seed)
