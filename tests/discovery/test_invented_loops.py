"""Invented architectures that run blocks several times: each run of each layer is the right tensor, or refused."""

from __future__ import annotations

from typing import Any

import pytest
from support import invented_loops as loops
from support.invented import check
from torch import nn

from hookmap.discovery.discover import discover
from hookmap.errors import DiscoveryError
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import parse
from hookmap.verification.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("seeded")]


@pytest.mark.parametrize(
    ("kind", "order", "between"),
    [
        (loops.Whole, "3 x (0-2)", {}),
        (
            loops.FedBack,
            "0, 3 x (1-2), 3-4",
            {
                "0 -> 1": "still(resid_post[0]) + still(resid_post[0])",
                "2 -> 1": "still(resid_post[2]) + still(resid_post[0])",
            },
        ),
        (
            loops.Adapted,
            "0-1, 3 x (2-3), 4",
            {
                "1 -> 2": "adapter(cat(weights, resid_post[1]))",
                "3 -> 2": "adapter(cat(resid_post[3], resid_post[1]))",
            },
        ),
        (loops.RandomStart, "0-1, 3 x (2-3), 4", None),
        (loops.ThereAndBack, "0-2, 2, 1, 0", {}),
        (loops.Nested, "2 x (3 x (0-1), 2-3)", None),
        (loops.Universal, "4 x (0)", {"0 -> 0": "resid_post[0] + weights"}),
        (loops.Uneven, "2 x (0-2), 0-1", {}),
        (loops.TwiceInARun, "3 x (0-2)", {"2 -> 0": "resid_post[2] + embed * 0.5"}),
        (loops.Reminded, "3 x (0-2)", {}),
        (loops.Halting, "3 x (0-2)", None),
        (loops.HaltingForGood, "3 x (0-2)", None),
        (
            loops.Averaged,
            "3 x (0-2)",
            {"2 -> final_norm": "mean(stack(resid_post[2, run 0], resid_post[2, run 1], resid_post[2]))"},
        ),
        (loops.Cycled, "2 x (0-3)", {}),
        (loops.Named, "0, 3 x (1), 2", {}),
        (loops.Groups, "2 x (0-1), 2 x (2-3)", {}),
    ],
)
def test_each_run_of_each_layer_is_right(kind: type[nn.Module], order: str, between: dict[str, str] | None) -> None:
    found = check(kind())
    assert found.runs == order
    assert parse(found.to_json()) == found
    assert between is None or found.between == between
    assert found.joined == (not set(found.between) - {"2 -> final_norm"})


@pytest.mark.parametrize("kind", [loops.UntilSure, loops.ByTheText])
def test_a_depth_that_depends_on_the_text_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(DiscoveryError, match=r"how often the blocks rungs.\{i\} run depends on the text"):
        discover(kind().eval())


def test_a_depth_that_is_drawn_is_refused() -> None:
    with pytest.raises(DiscoveryError, match=r"rungs.\{i\} run is drawn at random"):
        discover(loops.ByChance().eval())


@pytest.mark.parametrize("kind", [loops.Deepening, loops.Adapters])
def test_what_other_modules_add_in_each_run_is_the_difference_of_the_stream(kind: type[nn.Module]) -> None:
    found = check(kind())
    (mlp_out,) = (each for each in found.selectors("mlp_out", 1) if each.call == 2)
    assert [term.scale for term in mlp_out.terms] == [1.0, -1.0]
    why = found.unavailable("mlp_out_raw", 1)
    assert why is not None and "not at one place in each run of this layer: in run 0" in why


def test_layers_that_some_positions_run_again_are_refused_and_the_others_are_right() -> None:
    found = discover(loops.Chosen().eval())
    assert (found.runs, found.kind_of(0).calls, set(found.kind_of(1).points)) == ("0, 2 x (1-2)", 1, set())
    assert found.unavailable("resid_post", 2) == "in run 1 of its 2, no stream of all positions enters and leaves it"
    assert found.unavailable("resid_post", 0) is None


def _other_call(found: ArchitectureMap, point: str, **said: int) -> ArchitectureMap:
    """The map with another call in the terms of one point."""
    kinds = []
    for kind in found.kinds:
        template = kind.points[point]
        terms = tuple(term.model_copy(update=said) for term in template.terms)
        points = {**kind.points, point: template.model_copy(update={"terms": terms})}
        kinds.append(kind.model_copy(update={"points": points}))
    return found.model_copy(update={"kinds": tuple(kinds)})


@pytest.mark.parametrize(
    ("kind", "changed", "failed"),
    [
        (loops.FedBack, lambda m: m.model_copy(update={"runs": "0, 3 x (1), 3 x (2), 3-4"}), "runs"),
        (loops.FedBack, lambda m: m.model_copy(update={"between": {}, "joined": True}), "hand-over"),
        (loops.FedBack, lambda m: m.model_copy(update={"between": {**m.between, "1 -> 2": "x"}}), "hand-over"),
        (loops.Averaged, lambda m: m.model_copy(update={"between": {}}), "final_norm"),
        (loops.TwiceInARun, lambda m: _other_call(m, "mlp_in", call=0), "reads"),
        (loops.TwiceInARun, lambda m: _other_call(m, "mixer_in", call=1), "reads"),
        (loops.TwiceInARun, lambda m: _other_call(m, "resid_mid", calls_per_run=1), "sum"),
        (loops.Cycled, lambda m: _other_call(m, "resid_post", call=1), "sum"),
    ],
)
def test_a_map_that_is_wrong_about_runs_does_not_pass(kind: type[nn.Module], changed: Any, failed: str) -> None:
    model = kind().eval()
    found = discover(model)
    assert verify(model, architecture_map=found).passed
    result = verify(model, architecture_map=changed(found))
    assert failed in {each.name for each in result.checks if not each.passed}
