"""What a worker knows of a request that asks for something, and of the step that runs."""

from dataclasses import dataclass, field

import torch

from hookmap.activations import Key
from hookmap.capture.interventions.edits import TokenAt
from hookmap.capture.rows import RowSelection
from hookmap.vllm.buffer import Chosen
from hookmap.vllm.plans import WorkerEdit, WorkerPlan
from hookmap.vllm.rows import Segment
from hookmap.vllm.spec import RequestSpec
from hookmap.vllm.taps import Read


@dataclass
class Captured:
    """A request that asks for something, from its first step until its rows are taken."""

    name: str
    spec: RequestSpec
    prompt_tokens: int
    keys: frozenset[Key] = frozenset()
    selection: RowSelection = field(default_factory=RowSelection)
    plan: WorkerPlan | None = None
    keeps_all: bool = False
    """whether every row is kept"""
    reads_tokens: bool = False
    """whether a token's id decides what is kept or written"""
    next: int = 0
    """how many positions were seen, from 0 on without a gap"""
    positions: list[int] = field(default_factory=list)
    """those whose rows are kept"""
    slots: list[int] = field(default_factory=list)
    """of each kept row"""
    means: dict[int, torch.Tensor] = field(default_factory=dict)
    """number of an edit -> the mean over the prompt"""
    failed: str | None = None

    def fail(self, why: str) -> None:
        """The first reason stays."""
        self.failed = self.failed or why


@dataclass
class Cells:
    """The rows that one edit writes in this step."""

    requests: list[Captured] = field(default_factory=list)
    """of each row"""
    rows: list[int] = field(default_factory=list)
    where: list[TokenAt] = field(default_factory=list)


@dataclass
class Step:
    """What the requests of one step keep and write, and what of it has been seen."""

    tokens: int | None = None
    """how many the model is fed"""
    segments: dict[str, Segment] = field(default_factory=dict)
    involved: dict[str, Captured] = field(default_factory=dict)
    kept: dict[frozenset[Key], tuple[list[int], list[int]]] = field(default_factory=dict)
    """points -> the rows of the step that are kept, and their slots"""
    groups: dict[Key, tuple[frozenset[Key], ...]] = field(default_factory=dict)
    """of each point that is kept, its sets in `kept`"""
    cells: dict[Key, dict[tuple[bool, int, int], tuple[WorkerEdit, Cells]]] = field(default_factory=dict)
    """point -> (whether it comes last, plan, number of the edit) -> the edit, and what it writes"""
    indices: dict[tuple[frozenset[Key], ...], tuple[torch.Tensor | slice, Chosen]] = field(default_factory=dict)
    parts: dict[Key, dict[int, torch.Tensor]] = field(default_factory=dict)
    """of points that are sums, the terms that were seen"""
    seen: set[Read] = field(default_factory=set)
    done: set[Key] = field(default_factory=set)
