"""Interventions are what hand-written PyTorch hooks do, bit for bit; what changes nothing changes no bit."""

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import plain_hooks
import pytest
import torch
from plain_hooks import FAMILIES, LAYERS
from safetensors.torch import save_file
from tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.interventions import Steer, dump_interventions, load_interventions, read_interventions
from hookmap.model import HookedModel

RAGGED = [[5, 17, 3, 60, 22, 9], [11, 2, 33], [48, 7, 7, 90, 1, 2, 3, 4, 81]]
LENGTHS = [len(ids) for ids in RAGGED]
WIDTH = max(LENGTHS)
NEW = 5
D = 32
VECTOR = torch.randn(D, generator=torch.Generator().manual_seed(1)) * 3
UNIT = VECTOR / VECTOR.norm()
SOURCE = [60, 61, 62, 63]

Rows = torch.Tensor
Change = Callable[[Rows, list[int]], Rows]
"""(rows of one sample [n, d], their positions) -> new rows"""


@cache
def opened(name: str) -> HookedModel:
    return hookmap.open(plain_hooks.build(name), tokenizer=tiny_tokenizer())


def written_by_hand(model: Any, name: str, point: str, layer: int, change: Change) -> Iterator[None]:
    """Plain hooks that write a point of the left-padded batch: in place where it is the stream that a norm reads."""
    (place,) = FAMILIES[name].points[point]
    module = model.get_submodule(place.module.replace("{i}", str(layer)))
    fed = [0]

    def edited(tensor: torch.Tensor) -> torch.Tensor:
        new, width = tensor.clone(), tensor.shape[1]
        for row, length in enumerate(LENGTHS):
            positions = [fed[0] + column - (WIDTH - length) for column in range(width)]
            columns = [column for column, position in enumerate(positions) if position >= 0]
            own = [positions[column] for column in columns]
            old = tensor[row, columns] * place.scale if place.scale != 1 else tensor[row, columns]
            done = change(old, own)
            new[row, columns] = done / place.scale if place.scale != 1 else done
        fed[0] += width
        return new

    def on_input(_: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0] if args else kwargs["hidden_states"]
        if point == "resid_mid":
            with torch.no_grad():
                tensor.copy_(edited(tensor))
            return None
        new = edited(tensor)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def on_output(_: Any, args: Any, output: Any) -> Any:
        return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)

    if place.side == "input":
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


by_hand = contextlib.contextmanager(written_by_hand)


def held_against_hooks(name: str, point: str, layer: int, change: Change, intervention: dict[str, Any]) -> None:
    """The same tokens, and every point of every layer the same rows, with a cache and in a padded batch."""
    hm, family = opened(name), FAMILIES[name]
    with by_hand(hm.model, name, point, layer, change):
        reference = plain_hooks.generate(hm.model, family, RAGGED, max_new_tokens=NEW, do_sample=False)
    run = hm.capture(RAGGED, list(family.points), max_new_tokens=NEW, interventions=[intervention])
    exact = family.points[point][0].scale == 1
    for number, length in enumerate(LENGTHS):
        assert list(run.tokens[number]) == reference.sequences[number, WIDTH - length :].tolist()
        for each in family.points:
            for at in family.only_layers.get(each, range(LAYERS)):
                expected = reference.point(family, each, at)[number, WIDTH - length :]
                found = run.read(number, each, at)
                if exact:
                    assert torch.equal(found, expected), (each, at)
                else:
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def single(name: str) -> list[str]:
    return [point for point, places in FAMILIES[name].points.items() if len(places) == 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_steer_is_what_hand_written_hooks_do_on_every_point(name: str) -> None:
    hm = opened(name)
    for point in single(name):
        steer = {"do": "steer", "point": point, "layers": 1, "vector": VECTOR, "strength": 2.0}
        held_against_hooks(name, point, 1, lambda rows, at: rows + (2.0 * VECTOR), steer)
        plain, run = (hm.capture(RAGGED, ["logits"], max_new_tokens=0, interventions=i) for i in ((), [steer]))
        assert all(not torch.equal(plain.read(n, "logits"), run.read(n, "logits")) for n in range(len(RAGGED)))
