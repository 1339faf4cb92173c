"""Reproducible sampling: each request has its own seed, so that it does not depend on what else is in its batch."""

from inspect_ai.solver import Generate, Solver, TaskState, generate, solver

from hookmap.loading.sampling import own_seed


@solver(name="generate_seeded")
def _seeded(seed: int) -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        return await generate(state, seed=own_seed(seed, f"{state.sample_id}/{state.epoch}"))

    return solve


def generating(seed: int | None) -> Solver:
    """inspect's `generate`; if the run has a seed, each sample gets one derived from it."""
    return generate() if seed is None else _seeded(seed)
