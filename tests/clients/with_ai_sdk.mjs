// Vercel's AI SDK against a running server: node with_ai_sdk.mjs URL PROBLEMS.jsonl
// Its OpenAI provider asks /v1/responses unless told; `.chat` asks /v1/chat/completions.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [url, file] = process.argv.slice(2);
const from = createRequire(`${process.env.NODE_FOLDER}/`);
const { embedMany, generateText, streamText } = await import(pathToFileURL(from.resolve("ai")));
const { createOpenAI } = await import(pathToFileURL(from.resolve("@ai-sdk/openai")));
const { createOpenAICompatible } = await import(pathToFileURL(from.resolve("@ai-sdk/openai-compatible")));

const problems = readFileSync(file, "utf8").trim().split("\n").map(line => JSON.parse(line));
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "hookmap", baseURL: `${url}/v1` });
const models = { responses: openai("hookmap-demo"), chat: openai.chat("hookmap-demo"), compatible: compatible("hookmap-demo") };
const told = [];
for (const [name, model] of Object.entries(models)) {
  let right = 0;
  for (const { question, target } of problems) {
    const asked = { model, prompt: question, temperature: 0, maxOutputTokens: 160, maxRetries: 0 };
    const { text, usage, finishReason } = await generateText(asked);
    right += text.split("####").at(-1).trim() === target;
    assert.equal(finishReason, "stop");
    assert(usage.outputTokens > 0);
    let streamed = "";
    for await (const piece of streamText(asked).textStream) streamed += piece;
    assert.equal(streamed, text, "a stream has the same text");
  }
  assert(right >= 0.9 * problems.length, `${right} of ${problems.length} are right`);
  told.push(`${name} ${right} of ${problems.length} right`);
}
const values = problems.slice(0, 3).map(each => each.question);
const { embeddings } = await embedMany({ model: openai.embedding("hookmap-demo"), values });
assert.deepEqual(embeddings.map(each => each.length), [64, 64, 64]);
const { version } = JSON.parse(readFileSync(`${process.env.NODE_FOLDER}/node_modules/ai/package.json`, "utf8"));
console.log(`ai ${version}: ${told.join(", ")}; streamed, embeddings`);
