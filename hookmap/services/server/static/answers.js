// An answer with the tokens of its prompt: how it is asked for, and how its tokens are read once more.

import {call, events, post} from "./api.js";
import {at, bench, tell} from "./parts.js";

let running = null;  // aborts the answer that comes
export const stop = () => running?.abort();

export function newAnswer(asked, changes) {
  return {
    asked,  // messages, temperature, max_tokens, seed
    changes,  // interventions of this answer; null: those of the server
    tokens: [],  // {id, text} of the prompt and of the answer, by position
    first: null,  // the position of the answer's first token
    figures: [],  // by position; the last token was not read, so that it has none
    of: null,  // the point and the figure that they are of
    text: "",
    comes: false,
  };
}

export const wanted = () => ({point: at("point").value, of: at("of").value});
export const sameFigures = (one, other) => one?.point === other?.point && one?.of === other?.of;

export async function ask(answer, kept) {  // stream the answer; `kept`: the rest of the hookmap field
  stop();
  const mine = running = new AbortController();
  const own = answer.changes ? {interventions: answer.changes} : {};
  answer.of = wanted();
  answer.comes = true;
  tell("began", answer);
  const summary = {...answer.of, prompt: bench.structure.reads_prompt};
  const body = {...answer.asked, model: at("model").value, stream: true, hookmap: {...kept, ...own, summary}};
  try {
    const response = await post("/v1/chat/completions", body, mine.signal);
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const piece = chunk.choices.map(choice => choice.delta.content ?? "").join("");
      const told = chunk.activations_summary ?? [];
      if (!piece && !told.length) continue;
      answer.text += piece;
      take(answer, told);
      tell("grew", {answer, piece, told});
    }
  } finally {
    answer.comes = false;
    if (mine === running) running = null;
    tell("ended", answer);
  }
}

function take(answer, told) {
  answer.first ??= told.length ? told.at(-1).position + 1 : null;
  for (const each of told) {
    if (each.read_id !== undefined) answer.tokens[each.position] = {id: each.read_id, text: each.read};
    if (each.token_id !== undefined) answer.tokens[each.position + 1] = {id: each.token_id, text: each.token};
    answer.figures[each.position] = each;
  }
}

// Readings: the tokens are read once more, as a prompt, with the same changes.

export function whyNotRead(answer) {
  if (!bench.structure.reads_prompt) return "The engine of this server does not read a prompt again.";
  const other = (answer.changes ?? bench.defaults).find(each => (each.positions ?? "all") !== "all" || each.steps || !["steer", "ablate", "clamp", "scale", "project_out", "low_rank", "skip"].includes(each.do) || (each.to ?? "zero") !== "zero");
  return other ? `A change (${other.do}) that is not of every token alike would fall elsewhere when the answer is read again.` : null;
}

async function reread(answer, end, body, signal) {
  const why = whyNotRead(answer);
  if (why) throw new Error(why);
  const prompt = answer.tokens.slice(0, end).map(token => token.id);
  const hookmap = {...(answer.changes ? {interventions: answer.changes} : {}), ...body.hookmap};
  const asked = {...body, model: at("model").value, prompt, temperature: 0, hookmap};
  return (await post("/v1/completions", asked, signal)).json();
}

export async function readFigures(answer, signal) {  // of another point, for every token
  const of = wanted(), end = answer.tokens.length - 1;
  const found = await reread(answer, end, {max_tokens: 1, hookmap: {return: "none", summary: {...of, prompt: true}}}, signal);
  answer.figures = found.activations_summary.slice(0, end).map((told, position) => ({...told, token: answer.tokens[position + 1].text}));
  answer.of = of;
}

export async function readLens(answer, position, point, follow, signal) {  // the five likeliest tokens of each layer
  const summary = {point, of: "lens", top: 5, ...(follow === null ? {} : {follow})};
  return (await reread(answer, position + 1, {max_tokens: 1, hookmap: {return: "none", summary}}, signal)).activations_summary[0];
}

export async function readAttention(answer, position, layer, signal) {  // safetensors of [1, heads, keys]
  const hookmap = {points: ["pattern"], layers: [layer], positions: [position], return: "inline"};
  const found = await reread(answer, position + 1, {max_tokens: 0, echo: true, hookmap}, signal);
  return found.activations_meta.samples[0].safetensors;
}
