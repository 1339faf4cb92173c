"""LangChain's OpenAI classes against a running server: python with_langchain.py URL PROBLEMS.jsonl"""

import asyncio
import importlib.metadata
import json
import sys

from langchain_openai import ChatOpenAI, OpenAIEmbeddings

URL, PROBLEMS = sys.argv[1:]
WITH = {"base_url": f"{URL}/v1", "api_key": "none", "model": "hookmap-demo"}


def main() -> None:
    with open(PROBLEMS, encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    questions = [problem["question"] for problem in problems]
    told, models = [], []
    for responses in (False, True):
        model = ChatOpenAI(**WITH, temperature=0, max_tokens=160, use_responses_api=responses, max_retries=0)
        alone = [model.invoke(question).text for question in questions]
        right = sum(text.rpartition("####")[2].strip() == p["target"] for text, p in zip(alone, problems, strict=True))
        assert right >= 0.9 * len(problems), f"{right} of {len(problems)} are right"
        assert [message.text for message in model.batch(questions)] == alone, "at once, too"
        streamed = ["".join(chunk.text for chunk in model.stream(question)) for question in questions]
        assert streamed == alone, "a stream has the same text"
        models.append(model)
        assert model.invoke(questions[0]).usage_metadata["output_tokens"]
        told.append(f"{'responses' if responses else 'chat'} {right} of {len(problems)} right")
    texts = asyncio.run(asked(models, questions[0]))
    assert texts == [alone[0]] * 2, "so asynchronously"
    record = {"hookmap": {"points": ["resid_mid"], "layers": [8], "return": "store"}}
    kept = ChatOpenAI(**WITH, temperature=0, max_tokens=8, extra_body=record, include_response_headers=True)
    assert kept.invoke(questions[0]).response_metadata["headers"]["x-request-id"]
    # It would count tokens with OpenAI's own tokenizer, and send those.
    embeddings = OpenAIEmbeddings(**WITH, check_embedding_ctx_length=False)
    vectors = embeddings.embed_documents(questions[:3])
    assert [len(vector) for vector in vectors] == [64] * 3 and embeddings.embed_query(questions[0]) == vectors[0]
    version = importlib.metadata.version("langchain-openai")
    print(f"langchain-openai {version}: {', '.join(told)}; streamed, at once, embeddings")


async def asked(models: list[ChatOpenAI], question: str) -> list[str]:
    """In one event loop: LangChain's models share their connections."""
    return [(await model.ainvoke(question)).text for model in models]


if __name__ == "__main__":
    main()
