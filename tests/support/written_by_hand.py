"""An independent reference of interventions: plain hooks that write what a function gives, and what comes of it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from support import plain_hooks
from support.opened import RAGGED, opened
from support.plain_hooks import FAMILIES, LAYERS

LENGTHS = [len(ids) for ids in RAGGED]
WIDTH = max(LENGTHS)
NEW = 5
Rows = torch.Tensor
Change = Callable[[Rows, list[int]], Rows]
"""(rows of one sample [n, d], their positions) -> new rows"""


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


def held_against_hooks(
    name: str, point: str, layer: int, change: Change, intervention: Any, exact: bool = True
) -> None:
    """The same tokens, and every point of every layer the same rows, with a cache and in a padded batch."""
    hm, family = opened(name), FAMILIES[name]
    with by_hand(hm.model, name, point, layer, change):
        reference = plain_hooks.generate(hm.model, family, RAGGED, max_new_tokens=NEW, do_sample=False)
    run = hm.capture(RAGGED, list(family.points), max_new_tokens=NEW, interventions=[intervention])
    exact &= family.points[point][0].scale == 1
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
    """The points that one place has."""
    return [point for point, places in FAMILIES[name].points.items() if len(places) == 1]
