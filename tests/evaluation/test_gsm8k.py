"""GSM8K: an evaluation that is killed loses nothing finished, and answers do not depend on how they are batched."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.raises import raises

import hookmap
from hookmap.demo import MODEL_PATH

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("collected")]

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
    assert done.exit_code == 2 and "is a file" in done.stderr and "foresaw" not in done.stderr
    assert (tmp_path / "mine.txt").read_text("utf-8") == "mine"
