"""A probe's report is true: of features that do not vary, of words, of chance, of probabilities, of labels."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.raises import raises

import hookmap
from hookmap.activations import Activation, Sample
from hookmap.analysis.probes.examples import read_examples
from hookmap.cli.main import main
from hookmap.demo import MODEL_PATH
from hookmap.stores.folder import write_store
from hookmap.stores.manifest import manifest_of_run
from hookmap.stores.memory import MemoryStore

pytest.importorskip("sklearn", reason='pip install "hookmap[eval]"')

from hookmap.analysis.probes.run import Trial, p_value, probe

pytestmark = pytest.mark.slow

METHODS = ("logistic", "ridge", "mean_difference")


def store_of(
    labels: Sequence[Any],
    *layers: Any,
    prompts: Sequence[str] | None = None,
    ids: Sequence[str | None] | None = None,
    name: str = "y",
) -> MemoryStore:
    """A sample for each label, of one row in each layer: layers are matrices [samples, features]."""
    store = MemoryStore([("resid_post", number) for number in range(len(layers))])
    for number, label in enumerate(labels):
        for layer, matrix in enumerate(layers):
            row = torch.as_tensor(np.asarray(matrix[number]), dtype=torch.float32)[None]
            store.write(Activation(number, "resid_post", layer, 0, row))
        known: Mapping[str, Any] | None = label if isinstance(label, Mapping) else {name: label}
        prompt = f"q{number}" if prompts is None else prompts[number]
        own = f"s{number}" if ids is None else ids[number]
        store.finish(Sample(number, prompt, "", (number, 1), 1, 1, None, own, known))
    return store


def noise(samples: int, features: int = 8, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(samples, features)).astype(np.float32)


def halves(samples: int, seed: int = 1) -> list[bool]:
    return [bool(x) for x in np.random.default_rng(seed).permutation(np.arange(samples) % 2 == 0)]


# Features that do not vary


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wobble", [0.0, 1e-7])
def test_a_constant_feature_has_no_say(method: str, wobble: float) -> None:
    """0.1 has no exact float32, and the float32 standard deviation of 60 of them is 2e-7: as a feature of that scale it
    had a weight of -1 beside nothing. A batch of another shape adds the last bits."""
    labels, rows = halves(60), noise(60, 6)
    rows[:, 0] += 2 * np.array(labels)
    rows[:, 3] = 0.1 * (1 + wobble * np.where(np.arange(60) % 3, 1, -1))
    weights = probe(store_of(labels, rows), "y", method=method, shuffles=1).probes.weights["resid_post", 0]
    assert abs(float(weights[3])) < 1e-4 * float(weights.norm()) and weights.norm() < 1e3
    assert int(weights.abs().argmax()) == 0


def test_a_layer_in_which_nothing_varies_has_no_probe_and_is_named(tmp_path: Path) -> None:
    labels = halves(60)
    still = 0.1 + np.zeros((60, 4))
    shaken = np.array([100.0, 1e-3, -3.0, 0.5]) * np.ones((60, 1)) + 1e-6 * noise(60, 4)  # the last bits of 100
    store = store_of(labels, still, noise(60, 4) + np.array(labels)[:, None], shaken)
    found = probe(store, "y", shuffles=1)
    why = {place.layer: place.why for place in found.report.places}
    assert why == {0: "no feature varies over the samples", 1: None, 2: "no feature varies over the samples"}
    assert {place.layer for place in found.report.chosen.places} == {1} and set(found.probes.weights) == {
        ("resid_post", 1)
    }
    assert tmp_path / "out" / "vector-resid_post.safetensors" in found.save(tmp_path / "out")
    write_store(store, tmp_path / "run", manifest_of_run(store.keys, model=None))
    said = CliRunner().invoke(main, ["probe", str(tmp_path / "run"), "--label", "y", "--shuffles", "1"])
    assert said.exit_code == 0 and said.stderr.count("no feature varies") == 2
    with raises(hookmap.SelectionError, "no feature varies"):
        probe(store, "y", layers=[0, 2], shuffles=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_every_layer_is_in_the_vector(tmp_path: Path, method: str, seed: int) -> None:
    """Also one whose probe tells less than nothing of what was held out: its direction stays."""
    from hookmap.analysis.steering import load_vector

    labels = halves(24, seed)
    found = probe(store_of(labels, noise(24, 5, seed), noise(24, 5, 9 + seed)), "y", method=method, shuffles=1, folds=4)
    found.save(tmp_path / "out")
    vector = load_vector(tmp_path / "out" / "vector-resid_post.safetensors")
    assert vector.layers == (0, 1) and all(float(vector[n].norm()) == pytest.approx(1, abs=1e-5) for n in (0, 1))
    rows = torch.from_numpy(noise(24, 5, seed))
    if method == "mean_difference":
        right = torch.tensor(labels)
        assert float((rows[right].mean(0) - rows[~right].mean(0)) @ vector[0]) > 0  # towards the label


# Words


def test_words_lose_nothing_by_their_treatment() -> None:
    """One of 20 rare words in each prompt tells the label; a tensor of the words' counts is no better than words."""
    draw = np.random.default_rng(0)
    words = [f"rare{n}" for n in range(20)]
    labels, prompts, counts = [], [], np.zeros((200, 60), dtype=np.float32)
    for number in range(200):
        told = int(draw.integers(20))
        fill = draw.integers(20, 60, size=12)
        labels.append(told < 10)
        prompts.append(" ".join([words[told], *(f"common{n}" for n in fill)]))
        np.add.at(counts[number], np.array([told, *fill]), 1)
    found = probe(store_of(labels, counts, prompts=prompts), "y", shuffles=1).report
    assert found.chosen.auroc > 0.8
    control = next(c for c in found.controls if c.name == "bag of words (prompt)")
    assert control.auroc > found.chosen.auroc - 0.02


def test_words_in_a_row_are_words() -> None:
    """ "not good" and "good", as often "not bad" and "bad": single words tell nothing."""
    labels, prompts = halves(120), []
    for number, label in enumerate(labels):
        first, second = ("good", "bad") if number % 2 else ("bad", "good")
        prompts.append(f"{first} not {second}" if label == (number % 2 == 0) else f"not {first} {second}")
    found = probe(store_of(labels, noise(120), prompts=prompts), "y", shuffles=1).report
    assert next(c for c in found.controls if c.name == "bag of words (prompt)").auroc > 0.95


# Chance


def test_no_interval_has_width_0() -> None:
    labels = halves(60)
    found = probe(store_of(labels, noise(60) + 50 * np.array(labels)[:, None]), "y", shuffles=19).report
    scores = [found.chosen, *found.places, *(c for c in found.controls if c.auroc is not None)]
    assert found.chosen.auroc == 1.0 and all(score.high - score.low > 0.1 for score in scores)


def test_intervals_of_noise_hold_a_half() -> None:
    """200 tensors of noise: with a coverage of 95 %, fewer than 185 hold it once in 25 such tests. A
    bootstrap of held-out scores, as if they were of one probe, holds it 80 to 90 % of the time (181 of these)."""
    held = 0
    for seed in range(200):
        chance = np.random.default_rng(seed)
        labels, rows = chance.permutation(np.arange(40) % 2 == 0), chance.normal(size=(40, 8)).astype(np.float32)
        trial = Trial(labels, np.arange(40), folds=5, count=1, seed=seed, method="ridge")
        trial.take(("resid_post", 0, None), rows)
        score = trial.score(float(trial.choice.aurocs[0]))
        held += score["low"] <= 0.5 <= score["high"]
    assert held >= 185


def test_p_is_the_share_of_shuffles_that_are_as_good() -> None:
    labels = halves(60)
    strong = probe(store_of(labels, noise(60) + 2 * np.array(labels)[:, None]), "y", shuffles=49).report
    assert strong.chosen.p == strong.places[0].p == 1 / 50 and strong.shuffles == 49 and strong.seconds >= 0


def test_p_of_noise_is_as_often_small_as_it_says() -> None:
    """Of 60 at 5 % more than 9 are 0.05 or less once in 500 such tests."""
    ps = []
    for seed in range(60):
        trial = Trial(np.array(halves(40, seed)), np.arange(40), folds=5, count=19, seed=seed, method="ridge")
        for layer in range(2):
            trial.take(("resid_post", layer, None), noise(40, 6, 100 * layer + seed))
        real, *shuffled = trial.choice.aurocs.tolist()
        ps.append(p_value(real, np.array(shuffled)))
    assert sum(p <= 0.05 for p in ps) <= 9 and 0.35 < np.mean(ps) < 0.65


def test_p_of_a_row_is_corrected_for_all_rows() -> None:
    """Of 12 layers of noise one is good by chance: its p is that of the best of twelve."""
    labels, layers = halves(40), [noise(40, 6, 300 + n) for n in range(12)]
    many = probe(store_of(labels, *layers), "y", method="ridge", shuffles=99).report
    best = max(many.places, key=lambda place: place.auroc)
    alone = probe(store_of(labels, layers[best.layer]), "y", method="ridge", shuffles=99).report.places[0]
    assert best.auroc == alone.auroc and best.p > 2 * alone.p


# Probabilities


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_of_noise_are_about_a_half(method: str) -> None:
    """More features than samples: on its training part each probe is sure, and on noise it has no reason to be."""
    labels, rows = halves(80), noise(80, 120)
    found = probe(store_of(labels, rows), "y", method=method, shuffles=1)
    confidence = sum(b.samples * max(b.probability, 1 - b.probability) for b in found.report.chosen.calibration) / 80
    assert confidence < 0.65
    new = torch.from_numpy(noise(400, 120, seed=7))
    said = torch.sigmoid(found.probes.logits(new, "resid_post", 0))
    assert float(torch.maximum(said, 1 - said).mean()) < 0.65


def test_probabilities_are_those_of_scikit_learns_calibration() -> None:
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from hookmap.analysis.probes.folds import grouped_folds

    labels = np.array(halves(120))
    rows = noise(120, 20) + 0.7 * labels[:, None] * (np.arange(20) < 2)
    folds = grouped_folds(labels, np.arange(120), 5, 0)
    cut = [(np.flatnonzero(folds != n), np.flatnonzero(folds == n)) for n in range(5)]
    found = probe(store_of(labels.tolist(), rows), "y", method="ridge", shuffles=1).probes

    class Ridge(RidgeClassifier):
        """Its penalty is of each sample."""

        def fit(self, x: Any, y: Any) -> Any:
            self.alpha = 0.1 * len(x)
            return super().fit(x, y)

    model = CalibratedClassifierCV(make_pipeline(StandardScaler(), Ridge()), method="sigmoid", cv=cut, ensemble=False)
    expected = model.fit(rows.astype(np.float64), labels).predict_proba(rows.astype(np.float64))[:, 1]
    said = torch.sigmoid(found.logits(torch.from_numpy(rows.astype(np.float32)), "resid_post", 0)).numpy()
    assert np.allclose(said, expected, atol=2e-3)


# Labels


def told(values: Sequence[Any], **how: Any) -> Any:
    return read_examples(store_of(values, noise(len(values), 1)), "y", **how)


@pytest.mark.parametrize("nothing", [None, float("nan"), "", "  ", "NaN", "null"])
def test_a_label_that_says_nothing_is_left_out_and_counted(nothing: Any) -> None:
    for how in ({"positive": "yes"}, {"positive": "no"}):
        found = told(["yes", nothing, "no", nothing, "yes"], **how)
        assert found.numbers == (0, 2, 4)
        assert found.left_out == {"label 'y' is blank, null or not a number": 2}
    assert told([1.5, nothing, -2], above=0).labels.tolist() == [True, False]
    assert told([True, nothing, False]).labels.tolist() == [True, False]
    assert told([1, nothing, 0]).labels.tolist() == [True, False]


def test_reasons_are_counted_each() -> None:
    store = store_of([{"y": 1}, {"z": 1}, {"y": None}, {"y": 0}, {"y": 0}, {"y": 1}], noise(6, 1))
    table = [{"id": f"s{n}", "q": None if n == 4 else "a"} for n in range(7)]
    found = read_examples(store, "y", table=table, group="q")
    assert found.numbers == (0, 3, 5) and found.strangers == 1
    assert found.left_out == {
        "no label 'y'": 1,
        "label 'y' is blank, null or not a number": 1,
        "no label 'q', which says what question it is of": 1,
    }


@pytest.mark.parametrize(
    ("values", "positive"),
    [
        ([1.0, 2, 1, "1", "1.0", " 1 "], 1),
        ([1.0, 2, 1, "1", "1.0", " 1 "], "1"),
        ([True, False, "true", "True", "TRUE", True], "True"),
        ([True, False, "true", "True", "TRUE", True], True),
        (["a", "b", "a ", " a", "a", "a"], "a"),
        ([np.int64(3), np.float32(2), np.float64(3), 3, "3", "3.0"], 3.0),
    ],
)
def test_a_value_is_one_however_it_is_written(values: list[Any], positive: Any) -> None:
    table = [{"id": f"s{n}", "told": value} for n, value in enumerate(values)]
    found = read_examples(store_of([0] * len(values), noise(len(values), 1)), "told", table=table, positive=positive)
    assert found.labels.tolist() == [True, False, True, True, True, True]


def test_groups_are_one_however_they_are_written() -> None:
    store = store_of([{"y": n % 2, "q": q} for n, q in enumerate([3, 3.0, "3", "3.0", 4, "four", "Four"])], noise(7, 1))
    assert read_examples(store, "y", group="q").groups.tolist() == [0, 0, 0, 0, 1, 2, 3]


@pytest.mark.parametrize(("yes", "no"), [("1", "0"), ("true", "false"), ("True", "False"), ("1.0", "0.0")])
def test_a_csv_file_says_yes_and_no(tmp_path: Path, yes: str, no: str) -> None:
    table = tmp_path / "told.csv"
    table.write_text(f"id,told\ns0,{yes}\ns1,{no}\ns2,\ns3,{yes}\n", "utf-8")
    found = read_examples(store_of([0] * 5, noise(5, 1)), "told", table=table)
    assert found.labels.tolist() == [True, False, True] and found.numbers == (0, 1, 3)
    assert found.left_out == {"label 'told' is blank, null or not a number": 1, "no label 'told'": 1}


def test_an_id_that_comes_again_must_say_the_same() -> None:
    store = store_of([0] * 3, noise(3, 1))
    again = [{"id": "s0", "told": 1}, {"id": "s1", "told": None}, {"id": "s0", "told": 1.0}, {"id": "s1", "told": "0"}]
    assert read_examples(store, "told", table=again).labels.tolist() == [True, False]
    apart = [*again, {"id": "s0", "told": 0}, {"id": "s1", "told": 1}]
    with pytest.raises(hookmap.SelectionError) as caught:
        read_examples(store, "told", table=apart)
    assert "id 's0' is 0, and was 1 before" in str(caught.value) and "id 's1' is 1, and was '0'" in str(caught.value)


def test_an_id_of_two_prompts_takes_no_label_of_a_table() -> None:
    store = store_of([0] * 3, noise(3, 1), ids=["a", "a", "b"])
    assert read_examples(store, "told", table=[{"id": "b", "told": 1}]).numbers == (2,)
    with raises(hookmap.SelectionError, "'a' is of several samples with different prompts"):
        read_examples(store, "told", table=[{"id": "a", "told": 1}])


def test_a_row_without_an_id_labels_nobody() -> None:
    store = store_of([0] * 3, noise(3, 1), ids=[None, "None", ""])
    for nobody in (None, "", float("nan")):
        with raises(hookmap.SelectionError, "an `id` among them"):
            read_examples(store, "told", table=[{"id": nobody, "told": 1}])
    assert read_examples(
        store_of([0] * 4, noise(4, 1), ids=list("0123")), "t", table=[{"id": 3.0, "t": 1}]
    ).numbers == (3,)


def test_blank_cells_are_said_on_the_command_line(tmp_path: Path) -> None:
    labels = halves(60)
    rows = noise(60) + 2 * np.array(labels)[:, None]
    store = store_of(labels, rows)
    write_store(store, tmp_path / "run", manifest_of_run(store.keys, model=None))
    table = tmp_path / "told.csv"
    cells = ["" if n % 4 == 0 else ("yes" if label else "no") for n, label in enumerate(labels)]
    table.write_text("id,told\n" + "".join(f"s{n},{cell}\n" for n, cell in enumerate(cells)), "utf-8")
    asked = [
        "probe",
        str(tmp_path / "run"),
        "--labels",
        str(table),
        "--label",
        "told",
        "--positive",
        "yes",
        "--shuffles",
        "1",
    ]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0 and "left out: 15 with label 'told' is blank" in done.stderr
    found = json.loads(CliRunner().invoke(main, [*asked, "--json"]).stdout)
    assert (found["samples"], found["left_out"]) == (45, 15)


# Captures


def test_a_capture_in_memory_is_probed_as_one_on_disk(tmp_path: Path) -> None:
    from hookmap.datasets import PromptRecord

    hm = hookmap.open(MODEL_PATH)
    prompts = [
        PromptRecord(f"Tom has {n % 8 + 1} apples and {n // 8} pears.", f"s{n}", {"many": n % 8 > 3}) for n in range(40)
    ]
    how: dict[str, Any] = {"points": ["resid_post"], "layers": [1, -1], "max_new_tokens": 0}
    run = hm.capture(prompts, **how)
    hm.capture(prompts, **how, store=tmp_path / "run")
    mine = probe(run, "many", layers=-1, pool="mean", shuffles=9).report
    theirs = probe(hookmap.open_store(tmp_path / "run"), "many", layers=-1, pool="mean", shuffles=9).report
    assert mine.places == theirs.places and mine.chosen == theirs.chosen and mine.model == theirs.model
    assert mine.places[0].layer == hm.map.num_layers - 1 and mine.chosen.auroc > 0.9
