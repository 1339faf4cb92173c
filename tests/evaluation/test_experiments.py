"""Experiments with prefixes: rewards see what they need, questions are paired, a kill loses nothing."""

import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.raises import raises

import hookmap
from hookmap.activations import Activation, Sample
from hookmap.cli.main import main
from hookmap.stores.memory import MemoryStore

pytest.importorskip("inspect_ai", reason='pip install "hookmap[eval]"')
pytest.importorskip("sklearn", reason='pip install "hookmap[eval]"')

from hookmap.evaluation.experiments import comparing, rewards
from hookmap.evaluation.experiments.document import Experiment, Reporting, load_experiment, schema
from hookmap.evaluation.experiments.report import compared
from hookmap.evaluation.experiments.separation import geometry, probed
from hookmap.evaluation.gsm8k.answers import SCORERS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("collected")]

PREFIXES = [{"name": "neutral", "text": "Here."}, {"name": "again", "text": "Here."}, {"name": "sad", "text": "Sad."}]
SMALL: dict[str, Any] = {
    "prefixes": PREFIXES,
    "place": "system",
    "samples": {"number": 4},
    "sampling": {"max_tokens": 6},
    "captures": {"points": ["resid_post"], "layers": [4, 16]},
    "report": {"method": "mean_difference", "folds": 3, "pools": ["last_prompt"]},
    "batch_size": 4,
}


# Rewards


@pytest.mark.parametrize(
    ("text", "strict", "flexible", "asked"),
    [
        ("3+4=7\n#### 7", 1, 1, 0),
        ("#### 7\n", 1, 1, 0),
        ("#### 1,234.5", 1, 1, 0),
        ("#### 7\nSo it is.", 0, 0, 0),
        ("#### 7 apples", 0, 1, 0),
        ("#### 7\n#### 8", 0, 1, 0),
        ("#### seven", 0, 0, 0),
        ("ANSWER: 7", 0, 1, 1),
        ("", 0, 0, 0),
        # What the scorer reads as a number is one here, too.
        *[(f"3+4=7\n#### {x}", 1, 1, 0) for x in (".5", "$-5", "-$5", "**5**", "3/4", "½", "\\boxed{5}", "1e3", "(5)")],
        ("**ANSWER: 3/4**", 0, 1, 1),
        ("#### 5 or 6", 0, 1, 0),
        ("#### 2^{10}", 0, 1, 0),
        ("#### 0x12", 0, 0, 0),
        ("#### 7 apples\n#### 8", 0, 1, 0),
    ],
)
def test_the_format_is_that_of_the_last_line(text: str, strict: int, flexible: int, asked: int) -> None:
    assert [rewards.format(text, name) for name in ("strict", "flexible", "inspect_evals")] == [strict, flexible, asked]


def test_what_has_the_form_is_read_by_the_scorer_as_the_number_that_it_is() -> None:
    """A line of one number in many writings, held against Python's own numbers."""
    for sign, digits, end in itertools.product(("", "-", "−", "$", "-$"), ("7", "1,234", "0.25", ".5"), ("", ".", "%")):
        line, value = (
            f"#### {sign}{digits}{end}",
            float(digits.replace(",", "")) * (-1 if sign[:1] in "-−" and sign else 1),
        )
        assert rewards.format(line, "strict") == 1.0 and float(SCORERS["strict"](line)) == value, line


def test_each_reward_is_given_what_it_needs_to_see_and_nothing_else() -> None:
    seen = {name: set(inspect.signature(getattr(rewards, name)).parameters) for name in rewards.NAMES}
    assert seen == {
        "correctness": {"text", "target", "scorer"},
        "format": {"text", "scorer"},
        "efficiency": {"tokens", "most"},
    }


def test_the_total_is_the_weighted_sum() -> None:
    weights = {"correctness": 1.0, "format": 0.2, "efficiency": 0.1, "scorer": "strict"}
    found = rewards.rewarded("#### 7", "7", 20, 80, weights)
    assert found == {"correctness": 1.0, "format": 1.0, "efficiency": 0.75, "total": pytest.approx(1.275)}
    assert rewards.rewarded("#### 8", "7", 200, 80, weights)["efficiency"] == 0.0


# Comparing


def test_right_and_wrong_are_compared_by_mcnemars_exact_test() -> None:
    """9 questions got better, 1 worse, 20 did not change: 2 * (1 + 10) / 2**10 by hand."""
    one, other = np.zeros(30), np.zeros(30)
    one[:9], other[9] = 1, 1
    found = comparing.compare(one, other)
    assert found.p == pytest.approx(22 / 1024) and found.test == "McNemar, exact"
    assert (found.better, found.worse) == (9, 1) and found.difference == pytest.approx(8 / 30)
    assert found.low < 8 / 30 < found.high


def test_other_differences_are_compared_by_flipping_signs() -> None:
    """By brute force over all flips; many questions by drawn ones, which are near the exact p."""
    apart = np.array([0.5, 1.0, -0.25, 2.0, 0.75, 1.5])
    sums = [
        abs(sum(s * a for s, a in zip(signs, apart, strict=True))) for signs in itertools.product((1, -1), repeat=6)
    ]
    p, test = comparing.sign_test(apart)
    assert p == np.mean([total >= abs(apart.sum()) - 1e-12 for total in sums]) and test == "sign flips, all"
    many = np.random.default_rng(0).normal(0.4, 1, 60)
    drawn, test = comparing.sign_test(many)
    from scipy.stats import ttest_1samp

    assert test == "sign flips, 10,000 drawn" and abs(drawn - ttest_1samp(many, 0).pvalue) < 0.01
    assert comparing.sign_test(np.zeros(5)) == (1.0, "no question differs")


def test_questions_are_paired_so_that_how_hard_they_are_falls_out() -> None:
    """Each question is a little better; between questions there is far more. Unpaired, nothing would be seen."""
    draw = np.random.default_rng(1)
    hard = draw.normal(0, 10, 40)
    found = comparing.compare(hard + 0.3 + draw.normal(0, 0.1, 40), hard)
    assert found.p < 0.001 and 0.25 < found.low < found.difference < found.high < 0.35
    with raises(ValueError, "two arrays"):
        comparing.compare(np.zeros(3), np.zeros(4))


def test_the_same_answers_in_another_order_are_no_difference() -> None:
    one, other = (np.array([sum(draws) / 3, 0.5]) for draws in ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1)))
    found = comparing.compare(one, other)
    assert one[0] != other[0] and (found.better, found.worse, found.difference, found.p) == (0, 0, 0.0, 1.0)


def test_intervals_of_rewards_are_never_a_point_and_say_how_few_they_are_of() -> None:
    """Clopper and Pearson's by SciPy for shares; a paired difference of nothing on 8 questions may still be one."""
    from scipy.stats import binomtest

    for right in (0, 3, 8):
        values = np.array([1.0] * right + [0.0] * (8 - right))
        exact = binomtest(right, 8).proportion_ci(method="exact")
        assert comparing.interval(values, 0, 1) == pytest.approx((exact.low, exact.high))
    low, high = comparing.interval(np.full(8, 0.5), 0, 1)
    assert low < 0.4 and high > 0.6
    few, many = (comparing.compare(np.ones(n), np.ones(n), span=1.0) for n in (8, 800))
    assert few.low < -0.1 < 0.1 < few.high and -0.01 < many.low < 0 < many.high < 0.01


def test_holms_correction_by_hand() -> None:
    assert comparing.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert comparing.holm([0.9, 0.6]) == [1.0, 1.0] and comparing.holm([]) == []


def test_the_correction_is_over_all_comparisons_of_a_report() -> None:
    """20 prefixes that do nothing: one of 80 has p below 0.05 by chance, and none after the correction. The seed is
    fixed; with others a false one stands in about one of 20 runs."""
    draw = np.random.default_rng(3)
    names = [f"p{n}" for n in range(20)]
    table = {(name, r): draw.normal(size=30) for name in ["neutral", *names] for r in (*rewards.NAMES, "total")}
    found = compared(table, names, "neutral")
    assert min(one.p for one in found) < 0.05 and not [one for one in found if one.p_holm < 0.05]


# Activations


def planted(strength: float, questions: int = 40) -> MemoryStore:
    """Three prefixes: neutral, nothing of its own; up and twin, moved along one direction in layer 7."""
    draw = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=draw), dim=0)
    store, number = MemoryStore([("resid_post", 3), ("resid_post", 7)]), 0
    for question in range(questions):
        for prefix in ("neutral", "up", "twin"):
            for layer in (3, 7):
                row = torch.randn(1, 16, generator=draw)
                if layer == 7 and prefix != "neutral":
                    row += strength * direction
                store.write(Activation(number, "resid_post", layer, 0, row))
            labels = {"question": f"q{question}", "prefix": prefix}
            store.finish(Sample(number, prefix, "", (number, 1), 1, 1, None, f"q{question}.{prefix}", labels))
            number += 1
    return store


def test_a_prefix_that_moves_one_layer_is_told_there() -> None:
    store = planted(3.0)
    found = probed(store, "up", "neutral", "mean", Reporting(folds=4)).report
    layers = {place.layer: place.auroc for place in found.places}
    assert layers[7] > 0.9 and layers[3] < 0.75 and found.questions == 40 and found.samples == 80
    tensors = {t.layer: t for t in geometry(store, ["neutral", "up", "twin"], "neutral", Reporting(pools=("mean",)))}
    assert tensors[7].cosines["up", "twin"] > 0.9 and tensors[7].moved["up"] > 2 * tensors[3].moved["up"]
    rows = torch.stack([store.read(n, "resid_post", 7)[0] for n in range(120)])
    by_hand = (rows[1::3].mean(0) - rows[0::3].mean(0)).norm() / rows[0::3].norm(dim=1).mean()
    assert tensors[7].moved["up"] == pytest.approx(float(by_hand), rel=1e-5)


def test_random_activations_are_told_by_chance() -> None:
    """80 samples of 40 questions: the standard deviation is about 0.065. The seed is fixed; with others a distance
    over 0.25 comes in about one of 5,000 runs."""
    found = probed(planted(0.0), "up", "neutral", "mean", Reporting(folds=4)).report
    assert abs(found.chosen.auroc - 0.5) < 0.25 and found.chosen.low < 0.5 < found.chosen.high


# The file


def test_the_bundled_example_is_accepted_and_the_published_schema_is_that_of_the_document() -> None:
    assert len(load_experiment("demo").prefixes) == 6
    docs = Path(__file__).resolve().parents[2] / "docs" / "experiment.schema.json"
    assert json.loads(docs.read_text("utf-8")) == schema(), "write it again: make schema"
    done = CliRunner().invoke(main, ["experiment", "--schema"])
    assert json.loads(done.stdout) == schema()


def test_all_that_is_wrong_with_a_file_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text("prefixes: [{name: a b, text: x}, {name: c, text: y}]\nsampling: {n: 3}\nmodle: demo\n", "utf-8")
    with pytest.raises(hookmap.DataError, match=r"prefixes.0.name(.|\n)*greedy answers(.|\n)*modle"):
        load_experiment(file)
    for text, told in [
        ("prefixes: [{name: a, text: x}, {name: a, text: y}]", "given twice: a"),
        ("prefixes: [{name: a, text: x}, {name: b, text: y}]", "none of the prefixes a, b"),
        ("sampling: {seed: 1}\nsampling: {seed: 2}", "sampling is given twice"),
        ("prefixes: [{name: neutral, text: x}, {name: b, text: y}]\nstages: [score]", "in this order"),
        ("- 1", "expected keys"),
        ("a: [", "is not YAML"),
        ("prefixes: [{name: a, text: x}, {name: b, text: y}]\nsampling: {top_p: 2}", r"(?s)none of the pref.*top_p"),
        ("prefixes: [{name: neutral, text: x}, {name: b, text: y}]\nrewards: {format: .inf}", "finite"),
        (
            "prefixes: [{name: a, text: x}]\ncaptures: {positions: banana}",
            "(?s)prefixes.*captures: .*positions 'banana'",
        ),
    ]:
        file.write_text(text, "utf-8")
        with pytest.raises(hookmap.DataError, match=told):
            load_experiment(file)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n', "utf-8")
    file = tmp_path / "e.yaml"
    file.write_text("prefixes: [{name: neutral, text: x}, {name: b, text: y}]\nsamples: {data: rows.jsonl}\n", "utf-8")
    found = load_experiment(file)
    assert found.samples.data == str(tmp_path / "rows.jsonl") and found.prompt == "gsm8k"


# What follows runs inspect_ai.

RUN = (
    "import sys, json; from hookmap.evaluation.experiments.run import run; "
    "from hookmap.evaluation.experiments.document import Experiment; "
    "run(Experiment.model_validate(json.loads(sys.argv[2])), sys.argv[1], *sys.argv[3:])"
)


def started(folder: Path, *stage: str) -> "subprocess.Popen[str]":
    """In a process of its own, to be killed."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), json.dumps(SMALL), *stage], stderr=subprocess.PIPE, text=True
    )


def killed_when(process: "subprocess.Popen[str]", there: Any) -> None:
    while process.poll() is None and not there():
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


# inspect_ai's own calls of what its dependencies have deprecated; here it runs in this process.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_kill_in_any_stage_loses_nothing_finished(tmp_path: Path) -> None:
    """Killed while it generates, and while it fits probes. What was done then is not done again, to the byte."""
    from inspect_ai.log import list_eval_logs, read_eval_log

    from hookmap.evaluation.experiments.run import run

    folder = tmp_path / "emotions"
    batches, probes = folder / "batches", folder / "probes"
    killed_when(started(folder), lambda: (batches / "000003").exists())
    assert (folder / "config.json").is_file() and not (folder / "generated.json").exists()
    (log,) = list_eval_logs(str(folder / "inspect"))
    before = {s.id: s.uuid for s in read_eval_log(log).samples or []}
    assert before, "nothing was finished before the kill: a batch did not reach the log"

    small = Experiment.model_validate(SMALL)
    run(small, folder, "generate")
    scoring = started(folder, "score")  # in a process that has not generated: no model is loaded, or known, in it
    assert scoring.wait() == 0, scoring.communicate()[1]
    killed_when(started(folder, "report"), lambda: any(probes.glob("*.json")))
    answers, fitted = (folder / "answers.jsonl").read_bytes(), {p.name: p.stat() for p in probes.glob("*.json")}
    assert run(small, folder)
    assert (folder / "answers.jsonl").read_bytes() == answers
    assert all((probes / name).stat().st_mtime_ns == was.st_mtime_ns for name, was in fitted.items())
    logs = [read_eval_log(found) for found in list_eval_logs(str(folder / "inspect"))]
    (whole,) = [log for log in logs if log.status == "success"]
    after = {s.id: s.uuid for s in whole.samples or []}
    assert len(after) == 12 and {name: after[name] for name in before} == before

    rows = [json.loads(line) for line in answers.splitlines()]
    store = hookmap.open_store(folder / "activations")
    assert store.finished and len(store) == len(rows) == 12 and store.verify() == []
    for row in rows:
        sample = store.by_id(row["id"])
        assert sample.text == row["text"] and sample.labels["prefix"] == row["prefix"]
        assert row["tokens"] == len(sample.token_ids) - sample.prompt_tokens <= 6

    report = json.loads((folder / "report.json").read_text("utf-8"))
    cut = [row for row in rows if row["truncated"]]  # the demo model answers in more than 6 tokens
    assert len(cut) == 12 and all(store.by_id(row["id"]).token_ids[-1] != 258 for row in cut)
    assert report["truncated"] == {"neutral": 4, "again": 4, "sad": 4} and len(report["warnings"]) == 3
    page = (folder / "report.html").read_text("utf-8")
    assert "Cut off at 6 tokens: 12 of 12 answers (4 after neutral" in page and "n = 4" in page
    assert all(one["low"] < one["high"] for name in ("rewards", "comparisons") for one in report[name])
    same = [one for one in report["comparisons"] if one["prefix"] == "again"]
    assert same and all(one["difference"] == 0 and one["p"] == 1 for one in same)  # greedy, the same words
    again_told = [one for one in report["separations"] if one["prefix"] == "again"]
    assert [one["auroc"] for one in again_told] == [0.5]
    assert "<svg" in (folder / "report.html").read_text("utf-8") and (folder / "differences.png").is_file()
    (scored,) = list_eval_logs(str(folder / "scored"))
    assert set(read_eval_log(scored).samples[0].scores["rewards"].value) == {*rewards.NAMES, "total"}
    the_folder_refuses_another_experiment(folder)


def the_folder_refuses_another_experiment(folder: Path) -> None:
    """On the folder of the test above: to make one takes seconds."""
    from hookmap.evaluation.experiments.run import run

    other = {**SMALL, "sampling": {"max_tokens": 7}, "samples": {"number": 3}}
    with pytest.raises(hookmap.StoreError, match=r"samples.number: there 4, now 3(.|\n)*max_tokens: there 6, now 7"):
        run(Experiment.model_validate(other), folder)
    heavier = Experiment.model_validate({**SMALL, "rewards": {"format": 2.0}})
    with pytest.raises(hookmap.StoreError, match=r"rewards.format: there 0.0, now 2.0(.|\n)*--again score"):
        run(heavier, folder)
    with raises(hookmap.StoreError, "rewards.format"):
        run(heavier, folder, again="report")
    before = (folder / "generated.json").read_bytes()
    report = run(heavier, folder, again="score")
    means = {(one.prefix, one.reward): one.mean for one in report.rewards}
    assert means["sad", "total"] == pytest.approx(2 * means["sad", "format"] + means["sad", "correctness"])
    assert (folder / "generated.json").read_bytes() == before


def test_a_stage_that_needs_another_says_so_and_what_cannot_be_kept_is_refused_first(tmp_path: Path) -> None:
    from hookmap.evaluation.experiments.run import run

    with raises(hookmap.StoreError, "score", "--stage configure"):
        run(Experiment.model_validate(SMALL), tmp_path / "e", "score")
    with raises(hookmap.SelectionError, "layer 99"):
        run(
            Experiment.model_validate({**SMALL, "captures": {"points": ["resid_post"], "layers": [99]}}), tmp_path / "e"
        )
    (tmp_path / "mine.txt").write_text("mine", "utf-8")
    with raises(hookmap.StoreError, "not empty"):
        run(Experiment.model_validate(SMALL), tmp_path, "configure")
    with raises(hookmap.StoreError, "cannot write", "mine.txt"):
        run(Experiment.model_validate(SMALL), tmp_path / "mine.txt")
