"""Odd files are read right or refused with their place: never a traceback, never a prompt that nobody wrote."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.raises import raises

import hookmap
from hookmap.datasets import PromptRecord


def parquet_of_twins() -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"]), sink)
    return sink.getvalue().to_pybytes()


# mtime: a parameter is a part of the test's name, so each of pytest's workers must make the same bytes.
DAMAGED_GZIP = bytearray(gzip.compress(json.dumps({"prompt": "abc" * 500}).encode(), mtime=0))
DAMAGED_GZIP[30:33] = b"\x00\xff\x13"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", b"prompt,prompt\na,b\n", "each column once, found 'prompt'"),
        ("d.parquet", parquet_of_twins(), "each column once, found 'prompt'"),
        ("d.csv", b'prompt,x\n"a\nb",1\n"c\nd",1,2\n', "line 4: expected 2 columns, as the first line has, found 3"),
        ("d.csv", b'prompt,x\na,1\n"b"c,1\n', "line 3: "),
        ("d.csv", b'input_ids\n"[1, 2]"\n', "line 2: input_ids: expected a list, found the text '[1, 2]'"),
        (
            "d.jsonl",
            b'{"prompt":"a"}\n' * 5000 + b'{"prompt":"\xff"}\n',
            "line 5001 is not UTF-8: byte 12 of it is 0xff",
        ),
        ("d.jsonl", b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}", "line 1: not JSON that can be read"),
        ("d.jsonl", b"[" * 100_000, "line 1: not JSON that can be read"),
        ("d.jsonl.gz", bytes(DAMAGED_GZIP), "cannot be read: Error -3"),
        ("d.json", b'[{"prompt": "a"}, null]', "record 1: expected a text"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(hookmap.DataError) as error:
        hookmap.load_prompts(tmp_path / name)
    assert message in str(error.value)


LONG = "to be " * 50_000
CHAT = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("d.csv", f'prompt,x\n\n{LONG},1\n"{LONG}",2\n', [LONG, LONG]),
        ("my.tsv.csv", "prompt,x\na,1\n", ["a"]),
        ("D.JSONL", '{"prompt": "a"}', ["a"]),
        ("d.json", '{\n "prompt": "a"\n}', ["a"]),
        ("d.json", json.dumps([[1, 2], [3], CHAT]), [[1, 2], [3], CHAT]),
        ("d.json", '{"prompt": "a"}\n{"prompt": "b"}', ["a", "b"]),
        ("d.jsonl", '{"prompt": "a\u2028b\u0085c"}\r\n{"prompt": "d"}', ["a\u2028b\u0085c", "d"]),
    ],
    ids=["long cells", "two endings", "capitals", "one record", "lists", "lines in .json", "line ends within"],
)
def test_odd_files_that_are_right_are_read(tmp_path: Path, name: str, content: str, prompts: list[Any]) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert [record.prompt for record in hookmap.load_prompts(tmp_path / name)] == prompts


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_names_of_splits_are_never_taken_for_prompts(tmp_path: Path) -> None:
    import datasets

    splits = datasets.DatasetDict({name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")})
    splits.save_to_disk(str(tmp_path / "d"))
    with raises(hookmap.DataError, "got a mapping of 'train', 'test'"):
        hookmap.load_prompts(splits)
    with raises(hookmap.DataError, "the splits 'train', 'test': expected one"):
        hookmap.load_prompts(tmp_path / "d")
    (tmp_path / "empty").mkdir()
    with raises(hookmap.DataError, "expected a folder of datasets.save_to_disk"):
        hookmap.load_prompts(tmp_path / "empty")
    assert hookmap.load_prompts(tmp_path / "d" / "test") == [PromptRecord("test")]


@pytest.mark.parametrize("value", [{1, 2}, b"a", object()])
def test_a_label_whose_text_is_not_the_same_in_every_run_is_refused(value: object) -> None:
    with raises(hookmap.DataError, "record 0: x: expected what JSON can hold, found"):
        hookmap.load_prompts([{"prompt": "a", "x": [value]}], labels="all")


def test_arguments_that_mean_nothing_are_refused_and_numpy_names_are_numbers() -> None:
    import numpy

    for options in ({"skip": -1}, {"limit": -1}):
        with raises(hookmap.DataError, "from 0 on, got -1"):
            hookmap.load_prompts(["a"], **options)
    with raises(hookmap.DataError, "after the first 2 holds no prompts"):
        hookmap.load_prompts(["a"], skip=2)
    assert hookmap.load_prompts([{"prompt": "a", "id": numpy.int64(4)}]) == [PromptRecord("a", "4")]
