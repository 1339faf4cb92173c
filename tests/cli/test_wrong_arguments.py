"""What is typed in the wrong place or form is refused before a model is loaded, with what to type instead."""

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from hookmap.cli.main import main

pytestmark = pytest.mark.usefixtures("own_folder")


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args, prog_name="hookmap")


def refused(*args: str, code: int = 2) -> str:
    done = run(*args)
    assert done.exit_code == code, done.output
    return done.stderr


def commands(group: click.Group = main, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Each command with the words that name it."""
    with click.Context(group) as context:
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            if isinstance(command, click.Group):
                yield from commands(command, (*above, name))
            else:
                yield (*above, name), command


def test_each_option_that_names_a_folder_refuses_a_file() -> None:
    Path("file").write_text("kept")
    asked = 0
    for name, command in commands():
        for option in command.params:
            if not isinstance(option, click.Option) or option.metavar != "DIR":
                continue
            for path in ("file", "file/below"):
                told = refused(*name, option.opts[-1], path)
                assert "file is a file: expected a folder" in told and option.opts[-1] in told, (name, told)
            asked += 1
    assert asked >= 20 and Path("file").read_text() == "kept"


def test_folders_that_the_settings_name_are_checked_too() -> None:
    Path("file").write_text("kept")
    Path("hookmap.yaml").write_text("serve: {sessions: file/of, vectors: none}\n")
    told = refused("serve")
    assert "--sessions" in told and "file is a file: expected a folder" in told and "importing" not in told


def test_a_picture_that_cannot_be_written_is_refused_before_the_model_is_loaded() -> None:
    Path("folder.png").mkdir()
    Path("file").touch()
    for picture, told in (
        ("folder.png", "folder.png is a folder: expected a file"),
        ("file/a.png", "file is a file: expected a folder"),
        ("a.gif", "a picture ends in .png"),
    ):
        for command in ("lens", "attribute", "heads"):
            message = refused(command, "--png", picture, code=1)
            assert told in message and "loading" not in message


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("lens", "demo", "The capital"), "hookmap lens [MODEL] --prompt 'The capital'"),
        (("capture", "demo", "two", "words"), "hookmap capture [MODEL] --prompt 'two words'"),
        (("patch", "demo", "one"), "hookmap patch [MODEL] --clean one"),
        (("vector", "make", "demo", "one"), "hookmap vector make --help"),
        (("discover", "a", "b"), "'b' is one argument too many: hookmap discover takes [MODEL]"),
        (("doctor", "a"), "hookmap doctor takes options alone"),
        (("lens", "The capital of France is"), "a hub id has no spaces"),
    ],
)
def test_a_text_in_an_argument_s_place_is_told_its_option(args: tuple[str, ...], told: str) -> None:
    message = refused(*args)
    assert told in message and "loading" not in message


@pytest.mark.parametrize("digits", ["３", "٣", "²", "1_0", "Ⅳ"])
def test_numbers_are_written_in_ascii_digits(digits: str) -> None:
    for args in (
        ("lens", "--top", digits),
        ("lens", "--layers", digits),
        ("lens", "--layers", f"0-{digits}"),
        ("lens", "--calls", digits),
        ("lens", "--positions", f"{digits}:"),
        ("lens", "--positions", f"{digits},1"),
        ("steer", "--strength", digits, "--vector", "none"),
        ("capture", "--points", f"z@{digits}"),
        ("capture", "--points", "embed", "--features", digits),
        ("capture", "--points", "embed", "--features", f"1,{digits}"),
        ("examples", "--prompt", "a", "--context", f"{digits},1"),
        ("stats", "--points", "embed", "--prompt", "a", "--reductions", "histogram", "--edges", f"0,{digits}"),
        ("probe", "run", "--label", "a", "--pool", "each", "--positions", f"{digits}:"),
    ):
        done = run(*args)
        assert done.exit_code in (1, 2) and digits in done.stderr and "loading" not in done.stderr, (args, done.output)
