"""A probe finds what was planted, reports chance where there is nothing, and never sees a question it is tested on."""

import json
import math
import tracemalloc
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
from hookmap.stores.folder import FolderWriter, write_store
from hookmap.stores.manifest import manifest_of_run
from hookmap.stores.memory import MemoryStore

pytest.importorskip("sklearn", reason='pip install "hookmap[eval]"')

from hookmap.analysis.probes import folds as crossval
from hookmap.analysis.probes.metrics import auroc, calibration, independent, recall_at
from hookmap.analysis.probes.run import probe
from hookmap.analysis.probes.saved import load_probes

KEYS = [("resid_post", 3), ("resid_post", 7)]
WIDTH = 24
PROMPT, ANSWER = 4, 3


def planted(questions: int = 60, per_question: int = 2, seed: int = 0, strength: float = 3.0) -> MemoryStore:
    """Samples whose label is written along one direction: of layer 7 only, in all rows from the prompt's last on."""
    draw = torch.Generator().manual_seed(seed)
    direction = torch.randn(WIDTH, generator=draw)
    direction /= direction.norm()
    store = MemoryStore(KEYS)
    for number in range(questions * per_question):
        question = number // per_question
        right = question % 2 == 0
        rows = PROMPT + ANSWER - 1
        for point, layer in KEYS:
            tensor = torch.randn(rows, WIDTH, generator=draw)
            if layer == 7:
                tensor[PROMPT - 1 :] += (strength if right else -strength) * direction
            store.write(Activation(number, point, layer, 0, tensor))
        ids = (question, *range(100, 100 + PROMPT - 1), *range(ANSWER))
        labels = {"correct": right, "score": question, "random": bool(torch.rand((), generator=draw) < 0.5)}
        prompt, text = f"question {question}", f"answer {number}"
        store.finish(Sample(number, prompt, text, ids, PROMPT, rows, None, f"s{number}", labels))
    return store


def test_auroc_counts_pairs_by_hand() -> None:
    labels = np.array([True, True, False, False])
    assert auroc(labels, np.array([3.0, 1.0, 2.0, 0.0])) == 0.75  # 3>2, 3>0, 1>0 of four pairs
    assert auroc(labels, np.array([1.0, 1.0, 1.0, 0.0])) == 0.75  # two ties count half
    assert math.isnan(auroc(np.array([True, True]), np.zeros(2)))


def test_auroc_compares_only_scores_of_one_fold() -> None:
    labels, scores = np.array([True, False, True, False]), np.array([1.0, 0.0, 11.0, 10.0])
    assert auroc(labels, scores) == 0.75
    assert auroc(labels, scores, np.array([0, 0, 1, 1])) == 1.0


def test_recall_at_one_percent_is_that_above_the_worst_negative_but_one_in_a_hundred() -> None:
    negatives = np.arange(200.0)  # two of them may pass: the threshold is the third highest, 197
    positives = np.array([500.0, 198.5, 197.0, 3.0])
    labels = np.array([False] * 200 + [True] * 4)
    assert recall_at(labels, np.concatenate([negatives, positives])) == 0.5
    assert recall_at(labels[150:], np.concatenate([negatives, positives])[150:]) == 0.25  # of 50 none may pass


def test_calibration_by_hand() -> None:
    found = calibration(np.array([True, False, True, True]), np.array([0.75, 0.75, 0.95, 0.95]))
    assert [(b.samples, b.probability, b.positives) for b in found.bins] == [(2, 0.75, 0.5), (2, 0.95, 1.0)]
    assert found.error == pytest.approx((2 * 0.25 + 2 * 0.05) / 4)
    assert found.brier == pytest.approx((0.0625 + 0.5625 + 2 * 0.0025) / 4)


def test_the_interval_counts_whole_questions() -> None:
    """Each question ten times over is no more evidence than once: the interval stays as wide."""
    labels, groups = np.random.default_rng(0).random(40) < 0.5, np.arange(40)
    assert independent(labels, groups) == (labels.sum(), (~labels).sum())
    assert independent(np.repeat(labels, 10), np.repeat(groups, 10)) == independent(labels, groups)
    uneven = np.array([0] * 97 + [1, 2, 3])  # one question has nearly all positives
    assert independent(np.ones(100, dtype=bool) & (np.arange(100) < 99), uneven)[0] < 1.1


def test_no_question_is_on_both_sides_of_a_split() -> None:
    groups = np.random.default_rng(0).integers(0, 40, 200)
    labels = groups % 3 == 0
    folds = crossval.grouped_folds(labels, groups, 5, seed=1)
    for number in range(5):
        assert not set(groups[folds == number]) & set(groups[folds != number])
    assert len(set(folds)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["logistic", "ridge", "mean_difference"])
def test_a_planted_direction_is_found_where_it_is(method: str) -> None:
    found = probe(planted(), method=method)
    places = {place.layer: place for place in found.report.places}
    assert places[7].auroc is not None and places[7].auroc > 0.99
    assert {place.layer for place in found.report.chosen.places} == {7} and found.report.best.layer == 7
    assert found.report.chosen.auroc > 0.99 and found.report.chosen.recall_at_1_percent > 0.9
    controls = {control.name: control for control in found.report.controls}
    assert controls["prompt length"].auroc == 0.5
    assert controls["logprob"].auroc is None and "no logits" in controls["logprob"].why
    direction = found.probes.vector("resid_post")[7]
    mine = planted()
    rows = torch.stack([mine.read(n, "resid_post", 7)[-1] for n in range(len(mine))])
    right = torch.tensor([s.labels["correct"] for s in mine.samples])
    truth = rows[right].mean(0) - rows[~right].mean(0)
    assert float(torch.nn.functional.cosine_similarity(direction, truth, 0)) > 0.8


@pytest.mark.slow
def test_points_may_name_layers_of_their_own() -> None:
    keys = [(place.point, place.layer) for place in probe(planted(), points={"resid_post": [7]}).report.places]
    assert keys == [("resid_post", 7)]
    with raises(hookmap.SelectionError, "leave layers out"):
        probe(planted(), points={"resid_post": [7]}, layers=[3])


@pytest.mark.slow
def test_random_labels_report_chance() -> None:
    """200 samples without structure: the AUROC's standard deviation is about 0.041. The seeds are fixed; with others
    a distance over 0.15 comes by chance in about one of 4,000 runs."""
    found = probe(planted(questions=200, per_question=1, strength=0.0), "random")
    assert abs(found.report.chosen.auroc - 0.5) < 0.15
    assert found.report.chosen.low < 0.5 < found.report.chosen.high
    assert abs(found.report.chosen.shuffled - 0.5) < 0.05 and found.report.chosen.p > 0.01


@pytest.mark.slow
def test_what_only_names_the_question_is_not_found() -> None:
    """Ten samples of each question share a random vector and a random label. A split by samples would find AUROC 1;
    by questions there are 40 of them, the standard deviation is 0.09, and 0.25 from chance is one run in 200."""
    draw = torch.Generator().manual_seed(5)
    store = MemoryStore(KEYS[:1])
    for number in range(400):
        own = torch.Generator().manual_seed(number // 10)
        row = torch.randn(1, WIDTH, generator=own) + 0.01 * torch.randn(1, WIDTH, generator=draw)
        right = bool(torch.rand((), generator=own) < 0.5)
        store.write(Activation(number, *KEYS[0], 0, row))
        store.finish(Sample(number, f"q{number // 10}", "", (number // 10, 1), 1, 1, None, None, {"correct": right}))
    assert abs(probe(store).report.chosen.auroc - 0.5) < 0.25
    by_sample = np.arange(400) % 5
    matrix = np.stack([store.read(n, *KEYS[0])[0].numpy() for n in range(400)])
    labels = np.array([s.labels["correct"] for s in store.samples])
    leaking = crossval.held_out(matrix, labels[None], by_sample, "logistic")
    assert auroc(labels, leaking.of_own(by_sample), by_sample) > 0.95


def test_the_layer_is_not_chosen_by_the_part_that_is_tested() -> None:
    """Three folds of two pairs; `won` of a fold without itself and one other is the inner AUROC's, without itself the
    outer's."""
    folds, labels = np.repeat([0, 1, 2], 2), np.array([[True, False] * 3])

    def says(outer: list[float], inner: list[list[float]], score: float) -> crossval.HeldOut:
        won = np.array(inner) * 1.0
        won[np.diag_indices(3)] = outer
        return crossval.HeldOut(np.full((6, 3), score), won[None], np.ones((1, 3)))

    choice = crossval.Choice[str](labels, folds)
    choice.take("a", says([0.1, 0.2, 0.3], [[0, 0.5, 0.9], [0.5, 0, 0.9], [0.5, 0.5, 0]], 1.0))
    choice.take("b", says([0.0, 0.0, 0.0], [[0, 0.8, 0.2], [0.8, 0, 0.2], [0.8, 0.8, 0]], 2.0))
    choice.take("as good as b", says([1.0, 1.0, 1.0], [[0, 0.8, 0.2], [0.8, 0, 0.2], [0.8, 0.8, 0]], 3.0))
    assert choice.places == {0: "b", 1: "b", 2: "a"} and choice.best == "a"
    assert choice.aurocs == pytest.approx([0.1])  # b's, b's and a's own folds: (0 + 0 + 0.3) / 3


@pytest.mark.parametrize("method", ["logistic", "ridge", "mean_difference"])
def test_the_nested_cross_validation_is_that_of_scikit_learn_by_hand(method: str) -> None:
    """Every probe fitted by itself on its own part, as nobody would who has many positions to probe."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import StandardScaler

    store = planted(questions=40, strength=0.3)
    labels = np.array([s.labels["correct"] for s in store.samples])
    matrix = np.stack([store.read(n, "resid_post", 7)[-1].numpy() for n in range(len(store))]).astype(np.float64)

    def score(train: Any, test: Any) -> Any:
        x, y = matrix[train], labels[train]
        if method == "mean_difference":
            return matrix[test] @ (x[y].mean(0) - x[~y].mean(0))
        scaler = StandardScaler().fit(x)
        model = LogisticRegression(C=0.1) if method == "logistic" else Ridge(alpha=0.1 * len(y))
        fitted = model.fit(scaler.transform(x), y if method == "logistic" else np.where(y, 1.0, -1.0))
        return scaler.transform(matrix[test]) @ fitted.coef_.ravel()

    groups = np.arange(len(labels)) // 2
    folds = crossval.grouped_folds(labels, groups, 5, seed=0)
    found = crossval.held_out(matrix.astype(np.float32), labels[None], folds, method)
    held = found.of_own(folds)
    for fold in range(5):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        assert not set(groups[train]) & set(groups[test])
        assert np.array_equal(np.argsort(held[test]), np.argsort(score(train, test)))
        won = pairs = 0.0
        for number in set(range(5)) - {fold}:
            mine, rest = np.flatnonzero(folds == number), np.flatnonzero((folds != fold) & (folds != number))
            count = labels[mine].sum() * (~labels[mine]).sum()
            won, pairs = won + count * roc_auc_score(labels[mine], score(rest, mine)), pairs + count
        assert found.inner[0, fold] == pytest.approx(won / pairs, abs=1e-9)


def paired(copies: int, questions: int = 40) -> MemoryStore:
    """Samples of one question have the same row; half of each question's are called `told`, each by chance `random`."""
    draw = torch.Generator().manual_seed(3)
    store = MemoryStore(KEYS[:1])
    for question in range(questions):
        row = torch.randn(1, WIDTH, generator=draw)
        for copy in range(copies):
            number = question * copies + copy
            store.write(Activation(number, *KEYS[0], 0, row))
            by_chance = bool(torch.rand((), generator=draw) < 0.5)
            labels = {"told": copy % 2 == 0, "random": by_chance}
            store.finish(Sample(number, f"q{question}", "", (question, 1), 1, 1, None, None, labels))
    return store


@pytest.mark.parametrize("seed", range(5))
def test_where_copies_of_a_row_have_both_labels_shuffled_ones_tell_nothing_either(seed: int) -> None:
    """Dealt sample by sample, they told between 0.26 and 0.77 by chance: of questions, which is not what is asked."""
    found = probe(paired(2), "told", seed=seed, shuffles=19).report
    assert found.chosen.auroc == 0.5 and found.chosen.shuffled == 0.5 and found.chosen.p == 1.0


def test_random_labels_of_repeated_rows_report_chance() -> None:
    """Of 40 questions with four equal rows each the AUROC's standard deviation is about 0.06; the mean of 100 deals is
    4 of its own away from 0.5 by 0.025, beside what the deals share."""
    found = probe(paired(4), "random").report.chosen
    assert found.low < 0.5 < found.high and abs(found.shuffled - 0.5) < 0.05 and found.p > 0.01


def test_shuffled_labels_of_a_question_are_those_of_another() -> None:
    groups = np.repeat(np.arange(30), 3)
    labels = np.arange(90) % 7 < 2
    mixed = crossval.shuffle(labels, groups, np.random.default_rng(1))
    assert sorted(np.bincount(groups, labels)) == sorted(np.bincount(groups, mixed)) and (mixed != labels).any()
    uneven = np.repeat(np.arange(20), np.arange(20) % 4 + 1)
    some = np.arange(len(uneven)) % 3 == 0
    assert crossval.shuffle(some, uneven, np.random.default_rng(1)).sum() == some.sum()


def test_shuffled_labels_stay_together_within_a_question_and_in_their_fold() -> None:
    groups = np.repeat(np.arange(50), 4)
    labels = groups % 2 == 0
    folds = crossval.grouped_folds(labels, groups, 5, seed=0)
    first, *rest = crossval.shuffles(labels, groups, folds, 20, seed=0)
    assert (first == labels).all() and len({row.tobytes() for row in rest}) == 20
    for mixed in rest:
        assert all(len(set(mixed[groups == g])) == 1 for g in range(50))
        assert (np.bincount(folds, mixed) == np.bincount(folds, labels)).all() and (mixed != labels).any()


@pytest.mark.slow
def test_each_position_is_probed_and_it_is_found_from_where_it_is_written() -> None:
    found = probe(planted(), pool="each", positions=slice(-3, 1), method="mean_difference")
    by = {(p.layer, p.position): p.auroc for p in found.report.places}
    assert {position for _, position in by} == {-3, -2, -1, 0}
    assert by[7, -1] > 0.99 and by[7, 0] > 0.99
    assert by[7, -3] < 0.8 and by[3, -1] < 0.8  # of 60 questions the standard deviation is 0.075
    assert found.report.best.position in (-1, 0)


def test_pools_are_means_of_the_rows_that_their_names_say() -> None:
    from hookmap.analysis.probes.pooling import matrices

    store = planted(4)
    rows = store.read(1, *KEYS[0])
    wanted = {"last": rows[-1], "last_prompt": rows[PROMPT - 1], "mean": rows.mean(0),
              "mean_prompt": rows[:PROMPT].mean(0), "mean_answer": rows[PROMPT:].mean(0)}  # fmt: skip
    for pool, expected in wanted.items():
        ((_, matrix),) = matrices(store, KEYS[0], [0, 1], pool, [None], 10**9)
        assert np.allclose(matrix[1], expected.numpy(), atol=1e-6), pool


@pytest.mark.parametrize(
    ("held", "pool", "expected"),
    [
        ((1, 3), "last", "no rows of the last token"),  # of the prompt alone
        ((1, 5), "last", 1),
        ((1, 3), "last_prompt", 1),
        ((1, 5), "last_prompt", "no rows of the last token of the prompt"),
        ((1, 3), "mean_answer", "no rows of the mean over those of the answer"),
        ((4, 5), "mean_prompt", "no rows of the mean over those of the prompt"),
        ((), "last", "no rows of the last token"),
        ((), "mean", "no rows of the mean"),
        ("mean", "last", "is one mean over positions"),
        ("mean", "mean_prompt", "is one mean over positions"),
        ("mean", "mean", 0),
    ],
)
def test_a_pool_is_not_made_of_other_tokens_than_its_name_says(held: Any, pool: str, expected: int | str) -> None:
    """Six tokens were fed, four of them the prompt's, and the capture holds some of them."""
    from hookmap.analysis.probes.pooling import matrices

    rows = torch.randn(1 if held == "mean" else len(held), WIDTH)
    store = MemoryStore(KEYS[:1])
    if len(rows):
        store.write(Activation(0, *KEYS[0], 0, rows))
    store.finish(Sample(0, "q", "a", tuple(range(7)), 4, len(rows), held))
    found = matrices(store, KEYS[0], [0], pool, [None], 10**9)
    if isinstance(expected, str):
        with pytest.raises(hookmap.SelectionError, match=expected):
            list(found)
    else:
        ((_, matrix),) = found
        assert np.array_equal(matrix[0], rows[expected].numpy())


def test_the_logprob_control_is_that_of_the_answers_tokens() -> None:
    from hookmap.analysis.probes.controls import logprob

    logits = torch.randn(6, 110)
    store = MemoryStore([("logits", None)])
    store.write(Activation(0, "logits", None, 0, logits))
    sample = Sample(0, "q", "a", (5, 6, 7, 8, 100, 101, 102), 4, 6)
    store.finish(sample)
    by_hand = np.mean([float(logits[p - 1].softmax(0)[t].log()) for p, t in ((4, 100), (5, 101), (6, 102))])
    assert logprob(store, sample) == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.slow
def test_memory_is_that_of_one_matrix_however_large_the_capture(tmp_path: Path) -> None:
    """24 MB on disk; a pooled matrix has 60 kB. What numpy and the reader hold at once is counted."""
    from hookmap.analysis.probes.pooling import matrices

    keys = [("resid_post", n) for n in range(12)]
    with FolderWriter.create(tmp_path / "run", manifest_of_run(keys, model=None)) as writer:
        for number in range(30):
            for point, layer in keys:
                writer.write(Activation(number, point, layer, 0, torch.randn(128, 512)))
            writer.finish(Sample(number, f"q{number}", "", tuple(range(129)), 128, 128))
    store = hookmap.open_store(tmp_path / "run")
    list(matrices(store, keys[0], range(30), "mean", [None], 10**9))  # what is imported on the way
    tracemalloc.start()
    for key in keys:
        for _, matrix in matrices(store, key, range(30), "mean", [None], 10**9):
            assert matrix.shape == (30, 512)
    _, pooled = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    allowed = 40 * 30 * 512 * 4
    for key in keys[:2]:
        for _, matrix in matrices(store, key, range(30), "each", range(-64, 0), allowed):
            assert matrix.shape == (30, 512)
    _, each = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pooled < 2_000_000 and each < 1.2 * allowed
    with raises(hookmap.SelectionError, "take 2 samples (--limit 2)"):
        next(matrices(store, keys[0], range(30), "mean", [None], 6 * 512 * 4 * 2))


@pytest.mark.slow
def test_probes_are_saved_as_they_are_and_steer(tmp_path: Path) -> None:
    found = probe(planted())
    written = {path.name for path in found.save(tmp_path / "probes")}
    assert {"report.json", "probes.safetensors", "vector-resid_post.safetensors"} <= written
    again = load_probes(tmp_path / "probes" / "probes.safetensors")
    rows = planted().read(0, "resid_post", 7)
    assert torch.allclose(again.logits(rows, "resid_post", 7), found.probes.logits(rows, "resid_post", 7))
    assert again.biases == found.probes.biases
    assert all(torch.equal(again.weights[key], weights) for key, weights in found.probes.weights.items())
    assert again.about == found.probes.about
    from hookmap.analysis.steering import load_vector

    vector = load_vector(tmp_path / "probes" / "vector-resid_post.safetensors")
    assert vector.layers == (3, 7) and float(vector[7].norm()) == pytest.approx(1, abs=1e-5)
    assert vector.interventions(2.0, [7])[0]["point"] == "resid_post"
    report = json.loads((tmp_path / "probes" / "report.json").read_text("utf-8"))
    assert report["positives"] == 60 and report["questions"] == 60
    with raises(hookmap.StoreError, "no probes that hookmap wrote"):
        load_probes(tmp_path / "probes" / "vector-resid_post.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("capture") / "run"
    write_store(planted(), path, manifest_of_run(KEYS, model="tiny"))
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["probe", *map(str, arguments)])


@pytest.mark.slow
def test_the_command_writes_report_pictures_and_probes(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("altair")
    done = run(folder, "--method", "mean_difference", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'out'}\n" and "chosen: resid_post 7" in done.stderr
    assert {"auroc.png", "auroc.html", "report.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    each = run(folder, "--method", "mean_difference", "--pool", "each", "--positions", "-1:1", "-o", tmp_path / "each")
    assert each.exit_code == 0 and (tmp_path / "each" / "auroc-resid_post.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_table_beside_the_capture_gives_labels(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "more.jsonl"
    table.write_text("".join(json.dumps({"id": f"s{n}", "even": n // 2 % 2 == 0}) + "\n" for n in range(100)), "utf-8")
    done = run(folder, "--label", "even", "--labels", table, "--method", "mean_difference", "--json", "--layers", "7")
    found = json.loads(done.stdout)
    assert (found["samples"], found["left_out"]) == (100, 20) and found["chosen"]["auroc"] > 0.99


@pytest.mark.slow
def test_numbers_of_a_csv_file_are_texts_and_count_as_numbers(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "more.csv"
    table.write_text("id,left\n" + "".join(f"s{n},{1.5 if n // 2 % 2 == 0 else -1}\n" for n in range(100)), "utf-8")
    asked = ("--label", "left", "--above", "0", "--labels", table, "--method", "mean_difference", "--layers", "7")
    found = json.loads(run(folder, *asked, "--json").stdout)
    assert (found["samples"], found["left_out"]) == (100, 20) and found["chosen"]["auroc"] > 0.99
    table.write_text("id,left\n" + "".join(f"s{n},{'many' if n else 2}\n" for n in range(100)), "utf-8")
    assert "above=0 needs numbers, found 'many'" in run(folder, *asked).stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--label", "corect"], "no sample has a label 'corect'. The labels here are correct, score, random"),
        (["--label", "score"], "--positive VALUE"),
        (["--label", "score", "--positive", "900"], "is never '900'"),
        (["--label", "score", "--above", "58.5"], "there are 1 of the rarer kind"),
        (["--points", "resid_mid"], "does not hold resid_mid"),
        (["--layers", "4"], "does not hold resid_post of layer 4"),
        (["--pool", "each", "--positions", "40:"], "no position"),
    ],
)
def test_what_cannot_be_probed_is_said(folder: Path, arguments: list[str], told: str) -> None:
    done = run(folder, *arguments)
    assert done.exit_code == 1 and told in done.stderr and "Traceback" not in done.stderr
