"""litellm against a running server: python with_litellm.py URL PROBLEMS.jsonl"""

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm

URL, PROBLEMS = sys.argv[1:]
litellm.suppress_debug_info = True
WITH = {"model": "openai/hookmap-demo", "api_base": f"{URL}/v1", "api_key": "none", "temperature": 0, "max_tokens": 160}


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def streamed(question: str, **more: object) -> tuple[str, object]:
    chunks = list(litellm.completion(messages=messages(question), stream=True, **WITH, **more))
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), chunks


async def together(questions: list[str]) -> list[str]:
    answers = await asyncio.gather(*(litellm.acompletion(messages=messages(q), **WITH) for q in questions))
    return [answer.choices[0].message.content for answer in answers]


def main() -> None:
    with open(PROBLEMS, encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    questions = [problem["question"] for problem in problems]
    alone = [litellm.completion(messages=messages(q), **WITH).choices[0].message.content for q in questions]
    right = sum(text.rpartition("####")[2].strip() == p["target"] for text, p in zip(alone, problems, strict=True))
    assert right >= 0.9 * len(problems), f"{right} of {len(problems)} are right"
    assert [streamed(question)[0] for question in questions] == alone, "a stream has the same text"
    assert asyncio.run(together(questions)) == alone, "at once, too"

    kept = litellm.completion(
        messages=messages(questions[0]),
        **WITH,
        extra_body={"hookmap": {"points": ["resid_mid"], "layers": [8], "return": "inline"}},
    )
    (tensor,) = kept.activations_meta["tensors"]
    assert tensor["shape"] == [kept.usage.total_tokens - 1, 64], tensor
    text = litellm.text_completion(prompt="2+2=", **{**WITH, "model": "text-completion-openai/hookmap-demo"})
    assert text.choices[0].text and text.usage.completion_tokens
    logprobs = litellm.completion(messages=messages("1+1?"), **WITH, logprobs=True, top_logprobs=2)
    assert len(logprobs.choices[0].logprobs.content) == logprobs.usage.completion_tokens
    try:
        litellm.completion(messages=messages("1+1?"), **{**WITH, "max_tokens": 10**6})
        raise AssertionError("too many tokens were not refused")
    except litellm.BadRequestError as error:
        assert "at most 4096" in str(error) or "max_model_len" in str(error), error
    print(f"litellm: {right} of {len(problems)} right; streamed, at once, kept, logprobs, completions, errors")


if __name__ == "__main__":
    main()
