"""The results folder, made from inspect's log and the batches' captures. It can be made again at any time.

summary.json            accuracy by each scorer, with its 95 % interval; counts; what was cut off; settings
dataset.jsonl           a line for each sample: id, question, target, text, correct, truncated, tokens
samples/ID.json         one sample whole, and where its activations are
trajectories/ID.jsonl   its conversation, a message a line, tool calls and their results in it
activations/            one capture of all samples: their last generation, known by id, labelled with the scores
inspect/                inspect's own log, for `inspect view`
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hookmap.analysis.intervals import proportion_interval
from hookmap.evaluation.gsm8k.answers import SCORERS
from hookmap.evaluation.gsm8k.gathering import Taken, gather, is_gathered
from hookmap.stores.durable_files import write_file, writing

SUMMARY, DATASET, SAMPLES, TRAJECTORIES = "summary.json", "dataset.jsonl", "samples", "trajectories"
ACTIVATIONS, BATCHES, LOGS = "activations", "batches", "inspect"
METADATA = "hookmap"
MOST_TRUNCATED = 0.1
"""the share of answers above which a warning is given"""


def write_results(folder: Path, log: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write everything but the log, which exists. Returns the summary. Raises StoreError.

    log: inspect's EvalLog, with its samples. settings: of the run; its `scorer` says what `correct` is.
    """
    samples = sorted(log.samples or [], key=lambda sample: str(sample.id))
    for name in (SAMPLES, TRAJECTORIES):
        (folder / name).mkdir(exist_ok=True)
    gathered = is_gathered(folder / ACTIVATIONS)
    kept = gathered or (folder / BATCHES).is_dir()
    rows = [_row(sample, str(settings["scorer"])) for sample in samples]
    for sample, row in zip(samples, rows, strict=True):
        where = {"capture": ACTIVATIONS, "id": row["id"]} if kept and place_of(sample) else served_place(sample)
        whole = {**row, "worked_answer": (sample.metadata or {}).get("worked_answer"), "activations": where}
        write(folder / SAMPLES / f"{row['id']}.json", json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
        write(folder / TRAJECTORIES / f"{row['id']}.jsonl", lines(map(_message, sample.messages)))
    if kept and not gathered:
        gather(folder / BATCHES, folder / ACTIVATIONS, _taken(samples, rows), {"evaluation": "gsm8k"})
    write(folder / DATASET, lines(rows))
    summary = _summary(rows, settings)
    write(folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def _row(sample: Any, scorer: str) -> dict[str, Any]:
    scores = {name: (sample.scores or {}).get(name) for name in SCORERS}
    right = {name: score is not None and score.value == "C" for name, score in scores.items()}
    calls = _calls(sample)
    return {
        "id": str(sample.id),
        "question": sample.input if isinstance(sample.input, str) else sample.input[-1].text,
        "target": str(sample.target),
        "text": sample.output.completion,
        "correct": right[scorer],
        "scores": right,
        "answers": {name: None if score is None else score.answer for name, score in scores.items()},
        "truncated": any(map(is_truncated, sample.output.choices)),
        "prompt_tokens": _total(calls, "prompt_tokens"),
        "tokens": _total(calls, "tokens"),
        "calls": calls,
        "tool_calls": sum(len(m.tool_calls or ()) for m in sample.messages if m.role == "assistant"),
        "error": sample.error.message if sample.error else None,
    }


def _calls(sample: Any) -> list[dict[str, int | None]]:
    """Token counts of each call of the model, in order; None if the model reports none."""
    outputs = [event.output for event in sample.events or () if event.event == "model" and not event.error]
    return [
        {
            "prompt_tokens": output.usage.input_tokens if output.usage else None,
            "tokens": output.usage.output_tokens if output.usage else None,
        }
        for output in outputs
    ]


def _total(calls: Sequence[Mapping[str, int | None]], name: str) -> int | None:
    known = [count for call in calls if (count := call[name]) is not None]
    return sum(known) if known else None


def is_truncated(choice: Any) -> bool:
    """Whether a choice of an inspect output stopped at the limit of tokens."""
    return choice.stop_reason in ("max_tokens", "model_length")


def truncation_warning(truncated: int, answers: int, most: int | None, where: str = "") -> str | None:
    """A warning if more than a tenth of the answers was cut off, else None. `where` names the group of answers."""
    if truncated <= MOST_TRUNCATED * answers:
        return None
    limit = "" if most is None else f" at {most} tokens"
    return (
        f"{truncated} of {answers} answers{where} were cut off{limit}, before they may have come to a number. "
        "Such an answer counts as wrong, which says nothing of the model: allow more tokens."
    )


def _message(message: Any) -> dict[str, Any]:
    found = {"role": message.role, "content": message.text}
    if calls := getattr(message, "tool_calls", None):
        found["tool_calls"] = [
            {"id": c.id, "function": c.function, "arguments": c.arguments, "parse_error": c.parse_error} for c in calls
        ]
    if message.role == "tool":
        found |= {"tool_call_id": message.tool_call_id, "function": message.function}
        found["error"] = message.error.message if message.error else None
    return found


def _summary(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    count, cut = len(rows), [row for row in rows if row["truncated"]]
    accuracy = {}
    for name in SCORERS:
        right = sum(row["scores"][name] for row in rows)
        low, high = proportion_interval(right, count)
        accuracy[name] = {"accuracy": right / count if count else 0.0, "low": low, "high": high, "n": count}
    warning = truncation_warning(len(cut), count, settings.get("max_tokens"))
    return {
        "task": "gsm8k",
        "settings": dict(settings),
        "samples": count,
        "correct": sum(row["correct"] for row in rows),
        "truncated": len(cut),
        "truncated_and_wrong": sum(not row["correct"] for row in cut),
        "truncated_ids": [row["id"] for row in cut],
        "warnings": [warning] if warning else [],
        "errors": sum(row["error"] is not None for row in rows),
        "prompt_tokens": sum(row["prompt_tokens"] or 0 for row in rows),
        "tokens": sum(row["tokens"] or 0 for row in rows),
        "calls": sum(len(row["calls"]) for row in rows),
        "tool_calls": sum(row["tool_calls"] for row in rows),
        "scores": accuracy,
    }


def _taken(samples: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[Taken]:
    """The last generation of each sample: its prompt is the whole conversation."""
    found = []
    for number, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        if where := place_of(sample):
            labels = {name: row[name] for name in ("correct", "target", "truncated", "tokens", "tool_calls")} | row[
                "scores"
            ]
            found.append(Taken(str(where["capture"]), where["samples"][0], number, row["id"], labels))
    return found


def place_of(sample: Any) -> dict[str, Any] | None:
    """Where the provider put a sample's activations; None if it kept none."""
    found = (sample.output.metadata or {}).get(METADATA)
    return found if isinstance(found, dict) and found.get("capture") is not None else None


def served_place(sample: Any) -> dict[str, Any] | None:
    """The session of `hookmap serve` that holds the last generation; None if the server kept none.

    inspect's OpenAI provider leaves fields that it does not know out of the output; the call in the log has them.
    """
    for event in reversed(sample.events or []):
        if event.event == "model" and event.call is not None:
            session = (event.call.response or {}).get("session_id")
            return None if session is None else {"session": session, "choice": 0}
    return None


def lines(rows: Any) -> str:
    """JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises StoreError."""
    with writing(path):
        write_file(path, text.encode("utf-8"))
