"""A map with one wrong selector fails, whichever point it is of and with or without the relations that name it."""

import pytest
from support import plain_hooks
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
    assert len(wrong) > 20
    alive = [str(mutant) for mutant in wrong if survives(mutant, model)]
    assert not alive
