"""Random captures held against plain hooks, and folders damaged at random. `pytest -m many`: 400 and 1,000 of them."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plain_hooks
from support.opened import opened
from support.store_runs import Run, resid

import hookmap
from hookmap.capture.rows import DTYPES, row_selection
from hookmap.errors import HookmapError
from hookmap.stores import open_store
from hookmap.stores.copying import repair
from hookmap.stores.folder import FolderWriter

pytestmark = pytest.mark.slow

# --- captures --------------------------------------------------------------------------------------------------------

BE = 4
"""the token whose text is "be" """


def a_selection(chance: random.Random, shortest: int) -> tuple[Any, Callable[[int, int, list[int]], list[int]]]:
    """Positions as a user writes them, and by hand: (prompt tokens, rows, token ids) -> positions."""
    low, high, step, back = chance.randrange(4), chance.randrange(4, 16), chance.randint(1, 4), chance.randint(1, 9)
    single = sorted({chance.randrange(-shortest, shortest) for _ in range(chance.randint(1, 3))})
    return chance.choice(
        [
            ("all", lambda prompt, rows, ids: list(range(rows))),
            ("prompt", lambda prompt, rows, ids: list(range(prompt))),
            ("generated", lambda prompt, rows, ids: list(range(prompt, rows))),
            ("last", lambda prompt, rows, ids: [rows - 1]),
            ("last_prompt", lambda prompt, rows, ids: [prompt - 1]),
            (f"{low}:{high}:{step}", lambda prompt, rows, ids: list(range(rows))[low:high:step]),
            (f"-{back}:", lambda prompt, rows, ids: list(range(max(0, prompt - back), rows))),
            (single, lambda prompt, rows, ids: sorted({p % prompt if p < 0 else p for p in single})),
            ("text=be", lambda prompt, rows, ids: [p for p in range(rows) if ids[p] == BE]),
        ]
    )


NAMED = ("last", "last_prompt")


def check_capture(number: int, folder: Path) -> None:
    chance = random.Random(number)
    name = chance.choice(["llama", "gpt2", "opt", "cohere"])
    hm, family = opened(name), plain_hooks.FAMILIES[name]
    prompts = [
        [chance.choice([BE, chance.randrange(3, 97)]) for _ in range(chance.randint(1, 12))]
        for _ in range(chance.randint(1, 6))
    ]
    new, size = chance.choice([0, 1, 2, 7]), chance.randint(1, 4)
    positions, by_hand = a_selection(chance, min(map(len, prompts)))
    every, mean = chance.choice([1, 1, 2, 3, 5]), positions != "last" and chance.random() < 0.25
    features = chance.choice([None, None, 5, [7, 0, 31]])
    dtype = chance.choice([None, None, "bfloat16", "float16"])
    points = chance.sample(sorted(family.points), chance.randint(1, 3))
    layers = sorted(chance.sample(range(plain_hooks.LAYERS), chance.randint(1, 3)))
    run = hm.capture(
        prompts, points, layers, new, positions=positions, every=every, mean=mean, features=features, keep_dtype=dtype,
        batch_size=size, store=folder if chance.random() < 0.5 else None,
    )  # fmt: skip
    batches = [[n] for n in range(len(prompts))]  # a text that is read, by itself: pads may round its last bits
    if new:
        batches = [list(range(n, min(n + size, len(prompts)))) for n in range(0, len(prompts), size)]
    columns = None if features is None else row_selection(features=features).columns(32)
    for batch in batches:
        seen = plain_hooks.generate(
            hm.model, family, [prompts[n] for n in batch], max_new_tokens=max(1, new), do_sample=False
        )
        width = max(len(prompts[n]) for n in batch)
        for row, n in enumerate(batch):
            prompt, pads = len(prompts[n]), width - len(prompts[n])
            rows, ids = prompt + max(0, new - 1), seen.sequences[row, pads:].tolist()
            expected = by_hand(prompt, rows, ids)
            if not (positions in NAMED or isinstance(positions, list)):
                expected = [p for p in expected if p % every == 0]
            sample = run.samples[n]
            assert list(sample.token_ids) == (ids if new else prompts[n])
            if mean:
                assert (sample.rows, sample.positions) == ((1, "mean") if expected else (0, ()))
            elif sample.positions is None:
                assert (positions, every, expected) == ("all", 1, list(range(sample.rows)))
            else:
                assert sample.positions == tuple(expected)
            for point, layer in run.keys:
                own = seen.point(family, point, layer)[row, pads : pads + rows][expected]
                own = own if columns is None else own[:, columns]
                if mean:
                    own = own.double().mean(0, keepdim=True).float()[: bool(expected)]
                own = own if dtype is None else own.to(DTYPES[dtype])
                found = run.read(n, point, layer)
                if new and not mean:
                    assert torch.equal(found, own), (point, layer, n)
                else:
                    assert found.dtype == own.dtype and found.shape == own.shape
                    torch.testing.assert_close(found.float(), own.float(), rtol=1e-2 if dtype else 1e-4, atol=1e-4)
    if folder.exists():
        assert hookmap.open_store(folder).verify() == []
        shutil.rmtree(folder)


@pytest.mark.parametrize("count", [16, pytest.param(400, marks=pytest.mark.many)])
def test_random_captures_are_what_plain_hooks_see(fast_path: Path, count: int) -> None:
    for number in range(count):
        try:
            check_capture(number, fast_path / "c")
        except Exception as error:
            error.add_note(f"capture {number}")
            raise


# --- damage ----------------------------------------------------------------------------------------------------------

RUN = Run(resid(), [[(0, 3, 7), (1, 5, 6)], [(2, 2, 10)], [(3, 1, 4), (4, 2, 2), (5, 4, 9)]], shard_tokens=8)
ROWS = {(number, key): RUN.rows(number, key) for number in RUN.samples for key in RUN.keys}
Damage = Callable[[random.Random, Path], None]


def a_file(chance: random.Random, folder: Path, ending: str = "") -> Path:
    return chance.choice(sorted(file for file in folder.rglob(f"*{ending}") if file.is_file()))


def in_bytes(change: Callable[[random.Random, bytearray], bytes]) -> Damage:
    def damage(chance: random.Random, folder: Path) -> None:
        file = a_file(chance, folder, chance.choice(["", "", ".jsonl", "samples.jsonl", "manifest.json"]))
        file.write_bytes(change(chance, bytearray(file.read_bytes())))

    return damage


def in_lines(change: Callable[[random.Random, list[bytes]], None]) -> Damage:
    def damage(chance: random.Random, folder: Path) -> None:
        file = a_file(chance, folder, ".jsonl")
        lines = file.read_bytes().splitlines(keepends=True)
        change(chance, lines)
        file.write_bytes(b"".join(lines))

    return damage


def flip(chance: random.Random, data: bytearray) -> bytes:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def zero(chance: random.Random, data: bytearray) -> bytes:
    place = chance.randrange(len(data))
    end = min(len(data), place + 16)
    data[place:end] = bytes(end - place)
    return bytes(data)


def another_digit(chance: random.Random, data: bytearray) -> bytes:
    places = [place for place, byte in enumerate(data) if chr(byte).isdigit()]
    data[chance.choice(places)] = ord(chance.choice("0123456789"))
    return bytes(data)


def a_digit_more(chance: random.Random, data: bytearray) -> bytes:
    place = chance.choice([place for place, byte in enumerate(data) if chr(byte).isdigit()])
    return bytes(data[:place] + chance.choice("0123456789").encode() + data[place:])


def swap_lines(chance: random.Random, lines: list[bytes]) -> None:
    one, other = (chance.randrange(len(lines)) for _ in range(2))
    lines[one], lines[other] = lines[other], lines[one]


def swap_shards(chance: random.Random, folder: Path) -> None:
    one, other = chance.sample(sorted((folder / "shards").iterdir()), 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


DAMAGES: list[Damage] = [
    in_bytes(flip),
    in_bytes(flip),
    in_bytes(zero),
    in_bytes(another_digit),
    in_bytes(another_digit),
    in_bytes(a_digit_more),
    in_bytes(lambda chance, data: bytes(data[: chance.randrange(len(data))])),
    in_bytes(lambda chance, data: bytes(data) + chance.randbytes(9)),
    in_lines(lambda chance, lines: lines.insert(chance.randrange(len(lines)), chance.choice(lines))),
    in_lines(lambda chance, lines: lines.pop(chance.randrange(len(lines))) and None),
    in_lines(lambda chance, lines: lines.__delitem__(slice(chance.randrange(len(lines)), None))),
    in_lines(swap_lines),
    swap_shards,
    lambda chance, folder: a_file(chance, folder).unlink(),
]


def right(path: Path, whole: bool) -> set[int]:
    """Every sample that a reader sees is as it was. Returns their numbers."""
    store = open_store(path)
    for sample in store.samples:
        assert sample == RUN.samples[sample.sample]
        for key in RUN.keys:
            assert torch.equal(store.read(sample.sample, *key), ROWS[sample.sample, key])
    numbers = {sample.sample for sample in store.samples}
    assert len(numbers) == len(store) and (not (whole or store.finished) or numbers == set(RUN.samples))
    return numbers


def check_damage(number: int, sound: Path, folder: Path) -> None:
    chance = random.Random(number)
    path, copy = folder / "c", folder / "copy"
    shutil.copytree(sound / chance.choice(["finished", "open"]), path)
    times = chance.choice([1, 1, 1, 2])
    for _ in range(times):
        chance.choice(DAMAGES)(chance, path)
    try:
        if open_store(path).verify() == []:
            right(path, whole=False)
    except HookmapError:
        pass
    try:
        found = repair(path, copy)
    except HookmapError:
        found = None
    if found is not None:
        kept_numbers = right(copy, whole=False)
        assert open_store(copy).verify() == [] and found.kept == len(kept_numbers)
        if times == 1 and kept_numbers != set(RUN.samples):
            assert found.lost or found.missing
            assert not open_store(copy).finished
        goes_on(copy)
        assert right(copy, whole=True) and open_store(copy).verify() == []
    try:
        goes_on(path)
        if open_store(path).verify() == []:
            right(path, whole=True)
    except HookmapError:
        pass


def goes_on(path: Path) -> None:
    with FolderWriter.resume(path, open_store(path).manifest) as writer:
        missing = [[one for one in batch if one[0] not in writer.finished] for batch in RUN.batches]
        Run(RUN.tensors, [batch for batch in missing if batch], shard_tokens=8).write(writer)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.many)])
def test_no_damage_gives_a_wrong_row_or_loses_one_in_silence(fast_path: Path, count: int) -> None:
    with FolderWriter.create(fast_path / "finished", RUN.manifest) as writer:
        RUN.write(writer)
    with pytest.raises(KeyboardInterrupt), FolderWriter.create(fast_path / "open", RUN.manifest) as writer:
        RUN.write(writer)
        raise KeyboardInterrupt
    for number in range(count):
        try:
            check_damage(number, fast_path, fast_path / str(number))
        except Exception as error:
            error.add_note(f"damage {number}")
            raise
        shutil.rmtree(fast_path / str(number))
