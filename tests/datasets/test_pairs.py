"""Pairs out of files: every format gives the same, and all that is wrong is told at once."""

import json
from pathlib import Path

import pytest
from support.raises import raises

import hookmap
from hookmap.datasets.pairs import read_pairs

ROWS = [
    {"id": "a", "clean": "Mary and John", "corrupted": "Mary and Mary", "answer": " Mary", "wrong": " John", "note": 1},
    {"id": "b", "clean": "Tom", "corrupted": "Ann", "answer": " is", "wrong": " was", "note": 2},
]
PAIRS = [hookmap.Pair(r["clean"], r["corrupted"], r["answer"], r["wrong"], r["id"]) for r in ROWS]  # type: ignore[arg-type]


def write_csv(path: Path) -> None:
    lines = [",".join(ROWS[0]), *(",".join(map(str, row.values())) for row in ROWS)]
    path.write_text("\n".join(lines) + "\n")


def test_a_file_of_pairs_is_the_pairs_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "p.json").write_text(json.dumps(ROWS))
    write_csv(tmp_path / "p.csv")
    for name in ("p.jsonl", "p.json", "p.csv"):
        assert hookmap.load_pairs(tmp_path / name) == PAIRS
    assert hookmap.load_pairs(ROWS, skip=1) == PAIRS[1:] and hookmap.load_pairs(PAIRS, limit=1) == PAIRS[:1]
    assert read_pairs(PAIRS[0]) == read_pairs(ROWS[0]) == PAIRS[:1]


def test_pairs_of_token_ids_messages_and_answers_of_several_tokens(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "2+2?"}]
    row = {"clean": [1, 2], "corrupted": chat, "answer": [3, 4]}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    assert hookmap.load_pairs(tmp_path / "p.jsonl") == [hookmap.Pair([1, 2], chat, (3, 4))]


def test_what_is_no_pair_is_told_of_all_records_at_once(tmp_path: Path) -> None:
    rows = [ROWS[0], {"clean": "x", "answer": "y"}, {**ROWS[1], "answer": 1.5}, {**ROWS[1], "id": "a"}, "text"]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with raises(
        hookmap.DataError,
        "p.jsonl",
        "line 2: no corrupted: it has clean, answer",
        "line 3: answer: expected a text, a token id, or a list of token ids, found 1.5",
        "line 4: the id 'a' is that of line 1 already",
        "line 5: expected the columns clean, corrupted, answer, wrong",
    ):
        hookmap.load_pairs(tmp_path / "p.jsonl")
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(hookmap.DataError, match="holds no pairs"):
        hookmap.load_pairs(tmp_path / "none.jsonl")
