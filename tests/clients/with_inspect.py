"""inspect_ai against a running server: python with_inspect.py URL PROBLEMS.jsonl"""

import os
import sys
import tempfile

URL, PROBLEMS = sys.argv[1:]
os.environ |= {"HOOKMAP_BASE_URL": f"{URL}/v1", "HOOKMAP_API_KEY": "none", "INSPECT_DISPLAY": "none"}

from inspect_ai import Task, eval  # noqa: E402
from inspect_ai.dataset import FieldSpec, json_dataset  # noqa: E402
from inspect_ai.model import GenerateConfig, get_model  # noqa: E402
from inspect_ai.scorer import match  # noqa: E402
from inspect_ai.solver import generate  # noqa: E402


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:  # logs are read again when they are looked at
        use(folder)


def use(folder: str) -> None:
    problems = json_dataset(PROBLEMS, FieldSpec(input="question", target="target"))
    texts, told = {}, []
    for stream in (False, True):
        task = Task(dataset=problems, solver=generate(), scorer=match(numeric=True))
        model = get_model("openai-api/hookmap/hookmap-demo", stream=stream, memoize=False)
        (log,) = eval(task, model=model, log_dir=folder, temperature=0, max_tokens=160)
        assert log.status == "success", log.error
        texts[stream] = {sample.input: sample.output.completion for sample in log.samples}
        accuracy = log.results.scores[0].metrics["accuracy"].value
        assert accuracy >= 0.9, accuracy
        told.append(f"{'streamed' if stream else 'in one piece'} {accuracy:.2f}")
    assert texts[True] == texts[False], "a stream has the same text"

    record = {"hookmap": {"points": ["resid_mid"], "layers": [8], "return": "store"}}
    config = GenerateConfig(temperature=0, max_tokens=8, extra_body=record)
    task = Task(dataset=problems[:1], solver=generate(), config=config)
    (log,) = eval(task, model="openai-api/hookmap/hookmap-demo", log_dir=folder)
    assert log.status == "success", log.error
    (call,) = [event.call for event in log.samples[0].events if event.event == "model"]
    assert call.response["session_id"].startswith("act-"), call.response
    print(f"inspect_ai: accuracy on {len(problems)} problems {', '.join(told)}; a session by extra_body")


if __name__ == "__main__":
    main()
