"""What a worker does at each step: whose rows are kept, what is written, and what was seen of each request.

A failure concerns the requests whose rows it touches, never the engine: they go on, and say what was wrong when their
rows are asked for. Rows are taken in the order of their positions, each once: what is computed again after a preemption
is known already, and what is not computed at all (a cached prefix) is an error.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from hookmap.activations import Key
from hookmap.capture.interventions.edits import TokenAt, step_of
from hookmap.errors import CaptureError, HookmapError, InterventionError
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.selectors import select
from hookmap.stores.ledger import tensor_name
from hookmap.vllm.buffer import Chosen, Slabs, Slots, side_by_side, sum_of
from hookmap.vllm.captured import Captured, Cells, Step
from hookmap.vllm.plans import WorkerEdit, WorkerPlan
from hookmap.vllm.rows import Segment, StepRows
from hookmap.vllm.spec import RequestSpec, spec_of
from hookmap.vllm.taps import Boundary, Part, Read, Taps, Tensors, Write

IN_PIECES = "vLLM read the prompt in pieces"
"""how the reason of a request begins that may be right where it runs alone"""
UNTAKEN = 4096
"""requests that have ended and that nobody asked for, at most"""


class Session:
    """All requests of one worker that ask for something."""

    def __init__(
        self,
        rows: StepRows,
        architecture_map: ArchitectureMap,
        taps: Taps,
        tap: Callable[[Iterable[Key]], None],
        parameter_at: Callable[[str], torch.Tensor],
        untaken_bytes: int = 2**32,
        elsewhere: frozenset[Key] = frozenset(),
    ) -> None:
        """`taps`: of the worker's model. `tap`: makes points seen, or raises.

        `untaken_bytes`: the most that is kept of requests that have ended and whose rows nobody has taken.
        `elsewhere`: points that other stages of a pipeline keep and write.
        """
        self._rows, self._map, self._taps = rows, architecture_map, taps
        self._tap, self._parameter_at = tap, parameter_at
        self.plans: dict[str, WorkerPlan] = {}
        self.requests: dict[str, Captured] = {}
        self.slabs = Slabs()
        self._slots = Slots()
        self._plain: set[str] = set()
        """requests that ask for nothing"""
        self._step: Step | None = None
        self._keys_of: dict[str, frozenset[Key]] = {}
        self._kept_last: tuple[tuple[frozenset[Key], ...], dict[Key, tuple[frozenset[Key], ...]]] = ((), {})
        self._untaken_bytes, self._elsewhere = untaken_bytes, elsewhere

    def begin(self, segments: Iterable[Segment], tokens: int | None = None) -> list[Segment]:
        """A step of these rows is about to run. Returns those of requests that ask for something.

        `tokens`: how many the model is fed, where that is known; each tensor must have as many rows.
        """
        step = Step(tokens)
        for segment in segments:
            request = self._request(segment.request)
            if request is None or request.failed is not None:
                continue
            try:
                self._begin(step, request, segment)
            except HookmapError as error:
                request.fail(str(error))
                continue
            step.segments[segment.request] = segment
            step.involved[segment.request] = request
        step.cells = {key: dict(sorted(mine.items(), key=lambda item: item[0])) for key, mine in step.cells.items()}
        step.groups = self._groups(tuple(step.kept))
        self._step = step if step.involved else None
        self._taps.wake((*step.kept, tuple(step.cells)) if step.involved else ())
        return list(step.segments.values())

    def fail(self, why: str) -> None:
        """Something is wrong with the whole step that is about to run: no row of it is kept."""
        for request in self._step.involved.values() if self._step else ():
            request.fail(why)
        self._rest()

    def writes(self, boundary: Boundary) -> bool:
        """Whether a request of this step may be written at this boundary."""
        return self._step is not None and any(write.key in self._step.cells for write in boundary.writes)

    def at(self, boundary: Boundary, tensors: Tensors) -> None:
        """The model passes a boundary: write, then read."""
        step = self._step
        if step is None:
            return
        if step.tokens is not None and (found := boundary.count(tensors)) != step.tokens:
            told = f"{boundary.module} has {found} rows in a step of {step.tokens} tokens: whose they are is not known."
            _fail(step.involved.values(), CaptureError(told))
            return
        for write in boundary.writes if step.cells else ():
            for edit, cells in step.cells.get(write.key, {}).values():
                try:
                    self._write(step, write, edit, cells, tensors)
                except _FAILURES as error:
                    _fail(cells.requests or step.involved.values(), error)
        for read in boundary.reads:
            if groups := step.groups.get(read.key):
                try:
                    self._read(step, read, groups, tensors)
                except _FAILURES as error:
                    _fail(step.involved.values(), error)

    def end(self) -> None:
        """The step has run."""
        step = self._step
        if step is None:
            return
        self._rest()
        for keys, (rows, _) in step.kept.items():
            if rows and (missed := sorted(tensor_name(key) for key in keys - step.done)):
                for request in (each for each in step.involved.values() if each.keys == keys):
                    request.fail(f"a step of vLLM did not reach {', '.join(missed)}: the model skipped these modules.")

    def _rest(self) -> None:
        self._step = None
        self._taps.wake(())

    def take(self, name: str, tokens: int) -> tuple[list[int], dict[Key, torch.Tensor]]:
        """Positions and rows of a request that has ended; it is forgotten. `tokens`: how many of its tokens have a row.

        Raises CaptureError where rows are missing, and what went wrong while it ran.
        """
        request = self._forget(name)
        if request is None:
            raise CaptureError(
                f"vLLM's worker knows no request {name!r}: it has not run, its rows were taken, or nobody took them "
                f"and others came: {self._untaken_bytes} bytes are kept (additional_config hookmap.untaken_bytes)."
            )
        if request.failed is not None:
            raise CaptureError(request.failed)
        if request.next < tokens:
            raise CaptureError(f"{request.next} of {tokens} tokens have been seen: rows are missing.")
        count = sum(position < tokens for position in request.positions)
        positions, slots = request.positions[:count], request.slots[:count]
        if request.selection.positions == "last":
            positions, slots = positions[-1:], slots[-1:]
        rows, chosen = {}, Chosen(slots)
        for key in request.keys:
            found = self.slabs.get(key, chosen)
            if request.selection.mean and len(found):
                found = found.float().mean(0, keepdim=True).to(found.dtype)
            rows[key] = found
        return positions, rows

    def drop(self, name: str) -> None:
        """Forget a request that was aborted; its points need not have been seen."""
        self._forget(name)

    def _forget(self, name: str) -> Captured | None:
        request = self.requests.pop(name, None)
        if request is not None:
            self._slots.give_back(request.slots)
            for edit in request.plan.edits if request.plan else ():
                if edit.pairs is not None and request.spec.edits is not None:
                    edit.pairs.pop(request.spec.edits.sample, None)
        return request

    def names(self, request: str) -> list[str]:
        """vLLM's own ids of the request that was added under this name, in order; several for n > 1."""
        found = [name for name in self.requests if name.rpartition("-")[0] == request]
        if found:
            return found
        own = [name for name in self.requests if name.partition("_")[2].rpartition("-")[0] == request]
        return sorted(own, key=lambda name: int(name.partition("_")[0]))

    def _groups(self, kept: tuple[frozenset[Key], ...]) -> dict[Key, tuple[frozenset[Key], ...]]:
        """Of each point, the sets of points that it is in. Most steps keep what the one before them kept."""
        if kept != self._kept_last[0]:
            self._kept_last = (
                kept,
                {key: tuple(keys for keys in kept if key in keys) for key in frozenset().union(*kept)},
            )
        return self._kept_last[1]

    def _request(self, name: str) -> Captured | None:
        if (known := self.requests.get(name)) is not None:
            return known
        if name not in self._plain:
            arguments = self._rows.arguments(name)
            if not arguments or "hookmap" not in arguments:
                if len(self._plain) > 4096:
                    self._plain = {each for each in self._plain if self._rows.known(each)}
                self._plain.add(name)
            else:
                self.requests[name] = self._new(name, arguments)
        return self.requests.get(name)

    def _new(self, name: str, arguments: Any) -> Captured:
        self._make_room()
        request = Captured(name, RequestSpec(), self._rows.prompt_tokens(name))
        try:
            spec = request.spec = spec_of(arguments) or RequestSpec()
            selection = request.selection = spec.rows.selection()
            request.keeps_all = selection.positions == "all" and selection.every == 1
            request.keys = self._keys(spec)
            self._tap(request.keys)
            if spec.edits is not None:
                request.plan = self._plan(spec)
            request.reads_tokens = selection.reads_tokens or (request.plan is not None and request.plan.reads_tokens)
        except HookmapError as error:
            request.fail(str(error))
        return request

    def _make_room(self) -> None:
        """Forget the oldest of the requests that have ended, where more is kept of them than may be."""
        if self.slabs.nbytes <= self._untaken_bytes and len(self.requests) <= UNTAKEN:
            return
        ended = [each for each in self.requests.values() if not self._rows.known(each.name)]
        sizes = [self.slabs.size_of(each.keys, len(each.slots)) for each in ended]
        kept = sum(sizes)
        for number, (request, size) in enumerate(zip(ended, sizes, strict=True)):
            if kept <= self._untaken_bytes and len(ended) - number <= UNTAKEN:
                return
            self.drop(request.name)
            kept -= size

    def _keys(self, spec: RequestSpec) -> frozenset[Key]:
        """Of what a request names, those of this worker; one object for equal requests. Raises SelectionError."""
        if not spec.points:
            return frozenset()
        named = repr(sorted(spec.points.items()))
        if named not in self._keys_of:
            points = {name: "all" if layers is None else layers for name, layers in spec.points.items()}
            self._keys_of[named] = frozenset(s.key for s in select(self._map, points)) - self._elsewhere
        return self._keys_of[named]

    def _plan(self, spec: RequestSpec) -> WorkerPlan:
        assert spec.edits is not None
        plan = self.plans.get(spec.edits.plan)
        if plan is None:
            raise InterventionError(f"no plan {spec.edits.plan!r} of interventions was given to vLLM's worker.")
        keys = {edit.key for edit in plan.edits} - self._elsewhere
        if refused := sorted(tensor_name(key) for key in keys - self._taps.written):
            raise InterventionError(f"{', '.join(refused)} cannot be written on vLLM.")
        self._tap(keys)
        for number, pairs in spec.edits.only.items():
            edit = plan.edits[int(number)]
            if edit.pairs is not None:
                edit.pairs[spec.edits.sample] = {int(position): row for position, row in pairs.items()}
        return plan

    def _begin(self, step: Step, request: Captured, segment: Segment) -> None:
        end = segment.position + segment.stop - segment.first
        if segment.position > request.next:
            raise CaptureError(
                f"tokens {request.next} to {segment.position - 1} were not computed for this request, but read from "
                "vLLM's prefix cache: it has no rows of them. Send it with skip_reading_prefix_cache=True."
            )
        tokens = self._rows.token_ids(segment) if request.reads_tokens else None
        if request.keys:
            kept: Sequence[int] = range(request.next, end)
            if not request.keeps_all:
                images = frozenset(request.spec.images)
                wanted = request.selection.wanted(request.prompt_tokens, frozenset(request.spec.matching), images)
                kept = [p for p in kept if wanted(p, -1 if tokens is None else tokens[p - segment.position])]
            slots = self._slots.take(len(kept))
            shift = segment.first - segment.position
            request.positions += kept
            request.slots += slots
            rows, into = step.kept.setdefault(request.keys, ([], []))
            rows += [p + shift for p in kept]
            into += slots
        request.next = max(request.next, end)
        if request.plan is not None:
            self._choose(step, request, segment, tokens)

    def _choose(self, step: Step, request: Captured, segment: Segment, tokens: list[int] | None) -> None:
        """The rows of this request that are written in this step."""
        assert request.plan is not None and request.spec.edits is not None
        sample, images = request.spec.edits.sample, frozenset(request.spec.edits.images)
        count = segment.stop - segment.first
        known = [-1] * count if tokens is None else tokens
        rows = [(segment.first + n, segment.position + n, known[n]) for n in range(count)]
        same: dict[Any, list[tuple[int, TokenAt]]] = {}
        """the edits of one intervention on several layers choose the same tokens"""
        for number, edit in enumerate(request.plan.edits):
            if edit.key in self._elsewhere:
                continue
            key = number if edit.pairs is not None else edit.tokens
            if key not in same:
                same[key] = [
                    (row, TokenAt(sample, position, token, step_of(position, request.prompt_tokens)))
                    for row, position, token in rows
                    if edit.selects(sample, position, token, request.prompt_tokens, images)
                ]
            chosen = same[key]
            if edit.whole and edit.pairs is not None and 0 < len(chosen) < len(edit.pairs.get(sample, ())):
                raise InterventionError(f"{IN_PIECES}: the two tokens of a swap are in different ones.")
            if not chosen and not edit.means:
                continue
            mine = step.cells.setdefault(edit.key, {})
            _, cells = mine.setdefault((edit.last, id(request.plan), number), (edit, Cells()))
            cells.requests += [request] * len(chosen)
            cells.rows += [row for row, _ in chosen]
            cells.where += [token for _, token in chosen]

    def _write(self, step: Step, write: Write, edit: WorkerEdit, cells: Cells, tensors: Tensors) -> None:
        if edit.means:
            self._note_means(step, write, edit, tensors)
        live = [n for n, request in enumerate(cells.requests) if request.failed is None]
        if not live:
            return
        rows = torch.tensor([cells.rows[n] for n in live], device=tensors[0].device)
        where = [cells.where[n] for n in live]
        old = self._value(write, tensors, rows)
        means = None
        if edit.means:
            means = torch.stack([cells.requests[n].means[id(edit)] for n in live])
        new = edit.apply(old, where, means)
        if old.dtype == torch.float16 and bool(old.isfinite().all() & ~new.isfinite().all()):
            raise InterventionError(
                f"{tensor_name(write.key)}: what is written is too large for torch.float16, which goes up to 65504. "
                "Give smaller numbers, or open the model in bfloat16 or float32."
            )
        first, *others = write.parts
        scale = first.term.scale
        first.put(tensors, rows, (new if scale == 1.0 else new / scale).to(old.dtype))
        for part in others:
            part.put(tensors, rows, torch.zeros_like(new))

    def _note_means(self, step: Step, write: Write, edit: WorkerEdit, tensors: Tensors) -> None:
        """The mean over each prompt that is read in this step, as the rows are before this edit."""
        for name, request in step.involved.items():
            if request.plan is None or request.failed is not None or all(e is not edit for e in request.plan.edits):
                continue
            segment, length = step.segments[name], request.prompt_tokens
            if segment.position == 0 and segment.stop - segment.first >= length:
                rows = torch.arange(segment.first, segment.first + length, device=tensors[0].device)
                request.means[id(edit)] = self._value(write, tensors, rows).float().mean(0)
            elif id(edit) not in request.means:
                request.fail(
                    f"{IN_PIECES}, and its mean is asked for: give a larger max_num_batched_tokens and no "
                    "long_prefill_token_threshold, or a vector."
                )

    def _value(self, write: Write, tensors: Tensors, rows: torch.Tensor) -> torch.Tensor:
        return sum_of([self._share(part, tensors, rows) for part in write.parts])

    def _read(self, step: Step, read: Read, groups: tuple[frozenset[Key], ...], tensors: Tensors) -> None:
        if read in step.seen:
            raise CaptureError(f"{tensor_name(read.key)}: its module was called more than once in a step of vLLM.")
        step.seen.add(read)
        rows, slots = self._index(step, groups, tensors[0].device)
        found = [self._share(part, tensors, rows) for part in read.parts]
        if read.numbers is not None:
            parts = step.parts.setdefault(read.key, {})
            for number, share in zip(read.numbers, found, strict=True):
                parts[number] = share.clone()  # what the model does next may overwrite a view
            if len(parts) < self._taps.terms[read.key]:
                return
            found = [parts[number] for number in sorted(parts)]
        self.slabs.put(read.key, slots, found)
        step.done.add(read.key)

    def _share(self, part: Part, tensors: Tensors, rows: torch.Tensor | slice) -> torch.Tensor:
        parameter = None if part.term.weight is None else self._parameter_at(part.term.weight)
        found: torch.Tensor = part.term.times(part.rows(tensors, rows), parameter)
        return found

    def _index(
        self, step: Step, groups: tuple[frozenset[Key], ...], device: torch.device
    ) -> tuple[torch.Tensor | slice, Chosen]:
        """The kept rows of these groups, and their slots."""
        if groups not in step.indices:
            rows = [row for keys in groups for row in step.kept[keys][0]]
            slots = [slot for keys in groups for slot in step.kept[keys][1]]
            where = side_by_side(rows) or torch.tensor(rows, dtype=torch.long, device=device)
            step.indices[groups] = where, Chosen(slots)
        return step.indices[groups]


_FAILURES = (HookmapError, RuntimeError, LookupError, TypeError, ValueError)
"""of a request, and not of the engine"""


def _fail(requests: Iterable[Captured], error: Exception) -> None:
    why = str(error) if isinstance(error, HookmapError) else f"{type(error).__name__}: {error}"
    for request in requests:
        request.fail(why)
