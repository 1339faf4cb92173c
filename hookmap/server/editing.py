"""Interventions that come by a request: held against the map, and no path of a client's choice is opened for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hookmap.errors import HookmapError
from hookmap.interventions import Intervention, Source, VectorFile, read_interventions
from hookmap.model import HookedModel
from hookmap.server.errors import bad
from hookmap.server.sessions import Sessions

PARAM = "hookmap.interventions"


def read(given: Sequence[dict[str, Any]], hm: HookedModel, sessions: Sessions) -> tuple[Intervention, ...]:
    """The interventions, with the points and layers that this model has. Raises ApiError.

    `source: {store: ID}` names a session; files are refused.
    """
    try:
        found = tuple(_within(each, sessions) for each in read_interventions(list(given)))
        for each in found:
            hm.map.selectors([each.point], each.layers if isinstance(each.layers, str) else list(each.layers))
    except HookmapError as error:
        raise bad(str(error), PARAM, type(error).__name__) from error
    return found


def described(given: Intervention) -> dict[str, Any]:
    """As JSON, with the session's id and not its folder."""
    told: dict[str, Any] = given.model_dump(mode="json")
    if isinstance(source := told.get("source"), dict) and source.get("store"):
        source["store"] = Path(source["store"]).name
    return told


def _within(given: Intervention, sessions: Sessions) -> Intervention:
    for name in ("vector", "direction"):
        if isinstance(getattr(given, name, None), VectorFile):
            raise bad(f"{name}: the server reads no files for a request; send the numbers.", PARAM)
    source = getattr(given, "source", None)
    if isinstance(source, Source) and source.store is not None:
        folder = str(sessions.folder(source.store))
        return given.model_copy(update={"source": source.model_copy(update={"store": folder})})
    return given
