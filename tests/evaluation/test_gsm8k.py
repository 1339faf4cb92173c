"""GSM8K: answers are read as people read them, nothing is ever evaluated as code, and a kill loses nothing finished."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.raises import raises

import hookmap
from hookmap.demo import MODEL_PATH
from hookmap.evaluation.gsm8k.answers import SCORERS, same
from hookmap.evaluation.gsm8k.calculator import calculate
from hookmap.evaluation.gsm8k.problems import read_questions

pytestmark = pytest.mark.slow

# Answers labelled by hand: what strict, flexible and inspect_evals should read. None: there is no such answer.
AGREED: list[tuple[str, Any, Any, Any]] = [
    ("She makes 9*2=18.\n#### 18", 18, 18, None),
    ("#### 1,234,567", 1234567, 1234567, None),
    ("#### $1,200.50", "1200.5", "1200.5", None),
    ("#### -7", -7, -7, None),
    ("#### -$5", -5, -5, None),
    ("#### 18 dollars", 18, 18, None),
    ("#### 25%", 25, 25, None),
    ("#### 3.50", "3.5", "3.5", None),
    ("#### .5", "0.5", "0.5", None),
    ("#### **42**", 42, 42, None),
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
    ("\\boxed{36 \\text{ apples}}", None, 36, None),
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
    ("ANSWER: ½", None, "0.5", "0.5"),
    ("On 1/2/2024", None, 2024, None),
    ("12/4=3", None, 3, None),
    ("#### 50 %", 50, 50, None),
    ("\\boxed{5\\%}", None, 5, None),
    ("#### 1,00,000", 100000, 100000, None),
    ("#### 5 or so", 5, 5, None),
    ("#### $-5", -5, -5, None),
    ("**#### 5**", 5, 5, None),
    ("### 5", None, 5, None),
    ("#### €5", 5, 5, None),
    ("#### £1,000.", 1000, 1000, None),
    ("#### USD 5", None, 5, None),
    ("#### (5)", 5, 5, None),
    ("#### x = 5", 5, 5, None),
    ("#### +5", 5, 5, None),
    ("#### - 5", -5, 5, None),
    ("#### -.5", "-0.5", "-0.5", None),
    ("#### $5$", 5, 5, None),
    ("#### $1,234.00.", 1234, 1234, None),
    ("#### 5!", 5, 5, None),
    ("#### 5km/h", 5, 5, None),
    ("#### 007", 7, 7, None),
    ("#### five (5)", None, 5, None),
    ("1, 2, 3", None, 3, None),
    ("Final answer: 7.", None, 7, 7),
    ("ANSWER:\n7", None, 7, None),
    ("ANSWER: 5\nANSWER: 6", None, 6, 6),
    ("ANSWER: $5.00 (or so)", None, 5, 5),
    ("#### 7 (3+4)", 7, 4, None),
    ("\\boxed{\\text{18}}", None, 18, None),
    ("ANSWER: \\mathbf{18}", None, 18, 18),
    ("##### 5", 5, 5, None),
    ("So it is...18", None, 18, None),
]
# Those in which lm_eval reads another number, by which of its filters; ours is the one that a person labelled.
APART: list[tuple[str, Any, Any, Any, str]] = [
    ("#### −7 degrees", -7, -7, None, "flexible"),
    ("#### 5\nNo, wait.\n#### 6", 6, 6, None, "strict"),
    ("So $\\boxed{\\$1{,}080}$", None, 1080, None, "flexible"),
    ("\\boxed{\\frac{3}{4}}", None, "0.75", None, "flexible"),
    ("\\boxed{-\\dfrac{1}{2}}", None, "-0.5", None, "flexible"),
    ("#### 1.5e3", 1500, 1500, None, "strict flexible"),
    ("#### 3.2E-2 kg", "0.032", "0.032", None, "strict flexible"),
    ("#### 5 × 10^3", 5000, 5000, None, "strict flexible"),
    ("\\boxed{6.02 \\times 10^{2}}", None, 602, None, "flexible"),
    ("It is 10^3", None, 1000, None, "flexible"),
    ("#### 3/4", "0.75", "0.75", None, "strict flexible"),
    ("#### 2 1/2 hours", "2.5", "2.5", None, "strict flexible"),
    ("He ate 2½ pies", None, "2.5", None, "flexible"),
    ("\\boxed{1\\frac{1}{2}}", None, "1.5", None, "flexible"),
    ("\\frac12", None, "0.5", None, "flexible"),
    ("\\boxed{\\frac{-3}{4}}", None, "-0.75", None, "flexible"),
    ("#### 10 000", 10000, 0, None, "strict"),
    ("#### 10\u00a0000", 10000, 10000, None, "strict flexible"),
    ("#### 10\u202f000", 10000, 10000, None, "strict flexible"),
    ("#### 1'000", 1000, 1000, None, "strict flexible"),
    ("#### 12,5", None, 5, None, "strict flexible"),
    ("#### 1.234,56", None, 56, None, "strict flexible"),
    ("#### 5-6", None, 6, None, "strict flexible"),
    ("#### 5:30", None, 30, None, "strict"),
    ("#### 5 to 6", None, 6, None, "strict"),
    ("#### 5 or 6", None, 6, None, "strict"),
    ("#### 5 and 6", None, 6, None, "strict"),
    ("#### 2^{10}", None, 10, None, "strict"),
    ("#### 2^n", None, 2, None, "strict"),
    ("#### 2**10", None, 10, None, "strict"),
    ("#### 0x12", None, None, None, "strict flexible"),
    ("#### 3 \\times 4", None, 4, None, "strict"),
    ("#### 2\\sqrt{3}", None, 3, None, "strict"),
    ("#### 5m2", 5, 5, None, "flexible"),
    ("#### 5 #### 6", 6, 6, None, "strict"),
    ("#### –5", -5, -5, None, "flexible"),
    ("x-5", None, 5, None, "flexible"),
    ("#### 2^10", None, 10, None, "strict"),
    ("#### 3+4=7", None, 7, None, "strict"),
    ("#### 3 * 4 = 12", None, 12, None, "strict"),
    ("#### 5 - 6", None, 6, None, "strict"),
    ("#### 5 ± 1", None, 1, None, "strict"),
    ("#### 3 : 2", None, 2, None, "strict"),
    ("#### 12 34", None, 34, None, "strict"),
    ("#### 1/0", None, 0, None, "strict"),
    ("#### 1_000", None, 1, None, "strict flexible"),
    ("#### 1e5000", None, 1, None, "strict flexible"),
    ("#### 12 345 678.90", "12345678.9", "678.9", None, "strict"),
    ("#### 1⁄2", "0.5", "0.5", None, "strict flexible"),
    ("#### 5 cm^2", 5, 5, None, "flexible"),
    ("\\boxed{18\\text{ cm}^2}", None, 18, None, "flexible"),
    ("\\boxed{1,\\!000}", None, 1000, None, "flexible"),
    ("ANSWER: $1\\,000$", None, 1000, 1000, "flexible"),
]
LABELLED = [*AGREED, *(row[:4] for row in APART)]

# lm-evaluation-harness's two filters for GSM8K, of its task file; its metric leaves out `$`, `,` and a last dot.
LM_EVAL_STRICT = r"#### (\-?[0-9\.\,]+)"
LM_EVAL_FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"


@pytest.mark.parametrize(
    ("text", "strict", "flexible", "inspect_evals"), [*LABELLED, ("#### " + "9" * 5000, None, None, None)], ids=ascii
)
def test_the_scorers_agree_with_answers_labelled_by_hand(
    text: str, strict: Any, flexible: Any, inspect_evals: Any
) -> None:
    for name, wanted in (("strict", strict), ("flexible", flexible), ("inspect_evals", inspect_evals)):
        assert SCORERS[name](text) == (None if wanted is None else Fraction(wanted)), name


def as_lm_eval(pattern: str, last: bool, text: str) -> Fraction | None:
    found = [next(filter(None, m.groups())) for m in re.finditer(pattern, text)]
    try:
        return Fraction(re.sub(r"[,$]", "", found[-last]).removesuffix("."))
    except (IndexError, ValueError):
        return None


def test_where_lm_eval_reads_an_answer_too_it_is_the_same_but_for_what_is_listed() -> None:
    """The last of several, powers, fractions, spaces and quotes in thousands; and what is unclear, where it guesses."""
    apart: dict[str, set[str]] = {"strict": set(), "flexible": set()}
    for text, *_ in LABELLED:
        for name, pattern, last in (("strict", LM_EVAL_STRICT, False), ("flexible", LM_EVAL_FLEXIBLE, True)):
            theirs = as_lm_eval(pattern, last, text)
            if theirs is not None and theirs != SCORERS[name](text):
                apart[name].add(text)
    for name, texts in apart.items():
        assert texts == {row[0] for row in APART if name in row[4].split()}


@pytest.mark.parametrize("piece", [" ", "\n", "1,", "1,111", "1 ", "1/", "\\boxed{", "10^", "- $", "ANSWER: ", "#### "])
def test_a_model_that_repeats_itself_is_read_in_no_time(piece: str) -> None:
    """16,000 characters; where the time grew with their square it was 10 seconds and more."""
    started = time.process_time()
    for read in SCORERS.values():
        read(piece * (16_000 // len(piece)))
    assert time.process_time() - started < 2


def test_numbers_are_the_same_by_value() -> None:
    assert same(Fraction("18.00"), Fraction(18)) and same(Fraction(1, 3), Fraction("0.33333333"))
    assert not same(None, None) and not same(Fraction(18), Fraction("18.01"))


@pytest.mark.parametrize(
    ("expression", "value"),
    [("3 * (4 + 1)", "15"), ("1,200 / 7", "171.4285714286"), ("-2 ** 2", "-4"), ("2^10", "1024"), ("0.1+0.2", "0.3"),
     ("$5 × 3", "15"), ("50%", "0.5"), ("7 // 2", "3"), ("7 % 4", "3"), ("2 ** -1", "0.5"), ("1,234,567+1", "1234568"),
     # A percent sign belongs to its number.
     ("100+5%", "100.05"), ("20/50%", "40"), ("200-10%", "199.9"), ("50 % * 4", "2"), ("5%*80", "4"), ("-5%", "-0.05"),
     ("(100+5)%", "1.05"), ("200*(10%+2.5%)", "25"), ("200*10%-5", "15"), ("5 % + 3 %", "0.08"), ("50%**2", "0.25"),
     ("1,200*5%", "60"), ("1e1%", "0.1"), ("7%4", "3"), ("100+7 % 4", "103"), ("(7 + 2) % (2 + 3)", "4")],
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


@pytest.mark.parametrize(
    "expression", ["50 % -4", "20% 50", "20%(50)", "7 % 4 + 5%", "5 % % 3", "10 % 5%", "20 %of 50", "5% x"]
)
def test_the_calculator_says_where_a_percent_sign_may_be_a_remainder(expression: str) -> None:
    with pytest.raises(ValueError, match=r"percent sign or a remainder|not arithmetic"):
        calculate(expression)


@pytest.mark.parametrize(
    ("expression", "why"),
    [("5%%", "behind a number"), ("%5", "not arithmetic"), ("*%", "behind a number"), ("3)%", "behind a number"),
     ("2,5 + 1", "thousands"),
     ("1,2,3", "thousands"), ("0x12%", "not arithmetic"), ("f(3)%", "understood"), ("2**50%", "whole powers")],
)  # fmt: skip
def test_the_calculator_says_why_it_refuses(expression: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
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
    file.write_text('{"question": "q"}\n[1]\nnull\n{"question": "q", "answer": "none"}\n{\n', "utf-8")
    with pytest.raises(hookmap.DataError) as wrong:
        read_questions(str(file))
    for line in (1, 2, 3, 4):
        assert f"line {line}: expected a `question` and an `answer` that ends in `#### x`" in str(wrong.value)
    assert "line 5: " in str(wrong.value)


# What follows runs inspect_ai.

EOS = 258
"""of the demo model"""
RUN = (
    "import sys, json; from hookmap.evaluation.gsm8k.run import evaluate; "
    "evaluate(sys.argv[1], **json.loads(sys.argv[2]))"
)


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


# inspect_ai's own calls of what its dependencies have deprecated; here it runs in this process.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
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

    from hookmap.evaluation.gsm8k.run import evaluate

    with raises(hookmap.StoreError, "opening: there {}, now {'dtype': 'bfloat16'}"):
        evaluate(folder, **how, opening={"dtype": "bfloat16"})
    evaluate(folder, **{**how, "parallel": 3})  # smaller batches, or larger ones, are the same run
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
        assert row["question"] in sample.prompt and sample.text.strip() == row["text"].strip()
        assert sample.labels["correct"] == row["correct"] and sample.labels["truncated"] == row["truncated"]
        assert row["truncated"] == (sample.token_ids[-1] != EOS) and row["prompt_tokens"] == sample.prompt_tokens
        assert row["tokens"] == len(sample.token_ids) - sample.prompt_tokens
        said = lines(folder / "trajectories" / f"{row['id']}.jsonl")
        assert [message["role"] for message in said] == ["user", "assistant"]
    plain = hookmap.open(MODEL_PATH)
    ids = list(sample.token_ids[:-1])
    run = plain.capture([ids], points=["resid_post"], layers=[16], max_new_tokens=0)
    import torch

    assert torch.allclose(run.read(0, "resid_post", 16), store.read(sample.sample, "resid_post", 16), atol=1e-3)

    with raises(hookmap.StoreError, "mode: there 'no-tools', now 'with-tools'"):
        evaluate(folder, **{**how, "mode": "with-tools"})


def test_the_weights_are_there_once(inspect_ai: Any, tmp_path: Path) -> None:
    """inspect makes a second provider, to look the model's name up."""
    count = "; import gc; print(sum(type(one).__name__ == 'Qwen3ForCausalLM' for one in gc.get_objects()))"
    how = json.dumps({"samples": 2, "parallel": 2, "max_tokens": 4})
    done = subprocess.run([sys.executable, "-c", RUN + count, tmp_path / "out", how], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["1"], done.stderr


def test_drawn_answers_do_not_depend_on_the_batch_size(inspect_ai: Any) -> None:
    """Three draws of each of two questions; with a generator for each batch, those of a split request were others."""
    import asyncio

    from inspect_ai.model import ChatMessageUser, GenerateConfig

    from hookmap.evaluation.inspect_provider import HookmapAPI

    async def answers(size: int, seed: int) -> list[list[str]]:
        model = HookmapAPI("demo", batch_size=size)
        how = GenerateConfig(max_tokens=6, temperature=3.0, num_choices=3, seed=seed)
        asked = [[ChatMessageUser(content=f"Tom has {n} apples.")] for n in (3, 40)]
        outputs = await asyncio.gather(*(model.generate(one, [], "none", how) for one in asked))
        return [[choice.message.text for choice in output.choices] for output in outputs]

    first = asyncio.run(answers(16, 5))
    assert all(len(set(texts)) == 3 for texts in first)
    assert asyncio.run(answers(2, 5)) == first
    assert not {*first[0]} & {*asyncio.run(answers(2, 6))[0]}


def test_an_answer_that_ends_with_its_last_token_is_not_cut_off(inspect_ai: Any) -> None:
    """The same greedy answer with as many tokens as it has, the end of sequence among them, and with one fewer."""
    import asyncio

    from inspect_ai.model import ChatMessageUser, GenerateConfig

    from hookmap.evaluation.inspect_provider import HookmapAPI

    model = HookmapAPI("demo")

    def answered(most: int, **more: Any) -> tuple[int, str]:
        asked = [ChatMessageUser(content="Tom has 3 apples. He buys 4 more. How many apples does Tom have?")]
        output = asyncio.run(model.generate(asked, [], "none", GenerateConfig(max_tokens=most, **more)))
        return output.usage.output_tokens, output.stop_reason

    whole, _ = answered(96)
    assert whole < 96
    assert answered(whole) == (whole, "stop") and answered(whole - 1) == (whole - 1, "max_tokens")
    short, why = answered(96, stop_seqs=["="])
    assert short < whole and why == "stop" and answered(short, stop_seqs=["="]) == (short, "stop")


def test_a_tool_call_is_read_from_what_a_model_writes(inspect_ai: Any) -> None:
    from hookmap.evaluation.inspect_provider import parse_tool_calls

    text, calls = parse_tool_calls(
        'So\n<tool_call>\n{"name": "calculator", "arguments": {"expression": "1+1"}}\n</tool_call>'
    )
    assert (text, calls[0].function, calls[0].arguments) == ("So", "calculator", {"expression": "1+1"})
    for broken in ("{", "[]", '{"name": 3}', '{"name": "x", "arguments": "1"}', "7"):
        (call,) = parse_tool_calls(f"<tool_call>{broken}</tool_call>")[1]
        assert call.parse_error
    assert parse_tool_calls("plain") == ("plain", [])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_calculator_answers_within_the_conversation(inspect_ai: Any, tmp_path: Path) -> None:
    """The loop of model and tool is inspect's; its own scripted model stands in for one that calls tools."""
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    from hookmap.evaluation.gsm8k.results import write_results
    from hookmap.evaluation.gsm8k.task import gsm8k

    script = [
        ModelOutput.for_tool_call("mockllm", "calculator", {"expression": "2 * 21"}),
        ModelOutput.for_tool_call("mockllm", "calculator", {"expression": "open('x')"}),
        ModelOutput.from_content("mockllm", "It is so.\n#### 42"),
    ]
    for output, (read, written) in zip(script, [(30, 20), (55, 20), (80, 5)], strict=True):
        output.usage = ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
    model = get_model("mockllm/model", custom_outputs=script)
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "2 times 21?", "answer": "#### 42"}) + "\n", "utf-8")
    task = gsm8k(str(file), mode="with-tools")
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path / "log"), display="none")
    assert log.status == "success", log.error
    summary = write_results(tmp_path, log, {"scorer": "strict"})
    assert (summary["correct"], summary["tool_calls"], summary["calls"]) == (1, 2, 3)
    assert (summary["tokens"], summary["prompt_tokens"], summary["truncated"]) == (45, 165, 0)
    [row] = lines(tmp_path / "dataset.jsonl")
    assert (row["tokens"], row["prompt_tokens"]) == (45, 165)
    assert [(call["prompt_tokens"], call["tokens"]) for call in row["calls"]] == [(30, 20), (55, 20), (80, 5)]
    from scipy.stats import binomtest

    exact = binomtest(1, 1).proportion_ci(method="exact")
    assert summary["scores"]["strict"] == {
        "accuracy": 1.0, "low": pytest.approx(exact.low), "high": 1.0, "n": 1
    }  # fmt: skip
    said = lines(tmp_path / "trajectories" / "gsm8k_0001.jsonl")
    assert [m["role"] for m in said] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert said[2]["content"] == "42" and "understood" in said[4]["error"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_what_was_refused_before_it_ran_can_be_put_right_in_the_same_folder(inspect_ai: Any, tmp_path: Path) -> None:
    from hookmap.cli.main import main

    file, out = tmp_path / "two.jsonl", tmp_path / "out"
    file.write_text(json.dumps({"question": "Tom has 3 apples.", "answer": "#### 3"}) + "\n", "utf-8")
    command = ["eval", "gsm8k", "demo", "--data", file, "--max-new-tokens", "4", "-o", out, "--layers", "8", "--points"]
    wrong = CliRunner().invoke(main, [*map(str, command), "resid_pist"])
    assert wrong.exit_code == 1 and "did you mean resid_post" in wrong.stderr
    done = CliRunner().invoke(main, [*map(str, command), "resid_post", "--samples", "3"])
    assert done.exit_code == 0 and "there are 1 questions, 3 were asked for" in done.stderr, done.stderr
    assert len(hookmap.open_store(out / "activations")) == 1
    assert "0 of 1 correct, 1 cut off (1 of them wrong), 4 tokens generated" in done.stderr
    assert "1 of 1 answers were cut off at 4 tokens" in " ".join(done.stderr.split())
    assert "0.000 to 0.975" in done.stderr and "±" not in done.stderr
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert (summary["truncated"], summary["truncated_ids"]) == (1, ["gsm8k_0001"]) and len(summary["warnings"]) == 1
    assert json.loads((out / "samples" / "gsm8k_0001.json").read_text("utf-8"))["truncated"] is True


def test_the_command_refuses_a_folder_that_holds_something_else(inspect_ai: Any, tmp_path: Path) -> None:
    from hookmap.cli.main import main

    (tmp_path / "mine.txt").write_text("mine", "utf-8")
    done = CliRunner().invoke(main, ["eval", "gsm8k", "demo", "-o", str(tmp_path)])
    assert done.exit_code == 1 and "not empty" in done.stderr
    done = CliRunner().invoke(main, ["eval", "gsm8k", "demo", "-o", str(tmp_path / "mine.txt")])
    assert done.exit_code == 2 and "mine.txt is a file: expected a folder" in done.stderr
    done = CliRunner().invoke(main, ["eval", "gsm8k", "demo", "-o", str(tmp_path / "mine.txt" / "out")])
    assert done.exit_code == 1 and "cannot write" in done.stderr and "foresaw" not in done.stderr
    assert (tmp_path / "mine.txt").read_text("utf-8") == "mine"
