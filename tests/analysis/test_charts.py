"""Charts hold the numbers they were given, their files need nothing else, and the commands draw and print them."""

import io
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from support.raises import raises

import hookmap
from hookmap.analysis.attribution import Attribution
from hookmap.analysis.charts import attention, bars, heat_map, printable, save_picture
from hookmap.analysis.grid import Grid
from hookmap.analysis.grid_table import grid_table
from hookmap.cli.main import main

pytestmark = pytest.mark.slow

EVIL = "</script><script>alert(1)</script>"


def grid(*tokens: str, metric: str = "effect") -> Grid:
    values = torch.arange(2.0 * len(tokens)).reshape(2, -1) - 1
    return Grid(values, (3, 8), tuple(range(4, 4 + len(tokens))), tokens, metric, "resid_mid")


def test_a_heat_map_holds_every_number_of_its_grid_with_its_labels() -> None:
    rows = heat_map(grid("a", "a", " ")).to_dict()["data"]["values"]
    assert [(r["layer"], r["position"], r["token"], r["value"]) for r in rows] == [
        (3, 4, "a", -1.0), (3, 5, "a", 0.0), (3, 6, "␣", 1.0), (8, 4, "a", 2.0), (8, 5, "a", 3.0), (8, 6, "␣", 4.0),
    ]  # fmt: skip


def test_two_columns_of_one_token_stay_two() -> None:
    encoding = heat_map(grid("a", "a")).to_dict()["encoding"]["x"]
    assert encoding["field"] == "column" and encoding["axis"]["labelExpr"] == '["a", "a"][datum.value]'


def test_numbers_of_both_signs_have_colours_around_zero_and_probabilities_from_zero_to_one() -> None:
    def scale(given: Grid) -> Any:
        return heat_map(given).to_dict()["encoding"]["color"]["scale"]

    assert scale(grid("a", "b"))["domain"] == [-2.0, 2.0]
    chances = Grid(torch.tensor([[0.2, 0.4]]), (0,), (0, 1), ("a", "b"), "probability of 'x'", "resid_post")
    assert scale(chances)["domain"] == [0.0, 1.0]


def test_what_is_not_a_number_is_left_empty() -> None:
    nothing = Grid(torch.full((1, 1), float("nan")), (0,), (0,), ("a",), "kl", "resid_post")
    (row,) = heat_map(nothing).to_dict()["data"]["values"]
    assert row["value"] is None
    assert grid_table(nothing).row_count == 1


def test_a_png_is_as_wide_as_its_columns(tmp_path: Path) -> None:
    def width(name: str, *tokens: str) -> int:
        data = save_picture(heat_map(grid(*tokens)), tmp_path / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        return int(struct.unpack(">I", data[16:20])[0])

    assert width("wide.png", *"abcdefghijklmnopqrst") > width("narrow.png", *"ab") + 300


def test_an_html_file_needs_no_network_and_no_token_ends_its_script(tmp_path: Path) -> None:
    page = save_picture(heat_map(grid(EVIL, "b"), [[EVIL, "c"], ["d", "e"]]), tmp_path / "map.html").read_text("utf-8")
    assert re.findall(r"<(?:script|link)[^>]*(?:src|href)=\"?http", page) == []
    assert "alert(1)" in page and EVIL not in page
    assert len(re.findall(r"<script>alert", page)) == 0
    assert len(page) < 2_000_000


def test_bars_are_the_parts_and_an_svg_shows_their_names(tmp_path: Path) -> None:
    parts = ("resid_pre[0]", "mixer_out[0]", "bias")
    values = torch.tensor([[1.0], [-2.0], [0.5]])
    found = Attribution(parts, (4,), ("a",), values, torch.tensor([-0.5]), ("x",), "y", False)
    chart = bars(found)
    assert [row["value"] for row in chart.to_dict()["data"]["values"]] == [1.0, -2.0, 0.5]
    drawn = save_picture(chart, tmp_path / "bars.svg").read_text("utf-8")
    assert all(part in drawn for part in parts) and "logit x − logit y = -0.500" in drawn


def test_attention_shows_what_a_query_may_see_of_each_head() -> None:
    pattern = torch.rand(2, 3, 3).tril()
    rows = attention(pattern, ["a", "b", "c"]).to_dict()["data"]["values"]
    assert len(rows) == 2 * 6
    expected = [float(pattern[int(row["head"][5:]), row["q"], row["k"]]) for row in rows]
    assert [row["value"] for row in rows] == pytest.approx(expected, rel=1e-4)  # five digits are kept
    with raises(hookmap.CaptureError, "[2, 3, 3] and 2 tokens"):
        attention(pattern, ["a", "b"])


def test_long_tokens_of_queries_are_written_level_so_that_rows_do_not_lie_on_each_other() -> None:
    chart = attention(torch.rand(1, 2, 2).tril(), ["Lovelace", " Turing"]).to_dict()
    axes = chart["spec"]["encoding"]
    assert (axes["x"]["axis"]["labelAngle"], axes["y"]["axis"]["labelAngle"]) == (-60, 0)


def named(chart: Any) -> dict[str, list[float]]:
    """Of each head that a chart of attention shows, by its name, the values of its cells, row by row."""
    found: dict[str, list[float]] = {}
    for row in chart.to_dict()["data"]["values"]:
        found.setdefault(row["head"], []).append(row["value"])
    return found


def test_heads_have_their_own_numbers_and_stand_in_their_order(tmp_path: Path) -> None:
    pattern = torch.rand(12, 2, 2).tril()
    own = {f"head {h}": pytest.approx(pattern[h][[0, 1, 1], [0, 0, 1]].tolist(), rel=1e-4) for h in range(12)}
    picked = named(attention(pattern, ["a", "b"], heads=[10, 4]))
    assert picked == {"head 4": own["head 4"], "head 10": own["head 10"]}
    assert named(attention(pattern[4:6], ["a", "b"], heads=range(4, 6))) == {n: own[n] for n in ("head 4", "head 5")}
    assert named(attention(pattern[[5, 2]], ["a", "b"], heads=[5, 2])) == {n: own[n] for n in ("head 2", "head 5")}
    chart = attention(pattern, ["a", "b"])
    assert named(chart) == own
    drawn = re.findall(r">head (\d+)<", save_picture(chart, tmp_path / "a.svg").read_text("utf-8"))
    assert drawn == [str(head) for head in range(12)]


@pytest.mark.parametrize("heads", [[12], [0, 1, 2], [0, 0], [-1], [], [True], [1, 0]])
def test_heads_that_are_not_there_are_refused(heads: list[int]) -> None:
    with raises(hookmap.CaptureError, "heads"):
        attention(torch.rand(2, 2, 2).tril(), ["a", "b"], heads=heads)


def test_attention_to_later_keys_is_shown_where_there_is_any() -> None:
    pattern = torch.full((1, 2, 2), 0.5)
    assert named(attention(pattern, ["a", "b"])) == {"head 0": [0.5] * 4}


def test_an_infinity_has_no_colour_and_spoils_no_other_cell(tmp_path: Path) -> None:
    values = torch.tensor([[1.0, float("inf")], [float("nan"), 2.0]])
    with_holes = Grid(values, (0, 1), (0, 1), ("a", "b"), "effect", "resid_pre")
    found = heat_map(with_holes).to_dict()
    assert [row["value"] for row in found["data"]["values"]] == [1.0, None, None, 2.0]
    assert found["encoding"]["color"]["scale"]["domain"] == [1.0, 2.0]
    assert save_picture(heat_map(with_holes), tmp_path / "map.png").stat().st_size
    screen = Console(width=80, file=io.StringIO())
    screen.print(grid_table(with_holes))
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split() for line in lines[-2:]] == [["1", "nan", "2"], ["0", "1", "inf"]]


def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for name, why in (("map.jpg", "ends in .png, .svg, .html"), ("no/such/map.png", "cannot write")):
        with pytest.raises(hookmap.StoreError, match=why):
            save_picture(heat_map(grid("a")), tmp_path / name)


def test_without_altair_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    with raises(hookmap.CaptureError, 'pip install "hookmap[viz]"'):
        heat_map(grid("a"))


def test_tokens_are_shown_as_signs() -> None:
    assert [printable(t) for t in (" the", "\n", "", "\x00", "🙂")] == ["␣the", "↵", "∅", "\\x00", "🙂"]
    assert printable("abcdefgh", 6) == "abcde…"


def test_the_table_has_the_last_layer_on_top_and_the_words_in_its_cells() -> None:
    screen = Console(width=80, file=io.StringIO())
    screen.print(grid_table(grid("a", "b"), [["one", "two"], ["three", "four"]]))
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].strip() == "effect"
    assert [line.split() for line in lines[-2:]] == [["8", "three", "four"], ["3", "one", "two"]]


def run(*arguments: str) -> Any:
    done = CliRunner().invoke(main, [*arguments])
    assert done.exit_code == 0, done.stderr
    return done


def test_the_lens_command_draws_and_prints(tmp_path: Path) -> None:
    files = [str(tmp_path / "lens.png"), str(tmp_path / "lens.html")]
    done = run("lens", "--layers", "0,16,19", "--positions", "-3:", "--png", files[0], "--html", files[1])
    assert all(Path(file).stat().st_size > 1000 for file in files)
    assert done.stdout == ""
    rows = [line.split() for line in done.stderr.splitlines() if line.strip().startswith(("16 ", "19 "))]
    assert [row[-1] for row in rows] == ["7", "7"]
    found = json.loads(run("lens", "--json", "--positions", "last", "--target", "8", "--top", "2").stdout)
    assert found["target_tokens"] == ["8"] and found["top_tokens"][19][0][0] == "7" and found["rank"][19] > [1]


def test_the_attribute_command_prints_a_sum(tmp_path: Path) -> None:
    done = run("attribute", "--against", "8", "--top", "3", "--png", str(tmp_path / "bars.png"))
    assert "logit 7 − logit 8" in done.stderr and "mlp_out[16]" in done.stderr and "39 others" in done.stderr
    found = json.loads(run("attribute", "--json").stdout)
    assert sum(value for (value,) in found["values"]) == pytest.approx(found["logit"][0], abs=1e-3)


def test_a_wrong_target_is_an_error_without_a_traceback() -> None:
    done = CliRunner().invoke(main, ["lens", "--target", "zz"])
    assert done.exit_code == 1 and "is 2 tokens" in done.stderr and "Traceback" not in done.stderr
