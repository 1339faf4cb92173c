"""Options that several commands take, as one decorator."""

from collections.abc import Callable
from typing import Any


def option_group(*options: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that gives a command all of these options, in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
