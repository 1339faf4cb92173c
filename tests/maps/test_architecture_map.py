"""The map document: a round trip loses nothing, and a broken file is explained field by field."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.documents import hybrid, uniform
from support.raises import raises

from hookmap import MapError, MapNotFoundError, SelectionError
from hookmap.maps.json_schema import schema
from hookmap.maps.parsing import load, parse
from hookmap.maps.points import POINTS
from hookmap.maps.shipped import mappings_folder


def test_the_published_schema_is_that_of_the_code() -> None:
    published = json.loads((mappings_folder() / "architecture-map.schema.json").read_text())
    assert published == schema(), "run: make schema"


def test_a_map_survives_its_file(tmp_path: Path) -> None:
    found = parse(hybrid())
    found.save(tmp_path / "new" / "map.json")
    assert load(tmp_path / "new" / "map.json") == found
    assert parse(found.to_document()) == found


terms = st.fixed_dictionaries(
    {
        "module": st.text(max_size=8).filter(lambda path: not path.startswith("."))  # none of PyTorch's does
        | st.sampled_from(
            ["model.layers.{i}", "model.layers.{i}.mlp", "model.layers.{i}.my mlp", "model.layers.{i+1}.a"]
        ),
        "side": st.sampled_from(["input", "output"]),
        "index": st.none() | st.integers(0, 9) | st.text(max_size=4),
        "scale": st.floats(allow_nan=False, allow_infinity=False),
    },
    optional={
        "rows": st.sampled_from(["first", "last"]),
        "axes": st.none() | st.just(["batch", "heads", "pos", "key"]),
        "heads": st.just({"stop": 12, "d_head": 4}) | st.just({"groups": 2, "start": 1, "stop": 9, "d_head": 4}),
    },
)
evidence = st.sampled_from(["", "seen", "the tensor that leaves Block", "the tensor that enters Linear, times 0.5"])
of_blocks = [name for name, point in POINTS.items() if point.per_layer]
points = st.dictionaries(
    st.sampled_from(of_blocks),
    st.fixed_dictionaries(
        {"terms": st.lists(terms, min_size=1, max_size=3), "order": st.integers(0, 50)}, optional={"evidence": evidence}
    ),
)
reasons = st.dictionaries(
    st.sampled_from(list(POINTS)), st.sampled_from(["", "so", "this block has no mixture of experts"])
)


@pytest.mark.slow
@given(points, reasons, st.text(max_size=20), st.dictionaries(st.text(max_size=5), st.none() | st.text(max_size=5)))
def test_whatever_a_map_holds_survives_json(
    found: dict[str, Any], lost: dict[str, str], text: str, config: dict[str, Any]
) -> None:
    document = uniform()
    document |= {"model_id": text, "config": config}
    document["kinds"][0] |= {"points": found, "unavailable": lost}
    made = parse(document)
    assert parse(made.to_json()) == made
    assert json.loads(made.to_json()) == made.to_document()


def test_all_problems_of_a_broken_map_are_named_with_field_expectation_and_finding() -> None:
    document = hybrid()
    document["num_layer"] = document.pop("num_layers")
    document["pre_mlp_path"] = 3
    document["kinds"][0]["points"]["resid_pre"]["terms"][0]["side"] = "in"
    document["kinds"][1]["layers"] = ["two"]
    document["model_points"]["embed"]["terms"] = []
    with pytest.raises(MapError) as caught:
        parse(document, source="my.json")
    message = str(caught.value)
    for line in (
        "my.json is not a hookmap map, 6 problems:",
        "num_layer: unknown field; did you mean num_layers?",
        "num_layers: expected a whole number, at least 1, found nothing: it is missing",
        "pre_mlp_path: expected a string or null, found 3",
        'kinds[0].points.resid_pre.terms[0].side: expected one of "input", "output", found "in"',
        'kinds[1].layers[0]: expected a whole number, found "two"',
        "model_points.embed.terms: expected a list of at least 1, found []",
        "hookmap discover MODEL -o my.json",
    ):
        assert line in message


def test_a_layer_of_two_kinds_is_refused() -> None:
    document = hybrid()
    document["kinds"][1]["layers"] = [2, 4]
    with pytest.raises(MapError, match=r"must cover 0..5 once each, found \[0, 1, 2, 3, 4, 4\]"):
        parse(document)


def test_an_unknown_point_is_refused() -> None:
    document = hybrid()
    document["kinds"][0]["points"]["resid_middle"] = document["kinds"][0]["points"]["resid_mid"]
    with raises(MapError, "resid_middle"):
        parse(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b": }', "line 2, column 7"),
        ("", "line 1, column 1"),
        ('{"a":\n', "line 2, column 1"),  # cut off behind the end of a line
        ("[]", "expected an object, found"),
        ("null", "expected an object, found null"),
        ('{"d_model": NaN}', "NaN"),
    ],
)
def test_a_file_that_is_no_map_says_where(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.json"
    file.write_text(text)
    with pytest.raises(MapError, match=message) as caught:
        load(file)
    assert str(file) in str(caught.value)


def test_a_missing_or_binary_file_is_a_map_error(tmp_path: Path) -> None:
    with raises(MapNotFoundError, "hookmap discover"):
        load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with raises(MapError, "cannot be read"):
        load(tmp_path / "binary.json")


def test_the_kind_of_a_layer_that_is_not_there_is_told() -> None:
    found = parse(hybrid())
    assert found.kind_of(-1) == found.kind_of(found.num_layers - 1)
    for layer in (found.num_layers, -found.num_layers - 1):
        with raises(SelectionError, str(layer), f"0 to {found.num_layers - 1}"):
            found.kind_of(layer)
