"""The options of a command that are keys of a section of hookmap.yaml: made of the section, which has the rules."""

from collections.abc import Callable
from typing import Any, TypeVar

import click
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from hookmap.cli.configuration import Section, expected, rules

C = TypeVar("C", bound=Callable[..., Any])
Of = TypeVar("Of", bound=Section)


class _Value(click.ParamType[Any]):
    """A text that the field's own rules read."""

    def __init__(self, section: type[Section], field: str, name: str) -> None:
        self.section, self.field, self.name = section, field, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return getattr(self.section.model_validate_strings({self.field: value}), self.field)
        except ValidationError:
            self.fail(f"expected {expected(self.section, self.field)}, found {value!r}", param, ctx)


def section_options(section: type[Section]) -> Callable[[C], C]:
    """Adds an option for each field of the section. One that is not typed is None; of a list, empty."""

    def decorate(command: C) -> C:
        for name, field in reversed(section.model_fields.items()):
            command = _option(section, name, field)(command)
        return command

    return decorate


def read_section(section: type[Of], name: str, settings: dict[str, Any], given: dict[str, Any]) -> Of:
    """What was typed, which `given` loses; else what the settings say under this name; else the defaults."""
    said = {key: settings[f"{name}.{key}"] for key in section.model_fields if f"{name}.{key}" in settings}
    typed = {key: given.pop(key) for key in section.model_fields}
    lists = {key: list(value) for key, value in typed.items() if isinstance(value, tuple)}
    chosen = {key: value for key, value in (typed | lists).items() if value not in (None, [])}
    return section.model_validate(said | chosen)


def _option(section: type[Section], name: str, field: FieldInfo) -> Any:
    (*_, rule) = rules(section, name)
    several = rule["type"] == "array"
    words = f"{field.description}; may be given several times" if several else str(field.description)
    default = "" if field.default in (None, []) else f"  [default: {field.default}]"
    metavar = next((each for each in field.metadata if isinstance(each, str)), "N")
    return click.option(
        f"--{name.replace('_', '-')}",
        type=click.Choice(rule["enum"]) if "enum" in rule else str if several else _Value(section, name, metavar),
        metavar=None if "enum" in rule else metavar,
        multiple=several,
        help=f"{words[0].upper()}{words[1:]}.{default}",
    )
