"""The batch of one model that runs: requests join it between two steps, and leave when they have ended.

A request is taken apart into its prompts. Those that wait are read together where their lengths are much the same. Then
all are decoded together. Each has its own settings, limit, stop strings, captures and interventions.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from hookmap.activations import Sink
from hookmap.capture.run import running
from hookmap.loading.memory import MemoryUse
from hookmap.model import HookedModel
from hookmap.services.server.batch_limits import BatchLimits, read_together
from hookmap.services.server.errors import ApiError, cancelled, failed, is_out_of_memory
from hookmap.services.server.jobs import Event, Job, Result
from hookmap.services.server.passing import in_passing
from hookmap.services.server.row_batch import RowBatch
from hookmap.services.server.sampling import Sampler
from hookmap.services.server.shared_run import Choice, choices_of
from hookmap.services.server.tokens import Token
from hookmap.services.server.watched_part import WatchedPart
from hookmap.services.server.watched_run import Gathered, WatchedRun, fault, watched

log = logging.getLogger("hookmap.server")
_READ_AT_ONCE = 1024
"""tokens of prompts that are read between two steps of the rows that run; the last prompt may exceed it"""
_OPENS = 0.01
"""seconds to wait for a session to open where nothing else runs, before a look at who else has come"""
_SESSIONS = 4
"""that are opened or closed at once: each waits for the disk"""
_LOOK = 64
"""steps between looks at the memory in use"""
Ended = Callable[[Job, Event, int], None]
"""called with a job, its last event, and the most jobs that it ran beside, itself counted"""


@dataclass(eq=False)
class Guest:
    """A job in the batch."""

    job: Job
    memory: MemoryUse
    parts: "list[Part]" = field(default_factory=list)
    run: WatchedRun | None = None
    """of one that reads or writes activations"""
    opening: "Future[Sink] | None" = None
    """of one whose rows are kept: the session, which the disk may not have ready yet"""
    sink: Gathered | None = None
    together: int = 1

    @property
    def opens(self) -> bool:
        """Whether its session is not ready yet."""
        return self.opening is not None and not self.opening.done()


@dataclass(eq=False)
class Part:
    """The choices of one prompt of a job, or some of them."""

    guest: Guest
    choices: list[Choice]
    sampler: Sampler
    watched: WatchedPart | None = None
    ended: bool = False

    @property
    def columns(self) -> int:
        """Tokens that a row of it may come to."""
        return max(len(choice.tokens) + choice.left for choice in self.choices)

    @property
    def read(self) -> int:
        """Tokens of a row that are read when it joins."""
        return len(self.choices[0].tokens)

    def watch(self, batch: int, rows: Sequence[int], columns: int) -> None:
        """Before its first pass, in which its rows are these. Raises what the opening of its session raised."""
        guest = self.guest
        if guest.run is None:
            return
        if guest.sink is None:
            guest.sink = Gathered(guest.opening.result() if guest.opening else None)
        self.watched = WatchedPart(guest.run, [choice.number for choice in self.choices], guest.sink)
        self.watched.stand(batch, rows, columns - self.read)

    def unwatch(self) -> None:
        """Its first pass failed."""
        if self.watched is not None:
            self.watched.close()
        self.watched = None


class RunningBatch:
    """One thread calls it. What goes wrong with a job ends that job."""

    def __init__(self, hm: HookedModel, limits: BatchLimits, ended: Ended) -> None:
        self._hm, self._limits, self._ended = hm, limits, ended
        self._rows = RowBatch(hm.hooks.root, limits.columns)
        self._places: list[tuple[Part, Choice]] = []
        """of each row"""
        self._waiting: deque[Part] = deque()
        """parts of guests that are not in the batch yet"""
        self._guests: list[Guest] = []
        self._steps = 0
        self._most: int | None = None
        """rows that fit into memory, once more did not; until nothing runs"""
        self._finishing = ThreadPoolExecutor(_SESSIONS, thread_name_prefix="ending")
        """opens and closes sessions, while the batch goes on"""

    @property
    def idle(self) -> bool:
        """Whether nothing runs."""
        return not self._guests

    def has_room(self, job: Job) -> bool:
        """Whether its first rows may join beside all that run and wait in here."""
        columns = max(len(prompt.token_ids) for prompt in job.prompts) + job.max_new_tokens
        return self._holds(job.choices, columns, self._waiting)

    def begin(self, job: Job, memory: MemoryUse) -> None:
        """Take a job in. Its prompts are read at the next step."""
        guest = Guest(job, memory)
        self._guests.append(guest)
        for each in self._guests:
            each.together = max(each.together, len(self._guests))
        try:
            if not job.plain:
                guest.run = watched(self._hm, job, memory)
                if job.recorder:
                    guest.opening = self._finishing.submit(in_passing, job.recorder.begin)
            choices = choices_of(job, self._hm)
            for first in range(0, len(choices), job.choices):
                own = choices[first : first + job.choices]
                guest.parts.append(Part(guest, own, Sampler(self._hm, job, job.prompts[first].token_ids)))
            self._waiting += guest.parts
        except BaseException as error:
            self._leave(guest, failed(error, [job.id]))

    def step(self) -> None:
        """Let those join that wait and fit, which sends their first tokens; then give each row its next token."""
        for guest in [guest for guest in self._guests if guest.job.cancelled.is_set()]:
            self._leave(guest, cancelled())
        self._fill()
        if self._places:
            self._decode()
        if self._steps % _LOOK == 0:
            for guest in self._guests:
                guest.memory.look()
        self._steps += 1

    def fail(self, error: BaseException) -> None:
        """End all that runs with this error."""
        event = failed(error, [guest.job.id for guest in self._guests])
        for guest in list(self._guests):
            self._leave(guest, event)
        self._rows.clear()
        self._places.clear()

    def close(self) -> None:
        """Return when every session is closed."""
        self._finishing.shutdown()

    def _fill(self) -> None:
        """Let those join that wait in here and fit."""
        if not self._places and all(part.guest.opens for part in self._waiting):
            opening = [part.guest.opening for part in self._waiting if part.guest.opening]
            wait(opening, timeout=_OPENS, return_when=FIRST_COMPLETED)
        coming, tokens = list[Part](), 0
        for part in [part for part in self._waiting if not part.guest.opens]:
            if tokens >= _READ_AT_ONCE or not self._holds(len(part.choices), part.columns, coming):
                break
            self._waiting.remove(part)
            coming.append(part)
            tokens += part.read * len(part.choices)
        for numbers in read_together([part.read for part in coming]):
            self._join([coming[number] for number in numbers])

    def _holds(self, rows: int, columns: int, beside: Collection[Part]) -> bool:
        """Whether so many rows may run with those that run already, and with these parts."""
        if not self._places and not beside:
            return True
        rows += len(self._places) + sum(len(part.choices) for part in beside)
        if self._most is not None and rows > self._most:
            return False
        others = (*(part for part, _ in self._places), *beside)
        return self._limits.hold(rows, max(columns, *(part.columns for part in others)))

    def _join(self, parts: Sequence[Part]) -> None:
        """Read the prompts of parts in one pass, and send their first tokens."""
        parts = [part for part in parts if not part.ended]  # another of the same guest may have failed
        if not parts:
            return
        places = [(part, choice) for part in parts for choice in part.choices]
        lengths = [len(choice.tokens) for _, choice in places]
        try:
            for part in parts:
                part.watch(len(places), [row for row, (own, _) in enumerate(places) if own is part], max(lengths))
            with running(self._hm.hooks), WatchedPart.looking([part.watched for part in parts]):
                logits, read = self._rows.read([choice.tokens for _, choice in places])
            self._after(logits, places)
        except Exception as error:
            for part in parts:
                part.unwatch()
            if len(parts) > 1:  # they are too many, or one of them is at fault
                for part in parts:
                    self._join([part])
            elif is_out_of_memory(error) and self._places:
                self._most = len(self._places)  # it is read when others have left
                self._waiting.appendleft(parts[0])
                failed(error, [parts[0].guest.job.id], again=True)
            else:
                self._leave(parts[0].guest, failed(error, [parts[0].guest.job.id]))
            return
        if any(not part.ended for part in parts):
            self._rows.join(read, lengths)
            self._places += places
            self._drop_ended()

    def _decode(self) -> None:
        """One step of all rows."""
        places = self._places
        pads = [part.guest.job.config.pad_token_id for part, _ in places]
        newest = [pad if choice.ended else choice.new[-1] for (_, choice), pad in zip(places, pads, strict=True)]
        rows = dict[Part, list[int]]()
        for row, (part, _) in enumerate(places):
            rows.setdefault(part, []).append(row)
        for part, own in rows.items():
            if part.watched is not None:
                part.watched.stand(len(places), sorted(own, key=lambda row: places[row][1].number))
        try:
            with running(self._hm.hooks), WatchedPart.looking([part.watched for part in rows]):
                logits = self._rows.step(newest)
        except Exception as error:
            self._halve(error) if is_out_of_memory(error) else self.fail(error)
            return
        self._after(logits, list(places))
        self._drop_ended()

    def _after(self, logits: torch.Tensor, places: Sequence[tuple[Part, Choice]]) -> None:
        """Give each choice its newest token, and send it."""
        right = logits.amax(-1).isfinite().tolist()  # the largest of scores with NaN is NaN
        for row, (part, choice) in enumerate(places):
            if not right[row] and not choice.ended:
                logits[row] = 0.0
                self._leave(part.guest, fault(self._hm, part.guest.job))
        chosen, wrong = Sampler.choose(logits, [(part.sampler, choice) for part, choice in places])
        for row, error in wrong.items():
            self._leave(places[row][0].guest, failed(error, [places[row][0].guest.job.id]))
        told = dict[Part, list[Token]]()
        for row, (part, choice) in enumerate(places):
            if choice.ended or part.ended:
                continue
            try:
                token = _token(choice.number, chosen[row], logits[row], part.guest.job.top_logprobs)
                ends = part.sampler.ends(choice, chosen[row])
            except Exception as error:
                self._leave(part.guest, failed(error, [part.guest.job.id]))
                continue
            choice.add(chosen[row], ends)
            told.setdefault(part, []).append(token)
        for part in dict.fromkeys(part for part, _ in places):
            self._tell(part, told.get(part, []))

    def _tell(self, part: Part, tokens: list[Token]) -> None:
        """Send the newest tokens of a part, and end what has ended."""
        if part.ended:
            return
        guest = part.guest
        try:
            if part.watched is not None:
                tokens = part.watched.stepped(part.choices, tokens)
            guest.job.tell(tokens)
            if all(choice.ended for choice in part.choices):
                if part.watched is not None:
                    part.watched.finish(part.choices)
                part.ended = True
        except Exception as error:
            self._leave(guest, failed(error, [guest.job.id]))
            return
        if all(each.ended for each in guest.parts):
            new = {choice.number: tuple(choice.new) for each in guest.parts for choice in each.choices}
            self._leave(guest, Result(tuple(new[number] for number in sorted(new))))

    def _drop_ended(self) -> None:
        """Take out the rows of parts that have ended, and of choices that nobody watches."""
        for row in range(len(self._places) - 1, -1, -1):
            part, choice = self._places[row]
            if part.ended or (choice.ended and part.watched is None):
                self._rows.leave(row)
                self._places[row] = self._places[-1]
                self._places.pop()

    def _leave(self, guest: Guest, event: Result | ApiError) -> None:
        """A guest has ended: it is answered, once its session is closed."""
        if guest not in self._guests:
            return
        self._guests.remove(guest)
        if not self._guests:
            self._most = None
        for part in guest.parts:
            part.ended = True
            if part.watched is not None:
                part.watched.close()
        self._waiting = deque(part for part in self._waiting if part.guest is not guest)
        self._drop_ended()
        recorder = guest.job.recorder
        if recorder is None:
            self._ended(guest.job, event, guest.together)
        else:
            self._finishing.submit(in_passing, partial(self._close_session, guest, event))

    def _close_session(self, guest: Guest, event: Result | ApiError) -> None:
        job, recorder = guest.job, guest.job.recorder
        assert recorder is not None
        if guest.opening is not None:
            wait([guest.opening])  # one that has left may be here before its session is open
        try:
            if isinstance(event, Result):
                assert guest.sink is not None and guest.run is not None
                samples = sorted(guest.sink.samples, key=lambda sample: sample.sample)
                event = replace(event, meta=recorder.end(samples, guest.run.lost))
            else:
                recorder.drop()
        except BaseException as error:
            event = failed(error, [job.id])
            recorder.drop()
        self._ended(job, event, guest.together)

    def _halve(self, error: BaseException) -> None:
        """Memory ran out in a step: half of the rows go on, the others when those have left."""
        places, several = list(self._places), len(self._places) > 1
        guests = list(dict.fromkeys(part.guest for part, _ in places))
        event = failed(error, [guest.job.id for guest in guests], again=several)
        self._rows.clear()
        self._places.clear()
        for guest in guests:
            if not several or guest.run is not None:  # rows that were kept cannot be kept again
                self._leave(guest, event)
        self._most = max(1, len(places) // 2)
        again = list[Part]()
        for part in dict.fromkeys(part for part, _ in places if part.guest in self._guests):
            each = [Part(part.guest, [choice], part.sampler, ended=choice.ended) for choice in part.choices]
            part.guest.parts = [own for own in part.guest.parts if own is not part] + each
            again += [own for own in each if not own.ended]
        self._waiting.extendleft(reversed(again))


def _token(choice: int, chosen: int, logits: torch.Tensor, top: int | None) -> Token:
    """The newest token of a choice. `logits`: [vocabulary]; `top`: how many of the likeliest are told, if any."""
    if top is None:
        return Token(choice, chosen)
    own = logits.log_softmax(-1)
    best = own.topk(min(top, len(own)))
    likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(choice, chosen, logprob=float(own[chosen]), top=likeliest)
