"""The probes of all tensors of one run, and their baseline, as they learn and are scored."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hookmap.activations import Key, call_of
from hookmap.analysis.probes.saved import About, Probes
from hookmap.analysis.probes.streamed.learner import Learner, Learning, Scaling, pieces
from hookmap.analysis.probes.streamed.reading import TOKENS, Block
from hookmap.analysis.probes.streamed.report import Place, Seen, StreamReport
from hookmap.analysis.probes.streamed.scores import Score, Scores, of_majority
from hookmap.analysis.probes.streamed.targets import CHOICE, TEST, TRAIN, Part, Targets
from hookmap.errors import SelectionError
from hookmap.stores.ledger import tensor_name

log = logging.getLogger("hookmap")

_SCORED = 4096
"""rows that are scored at a time"""
_OWN, _RANDOM = "own", "random"
_PARTS = (CHOICE, TEST)


class Trial:
    """A probe of each tensor, one of random directions of it, and one of the tokens alone."""

    def __init__(self, learning: Learning, targets: Targets) -> None:
        self._learning, self._targets = learning, targets
        self._learners: dict[Key, Learner] = {}
        self._random: dict[Key, Learner] = {}
        self._lost: dict[Key, int] = {}
        self.counting = True
        """whether rows that are left out are counted: of one pass, not of each"""
        count = 1 + max(each.question for each in targets.of.values())
        self._tests = np.zeros(count, dtype=bool)
        for each in targets.of.values():
            self._tests[each.question] = each.part == TEST
        self._scores: dict[tuple[str, Key, bool], Scores] = {}

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that was learnt, scored and left out, as tensors that a file can hold."""
        found = {f"lost/{tensor_name(key)}": torch.tensor(count) for key, count in self._lost.items()}
        for name, learners in ((_OWN, self._learners), (_RANDOM, self._random)):
            for key, learner in learners.items():
                found |= {f"{name}/{tensor_name(key)}/{part}": each for part, each in learner.state().items()}
        for (name, key, is_test), scores in self._scores.items():
            where = f"{name}-{_PARTS[is_test]}/{tensor_name(key)}"
            found |= {f"{where}/{part}": each for part, each in scores.state().items()}
        return found

    def restore(self, state: Mapping[str, torch.Tensor], keys: Sequence[Key]) -> None:
        """Go on from a `state` of the same run. Raises KeyError where the tensors are none."""
        for key in (*keys, TOKENS):
            name = tensor_name(key)
            if f"lost/{name}" in state:
                self._lost[key] = int(state[f"lost/{name}"])
            if own := _under(f"{_OWN}/{name}/", state):
                self._learners[key] = Learner.from_state(self._of_labels(key), own)
            if own := _under(f"{_RANDOM}/{name}/", state):
                self._random[key] = Learner.from_state(self._alone, own)
            for which in (_OWN, _RANDOM):
                for is_test, part in enumerate(_PARTS):
                    if own := _under(f"{which}-{part}/{name}/", state):
                        self._scores[which, key, bool(is_test)] = Scores.from_state(own)

    @property
    def _alone(self) -> Learning:
        """Of the real labels, without those of the controls."""
        return replace(self._learning, sets=1)

    def _of_labels(self, key: Key) -> Learning:
        return self._alone if key == TOKENS else self._learning

    def learn(self, key: Key, block: Block) -> None:
        """Learn a block of rows."""
        self._lose(key, block)
        if key not in self._learners:
            self._begin(key, block.rows)
        own = self._learners[key].to(block.rows.device)
        own.learn(block.rows, block.values[: own.learning.sets])
        if key in self._random:
            self._random[key].to(block.rows.device).learn(block.rows, block.values[:1])

    def _begin(self, key: Key, first: torch.Tensor) -> None:
        scaling = Scaling.of(first)
        width = first.shape[1]
        self._learners[key] = Learner(self._of_labels(key), scaling, width)
        if key != TOKENS:
            outputs = self._learning.outputs
            seen = scaling.random(width, outputs, self._learning.seed)
            self._random[key] = Learner(self._alone, seen, outputs)

    def _lose(self, key: Key, block: Block) -> None:
        if self.counting and block.lost:
            if not self._lost:
                log.warning("%s has rows that are not finite: they are left out.", tensor_name(key))
            self._lost[key] = self._lost.get(key, 0) + block.lost

    def score(self, key: Key, block: Block) -> None:
        """Score a block of rows that were not learnt."""
        self._lose(key, block)
        if key not in self._learners:
            return
        tests = torch.from_numpy(self._tests)[block.questions]
        for name, learner in ((_OWN, self._learners[key]), (_RANDOM, self._random.get(key))):
            if learner is None:
                continue
            learner.to(block.rows.device)
            for part, rows in pieces(block.rows, _SCORED):
                found = learner.scores(rows).cpu()
                values = block.values[: learner.learning.sets, part].cpu()
                for is_test in (True, False):
                    here = tests[part] == is_test
                    if bool(here.any()):
                        sums = self._sums(name, key, is_test, learner)
                        sums.take(found[here], values[:, here], block.questions[part][here])

    def _sums(self, name: str, key: Key, is_test: bool, learner: Learner) -> Scores:
        return self._scores.setdefault(
            (name, key, is_test), Scores(len(self._targets.classes), learner.learning.sets, len(self._tests))
        )

    def _score(self, name: str, key: Key, is_test: bool = True) -> Score | None:
        found = self._scores.get((name, key, is_test))
        return None if found is None else found.of()

    def _place(self, key: Key) -> Place:
        own, sums = self._score(_OWN, key), self._scores.get((_OWN, key, True))
        control = None if sums is None else sums.controls
        by_chance, choice = self._score(_RANDOM, key), self._score(_OWN, key, is_test=False)
        return Place(
            point=key[0],
            layer=key[1],
            call=call_of(key),
            score=own.value if own else None,
            low=own.low if own else None,
            high=own.high if own else None,
            control=control,
            selectivity=None if own is None or control is None else own.value - control,
            random_directions=by_chance.value if by_chance else None,
            choice=choice.value if choice else None,
            balanced_accuracy=sums.balanced if sums else None,
            log_loss=sums.log_loss if sums else None,
            correlation=sums.correlation if sums else None,
            not_finite=self._lost.get(key, 0),
        )

    def _seen(self, part: Part) -> Seen:
        own = [self._targets.of[number] for number in self._targets.numbers(part)]
        return Seen(texts=len(own), questions=len({t.question for t in own}), rows=self._targets.rows(part))

    def report(self, keys: Sequence[Key], *, begun: float, **settings: Any) -> StreamReport:
        """Raises SelectionError where no tensor had a row that is finite."""
        targets = self._targets
        places = tuple(map(self._place, keys))
        best = max(places, key=lambda each: -np.inf if each.choice is None else each.choice)
        if best.choice is None:
            raise SelectionError("no probe: no row that was to be learnt is finite.")
        learnt, tested = (
            np.concatenate([targets.of[n].values[0] for n in targets.numbers(part)]) for part in (TRAIN, TEST)
        )
        alone = self._score(_OWN, TOKENS)
        return StreamReport(
            kind=targets.kind,
            measure="accuracy" if targets.classes else "r2",
            per=targets.per,
            pool=targets.pool if targets.per == "text" else None,
            classes=targets.classes,
            seconds=round(time.perf_counter() - begun, 1),
            train=self._seen(TRAIN),
            choice=self._seen(CHOICE),
            test=self._seen(TEST),
            why_left_out=dict(targets.left_out),
            strangers=targets.strangers,
            simplest=of_majority(len(targets.classes), learnt, tested) if targets.classes else 0.0,
            tokens_alone=alone.value if alone else None,
            best=best,
            confusion=tuple(map(tuple, self._scores[_OWN, best.key, True].confusion.tolist())),
            places=places,
            **settings,
        )

    def probes(self, keys: Sequence[Key], about: About) -> Probes:
        """For rows as they are, and numbers in their own unit."""
        weights: dict[Key, torch.Tensor] = {}
        biases: dict[Key, float | torch.Tensor] = {}
        for key in keys:
            if key in self._learners:
                weight, bias = self._learners[key].readout()
                weight, bias = weight * self._targets.deviation, bias * self._targets.deviation + self._targets.mean
                classes = bool(about.classes)
                weights[key], biases[key] = (weight, bias) if classes else (weight[:, 0], float(bias[0]))
        return Probes(about, weights, biases)


def _under(start: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(start): each for name, each in state.items() if name.startswith(start)}
