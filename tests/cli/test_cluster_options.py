"""What a command compiles taps for on vLLM: all that its run reads and writes."""

from types import SimpleNamespace
from typing import Any

import pytest

from hookmap.activations import key_of
from hookmap.cli.cluster_options import taps_of


@pytest.mark.parametrize(
    ("points", "read", "taps"),
    [
        (["resid_post"], [], {"resid_post": [1, 2]}),
        ("features", [("resid_post", 3)], {"resid_post": [3]}),
        (["features", "mlp_out"], [("resid_post", 3), ("mlp_out", 0)], {"mlp_out": [0, 1, 2], "resid_post": [3]}),
        ({"features": [3], "z": [1]}, [("embed", None)], {"z": [1], "embed": "all"}),
    ],
)
def test_taps_are_where_dictionaries_read(points: Any, read: list[tuple[str, Any]], taps: dict[str, Any]) -> None:
    dictionaries = [SimpleNamespace(reads=key_of(*each)) for each in read]
    assert taps_of(points, [1, 2], (), dictionaries) == {"taps": taps}
