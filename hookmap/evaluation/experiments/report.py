"""The results of an experiment as a document, with each number of its tables and charts."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from hookmap.analysis.probes.report import Report as ProbeReport
from hookmap.documents import Frozen
from hookmap.evaluation.experiments.comparing import compare, holm, interval
from hookmap.evaluation.experiments.document import Experiment
from hookmap.evaluation.experiments.rewards import NAMES, TOTAL
from hookmap.evaluation.experiments.separation import Geometry, geometry, probed
from hookmap.evaluation.gsm8k.results import ACTIVATIONS, truncation_warning, write
from hookmap.stores import open_store

PROBES = "probes"
SIGNIFICANT = 0.05


class OfReward(Frozen):
    """The mean of one reward with one prefix, over the questions."""

    prefix: str
    reward: str
    mean: float
    low: float = Field(description="lower end of the 95 % interval over questions; `questions` says how many there are")
    high: float


class Comparison(Frozen):
    """One prefix compared with the neutral one, paired by question."""

    prefix: str
    reward: str
    difference: float = Field(
        description="mean over questions of the reward with the prefix minus that with the neutral one"
    )
    low: float = Field(description="lower end of the 95 % interval of the paired difference")
    high: float
    better: int = Field(description="number of questions on which the reward with the prefix is higher")
    worse: int
    test: str
    p: float
    p_holm: float = Field(description="p with Holm's correction for all comparisons of the report")


class OfLayer(Frozen):
    """The probe of one point and layer."""

    point: str
    layer: int | None
    call: int | None = Field(default=None, description="which run of a layer that runs several times")
    auroc: float | None
    low: float | None
    high: float | None
    shuffled: float | None = Field(description="the AUROC with shuffled labels")


class Separation(Frozen):
    """How well a linear probe separates answers with a prefix from answers with the neutral one."""

    prefix: str
    pool: str
    auroc: float | None = Field(description="AUROC of the layer that is chosen on the training part of each fold")
    low: float | None
    high: float | None
    shuffled: float | None = Field(description="mean AUROC with shuffled labels")
    p: float | None = Field(description="share of the shuffles whose AUROC is at least as high")
    control: str | None = Field(
        description="the best control that needs no activations: length, words, log-probability"
    )
    control_auroc: float | None
    layers: tuple[OfLayer, ...]


class Cosine(Frozen):
    """The cosine between the shifts of the mean that two prefixes cause."""

    one: str
    other: str
    cosine: float | None


class OfTensor(Frozen):
    """How the prefixes change the mean of one point and layer."""

    point: str
    layer: int | None
    call: int | None = Field(default=None, description="which run of a layer that runs several times")
    pool: str
    norms: dict[str, float] = Field(description="prefix -> mean L2 norm")
    moved: dict[str, float] = Field(
        description="prefix -> norm of its mean minus the neutral mean, over the norm of the neutral mean"
    )
    cosines: tuple[Cosine, ...]


class Report(Frozen):
    """The whole report of one experiment."""

    format_version: Literal[1] = 1
    model: str
    data: str
    neutral: str
    prefixes: dict[str, str] = Field(description="name -> text")
    questions: int
    answers: int
    max_tokens: int | None = Field(default=None, description="the most tokens of an answer")
    truncated: dict[str, int] = Field(
        default={}, description="prefix -> number of answers that were cut off at max_tokens; answers.jsonl marks them"
    )
    warnings: tuple[str, ...] = ()
    rewards: tuple[OfReward, ...]
    comparisons: tuple[Comparison, ...]
    separations: tuple[Separation, ...]
    tensors: tuple[OfTensor, ...]

    @property
    def cut(self) -> str:
        """A sentence that says how many answers were cut off; empty if none was."""
        if not any(self.truncated.values()):
            return ""
        told = ", ".join(f"{count} after {name}" for name, count in self.truncated.items() if count)
        return (
            f"Cut off at {self.max_tokens} tokens: {sum(self.truncated.values())} of {self.answers} answers ({told})."
        )

    @property
    def significant(self) -> tuple[Comparison, ...]:
        """The comparisons that are significant after the correction."""
        return tuple(one for one in self.comparisons if one.p_holm < SIGNIFICANT)


def make_report(
    experiment: Experiment,
    folder: Path,
    answers: Sequence[Mapping[str, Any]],
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """The report. answers: the lines of answers.jsonl. Probes that an interrupted run fitted are not fitted again."""
    names = [prefix.name for prefix in experiment.prefixes]
    questions, table = _by_question(answers, names)
    others = [name for name in names if name != experiment.neutral]
    separations, tensors = _activations(experiment, folder, others, progress)
    truncated = _truncated(answers, names, experiment.sampling.max_tokens)
    bounds = _bounds(experiment)
    return Report(
        model=experiment.model,
        data=experiment.samples.data,
        neutral=experiment.neutral,
        prefixes={prefix.name: prefix.text for prefix in experiment.prefixes},
        questions=len(questions),
        answers=len(answers),
        max_tokens=experiment.sampling.max_tokens,
        truncated=truncated,
        warnings=tuple(_warnings(answers, truncated, experiment.sampling.max_tokens)),
        rewards=tuple(_of_reward(table[key], *key, bounds[key[1]]) for key in table),
        comparisons=compared(table, others, experiment.neutral, experiment.report.seed, bounds),
        separations=separations,
        tensors=tensors,
    )


Table = dict[tuple[str, str], np.ndarray[Any, np.dtype[np.float64]]]
"""(prefix, reward) -> [questions], the mean over the answers to each question"""
Bounds = Mapping[str, tuple[float, float]]
"""reward -> its lowest and highest possible value"""


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


def compared(
    table: Table, others: Sequence[str], neutral: str, seed: int = 0, bounds: Bounds | None = None
) -> tuple[Comparison, ...]:
    """Compare each of the others with the neutral prefix, for each reward. Holm's correction covers all comparisons.

    bounds: the lowest and highest value of each reward that has such limits.
    """
    spans = {name: most - least or None for name, (least, most) in (bounds or {}).items()}
    found = {
        (o, r): compare(table[o, r], table[neutral, r], seed, spans.get(r)) for o in others for r in (*NAMES, TOTAL)
    }
    corrected = holm([difference.p for difference in found.values()])
    return tuple(
        Comparison(prefix=prefix, reward=reward, p_holm=p_holm, **asdict(difference))
        for ((prefix, reward), difference), p_holm in zip(found.items(), corrected, strict=True)
    )


def _of_reward(values: Any, prefix: str, reward: str, bounds: tuple[float, float]) -> OfReward:
    low, high = interval(values, *bounds)
    return OfReward(prefix=prefix, reward=reward, mean=float(values.mean()), low=low, high=high)


def _bounds(experiment: Experiment) -> Bounds:
    weights = [getattr(experiment.rewards, name) for name in NAMES]
    total = (sum(min(0.0, w) for w in weights), sum(max(0.0, w) for w in weights))
    return {**dict.fromkeys(NAMES, (0.0, 1.0)), TOTAL: total}


def _truncated(answers: Sequence[Mapping[str, Any]], names: Sequence[str], most: int) -> dict[str, int]:
    # Answers that an older version scored have no field `truncated`.
    cut = [row["prefix"] for row in answers if row.get("truncated", row["tokens"] >= most)]
    return {name: cut.count(name) for name in names}


def _warnings(answers: Sequence[Mapping[str, Any]], truncated: Mapping[str, int], most: int) -> Iterator[str]:
    for name, count in truncated.items():
        after = sum(row["prefix"] == name for row in answers)
        if warning := truncation_warning(count, after, most, f" after {name}"):
            yield warning


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
        report = _kept(kept)
        if report is None:
            kept.parent.mkdir(exist_ok=True)
            found = probed(store, name, experiment.neutral, pool, how)
            found.probes.save(kept.with_suffix(".safetensors"))
            report = found.report
            write(kept, report.model_dump_json(indent=2) + "\n")
        separations.append(_separation(name, pool, report))
        if progress is not None:
            progress(done + 1, len(wanted))
    names = [prefix.name for prefix in experiment.prefixes]
    means = geometry(store, names, experiment.neutral, how)
    return tuple(separations), tuple(map(_of_tensor, means))


def _kept(path: Path) -> ProbeReport | None:
    """The report of a probe that was fitted before; None where there is none, or one of another version."""
    try:
        return ProbeReport.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _separation(name: str, pool: str, found: ProbeReport) -> Separation:
    best = found.best_control
    return Separation(
        prefix=name,
        pool=pool,
        control=best.name if best else None,
        control_auroc=best.auroc if best else None,
        layers=tuple(OfLayer(**place.model_dump(include=set(OfLayer.model_fields))) for place in found.places),
        **found.chosen.model_dump(include={"auroc", "low", "high", "shuffled", "p"}),
    )


def _of_tensor(found: Geometry) -> OfTensor:
    cosines = tuple(
        Cosine(one=one, other=other, cosine=None if math.isnan(value) else value)
        for (one, other), value in found.cosines.items()
    )
    return OfTensor(**{**asdict(found), "cosines": cosines})
