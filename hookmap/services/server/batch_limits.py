"""Which plain requests share a batch, and how their rows are divided into batches. Decides only: nothing runs here."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hookmap.services.server.jobs import Job

Row = tuple[Job, int]
"""a job and the number of its row"""
_PADS = 32
"""pads before a prompt that cost less than a pass of its own for it"""


@dataclass(frozen=True)
class BatchLimits:
    """What a batch may hold."""

    rows: int
    tokens: int
    """rows times columns: prompts, pads and everything that may be generated"""
    columns: int | None = None
    """positions of the model: rows that have ended are fed on until the batch ends; None: no limit is known"""
    padded: int = 0
    """columns up to which prompts of different lengths may share a batch"""

    def takes(self, job: Job) -> bool:
        """Whether rows of other lengths may stand beside each row of the job, however long it becomes."""
        return max(len(prompt.token_ids) for prompt in job.prompts) + job.max_new_tokens <= self.padded

    def hold(self, rows: int, columns: int) -> bool:
        """Whether so many rows of at most so many tokens may run together."""
        return rows <= self.rows and rows * columns <= self.tokens

    def companions(self, first: Job, waiting: Iterable[Job]) -> list[Job]:
        """The waiting jobs that run together with the first one, in their order."""
        rows, found = _rows(first), list[Job]()
        for job in waiting:
            if first.shares is not None and job.shares == first.shares and self._fits([*rows, *_rows(job)]):
                rows += _rows(job)
                found.append(job)
        return found

    def batches(self, jobs: Sequence[Job]) -> Iterator[list[Row]]:
        """The rows of these jobs in batches. The choices of one prompt always run together, however many they are."""
        batch: list[Row] = []
        for job in jobs:
            rows = _rows(job)
            for start in range(0, len(rows), job.choices):
                same_prompt = rows[start : start + job.choices]
                if batch and (job.shares is None or not self._fits([*batch, *same_prompt])):
                    yield batch
                    batch = []
                batch = [*batch, *same_prompt]
        yield batch

    def _fits(self, rows: Sequence[Row]) -> bool:
        lengths = [len(job.prompts[number].token_ids) for job, number in rows]
        columns = max(lengths) + max(job.max_new_tokens for job, _ in rows)
        if len(rows) > self.rows or (columns > self.padded and len(set(lengths)) > 1):
            return False
        return len(rows) * columns <= self.tokens and (self.columns is None or columns <= self.columns)


def read_together(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the prompts that each pass reads: those of much the same length, the first that came first."""
    passes = list[list[int]]()
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if passes and lengths[passes[-1][0]] - lengths[number] <= _PADS:
            passes[-1].append(number)
        else:
            passes.append([number])
    return sorted(map(sorted, passes))


def _rows(job: Job) -> list[Row]:
    return [(job, number) for number in range(len(job.prompts))]
