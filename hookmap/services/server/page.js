"use strict";
// Asks this server only, as any client does: docs/server.md has the routes and the fields.

const at = id => document.getElementById(id);
let offers = {norm: [], lens: []};  // the points that each figure can be of
let last = null;  // the messages and the settings of the answer that is shown
let running = null;  // aborts the answer that comes
let later = null;  // the next look at the sessions, while one is being written

function make(tag, set = {}, ...children) {
  const found = Object.assign(document.createElement(tag), set);
  found.append(...children);
  return found;
}

async function call(path, options = {}) {
  const headers = {"Content-Type": "application/json"};
  if (at("key").value) headers.Authorization = "Bearer " + at("key").value;
  const answer = await fetch(path, {...options, headers});
  if (answer.ok) return answer;
  if (answer.status === 401) { at("entry").hidden = false; at("key").focus(); }
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `${answer.status} ${answer.statusText}`);
}

async function guarded(work) {
  at("error").textContent = "";
  try { await work(); } catch (error) {
    if (error.name !== "AbortError") at("error").textContent = error.message;
  }
}

// The model

async function start() {
  const models = (await (await call("/v1/models")).json()).data;
  at("entry").hidden = true;
  at("model").replaceChildren(...models.map(each => new Option(each.id)));
  await structure();
  await sessions();
}

async function structure() {
  if (!at("model").value) throw new Error("no model is loaded");
  const found = await (await call("/v1/model/structure?model=" + encodeURIComponent(at("model").value))).json();
  offers = found.summary;
  at("tree").replaceChildren(...found.tree.trimEnd().split("\n").flatMap(branch));
  fill(at("point").value || "resid_post");
}

function branch(line) {  // a line of the tree: its points can be chosen
  const [, lines, mark, name, rest] = line.match(/^([│├└─\s]*)([●○] )?(.*?)(  .*)?$/);
  if (mark !== "● ") return [lines, make("b", {}, (mark ?? "") + name), rest ?? "", "\n"];
  const names = name.split(" = ").flatMap((point, place) => [place ? " = " : "", pointName(point)]);
  return [lines, mark, ...names, rest ?? "", "\n"];
}

function pointName(point) {
  if (!offers.norm.includes(point)) return make("b", {}, point);
  return make("button", {type: "button", value: point, title: "Show it in the heat map", onclick: () => {
    if (!offers[at("of").value].includes(point)) at("of").value = "norm";
    fill(point);
    again();
  }}, point);
}

function fill(chosen) {  // the points that the figure can be of
  const points = offers[at("of").value];
  at("point").replaceChildren(...points.map(point => new Option(point)));
  at("each").parentElement.hidden = at("of").value === "lens";
  at("point").value = points.includes(chosen) ? chosen : points.includes("resid_post") ? "resid_post" : points[0];
  for (const button of at("tree").querySelectorAll("button"))
    button.setAttribute("aria-pressed", button.value === at("point").value);
}

// The chat

async function send() {
  const content = at("text").value.trim();
  if (!content || !at("ask").reportValidity()) return;
  running?.abort();
  at("text").value = "";
  const question = make("li", {className: "user"}, content), shown = make("li", {className: "assistant"});
  at("talk").append(question);
  const messages = [...at("talk").children].map(each => ({role: each.className, content: each.textContent}));
  at("talk").append(shown);
  last = {messages, temperature: Number(at("temperature").value), max_tokens: Number(at("tokens").value),
          seed: Math.floor(Math.random() * 2 ** 31)};
  try {
    await answer(at("keep").checked ? {points: [at("point").value], return: "store"} : {return: "none"});
  } catch (error) {
    if (shown.isConnected && !shown.textContent) {  // nothing came: it can be sent again
      question.remove();
      shown.remove();
      at("text").value ||= content;
      last = null;
    }
    throw error;
  } finally {
    await sessions();
  }
}

async function again() {  // the same answer, with figures of another point
  if (last) await guarded(() => answer({return: "none"}));
}

async function answer(kept) {
  running?.abort();
  const mine = running = new AbortController();
  const shown = at("talk").lastElementChild, columns = newMap();
  shown.replaceChildren();
  const summary = {point: at("point").value, of: at("of").value};
  const body = {...last, model: at("model").value, stream: true, hookmap: {...kept, summary}};
  const meanwhile = on => { at("stop").hidden = !on; at("send").disabled = on; at("map").ariaBusy = on; };
  meanwhile(true);
  try {
    const response = await call("/v1/chat/completions", {method: "POST", body: JSON.stringify(body), signal: mine.signal});
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      shown.append(...chunk.choices.map(choice => choice.delta.content ?? ""));
      at("talk").scrollTop = at("talk").scrollHeight;
      for (const told of chunk.activations_summary ?? []) column(columns, told);
    }
  } finally {
    if (mine === running) {
      running = null;
      meanwhile(false);
    }
  }
}

async function* events(stream) {  // the JSON of server-sent events
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let read; !(read = await reader.read()).done;) {
    const lines = (rest + read.value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

// The heat map

const howToRead = at("cell").textContent;

function newMap() {
  at("map").replaceChildren();
  at("cell").textContent = howToRead;  // what it said was of a cell that is gone
  return {told: [], rows: [], low: [], high: [], cursor: null};
}

const seen = text => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
const short = value => value === null ? "?" : value >= 1000 ? value.toExponential(0) : value.toPrecision(3);
const scaled = (value, of) => of === "lens" ? value : Math.log(Math.max(value, 1e-9));

function column(map, told) {
  const follows = at("scroll").scrollLeft + at("scroll").clientWidth >= at("scroll").scrollWidth - 40;
  if (!map.told.length) rows(map, told);
  map.told.push(told);
  map.head.append(make("th", {scope: "col", title: told.token}, seen(told.token)));
  told.values.forEach((value, place) => {
    const v = scaled(value ?? 0, told.of);
    const cell = make("td", {}, told.of === "lens" ? seen(told.tokens[place]) : short(value));
    cell.style.setProperty("--v", v);
    map.rows[place].append(cell);
    map.low[place] = Math.min(map.low[place] ?? v, v);
    map.high[place] = Math.max(map.high[place] ?? v, v);
  });
  colours(map);
  if (follows && !map.cursor) at("scroll").scrollLeft = at("scroll").scrollWidth;
}

function rows(map, told) {  // the last layer on top, as the stream goes up
  map.head = make("tr", {}, make("th", {scope: "col"}, "layer"));
  map.rows = told.layers.map((_, place) => make("tr", {}, make("th", {scope: "row"}, layer(told, place))));
  at("map").replaceChildren(make("thead", {}, map.head), make("tbody", {}, ...map.rows.toReversed()));
  at("map").map = map;
}

function layer(told, place) {  // with the run, of one that runs several times for each token
  const call = told.calls?.[place] ?? null;
  return told.layers[place] + (call === null ? "" : ` call ${call}`);
}

function colours(map) {  // probabilities are from 0 to 1, norms as far as they go, on a logarithmic scale
  const lens = map.told[0].of === "lens", each = at("each").checked;
  const least = Math.min(...map.low), most = Math.max(...map.high);
  map.rows.forEach((row, place) => {
    const low = lens ? 0 : each ? map.low[place] : least, high = lens ? 1 : each ? map.high[place] : most;
    row.style.setProperty("--low", low);
    row.style.setProperty("--high", Math.max(high, low + 1e-6));
  });
}

function point(map, place, number) {  // the cell that is read
  at("map").querySelector(".at")?.classList.remove("at");
  map.cursor = [place, number];
  const cell = map.rows[place].cells[number + 1], told = map.told[number], value = told.values[place];
  cell.classList.add("at");
  cell.scrollIntoView({block: "nearest", inline: "nearest"});
  const figure = told.of === "lens"
    ? `the lens says ${JSON.stringify(told.tokens[place])}, probability ${value?.toPrecision(3)}`
    : `norm ${value?.toPrecision(4)}`;
  const where = `${told.point}, layer ${layer(told, place)}, where ${JSON.stringify(told.token)} was predicted (row ${told.position})`;
  at("cell").textContent = `${where}: ${figure}`;
}

function arrows(event) {
  const map = at("map").map, step = {ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
  if (!step || !map?.told.length) return;
  event.preventDefault();
  const within = (value, count) => Math.max(0, Math.min(count - 1, value));
  const [place, number] = map.cursor ? map.cursor.map((value, axis) => value + step[axis]) : [map.rows.length - 1, 0];
  point(map, within(place, map.rows.length), within(number, map.told.length));
}

// The sessions

const size = bytes => bytes < 1e6 ? (bytes / 1e3).toFixed(1) + " kB" : (bytes / 1e6).toFixed(1) + " MB";

async function sessions() {  // one that is being written is looked at again: it ends, or it goes
  clearTimeout(later);
  const found = (await (await call("/v1/activations/sessions")).json()).data;
  if (found.some(each => each.status === "running")) later = setTimeout(() => guarded(sessions), 500);
  at("total").textContent = found.length ? `${found.length}, ${size(found.reduce((sum, each) => sum + each.bytes, 0))}` : "none";
  const head = make("tr", {}, ...["Id", "Model", "Made", "Size", ""].map(name => make("th", {scope: "col", className: name === "Size" ? "number" : ""}, name)));
  at("sessions").replaceChildren(...(found.length ? [make("thead", {}, head), make("tbody", {}, ...found.map(session))] : []));
}

function session(told) {
  const remove = make("button", {type: "button", className: "danger", disabled: told.status !== "finished",
                                 ariaLabel: "Delete session " + told.id, onclick: () => guarded(() => drop(told))}, "Delete");
  const cells = [make("code", {title: told.id}, told.id), told.model ?? "", new Date(told.created * 1000).toLocaleString(), size(told.bytes), remove];
  return make("tr", {}, ...cells.map((each, place) => make("td", {className: place === 3 ? "number" : ""}, each)));
}

async function drop(told) {
  at("what").textContent = `Delete session ${told.id} (${size(told.bytes)})? Its rows cannot be brought back.`;
  at("sure").returnValue = "";
  at("sure").showModal();
  await new Promise(closed => at("sure").addEventListener("close", closed, {once: true}));
  if (at("sure").returnValue !== "yes") return;
  await call("/v1/activations/sessions/" + told.id, {method: "DELETE"});
  await sessions();
  (at("sessions").querySelector("button") ?? at("sessions-name")).focus();
}

// What a person does

at("ask").onsubmit = event => { event.preventDefault(); guarded(send); };
at("text").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); guarded(send); }
};
at("stop").onclick = () => running?.abort();
at("new").onclick = () => {
  running?.abort();
  last = null;
  at("talk").replaceChildren();
  newMap();
  at("text").focus();
};
at("entry").onsubmit = event => { event.preventDefault(); guarded(start); };
at("model").onchange = () => guarded(structure);
at("point").onchange = () => { fill(at("point").value); again(); };
at("of").onchange = () => { fill(at("point").value); again(); };
at("each").onchange = () => { if (at("map").map?.told.length) colours(at("map").map); };
at("scroll").onkeydown = arrows;
at("map").onpointerover = event => {
  const cell = event.target.closest("td"), map = at("map").map;
  if (cell) point(map, map.rows.indexOf(cell.parentElement), cell.cellIndex - 1);
};
document.addEventListener("visibilitychange", () => { if (!document.hidden && at("model").value) guarded(sessions); });
guarded(start);
