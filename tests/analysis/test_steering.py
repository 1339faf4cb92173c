"""Steering vectors: hand calculation, the sign, what is kept in files, and the formats of other tools, byte by byte."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from support import plain_hooks
from support.raises import raises
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.analysis.gguf import read_gguf, write_gguf
from hookmap.analysis.steering import About, SteeringVector, load_vector, mean_difference, principal_direction
from hookmap.cli.main import main

POSITIVE = ["to be or not", "that is the question", "is the question to be"]
NEGATIVE = ["not or be to", "w3 w4 the w9 w2", "w7 not"]


def vector(point: str = "resid_post", layers: tuple[int, ...] = (1, 2), method: str = "pca") -> SteeringVector:
    about = About(point=point, method=method, model="a/model", model_type="llama", pairs=3, positions="last")
    return SteeringVector(about, {n: torch.randn(8, generator=torch.Generator().manual_seed(n)) for n in layers})


def test_a_mean_difference_is_what_is_calculated_by_hand() -> None:
    positive, negative = torch.tensor([[1.0, 2.0], [3.0, 8.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    assert mean_difference(positive, negative).tolist() == [2.0, 2.0]


def test_a_principal_direction_is_the_one_of_the_largest_spread_and_points_to_the_positive_rows() -> None:
    # Three pairs that differ along (3, 4) by 10, 20 and 30, and a little across it.
    along, across = torch.tensor([0.6, 0.8]), torch.tensor([-0.8, 0.6])
    middle = torch.randn(3, 2)
    half = torch.tensor([[5.0], [10.0], [15.0]]) * along + torch.tensor([[0.1], [0.0], [-0.05]]) * across
    direction = principal_direction(middle + half, middle - half)
    assert torch.allclose(direction, along, atol=0.01)
    assert torch.allclose(principal_direction(middle - half, middle + half), -direction)


def test_a_direction_without_a_mean_has_a_sign_that_does_not_depend_on_chance() -> None:
    rows = torch.tensor([[0.0, -3.0], [0.0, 3.0]])
    assert principal_direction(rows, -rows).tolist() == [0.0, 1.0]
    with raises(hookmap.SelectionError, "leave the same rows"):
        principal_direction(rows, rows)


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), pairs=st.integers(1, 5), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_a_principal_direction_has_length_one_and_never_points_away(seed: int, pairs: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    positive, negative = (scale * torch.randn(pairs, 6, generator=draw) for _ in range(2))
    direction = principal_direction(positive, negative)
    assert float(direction.norm()) == pytest.approx(1, abs=1e-5)
    assert float(direction @ mean_difference(positive, negative)) >= -1e-6 * scale


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mamba", "granite"])
def test_a_vector_of_prompts_is_that_of_rows_that_plain_hooks_see(name: str) -> None:
    model = plain_hooks.build(name)
    hm = hookmap.open(model, tokenizer=tiny_tokenizer())
    found = hm.steering_vector(POSITIVE, NEGATIVE, "mixer_out", [2, 0])

    def row(text: str, layer: int) -> torch.Tensor:
        family = plain_hooks.FAMILIES[name]
        ids = hm.tokenizer(text)["input_ids"]
        return plain_hooks.generate(model, family, [ids], max_new_tokens=1).point(family, "mixer_out", layer)[0, -1]

    for layer in (0, 2):
        by_hand = torch.stack([row(a, layer) - row(b, layer) for a, b in zip(POSITIVE, NEGATIVE, strict=True)]).mean(0)
        assert torch.allclose(found[layer], by_hand, atol=1e-5)
    assert found.layers == (0, 2) and found.about.pairs == 3 and found.about.point == "mixer_out"


def test_several_positions_are_averaged() -> None:
    hm = hookmap.open(plain_hooks.build("llama"), tokenizer=tiny_tokenizer())
    found = hm.steering_vector(POSITIVE[:1], NEGATIVE[:1], layers=1, positions="1:")
    run = hm.capture([POSITIVE[0], NEGATIVE[0]], "resid_post", 1, max_new_tokens=0)
    a, b = (run.read(sample, "resid_post", 1)[1:].mean(0) for sample in (0, 1))
    assert torch.allclose(found[1], a - b, atol=1e-5)


def test_pairs_that_are_none_are_refused() -> None:
    hm = hookmap.open(plain_hooks.build("llama"), tokenizer=tiny_tokenizer())
    for positive, negative in ((POSITIVE, NEGATIVE[:2]), ([], []), ("to be", "not")):
        with raises(hookmap.SelectionError, "two lists of prompts of one length"):
            hm.steering_vector(positive, negative)
    with raises(hookmap.SelectionError, "expected one of mean_difference, pca"):
        hm.steering_vector(POSITIVE, NEGATIVE, method="svm")
    with raises(hookmap.SelectionError, "is of the whole model"):
        hm.steering_vector(POSITIVE, NEGATIVE, "embed")


def test_a_file_gives_back_the_bits_and_what_they_are_of(tmp_path: Path) -> None:
    made = vector("resid_mid", (0, 11))
    back = load_vector(made.save(tmp_path / "new" / "v.safetensors"))
    assert back.about == made.about and back.layers == (0, 11)
    assert all(torch.equal(back[n], made[n]) for n in made.layers)


def test_a_file_that_is_no_vector_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "v.safetensors"
    about = vector().about.model_dump_json()
    broken: list[tuple[dict[str, Any], dict[str, str] | None, str]] = [
        ({"resid_post.1": torch.zeros(3)}, None, "KeyError"),
        ({"resid_post.1": torch.zeros(3)}, {"hookmap.steering": "{"}, "ValidationError"),
        ({"resid_post.1": torch.zeros(3)}, {"hookmap.steering": '{"point": "x", "method": "pca", "x": 1}'}, "extra"),
        ({"resid_mid.1": torch.zeros(3)}, {"hookmap.steering": about}, "expected tensors resid_post.LAYER"),
        ({"resid_post.1": torch.zeros(3).int()}, {"hookmap.steering": about}, "int32"),
        ({"resid_post.1": torch.zeros(3), "resid_post.2": torch.zeros(4)}, {"hookmap.steering": about}, "one width"),
        ({"resid_post.1": torch.full((3,), float("inf"))}, {"hookmap.steering": about}, "no number"),
    ]
    for tensors, metadata, why in broken:
        save_file(tensors, file, metadata=metadata)
        with pytest.raises(hookmap.StoreError, match=why) as raised:
            load_vector(file)
        assert str(raised.value).startswith(str(file))
    file.write_bytes(b"no tensors")
    with raises(hookmap.StoreError, "no steering vector"):
        load_vector(file)
    with raises(hookmap.StoreError, "no such file"):
        load_vector(tmp_path / "other.safetensors")


def test_a_gguf_file_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    made = vector(layers=(1, 3))
    data = write_gguf(made, tmp_path / "v.gguf").read_bytes()
    fields, tensors = _parse_gguf(data)
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama" and fields["controlvector.layer_count"] == 2
    assert list(tensors) == ["direction.1", "direction.3"]
    assert all(tensors[f"direction.{n}"] == made[n].tolist() for n in (1, 3))


def test_a_gguf_file_gives_back_the_bits(tmp_path: Path) -> None:
    made = vector(layers=(2, 1))
    back = read_gguf(write_gguf(made, tmp_path / "v.gguf"))
    assert back.layers == (1, 2) and all(torch.equal(back[n], made[n]) for n in made.layers)
    assert (back.about.point, back.about.method, back.about.model_type) == ("resid_post", "pca", "llama")


def test_a_gguf_file_that_repeng_wrote_is_read(tmp_path: Path) -> None:
    """Its fields and names, in the order in which repeng 0.4.0 writes them, put together here byte by byte."""
    file = tmp_path / "repeng.gguf"
    file.write_bytes(
        _gguf({"controlvector.model_hint": "mistral"}, {"direction.2": [1.0, -2.5], "direction.1": [3, 4]})
    )
    found = read_gguf(file)
    assert found[1].tolist() == [3.0, 4.0] and found[2].tolist() == [1.0, -2.5]
    assert found.about.model_type == "mistral" and found.about.method == "unknown"


def test_what_a_control_vector_cannot_say_is_refused(tmp_path: Path) -> None:
    for made, why in ((vector("resid_mid"), "is of resid_mid"), (vector(layers=(0, 1)), "--layers 1-1")):
        with pytest.raises(hookmap.StoreError, match=why):
            write_gguf(made, tmp_path / "v.gguf")


def test_a_gguf_file_that_is_no_control_vector_is_refused(tmp_path: Path) -> None:
    whole = _gguf({}, {"direction.1": [1.0]})
    broken = [
        (b"GGUF nothing", "no GGUF file"),
        (whole[:40], "no GGUF file"),
        (_gguf({}, {"direction.1": [1.0]}, architecture="llama"), "found 'llama'"),
        (_gguf({}, {"blk.1.weight": [1.0]}), "found blk.1.weight"),
        (_gguf({}, {"direction.x": [1.0]}), "found direction.x"),
        (_gguf({}, {}), "no layers"),
    ]
    for data, why in broken:
        (tmp_path / "v.gguf").write_bytes(data)
        with pytest.raises(hookmap.StoreError, match=why):
            read_gguf(tmp_path / "v.gguf")


def test_a_vector_says_how_to_steer_by_it() -> None:
    made = vector()
    (first, second) = made.interventions(4.0, positions="generated")
    assert first == {
        "do": "steer", "point": "resid_post", "layers": [1], "vector": made[1].tolist(), "strength": 4.0,
        "positions": "generated",
    }  # fmt: skip
    assert second["layers"] == [2] and [found["strength"] for found in made.interventions(layers=[2])] == [1.0]
    with raises(hookmap.SelectionError, "no layer 7: it has 1, 2"):
        made.interventions(layers=[7])


def test_steering_by_a_vector_adds_it(tmp_path: Path) -> None:
    hm = hookmap.open(plain_hooks.build("llama"), tokenizer=tiny_tokenizer())
    made = hm.steering_vector(POSITIVE, NEGATIVE, layers=[1])
    file = made.save(tmp_path / "v.safetensors")
    named = {"do": "steer", "point": "resid_post", "layers": [1], "vector": {"file": str(file), "key": "resid_post.1"}}
    before = hm.capture("to be", "resid_post", 1, max_new_tokens=0)["resid_post", 1]
    for steer, strength in ((made.interventions(2.0), 2.0), ([named], 1.0)):
        after = hm.capture("to be", "resid_post", 1, max_new_tokens=0, interventions=steer)["resid_post", 1]
        assert torch.allclose(after - before, (strength * made[1]).expand_as(before), atol=1e-5)


@pytest.mark.slow
def test_the_commands_make_convert_and_show(tmp_path: Path) -> None:
    pairs, made, other = (tmp_path / name for name in ("pairs.jsonl", "v.safetensors", "v.gguf"))
    pairs.write_text("\n".join(json.dumps({"positive": f"{n}+1=", "negative": f"{n}-1="}) for n in range(3)))
    runner = CliRunner()
    done = runner.invoke(main, ["vector", "make", "--pairs", str(pairs), "--layers", "1,8", "-o", str(made)])
    assert (done.exit_code, done.stdout) == (0, f"{made}\n"), done.stderr
    assert runner.invoke(main, ["vector", "convert", str(made), str(other)]).exit_code == 0
    shown = runner.invoke(main, ["vector", "show", str(other), "--json"])
    assert json.loads(shown.stdout)["lengths"].keys() == {"1", "8"}
    assert json.loads(shown.stdout)["about"]["model_type"] == "qwen3"
    assert "mean_difference" in runner.invoke(main, ["vector", "show", str(made)]).stderr


def test_every_wrong_line_of_a_pairs_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"positive": "a"}\nno json\n')
    out = str(tmp_path / "v.gguf")
    done = CliRunner().invoke(main, ["vector", "make", "--pairs", str(tmp_path / "pairs.jsonl"), "-o", out])
    assert done.exit_code == 2 and "line 1: expected" in done.stderr and "line 2, column 1" in done.stderr


def _gguf(fields: dict[str, str], tensors: dict[str, list[float]], architecture: str = "controlvector") -> bytes:
    """A GGUF file of version 3, by the format's description: texts and float32 vectors only."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    fields = {"general.architecture": architecture, **fields}
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields))
    head += b"".join(text(name) + struct.pack("<I", 8) + text(value) for name, value in fields.items())
    data = b""
    for name, numbers in tensors.items():
        head += text(name) + struct.pack("<IQIQ", 1, len(numbers), 0, len(data))
        data += struct.pack(f"<{len(numbers)}f", *numbers).ljust(32, b"\0")
    return head + b"\0" * (-len(head) % 32) + data


def _parse_gguf(data: bytes) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The same, read: texts, uint32 and float32 vectors only."""
    at = 0

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def text() -> str:
        length = take("Q")
        return str(take(f"{length}s").decode())

    assert (take("4s"), take("I")) == (b"GGUF", 3)
    counts = take("Q"), take("Q")
    fields = {}
    for _ in range(counts[1]):
        name, kind = text(), take("I")
        fields[name] = text() if kind == 8 else take({4: "I", 5: "i"}[kind])
    places = {}
    for _ in range(counts[0]):
        name, dimensions = text(), take("I")
        assert dimensions == 1
        places[name] = (take("Q"), take("I"), take("Q"))
    start = at + -at % 32
    assert all(kind == 0 for _, kind, _ in places.values())
    return fields, {
        name: list(struct.unpack_from(f"<{length}f", data, start + offset))
        for name, (length, _, offset) in places.items()
    }
