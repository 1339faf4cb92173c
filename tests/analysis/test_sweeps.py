"""Sweeps over many pairs are patches made one by one by plain hooks, whatever shares a batch, killed or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import plain_hooks
from support.patched_by_hand import ByHand
from support.raises import raises
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap import metrics
from hookmap.analysis.grid import load_grid
from hookmap.analysis.sweeps import Sweep
from hookmap.model import HookedModel

PAIRS = [
    hookmap.Pair([5, 17, 3, 60, 22], [5, 17, 40, 60, 22], 7, 9, "one"),
    hookmap.Pair([8, 8, 31, 2, 77, 12, 9], [8, 8, 31, 64, 77, 12, 9], 11, 30),
    hookmap.Pair([90, 4, 6, 33], [90, 4, 7, 33], 50, 3),
]


@cache
def opened(family: str) -> HookedModel:
    return hookmap.open(plain_hooks.build(family), tokenizer=tiny_tokenizer())


def difference(logits: torch.Tensor, pair: hookmap.Pair) -> float:
    return float(logits[pair.answer] - logits[pair.wrong])  # type: ignore[index]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("noising", [False, True])
def test_each_head_of_each_pair_is_a_patch_by_plain_hooks(family: str, noising: bool) -> None:
    hm, by = opened(family), ByHand(opened(family).model, family, 4)
    shown: list[tuple[int, int]] = []
    found = hm.sweep(PAIRS, point="z", over="heads", noising=noising, batch_size=5, progress=lambda *n: shown.append(n))
    assert found.values.shape == (3, 3, 4, 1) and found.grid.column == "head" and found.pairs == ("one", "1", "2")
    assert shown[-1] == (36, 36) and found.keys == (("z", 0), ("z", 1), ("z", 2))
    for number, pair in enumerate(PAIRS):
        base, source = (pair.clean, pair.corrupted) if noising else (pair.corrupted, pair.clean)
        _, rows = by.run(source, keep=[("z", n) for n in range(3)])
        clean, corrupted = (difference(by.run(ids)[0], pair) for ids in (pair.clean, pair.corrupted))
        assert float(found.clean_of_pairs[number]) == pytest.approx(clean, abs=1e-4)
        assert float(found.corrupted_of_pairs[number]) == pytest.approx(corrupted, abs=1e-4)
        for layer in range(3):
            for head in range(4):
                logits, _ = by.run(base, {("z", layer): by.put(rows["z", layer], head)})
                got = float(found.values[number, layer, head, 0])
                assert got == pytest.approx(difference(logits, pair), abs=1e-4), (number, layer, head)
    start, end = (found.clean, found.corrupted) if noising else (found.corrupted, found.clean)
    torch.testing.assert_close(found.effect.values, (found.values[..., 0].mean(0) - start) / (end - start))


def test_heads_and_positions_points_and_layers_alone_are_swept_together() -> None:
    hm, by = opened("llama"), ByHand(opened("llama").model, "llama", 4)
    both = hm.sweep(PAIRS[1], point="z", layers=1, over=["heads", "positions"], positions=[3, -1])
    assert both.values.shape == (1, 1, 4, 2) and both.grid.column == "head@position"
    assert both.grid.tokens[:3] == ("0@3", "0@6", "1@3")
    every = hm.sweep(PAIRS, point=["mixer_out", "mlp_out"], over="layers")
    assert every.values.shape == (3, 6, 1, 1) and every.grid.points == ("mixer_out", "mlp_out") * 3
    assert every.grid.rows[:2] == ("mixer_out 0", "mlp_out 0")
    some = hm.sweep(PAIRS, point="z", layers=[2], heads=[3, 1], over="heads")
    assert some.heads == (3, 1) and some.top(1)[0].name.startswith("z 2.")
    for number, pair in enumerate(PAIRS):
        _, rows = by.run(pair.clean, keep=[("z", 1), ("z", 2), ("mlp_out", 2)])
        logits, _ = by.run(pair.corrupted, {("mlp_out", 2): by.put(rows["mlp_out", 2])})
        assert float(every.values[number, 5, 0, 0]) == pytest.approx(difference(logits, pair), abs=1e-4)
        logits, _ = by.run(pair.corrupted, {("z", 2): by.put(rows["z", 2], 3)})
        assert float(some.values[number, 0, 0, 0]) == pytest.approx(difference(logits, pair), abs=1e-4)
        for column, place in enumerate((3, 6)) if number == 1 else ():
            logits, _ = by.run(pair.corrupted, {("z", 1): by.put(rows["z", 1], 2, place)})
            assert float(both.values[0, 0, 2, column]) == pytest.approx(difference(logits, pair), abs=1e-4)


def test_positions_of_pairs_of_different_lengths_count_from_the_end_or_are_refused() -> None:
    hm, by = opened("llama"), ByHand(opened("llama").model, "llama", 4)
    found = hm.sweep(PAIRS, layers=[0, 1], positions="-2:")
    assert found.grid.positions == (-2, -1) and found.grid.tokens == ("*", "*")
    for number, pair in enumerate(PAIRS):
        _, rows = by.run(pair.clean, keep=[("resid_pre", 1)])
        place = len(pair.clean) - 2
        logits, _ = by.run(pair.corrupted, {("resid_pre", 1): by.put(rows["resid_pre", 1], at=place)})
        assert float(found.values[number, 1, 0, 0]) == pytest.approx(difference(logits, pair), abs=1e-4)
    for where in ("all", "2:"):
        with raises(hookmap.InterventionError, "4 to 7 tokens", "-5:", "over='heads'"):
            hm.sweep(PAIRS, positions=where)
    with raises(hookmap.SelectionError, "none of the 4 tokens of prompt 2 (1 of 3 have none)"):
        hm.sweep(PAIRS, positions=[4], over="layers")


def test_pairs_that_do_not_align_are_told_at_once() -> None:
    wrong = [PAIRS[0], hookmap.Pair([1, 2, 3], [1, 2], 5, 6, "short"), hookmap.Pair([4, 4], [4, 4], 5, 6)]
    with raises(
        hookmap.InterventionError,
        "pair 1 (short): the clean prompt has 3 tokens and the corrupted one 2",
        "pair 2: the clean and the corrupted prompt are the same",
    ):
        opened("llama").sweep(wrong)
    with raises(hookmap.SelectionError, "pairs have their own"):
        opened("llama").sweep(PAIRS, target=5)
    with raises(hookmap.SelectionError, "'rows'", "layers, heads, positions"):
        opened("llama").sweep(PAIRS, over="rows")
    with raises(hookmap.InterventionError, "resid_pre has no heads"):
        opened("llama").sweep(PAIRS, over="heads")


def by_formula(name: str, logits: torch.Tensor, answer: tuple[int, ...], wrong: int, clean: torch.Tensor) -> float:
    """logits: [tokens of the answer, d_vocab], those before each."""
    logs = logits.double().log_softmax(-1)
    if name == "logit_difference":
        return float(logits[0, answer[0]] - logits[0, wrong])
    if name == "kl_divergence":
        other = clean.double().log_softmax(-1)
        return float((other.exp() * (other - logs)).sum())
    found = sum(float(logs[n, token]) for n, token in enumerate(answer))
    return found if name == "log_probability" else float(np.exp(found))


@pytest.mark.parametrize("name", ["logit_difference", "probability", "log_probability", "kl_divergence"])
def test_every_metric_of_the_list_measures_a_sweep(name: str) -> None:
    hm, by = opened("llama"), ByHand(opened("llama").model, "llama", 4)
    found = hm.sweep(PAIRS, metric=name, point="resid_pre", layers=1, positions="-1")
    for number, pair in enumerate(PAIRS):
        clean, rows = by.run(pair.clean, keep=[("resid_pre", 1)])
        logits, _ = by.run(pair.corrupted, {("resid_pre", 1): by.put(rows["resid_pre", 1], at=-1)})
        want = by_formula(name, logits[None], (pair.answer,), pair.wrong, clean)  # type: ignore[arg-type]
        assert float(found.values[number, 0, 0, 0]) == pytest.approx(want, abs=1e-4)


def test_a_loss_an_answer_of_several_tokens_and_a_function_measure_a_sweep() -> None:
    hm, model = opened("llama"), opened("llama").model
    pair = PAIRS[1]
    loss = hm.sweep(pair, metric="loss", point="resid_pre", layers=0, positions="all", over="layers")
    with torch.no_grad():
        ids = torch.tensor([pair.clean])
        own = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(pair.corrupted)[1:, None]).mean()
    assert float(loss.values) == pytest.approx(-float(own), abs=1e-4), "the corrupted text, read from the clean stream"

    answer = (11, 30, 2)
    several = hookmap.Pair(pair.clean, pair.corrupted, answer)
    long = hm.sweep(several, metric="log_probability", layers=2, positions="all", over="layers")
    with torch.no_grad():
        logits = model(torch.tensor([[*pair.clean, *answer[:-1]]])).logits[0, -3:]
    want = by_formula("log_probability", logits, answer, 0, logits)
    assert float(long.clean) == pytest.approx(want, abs=1e-4)

    def largest(logits: torch.Tensor, at: metrics.Reading) -> torch.Tensor:
        assert at.tokens == tuple(PAIRS[at.sample].corrupted) or at.tokens == tuple(PAIRS[at.sample].clean)
        return logits[-1].max()

    found = hm.sweep(PAIRS, metric=largest, point="z", layers=0, over="heads")
    given = metrics.logit_difference([7, 11, 50], [9, 30, 3])
    objects = hm.sweep(PAIRS, metric=given, point="z", layers=0, over="heads")
    torch.testing.assert_close(objects.values, hm.sweep(PAIRS, point="z", layers=0, over="heads").values)
    by = ByHand(model, "llama", 4)
    _, rows = by.run(pair.clean, keep=[("z", 0)])
    logits, _ = by.run(pair.corrupted, {("z", 0): by.put(rows["z", 0], 3)})
    assert float(found.values[1, 0, 3, 0]) == pytest.approx(float(logits.max()), abs=1e-4)


def test_a_metric_that_is_not_there_or_lacks_an_answer_is_refused() -> None:
    hm = opened("llama")
    with raises(hookmap.SelectionError, "logit_difference, probability", "Did you mean probability?"):
        hm.sweep(PAIRS, metric="probabilty")
    bare = [hookmap.Pair(PAIRS[0].clean, PAIRS[0].corrupted, 7), PAIRS[1]]
    with raises(hookmap.SelectionError, "'wrong'", "1 pair of 2 has none, the first is pair 0"):
        hm.sweep(bare, metric="logit_difference")
    with raises(hookmap.SelectionError, "probability needs target="):
        hm.sweep(hookmap.Pair([1, 2], [1, 3]))
    alike = hookmap.Pair([5, 17, 3, 60, 22], [5, 17, 40, 60, 22], 7, 7)
    with raises(hookmap.InterventionError, "nothing to bring back"):
        hm.sweep([alike, alike])


def invented(values: torch.Tensor, clean: torch.Tensor, corrupted: torch.Tensor) -> Sweep:
    keys = tuple(("z", n) for n in range(values.shape[1]))
    return Sweep(values, keys, tuple(range(values.shape[2])), None, (), clean, corrupted, 0.0, "metric")


def test_the_interval_is_that_of_scipys_percentile_bootstrap() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(30, 2, 3, 1, generator=draw)
    clean, corrupted = 4 + torch.randn(30, generator=draw), -4 + torch.randn(30, generator=draw)
    found = invented(values, clean, corrupted)
    low, high = found.interval(resamples=10_000)

    def effect(own: Any, one: Any, other: Any, axis: int = -1) -> Any:
        return (own.mean(axis) - other.mean(axis)) / (one.mean(axis) - other.mean(axis))

    for row, head in ((0, 0), (1, 2)):
        data = (values[:, row, head, 0].numpy(), clean.numpy(), corrupted.numpy())
        want = stats.bootstrap(
            data, effect, paired=True, method="percentile", n_resamples=10_000, vectorized=True,
            random_state=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        width = float(want.high - want.low)
        assert float(low.values[row, head]) == pytest.approx(float(want.low), abs=0.05 * width)
        assert float(high.values[row, head]) == pytest.approx(float(want.high), abs=0.05 * width)
        assert low.values[row, head] < found.effect.values[row, head] < high.values[row, head]
    assert torch.equal(found.interval()[0].values, found.interval()[0].values), "it is seeded"
    with raises(hookmap.SelectionError, "two pairs at least", "1 pair"):
        invented(values[:1], clean[:1], corrupted[:1]).interval()


def test_heads_that_a_layer_lacks_have_no_number(tmp_path: Path) -> None:
    values = torch.tensor([[[1.0, 2.0], [3.0, float("nan")]]] * 2)[..., None]
    found = invented(values, torch.ones(2), torch.zeros(2))
    assert [cell.name for cell in found.top()] == ["z 1.0", "z 0.1", "z 0.0"]
    read = json.loads(found.save(tmp_path / "s").with_suffix(".json").read_text())
    assert read["effect"] == [[[1.0], [2.0]], [[3.0], [None]]] and read["pairs"][1]["values"][1][1] == [None]
    assert (tmp_path / "s.csv").read_text().splitlines()[:2] == ["layer,head,value", "0,0,1.0"]
    grid = load_grid(tmp_path / "s.safetensors")
    assert grid.column == "head" and torch.equal(grid.values.isnan(), found.effect.values.isnan())


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_sweeps import PAIRS, opened
def show(done, total):
    if done >= 12:
        os.kill(os.getpid(), signal.SIGKILL)
opened("llama").sweep(PAIRS, point="z", over="heads", batch_size=4, store={store!r}, progress=show)
"""


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    store, hm = tmp_path / "s.jsonl", opened("llama")
    here = Path(__file__)
    code = KILLED.format(tests=str(here.parent), store=str(store))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here.parents[2])])}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    whole = hm.sweep(PAIRS, point="z", over="heads", batch_size=4)
    with store.open("ab") as file:
        file.write(b'{"jobs": [30, 31], "val')  # the kill came in the middle of a line
    with raises(hookmap.StoreError, "is there already", "--resume"):
        hm.sweep(PAIRS, point="z", over="heads", store=store)
    done: list[int] = []
    gone_on = hm.sweep(
        PAIRS, point="z", over="heads", batch_size=4, store=store, resume=True, progress=lambda n, _: done.append(n)
    )
    assert min(done) > 12 and max(done) == 36
    torch.testing.assert_close(gone_on.values, whole.values, rtol=1e-5, atol=1e-5)
    went: list[int] = []
    again = hm.sweep(
        PAIRS, point="z", over="heads", store=store, resume=True, progress=lambda done, _: went.append(done)
    )
    assert torch.equal(again.values, gone_on.values) and not went
    for other, told in (({"noising": True}, "noising"), ({"layers": 1}, "tensors"), ({"metric": "loss"}, "metric")):
        with raises(hookmap.StoreError, "differs in", told):
            hm.sweep(PAIRS, **{"point": "z", "over": "heads", "store": store, "resume": True, **other})
    answers = [*PAIRS[:2], hookmap.Pair(PAIRS[2].clean, PAIRS[2].corrupted, 50, 4)]
    with raises(hookmap.StoreError, "differs in answers"):
        hm.sweep(answers, point="z", over="heads", store=store, resume=True)
    edited = hm.edited([{"do": "scale", "point": "mlp_out", "layers": 0, "factor": 0.5}])
    with raises(hookmap.StoreError, "differs in model"):
        edited.sweep(PAIRS, point="z", over="heads", store=store, resume=True)
    (tmp_path / "other.jsonl").write_text("{}\n")
    with raises(hookmap.StoreError, "no file of a sweep"):
        hm.sweep(PAIRS, point="z", store=tmp_path / "other.jsonl", resume=True, positions="-1")
    with raises(hookmap.SelectionError, "store=FILE"):
        hm.sweep(PAIRS, point="z", resume=True, positions="-1")
