"""The list of blocks of the part of a model that reads pictures: its rows are patches, and what some add to them.

The tower runs alone, on a picture of noise. Its paths are those in the whole model, where it is a part of one.
"""

from __future__ import annotations

from torch import nn

from hookmap.discovery.dataflow import record
from hookmap.discovery.layer_choice import count_adding, find_layers, lengths_of_streams
from hookmap.discovery.layer_list import LayerList
from hookmap.discovery.values import Values
from hookmap.errors import DiscoveryError
from hookmap.loading import towers


def read_tower(model: nn.Module) -> tuple[Values, LayerList, nn.Module]:
    """The dataflow of one pass of the tower in `model`, its blocks, and the tower.

    Raises DiscoveryError where there is no one tower, or no one list of blocks, and what the tower raises where it does
    not run.
    """
    _, tower = towers.tower_of(model)
    refused: DiscoveryError | None = None
    first: Exception | None = None
    for given in towers.given(tower):
        try:
            flow = record(model, given, part=tower)
        except Exception as error:  # a model's own code raises what it likes
            first = first or error
            continue
        flow.tokens, picture = next(iter(given.items()))
        flow.batchless = picture.ndim == 2 or "grid_thw" in given or "image_grid_thw" in given
        values = Values(flow)
        layers = _layers(values, tower)
        if not _is_a_width(layers.seq, tower):
            flow.positions = layers.seq
            return values, layers, tower
        refused = DiscoveryError(
            f"a picture of the size that {type(tower).__name__} reads has {layers.seq} patches, and a layer is as "
            "wide: the axis of the patches cannot be told from the axis of the features."
        )
    raise refused or first or AssertionError


def _layers(values: Values, tower: nn.Module) -> LayerList:
    refused: DiscoveryError | None = None
    found: list[LayerList] = []
    for length in lengths_of_streams(values):
        try:
            found.append(find_layers(values, length))
        except DiscoveryError as error:
            refused = refused or error
    if not found:
        raise refused or DiscoveryError(f"{type(tower).__name__}: no modules hand patches on from one to the next.")
    best = max(found, key=lambda layers: (count_adding(values, layers), len(layers.streams)))
    others = {layers.path for layers in found if count_adding(values, layers) > 1} - {best.path}
    if hidden := {*others, *best.uncovered_lists}:
        raise DiscoveryError(
            f"the stream of {type(tower).__name__} goes through several lists of blocks, between which its number of "
            f"patches or its width changes: {', '.join(sorted({best.path, *hidden}))}. A map has one list."
        )
    return best


def _is_a_width(size: int, tower: nn.Module) -> bool:
    return any(size in module.weight.shape for module in tower.modules() if isinstance(module, nn.Linear))
