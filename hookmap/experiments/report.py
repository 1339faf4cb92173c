"""What an experiment found, as a document: every figure of its tables and pictures."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from hookmap.evals.results import ACTIVATIONS, write
from hookmap.experiments.comparing import compare, holm, interval
from hookmap.experiments.document import Experiment
from hookmap.experiments.rewards import NAMES, TOTAL
from hookmap.experiments.separation import Geometry, geometry, probed
from hookmap.probes.report import Report as ProbeReport
from hookmap.stores import open_store

PROBES = "probes"
SIGNIFICANT = 0.05


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OfReward(_Document):
    """One reward after one prefix, over questions."""

    prefix: str
    reward: str
    mean: float
    low: float = Field(description="95 % interval, questions bootstrapped")
    high: float


class Comparison(_Document):
    """One prefix with neutral, paired by question."""

    prefix: str
    reward: str
    difference: float = Field(description="prefix minus neutral, mean over questions")
    low: float = Field(description="95 % interval, questions bootstrapped")
    high: float
    better: int = Field(description="questions on which the prefix is higher")
    worse: int
    test: str
    p: float
    p_holm: float = Field(description="corrected for all comparisons of the report")


class OfLayer(_Document):
    """A probe of one tensor."""

    point: str
    layer: int | None
    auroc: float | None
    low: float | None
    high: float | None
    shuffled: float | None = Field(description="the same with shuffled labels")


class Separation(_Document):
    """How well a linear probe tells the answers after a prefix from those after neutral."""

    prefix: str
    pool: str
    auroc: float | None = Field(description="of the layer chosen on the training part of each fold")
    low: float | None
    high: float | None
    shuffled: float | None
    control: str | None = Field(description="the best of what needs no model: lengths, words, log-probability")
    control_auroc: float | None
    layers: tuple[OfLayer, ...]


class Cosine(_Document):
    """Whether two prefixes move the mean the same way."""

    one: str
    other: str
    cosine: float | None


class OfTensor(_Document):
    """Means of one tensor."""

    point: str
    layer: int | None
    pool: str
    norms: dict[str, float] = Field(description="mean L2 norm by prefix")
    moved: dict[str, float] = Field(description="norm of the mean's difference from neutral's, over neutral's norm")
    cosines: tuple[Cosine, ...]


class Report(_Document):
    """Everything about one experiment."""

    format_version: Literal[1] = 1
    model: str
    data: str
    neutral: str
    prefixes: dict[str, str] = Field(description="name -> words")
    questions: int
    answers: int
    rewards: tuple[OfReward, ...]
    comparisons: tuple[Comparison, ...]
    separations: tuple[Separation, ...]
    tensors: tuple[OfTensor, ...]

    @property
    def significant(self) -> tuple[Comparison, ...]:
        """Comparisons that hold after the correction."""
        return tuple(one for one in self.comparisons if one.p_holm < SIGNIFICANT)


def make_report(
    experiment: Experiment,
    folder: Path,
    answers: Sequence[Mapping[str, Any]],
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """answers: the lines of answers.jsonl. What probes were fitted before a kill is not fitted again."""
    names = [prefix.name for prefix in experiment.prefixes]
    questions, table = _by_question(answers, names)
    others = [name for name in names if name != experiment.neutral]
    separations, tensors = _activations(experiment, folder, others, progress)
    return Report(
        model=experiment.model,
        data=experiment.samples.data,
        neutral=experiment.neutral,
        prefixes={prefix.name: prefix.text for prefix in experiment.prefixes},
        questions=len(questions),
        answers=len(answers),
        rewards=tuple(_of_reward(table, *key, experiment.report.seed) for key in table),
        comparisons=compared(table, others, experiment.neutral, experiment.report.seed),
        separations=separations,
        tensors=tensors,
    )


Table = dict[tuple[str, str], np.ndarray[Any, np.dtype[np.float64]]]
"""(prefix, reward) -> [questions], the mean over the answers to each"""


def _by_question(answers: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[list[str], Table]:
    questions = sorted({str(row["question"]) for row in answers})
    place = {question: number for number, question in enumerate(questions)}
    table: Table = {}
    for name in names:
        for reward in (*NAMES, TOTAL):
            total, count = np.zeros(len(questions)), np.zeros(len(questions))
            for row in answers:
                if row["prefix"] == name:
                    total[place[row["question"]]] += row["rewards"][reward]
                    count[place[row["question"]]] += 1
            table[name, reward] = total / count
    return questions, table


def compared(table: Table, others: Sequence[str], neutral: str, seed: int = 0) -> tuple[Comparison, ...]:
    """Each of the others with neutral, by each reward; Holm's correction is over all of them."""
    found = {(o, r): compare(table[o, r], table[neutral, r], seed) for o in others for r in (*NAMES, TOTAL)}
    corrected = holm([difference.p for difference in found.values()])
    return tuple(
        Comparison(
            prefix=prefix,
            reward=reward,
            difference=d.mean,
            low=d.low,
            high=d.high,
            better=d.better,
            worse=d.worse,
            test=d.test,
            p=d.p,
            p_holm=p_holm,
        )
        for ((prefix, reward), d), p_holm in zip(found.items(), corrected, strict=True)
    )


def _of_reward(table: Table, prefix: str, reward: str, seed: int) -> OfReward:
    low, high = interval(table[prefix, reward], seed)
    return OfReward(prefix=prefix, reward=reward, mean=float(table[prefix, reward].mean()), low=low, high=high)


def _activations(
    experiment: Experiment, folder: Path, others: Sequence[str], progress: Callable[[int, int], None] | None
) -> tuple[tuple[Separation, ...], tuple[OfTensor, ...]]:
    if experiment.captures is None:
        return (), ()
    store, how = open_store(folder / ACTIVATIONS), experiment.report
    wanted = [(name, pool) for pool in how.pools for name in others]
    separations = []
    for done, (name, pool) in enumerate(wanted):
        kept = folder / PROBES / f"{pool}-{name}.json"
        if not kept.is_file():
            kept.parent.mkdir(exist_ok=True)
            found = probed(store, name, experiment.neutral, pool, how)
            found.probes.save(kept.with_suffix(".safetensors"))
            write(kept, found.report.model_dump_json(indent=2) + "\n")
        separations.append(_separation(name, pool, ProbeReport.model_validate_json(kept.read_bytes())))
        if progress is not None:
            progress(done + 1, len(wanted))
    names = [prefix.name for prefix in experiment.prefixes]
    means = geometry(store, names, experiment.neutral, how)
    return tuple(separations), tuple(map(_of_tensor, means))


def _separation(name: str, pool: str, found: ProbeReport) -> Separation:
    chosen, best = found.chosen, found.best_control
    layers = tuple(
        OfLayer(**place.model_dump(include={"point", "layer", "auroc", "low", "high", "shuffled"}))
        for place in found.places
    )
    return Separation(
        prefix=name,
        pool=pool,
        auroc=chosen.auroc,
        low=chosen.low,
        high=chosen.high,
        shuffled=chosen.shuffled.auroc,
        control=best.name if best else None,
        control_auroc=best.auroc if best else None,
        layers=layers,
    )


def _of_tensor(found: Geometry) -> OfTensor:
    cosines = tuple(
        Cosine(one=one, other=other, cosine=None if math.isnan(value) else value)
        for (one, other), value in found.cosines.items()
    )
    return OfTensor(
        point=found.point, layer=found.layer, pool=found.pool, norms=found.norms, moved=found.moved, cosines=cosines
    )
