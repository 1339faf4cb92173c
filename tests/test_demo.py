"""The bundled demo model and the problems it was trained on."""

import math
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.raises import raises

import hookmap
from hookmap.cli.main import main
from hookmap.demo import MODEL_PATH, Problem, sample_problems
from hookmap.demo.problems import final_answer, split_of, stream

STEP = re.compile(r"^\w+ (?:has|have) (\d+)([+*-])(\d+)=<<(\d+)([+*-])(\d+)=(\d+)>>(\d+) (?:more )?\w+\.$")


def by_hand(question: str) -> int:
    """Answer a question from its own words, without any of the generator's code."""
    if both := re.match(r"\w+ has (\d+) \w+ and \w+ has (\d+)\.", question):
        left, right = int(both[1]), int(both[2])
        total = left - right if "How many more" in question else left + right
    elif each := re.match(r"\w+ has (\d+) \w+ with (\d+) \w+ each\.", question):
        total = int(each[1]) * int(each[2])
    else:
        has = re.match(r"\w+ has (\d+) \w+\.", question)
        assert has, question
        total = int(has[1])
    for verb, amount in re.findall(r"(buys|finds|gets|loses|sells|gives away) (\d+)", question):
        total += int(amount) if verb in ("buys", "finds", "gets") else -int(amount)
    return total


@pytest.mark.slow
def test_its_path_in_a_checkout_names_it_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "hookmap/demo/model"
    hm = hookmap.open(name, device="cpu")
    assert hm.to_str_tokens("3+4=") == ["3", "+", "4", "="]
    assert hm.root.state_dict().keys() == hookmap.open(MODEL_PATH, device="cpu").root.state_dict().keys()
    assert CliRunner().invoke(main, ["show", name, "--layers", "8"]).exit_code == 0
    (tmp_path / name).mkdir(parents=True)
    with raises(hookmap.ModelError, f"{name} is no model folder"):
        hookmap.open(name)


def test_importing_the_package_imports_no_framework() -> None:
    code = "import sys, hookmap.demo; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_problems_are_seeded() -> None:
    assert sample_problems(50, 3) == sample_problems(50, 3)
    assert sample_problems(50, 3) == sample_problems(80, 3)[:50]
    assert sample_problems(50, 3) != sample_problems(50, 4)
    assert sample_problems(2, 0, "heldout") == sample_problems(2, 0)


def test_problems_do_not_change_between_versions() -> None:
    # the bundled model's figures are measured on these very problems
    assert sample_problems(1, 12345)[0] == Problem(
        question="Tom has 3 bags with 6 balls each. He finds 11 more. How many balls does Tom have?",
        answer_text="Tom has 3*6=<<3*6=18>>18 balls.\nTom has 18+11=<<18+11=29>>29 balls.\n#### 29",
        answer=29,
        steps=2,
    )


def test_splits_are_disjoint() -> None:
    train = {problem.question for problem in islice(stream(0, "train"), 5000)}
    heldout = {problem.question for problem in sample_problems(1000, 0, "heldout")}
    assert len(heldout) == 1000
    assert not train & heldout
    assert all(split_of(question) == "train" for question in train)
    assert all(split_of(question) == "heldout" for question in heldout)


def test_an_unknown_split_is_refused() -> None:
    with raises(ValueError, "split must be one of train, heldout"):
        sample_problems(1, 0, "test")  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_right(split: Any) -> None:
    for problem in sample_problems(2000, 7, split):
        assert by_hand(problem.question) == problem.answer, problem
        *lines, last = problem.answer_text.split("\n")
        assert last == f"#### {problem.answer}"
        assert len(lines) == problem.steps
        result = None
        for line in lines:
            found = STEP.match(line)
            assert found, line
            left, operator, right = int(found[1]), found[2], int(found[3])
            assert (found[4], found[5], found[6]) == (found[1], found[2], found[3])
            expected = {"+": left + right, "-": left - right, "*": math.prod((left, right))}[operator]
            assert int(found[7]) == int(found[8]) == expected >= 0
            assert result in (None, left), "a step goes on from the one before"
            result = expected
        assert result == problem.answer == final_answer(problem.answer_text)


def test_final_answer() -> None:
    assert final_answer("Tom has 3+4=<<3+4=7>>7 pens.\n#### 7<|im_end|>") == 7
    assert final_answer("#### -2") == -2
    assert final_answer("seven") is None


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype="auto").eval()


@given(text=st.text())
def test_any_text_round_trips_as_its_bytes(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text


def test_chat_template(tokenizer: Any) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert Counter(i for i in ids if i >= 256) == {
        tokenizer.convert_tokens_to_ids("<|im_start|>"): 3,
        tokenizer.convert_tokens_to_ids("<|im_end|>"): 2,
    }
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "<|endoftext|>", "left")


def test_the_model_is_deep_and_small(model: Any, tokenizer: Any) -> None:
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.config.num_hidden_layers == 20
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.do_sample is False
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert sum(path.stat().st_size for path in Path(MODEL_PATH).iterdir()) < 5_000_000


def generate(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    """Greedy answers, by transformers alone, with special tokens: whether an answer ends itself is seen."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=128)
    return [str(text) for text in tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])]


@pytest.mark.slow
def test_the_model_answers_heldout_problems(model: Any, tokenizer: Any) -> None:
    asked = sample_problems(60, 99, "heldout")
    answers = generate(model, tokenizer, [problem.question for problem in asked])
    assert all("<|im_end|>" in answer for answer in answers), "it stops by itself"
    right = sum(final_answer(answer) == problem.answer for problem, answer in zip(asked, answers, strict=True))
    commonest = Counter(problem.answer for problem in asked).most_common(1)[0][1]
    assert commonest <= 10
    assert right >= 42


@pytest.mark.slow
def test_an_answer_does_not_depend_on_the_batch(model: Any, tokenizer: Any) -> None:
    questions = [problem.question for problem in sample_problems(6, 5, "heldout")]
    together = [answer.replace(tokenizer.pad_token, "") for answer in generate(model, tokenizer, questions)]
    alone = [generate(model, tokenizer, [question])[0] for question in questions]
    assert together == alone
