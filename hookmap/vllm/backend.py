"""Which of vLLM's two ways to run a model hookmap can read: its own modules, or those of transformers inside vLLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hookmap.errors import DiscoveryError, HookmapError
from hookmap.vllm.discover import discover
from hookmap.vllm.places import ModelPlaces

Implementation = Literal["auto", "transformers"]


@dataclass(frozen=True)
class Backend:
    """How vLLM is to run the model."""

    model_impl: Implementation
    """vLLM's option of this name"""
    places: ModelPlaces
    why: str = ""
    """why not as vLLM would run it by itself"""


def choose(config_of: Callable[[Implementation], Any]) -> Backend:
    """As vLLM runs the model by itself where its map can be read; else on the transformers back end.

    `config_of`: the vLLM config for each value of vLLM's option `model_impl`. Builds no weights. Raises DiscoveryError
    where neither can be read, with both reasons, and what `config_of` raises for settings that are refused.
    """
    own = config_of("auto")
    try:
        return Backend("auto", _places(lambda: own))
    except HookmapError as error:
        first = error
    why = f"its modules in vLLM cannot be read: {first}"
    try:
        return Backend("transformers", _places(lambda: config_of("transformers")), why)
    except HookmapError as error:
        raise DiscoveryError(
            f"neither of vLLM's ways to run this model can be read.\nIts own modules: {first}\n"
            f"Those of transformers inside vLLM (model_impl='transformers'): {error}\n"
            "Run it with hookmap's own engine: leave out `--engine vllm`."
        ) from error


def _places(config: Callable[[], Any]) -> ModelPlaces:
    try:
        return discover(config())
    except HookmapError:
        raise
    except Exception as error:  # what vLLM raises where it cannot build or run a model has no common type
        message = str(error).strip().splitlines()
        raise DiscoveryError(f"{type(error).__name__}: {message[0] if message else 'no message'}") from error
