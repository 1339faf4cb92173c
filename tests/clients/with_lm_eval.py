"""lm-eval against a running server: python with_lm_eval.py URL PROBLEMS.jsonl TOKENIZER

Generation through chat and through completions, and a task of two choices by their log-likelihoods (echo, logprobs).
"""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

URL, PROBLEMS, TOKENIZER = sys.argv[1:]

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
metadata: {{version: 1.0}}
"""
GENERATE = """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["<|im_end|>"], max_gen_toks: 160, do_sample: false, temperature: 0.0}
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: "#### (-?[0-9]+)"}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """\
output_type: multiple_choice
doc_to_text: "<|im_start|>user\\n{{question}}<|im_end|>\\n<|im_start|>assistant\\n"
target_delimiter: ""
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def score(model: str, route: str, task: str, metric: str, tasks: Path, **more: object) -> float:
    """What lm-eval finds. It reads the tokenizer's folder where it counts tokens itself."""
    given = {"model": "hookmap-demo", "base_url": f"{URL}/v1/{route}", **more}
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    chat = route == "chat/completions"
    found = lm_eval.simple_evaluate(
        model=model, model_args=given, tasks=[task], task_manager=manager, apply_chat_template=chat, bootstrap_iters=0
    )
    return float(found["results"][task][metric])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder)
        for name, kind in (("sums", GENERATE), ("choices", CHOOSE)):
            head = TASK.format(name=name, data=json.dumps(str(Path(PROBLEMS).resolve())))
            (tasks / f"{name}.yaml").write_text(head + kind, encoding="utf-8")
        own = {"tokenizer": TOKENIZER, "tokenizer_backend": "huggingface"}
        told = {
            "local-chat-completions": score(
                "local-chat-completions", "chat/completions", "sums", "exact_match,strict", tasks, num_concurrent=4
            ),
            "local-completions, 4 choices of log-likelihood": score(
                "local-completions", "completions", "choices", "acc,none", tasks, **own
            ),
            "the same in batches of 4 prompts": score(
                "local-completions", "completions", "choices", "acc,none", tasks, **own, batch_size=4
            ),
        }
    assert min(told.values()) >= 0.9, told
    assert len(set(list(told.values())[1:])) == 1, told
    print("lm_eval: " + "; ".join(f"{name} {value:.2f}" for name, value in told.items()))


if __name__ == "__main__":
    main()
