"""Tensors by their place in the model instead of a point's name: any module's input or output, any operation in it.

    model.layers.{i}.mlp.gate_proj.output     of each layer
    model.layers.3.self_attn:_softmax.input[0]

The text is a selector of the map's grammar, and is the tensor's name wherever a point's name is.
"""

from dataclasses import asdict
from functools import cache

from hookmap.maps.grammar import read_selector
from hookmap.maps.templates import PointTemplate, TermTemplate


@cache
def template_of(name: str) -> PointTemplate:
    """Where the tensor is that a place names; see `hookmap.maps.points.is_place`."""
    place, _ = read_selector(name)
    return PointTemplate(terms=(TermTemplate.model_validate(asdict(place)),), order=0)
