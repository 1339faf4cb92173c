"""One list of what a capture takes: every face has its names and its defaults, and Python's help says them."""

import inspect
import pydoc
from typing import Any

import click
import pytest
from support.raises import raises

from hookmap.capture.hooked import Hooked
from hookmap.capture.options import CaptureOptions, EstimateOptions, RowOptions, options_of, with_defaults
from hookmap.cli.commands.capture import command
from hookmap.cli.configuration import Settings
from hookmap.model import HookedModel
from hookmap.services.ray.model import RayModel
from hookmap.services.server.requests import Recording

OPTIONS = {name: option for name, (_, option) in options_of(CaptureOptions).items()}
ELSEWHERE = {
    "do_sample": "temperature says it",
    "stop": "no command takes it",
    "progress": "a function",
    "store": "output",
    "interventions": "intervene",
}
"""options that a command line has by another name, or not at all"""
PER_RUN = {"resume", "before", "dictionaries", *ELSEWHERE}
"""options that no file of settings gives"""


@pytest.mark.parametrize("model", [HookedModel, RayModel])
def test_the_signature_and_the_help_of_a_capture_name_every_option(model: type) -> None:
    found = inspect.signature(model.capture).parameters  # type: ignore[attr-defined]
    assert list(found)[:5] == ["self", "prompts", "points", "layers", "max_new_tokens"]
    assert {name: found[name].default for name in OPTIONS} == {name: each.default for name, each in OPTIONS.items()}
    assert list(found)[-1] == "generation"
    said = " ".join(pydoc.plain(pydoc.render_doc(model.capture)).split())  # type: ignore[attr-defined]
    assert [name for name, option in OPTIONS.items() if f"{name}: {option.meaning}" not in said] == []


def test_an_estimate_takes_no_more_than_decides_the_size() -> None:
    found = inspect.signature(Hooked.estimate).parameters
    assert list(found)[5:] == list(options_of(EstimateOptions))
    with raises(TypeError, "engine"):
        with_defaults(EstimateOptions, {"engine": "hooks"})


def test_hookmap_yaml_has_every_option_and_its_default() -> None:
    fields = Settings.model_fields
    assert OPTIONS.keys() - PER_RUN - fields.keys() == set()
    own = {"chat": None, "batch_size": 8}  # a file says true, false or nothing
    expected = {name: own.get(name, OPTIONS[name].default) for name in OPTIONS.keys() - PER_RUN}
    assert {name: fields[name].default for name in expected} == expected


def test_the_command_line_has_every_option() -> None:
    assert isinstance(command, click.Command)
    assert OPTIONS.keys() - ELSEWHERE.keys() - {parameter.name for parameter in command.params} == set()


def test_a_request_to_the_server_says_which_rows_by_the_same_names() -> None:
    rows: dict[str, Any] = {name: option.default for name, (_, option) in options_of(RowOptions).items()}
    assert Recording.model_validate({}).model_dump(include=set(rows)) == rows
