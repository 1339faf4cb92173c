// The map: layers × tokens of the prompt and the answer. Each cell is a row of activations, as a figure and a colour.

import {readFigures, sameFigures, wanted, whyNotRead} from "./answers.js";
import {at, bench, choices, guarded, make, number, on, percent, pick, quoted, seen} from "./parts.js";

const hint = "Arrow keys read the cells; Enter, or a click, shows more of the token.";
let map = null;  // {answer, rows, head, low, high, cursor, columns}
let reading = null;  // aborts the reading of another point

export function start() {
  on("model", () => fill("resid_post"));
  on("shown began", render);
  on("grew", ({answer, told}) => { if (answer === map?.answer) columns(told); });
  on("ended", answer => { if (answer === map?.answer) refresh(); });
  on("picked", mark);
  on("point", point => {
    if (!bench.structure.summary[at("of").value].includes(point)) at("of").value = "norm";
    fill(point);
    refresh();
  });
  at("point").onchange = at("of").onchange = () => { fill(at("point").value); refresh(); };
  at("each").onchange = colours;
  at("scroll").onkeydown = arrows;
  at("map").onpointerover = event => over(event, (place, position) => say(place, position));
  at("map").onpointerleave = () => map?.cursor ? say(...map.cursor) : reset();
  at("map").onclick = event => over(event, (place, position) => { move(place, position); pick(position); });
}

function fill(chosen) {  // the points that the figure can be of
  const points = bench.structure.summary[at("of").value];
  choices(at("point"), points, points.includes(chosen) ? chosen : points.includes("resid_post") ? "resid_post" : points[0]);
  at("of-each").hidden = at("of").value === "lens";
  for (const button of at("tree").querySelectorAll("button")) button.setAttribute("aria-pressed", button.value === at("point").value);
}

const stale = answer => Boolean(answer) && !answer.comes && answer.tokens.length > 1 && !sameFigures(answer.of, wanted());

function refresh() {  // the figures of the point that is chosen
  reading?.abort();
  const answer = bench.shown;
  if (!stale(answer) || whyNotRead(answer)) return render();
  const mine = reading = new AbortController();
  at("map").replaceChildren();
  map.columns = 0;
  reset("The tokens are read once more …");
  at("map").ariaBusy = true;
  guarded(async () => {
    try { await readFigures(answer, mine.signal); } finally {
      if (mine === reading) {
        at("map").ariaBusy = answer.comes;
        if (sameFigures(answer.of, wanted())) render(); else reset("The figures of this point could not be read.");
      }
    }
  });
}

function reset(text = map?.columns ? hint : "") { at("cell").textContent = text; }

function render() {  // anew: what was said was of cells that are gone
  const answer = bench.shown;
  map = {answer, rows: [], low: [], high: [], cursor: null, columns: 0};
  at("map").replaceChildren();
  at("map").ariaBusy = Boolean(answer?.comes);
  at("low").textContent = at("high").textContent = at("meaning").textContent = "";
  at("legend").className = "none";
  at("map-of").textContent = answer ? (answer.changes ? "of the answer with the changes" : "of the prompt and the answer") : "";
  if (stale(answer)) return whyNotRead(answer) ? reset(whyNotRead(answer)) : refresh();
  columns(answer?.figures.filter(Boolean) ?? []);
  reset();
  mark();
}

function columns(tokens) {  // laid out once for all of them
  if (!tokens.length) return;
  const scroll = at("scroll"), follows = map.answer.comes && !map.cursor && scroll.scrollLeft + scroll.clientWidth >= scroll.scrollWidth - 60;
  if (!map.columns) begin(tokens[0]);
  tokens.forEach(column);
  colours();
  if (follows) scroll.scrollLeft = scroll.scrollWidth;
}

function column(told) {
  const token = map.answer.tokens[told.position], own = told.position >= map.answer.first;
  const name = token ? seen(token.text) : "?";
  map.head.append(make("th", {scope: "col", className: own ? "own" : "", title: `token ${told.position}: ${name}`}, name));
  told.values.forEach((value, place) => {
    const v = told.of === "lens" ? value ?? 0 : Math.log(Math.max(value ?? 0, 1e-9));
    const cell = make("td", {position: told.position}, told.of === "lens" ? seen(told.tokens[place]) : number(value));
    cell.style.setProperty("--v", v);
    if (told.of === "lens" && told.tokens[place] === told.token) cell.className = "right";
    map.rows[place].append(cell);
    map.low[place] = Math.min(map.low[place] ?? v, v);
    map.high[place] = Math.max(map.high[place] ?? v, v);
  });
  map.columns += 1;
}

function begin(told) {  // the last layer on top, as the stream goes up
  map.told = told;
  map.head = make("tr", {}, make("th", {scope: "col"}, "layer"));
  map.rows = told.layers.map((_, place) => make("tr", {}, make("th", {scope: "row"}, layer(told, place))));
  at("map").replaceChildren(make("thead", {}, map.head), make("tbody", {}, ...map.rows.toReversed()));
  reset(hint);
}

function layer(told, place) {  // with the run, of one that runs several times for each token
  const call = told.calls?.[place] ?? null;
  return told.layers[place] + (call === null ? "" : ` call ${call}`);
}

function colours() {  // probabilities are from 0 to 1, lengths as far as they go, on a logarithmic scale
  if (!map?.columns) return;
  const lens = map.told.of === "lens", each = at("each").checked && !lens;
  const least = Math.min(...map.low), most = Math.max(...map.high);
  map.rows.forEach((row, place) => {
    const low = lens ? 0 : each ? map.low[place] : least, high = lens ? 1 : each ? map.high[place] : most;
    if (row.low === low && row.high === high) return;  // every cell of it would be painted again
    Object.assign(row, {low, high});
    row.style.setProperty("--low", low);
    row.style.setProperty("--high", Math.max(high, low + 1e-6));
  });
  at("legend").className = "";
  at("low").textContent = lens ? "0 %" : each ? "each layer’s shortest" : number(Math.exp(least));
  at("high").textContent = lens ? "100 %" : each ? "longest" : number(Math.exp(most));
  at("meaning").textContent = lens
    ? `What ${map.told.point} of each layer would say next; a stronger colour is more probable, underlined is what came.`
    : `Length of the row of ${map.told.point}; each step of colour is a factor.`;
}

function over(event, work) {
  const cell = event.target.closest("td");
  if (cell) work(map.rows.indexOf(cell.parentElement), cell.position);
}

function say(place, position) {
  const told = map.answer.figures[position], value = told.values[place], token = map.answer.tokens[position];
  const figure = told.of === "lens" ? `the lens says ${quoted(told.tokens[place])}, ${percent(value)}` : `length ${number(value)}`;
  at("cell").textContent = `Layer ${layer(told, place)}, ${told.point}, token ${position} ${token ? quoted(token.text) : ""}, before ${quoted(told.token)}: ${figure}`;
}

function move(place, position) {  // the cell that is read
  at("map").querySelector("td.at")?.classList.remove("at");
  map.cursor = [place, position];
  const cell = map.rows[place].cells[1 + map.answer.figures.slice(0, position).filter(Boolean).length];
  cell.classList.add("at");
  cell.scrollIntoView({block: "nearest", inline: "nearest"});
  say(place, position);
}

function arrows(event) {
  if (!map?.columns) return;
  if (event.key === "Enter" && map.cursor) return pick(map.cursor[1]);
  const step = {ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
  if (!step) return;
  event.preventDefault();
  const positions = map.answer.figures.map((_, position) => position).filter(position => map.answer.figures[position]);
  const within = (value, length) => Math.max(0, Math.min(length - 1, value));
  const [place, position] = map.cursor ?? [map.rows.length - 1 - step[0], positions[Math.max(0, positions.indexOf(map.answer.first - 1))]];
  const column = map.cursor ? positions.indexOf(position) + step[1] : positions.indexOf(position);
  move(within(place + step[0], map.rows.length), positions[within(column, positions.length)]);
}

function mark() {  // the column of the token that is read
  for (const head of at("map").querySelectorAll("thead .at")) head.classList.remove("at");
  if (!map?.columns || bench.picked === null) return;
  const place = map.answer.figures.slice(0, bench.picked).filter(Boolean).length, head = map.head.cells[place + 1];
  if (!head || !map.answer.figures[bench.picked]) return;
  head.classList.add("at");
  const scroll = at("scroll"), left = head.offsetLeft - map.head.cells[0].offsetWidth, right = head.offsetLeft + head.offsetWidth;
  if (left < scroll.scrollLeft) scroll.scrollLeft = left;
  else if (right > scroll.scrollLeft + scroll.clientWidth) scroll.scrollLeft = right - scroll.clientWidth;
}
