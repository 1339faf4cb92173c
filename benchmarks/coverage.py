"""How often intervals cover and tests raise a false alarm: `python benchmarks/coverage.py [docs/coverage.md]`.

Planted data, the functions of the reports themselves; a few minutes on one core. Writes the page's tables anew, between
its marks, or prints them.
"""

import argparse
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from hookmap.activations import Sample
from hookmap.analysis.intervals import difference_interval, mean_interval, proportion_interval
from hookmap.analysis.probes.controls import controls
from hookmap.analysis.probes.folds import grouped_folds
from hookmap.analysis.probes.metrics import independent
from hookmap.analysis.probes.run import Trial, auroc_score, p_value
from hookmap.evaluation.experiments.comparing import holm, sign_test
from hookmap.stores.memory import MemoryStore

RUNS = 200
"""planted captures of each setting of probes; of what is cheaper, more"""
Chance = np.random.Generator
Draw = Callable[[Chance, int], Any]


def share(hits: float, runs: int) -> str:
    """Per cent, with the Monte Carlo standard error."""
    return f"{100 * hits:.1f} ± {100 * np.sqrt(hits * (1 - hits) / runs):.1f}"


def table(head: list[str], rows: Iterator[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# Shares, means, differences


def proportions() -> Iterator[list[str]]:
    """Exactly: over all outcomes, weighted with their probability."""
    for count in (5, 10, 30, 100, 1319):
        intervals = [proportion_interval(k, count) for k in range(count + 1)]
        cells = []
        for truth in (0.5, 0.8, 0.95, 0.99):
            chance = stats.binom.pmf(np.arange(count + 1), count, truth)
            cells.append(
                f"{100 * sum(c for c, (low, high) in zip(chance, intervals, strict=True) if low <= truth <= high):.1f}"
            )
        yield [str(count), *cells]


MEANS: dict[str, tuple[Draw, float]] = {
    "right or wrong, 80 % right": (lambda chance, n: chance.random(n) < 0.8, 0.8),
    "right or wrong, 98 % right": (lambda chance, n: chance.random(n) < 0.98, 0.98),
    "mean of 4 draws, hard and easy questions": (
        lambda chance, n: chance.binomial(4, chance.beta(2, 0.2, n)) / 4,
        2 / 2.2,
    ),
    "a share of tokens, 0.4 on average": (lambda chance, n: chance.beta(4, 6, n), 0.4),
}


def _apart(better: float, worse: float) -> tuple[Draw, float]:
    def draw(chance: Chance, count: int) -> Any:
        place = chance.random(count)
        return (place < better) * 1.0 - (place > 1 - worse)

    return draw, better - worse


DIFFERENCES: dict[str, tuple[Draw, float]] = {
    "10 % better, 10 % worse": _apart(0.1, 0.1),
    "30 % better, 10 % worse": _apart(0.3, 0.1),
    "5 % better, none worse": _apart(0.05, 0.0),
    "of shares, small and skew": (lambda chance, n: chance.beta(1, 9, n) - 0.05, 0.05),
}


def means(kinds: dict[str, tuple[Draw, float]], interval: Callable[[Any], tuple[float, float]]) -> Iterator[list[str]]:
    chance, runs = np.random.default_rng(0), 10 * RUNS
    for name, (draw, truth) in kinds.items():
        cells = []
        for count in (5, 10, 30, 100):
            bounds = (interval(draw(chance, count)) for _ in range(runs))
            cells.append(share(np.mean([low <= truth <= high for low, high in bounds]), runs))
        yield [name, *cells]


def paired_tests() -> Iterator[list[str]]:
    """False alarms at 5 %, of differences whose signs are coins'."""
    chance = np.random.default_rng(1)
    kinds: dict[str, Draw] = {
        "10 % better, 10 % worse": _apart(0.1, 0.1)[0],
        "mean of 4 draws, after and before": lambda c, n: (c.binomial(4, 0.7, n) - c.binomial(4, 0.7, n)) / 4,
        "Student's t with 3 degrees of freedom": lambda c, n: c.standard_t(3, n),
    }
    for name, draw in kinds.items():
        cells = []
        for count, runs in ((5, 4 * RUNS), (10, 4 * RUNS), (30, 2 * RUNS), (100, RUNS)):
            ps = [sign_test(np.asarray(draw(chance, count)), seed)[0] for seed in range(runs)]
            cells.append(share(np.mean(np.array(ps) <= 0.05), runs))
        yield [name, *cells]
    cells = []
    for count, runs in ((5, RUNS), (10, RUNS), (30, RUNS), (100, RUNS)):
        wrong = 0
        for _ in range(runs):
            family = [sign_test(np.asarray(kinds["10 % better, 10 % worse"](chance, count)))[0] for _ in range(20)]
            wrong += min(holm(family)) < 0.05
        cells.append(share(wrong / runs, runs))
    yield ["any of 20 such comparisons after Holm's correction", *cells]


# Probes


def planted(
    chance: Chance, questions: int, copies: int, width: int, strength: float, places: int
) -> tuple[Any, Any, list[Any]]:
    """Labels by question, groups, and a matrix for each place, of which the first has the signal.

    Samples of one question share most of their rows.
    """
    labels = np.repeat(chance.permutation(np.arange(questions) % 2 == 0), copies)
    groups = np.repeat(np.arange(questions), copies)
    found = []
    for place in range(places):
        rows = np.repeat(chance.normal(size=(questions, width)), copies, axis=0)
        rows += 0.3 * chance.normal(size=rows.shape) * (copies > 1)
        rows[:, 0] += strength * labels * (place == 0)
        found.append(rows.astype(np.float32))
    return labels, groups, found


SETTINGS = [
    # questions, samples of each, features, folds, places, strength, method
    (20, 1, 8, 5, 1, 0.0, "ridge"),
    (40, 1, 64, 5, 1, 0.0, "ridge"),
    (100, 1, 16, 5, 1, 0.0, "logistic"),
    (100, 1, 16, 10, 1, 0.0, "mean_difference"),
    (40, 1, 16, 3, 6, 0.0, "ridge"),
    (40, 4, 16, 5, 6, 0.0, "ridge"),
    (40, 1, 16, 5, 6, 1.0, "ridge"),
    (100, 1, 16, 5, 6, 1.0, "logistic"),
    (100, 1, 16, 5, 1, 2.0, "ridge"),
    (40, 4, 16, 5, 1, 2.0, "mean_difference"),
    (100, 1, 16, 5, 1, 4.0, "ridge"),
    (200, 1, 64, 5, 6, 0.7, "mean_difference"),
]


def _named(setting: tuple[Any, ...]) -> list[str]:
    questions, copies, width, folds, places, strength, method = setting
    return [f"{questions} × {copies}", str(width), str(folds), str(places), f"{strength:g}", method]


def aurocs() -> Iterator[list[str]]:
    """The truth is the mean of all estimates: each is unbiased, for a test part is new to its probe."""
    for number, setting in enumerate(SETTINGS):
        questions, copies, width, folds, places, strength, method = setting
        chance, found = np.random.default_rng(number), []
        for seed in range(RUNS):
            labels, groups, matrices = planted(chance, questions, copies, width, strength, places)
            trial = Trial(labels, groups, folds, 1, seed, method)
            for place, matrix in enumerate(matrices):
                trial.take(("place", place, None), matrix)
            found.append(trial.score(float(trial.choice.aurocs[0])))
        truth = np.mean([one["auroc"] for one in found])
        held = np.mean([one["low"] <= truth <= one["high"] for one in found])
        size = np.mean([one["high"] - one["low"] for one in found])
        yield [*_named(setting), f"{truth:.3f}", share(held, RUNS), f"{size:.2f}"]


def permutations() -> Iterator[list[str]]:
    """False alarms at 5 % with 99 shuffles: of the chosen probe, and of any row."""
    for number, setting in enumerate(SETTINGS):
        questions, copies, width, folds, places, strength, method = setting
        if strength:
            continue
        chance, runs = np.random.default_rng(50 + number), RUNS
        chosen = rows = 0
        for seed in range(runs):
            labels, groups, matrices = planted(chance, questions, copies, width, strength, places)
            trial = Trial(labels, groups, folds, 99, seed, method)
            for place, matrix in enumerate(matrices):
                trial.take(("place", place, None), matrix)
            real, *shuffled = trial.choice.aurocs.tolist()
            chosen += p_value(real, np.array(shuffled)) <= 0.05
            best = max(float(told.aurocs[0]) for told in trial.told.values())
            rows += p_value(best, trial.most) <= 0.05
        yield [*_named(setting)[:4], method, share(chosen / runs, runs), share(rows / runs, runs)]


def words() -> Iterator[list[str]]:
    """The control of words, whose strength is chosen: prompts of 8 of 40 words, labels of chance."""
    for questions, runs in ((40, RUNS), (100, RUNS)):
        chance, held, found = np.random.default_rng(questions), 0, []
        for seed in range(runs):
            store = MemoryStore([])
            labels = chance.permutation(np.arange(questions) % 2 == 0)
            for sample in range(questions):
                text = " ".join(f"w{n}" for n in chance.integers(40, size=8))
                store.finish(Sample(sample, text, "", (sample, 1), 1, 0))
            folds = grouped_folds(labels, np.arange(questions), 5, seed)
            control = next(
                c for c in controls(store, range(questions), labels, folds) if c.name == "bag of words (prompt)"
            )
            assert control.auroc is not None
            score = auroc_score(control.auroc, independent(labels, np.arange(questions)), 5)
            found.append(control.auroc)
            held += score["low"] <= 0.5 <= score["high"]
        yield [str(questions), f"{np.mean(found):.3f}", share(held / runs, runs)]


def tables(wanted: list[str]) -> Iterator[tuple[str, str]]:
    """Their names and Markdown; all where none is named."""
    runs = f"\n{RUNS} planted captures each.\n"
    counts = ["n = 5", "n = 10", "n = 30", "n = 100"]
    setting = ["questions × samples", "features", "folds", "places", "strength", "method"]
    found: dict[str, Callable[[], str]] = {
        "proportions": lambda: table(["n", "share 0.5", "0.8", "0.95", "0.99"], proportions()),
        "means": lambda: table(["values", *counts], means(MEANS, lambda values: mean_interval(values, 0, 1))),
        "differences": lambda: table(["differences", *counts], means(DIFFERENCES, difference_interval)),
        "paired-tests": lambda: table(["differences", *counts], paired_tests()),
        "aurocs": lambda: table([*setting, "AUROC", "covers, %", "mean width"], aurocs()) + runs,
        "words": lambda: table(["questions", "AUROC", "covers, %"], words()) + runs,
        "permutations": lambda: table([*setting[:4], "method", "chosen, %", "any row, %"], permutations()) + runs,
    }
    for name in wanted or found:
        yield name, found[name]()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("page", nargs="?", type=Path, help="whose tables are written anew; printed alone without it")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--tables", nargs="*", default=[], help="these only")
    asked = parser.parse_args()
    RUNS, begun = asked.runs, time.process_time()
    for name, made in tables(asked.tables):
        print(f"{name}, {time.process_time() - begun:.0f} s of CPU\n{made}", flush=True)
        if asked.page is not None:
            text, marks = asked.page.read_text("utf-8"), rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
            text, count = re.subn(marks, lambda m, made=made: m[1] + made + m[2], text, flags=re.S)
            if count != 1:
                raise SystemExit(f"{asked.page}: expected one table {name}, found {count}")
            asked.page.write_text(text, "utf-8")
