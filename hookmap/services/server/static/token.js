// One token: what each layer would say next, and the rank of a followed token over the layers.

import {readLens, whyNotRead} from "./answers.js";
import {at, bench, choices, count, drawn, guarded, make, on, percent, quoted, seen} from "./parts.js";

const nothing = "Choose a token: click on one in the conversation or in the map.";
let reading = null;
let follow = null;  // {id, text}; null: the token that came next
let known = new Map();  // the tokens that can be followed: id -> text

export function start() {
  on("model", () => choices(at("lens-point"), bench.structure.summary.lens, "resid_post"));
  on("shown", () => { clear(); which(); });
  on("picked", () => { follow = null; known = new Map(); which(); look(); });
  on("ended", answer => { if (answer === bench.shown) { which(); look(); } });
  at("lens-point").onchange = look;
  at("follow").onchange = () => { follow = Number(at("follow").value); look(); };
  for (const [own, other] of [["lens", "attention"], ["attention", "lens"]]) {
    const tab = at(own + "-tab");
    tab.onclick = () => choose(own, other);
    tab.onkeydown = event => { if (["ArrowLeft", "ArrowRight"].includes(event.key)) { choose(other, own); at(other + "-tab").focus(); } };
  }
  clear();
  which();
}

function choose(own, other) {
  for (const [name, chosen] of [[own, true], [other, false]]) {
    at(name + "-tab").setAttribute("aria-selected", chosen);
    at(name + "-tab").tabIndex = chosen ? 0 : -1;
    at(name).hidden = !chosen;
  }
  bench.dispatchEvent(new CustomEvent("panel"));
}
on("panel", look);

export const visible = name => !at(name).hidden;

export function place() {  // of the row that is read: {answer, position, next}; null where there is none
  const answer = bench.shown;
  if (!answer || bench.picked === null || answer.comes) return null;
  const position = Math.min(bench.picked, answer.tokens.length - 2);  // the last token was never read
  return position < 0 ? null : {answer, position, next: answer.tokens[position + 1]};
}

function which() {
  const answer = bench.shown, position = bench.picked;
  const own = answer?.tokens[position];
  if (!own) { at("which").textContent = answer ? nothing : "Readings of a token are shown here, once there is an answer."; return; }
  const where = position >= answer.first ? "the answer" : "the prompt", next = answer.tokens[position + 1];
  const end = next ? `, before ${quoted(next.text)}` : ". The model never read it: this is of the token before, where it was predicted";
  at("which").textContent = `Token ${count(position)} ${quoted(own.text)} of ${where}${end}.` + (answer.comes ? " It can be read when the answer has ended." : "");
}

function clear() {
  reading?.abort();
  at("ranks").replaceChildren();
  at("tops").replaceChildren();
  choices(at("follow"), []);
}

function look() {
  reading?.abort();
  const found = place();
  if (!found) return clear();
  if (!visible("lens")) return;
  const why = whyNotRead(found.answer);
  if (why) { clear(); at("ranks").replaceChildren(make("p", {className: "hint"}, why)); return; }
  const id = follow ?? found.next.id, mine = reading = new AbortController();
  known.set(found.next.id, found.next.text);
  at("lens").ariaBusy = true;
  guarded(async () => {
    try {
      const told = await readLens(found.answer, found.position, at("lens-point").value, id, mine.signal);
      if (mine === reading) render(told, id, found.next.id);
    } catch (error) {
      if (mine === reading) clear();
      throw error;
    } finally { if (mine === reading) at("lens").ariaBusy = false; }
  });
}

function render(told, id, next) {
  for (const each of told.top.flat()) known.set(each.token_id, each.token);
  choices(at("follow"), [...known.keys()], id, key => (Number(key) === next ? "what came: " : "") + seen(known.get(Number(key))));
  const name = quoted(known.get(id)), ranks = told.ranks;
  at("ranks").replaceChildren(chart(told, name), make("p", {className: "hint"}, `Rank of ${name} over the layers; 1 is the likeliest. In the last layer: ${count(ranks.at(-1))}, ${percent(told.probabilities.at(-1))}.`));
  const titles = ["Layer", "1st", "2nd", "3rd", "4th", "5th", "Rank"];
  const head = make("tr", {}, ...titles.map(title => make("th", {scope: "col"}, title)));
  const rows = told.top.map((best, place) => make("tr", {},
    make("th", {scope: "row"}, String(told.layers[place]) + (told.calls ? ` call ${told.calls[place]}` : "")),
    ...best.map(each => make("td", {className: each.token_id === id ? "followed" : ""}, option(each))),
    make("td", {className: "number", title: percent(told.probabilities[place])}, count(ranks[place]))));
  at("tops").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows.toReversed()));
}

function option(each) {
  return make("button", {type: "button", title: `${quoted(each.token)}, ${percent(each.probability)}: follow it`, onclick: () => { follow = each.token_id; look(); }},
    seen(each.token), make("small", {}, percent(each.probability)));
}

function chart(told, name) {  // the rank, 1 on top, on a logarithmic scale
  const width = Math.max(280, at("ranks").clientWidth), height = 130, left = 46, low = 22, top = 10;
  const most = Math.max(10, ...told.ranks), last = Math.max(1, told.ranks.length - 1);
  const x = place => left + (width - left - 10) * place / last, y = rank => top + (height - low - top) * Math.log(rank) / Math.log(most);
  const svg = drawn("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Rank of ${name}, from the first layer to the last: ${told.ranks.map(count).join("; ")}`});
  for (let rank = 1; rank <= most; rank *= 10) {
    svg.append(drawn("line", {x1: left, x2: width - 10, y1: y(rank), y2: y(rank), class: "grid"}));
    svg.append(drawn("text", {x: left - 6, y: y(rank) + 4, "text-anchor": "end"}, count(rank)));
  }
  const step = Math.ceil(told.layers.length / 10);
  told.layers.forEach((layer, place) => { if (place % step === 0) svg.append(drawn("text", {x: x(place), y: height - 5, "text-anchor": "middle"}, String(layer))); });
  svg.append(drawn("polyline", {points: told.ranks.map((rank, place) => `${x(place)},${y(rank)}`).join(" "), class: "line"}));
  told.ranks.forEach((rank, place) => svg.append(drawn("circle", {cx: x(place), cy: y(rank), r: 3, class: "dot"}, drawn("title", {}, `layer ${told.layers[place]}: rank ${count(rank)}, ${percent(told.probabilities[place])}`))));
  return svg;
}
