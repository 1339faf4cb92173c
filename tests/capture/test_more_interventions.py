"""Noise, swaps, given rows, maps of rank k, what is skipped; and views with interventions that stay."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import plain_hooks
from support.opened import EACH_STRUCTURE, RAGGED, opened
from support.plain_hooks import FAMILIES, LAYERS
from support.raises import raises
from support.written_by_hand import LENGTHS, NEW, WIDTH, held_against_hooks, single

import hookmap

D = 32
DRAW = torch.Generator().manual_seed(5)
DOWN, UP = torch.randn(3, D, generator=DRAW), torch.randn(D, 3, generator=DRAW) / 10
GIVEN = torch.randn(2, D, generator=DRAW)


def rows_of(edits: Any, point: str = "resid_post", layer: int = 1, **options: Any) -> list[torch.Tensor]:
    run = opened("llama").capture(RAGGED, [point], [layer], interventions=edits, **{"max_new_tokens": 0, **options})
    return [run.read(number, point, layer) for number in range(len(RAGGED))]


def test_a_map_of_rank_k_adds_what_matrices_by_hand_add(tmp_path: Path) -> None:
    save_file({"a": DOWN, "b": UP}, tmp_path / "lora.safetensors")
    edits = tmp_path / "edits.yaml"
    matrix = "{{file: lora.safetensors, key: {}}}".format
    edits.write_text(
        f"- {{do: low_rank, point: mlp_out, layers: 1, down: {matrix('a')}, up: {matrix('b')}, strength: 2}}\n"
    )
    numbers = {"do": "low_rank", "point": "mlp_out", "layers": 1, "down": DOWN, "up": UP, "strength": 2}

    def changed(rows: torch.Tensor, at: list[int]) -> torch.Tensor:
        return rows + 2.0 * (rows @ DOWN.T @ UP.T)

    held_against_hooks("llama", "mlp_out", 1, changed, numbers, exact=False)
    for from_file, from_numbers in zip(rows_of(str(edits), "mlp_out"), rows_of([numbers], "mlp_out"), strict=True):
        assert torch.equal(from_file, from_numbers)


def test_given_rows_take_the_place_of_the_tokens_named() -> None:
    def two(rows: torch.Tensor, at: list[int]) -> torch.Tensor:
        return torch.stack([GIVEN[position] if position < 2 else row for row, position in zip(rows, at, strict=True)])

    replace = {"do": "replace", "point": "resid_mid", "layers": 1, "positions": [0, 1], "tensor": GIVEN}
    held_against_hooks("llama", "resid_mid", 1, two, replace)
    one = {"do": "replace", "point": "resid_mid", "layers": 1, "positions": "all", "tensor": GIVEN[0]}
    held_against_hooks("llama", "resid_mid", 1, lambda rows, at: GIVEN[0].expand_as(rows), one)


def test_a_swap_exchanges_two_rows_of_each_prompt() -> None:
    def exchanged(rows: torch.Tensor, at: list[int]) -> torch.Tensor:
        if len(at) == 1:
            return rows
        order = list(range(len(at)))
        order[0], order[at.index(2)] = at.index(2), 0
        return rows[order]

    swap = {"do": "swap", "point": "resid_pre", "layers": 1, "positions": [0, 2]}
    held_against_hooks("llama", "resid_pre", 1, exchanged, swap)


def test_noise_has_its_deviation_and_is_the_same_whatever_the_batch_and_the_cache() -> None:
    noise = {"do": "noise", "point": "resid_post", "layers": 1, "std": 0.5, "seed": 3}
    plain, noisy = rows_of(()), rows_of([noise])
    draws = torch.cat([b - a for a, b in zip(plain, noisy, strict=True)])
    # 544 numbers: the standard error of the deviation is 3 %, of the mean 4 % of it
    assert abs(draws.std() - 0.5) < 0.5 * 0.12 and abs(draws.mean()) < 0.5 * 0.17
    assert len({float(row[0]) for row in draws}) == len(draws)
    alone = rows_of([noise], batch_size=1)
    for first, second in zip(noisy, alone, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    cached, fed_again = (rows_of([noise], max_new_tokens=NEW, use_cache=cache) for cache in (True, False))
    for first, second in zip(cached, fed_again, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    other = rows_of([{**noise, "seed": 4}])
    assert not torch.allclose(other[0], noisy[0])


@contextlib.contextmanager
def without_block(model: Any, path: str) -> Iterator[None]:
    """A plain hook: the block gives what it got."""

    def skipped(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        entered = args[0] if args else kwargs["hidden_states"]
        return (entered, *output[1:]) if isinstance(output, tuple) else entered

    handle = model.get_submodule(path).register_forward_hook(skipped, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_a_block_that_is_skipped_passes_the_stream_on(name: str) -> None:
    hm, family = opened(name), FAMILIES[name]
    with without_block(hm.model, family.block.replace("{i}", "1")):
        reference = plain_hooks.generate(hm.model, family, RAGGED, max_new_tokens=NEW, do_sample=False)
    run = hm.capture(RAGGED, max_new_tokens=NEW, interventions=[{"do": "skip", "what": "block", "layers": 1}])
    for number, length in enumerate(LENGTHS):
        assert list(run.tokens[number]) == reference.sequences[number, WIDTH - length :].tolist()
        for layer in range(LAYERS):
            expected = reference.point(family, "resid_pre", layer)[number, WIDTH - length :]
            assert torch.equal(run.read(number, "resid_pre", layer), expected), layer


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_a_branch_that_is_skipped_adds_nothing(name: str) -> None:
    for what in ("mixer", "mlp"):
        if f"{what}_out" in single(name):
            edit = {"do": "skip", "what": what, "layers": 1}
            held_against_hooks(name, f"{what}_out", 1, lambda rows, at: torch.zeros_like(rows), edit)


def test_what_is_skipped_begins_with_what_was_written_there() -> None:
    hm = opened("llama")
    skip, double = {"do": "skip", "what": "block", "layers": 1}, {"do": "scale", "factor": 2.0, "point": "resid_pre"}
    entered = hm.capture(RAGGED, ["resid_pre"], [1], 0).read(0, "resid_pre", 1)
    for edits in ([skip, {**double, "layers": 1}], [{**double, "layers": 1}, skip]):
        assert torch.equal(rows_of(edits)[0], entered * 2)
    partly = rows_of([{**skip, "positions": [0]}])[0]
    assert torch.equal(partly[0], entered[0]) and not torch.equal(partly[1], entered[1])


def test_what_does_not_fit_is_refused() -> None:
    hm = opened("llama")
    low_rank = {"do": "low_rank", "point": "mlp_out", "layers": 1}
    for edit, said in (
        ({"do": "swap", "point": "resid_pre", "layers": 1, "positions": "0:2"}, "a swap is of two tokens"),
        ({"do": "swap", "point": "resid_pre", "layers": 1, "positions": [0, 7]}, "prompt 0 of 6 tokens has one of"),
        ({"do": "replace", "point": "resid_pre", "layers": 1, "tensor": [1.0]}, "a tensor of [1]: expected [32]"),
        ({"do": "replace", "point": "resid_pre", "layers": 1, "tensor": GIVEN}, "the source has 2 rows"),
        ({**low_rank, "down": DOWN, "up": UP.T}, "expected finite numbers [k, 32] and [32, k]"),
        ({**low_rank, "down": DOWN[:, 1:], "up": UP[1:]}, "down [3, 31] and up [31, 3]"),
        ({"do": "noise", "point": "resid_pre", "std": -1}, "greater than 0"),
        ({"do": "skip", "what": "norm"}, "should match pattern"),
    ):
        with pytest.raises(hookmap.InterventionError) as found:
            hm.capture(RAGGED, (), max_new_tokens=0, interventions=[edit])
        assert said in str(found.value), str(found.value)


# Views


@pytest.mark.slow
def test_a_view_runs_everything_with_its_interventions() -> None:
    hm = opened("llama")
    first = {"do": "scale", "factor": 2.0, "point": "mlp_out", "layers": 1}
    second = hookmap.apply(lambda rows, at: rows + 1, "resid_post", 1)
    digests = [parameter.clone() for parameter in hm.model.parameters()]
    one = hm.edited([first])
    both = one.edited(second)
    assert repr(both).endswith("edited: scale mlp_out, apply resid_post>")
    third = {"do": "ablate", "point": "resid_mid", "layers": 2}
    for view, edits in ((one, [first]), (both, [first, second])):
        for own in ((), [third]):
            expected = hm.capture(RAGGED, max_new_tokens=NEW, interventions=[*edits, *own])
            found = view.capture(RAGGED, max_new_tokens=NEW, interventions=own)
            assert found.tokens == expected.tokens
            assert all(torch.equal(found.read(n, *key), expected.read(n, *key)) for n in (0, 2) for key in found.keys)
    plain = hm.capture(RAGGED, ["resid_post"], [2], 0).read(0, "resid_post", 2)
    assert not torch.equal(both.capture(RAGGED, ["resid_post"], [2], 0).read(0, "resid_post", 2), plain)
    assert all(torch.equal(a, b) for a, b in zip(digests, hm.model.parameters(), strict=True))
    lens, bare = (each.lens(RAGGED[0], layers=[1]).probability for each in (both, hm))
    assert not torch.equal(lens, bare)


def test_a_source_is_read_on_the_model_that_the_patch_is_given_to() -> None:
    hm = opened("llama")
    double = {"do": "scale", "factor": 2.0, "point": "embed"}
    patch = {"do": "patch", "point": "resid_post", "layers": 1, "source": {"prompt": [4, 5, 6], "positions": [2]}}
    base, edited = (
        each.capture([[4, 5, 6]], ["resid_post"], [1], 0).read(0, "resid_post", 1)[2]
        for each in (hm, hm.edited(double))
    )
    for view, expected in ((hm.edited(double), edited), (hm.edited(patch), base)):
        given = [patch] if expected is edited else [double]
        found = view.capture(RAGGED, ["resid_post"], [1], 0, interventions=given).read(0, "resid_post", 1)
        assert torch.equal(found, expected.expand_as(found))


def test_a_view_of_what_cannot_be_written_is_refused_at_once() -> None:
    with raises(hookmap.InterventionError, "the model holds no such tensor: write z"):
        opened("llama").edited({"do": "scale", "factor": 2.0, "point": "attn_result"})
