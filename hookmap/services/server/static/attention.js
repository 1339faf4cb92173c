// Where a head looks from one token: its attention weights on every token before.

import {tensors} from "./api.js";
import {readAttention, whyNotRead} from "./answers.js";
import {at, bench, choices, guarded, make, on, percent, quoted, seen} from "./parts.js";
import {place, visible} from "./token.js";

let reading = null;
let held = null;  // {answer, position, layer, shape, values} of all heads

export function start() {
  on("model", () => {
    const own = bench.structure.places.pattern;
    choices(at("attention-layer"), own?.layers ?? []);
    choices(at("attention-head"), Array.from({length: bench.structure.heads ?? 0}, (_, head) => head));
  });
  on("shown", clear);
  on("picked panel", look);
  on("ended", answer => { if (answer === bench.shown) look(); });
  at("attention-layer").onchange = look;
  at("attention-head").onchange = () => held ? render() : look();
}

function clear(text = "") {
  reading?.abort();
  held = null;
  at("looks").textContent = text;
  at("most").replaceChildren();
  at("weights").replaceChildren();
}

function look() {
  if (!visible("attention")) return clear();
  clear();
  const found = place(), layer = Number(at("attention-layer").value);
  if (!found) return;
  if (!bench.structure.places.pattern) return clear("No layer of this model has attention weights.");
  const why = whyNotRead(found.answer);
  if (why) return clear(why);
  const mine = reading = new AbortController();
  guarded(async () => {
    const [own] = Object.values(tensors(await readAttention(found.answer, found.position, layer, mine.signal)));
    if (mine !== reading) return;
    held = {...found, layer, ...own};
    choices(at("attention-head"), Array.from({length: own.shape.at(-2)}, (_, head) => head));
    render();
  });
}

function render() {
  const head = Number(at("attention-head").value), keys = held.shape.at(-1), tokens = held.answer.tokens;
  const weights = Array.from(held.values.slice(head * keys, (head + 1) * keys)).slice(0, held.position + 1);
  const most = Math.max(...weights);
  at("looks").textContent = `Head ${head} of layer ${held.layer}, from token ${held.position} ${quoted(tokens[held.position].text)}. Most of it:`;
  const best = weights.map((weight, position) => ({weight, position})).toSorted((one, other) => other.weight - one.weight).slice(0, 5);
  at("most").replaceChildren(...best.map(each => make("li", {}, make("b", {}, seen(tokens[each.position].text)), ` token ${each.position} `, make("small", {}, percent(each.weight)))));
  at("weights").replaceChildren(...weights.map((weight, position) => {
    const found = make("span", {title: `token ${position} ${quoted(tokens[position].text)}: ${percent(weight)}`}, seen(tokens[position].text));
    found.style.setProperty("--share", most ? weight / most : 0);
    return found;
  }));
}
