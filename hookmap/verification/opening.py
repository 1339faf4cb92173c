"""The cheap checks of a map, made when a model is opened whose architecture has no map proved for this transformers."""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import version
from time import perf_counter

from torch import nn

from hookmap.errors import DiscoveryError, MapMismatchError
from hookmap.loading import modules
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import load
from hookmap.maps.shipped import mappings_folder, shipped_architectures
from hookmap.verification import subject
from hookmap.verification.checks import checks_of
from hookmap.verification.streams import NOTHING_RECORDED

log = logging.getLogger("hookmap")


def hold(found: ArchitectureMap, model: nn.Module, given: bool) -> None:
    """Run the model once on random tokens, and compare what the map names with Hugging Face and with arithmetic.

    Nothing runs where the shipped map of the architecture is proved for the installed transformers. `given`: whether
    the map is the user's. Raises DiscoveryError, or MapMismatchError for a given map, with the checks that fail. A
    model that this cannot run (its weights are elsewhere, it wants more than tokens) is opened, and the log says so;
    of one that records no hidden states the rest is compared.
    """
    root = modules.model_inside(model)
    if root is not None and type(root).__module__.startswith("transformers.") and _is_proved(found.architecture):
        return  # discovery holds a given map against the dataflow
    start = perf_counter()
    try:
        with modules.eager(model), modules.plain_experts(model), subject.precisely(model):
            checks = [each for each in checks_of(found, model, cheap=True) if each.detail != NOTHING_RECORDED]
    except Exception as error:  # what a model raises on 18 random tokens has no common type
        log.warning(
            "The map of %s was not checked on its weights: %s: %s", found.architecture, type(error).__name__, error
        )
        return
    failed = [check for check in checks if not check.passed]
    if not failed:
        log.info("The map of %s passed the cheap checks in %.1f s.", found.architecture, perf_counter() - start)
        return
    lines = "\n".join(f"  - {check.name}: {check.detail}" for check in failed)
    end = "All checks: hookmap verify MODEL. To open it all the same: check=False (--no-check)."
    if given:
        raise MapMismatchError(f"the given map is not true of this {found.architecture}:\n{lines}\n{end}")
    raise DiscoveryError(
        f"hookmap misreads {found.architecture}: the map that it made is not true of the model, and nothing would show "
        f"it in a capture.\n{lines}\n{end}\nPlease report it with the model's config."
    )


@cache
def _is_proved(architecture: str) -> bool:
    if architecture not in shipped_architectures():
        return False
    return version("transformers") in load(mappings_folder() / f"{architecture}.json").proved_on
