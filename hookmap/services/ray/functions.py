"""Functions of a user's own on their way to the workers: by name. Nothing is pickled that holds code."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hookmap.capture.interventions.documents import Function, Intervention
from hookmap.capture.interventions.importable import function_of, name_of
from hookmap.errors import InterventionError


@dataclass(frozen=True)
class ByName:
    """A `Function` without its code."""

    name: str
    """package.module:function"""
    given: Mapping[str, Any]
    """its other fields"""


def sent(interventions: Iterable[Intervention], allowed: Collection[str]) -> tuple[Intervention | ByName, ...]:
    """What workers are sent. `allowed`: names of functions. Raises InterventionError for other functions."""
    found: list[Intervention | ByName] = []
    for each in interventions:
        if not isinstance(each, Function):
            found.append(each)
            continue
        name = name_of(each.fn, allowed)
        if name not in allowed:
            told = name or "package.module:function"
            raise InterventionError(
                f"{each.do}({each.name}): the workers are other processes, and a function would have to be pickled to "
                "reach them, which hookmap does not do. They import those that are named when they are started: "
                f'hookmap.open_on_ray(…, functions=["{told}"]).'
            )
        found.append(ByName(str(name), each.model_dump(exclude={"fn"})))
    return tuple(found)


def taken(interventions: Iterable[Any], allowed: Collection[str]) -> tuple[Intervention, ...]:
    """What a worker was sent. Raises InterventionError for a function that is not allowed, or cannot be imported."""
    found = []
    for each in interventions:
        if isinstance(each, ByName):
            if each.name not in allowed:
                raise InterventionError(f"{each.name}: this worker was not told to import it.")
            each = Function.model_validate({**each.given, "fn": function_of(each.name)})
        found.append(each)
    return tuple(found)
