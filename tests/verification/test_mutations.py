"""A map with one wrong selector fails, whichever point it is of and with or without the relations that name it."""

import pytest
from support import invented_coupled, plain_hooks
from support.mutants import mutants, survives

from hookmap.discovery.discover import discover
from hookmap.verification.verify import redraw, verify

FEW = ("llama", "falcon_7b")


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.many) for name in plain_hooks.FAMILIES]
)
def test_no_wrong_map_passes(name: str) -> None:
    model = plain_hooks.build(name)
    redraw(model)
    found = discover(model)
    assert verify(model, architecture_map=found).passed
    wrong = list(mutants(found, model))
    assert len(wrong) > 10
    alive = [str(mutant) for mutant in wrong if survives(mutant, model)]
    assert not alive


@pytest.mark.usefixtures("seeded")
def test_keys_in_a_tuple_beside_the_stream_make_no_map_wrong_and_no_wrong_map_right() -> None:
    """No term names them: what reads them is checked with those of the same run."""
    model = invented_coupled.ValuesOfPrevious(invented_coupled.Borrowed).eval()
    found = discover(model)
    result = verify(model, architecture_map=found)
    assert result.passed, [each for each in result.checks if not each.passed]
    assert any("and the tuples that enter rungs.1 determine mixer_out" in each.detail for each in result.checks)
    wrong = [each for each in mutants(found, model) if "mixer_in" in (each.point, each.taken)]
    assert wrong
    assert not [str(mutant) for mutant in wrong if survives(mutant, model)]
