"""Examples are held against a sort, in NumPy, of the rows of a capture of the same texts."""

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
from support import plain_hooks
from support.opened import RAGGED, opened
from support.raises import raises
from support.tiny_tokenizer import WORDS, tiny_tokenizer

import hookmap
from hookmap.activations import Activation, Key, Sample
from hookmap.analysis.dictionaries.dictionary import About, Dictionary
from hookmap.analysis.examples.best import NOTHING, Best, Entries, Rows
from hookmap.analysis.examples.collecting import Collector
from hookmap.analysis.examples.features import features_of
from hookmap.analysis.examples.files import EXAMPLES, open_examples
from hookmap.analysis.examples.page import save_page
from hookmap.analysis.examples.result import QUANTILES, Examples, Settings
from hookmap.analysis.examples.run import examples
from hookmap.cli.main import main
from hookmap.errors import CaptureError, SelectionError, StoreError
from hookmap.stores import sparse
from hookmap.stores.memory import MemoryStore

TEXTS = [[(7 * n + 3 * m) % 90 + 1 for m in range(4 + n % 5)] for n in range(30)]


def places(run: Any, key: Key, skip: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The rows of a tensor that may be examples, [n, d], and the sample and position of each."""
    rows, where = [], []
    for sample in run.samples:
        own = run.store.read(sample.sample, *key).flatten(1).float().numpy()
        for position in sample.row_positions[skip:]:
            rows.append(own[position])
            where.append((sample.sample, position))
    return np.stack(rows), where


@pytest.mark.slow
@pytest.mark.parametrize("new", [0, 4])
@pytest.mark.parametrize("how", [{"batch_size": 1}, {"batch_size": 7}])
def test_the_largest_values_are_those_of_a_sort(new: int, how: dict[str, Any]) -> None:
    hm = opened("llama")
    found = hm.examples(TEXTS, ["mlp_post", "z"], [0, 2], new, k=5, random=3, context=(3, 2), **how)
    run = hm.capture(TEXTS, ["mlp_post", "z"], [0, 2], new, **how)
    assert found.complete and len(found.samples) == len(TEXTS)
    for key in run.keys:
        rows, where = places(run, key, 1)
        for feature in range(0, rows.shape[1], 7):
            own = found.of(key, feature)
            np.testing.assert_allclose([each.value for each in own.top], np.sort(rows[:, feature])[::-1][:5], rtol=1e-6)
            assert own.density == pytest.approx((rows[:, feature] > 0).mean())
            assert len({(each.sample, each.position) for each in own.top}) == 5
            for each in (*own.top, *own.random):
                assert each.value == pytest.approx(rows[where.index((each.sample, each.position)), feature])
                sample = run.samples[each.sample]
                span = range(max(0, each.position - 3), min(sample.rows, each.position + 3))
                assert each.tokens == tuple(sample.token_ids[p] for p in span)
                around = run.store.read(each.sample, *key).flatten(1)[list(span), feature]
                np.testing.assert_allclose(each.values, around.float().numpy(), rtol=1e-6)
                assert span[each.at] == each.position and each.values[each.at] == pytest.approx(each.value)


def test_random_examples_do_not_depend_on_the_cut_and_are_not_the_largest() -> None:
    hm, how = opened("llama"), {"k": 4, "random": 8, "features": [0, 5]}
    one, other = (hm.examples(TEXTS, layers=[1], batch_size=size, **how) for size in (1, 9))
    drawn = [[(e.sample, e.position) for e in each.of(("mlp_post", 1), 5).random] for each in (one, other)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 8
    again = hm.examples(TEXTS, layers=[1], examples_seed=1, **how)
    assert drawn[0] != [(e.sample, e.position) for e in again.of(("mlp_post", 1), 5).random]
    values = [e.value for e in one.of(("mlp_post", 1), 5).quantiles]
    assert values == sorted(values, reverse=True) and len(values) == 5


@pytest.mark.slow
def test_only_values_above_0_where_that_is_asked() -> None:
    hm = opened("llama")
    found = hm.examples(TEXTS, layers=[1], k=400, random=400, positive=True, skip=0)
    rows, _ = places(hm.capture(TEXTS, "mlp_post", [1], 0), ("mlp_post", 1), 0)
    for feature in range(rows.shape[1]):
        own = found.of(("mlp_post", 1), feature)
        above = np.sort(rows[:, feature][rows[:, feature] > 0])[::-1]
        np.testing.assert_allclose([each.value for each in own.top], above[:400], rtol=1e-6)
        assert sorted(e.value for e in own.random) == sorted(e.value for e in own.top)


def test_norms_of_heads_and_products_with_directions() -> None:
    hm, direction = opened("llama"), torch.linspace(-1, 1, 32)
    heads = hm.examples(TEXTS, "z", [1], norms=True, k=3)
    z = hm.capture(TEXTS, "z", [1], 0)
    norms = torch.cat([z.store.read(s.sample, "z", 1)[1:] for s in z.samples]).norm(dim=-1)
    assert heads.names(("z", 1)) == [str(n) for n in range(norms.shape[1])]
    for head in range(norms.shape[1]):
        top = [each.value for each in heads.of(("z", 1), head).top]
        np.testing.assert_allclose(top, norms[:, head].sort(descending=True).values[:3].numpy(), rtol=1e-5)
    along = hm.examples(TEXTS, "resid_post", [1], directions={"up": direction, "down": -direction}, k=3)
    rows, _ = places(hm.capture(TEXTS, "resid_post", [1], 0), ("resid_post", 1), 1)
    expected = np.sort(rows @ direction.numpy())
    np.testing.assert_allclose([e.value for e in along.of(("resid_post", 1), "up").top], expected[::-1][:3], rtol=1e-4)
    np.testing.assert_allclose([e.value for e in along.of(("resid_post", 1), "down").top], -expected[:3], rtol=1e-4)


def test_the_best_of_many_batches_are_the_best_of_all() -> None:
    """Over more batches than k, so that candidates come few at a time, and with equal scores."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 40, (900, 17), generator=generator).float()
    best = Best(17, 6, 1)
    for start in range(0, 900, 50):
        part, numbers = scores[start : start + 50], torch.arange(start, start + 50)
        own = Rows(numbers, torch.zeros(50, dtype=torch.int64), numbers[:, None].int(), torch.arange(50)[:, None])
        best.absorb(best.entries(part, part, own))
    for feature in range(17):
        column = scores[:, feature]
        assert best.tensors["score"][feature].tolist() == column.sort(descending=True).values[:6].tolist()
        assert column[best.tensors["sample"][feature]].tolist() == best.tensors["score"][feature].tolist()
        assert len({*best.tensors["sample"][feature].tolist()}) == 6


def test_parts_of_a_run_merge(tmp_path: Path) -> None:
    hm = opened("llama")
    whole = hm.examples(TEXTS, layers=[1], k=5, random=5)
    parts = []
    for numbers in (range(11), range(11, 30)):
        found = Examples(whole.features, whole.settings, whole.keys, whole.about)
        run = hm.capture(TEXTS, "mlp_post", [1], 0)
        sink = Collector(found)
        for number in numbers:
            sink.write(Activation(number, "mlp_post", 1, 0, run.store.read(number, "mlp_post", 1)))
            sink.finish(run.samples[number])
        parts.append(found)
    parts[1].absorb(parts[0])
    for feature in range(20):
        one, other = (each.of(("mlp_post", 1), feature) for each in (parts[1], whole))
        np.testing.assert_allclose([e.value for e in one.top], [e.value for e in other.top], rtol=1e-5)
        assert [(e.sample, e.position) for e in one.random] == [(e.sample, e.position) for e in other.random]
    with raises(SelectionError, "samples [0"):
        whole.absorb(parts[0])
    with raises(SelectionError, "examples"):
        whole.absorb(hm.examples(TEXTS, layers=[1], k=4, random=5))


def test_rows_that_are_not_finite_are_no_examples(caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.randn(6, 3)
    rows[2, 1], rows[4, 0] = float("inf"), float("nan")
    found = Examples(features_of(), Settings(k=9, random=9, before=1, after=1, skip=0), (("mlp_post", 0),))
    sink = Collector(found)
    sink.write(Activation(0, "mlp_post", 0, 0, rows))
    sink.finish(Sample(0, "", "", tuple(range(6)), 6, 6))
    top = found.of(("mlp_post", 0), 2).top
    assert sorted(each.position for each in top) == [0, 1, 3, 5]
    assert found.tensors["mlp_post", 0].not_finite == 2 and "not finite" in caplog.text
    json.dumps(found.as_json(), allow_nan=False)


KILLED = """
import os, signal, sys
from support.opened import opened
from support.reductions import TEXTS
from hookmap.analysis import kept
kept.SECONDS = 0.0
def stop(state):
    if state.samples_done >= 5:
        os.kill(os.getpid(), signal.SIGKILL)
opened("llama").examples(TEXTS, layers=[1], k=3, batch_size=2, store=sys.argv[1], progress=stop)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_examples(tmp_path: Path) -> None:
    from support.reductions import TEXTS as FEW

    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent.parent}:{Path(hookmap.__file__).parent.parent}"}
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "e"], env=env, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = open_examples(tmp_path / "e")
    assert not there.complete and 0 < len(there.samples) < len(FEW)
    how = {"layers": [1], "k": 3, "batch_size": 2}
    found = opened("llama").examples(FEW, **how, store=tmp_path / "e", resume=True)
    whole = opened("llama").examples(FEW, **how)
    assert found.complete and found.as_json() == whole.as_json() == open_examples(tmp_path / "e").as_json()


def test_a_folder_is_of_one_run_and_a_broken_file_is_refused(tmp_path: Path) -> None:
    hm = opened("llama")
    hm.examples(RAGGED, layers=[1], features=[3], store=tmp_path / "e")
    file = tmp_path / "e" / EXAMPLES.file
    data = file.read_bytes()
    with raises(StoreError, "already holds examples"):
        hm.examples(RAGGED, layers=[1], features=[3], store=tmp_path / "e")
    with raises(StoreError, "another run", "features"):
        hm.examples(RAGGED, layers=[1], features=[4], store=tmp_path / "e", resume=True)
    for broken in (b"", data[: len(data) // 2], b"\x80\x04." + data):
        file.write_bytes(broken)
        with raises(StoreError, str(file)):
            open_examples(tmp_path / "e")
    with raises(StoreError, "no examples", "hookmap examples"):
        open_examples(tmp_path)


def test_what_has_no_examples_is_refused() -> None:
    hm = opened("mixtral")
    with raises(SelectionError, "features", "directions"):
        hm.examples(RAGGED, "resid_post", [1], features=[1, 1], directions={"a": torch.ones(2, 2)})
    with raises(SelectionError, "every, mean"):
        hm.examples(RAGGED, "resid_post", [1], every=2, mean=True)
    with raises(SelectionError, "features [99]", "0 to 31"):
        hm.examples(RAGGED, "resid_post", [1], features=[99])
    with raises(SelectionError, "vectors of 32", "3"):
        hm.examples(RAGGED, "resid_post", [1], directions=torch.ones(3))
    with raises(SelectionError, "router_indices"):
        hm.examples(RAGGED, "router_indices", [1])
    with raises(CaptureError, "k: expected"):
        hm.examples(RAGGED, "resid_post", [1], k=0)
    found = hm.examples(RAGGED, "resid_post", [1], features=[3])
    with raises(SelectionError, "feature 4", "3"):
        found.of(("resid_post", 1), 4)
    with raises(SelectionError, "resid_post.1"):
        found.of(("resid_post", 0), 3)


def test_experts_have_examples() -> None:
    hm = opened("mixtral")
    found = hm.examples(TEXTS, "router_logits", [1], k=2)
    rows, _ = places(hm.capture(TEXTS, "router_logits", [1], 0), ("router_logits", 1), 1)
    for expert in range(rows.shape[1]):
        top = [each.value for each in found.of(("router_logits", 1), expert).top]
        np.testing.assert_allclose(top, np.sort(rows[:, expert])[::-1][:2], rtol=1e-5)


def shown(found: Examples, key: Key, feature: int) -> list[Any]:
    own = found.of(key, feature)
    return [[(e.value, e.sample, e.position, e.tokens) for e in each] for each in (own.top, own.random, own.quantiles)]


def test_a_capture_has_the_examples_of_its_run(tmp_path: Path) -> None:
    hm, how = opened("llama"), {"k": 4, "random": 5, "context": (3, 2)}
    hm.capture(TEXTS, ["mlp_post", "z"], [0, 2], 0, store=tmp_path / "run")
    stored = hm.examples(hookmap.open_store(tmp_path / "run"), **how)
    run = hm.examples(TEXTS, ["mlp_post", "z"], [0, 2], **how)
    assert stored.complete and stored.keys == run.keys and len(stored.samples) == len(TEXTS)
    for key in run.keys:
        for feature in range(0, len(run.names(key)), 11):
            assert shown(stored, key, feature) == shown(run, key, feature)
    norms = hm.examples(hm.capture(TEXTS, "z", [2], 0), norms=True, **how)
    assert shown(norms, ("z", 2), 1) == shown(hm.examples(TEXTS, "z", [2], norms=True, **how), ("z", 2), 1)
    hm.capture(TEXTS, "mlp_post", [0], 0, positions="last", store=tmp_path / "last")
    hm.capture(TEXTS, "pattern", [0], 0, store=tmp_path / "wide")
    for folder, more, words in (
        ("last", {}, ("lacks rows", "capture all positions")),
        ("wide", {}, ("pattern", "no features")),
        ("run", {"batch_size": 3}, ("rows already",)),
        ("run", {"choices": True}, ("choices",)),
    ):
        with raises(SelectionError, *words):
            hm.examples(hookmap.open_store(tmp_path / folder), **more)
    with raises(SelectionError, "no finished sample", "--resume"):
        hm.examples(MemoryStore([("mlp_post", 0)]))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [2**22, 64])
def test_stored_features_of_a_dictionary_have_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """In pieces of few features, too: no matrix [tokens, features] is written out."""
    hm = opened("gpt2")
    how: dict[str, Any] = {"k": 3, "random": 4, "context": (3, 2)}
    encoder = torch.randn(hm.map.d_model, 200, generator=torch.Generator().manual_seed(0)) / hm.map.d_model**0.5
    bias = torch.full((200,), -1.2)
    sae = Dictionary(encoder, encoder.T.contiguous(), bias, torch.zeros(hm.map.d_model), about=About("resid_post", 1))
    hm.capture(TEXTS, "features", max_new_tokens=0, dictionaries=[sae], store=tmp_path / "run")
    run = hm.examples(TEXTS, dictionary=sae, **how)
    monkeypatch.setattr(sparse, "CHUNK", chunk)
    store = hookmap.open_store(tmp_path / "run")
    found = examples(None, store, "features", positive=True, **how)
    some = examples(None, store, "features", positive=True, features=[150, 3], **how)
    silent = 0
    for feature in range(200):
        own, other = found.of(("features", 1), feature), run.of(("resid_post", 1), feature)
        assert shown(found, ("features", 1), feature) == shown(run, ("resid_post", 1), feature)
        assert own.density == other.density and all(each.value > 0 for each in (*own.top, *own.random))
        silent += not own.top
        if own.top:
            around = [0.0 if value is None else value for value in own.top[0].values]
            np.testing.assert_allclose(around, other.top[0].values, rtol=1e-5, atol=1e-6)
    assert 0 < silent < 150
    assert some.names(("features", 1)) == ["150", "3"]
    assert shown(some, ("features", 1), 3) == shown(found, ("features", 1), 3)
    with raises(SelectionError, "sparse"):
        examples(None, store, "features", norms=True)


def test_choices_of_a_router_have_examples() -> None:
    hm = opened("mixtral")
    found = hm.examples(TEXTS, layers=[1], choices=True, k=3, random=4, batch_size=4)
    run = hm.capture(TEXTS, ["router_indices", "router_weights"], [1], 0)
    indices, where = places(run, ("router_indices", 1), 1)
    weights, _ = places(run, ("router_weights", 1), 1)
    experts = len(found.names(("router_weights", 1)))
    for expert in range(experts):
        mine = (indices == expert) * weights
        given = mine.max(1)
        own = found.of(("router_weights", 1), expert)
        np.testing.assert_allclose([each.value for each in own.top], np.sort(given[given > 0])[::-1][:3], rtol=1e-6)
        assert own.density == pytest.approx((given > 0).mean())
        for each in (*own.top, *own.random):
            assert each.value == pytest.approx(given[where.index((each.sample, each.position))])
    assert experts == 4 and found.keys == (("router_weights", 1),)
    with raises(SelectionError, "no mixture of experts"):
        opened("gpt2").examples(TEXTS, choices=True)
    with raises(SelectionError, "choices", "norms"):
        hm.examples(TEXTS, choices=True, norms=True)


@pytest.mark.slow
def test_quantile_samples_are_numpys_and_random_ones_are_even() -> None:
    hm = opened("llama")
    found = hm.examples(TEXTS, layers=[1], k=1, random=11, features=[0, 5])
    for feature in (0, 5):
        own = found.of(("mlp_post", 1), feature)
        values = [each.value for each in own.random]
        expected = np.quantile(values, QUANTILES, method="nearest")
        np.testing.assert_allclose([each.value for each in own.quantiles], expected)
    rows, where = places(hm.capture(TEXTS, "mlp_post", [1], 0), ("mlp_post", 1), 1)
    counts = np.zeros(len(where))
    for seed in range(60):
        drawn = hm.examples(TEXTS, layers=[1], k=1, random=20, features=[0], examples_seed=seed)
        for each in drawn.of(("mlp_post", 1), 0).random:
            counts[where.index((each.sample, each.position))] += 1
    # Each of n tokens is drawn 20 of n times: a binomial of 60, whose mean over a third of them is near that.
    share = 20 / len(where)
    order = np.argsort(rows[:, 0])
    assert all(abs(third.mean() / 60 - share) < 0.25 * share for third in np.array_split(counts[order], 3))


def test_an_empty_feature_has_no_examples() -> None:
    best = Best(2, 3, 1)
    best.absorb(Entries(*(torch.empty(0, dtype=torch.int64) for _ in range(5)), torch.empty(0, 1), torch.empty(0, 1)))
    assert (best.tensors["score"] == NOTHING).all()


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_the_command_and_its_page(tmp_path: Path) -> None:
    plain_hooks.build("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    text = " ".join(WORDS[:8])
    run = ["examples", str(tmp_path / "m"), "--layers", "1", "--prompt", text, "--context", "2,1", "--top", "3"]
    result = CliRunner().invoke(main, [*run, "-o", "e"])
    assert result.exit_code == 0, result.output
    assert result.stdout == "e\n" and "mlp_post.1" in result.stderr
    shown = CliRunner().invoke(main, ["examples", "--from", "e", "--features", "2,5", "--html", "p.html", "--json"])
    assert shown.exit_code == 0, shown.output
    document = json.loads(shown.stdout)
    assert [each["feature"] for each in document["features"]] == ["2", "5"]
    top = document["features"][0]["top"][0]
    assert top["tokens"][top["at"]] in WORDS and len(document["features"][0]["top"]) == 3
    page = (tmp_path / "p.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and WORDS[1] in page
    stored = ["capture", str(tmp_path / "m"), "--points", "mlp_post", "--layers", "1", "--prompt", text, "--no-chat"]
    kept = CliRunner().invoke(main, [*stored, "--max-new-tokens", "0", "-o", "c"])
    assert kept.exit_code == 0, kept.output
    of_rows = ["examples", "--store", "c", "--features", "2,5", "--context", "2,1", "--top", "3", "--json"]
    again = CliRunner().invoke(main, of_rows)
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["features"][0]["top"] == document["features"][0]["top"]
    for wrong in (["--features", "-3"], ["--context", "2"], ["--from", "e", "--features", "x"]):
        assert CliRunner().invoke(main, ["examples", *wrong]).exit_code == 2
    assert CliRunner().invoke(main, ["examples"]).exit_code == 2
    beyond = CliRunner().invoke(main, ["examples", "--from", "e", "--features", "5000"])
    assert beyond.exit_code == 1 and "5000" in beyond.stderr


def test_a_page_holds_any_text(tmp_path: Path) -> None:
    found = opened("llama").examples(RAGGED, layers=[1], features=[3], k=2)
    found.text = lambda token: "</script><b>&\ud800"
    page = save_page(found, tmp_path / "p.html").read_text()
    assert page.count("</script>") == 2  # the page's own
    with raises(SelectionError, "2000"):
        save_page(found, tmp_path / "p.html", {("mlp_post", 1): [3] * 2001})
