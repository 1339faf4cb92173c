"""One row that is 100 times as long as the others rules a mean: it is told, and can be left out of every pool."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.raises import raises

from hookmap.activations import Activation, Sample
from hookmap.cli.main import main
from hookmap.errors import SelectionError
from hookmap.stores.folder import write_store
from hookmap.stores.manifest import manifest_of_run
from hookmap.stores.memory import MemoryStore

pytest.importorskip("sklearn", reason='pip install "hookmap[eval]"')

from hookmap.analysis.probes.pooling import chosen_positions, matrices
from hookmap.analysis.probes.run import probe

KEY = ("resid_post", 3)
WIDTH, SAMPLES, PROMPT = 16, 80, 5


def sinking() -> MemoryStore:
    """The label is in every row; the first row of each sample is a sink, and its rounding is longer than all else."""
    draw = torch.Generator().manual_seed(0)
    direction, sink = torch.randn(2, WIDTH, generator=draw)
    store = MemoryStore([KEY])
    for number in range(SAMPLES):
        count = 6 + number % 5
        rows = torch.randn(count, WIDTH, generator=draw) + (1 if number % 2 else -1) * direction
        rows[0] = 5000 * sink * (1 + 0.02 * torch.randn(WIDTH, generator=draw))
        store.write(Activation(number, *KEY, 0, rows))
        ids = (number, *range(1, count + 1))
        store.finish(
            Sample(number, f"q{number}", "a", ids, PROMPT, count, None, f"s{number}", {"odd": bool(number % 2)})
        )
    return store


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return sinking()


def rows_of(store: MemoryStore, number: int) -> torch.Tensor:
    return store.read(number, *KEY).double()


@pytest.mark.slow
def test_the_sink_hides_the_label_is_told_and_left_out(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hookmap"):
        hidden = probe(store, "odd", pool="mean").report
        (place,) = hidden.places
        lengths = [rows_of(store, n).norm(dim=1).numpy() for n in range(SAMPLES)]
        assert place.largest_share == pytest.approx(np.mean([each.max() / each.sum() for each in lengths]))
        lower = [each.max() / np.sort(each)[(len(each) - 1) // 2] for each in lengths]
        assert place.largest_ratio == pytest.approx(np.median(lower), rel=1e-5)
        (told,) = [record.getMessage() for record in caplog.records]
        assert f"{place.largest_ratio:.0f} times" in told and f"{place.largest_share:.0%}" in told
        assert "resid_post 3" in told and "--positions 1:" in told
        caplog.clear()
        found = probe(store, "odd", pool="mean", positions="1:").report
        assert not caplog.records
    assert (hidden.chosen.auroc or 0) < 0.8 < 0.99 < (found.chosen.auroc or 0)
    assert found.positions == "1:" and hidden.positions is None
    assert (found.places[0].largest_ratio or 0) < 5


@pytest.mark.parametrize(
    ("pool", "positions", "expected"),
    [
        ("mean", "1:", range(1, 10)),
        ("mean", slice(1, None), range(1, 10)),
        ("mean", [2, -1], [2, 4]),
        ("mean", "generated", range(5, 10)),
        ("mean_prompt", "1:", range(1, 5)),
        ("mean_answer", ":7", range(5, 7)),
        ("last_prompt", "1:", [4]),
        ("last", "1:", [9]),
    ],
)
def test_every_pool_is_of_the_positions_named(
    store: MemoryStore, pool: str, positions: object, expected: object
) -> None:
    chosen = chosen_positions(pool, positions)
    ((_, matrix),) = matrices(store, KEY, [4], pool, [None], 10**9, chosen)
    assert len(rows_of(store, 4)) == 10
    by_hand = rows_of(store, 4)[list(expected)].mean(0).numpy()  # type: ignore[call-overload]
    np.testing.assert_allclose(matrix[0], by_hand, rtol=1e-6)


@pytest.mark.parametrize(
    ("pool", "positions", "told"),
    [
        ("last", ":3", "no rows of the last token that was fed to the model at the positions asked for"),
        ("mean", "text=a", "positions 'text=a' of a pool: expected a span"),
        ("mean", "last", "pool=last"),
        ("mean", "first", 'expected "all", "prompt"'),
        ("each", "1:", 'with pool="each" expected a slice'),
    ],
)
def test_positions_that_leave_nothing_are_refused(store: MemoryStore, pool: str, positions: str, told: str) -> None:
    with pytest.raises(SelectionError, match=told):
        probe(store, "odd", pool=pool, positions=positions)


def test_of_a_mean_nothing_is_left_out() -> None:
    store = MemoryStore([KEY])
    for number in range(8):
        store.write(Activation(number, *KEY, 0, torch.randn(1, WIDTH)))
        store.finish(Sample(number, "q", "a", (number, 1, 2), 2, 1, "mean", f"s{number}", {"odd": bool(number % 2)}))
    with raises(SelectionError, "one mean over positions"):
        probe(store, "odd", pool="mean", positions="1:", folds=3)


@pytest.mark.slow
def test_the_command_takes_positions_for_every_pool(store: MemoryStore, tmp_path: Path) -> None:
    write_store(store, tmp_path / "run", manifest_of_run([KEY]))
    typed = ["probe", str(tmp_path / "run"), "--label", "odd", "--pool", "mean", "--json", "--positions"]
    found = json.loads(CliRunner().invoke(main, [*typed, "1:"]).stdout)
    assert found["positions"] == "1:" and found["chosen"]["auroc"] > 0.99
    wrong = CliRunner().invoke(main, [*typed, "first"])
    assert wrong.exit_code == 1 and "positions 'first': expected" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["last", "mean", "each"])
def test_sparse_rows_are_probed_as_dense_ones(pool: str, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    dense, sparse = MemoryStore([KEY]), MemoryStore([("features", 3)])
    for number in range(40):
        rows = torch.relu(torch.randn(6, WIDTH, generator=draw) - 1)
        rows[:, 4] += 2 * (number % 2)
        dense.write(Activation(number, *KEY, 0, rows))
        sparse.write(Activation(number, "features", 3, 0, rows.to_sparse()))
        for store in (dense, sparse):
            store.finish(Sample(number, str(number), "", (number, *range(6)), 6, 6, labels={"odd": bool(number % 2)}))
    expected, found = (probe(store, "odd", pool=pool, method="ridge", shuffles=5) for store in (dense, sparse))
    assert [place.auroc for place in found.report.places] == [place.auroc for place in expected.report.places]
    assert found.report.places[0].auroc == 1
    assert torch.equal(found.probes.weights["features", 3], expected.probes.weights[KEY])
    rows = sparse.read(3, "features", 3)
    torch.testing.assert_close(found.probes.logits(rows, "features", 3), expected.probes.logits(rows.to_dense(), *KEY))
    names = {path.name for path in found.save(tmp_path / "probes")}
    assert "probes.safetensors" in names and not any(name.startswith("vector") for name in names)
