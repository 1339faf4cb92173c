"""Statistics are held against NumPy on the rows of a capture of the same texts."""

import itertools
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
from safetensors.torch import load_file, save_file
from support import plain_hooks
from support.opened import RAGGED, opened
from support.raises import raises
from support.tiny_tokenizer import WORDS, tiny_tokenizer

import hookmap
from hookmap.activations import Activation, Sample
from hookmap.analysis.reductions.accumulators import Batch, Extrema, Moments
from hookmap.analysis.reductions.files import STATISTICS, open_statistics
from hookmap.analysis.reductions.reducer import Reducer
from hookmap.analysis.reductions.run import merged, reduce_store
from hookmap.analysis.reductions.statistics import Statistics
from hookmap.analysis.reductions.wanted import wanted
from hookmap.cli.main import main
from hookmap.datasets import PromptRecord
from hookmap.errors import CaptureError, SelectionError, StoreError, TokenizerError
from hookmap.stores.memory import MemoryStore

EVERYTHING = [
    "mean",
    "variance",
    "std",
    "skewness",
    "kurtosis",
    "min",
    "max",
    "covariance",
    "histogram",
    "norm",
    "cosine",
]
EDGES = [-2.0, -0.5, 0.0, 0.25, 1.0]
DIRECTION = torch.linspace(-1, 1, 32)
TOPICS = [PromptRecord(ids, f"p{n}", {"topic": "ab"[n % 2]}) for n, ids in enumerate(RAGGED * 3)]


def moments(rows: np.ndarray) -> dict[str, np.ndarray]:
    """What NumPy says of [n, …]."""
    apart = rows - rows.mean(0)
    variance = (apart**2).mean(0)
    return {
        "mean": rows.mean(0),
        "variance": variance,
        "std": np.sqrt(variance),
        "skewness": (apart**3).mean(0) / variance**1.5,
        "kurtosis": (apart**4).mean(0) / variance**2,
        "min": rows.min(0),
        "max": rows.max(0),
    }


def expected(rows: np.ndarray) -> dict[str, np.ndarray]:
    direction = DIRECTION.double().numpy()
    norms = np.sqrt((rows**2).sum(1))
    cosines = rows @ direction / norms / np.sqrt((direction**2).sum())
    bins = [
        np.concatenate([[(c < EDGES[0]).sum()], np.histogram(c, EDGES)[0], [(c > EDGES[-1]).sum()]]) for c in rows.T
    ]
    found = {**moments(rows), "covariance": np.cov(rows.T, ddof=0), "histogram": np.stack(bins)}
    found |= {f"norm.{name}": value for name, value in moments(norms).items()}
    return found | {f"cosine.{name}": value for name, value in moments(cosines).items()}


def agree(found: Any, rows: torch.Tensor, group: int | None = None) -> None:
    """Every number of a summary, or of one group of a table, against NumPy's."""
    for name, value in expected(rows.double().numpy()).items():
        own = found[name] if group is None else found[name][group]
        np.testing.assert_allclose(own.numpy(), value, rtol=1e-9, atol=1e-9, err_msg=name)


def rows_of(run: Any, key: Any) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """All rows of a tensor, and the sample, position and token of each."""
    where = [(s.sample, p, s.token_ids[p]) for s in run.samples for p in s.row_positions]
    return torch.cat([run.store.read(s.sample, *key) for s in run.samples]), where


def test_no_texts_are_told() -> None:
    """Of everything that sums up texts, or learns from them; and a capture without a sample."""
    hm, store = opened("llama"), MemoryStore([("resid_post", 1)])
    for run in (
        hm.reduce,
        hm.outliers,
        hm.examples,
        lambda texts: hm.train_dictionary(texts, "resid_post", 1),
        lambda texts: hm.train_probe(texts, "label"),
    ):
        with raises(TokenizerError, "no prompts given"):
            run([])
    with raises(SelectionError, "no finished samples"):
        reduce_store(store)


@pytest.mark.slow
@pytest.mark.parametrize("new", [0, 5])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_number_is_numpys(new: int, batch_size: int) -> None:
    hm, how = opened("llama"), {"max_new_tokens": new, "batch_size": batch_size}
    by = ["sink", "position", "token", "label:topic"]
    found = hm.reduce(TOPICS, ["resid_post", "z"], [0, 2], EVERYTHING[:-1], by=by, edges=EDGES, **how)
    cosines = hm.reduce(TOPICS, "resid_post", [0, 2], EVERYTHING, by=by, edges=EDGES, direction=DIRECTION, **how)
    run = hm.capture(TOPICS, ["resid_post", "z"], [0, 2], **how)
    assert found.complete and len(found.samples) == len(TOPICS)
    for key in run.keys:
        rows, where = rows_of(run, key)
        summary = found[key]
        assert summary.count == len(rows) and summary.not_finite == 0
        for name, value in moments(rows.double().numpy()).items():
            assert summary[name].shape == rows.shape[1:]
            np.testing.assert_allclose(summary[name].numpy(), value, rtol=1e-9, atol=1e-9, err_msg=name)
        if key[0] == "z":
            continue
        agree(cosines[key], rows)
        belongs = {
            "sink": ["sink" if position == 0 else "other" for _, position, _ in where],
            "position": [position for _, position, _ in where],
            "token": [token for _, _, token in where],
            "label:topic": ["ab"[sample % 2] for sample, _, _ in where],
        }
        for grouping, values in belongs.items():
            table = cosines[key].by(grouping)
            assert set(table.groups) == set(values)
            for place, group in enumerate(table.groups):
                own = rows[[value == group for value in values]]
                assert int(table.count[place]) == len(own)
                if len(own) > 3:  # of one row, variance is 0 and kurtosis is no number
                    agree(table, own, place)


@pytest.mark.parametrize("how", [{"positions": "last"}, {"positions": [0, 2]}, {"every": 2}, {"mean": True}])
@pytest.mark.parametrize("new", [0, 4])
def test_the_rows_are_those_that_a_capture_would_keep(how: dict[str, Any], new: int) -> None:
    hm = opened("gpt2")
    found = hm.reduce(RAGGED, "resid_mid", [1], ["mean", "max"], new, **how)
    run = hm.capture(RAGGED, "resid_mid", [1], new, **how)
    rows = torch.cat([run.store.read(s.sample, "resid_mid", 1) for s in run.samples]).double()
    torch.testing.assert_close(found["resid_mid", 1]["mean"], rows.mean(0))
    torch.testing.assert_close(found["resid_mid", 1]["max"], rows.amax(0))


@pytest.mark.slow
def test_edits_are_in_the_rows_and_narrow_dtypes_are_summed_up_wide() -> None:
    hm = hookmap.open(plain_hooks.build("llama", torch.bfloat16), tokenizer=tiny_tokenizer())
    edits = [{"do": "scale", "point": "resid_post", "layers": [1], "factor": 3.0}]
    found = hm.reduce(RAGGED, "resid_post", [1], ["mean", "variance"], interventions=edits)
    run = hm.capture(RAGGED, "resid_post", [1], 0, interventions=edits)
    rows = torch.cat(run["resid_post", 1]).double()
    np.testing.assert_allclose(found["resid_post", 1]["mean"].numpy(), rows.mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(
        found["resid_post", 1]["variance"].numpy(), rows.var(0, correction=0).numpy(), rtol=1e-12
    )


def test_a_stored_capture_gives_the_same(tmp_path: Path) -> None:
    hm = opened("llama")
    run = hm.capture(TOPICS, "resid_post", [0, 2], 3, store=tmp_path / "c")
    how: dict[str, Any] = {"reductions": EVERYTHING[:-1], "by": ["position", "label:topic"], "edges": EDGES}
    here = reduce_store(hookmap.open_store(tmp_path / "c"), layers=[2], **how)
    there = hm.reduce(TOPICS, "resid_post", 2, max_new_tokens=3, **how)
    assert here.keys == (("resid_post", 2),) and run.keys != here.keys
    for name in here["resid_post", 2].names:
        torch.testing.assert_close(here["resid_post", 2][name], there["resid_post", 2][name])
        for by in how["by"]:
            one, other = (each["resid_post", 2].by(by) for each in (here, there))
            assert one.groups == other.groups
            torch.testing.assert_close(one[name], other[name], equal_nan=True)


def test_the_cut_changes_nothing_but_rounding() -> None:
    """Sums of large numbers that hardly differ: where sums of squares would leave no digit."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(600, 6, generator=generator).double() + 1e6
    samples = [Sample(n, "", "", tuple(range(20)), 20, 20) for n in range(30)]
    found = []
    for size in (1, 7, 30):
        statistics = Statistics(wanted(EVERYTHING[:-1], ("sink",), EDGES), (("resid_post", 0),))
        parts = [Statistics(statistics.wanted, statistics.keys) for _ in range(0, 30, size)]
        for part, start in zip(parts, range(0, 30, size), strict=True):
            sink = Reducer(part)
            for sample in samples[start : start + size]:
                sink.write(Activation(sample.sample, "resid_post", 0, 0, rows[20 * sample.sample :][:20]))
            for sample in samples[start : start + size]:
                sink.finish(sample)
        found.append(merged(reversed(parts)))
    plain = moments(rows.numpy())
    for each in found:
        summary = each["resid_post", 0]
        assert summary.count == 600 and len(each.samples) == 30
        for name, value in plain.items():
            np.testing.assert_allclose(summary[name].numpy(), value, rtol=1e-7, atol=1e-8, err_msg=name)
        np.testing.assert_allclose(summary["covariance"].numpy(), np.cov(rows.numpy().T, ddof=0), atol=1e-8)
    with raises(SelectionError, "samples [0"):
        found[0].absorb(found[1])


def test_eigenvectors_are_principal_components() -> None:
    hm = opened("llama")
    found = hm.reduce(RAGGED, "resid_post", [1], "covariance")["resid_post", 1]
    rows = torch.cat(hm.capture(RAGGED, "resid_post", [1], 0)["resid_post", 1]).double()
    _, singular, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    values, vectors = found.eigenvectors(3)
    torch.testing.assert_close(values, singular[:3] ** 2 / len(rows))
    torch.testing.assert_close((vectors * right[:3]).sum(1).abs(), torch.ones(3).double())


def test_quantiles_are_a_sketchs(tmp_path: Path) -> None:
    pytest.importorskip("datasketches", reason='quantiles: pip install "hookmap[stats]"')
    hm, texts = opened("llama"), [[n % 90 + 1, n % 7 + 1, n % 11 + 1, n % 5 + 1] for n in range(60)]
    found = hm.reduce(texts, "resid_post", [1], "quantiles", by=["sink"], store=tmp_path / "s")
    rows = torch.cat([*hm.capture(texts, "resid_post", [1], 0)["resid_post", 1]]).double()
    for each in (found, open_statistics(tmp_path / "s")):
        own = each["resid_post", 1].quantiles(0.1, 0.5, 0.9)
        for place, probability in enumerate(
            (0.1, 0.5, 0.9)
        ):  # within 4 % of the rows: 1.33 % with 99 %, of 32 features
            low, high = torch.quantile(rows, torch.tensor([probability - 0.04, probability + 0.04]).double(), dim=0)
            assert bool(((own[place] >= low - 1e-6) & (own[place] <= high + 1e-6)).all())
        assert each["resid_post", 1].by("sink").quantiles([0.5]).shape == (2, 1, 32)


def test_rows_that_are_not_finite_are_counted_apart_and_spoil_nothing(caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    broken = rows.clone()
    broken[5, 2], broken[7, 0] = float("nan"), float("inf")
    statistics = Statistics(wanted(["mean", "covariance", "max"], ("position",)), (("resid_post", 3),))
    sink = Reducer(statistics)
    for n in range(3):
        sink.write(Activation(n, "resid_post", 3, 0, broken[4 * n :][:4]))
        sink.finish(Sample(n, "", "", (1, 2, 3, 4), 4, 4))
    found, good = statistics["resid_post", 3], rows[[0, 1, 2, 3, 4, 6, 8, 9, 10, 11]].double()
    assert (found.count, found.not_finite, found.first_not_finite) == (10, 2, (1, 1))
    torch.testing.assert_close(found["mean"], good.mean(0))
    assert found.by("position").count.tolist() == [3, 2, 3, 2]
    assert "sample 1, position 1" in caplog.text
    sink.write(Activation(3, "resid_post", 3, 0, torch.full((2, 4), float("nan"))))
    sink.finish(Sample(3, "", "", (1, 2), 2, 2))
    assert statistics["resid_post", 3].not_finite == 4


def test_a_batch_that_memory_refused_counts_once() -> None:
    statistics = Statistics(wanted(["mean"], ("sink",)), (("resid_post", 0),))
    sink, rows = Reducer(statistics, known=lambda n: Sample(n, "", "", (1, 2), 2, 2)), torch.ones(2, 3)
    sink.write(Activation(0, "resid_post", 0, 0, 100 * rows))
    sink.abandon()
    for n in range(2):
        sink.write(Activation(n, "resid_post", 0, 0, rows))
        sink.finish(Sample(n, "", "", (1, 2), 2, 2))
    assert statistics["resid_post", 0].count == 4 and statistics["resid_post", 0]["mean"].tolist() == [1, 1, 1]
    with raises(CaptureError, "sample 1"):
        sink.write(Activation(1, "resid_post", 0, 0, rows))


KILLED = """
import os, signal, sys
from support.opened import opened
from support.reductions import TEXTS, WISH
from hookmap.analysis import kept
kept.SECONDS = 0.0
done = []
def stop(state):
    done.append(state.samples_done)
    if state.samples_done >= 5:
        os.kill(os.getpid(), signal.SIGKILL)
opened("llama").reduce(TEXTS, **WISH, store=sys.argv[1], progress=stop)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    from support.reductions import TEXTS, WISH

    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent.parent}:{Path(hookmap.__file__).parent.parent}"}
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "s"], env=env, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = open_statistics(tmp_path / "s")
    assert not there.complete and 0 < len(there.samples) < len(TEXTS)
    passes = []
    found = opened("llama").reduce(TEXTS, **WISH, store=tmp_path / "s", resume=True, progress=passes.append)
    whole = opened("llama").reduce(TEXTS, **WISH)
    assert found.complete and len(found.samples) == len(TEXTS)
    for name in whole["resid_post", 1].names:
        torch.testing.assert_close(found["resid_post", 1][name], whole["resid_post", 1][name])
    assert open_statistics(tmp_path / "s").as_json() == found.as_json()


def test_a_folder_is_of_one_run(tmp_path: Path) -> None:
    hm = opened("llama")
    hm.reduce(RAGGED, "resid_post", [1], "mean", store=tmp_path / "s")
    before = (tmp_path / "s" / STATISTICS.file).read_bytes()
    with raises(StoreError, "already holds statistics", "--resume"):
        hm.reduce(RAGGED, "resid_post", [1], "mean", store=tmp_path / "s")
    with raises(StoreError, "another run", "reductions", "settings.prompts", "tensors"):
        hm.reduce(RAGGED[:2], "resid_post", [2], "max", store=tmp_path / "s", resume=True)
    with raises(StoreError, "no statistics", "hookmap stats"):
        hm.reduce(RAGGED, "resid_post", [1], "mean", store=tmp_path / "new", resume=True)
    with raises(StoreError, "store=FOLDER"):
        hm.reduce(RAGGED, "resid_post", [1], "mean", resume=True)
    assert (tmp_path / "s" / STATISTICS.file).read_bytes() == before


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    hm = opened("llama")
    found = hm.reduce(RAGGED, "resid_post", [1], ["mean"], store=tmp_path / "s")
    file = tmp_path / "s" / STATISTICS.file
    data = file.read_bytes()
    for broken in (b"", data[: len(data) // 2], data[:3], b"\x80\x04." + data):
        file.write_bytes(broken)
        with raises(StoreError, str(file)):
            open_statistics(tmp_path / "s")
    tensors = {}
    file.write_bytes(data)
    tensors = load_file(file)
    save_file(tensors, file)  # without the metadata
    with raises(StoreError, str(file)):
        open_statistics(tmp_path / "s")
    STATISTICS.save(found, tmp_path / "s")
    torch.testing.assert_close(open_statistics(file)["resid_post", 1]["mean"], found["resid_post", 1]["mean"])


def test_what_cannot_be_summed_up_is_refused_at_once() -> None:
    hm = opened("mixtral")
    with raises(SelectionError, "'meen'", "Did you mean mean", "'topic'", "label:NAME", "edges", "cosine needs"):
        hm.reduce(RAGGED, "resid_post", [1], ["meen", "cosine"], by=["topic"], edges=[1, 0])
    with raises(SelectionError, "router_indices"):
        hm.reduce(RAGGED, "router_indices", [1])
    with raises(SelectionError, "pattern"):
        hm.reduce(RAGGED, "pattern", [1])
    with raises(SelectionError, "label topic", "colour"):
        hm.reduce([PromptRecord([1, 2], "a", {"colour": 1})], "resid_post", [1], by=["label:topic"])
    with raises(SelectionError, "no position"):
        hm.reduce(RAGGED, "resid_post", [1], by=["position"], mean=True)
    with raises(SelectionError, "expected 32 numbers", "got 5"):
        hm.reduce(RAGGED, "resid_post", [1], "cosine", direction=torch.ones(5))
    found = hm.reduce(RAGGED, "resid_post", [1])
    with raises(SelectionError, "covariance", "mean"):
        found["resid_post", 1]["covariance"]
    with raises(SelectionError, "by 'token'", "sink"):
        found["resid_post", 1].by("token")
    with raises(SelectionError, "resid_post.1"):
        found["resid_post", 2]


def test_sums_that_do_not_fit_are_refused_after_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hookmap.analysis.reductions.reducer.available", lambda: 20_000)
    with raises(CaptureError, "by token", "covariance"):
        opened("llama").reduce(RAGGED, "resid_post", "all", "covariance", by=["token"])


def test_memory_is_flat_in_the_number_of_tokens() -> None:
    """Of 40 times as many texts, the sums are as large."""
    hm = opened("gpt2")
    sizes = []
    for times in (1, 40):
        found = hm.reduce(RAGGED * times, "resid_post", "all", ["covariance", "kurtosis"])
        held = (each.state().values() for t in found.tensors.values() for each in t.sums["sink"].values())
        sizes.append(sum(value.nbytes for value in itertools.chain.from_iterable(held)))
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_the_command(tmp_path: Path) -> None:
    plain_hooks.build("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    lines = [{"prompt": " ".join(WORDS[: 3 + n]), "id": str(n), "topic": "xy"[n % 2]} for n in range(4)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = [
        "stats",
        str(tmp_path / "m"),
        "--points",
        "resid_post",
        "--layers",
        "1",
        "--prompts",
        "t.jsonl",
        "--label",
        "all",
    ]
    result = CliRunner().invoke(main, [*run, "--by", "label:topic", "--reductions", "mean,norm", "-o", "s"])
    assert result.exit_code == 0, result.output
    assert result.stdout == "s\n" and "resid_post.1" in result.stderr and "2 topics" in result.stderr
    found = hookmap.open_statistics("s")
    assert found["resid_post", 1].by("label:topic").groups == ("x", "y")
    again = CliRunner().invoke(main, [*run, "-o", "s"])
    assert again.exit_code == 1 and "--resume" in again.stderr
    printed = CliRunner().invoke(main, [*run, "--reductions", "max", "--json"])
    assert printed.exit_code == 0, printed.output
    document = json.loads(printed.stdout)
    assert document["tensors"][0]["by"]["sink"][0]["group"] == "sink" and len(document["tensors"][0]["max"]) == 32
    for part, skip in (("a", 0), ("b", 2)):
        cut = [*run, "--skip", str(skip), "--limit", "2", "--reductions", "mean", "-o", part]
        assert CliRunner().invoke(main, cut).exit_code == 0
    both = CliRunner().invoke(main, ["stats", "--merge", "a", "--merge", "b", "-o", "ab"])
    assert both.exit_code == 0 and both.stdout == "ab\n", both.output
    whole, joined = found["resid_post", 1], hookmap.open_statistics("ab")["resid_post", 1]
    assert joined.count == whole.count
    torch.testing.assert_close(joined["mean"], whole["mean"])
    twice = CliRunner().invoke(main, ["stats", "--merge", "a", "--merge", "a"])
    assert twice.exit_code == 1 and "twice" in twice.stderr
    assert CliRunner().invoke(main, ["stats", "--points", "resid_post"]).exit_code == 2
    wrong = CliRunner().invoke(main, [*run, "--reductions", "meen"])
    assert wrong.exit_code == 1 and "'meen'" in wrong.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("groups", [1, 5])
def test_a_batch_is_summed_up_a_few_rows_at_a_time(
    dtype: torch.dtype, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 whatever the rows are in, and as exactly as at once: the mean is far from 0."""
    monkeypatch.setattr("hookmap.analysis.reductions.accumulators._CACHED", 64)
    draw = torch.Generator().manual_seed(3)
    rows = (torch.randn(101, 7, generator=draw) + torch.tensor([0, 1, 10, 100, 1000, -500, 3])).to(dtype)
    member = torch.arange(101) % groups
    batch = Batch(rows, groups, member)
    found = {
        name: value.numpy()
        for each in (Moments.of(batch, 4), Extrema.of(batch, None))
        for name, value in each.tensors.items()
    }
    for group in range(groups):
        own = rows[member == group].double().numpy()
        apart = own - own.mean(0)
        assert found["count"][group] == len(own)
        np.testing.assert_allclose(found["mean"][group], own.mean(0), rtol=1e-14)
        for power, name in ((2, "m2"), (3, "m3"), (4, "m4")):
            expected = (apart**power).sum(0)
            np.testing.assert_allclose(
                found[name][group], expected, rtol=1e-11, atol=1e-13 * (np.abs(apart) ** power).sum()
            )
        np.testing.assert_array_equal(found["min"][group], own.min(0))
        np.testing.assert_array_equal(found["max"][group], own.max(0))
