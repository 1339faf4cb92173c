"""openai-python against a running server: python with_openai.py URL PROBLEMS.jsonl"""

import asyncio
import json
import sys

import openai
from openai import AsyncOpenAI, OpenAI

URL, PROBLEMS = sys.argv[1:]
WITH = {"model": "hookmap-demo", "temperature": 0, "max_tokens": 160}


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


async def together(questions: list[str]) -> list[str]:
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key="none") as client:
        asked = (client.chat.completions.create(messages=messages(q), **WITH) for q in questions)
        return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]


def main() -> None:
    client = OpenAI(base_url=f"{URL}/v1", api_key="none")
    create = client.chat.completions.create
    with open(PROBLEMS, encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    questions = [problem["question"] for problem in problems]
    alone = [create(messages=messages(q), **WITH).choices[0].message.content for q in questions]
    right = sum(text.rpartition("####")[2].strip() == p["target"] for text, p in zip(alone, problems, strict=True))
    assert right >= 0.9 * len(problems), f"{right} of {len(problems)} are right"
    assert asyncio.run(together(questions)) == alone, "at once, too"
    for question, text in zip(questions, alone, strict=True):
        with client.chat.completions.stream(messages=messages(question), **WITH) as stream:  # the client's own reading
            for _ in stream:
                pass
            assert stream.get_final_completion().choices[0].message.content == text

    asked = {"model": "hookmap-demo", "temperature": 0, "max_output_tokens": 160}
    for question, text in zip(questions, alone, strict=True):
        assert client.responses.create(input=question, **asked).output_text == text
        with client.responses.stream(input=question, **asked) as stream:
            for _ in stream:
                pass
            assert stream.get_final_response().output_text == text
    vectors = client.embeddings.create(model="hookmap-demo", input=questions[:2]).data
    assert len({len(vector.embedding) for vector in vectors}) == 1 and len(vectors) == 2

    summary = {"return": "none", "summary": {"point": "resid_post", "of": "lens"}}
    chunks = create(messages=messages("1+1?"), stream=True, **WITH, extra_body={"hookmap": summary})
    told = [chunk.activations_summary[0]["token"] for chunk in chunks if hasattr(chunk, "activations_summary")]
    assert told, "figures come with the tokens"
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    assert create(messages=messages(questions[0]), tools=tools, tool_choice="none", **WITH).choices[0].message.content
    try:
        create(messages=messages("1+1?"), tools=tools, **WITH)
        raise AssertionError("the demo's chat template takes no tools")
    except openai.BadRequestError as error:
        assert error.param == "tools", error
    did = "streamed, at once, responses, embeddings, figures, tools"
    print(f"openai {openai.__version__}: {right} of {len(problems)} right; {did}")


if __name__ == "__main__":
    main()
