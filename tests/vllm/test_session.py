"""What a worker makes of steps, without vLLM: rows behind a stop, rows seen twice or never, modules not reached."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import hookmap
from hookmap.activations import Key
from hookmap.errors import CaptureError
from hookmap.maps.terms import Term
from hookmap.vllm.places import ModelPlaces, Place
from hookmap.vllm.rows import Segment
from hookmap.vllm.session import UNTAKEN, Session
from hookmap.vllm.taps import Taps

KEY: Key = ("resid_post", 0)
SUM: Key = ("resid_mid", 0)


class Scripted:
    """A runner's steps, as a test says them."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.asked, self.now = asked, list[Segment]()
        self.ended: set[str] = set()

    def segments(self) -> list[Segment]:
        return self.now

    def arguments(self, request: str) -> Mapping[str, Any] | None:
        return self.asked[request]

    def prompt_tokens(self, request: str) -> int:
        return 3

    def token_ids(self, segment: Segment) -> list[int]:
        return [100 + position for position in range(segment.position, segment.position + segment.stop - segment.first)]

    def known(self, request: str) -> bool:
        return request not in self.ended


class Model(torch.nn.Module):
    """A module whose output is what the session reads, and one whose output is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.branch = torch.nn.Identity(), torch.nn.Identity()


class Worker:
    """A session on that model, and the steps of its requests."""

    def __init__(self, checkpoint: Path, untaken_bytes: int = 2**32, **asked: Any) -> None:
        term, branch = (Term(module, "output", None, flat=True) for module in ("block", "branch"))
        self.model = Model()
        places = {KEY: Place((term,)), SUM: Place((term, branch), why_not_written="no one module holds it")}
        found = ModelPlaces(hookmap.discover(checkpoint), places)
        taps = Taps(self.model, found, compiled=False)
        self.rows = Scripted({name: {"hookmap": document} for name, document in asked.items()})
        self.session = Session(self.rows, found.map, taps, taps.tap, lambda path: torch.ones(1), untaken_bytes)
        taps.handler = self.session

    def step(self, *segments: tuple[str, int, int], calls: int = 1) -> None:
        """Run (request, first position, how many) in one step; each row holds its position."""
        self.rows.now, values, first = [], list[int](), 0
        for request, position, count in segments:
            self.rows.now.append(Segment(request, first, first + count, position))
            values += range(position, position + count)
            first += count
        self.session.begin(self.rows.now, first)
        for _ in range(calls):
            rows = torch.tensor(values, dtype=torch.float32)[:, None].repeat(1, 4)
            self.model.block(rows)
            self.model.branch(rows.mul_(10))  # as compiled code does, which gives memory that is free to others
        self.session.end()

    def taken(self, name: str, tokens: int, key: Key = KEY) -> tuple[list[int], list[float]]:
        """Positions, and the first number of each row."""
        positions, rows = self.session.take(name, tokens)
        return positions, rows[key][:, 0].tolist()


ALL = {"points": {"resid_post": [0]}}


def test_rows_behind_the_last_token_are_left_out(checkpoint: Path) -> None:
    last = {**ALL, "rows": {"positions": "last"}}
    mean = {**ALL, "rows": {"mean": True}}
    worker = Worker(checkpoint, whole=ALL, last=last, mean=mean)
    worker.step(("whole", 0, 3), ("last", 0, 3), ("mean", 0, 3))
    for position in (3, 4, 5):  # the engine goes on until the client has seen the stop string in the text
        worker.step(("mean", position, 1), ("whole", position, 1), ("last", position, 1))
    assert worker.taken("whole", 5) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    assert worker.taken("last", 5) == ([4], [4])
    assert worker.taken("mean", 5) == ([0, 1, 2, 3, 4], [2])
    assert worker.session.requests == {}


def test_rows_that_are_computed_again_are_kept_once(checkpoint: Path) -> None:
    worker = Worker(checkpoint, a=ALL, b=ALL)
    worker.step(("a", 0, 2), ("b", 0, 3))
    worker.step(("b", 3, 1), ("a", 2, 1))
    worker.step(("a", 0, 2))
    worker.step(("a", 2, 3), ("b", 4, 1))
    assert worker.taken("a", 5) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    assert worker.taken("b", 5) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])


def test_rows_that_were_never_computed_are_an_error(checkpoint: Path) -> None:
    worker = Worker(checkpoint, hole=ALL, short=ALL)
    worker.step(("hole", 2, 1), ("short", 0, 3))
    with pytest.raises(CaptureError, match="tokens 0 to 1 were not computed for this request"):
        worker.taken("hole", 3)
    with pytest.raises(CaptureError, match="3 of 4 tokens have been seen: rows are missing"):
        worker.taken("short", 4)
    with pytest.raises(CaptureError, match="knows no request 'short'"):
        worker.taken("short", 3)


def test_a_tensor_of_other_rows_than_the_steps_tokens_is_an_error(checkpoint: Path) -> None:
    worker = Worker(checkpoint, short=ALL, fine=ALL)
    worker.rows.now = [Segment("short", 0, 3, 0)]
    worker.session.begin(worker.rows.now, 3)
    worker.model.block(torch.ones(1, 4))  # as layers do that compute a prompt's last token alone
    worker.session.end()
    worker.step(("fine", 0, 3))
    with pytest.raises(CaptureError, match="block has 1 rows in a step of 3 tokens"):
        worker.taken("short", 3)
    assert worker.taken("fine", 3) == ([0, 1, 2], [0, 1, 2])


def test_a_module_that_is_skipped_or_runs_twice_is_an_error(checkpoint: Path) -> None:
    worker = Worker(checkpoint, skipped=ALL, twice=ALL, fine=ALL)
    worker.step(("skipped", 0, 3), calls=0)
    worker.step(("twice", 0, 3), calls=2)
    worker.step(("fine", 0, 3))
    with pytest.raises(CaptureError, match=r"did not reach resid_post\.0"):
        worker.taken("skipped", 3)
    with pytest.raises(CaptureError, match=r"resid_post\.0: its module was called more than once"):
        worker.taken("twice", 3)
    assert worker.taken("fine", 3) == ([0, 1, 2], [0, 1, 2])


def test_terms_are_those_that_the_model_had_when_it_passed_them(checkpoint: Path) -> None:
    worker = Worker(checkpoint, **{name: {"points": {"resid_mid": [0]}} for name in "abc"}, plain={"points": {}})
    worker.step(("a", 0, 2), ("b", 0, 3))  # rows side by side
    worker.step(("plain", 0, 2), ("a", 2, 1), ("plain", 2, 1), ("c", 0, 2))  # and others between them
    for name, count in (("a", 3), ("b", 3), ("c", 2)):
        assert worker.taken(name, count, SUM)[1] == [11 * position for position in range(count)]


def test_boundaries_of_what_nobody_asks_for_are_passed_by(checkpoint: Path) -> None:
    worker = Worker(checkpoint, plain={"points": {}}, a=ALL)
    shown, at = [], worker.session.at
    worker.session.at = lambda boundary, tensors: (shown.append(boundary.module), at(boundary, tensors))  # type: ignore
    worker.step(("plain", 0, 2))
    worker.step(("a", 0, 1), ("plain", 2, 1))
    worker.step(("plain", 3, 1))
    assert shown == ["block"]


def test_a_request_is_dropped_before_its_points_were_seen(checkpoint: Path) -> None:
    """A model that fails in its first step leaves such requests: the client must be told why, and not of them."""
    worker = Worker(checkpoint, a=ALL, b=ALL)
    worker.session.begin([Segment("a", 0, 3, 0)])
    worker.session.drop("a")
    assert worker.session.requests == {}
    worker.step(("b", 0, 3))
    assert worker.taken("b", 3) == ([0, 1, 2], [0, 1, 2])


def test_slots_of_requests_that_have_ended_are_used_again(checkpoint: Path) -> None:
    names = [f"r{number}" for number in range(50)]
    worker = Worker(checkpoint, **dict.fromkeys(names, ALL))
    for name in names:
        worker.step((name, 0, 200))
        assert worker.taken(name, 200)[1] == list(range(200))
    assert len(worker.session.slabs.slabs[KEY]) == 256


def test_rows_that_nobody_takes_are_bounded(checkpoint: Path) -> None:
    names = [f"r{number}" for number in range(50)]
    worker = Worker(checkpoint, 2**14, runs=ALL, **dict.fromkeys(names, ALL))
    worker.step(("runs", 0, 300))
    for name in names:  # 100 rows of 16 bytes each
        worker.step((name, 0, 100))
        worker.rows.ended.add(name)
    assert [name for name in names if name in worker.session.requests] == names[-11:]
    assert worker.session.slabs.nbytes < 2 * 2**15
    with pytest.raises(CaptureError, match=r"nobody took them and others came: 16384 bytes are kept"):
        worker.taken("r0", 100)
    assert worker.taken("r49", 100)[0] == [*range(100)]
    assert worker.taken("runs", 300)[1] == [*range(300)]  # one that runs loses nothing


def test_requests_that_keep_no_rows_are_bounded_too(checkpoint: Path) -> None:
    names = [f"r{number}" for number in range(UNTAKEN + 9)]
    worker = Worker(checkpoint, **{name: {"points": {}} for name in names})
    for name in names:
        worker.step((name, 0, 1))
        worker.rows.ended.add(name)
    assert len(worker.session.requests) == UNTAKEN + 1


def test_requests_of_the_same_name_are_told_from_others(checkpoint: Path) -> None:
    worker = Worker(checkpoint, **dict.fromkeys(("1_n-aa", "0_n-aa", "n-bb", "m-n-cc"), ALL))
    worker.step(*((name, 0, 1) for name in ("1_n-aa", "0_n-aa", "m-n-cc")))
    assert worker.session.names("n") == ["0_n-aa", "1_n-aa"]
    worker.step(("n-bb", 0, 1))
    assert worker.session.names("n") == ["n-bb"]
    assert worker.session.names("m-n") == ["m-n-cc"]
    assert worker.session.names("m") == []
