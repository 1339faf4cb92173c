"""The document of a map, schema 3: nothing is lost on the way to it and back, and a mistake in it is named truly."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.documents import hybrid, point, term, uniform
from support.raises import raises

from hookmap import MapError
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.grammar import (
    Place,
    folded,
    folded_names,
    from_block,
    layers_pattern,
    read_layers,
    read_selector,
    selector_text,
    unfolded,
    unfolded_names,
    whole_path,
)  # fmt: skip
from hookmap.maps.json_schema import schema
from hookmap.maps.json_text import json_text
from hookmap.maps.parsing import load, parse
from hookmap.maps.shipped import mappings_folder

OLD = sorted((Path(__file__).parent / "schema_1").glob("*.json"))
SECOND = sorted((Path(__file__).parent / "schema_2").glob("*.json"))
L = "model.layers.{i}"


def document(**changes: Any) -> dict[str, Any]:
    """The document of a small map, in which each kind is `self_attn+dense` alone."""
    return {**parse(uniform()).to_document(), **changes}


def kind(**changes: Any) -> dict[str, Any]:
    made = document()
    made["kinds"]["self_attn+dense"] |= changes
    return made


def problems_of(made: dict[str, Any]) -> list[str]:
    with pytest.raises(MapError) as caught:
        parse(made, source="my.json")
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:-1]]


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_a_file_of_schema_1_says_the_same_in_schema_3(path: Path) -> None:
    old = json.loads(path.read_text(encoding="utf-8"))
    found = load(path)
    assert parse(found.to_json()) == found and len(found.to_json()) < path.stat().st_size / 2
    jsonschema.validate(found.to_document(), schema())
    assert {kind["name"]: kind["layers"] for kind in old["kinds"]} == {k.name: list(k.layers) for k in found.kinds}
    for before, after in zip(old["kinds"], found.kinds, strict=True):
        said = {name: _only(row, after.points[name].model_dump(mode="json")) for name, row in before["points"].items()}
        assert said == before["points"] and after.points.keys() == before["points"].keys()
        for name, reason in before["unavailable"].items():
            assert found.unavailable(name, before["layers"][0]) == reason
    assert list(found.proved_on) == old["proved_on"]
    assert sum(found.proofs[0].checks.values()) == len(old["verified_by"]) - 1, "the first says on what"


@pytest.mark.parametrize("path", SECOND, ids=lambda path: path.stem)
def test_a_file_of_schema_2_says_the_same_in_schema_3(path: Path) -> None:
    """There, the paths of a block's modules were written from the model's root, and checks as an object."""
    old = json.loads(path.read_text(encoding="utf-8"))
    found = load(path)
    made = found.to_document()
    assert parse(made) == found and len(found.to_json()) < 0.9 * path.stat().st_size
    jsonschema.validate(made, schema())
    for name, kind in made["kinds"].items():
        before = old["kinds"][name]
        assert list(kind["points"]) == list(before["points"])
        for row, earlier in zip(kind["points"].values(), before["points"].values(), strict=True):
            assert _behind(row, old["layers_path"]) == earlier
        for branch in ("mixer", "mlp"):
            assert _behind(kind[branch]["modules"], old["layers_path"]) == before[branch]["modules"]
    for proof, earlier in zip(made["proofs"], old["proofs"], strict=True):
        counts = {name: int(number or 1) for name, _, number in (e.partition(" ") for e in proof["checks"].split(", "))}
        assert counts == earlier["checks"]


def _behind(row: Any, block: str) -> Any:
    """The row with the block's path before each selector that begins with a dot."""
    if isinstance(row, str):
        factor, times, path = row.rpartition(" * ")
        return factor + times + (block if path.startswith(".") else "") + path
    if isinstance(row, list):
        return [_behind(each, block) for each in row]
    return row and row | {"at": _behind(row["at"], block)}


def _only(like: Any, found: Any) -> Any:
    """What is found under the keys of `like`: schema 1 left out some that are usual."""
    if isinstance(like, dict):
        return {key: _only(value, found[key]) for key, value in like.items()}
    if isinstance(like, list) and len(like) == len(found):
        return [_only(*pair) for pair in zip(like, found, strict=True)]
    return found


_FILES = sorted(mappings_folder().rglob("*.json"))
_QUICK = [pytest.param(path, marks=pytest.mark.slow if number % 10 else ()) for number, path in enumerate(_FILES)]


@pytest.mark.parametrize("path", _QUICK, ids=lambda path: path.stem)
def test_every_shipped_file_is_as_its_map_is_written(path: Path) -> None:
    if ".schema" not in path.name:
        text = path.read_text(encoding="utf-8")
        assert load(path).to_json() == text
        jsonschema.validate(json.loads(text), schema())


def test_the_shipped_maps_are_small() -> None:
    folder = mappings_folder()
    assert sum(path.stat().st_size for path in folder.rglob("*.json")) < 1_000_000
    assert (folder / "Qwen3ForCausalLM.json").stat().st_size < 3_400
    assert (folder / "BeamForCausalLM.json").stat().st_size < 20_000


def test_the_document_is_what_a_person_reads() -> None:
    made = load(mappings_folder() / "Qwen3ForCausalLM.json").to_document()
    assert list(made)[:6] == [
        "architecture", "layer_access_pattern", "pre_attention_path", "pre_mlp_path", "num_layers", "d_model",
    ]  # fmt: skip
    (only,) = made["kinds"].values()
    assert only["layers"] == "0-31"
    rows = only["points"]
    assert rows["resid_pre"] == ".input[0]" and rows["attn_out"] == ".self_attn.output[0]"
    assert rows["z"] == {"at": ".self_attn.o_proj.input[0]", "heads": "32 x 128"}
    assert rows["pattern"]["at"] == ".self_attn.output[1]", "its axes are the usual ones of attention weights"
    assert only["mlp"]["modules"] == [".mlp"] and made["layers_path"] == L
    assert not {"mixer_out", "mixer_out_raw", "attn_out_raw"} & rows.keys()
    assert made["model_points"]["logits"] == "output['logits']"


def test_selectors_that_are_sums_and_what_else_there_is_to_say() -> None:
    old = uniform()
    sum_ = point(3, term(f"{L}.mlp", "output", 0, 0.5), term(L, "input", "hidden_states", -1.0))
    sum_["terms"][1]["rows"] = "last"
    old["kinds"][0]["points"]["resid_mid"] = sum_
    made = parse(old).to_document()
    (only,) = made["kinds"].values()
    assert only["points"]["resid_mid"] == [
        "0.5 * .mlp.output[0]",
        {"at": "-1 * .input['hidden_states']", "rows": "last"},
    ]
    assert parse(made) == parse(old)


def test_kinds_that_differ_in_factors_are_one_with_a_list_for_each() -> None:
    old = uniform(6)
    base = old["kinds"][0]
    old["kinds"] = []
    for layer, factor in enumerate((0.5, 0.25, 0.5, 0.1, 0.125, 0.3)):
        own = json.loads(json.dumps(base)) | {"layers": [layer], "relations": [f"resid_mid = {factor} * mixer_out"]}
        own["name"] = "attention" + (f"#{layer + 1}" if layer else "")
        for name in ("mixer_out", "attn_out"):
            own["points"][name]["terms"][0]["scale"] = factor / 3
        old["kinds"].append(own)
    old["kinds"][0]["layers"] = [0, 2]
    del old["kinds"][2]
    for number, each in enumerate(old["kinds"][1:], 2):
        each["name"] = f"attention#{number}"
    found = parse(old)
    made = found.to_document()
    (only,) = made["kinds"].values()
    assert only["layers"] == "0-5" and only["constants"]["a"] == [0.5, 0.25, 0.5, 0.1, 0.125, 0.3]
    assert only["relations"] == ["resid_mid = {a} * mixer_out"]
    assert only["points"]["attn_out"] == "{b} * .self_attn.output[0]"
    assert parse(made) == found, "the numbers are the same to the last bit"
    (selector,) = parse(made).selectors("mixer_out", 3)
    assert selector.scale == 0.1 / 3


def test_a_second_name_with_a_reason_or_a_tensor_of_its_own_stays_so() -> None:
    old = uniform()
    points = old["kinds"][0]["points"]
    points["mixer_out_raw"] = point(2, term(f"{L}.self_attn", "output", 1))
    points["mlp_out_raw"] = points["mlp_out"]
    old["kinds"][0]["unavailable"]["attn_out_raw"] = "for a reason"
    found = parse(old)
    assert parse(found.to_document()) == found
    rows = found.to_document()["kinds"]["self_attn+dense"]["points"]
    assert "mlp_out_raw" not in rows and "mixer_out" not in rows and "mixer_out_raw" in rows
    assert found.unavailable("attn_out_raw", 0) == "for a reason"
    del points["mlp_out_raw"]
    lacks = parse(old)
    assert lacks.to_document()["kinds"]["self_attn+dense"]["points"]["mlp_out_raw"] is None
    assert parse(lacks.to_document()) == lacks


# The grammar ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(
    st.text(max_size=12)
    | st.sampled_from(["", "input", "a.input", "2 * a", "{a} * b", "'x'", L, ".", ".mlp", ".my m"]),
    st.sampled_from(["input", "output"]),
    st.none() | st.integers(-3, 9) | st.text(max_size=6),
    st.floats(allow_nan=False, allow_infinity=False) | st.just("{b}"),
    st.just(())
    | st.tuples(st.sampled_from(["bmm", "_softmax", "add"]), st.just(None), st.just(1))
    | st.tuples(st.sampled_from(["bmm", "_softmax"]), st.integers(0, 12), st.none() | st.integers(1, 12)),
)
def test_every_selector_is_read_back(
    module: str, side: str, index: int | str | None, factor: float | str, operation: tuple[Any, ...]
) -> None:
    place = Place(module, side, index, *operation)
    text = selector_text(place, factor)
    assert read_selector(text) == (place, factor)
    jsonschema.validate(text, schema()["$defs"]["Selector"])


@pytest.mark.parametrize(
    ("path", "text"),
    [(L, "."), (f"{L}.mlp", ".mlp"), ("model.layers.{i+1}.norm", None), ("model.norm", None), ("", None)],
)
def test_what_is_in_a_block_is_written_from_the_block_on(path: str, text: str | None) -> None:
    assert from_block(path, L) == (path if text is None else text)
    assert whole_path(from_block(path, L), L) == path


def test_operations_are_told_with_their_number_and_that_of_their_like() -> None:
    old = uniform()
    old["kinds"][0]["points"] |= {
        "q_rot": point(7, term(L, "output", operation="add", occurrence=0, visits=2)),
        "k_rot": point(8, term(f"{L}.self_attn", "output", operation="add", occurrence=1, visits=2)),
        "attn_scores": point(9, term(f"{L}.self_attn", "input", 0, operation="_softmax", visits=1)),
    }
    for name, axes in (("q_rot", "batch heads pos d_head"), ("k_rot", "batch pos heads d_head")):
        old["kinds"][0]["points"][name]["terms"][0]["axes"] = axes.split()
    old["kinds"][0]["points"]["attn_scores"]["terms"][0]["axes"] = ["batch", "heads", "pos", "key"]
    found = parse(old)
    rows = found.to_document()["kinds"]["self_attn+dense"]["points"]
    assert rows["q_rot"] == ".:add#0/2.output", "its axes are the usual ones of operations of an attention"
    assert rows["k_rot"] == {"at": ".self_attn:add#1/2.output", "axes": ["batch", "pos", "heads", "d_head"]}
    assert rows["attn_scores"] == ".self_attn:_softmax.input[0]"
    assert parse(found.to_document()) == found


@given(st.sets(st.integers(0, 60), min_size=1).map(sorted))
def test_every_set_of_layers_is_read_back(layers: list[int]) -> None:
    text = layers_pattern(layers)
    assert read_layers(text, 61) == layers
    assert len(text) <= len(", ".join(map(str, layers)))


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (range(32), "0-31"),
        ([3], "3"),
        (range(0, 31, 2), "0-30 by 2"),
        ([5, 23], "5, 23"),
        ([n for n in range(34) if n % 6 != 5], "0-33 except 5-29 by 6"),
    ],
)
def test_layers_as_people_write_them(layers: list[int], text: str) -> None:
    assert layers_pattern(layers) == text


json_data = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["a", "b", 1.0, 0.5]),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.sampled_from("xyz"), inner),
)


@given(
    st.lists(st.sampled_from(["block_a", "x", "x0", "x.01", "0", "1", *(f"coda.{n}" for n in range(12))]), max_size=9)
)
def test_every_list_of_names_is_unfolded(names: list[str]) -> None:
    assert unfolded_names(folded_names(names)) == names


def test_numbered_names_are_written_as_one() -> None:
    names = ["block_a", *(f"coda.{n}" for n in range(12)), "tail.3"]
    assert folded_names(names) == ["block_a", "coda.[0-11]", "tail.3"]
    old = {**uniform(4), "layer_names": ["a.0", "a.1", "b.0", "b.1"]}
    assert parse(old).to_document()["layer_names"] == ["a.[0-1]", "b.[0-1]"]
    assert parse(parse(old).to_document()) == parse(old)


@pytest.mark.slow
@given(json_data)
def test_every_list_is_unfolded(data: Any) -> None:
    assert json.dumps(unfolded(folded(data))) == json.dumps(data)
    assert json.loads(json_text(data)) == data


def test_a_list_that_repeats_itself_is_written_once() -> None:
    types = (["sliding"] * 5 + ["full"]) * 5 + ["sliding"] * 2
    assert folded({"layer_types": types}) == {
        "layer_types": [{"5 times": [{"5 times": ["sliding"]}, "full"]}, "sliding", "sliding"]
    }
    with raises(ValueError, "may have 100000 elements"):
        unfolded([{"99999 times": [{"99999 times": [1]}]}])


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (f"{L}.mlp.outputs", "it ends with .input or .output, and a place there such as [0] where it has one"),
        (f"{L}.mlp.output[logits]", "the place is a number or a name in single quotes: [0], ['logits']"),
        (f"half * {L}.mlp.output", "the factor is a number, found half"),
        (f"0,5 * {L}.mlp.output", "the factor is a number, found 0,5"),
        (f"{L}.attn.output + {L}.mlp.output", "a sum is a list of selectors"),
        (
            "model.my layers.mlp.output",
            "a module's path with blanks, quotes, stars, colons or brackets stands in single quotes",
        ),
    ],
)
def test_a_text_that_is_no_selector_says_what_is_wrong(row: str, why: str) -> None:
    for said in (row, [row, f"{L}.output"], {"at": row, "flat": True}):
        (line,) = problems_of(kind(points={"resid_mid": said}))
        place = {str: "", list: "[0]", dict: ".at"}[type(said)]
        assert line == (
            f"kinds.self_attn+dense.points.resid_mid{place}: expected a selector such as "
            f'"0.5 * model.layers.{{i}}.mlp.output[0]", found "{row}": {why}'
        )


def test_all_mistakes_are_named_with_what_was_expected() -> None:
    made = document(num_layer=4, pre_mlp_path=3)
    made["kinds"]["self_attn+dense"] |= {"layers": "0 to 3"}
    made["kinds"]["self_attn+dense"]["points"] |= {"q": {"at": "x.output", "head": 3}, "k": 7, "v": []}
    del made["d_model"]
    lines = problems_of(made)
    for line in (
        "num_layer: unknown field; did you mean num_layers?",
        "pre_mlp_path: expected a string or null, found 3",
        "d_model: expected a whole number, at least 1, found nothing: it is missing",
        'kinds.self_attn+dense.layers: expected layers such as "0-31" or "0-33 except 5-29 by 6", found "0 to 3"',
        "kinds.self_attn+dense.points.q.head: unknown field; did you mean heads?",
        "kinds.self_attn+dense.points.v: expected a list of at least 1, found []",
    ):
        assert line in lines
    (line,) = (line for line in lines if "points.k" in line)
    assert line.endswith("found 7") and 'a selector such as "0.5 * model' in line
    assert len(lines) == 7


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"layers": "0-4"}, "layers: layer 4 is not one of 0 to 3"),
        ({"layers": "3-1"}, "layers: the range 3-1 has no layer"),
        ({"points": {"resid_mid": "{a} * x.output"}}, "points.resid_mid: {a} is none of the kind's constants"),
        ({"relations": ["resid_mid = {b} * resid_pre"]}, "relations[0]: {b} is none of the kind's constants"),
        ({"constants": {"a": [1, 2]}}, "constants.a: expected one number for each of 4 layers, found 2"),
        ({"unavailable": {"so": ["q"], "or so": ["q"]}}, "unavailable: q is there twice"),
        (
            {"points": {"resid_mid": {"at": ["x.output", "y.output"], "flat": True}}},
            "points.resid_mid: flat is said of one selector: write it into an object in the list",
        ),
    ],
)
def test_what_a_schema_cannot_say_is_told_too(changes: dict[str, Any], line: str) -> None:
    assert f"kinds.self_attn+dense.{line}" in problems_of(kind(**changes))


def test_a_point_of_the_whole_model_is_in_no_block() -> None:
    (line,) = problems_of(document(model_points={"embed": ".embed.output"}))
    assert line.startswith("model_points.embed: .embed.output: a point of the whole model is in no block")


@pytest.mark.parametrize("text", ["", "shapes 0", "shapes,order", "shapes 2 3"])
def test_checks_are_names_and_numbers(text: str) -> None:
    (line,) = problems_of(document(proofs=[{"transformers": ["5.24.0"], "checks": text}]))
    assert line.startswith('proofs[0].checks: expected checks such as "shapes, order, sum 2"')


def test_evidence_for_a_point_without_a_row_is_refused() -> None:
    assert problems_of(document(evidence={"at Linear": ["qq"]})) == ["evidence: qq has no row in this map"]


@pytest.mark.parametrize("key", [lambda key: key, lambda key: (len(key), key)])
def test_a_document_whose_keys_were_sorted_is_refused(key: Any) -> None:
    """The rows' order is the forward order: JSON libraries that sort (and PostgreSQL's jsonb) lose it."""
    made = parse(hybrid()).to_document()
    (line,) = problems_of({name: made[name] for name in sorted(made, key=key)})
    assert line == "its keys have been sorted, and the rows of points stand in the order of the forward pass"


def test_another_schema_is_refused() -> None:
    with raises(MapError, "is a map of schema 4, and this hookmap reads schemas 1 to 3. Update"):
        parse(document(schema_version=4))
    assert "schema_version: expected one of 2, 3, found 0" in problems_of(document(schema_version=0))


def test_fields_that_the_document_does_not_know_are_written_as_they_are() -> None:
    """A field that is new in memory, with a default, needs no line in the code that writes and reads."""
    found = parse(uniform()).model_copy(update={"runs": "2 x (0-3)"})
    kinds = (found.kinds[0].model_copy(update={"calls": 2, "axes": ("pos", "batch", "d_model")}),)
    looped = ArchitectureMap.model_validate(found.model_copy(update={"kinds": kinds}).model_dump())
    made = looped.to_document()
    assert made["runs"] == "2 x (0-3)" and made["kinds"]["self_attn+dense"]["calls"] == 2
    assert parse(made) == looped
