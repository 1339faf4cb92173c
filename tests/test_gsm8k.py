"""GSM8K: answers are read as people read them, nothing is ever evaluated as code, and a kill loses nothing finished."""

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import hookmap
from hookmap.demo import MODEL_PATH
from hookmap.evals.answers import SCORERS, same
from hookmap.evals.calculator import calculate
from hookmap.evals.problems import read_questions

# Answers labelled by hand: what strict, flexible and inspect_evals should read. None: there is no such answer.
AWKWARD: list[tuple[str, Any, Any, Any]] = [
    ("She makes 9*2=18.\n#### 18", 18, 18, None),
    ("#### 1,234,567", 1234567, 1234567, None),
    ("#### $1,200.50", "1200.5", "1200.5", None),
    ("#### -7", -7, -7, None),
    ("#### −7 degrees", -7, -7, None),
    ("#### -$5", -5, -5, None),
    ("#### 18 dollars", 18, 18, None),
    ("#### 25%", 25, 25, None),
    ("#### 3.50", "3.5", "3.5", None),
    ("#### .5", "0.5", "0.5", None),
    ("#### **42**", 42, 42, None),
    ("#### 5\nNo, wait.\n#### 6", 6, 6, None),
    ("####7", 7, 7, None),
    ("#### the answer is 7", None, 7, None),
    ("####\n7", None, 7, None),
    ("####", None, None, None),
    ("#### 12.", 12, 12, None),
    ("The answer is 18.", None, 18, None),
    ("There are 3 boxes of 4, so 12 pens in all.", None, 12, None),
    ("It costs 2,000,000 dollars", None, 2000000, None),
    ("One of 3, 4 and 5", None, 5, None),
    ("So \\boxed{72}.", None, 72, None),
    ("So $\\boxed{\\$1{,}080}$", None, 1080, None),
    ("\\boxed{36 \\text{ apples}}", None, 36, None),
    ("\\boxed{\\frac{3}{4}}", None, "0.75", None),
    ("\\boxed{-\\dfrac{1}{2}}", None, "-0.5", None),
    ("ANSWER: 18", None, 18, 18),
    ("Answer: $1,200", None, 1200, 1200),
    ("ANSWER: 18 eggs\n", None, 18, 18),
    ("ANSWER: \\boxed{-3.25}", None, "-3.25", "-3.25"),
    ("ANSWER: 4\nThat took 2 steps.", None, 2, 4),
    ("**ANSWER: 9**", None, 9, 9),
    ("ANSWER: ten", None, None, None),
    ("10-3=7", None, 7, None),
    ("from 5-10 to 20", None, 20, None),
    ("version2 costs 8", None, 8, None),
    ("1 200", None, 200, None),
    ("", None, None, None),
    ("no number", None, None, None),
]


@pytest.mark.parametrize(("text", "strict", "flexible", "inspect_evals"), AWKWARD, ids=[repr(a[0]) for a in AWKWARD])
def test_the_scorers_agree_with_answers_labelled_by_hand(
    text: str, strict: Any, flexible: Any, inspect_evals: Any
) -> None:
    for name, wanted in (("strict", strict), ("flexible", flexible), ("inspect_evals", inspect_evals)):
        assert SCORERS[name](text) == (None if wanted is None else Fraction(wanted)), name


def test_numbers_are_the_same_by_value() -> None:
    assert same(Fraction("18.00"), Fraction(18)) and same(Fraction(1, 3), Fraction("0.33333333"))
    assert not same(None, None) and not same(Fraction(18), Fraction("18.01"))


@pytest.mark.parametrize(
    ("expression", "value"),
    [("3 * (4 + 1)", "15"), ("1,200 / 7", "171.4285714286"), ("-2 ** 2", "-4"), ("2^10", "1024"), ("0.1+0.2", "0.3"),
     ("$5 × 3", "15"), ("50%", "0.5"), ("7 // 2", "3"), ("7 % 4", "3"), ("2 ** -1", "0.5")],
)  # fmt: skip
def test_the_calculator_is_exact(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["__import__('os').system('x')", "open('f')", "1 if 1 else 2", "a + 1", "'a' * 3", "9 ** 9 ** 9", "2 ** 0.5",
     "1 / 0", "", "(" * 150, "1" * 201, "[1]", "True + 1", "lambda: 1", "1; 2", "10 ** 4000 * 10 ** 4000"],
)  # fmt: skip
def test_the_calculator_refuses_all_but_arithmetic(expression: str) -> None:
    with pytest.raises(ValueError, match=r"expected|arithmetic|understood|large|zero"):
        calculate(expression)


def test_questions_keep_their_ids_and_wrong_rows_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    rows = [{"question": f"q{n}", "answer": f"work {n}\n#### {n},000"} for n in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    found = read_questions(str(file), samples=2, skip=2)
    assert [(q.id, q.question, q.target) for q in found] == [
        ("gsm8k_0003", "q2", "2,000"),
        ("gsm8k_0004", "q3", "3,000"),
    ]
    assert read_questions("demo", 3, 1)[0] == read_questions("demo", 4)[1]
    file.write_text('{"question": "q"}\n{"question": "q", "answer": "none"}\n', "utf-8")
    with pytest.raises(hookmap.DataError, match=r"line 1(.|\n)*line 2"):
        read_questions(str(file))


# What follows runs inspect_ai.

RUN = "import sys, json; from hookmap.evals.run import evaluate; evaluate(sys.argv[1], **json.loads(sys.argv[2]))"


@pytest.fixture(scope="module")
def inspect_ai() -> Any:
    return pytest.importorskip("inspect_ai", reason='pip install "hookmap[eval]"')


def evaluation(folder: Path, **how: Any) -> "subprocess.Popen[str]":
    """In a process of its own: inspect sets up loops and logging of its process."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), json.dumps(how)], stderr=subprocess.PIPE, text=True
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_killed_evaluation_goes_on_and_does_nothing_finished_again(inspect_ai: Any, tmp_path: Path) -> None:
    from inspect_ai.log import list_eval_logs, read_eval_log

    how = {"samples": 6, "parallel": 2, "max_tokens": 96, "points": ["resid_post"], "layers": [8, 16]}
    folder = tmp_path / "results"
    process = evaluation(folder, **how)
    batches = folder / "batches"
    while process.poll() is None and not (batches / "000003").exists():  # two batches are done
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "summary.json").exists()
    (log,) = list_eval_logs(str(folder / "inspect"))
    before = {s.id: s.uuid for s in read_eval_log(log).samples or []}
    assert before, "nothing was finished before the kill: a batch did not reach the log"

    again = evaluation(folder, **how)
    told = again.communicate()[1]
    assert again.returncode == 0, told
    logs = [read_eval_log(found) for found in list_eval_logs(str(folder / "inspect"))]
    (whole,) = [log for log in logs if log.status == "success"]
    after = {s.id: s.uuid for s in whole.samples or []}
    assert len(after) == 6 and {name: after[name] for name in before} == before

    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    rows = lines(folder / "dataset.jsonl")
    assert summary["samples"] == 6 and summary["correct"] == sum(row["correct"] for row in rows) >= 4
    assert [row["id"] for row in rows] == [f"gsm8k_{n:04d}" for n in range(1, 7)]
    store = hookmap.open_store(folder / "activations")
    assert store.finished and store.verify() == [] and len(store) == 6
    for row in rows:
        one = json.loads((folder / "samples" / f"{row['id']}.json").read_text("utf-8"))
        sample = store.by_id(one["activations"]["id"])
        assert sample.text.strip() == row["text"].strip() and sample.labels["correct"] == row["correct"]
        said = lines(folder / "trajectories" / f"{row['id']}.jsonl")
        assert [message["role"] for message in said] == ["user", "assistant"]
    plain = hookmap.open(MODEL_PATH)
    ids = list(sample.token_ids[:-1])
    run = plain.capture([ids], points=["resid_post"], layers=[16], max_new_tokens=0)
    import torch

    assert torch.allclose(run.read(0, "resid_post", 16), store.read(sample.sample, "resid_post", 16), atol=1e-3)

    from hookmap.evals.run import evaluate

    with pytest.raises(hookmap.StoreError, match="mode: there 'no-tools', now 'with-tools'"):
        evaluate(folder, **{**how, "mode": "with-tools"})


def test_a_tool_call_is_read_from_what_a_model_writes(inspect_ai: Any) -> None:
    from hookmap.evals.provider import parse_tool_calls

    text, calls = parse_tool_calls(
        'So\n<tool_call>\n{"name": "calculator", "arguments": {"expression": "1+1"}}\n</tool_call>'
    )
    assert (text, calls[0].function, calls[0].arguments) == ("So", "calculator", {"expression": "1+1"})
    for broken in ("{", "[]", '{"name": 3}', '{"name": "x", "arguments": "1"}', "7"):
        (call,) = parse_tool_calls(f"<tool_call>{broken}</tool_call>")[1]
        assert call.parse_error
    assert parse_tool_calls("plain") == ("plain", [])


# inspect_ai's own calls of what its dependencies have deprecated; here it runs in this process.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_calculator_answers_within_the_conversation(inspect_ai: Any, tmp_path: Path) -> None:
    """The loop of model and tool is inspect's; its own scripted model stands in for one that calls tools."""
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    from hookmap.evals.gsm8k import gsm8k
    from hookmap.evals.results import write_results

    script = [
        ModelOutput.for_tool_call("mockllm", "calculator", {"expression": "2 * 21"}),
        ModelOutput.for_tool_call("mockllm", "calculator", {"expression": "open('x')"}),
        ModelOutput.from_content("mockllm", "It is so.\n#### 42"),
    ]
    for output in script:
        output.usage = ModelUsage()  # else inspect counts tokens, for which it needs the network
    model = get_model("mockllm/model", custom_outputs=script)
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "2 times 21?", "answer": "#### 42"}) + "\n", "utf-8")
    task = gsm8k(str(file), mode="with-tools")
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path / "log"), display="none")
    assert log.status == "success", log.error
    summary = write_results(tmp_path, log, {"scorer": "strict"})
    assert (summary["correct"], summary["tool_calls"]) == (1, 2)
    said = lines(tmp_path / "trajectories" / "gsm8k_0001.jsonl")
    assert [m["role"] for m in said] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert said[2]["content"] == "42" and "understood" in said[4]["error"]


def test_the_command_refuses_a_folder_that_holds_something_else(inspect_ai: Any, tmp_path: Path) -> None:
    from hookmap.cli.main import main

    (tmp_path / "mine.txt").write_text("mine", "utf-8")
    done = CliRunner().invoke(main, ["eval", "gsm8k", "demo", "-o", str(tmp_path)])
    assert done.exit_code == 1 and "not empty" in done.stderr
