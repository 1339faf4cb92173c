"""Every format gives the same records; wrong ones are told all at once; ids and labels reach the samples."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support import plain_hooks
from support.raises import raises
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.datasets import PromptRecord

ROWS = [
    {"id": "a", "question": 'to be, or "not"', "answer": "7", "note": "x"},
    {"id": "b", "question": "that is\nthe question", "answer": "ü", "note": "y"},
]
EXPECTED = [PromptRecord(r["question"], r["id"], {"answer": r["answer"]}) for r in ROWS]


def write_csv(path: Path, separator: str) -> None:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [separator.join(ROWS[0]), *(separator.join(map(cell, row.values())) for row in ROWS)]
    path.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())


def write_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def save_to_disk(path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "d.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n"),
    "d.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "d.jsonl.gz": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "d.csv": lambda path: write_csv(path, ","),
    "d.tsv": lambda path: write_csv(path, "\t"),
    "d.parquet": write_parquet,
    "folder": save_to_disk,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert hookmap.load_prompts(tmp_path / name, labels=["answer"]) == EXPECTED
    (last,) = hookmap.load_prompts(str(tmp_path / name), prompt="note", id="answer", labels="all", skip=1, limit=5)
    assert last == PromptRecord("y", "ü", {"id": "b", "question": ROWS[1]["question"]})


def test_records_made_in_python_and_lines_of_text(tmp_path: Path) -> None:
    import datasets

    assert hookmap.load_prompts(ROWS, labels="answer") == EXPECTED
    assert hookmap.load_prompts(datasets.Dataset.from_list(ROWS), labels=["answer"]) == EXPECTED
    assert hookmap.load_prompts(row for row in ROWS) == [PromptRecord(r["question"], r["id"]) for r in ROWS]
    chat = [{"role": "user", "content": "to be"}]
    made = [PromptRecord("x", "1"), "to be", chat, [4, 5], {"messages": chat}, {"token_ids": [1, 2]}]
    expected = [PromptRecord("x", "1"), *map(PromptRecord, ("to be", chat, [4, 5], chat, [1, 2]))]
    assert hookmap.load_prompts(made) == expected
    (tmp_path / "t.txt").write_bytes(b"to be\r\n\nor not\n")
    assert hookmap.load_prompts(tmp_path / "t.txt") == [PromptRecord("to be"), PromptRecord("or not")]


def test_labels_are_plain_json() -> None:
    from datetime import date

    (record,) = hookmap.load_prompts(
        [{"prompt": "a", "x": float("nan"), "y": date(2020, 1, 2), "z": [1, {"q": (True, None)}]}], labels="all"
    )
    assert json.loads(json.dumps(record.labels, allow_nan=False)) == {
        "x": None, "y": "2020-01-02", "z": [1, {"q": [True, None]}],
    }  # fmt: skip


WRONG_LINES = (
    "line 1: expected one of the fields",
    "line 2: column 1: not JSON",
    "line 3: expected a text",
    "line 4: expected a text",
    "line 5: expected a text",
)


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("d.jsonl", '{"promt": "a"}\nno\n{"prompt": ""}\n{"prompt": null}\n7', WRONG_LINES),
        ("d.jsonl", '{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}', ("line 2: the id '1' is that of line 1",)),
        ("d.jsonl", '{"id": 1.5, "prompt": "a"}', ("line 1: id: expected a text or a whole number",)),
        ("d.jsonl", "", ("holds no prompts",)),
        ("d.jsonl", b"\xff\xfe{}", ("cannot be read",)),
        ("d.jsonl.gz", b"no gzip", ("cannot be read",)),
        ("d.json", "[1, 2", ("not JSON",)),
        ("d.jsonl", "[" * 100_000 + "\n" + "9" * 5000, ("line 1: not JSON that can", "line 2: not JSON that can")),
        ("d.csv", "prompt,x\na\nb,1,2\nc,1", ("line 2: expected 2 columns", "line 3: expected 2 columns")),
        ("d.csv", 'prompt\n"a', ("unexpected end of data",)),
        ("d.parquet", b"PAR0", ("cannot be read",)),
        ("d.xml", "<a>", ("expected a file of .jsonl", "found .xml")),
        ("none", None, ("expected a file of", "found no ending")),
        ("none.jsonl", None, ("none.jsonl cannot be read",)),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(
    tmp_path: Path, name: str, content: str | bytes | None, messages: tuple[str, ...]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(hookmap.DataError) as error:
        hookmap.load_prompts(tmp_path / name)
    for message in messages:
        assert message in str(error.value)


def test_many_wrong_records_are_counted() -> None:
    with raises(hookmap.DataError, "and 90 more"):
        hookmap.load_prompts([{"prompt": 1}] * 100)
    with raises(hookmap.DataError, "no column 'q', 'l': it has prompt"):
        hookmap.load_prompts([{"prompt": "a"}], prompt="q", labels=["l"])
    for source in (7, {"prompt": "a"}, b"abc"):
        with raises(hookmap.DataError, "prompts: expected"):
            hookmap.load_prompts(source)
    with raises(hookmap.DataError, "expected one of the fields prompt", "found 5"):
        hookmap.load_prompts([{5: "a"}])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"skip": -1}, "skip: expected a whole number from 0 on, got -1"),
        ({"limit": "3"}, "limit: expected a whole number from 0 on, got '3'"),
        ({"skip": 5}, "after the first 5 holds no prompts"),
    ],
)
def test_a_choice_without_records_says_so(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(hookmap.DataError, match=message):
        hookmap.load_prompts(["a", "b"], **chosen)


def test_a_folder_that_is_no_data_set_and_one_of_several_splits_are_refused(tmp_path: Path) -> None:
    import datasets

    with raises(hookmap.DataError, "save_to_disk"):
        hookmap.load_prompts(tmp_path)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "d"))
    with raises(hookmap.DataError, "train"):
        hookmap.load_prompts(tmp_path / "d")


def test_documents_in_csv_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(f"text,x\n{'a ' * 100_000},1\nb,2\n")
    assert [len(record.prompt) for record in hookmap.load_prompts(tmp_path / "d.csv")] == [200_000, 1]


def test_a_json_list_may_hold_chats_and_token_ids(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}]
    (tmp_path / "d.json").write_text(json.dumps([chat, [1, 2], "text"], indent=1))
    assert [record.prompt for record in hookmap.load_prompts(tmp_path / "d.json")] == [chat, [1, 2], "text"]


@pytest.mark.slow
def test_records_by_hand_are_what_the_table_can_hold(tmp_path: Path) -> None:
    """An id that was a number once made a folder that nobody could read."""
    import numpy

    hm = hookmap.open(plain_hooks.build("llama"))
    record: Any = PromptRecord([1, 2, 3], id=5, labels={"a": numpy.float32(3)})  # type: ignore[arg-type]
    run = hm.capture([record], ["resid_pre"], [1], 0, store=tmp_path / "run")
    assert (run.samples[0].id, run.samples[0].labels) == ("5", {"a": 3.0})
    with raises(hookmap.DataError, "id: expected a text or a whole number as a name, found 1.5"):
        PromptRecord("a", id=1.5)  # type: ignore[arg-type]


def test_ids_and_labels_stay_with_the_samples(tmp_path: Path) -> None:
    hm = hookmap.open(plain_hooks.build("llama"), tokenizer=tiny_tokenizer())
    records = hookmap.load_prompts([{"id": "one", "text": "to be", "answer": 7}, "or not"], labels=())
    records += hookmap.load_prompts([{"id": "two", "text": "is", "answer": 7}], labels=["answer"])
    run = hm.capture(records, ["resid_mid"], [1], 2, store=tmp_path / "run")
    for samples in (run.samples, hookmap.open_store(tmp_path / "run").samples):
        assert [(s.id, s.labels) for s in samples] == [("one", None), (None, None), ("two", {"answer": 7})]


@pytest.mark.slow
def test_the_command_keeps_ids_and_labels(tmp_path: Path) -> None:
    from hookmap.cli.main import main

    (tmp_path / "d.csv").write_text("name,question,answer\nq1,1+2=,3\nq2,2+2=,4\nq3,x,y\n")
    arguments = (
        "capture --points resid_post --layers 3 --max-new-tokens 0 --prompts d.csv --prompt-column question".split()
    )
    arguments += "--id-column name --label answer --limit 2 -o run".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        samples = hookmap.open_store("run").samples
        assert [(s.prompt, s.id, s.labels) for s in samples] == [
            ("1+2=", "q1", {"answer": "3"}), ("2+2=", "q2", {"answer": "4"}),
        ]  # fmt: skip
        wrong = CliRunner().invoke(main, [*arguments[:-1], "run2", "--label", "points"])
        assert wrong.exit_code == 2 and "no column 'points': it has name, question, answer" in wrong.output
