"""Streamed probes are held against scikit-learn, NumPy, and rows of a capture of the same texts."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.opened import opened
from support.raises import raises

import hookmap
from hookmap.activations import Activation, Key, Sample
from hookmap.analysis.dictionaries.dictionary import About, Dictionary
from hookmap.analysis.probes.saved import load_probes
from hookmap.analysis.probes.streamed.learner import Learner, Learning, Scaling
from hookmap.analysis.probes.streamed.progress import PROGRESS
from hookmap.analysis.probes.streamed.reading import TOKENS, Block, Takes
from hookmap.analysis.probes.streamed.run import _of_model, _of_store, train_probe
from hookmap.analysis.probes.streamed.scores import Scores
from hookmap.analysis.probes.streamed.targets import CHOICE, TEST, TRAIN, read_targets
from hookmap.analysis.probes.streamed.trial import Trial
from hookmap.cli.main import main
from hookmap.datasets import PromptRecord
from hookmap.errors import CaptureError, SelectionError, StoreError
from hookmap.stores.folder import write_store
from hookmap.stores.manifest import manifest_of_run
from hookmap.stores.memory import MemoryStore

KEYS: list[Key] = [("resid_post", 3), ("resid_post", 7)]
WIDTH, COLOURS = 12, ("red", "green", "blue")
LONG: dict[str, Any] = {"passes": 60, "batch_rows": 64, "learning_rate": 0.02}


def planted(texts: int = 240, seed: int = 0) -> MemoryStore:
    """Each text has a colour and a size, written into its last row of layer 7 only; each token a parity of its own."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(4, WIDTH, generator=draw)
    store = MemoryStore(KEYS)
    for number in range(texts):
        colour, size, length = number % 3, float(number % 7), 4 + number % 3
        ids = [int(token) for token in torch.randint(1, 30, (length,), generator=draw)]
        for layer in (3, 7):
            rows = torch.randn(length, WIDTH, generator=draw)
            if layer == 7:
                rows[-1] += 2 * directions[colour] + size * directions[3]
                rows[:, 0] += torch.tensor([5.0 if token % 2 else -5.0 for token in ids])
            store.write(Activation(number, "resid_post", layer, 0, rows))
        labels = {"colour": COLOURS[colour], "size": size, "odd": [token % 2 == 1 for token in ids], "same": 1}
        store.finish(Sample(number, f"q{number}", "", tuple(ids), length, length, None, f"s{number}", labels))
    return store


def last_rows(store: MemoryStore, numbers: Any, layer: int = 7) -> np.ndarray:
    return np.stack([store.read(number, "resid_post", layer)[-1].double().numpy() for number in numbers])


def scaled(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    return [(each - train.mean(0)) / train.std(0) for each in (train, *others)]


def learnt(rows: torch.Tensor, values: np.ndarray, learning: Learning) -> tuple[np.ndarray, np.ndarray]:
    learner = Learner(learning, Scaling.of(rows), rows.shape[1])
    while learner.seen < learning.rows:
        learner.learn(rows, torch.from_numpy(values)[None])
    weights, bias = learner.readout()
    return weights.numpy(), bias.numpy()


def test_softmax_goes_to_scikit_learns_solution() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    draw = np.random.default_rng(0)
    rows, classes = draw.normal(size=(300, 6)) * [1, 5, 0.2, 1, 1, 3] + 4, draw.integers(0, 3, 300)
    rows[:, 0] += classes
    learning = Learning(3, 1, 300 * 1500, batch=300, rate=0.05, decay=0.01)
    weights, bias = learnt(torch.from_numpy(rows).float(), classes.astype(float), learning)
    (x,) = scaled(rows)
    model = linear.LogisticRegression(C=1 / (300 * 0.01), tol=1e-10, max_iter=5000).fit(x, classes)
    own = rows @ weights + bias
    expected = x @ model.coef_.T + model.intercept_
    np.testing.assert_allclose(own - own.mean(1, keepdims=True), expected, atol=2e-3)


def test_least_squares_go_to_the_normal_equations() -> None:
    draw = np.random.default_rng(1)
    rows = draw.normal(size=(200, 5)) * [1, 4, 0.3, 1, 2] - 2
    values = rows @ [1.0, -0.5, 2.0, 0.0, 0.1] + draw.normal(size=200)
    values = (values - values.mean()) / values.std()
    learning = Learning(0, 1, 200 * 1500, batch=200, rate=0.05, decay=0.02)
    weights, bias = learnt(torch.from_numpy(rows).float(), values, learning)
    (x,) = scaled(rows)
    solved = np.linalg.solve(x.T @ x / 200 + 0.02 * np.eye(5), x.T @ values / 200)
    np.testing.assert_allclose(rows @ weights[:, 0] + bias, x @ solved, atol=2e-3)


@pytest.mark.slow
def test_sparse_rows_are_learnt_like_dense_ones_and_stay_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(2)
    dense = (draw.random((200, 40)) * (draw.random((200, 40)) < 0.1)).astype(np.float32)
    classes = (dense[:, 3] > 0).astype(float) + (dense[:, 5] > 0)
    rows = torch.from_numpy(dense).to_sparse()
    learning = Learning(3, 1, 200 * 3000, batch=200, rate=0.05, decay=0.01)
    monkeypatch.setattr(torch.Tensor, "to_dense", lambda *_: pytest.fail("a sparse matrix was written out"))
    weights, bias = learnt(rows, classes, learning)
    scaling = Scaling.of(rows)
    assert float(scaling.factor) == pytest.approx(1 / np.sqrt((dense[dense != 0] ** 2).mean()), rel=1e-5)
    linear = pytest.importorskip("sklearn.linear_model")
    x = dense * float(scaling.factor)
    model = linear.LogisticRegression(C=1 / (200 * 0.01), tol=1e-10, max_iter=5000).fit(x, classes)
    own = dense @ weights + bias
    np.testing.assert_allclose(own - own.mean(1, keepdims=True), x @ model.coef_.T + model.intercept_, atol=5e-3)


@pytest.mark.slow
def test_classes_are_found_where_they_are_written(tmp_path: Path) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    store = planted()
    found = train_probe(None, store, "colour", **LONG)
    report: Any = found.report
    assert (report.kind, report.per, report.measure) == ("classes", "text", "accuracy")
    assert report.classes == ("blue", "green", "red")
    three, seven = report.places
    assert seven.score > 0.95 and three.score < 0.6 and report.best.layer == 7
    assert seven.low < seven.score <= seven.high and seven.selectivity > 0.4
    assert abs(seven.control - 1 / 3) < 0.2 and seven.random_directions < seven.score
    assert report.simplest == pytest.approx(1 / 3, abs=0.1) and report.tokens_alone < 0.6
    targets = read_targets(store.samples, "colour")
    parts = {part: targets.numbers(part) for part in (TRAIN, CHOICE, TEST)}
    assert [len(each) for each in parts.values()] == [168, 24, 48]
    assert (report.train.texts, report.choice.texts, report.test.texts) == (168, 24, 48)
    names = [COLOURS[number % 3] for number in parts[TEST]]
    said = found.probes.logits(torch.from_numpy(last_rows(store, parts[TEST])), "resid_post", 7).argmax(1)
    assert seven.score == pytest.approx(
        np.mean([report.classes[n] == name for n, name in zip(said, names, strict=True)])
    )
    x, test = scaled(last_rows(store, parts[TRAIN]), last_rows(store, parts[TEST]))
    model = linear.LogisticRegression(C=1 / (168 * 1e-3), max_iter=5000).fit(x, [n % 3 for n in parts[TRAIN]])
    assert seven.score == pytest.approx(model.score(test, [n % 3 for n in parts[TEST]]), abs=0.05)
    confusion = np.array(report.confusion)
    assert confusion.sum() == 48 and np.trace(confusion) / 48 == pytest.approx(seven.score)
    found.save(tmp_path / "p")
    again = load_probes(tmp_path / "p" / "probes.safetensors")
    assert again.about.classes == report.classes and torch.equal(
        again.weights["resid_post", 7], found.probes.weights["resid_post", 7]
    )
    assert torch.equal(
        torch.as_tensor(again.biases["resid_post", 7]), torch.as_tensor(found.probes.biases["resid_post", 7])
    )
    assert json.loads((tmp_path / "p" / "report.json").read_text())["best"]["layer"] == 7
    vector = again.vector("resid_post", of="red")
    rows = last_rows(store, range(60))
    red = np.arange(60) % 3 == 0
    assert (rows[red] @ vector[7].numpy()).mean() > (rows[~red] @ vector[7].numpy()).mean()
    with raises(SelectionError, "of=None", "blue"):
        again.vector("resid_post")


@pytest.mark.slow
def test_numbers_are_found_in_their_own_unit() -> None:
    store = planted()
    found = train_probe(None, store, "size", kind="regression", **LONG)
    report: Any = found.report
    three, seven = report.places
    assert report.measure == "r2" and report.simplest == 0 and report.classes == ()
    assert three.score < 0.2 < 0.8 < seven.score and abs(seven.control) < 0.5 and seven.correlation > 0.9
    targets = read_targets(store.samples, "size", kind="regression")
    train, test = ([*targets.numbers(part)] for part in (TRAIN, TEST))
    truth = np.array([n % 7 for n in test], dtype=float)
    told = found.probes.logits(torch.from_numpy(last_rows(store, test)), "resid_post", 7).numpy()
    learnt_mean = np.mean([n % 7 for n in train])
    by_hand = 1 - ((told - truth) ** 2).sum() / ((truth - learnt_mean) ** 2).sum()
    assert seven.score == pytest.approx(by_hand, abs=1e-4)
    assert seven.correlation == pytest.approx(np.corrcoef(told, truth)[0, 1], abs=1e-4)
    x, other = scaled(last_rows(store, train), last_rows(store, test))
    y = np.array([n % 7 for n in train]) - learnt_mean
    solved = np.linalg.solve(x.T @ x / len(x) + 1e-3 * np.eye(WIDTH), x.T @ y / len(x))
    best = 1 - ((other @ solved + learnt_mean - truth) ** 2).sum() / ((truth - learnt_mean) ** 2).sum()
    assert seven.score == pytest.approx(best, abs=0.02)


@pytest.mark.slow
def test_labels_of_tokens_and_their_control_task() -> None:
    """The parity of a token's id is the token's: what a probe finds of it, the tokens alone tell as well."""
    report: Any = train_probe(None, planted(), "odd", skip=0, **LONG).report
    three, seven = report.places
    assert report.per == "token" and report.pool is None and report.classes == (False, True)
    store = planted()
    targets = read_targets(store.samples, "odd", skip=0)
    assert report.test.rows == sum(store.samples[n].rows for n in targets.numbers(TEST))
    assert seven.score > 0.98 and three.score < 0.65 and report.tokens_alone > 0.98
    # Each of 29 ids has a label of its own by chance; layer 7 knows only the parity.
    one = [targets.of[number] for number in targets.of]
    ids = np.concatenate([store.samples[number].token_ids for number in targets.of])
    dealt = np.concatenate([each.values[1] for each in one])
    assert all(len(set(dealt[ids == token])) == 1 for token in set(ids)) and set(dealt) == {0, 1}
    assert 0.4 < seven.control < 0.85
    assert train_probe(None, planted(), "odd", **LONG).report.test.rows < report.test.rows


def test_a_control_of_texts_is_another_questions_label() -> None:
    store = MemoryStore(KEYS[:1])
    for number in range(60):
        store.write(Activation(number, *KEYS[0][:2], 0, torch.zeros(2, 3)))
        labels = {"colour": COLOURS[number // 2 % 3]}
        store.finish(Sample(number, f"q{number // 2}", "", (number // 2, 1), 2, 2, None, None, labels))
    targets = read_targets(store.samples, "colour", shuffles=4)
    for part in (TRAIN, CHOICE, TEST):
        own = np.stack([targets.of[n].values[:, 0] for n in targets.numbers(part)])
        for deal in range(1, 5):
            assert sorted(own[:, 0]) == sorted(own[:, deal])
        assert {targets.of[n ^ 1].part for n in targets.numbers(part)} == {part}  # both samples of a question
    every = np.stack([each.values[:, 0] for each in targets.of.values()])
    assert (every[::2] == every[1::2]).all() and (every[:, :1] != every[:, 1:]).mean() > 0.3


TEXTS = [PromptRecord([(7 * n + 3 * m) % 90 + 1 for m in range(4 + n % 5)], f"t{n}", {"a": n % 3}) for n in range(40)]


@pytest.mark.parametrize("pool", ["last", "mean", "max"])
def test_a_model_that_runs_gives_the_rows_of_its_capture(pool: str) -> None:
    hm = opened("llama")
    run = hm.capture(TEXTS, ["resid_post", "mlp_post"], [0, 2], 0)
    asked = {"pool": pool, "skip": 1}
    blocks: dict[str, dict[Key, list[Block]]] = {"model": {}, "store": {}}

    def take(where: str) -> Any:
        return lambda key, block: blocks[where].setdefault(key, []).append(block)

    prepared = hm.prepare(TEXTS, ["resid_post", "mlp_post"], [0, 2], 0, batch_size=3)
    keys, targets, read = _of_model(prepared, 8, 0, "a", None, asked)
    read((TRAIN, TEST), 1, Takes(take("model")), set())
    _of_store(run.store, keys, run.samples, 8, 0, "a", None, asked)[1]((TRAIN, TEST), 1, Takes(take("store")), set())
    for key in (*keys, TOKENS):
        for where in blocks:
            held = blocks[where][key]
            assert len(held) > (2 if where == "model" else 0)
            rows = torch.cat([each.rows.to_dense() if each.rows.is_sparse else each.rows for each in held])
            questions = torch.cat([each.questions for each in held]).tolist()
            assert len(questions) == len(set(questions)) == len(targets.numbers(TRAIN, TEST))
            values = torch.cat([each.values[0] for each in held]).tolist()
            for row, question, value in zip(rows, questions, values, strict=True):
                (number,) = [n for n, each in targets.of.items() if each.question == question]
                assert value == number % 3
                tokens = run.samples[number].token_ids
                if key == TOKENS:
                    np.testing.assert_array_equal(row.numpy(), np.bincount(tokens, minlength=len(row)))
                    continue
                own = run.store.read(number, *key).float().numpy()
                expected = own[-1] if pool == "last" else own[1:].mean(0) if pool == "mean" else own[1:].max(0)
                np.testing.assert_allclose(row.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("pool", ["last", "mean", "max"])
def test_features_of_a_dictionary_stay_sparse(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hm = opened("gpt2")
    draw = torch.Generator().manual_seed(0)
    encoder = torch.randn(hm.map.d_model, 300, generator=draw) / hm.map.d_model**0.5
    sae = Dictionary(
        encoder, encoder.T.contiguous(), torch.full((300,), -1.0), torch.zeros(hm.map.d_model),
        about=About("resid_post", 1),
    )  # fmt: skip
    run = hm.capture(TEXTS, "features", max_new_tokens=0, dictionaries=[sae], store=tmp_path / "run")
    seen: dict[int, torch.Tensor] = {}

    def take(key: Key, block: Block) -> None:
        if key != TOKENS:
            assert block.rows.is_sparse
            seen.update(zip(block.questions.tolist(), block.rows.to_dense(), strict=True))

    asked = {"pool": pool, "skip": 1}
    prepared = hm.prepare(TEXTS, "features", "all", 0, dictionaries=[sae])
    keys, targets, read = _of_model(prepared, 16, 0, "a", None, asked)
    read((TRAIN,), 0, Takes(take), set())
    assert keys == (("features", 1),) and len(seen) == len(targets.numbers(TRAIN))
    for number in targets.numbers(TRAIN):
        own = run.read(number, "features", 1).to_dense()
        expected = own[-1] if pool == "last" else own[1:].mean(0) if pool == "mean" else own[1:].amax(0)
        torch.testing.assert_close(seen[targets.of[number].question], expected, check_dtype=False)
    monkeypatch.setattr(torch.Tensor, "to_dense", lambda *_: pytest.fail("a sparse matrix was written out"))
    for found in (
        hm.train_probe(TEXTS, "a", "features", dictionaries=[sae], pool=pool),
        train_probe(None, hookmap.open_store(tmp_path / "run"), "a", "features", pool=pool),
    ):
        assert found.probes.weights["features", 1].shape == (300, 3) and found.report.places[0].score is not None


@pytest.mark.slow
def test_rows_that_are_not_finite_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    store = planted()
    targets = read_targets(store.samples, "colour")
    broken = MemoryStore(KEYS)
    bad = {targets.numbers(TRAIN)[3], targets.numbers(TEST)[0]}
    for sample in store.samples:
        for key in KEYS:
            rows = store.read(sample.sample, *key)
            if sample.sample in bad and key[1] == 7:
                rows[-1, 2] = float("nan")
            broken.write(Activation(sample.sample, str(key[0]), key[1], 0, rows))
        broken.finish(sample)
    found: Any = train_probe(None, broken, "colour", **LONG).report
    assert [place.not_finite for place in found.places] == [0, 2] and found.places[1].score > 0.95
    assert sum(map(sum, found.confusion)) == 47 and "not finite" in caplog.text


def test_scores_are_numpys() -> None:
    draw = np.random.default_rng(0)
    scores, classes, questions = draw.normal(size=(50, 2, 4)), draw.integers(0, 4, (2, 50)), draw.integers(0, 9, 50)
    sums = Scores(4, 2, 9)
    for part in (slice(0, 20), slice(20, 50)):
        sums.take(*(torch.from_numpy(each) for each in (scores[part], classes[:, part], questions[part])))
    own = scores[:, 0] - np.log(np.exp(scores[:, 0]).sum(1, keepdims=True))
    right = own.argmax(1) == classes[0]
    whole: Any = sums.of()
    assert whole.value == pytest.approx(right.mean())
    assert sums.controls == pytest.approx((scores[:, 1].argmax(1) == classes[1]).mean())
    assert sums.log_loss == pytest.approx(-own[np.arange(50), classes[0]].mean())
    assert sums.balanced == pytest.approx(np.mean([right[classes[0] == each].mean() for each in range(4)]))
    assert Scores(4, 2, 9).of() is None and Scores(0, 1, 9).correlation is None


def test_what_cannot_be_learnt_is_refused() -> None:
    store = planted(40)
    for label, more, words in (
        ("color", {}, ("no text has a label 'color'", "colour, size, odd")),
        ("same", {}, ("the same wherever",)),
        ("colour", {"kind": "regression"}, ("needs numbers", "'red'")),
        ("colour", {"kind": "both", "pool": "first", "decay": -1}, ("kind", "pool", "decay")),
        ("colour", {"points": "resid_mid"}, ("resid_mid",)),
        ("colour", {"batch_size": 3}, ("batch_size", "a store")),
        ("colour", {"labels": lambda sample: [1, 2]}, ("has 2 values", "each of its 4 tokens")),
        ("x", {"labels": lambda sample: 1 if sample.sample else [1] * sample.rows}, ("one value for others",)),
        ("x", {"labels": lambda sample: None}, ("no label 'x'", "40 texts")),
        ("x", {"labels": lambda sample: [None] * sample.rows}, ("no token with a label",)),
        ("colour", {"group": "colour"}, ("3 questions", "10 at least")),
    ):
        with raises(SelectionError, *words):
            train_probe(None, store, label, **more)
    with raises(SelectionError, "1100 different values", "regression"):
        read_targets((Sample(n, f"q{n}", "", (n,), 1, 1, None, None, {"n": n}) for n in range(1100)), "n")
    with raises(CaptureError, "passes"):
        train_probe(None, store, "colour", passes=0)
    with raises(SelectionError, "hookmap.open"):
        train_probe(None, ["text"], "colour")
    hm = opened("mixtral")
    with raises(SelectionError, "router_indices"):
        hm.train_probe(TEXTS, "a", "router_indices")
    with raises(SelectionError, "every, mean"):
        hm.train_probe(TEXTS, "a", mean=True, every=2)
    empty = MemoryStore(KEYS)
    with raises(SelectionError, "no text has a label"):
        train_probe(None, empty, "colour")


SHORT: dict[str, Any] = {"layers": [0, 2], "passes": 3, "batch_rows": 4, "buffer_rows": 5, "batch_size": 3}


def same_result(one: Any, other: Any) -> bool:
    """Every number of the reports, and every bit of the probes."""
    told = [each.report.model_dump(exclude={"seconds"}) for each in (one, other)]
    return told[0] == told[1] and all(
        torch.equal(value, other.probes.weights[key])
        and torch.equal(torch.as_tensor(one.probes.biases[key]), torch.as_tensor(other.probes.biases[key]))
        for key, value in one.probes.weights.items()
    )


class Stop(Exception):
    pass


def blocks_until(patch: pytest.MonkeyPatch, last: float = float("inf")) -> list[Key]:
    """The tensors whose blocks are learnt or scored from now on; it stops at the block behind `last` of them."""
    seen: list[Key] = []

    def counted(of: Any) -> Any:
        def take(self: Trial, key: Key, block: Block) -> None:
            if len(seen) == last:
                raise Stop
            seen.append(key)
            of(self, key, block)

        return take

    for name in ("learn", "score"):
        patch.setattr(Trial, name, counted(getattr(Trial, name)))
    return seen


@pytest.mark.parametrize(("stop", "passes"), [(1, 0), (10, 0), (20, 1), (33, 2), (46, 2), (50, 3)])
def test_a_training_that_stopped_goes_on(
    tmp_path: Path, stop: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stopped: in the first buffers, in a later pass, while it scores; in classes and in numbers."""
    store, kind, folder = planted(60), "regression" if stop % 2 else "classes", tmp_path / "p"
    run: dict[str, Any] = {"label": "size", "kind": kind, "passes": 3, "batch_rows": 8, "buffer_rows": 6}
    monkeypatch.setattr("hookmap.analysis.probes.streamed.run._TEXTS", 5)
    monkeypatch.setattr("hookmap.analysis.kept.SECONDS", 0.0)
    with pytest.MonkeyPatch.context() as patch:
        every = blocks_until(patch)
        whole = train_probe(None, store, **run)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        blocks_until(patch, stop)
        train_probe(None, store, **run, store=folder)
    held = PROGRESS.open(folder)
    assert {path.name for path in folder.iterdir()} == {PROGRESS.file} and held.passes == passes
    with raises(StoreError, "another run", "passes: the folder has 3, this run has 4", "labels"):
        train_probe(None, store, **{**run, "passes": 4, "shuffles": 2}, store=folder, resume=True)
    with raises(StoreError, "already holds", "--resume"):
        train_probe(None, store, **run, store=folder)
    with pytest.MonkeyPatch.context() as patch:
        left = blocks_until(patch)
        again = train_probe(None, store, **run, store=folder, resume=True)
    assert same_result(again, whole)
    assert left == every[stop // 3 * 3 :]  # two layers and the tokens are a buffer
    assert {path.name for path in folder.iterdir()} == {"report.json", "probes.safetensors"}
    with raises(StoreError, "already holds a report", "-o DIR"):
        train_probe(None, store, **run, store=folder, resume=True)


KILLED = """
import os, signal, sys
from test_streamed_probes import SHORT, TEXTS
from support.opened import opened
from hookmap.analysis import kept
kept.SECONDS = 0.0
done = []
def stop(state):
    done.append(state)
    if len(done) > 20:
        os.kill(os.getpid(), signal.SIGKILL)
opened("llama").train_probe(TEXTS, "a", **SHORT, store=sys.argv[1], progress=stop)
"""


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_probes(tmp_path: Path) -> None:
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}:{Path(hookmap.__file__).parent.parent}"}
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "p"], env=env, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    held = PROGRESS.open(tmp_path / "p")
    assert held.passes == 1 and held.samples
    hm = opened("llama")
    for name, wrong in (
        ("passes", {"passes": 2}),
        ("tensors", {"layers": [1]}),
        ("learning_rate", {"learning_rate": 0.1}),
    ):
        with raises(StoreError, "another run", name):
            hm.train_probe(TEXTS, "a", **{**SHORT, **wrong}, store=tmp_path / "p", resume=True)
    with raises(StoreError, "another run", "settings.prompts"):
        hm.train_probe(TEXTS[:30], "a", **SHORT, store=tmp_path / "p", resume=True)
    again = hm.train_probe(TEXTS, "a", **SHORT, store=tmp_path / "p", resume=True)
    assert same_result(again, hm.train_probe(TEXTS, "a", **SHORT))
    with raises(StoreError, "no trainings of probes"):
        hm.train_probe(TEXTS, "a", **SHORT, store=tmp_path / "new", resume=True)
    (tmp_path / "broken").mkdir()
    for broken in (b"", b"\x10\0\0\0\0\0\0\0 nothing"):
        (tmp_path / "broken" / PROGRESS.file).write_bytes(broken)
        with raises(StoreError, "broken"):
            hm.train_probe(TEXTS, "a", **SHORT, store=tmp_path / "broken", resume=True)


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_the_command(tmp_path: Path) -> None:
    write_store(planted(), tmp_path / "run", manifest_of_run(KEYS, model="tiny"))
    asked = [
        "train-probe",
        "--store",
        str(tmp_path / "run"),
        "--label",
        "colour",
        "--passes",
        "30",
        "--batch-rows",
        "64",
    ]
    said = CliRunner().invoke(main, [*asked, "--learning-rate", "0.02", "-o", "out"])
    assert said.exit_code == 0, said.output
    assert said.stdout == "out\n" and "resid_post 7" in said.stderr and "3 classes" in said.stderr
    assert {path.name for path in Path("out").iterdir()} == {"report.json", "probes.safetensors"}
    Path("sizes.csv").write_text("id,weight\n" + "".join(f"s{n},{n % 7}\n" for n in range(200)))
    more = ["--label", "weight", "--table", "sizes.csv", "--kind", "regression", "--json"]
    found = json.loads(CliRunner().invoke(main, [*asked[:3], *more]).stdout)
    assert found["kind"] == "regression" and found["train"]["texts"] == 140 and found["why_left_out"]
    for wrong in (asked[:3], ["train-probe", "--label", "x"], [*asked, "--pool", "each"]):
        assert CliRunner().invoke(main, wrong).exit_code == 2
    unknown = CliRunner().invoke(main, [*asked[:3], "--label", "color"])
    assert unknown.exit_code == 1 and "colour" in unknown.stderr
    (tmp_path / "file").write_text("x")
    with raises(StoreError):
        train_probe(None, planted(), "colour").save(tmp_path / "file")
