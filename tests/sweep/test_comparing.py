"""What a sweep compares and prints, without a model: shipped maps, their differences, and tables."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from packaging.version import Version

from hookmap.cli.commands.maps import command
from hookmap.maps.diff import differences
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import load
from hookmap.maps.shipped import mappings_folder, shipped_architectures
from hookmap.sweep import build
from hookmap.sweep.build import Entry, Kind, classes, tenth
from hookmap.sweep.table import by_class, counts, markdown


def test_every_type_is_in_one_tenth() -> None:
    tenths = [tenth(number) for number in range(10)]
    assert sorted(name for each in tenths for name in each) == sorted(classes())
    assert {len(each) for each in tenths} <= {len(classes()) // 10, len(classes()) // 10 + 1}


def test_the_oldest_transformers_that_is_allowed_is_tested() -> None:
    root = mappings_folder().parent
    listed = re.search(r"^VERSIONS := (\S+)", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    (bound,) = re.findall(r'"transformers>=([\d.]+),<6"', (root / "pyproject.toml").read_text(encoding="utf-8"))
    assert listed is not None and Version(listed[1]) == Version(bound)


@pytest.mark.parametrize("name", shipped_architectures())
def test_every_shipped_map_is_small_proved_and_says_on_what(name: str) -> None:
    path = mappings_folder() / f"{name}.json"
    shipped = load(path)
    assert shipped.architecture == name and shipped.scope == "architecture"
    assert shipped.transformers_version and len(shipped.proofs[0].checks) > 3
    assert path.stat().st_size < 25_000 * len(shipped.kinds)  # BEAM scales every layer by a number of its own
    assert all(kind.points or kind.unavailable for kind in shipped.kinds)


def _term(document: dict[str, Any]) -> Any:
    return document["kinds"][0]["points"]["mlp_in"]["terms"][0]


def _mlp(document: dict[str, Any]) -> Any:
    return document["kinds"][0]["mlp"]


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "rows": lambda map_: _term(map_).update(rows="last"),
    "call": lambda map_: _term(map_).update(call=1),
    "heads": lambda map_: _term(map_).update(heads={"stop": 8, "d_head": 4}),
    "flat": lambda map_: _term(map_).update(flat=True),
    "axes": lambda map_: _term(map_).update(axes=["batch", "pos", "stream", "d_model"]),
    "beside": lambda map_: map_["kinds"][0]["points"]["mlp_in"].update(beside=[dict(_term(map_))]),
    "joined": lambda map_: map_.update(joined=False),
    "left_out": lambda map_: map_.update(left_out=["model.decoder"]),
    "module_class": lambda map_: _mlp(map_).update(module_class="Another"),
    "modules": lambda map_: _mlp(map_).update(modules=["model.layers.{i}.another"]),
    "reason": lambda map_: map_["model_unavailable"].update({next(iter(map_["model_unavailable"])): "another"}),
    "reason of a kind": lambda map_: map_["kinds"][0]["unavailable"].update({"router_logits": "another"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_diff_tells_before_from_after(name: str) -> None:
    document = load(mappings_folder() / "GPT2LMHeadModel.json").model_dump()
    document["model_unavailable"]["final_norm"] = "one"
    document["kinds"][0]["unavailable"]["router_logits"] = "one"
    before = ArchitectureMap.model_validate(document)
    CHANGES[name](document)
    (line,) = differences(before, ArchitectureMap.model_validate(document))
    old, _, new = line.partition(" -> ")
    assert old.split(": ")[-1] != new


def test_diff_names_every_change(tmp_path: Path) -> None:
    before = load(mappings_folder() / "GPT2LMHeadModel.json")
    document = before.model_dump()
    document["kinds"][0]["points"]["resid_mid"]["terms"][0]["scale"] = 0.5
    after = ArchitectureMap.model_validate(document)
    (line,) = differences(before, after)
    assert "resid_mid" in line and "0.5 * " in line
    assert not list(differences(before, before))
    for name, each in (("a", before), ("b", after)):
        (tmp_path / name).mkdir()
        each.save(tmp_path / name / "GPT2LMHeadModel.json")
    result = CliRunner().invoke(command, ["diff", str(tmp_path / "a"), str(tmp_path / "b")])
    assert result.exit_code == 1 and line in result.stdout
    assert CliRunner().invoke(command, ["diff", str(tmp_path / "a"), str(tmp_path / "a")]).exit_code == 0


def test_list_prints_what_ships() -> None:
    result = CliRunner().invoke(command, ["list"])
    assert "GPT2LMHeadModel" in result.stdout.split() and "willcb/Qwen3-0.6B" in result.stdout.split()


def test_an_unknown_type_is_wrong_usage() -> None:
    result = CliRunner().invoke(command, ["check", "qwen33"])
    assert result.exit_code == 2 and "qwen3" in result.output


def test_a_tenth_is_added_to_the_types_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(build, "sweep", lambda types, *_: seen.extend(types) or [])
    assert CliRunner().invoke(command, ["check", "gpt2", "--tenth", "3"]).exit_code == 0
    assert seen == list(dict.fromkeys(["gpt2", *tenth(3)]))


def test_the_table_says_the_worst_of_each_class() -> None:
    good = Entry("gpt2", "GPT2LMHeadModel", "SUPPORTED", (Kind("attention+dense", 12, "sequential", "pre", (), ()),))
    bad = Entry("gpt-sw3", "GPT2LMHeadModel", "ERROR", detail="of | no use")
    assert by_class([bad, good])["GPT2LMHeadModel"] is bad
    assert counts([good, bad]) == "0 SUPPORTED, 0 UNAVAILABLE, 1 ERROR, 0 SILENTLY WRONG of 1 classes"
    assert "of \\| no use" in markdown([good, bad]) and "gpt2, gpt-sw3" in markdown([good, bad])
