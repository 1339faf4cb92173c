"""GSM8K's answers are read as people read them, and nothing is ever evaluated as code."""

import json
import re
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import hookmap
from hookmap.evaluation.gsm8k.answers import SCORERS, same
from hookmap.evaluation.gsm8k.calculator import calculate
from hookmap.evaluation.gsm8k.problems import read_questions

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
