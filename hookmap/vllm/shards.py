"""What each rank of tensor parallelism holds of a point: all of it, or a part of its heads or features."""

from __future__ import annotations

from dataclasses import replace

from hookmap.errors import DiscoveryError
from hookmap.vllm.places import ModelPlaces, Place


def sharded(whole: ModelPlaces, rank: ModelPlaces, ranks: int) -> ModelPlaces:
    """The map of the whole model, with the places in one of `ranks` that share it.

    Raises DiscoveryError where a point is not shared out evenly, or is elsewhere in a rank.
    """
    places = {}
    for key, place in whole.places.items():
        own = rank.places.get(key)
        if own is None or _boundaries(own) != _boundaries(place):
            raise DiscoveryError(f"{key[0]} is elsewhere in a model that {ranks} ranks share: run it on one.")
        parts, rest = divmod(place.width, own.width)
        if rest or ranks % parts:
            raise DiscoveryError(f"{key[0]} has {place.width} features, and one of {ranks} ranks {own.width} of them.")
        places[key] = replace(own, parts=parts, copies=ranks // parts)
    return replace(whole, places=places)


def _boundaries(place: Place) -> list[str]:
    return list(map(str, place.terms))
