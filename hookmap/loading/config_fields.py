"""Fields of a transformers config that a user sets when a model is opened, over those of its config.json."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from hookmap.errors import ModelError
from hookmap.wording import did_you_mean


def with_fields(config: Any, fields: Mapping[str, Any] | None) -> Any:
    """A copy of the config with these fields. `text_config.x`, or a mapping for `text_config`, sets one inside.

    Raises ModelError with every field that it does not have, with near ones, and every value that it does not take.
    """
    if not fields:
        return config
    made = copy.deepcopy(config)
    if problems := list(_set(made, fields, "")):
        raise ModelError(
            f"config: {len(problems)} field{'s' if len(problems) > 1 else ''} cannot be set\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nThe fields are those of the model's config.json and their defaults."
        )
    return made


def _set(config: Any, fields: Mapping[str, Any], where: str) -> Iterator[str]:
    known = {*config.to_dict(), *config.attribute_map}
    for key, value in fields.items():
        name, _, inner = str(key).partition(".")
        part = getattr(config, name, None) if name in known else None
        if name not in known:
            hint = did_you_mean(name, known) or "it has no field of a name near it"
            yield f"{where}{name}: {type(config).__name__} has no such field; {hint}"
        elif hasattr(part, "to_dict") and (inner or isinstance(value, Mapping)):
            yield from _set(part, {inner: value} if inner else value, f"{where}{name}.")
        elif inner or hasattr(part, "to_dict"):
            yield f"{where}{key}: {name} is {'a config of its own' if hasattr(part, 'to_dict') else 'no config'}"
        else:
            try:
                setattr(config, name, value)
            except Exception as error:  # transformers checks the type of each field, with errors of its own
                yield f"{where}{name}: {(str(error).splitlines() or [''])[-1].strip()}"
