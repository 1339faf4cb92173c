// The conversation: messages, answers, and their tokens, each of which can be chosen.

import {ask, newAnswer, stop} from "./answers.js";
import {changes} from "./changes.js";
import {keeping} from "./keeping.js";
import {at, bench, guarded, make, on, pick, show, tell} from "./parts.js";

let turns = [];  // {content, said, answers, boxes}

export function start() {
  at("ask").onsubmit = event => { event.preventDefault(); guarded(send); };
  at("text").onkeydown = event => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); guarded(send); }
  };
  at("stop").onclick = stop;
  at("new").onclick = () => { forget(); at("text").focus(); };
  at("again").onclick = () => guarded(again);
  on("began", answer => { busy(true); box(answer)?.parentElement.scrollIntoView({block: "nearest"}); });
  on("ended", () => busy(false));
  on("grew", grew);
  on("shown picked", mark);
  forget();
}

export function forget() {
  stop();
  turns = [];
  at("talk").replaceChildren(make("li", {className: "hint"}, "Nothing has been asked yet. An answer's tokens can be clicked, or chosen by arrow keys, to see what happens inside at each."));
  at("again").disabled = true;
  show(null);
}

function busy(comes) {
  at("stop").disabled = !comes;
  at("send").disabled = comes;
  at("again").disabled = comes || !turns.length || !changes().length;
}
on("changes", () => busy(!at("stop").disabled));

async function send() {
  const content = at("text").value.trim();
  if (!content || !at("ask").reportValidity()) return;
  const kept = keeping();  // refused before anything is sent
  stop();
  at("text").value = "";
  if (!turns.length) at("talk").replaceChildren();
  const messages = [...turns.flatMap(turn => [{role: "user", content: turn.content}, {role: "assistant", content: turn.answers[0].text}]), {role: "user", content}];
  const settings = {temperature: Number(at("temperature").value), max_tokens: Number(at("tokens").value), seed: Math.floor(Math.random() * 2 ** 31)};
  const said = tokensOf(make("div", {className: "user"}, content), "Your message");
  const turn = {content, said, asked: {messages, ...settings}, answers: [], boxes: [], row: make("li", {className: "answers"})};
  const mine = make("li", {}, said);
  turns.push(turn);
  at("talk").append(mine, turn.row);
  try {
    await run(turn, null, kept);
    if (changes().length) await run(turn, changes(), kept);
  } catch (error) {
    if (!turn.answers[0]?.text && error.name !== "AbortError") {  // nothing came: it can be sent again
      turns = turns.filter(each => each !== turn);
      mine.remove();
      turn.row.remove();
      at("text").value ||= content;
      show(turns.at(-1)?.answers[0] ?? null);
      busy(false);
    }
    throw error;
  } finally {
    tell("kept");
  }
}

async function again() {  // the last message, with the changes that there are now
  const turn = turns.at(-1), kept = keeping();
  if (!turn) return;
  stop();
  if (turn.answers[1]) { turn.answers.pop(); turn.boxes.pop().closest("article").remove(); }
  try { await run(turn, changes(), kept); } finally { tell("kept"); }
}

async function run(turn, own, kept) {
  const answer = newAnswer(turn.asked, own && [...bench.defaults, ...own.map(each => each.document)]);
  const shown = tokensOf(make("div", {className: "assistant"}), own ? "Answer with the changes" : "Answer");
  const name = own ? "Changed: " + own.map(each => each.name).join("; ") : "As the model answers";
  const head = make("button", {type: "button", className: "head", title: "Show this answer in the map", onclick: () => show(answer)}, name);
  turn.answers.push(answer);
  turn.boxes.push(shown);
  turn.row.append(make("article", {}, head, shown));
  turn.row.classList.toggle("two", Boolean(own) || changes().length > 0);
  show(answer);
  try { await ask(answer, {...kept, ...(kept.label && own ? {label: kept.label + ", changed"} : {})}); } finally { mark(); }
}

const box = answer => turns.flatMap(turn => turn.boxes)[turns.flatMap(turn => turn.answers).indexOf(answer)];

function grew({answer, piece, told}) {
  const talk = at("talk"), follows = talk.scrollTop + talk.clientHeight >= talk.scrollHeight - 40;
  const position = told.length ? told.at(-1).position + 1 : null;
  if (piece) box(answer)?.append(position === null ? piece : token(piece, position));
  if (told.length > 1) cut(turns.find(turn => turn.answers.includes(answer)), answer);
  if (follows) talk.scrollTop = talk.scrollHeight;
}

const token = (text, position) => make("span", {className: "token", position}, text);

function cut(turn, answer) {  // the message, as the tokens of the prompt that it became
  if (!turn || turn.said.querySelector(".token")) return;
  const texts = answer.tokens.slice(0, answer.first).map(each => each.text), whole = texts.join("");
  const start = whole.lastIndexOf(turn.content), end = start + turn.content.length;
  if (start < 0) return;
  let place = 0;
  const found = texts.flatMap((text, position) => {
    const own = whole.slice(Math.max(place, start), Math.min(place + text.length, end));
    const within = place + text.length > start && place < end;
    place += text.length;
    return within && own ? [token(own, position)] : [];
  });
  turn.said.replaceChildren(...found);
}

function tokensOf(element, name) {  // its tokens are chosen by a click, or by arrow keys
  element.tabIndex = 0;
  element.role = "group";
  element.ariaLabel = name + ", arrow keys choose a token";
  const choose = span => {
    const turn = turns.find(each => each.said === element || each.boxes.includes(element));
    const own = turn.answers[turn.boxes.indexOf(element)] ?? (turn.answers.includes(bench.shown) ? bench.shown : turn.answers[0]);
    show(own);
    pick(span.position);
  };
  element.onclick = event => { const span = event.target.closest(".token"); if (span) choose(span); };
  element.onkeydown = event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key], spans = [...element.querySelectorAll(".token")];
    if (!step || !spans.length) return;
    event.preventDefault();
    const now = spans.findIndex(span => span.classList.contains("at"));
    choose(spans[Math.max(0, Math.min(spans.length - 1, now < 0 ? (step > 0 ? 0 : spans.length - 1) : now + step))]);
  };
  return element;
}

function mark() {  // the answer that is shown, and the token that is read
  for (const span of at("talk").querySelectorAll(".token.at")) span.classList.remove("at");
  for (const turn of turns) turn.boxes.forEach((each, place) => {
    const shown = turn.answers[place] === bench.shown;
    each.closest("article").classList.toggle("shown", shown);
    each.previousElementSibling.setAttribute("aria-pressed", shown);
    if (!shown || bench.picked === null) return;
    for (const span of [...turn.said.querySelectorAll(".token"), ...each.querySelectorAll(".token")])
      if (span.position === bench.picked) span.classList.add("at");
  });
}
