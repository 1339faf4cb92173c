// What every part of the page uses. Text goes into the page as text only, never as HTML.

export const at = id => document.getElementById(id);

export function make(tag, set = {}, ...children) {
  const found = Object.assign(document.createElement(tag), set);
  found.append(...children);
  return found;
}

export function drawn(tag, set = {}, ...children) {  // of SVG
  const found = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(set)) found.setAttribute(name, value);
  found.append(...children);
  return found;
}

// What the parts tell each other: "model", "shown", "grew", "ended", "picked", "point", "kept"
export const bench = Object.assign(new EventTarget(), {
  structure: null,  // of /v1/model/structure
  shown: null,  // the answer that the map and the readings are of
  picked: null,  // the position of the token that is read
});
export const tell = (name, detail) => bench.dispatchEvent(new CustomEvent(name, {detail}));
export const on = (names, work) => names.split(" ").forEach(name => bench.addEventListener(name, event => work(event.detail)));

export function show(answer) {
  if (bench.shown === answer) return;
  bench.shown = answer;
  bench.picked = null;
  tell("shown");
}

export function pick(position) {
  bench.picked = position;
  tell("picked");
}

export async function guarded(work) {  // an error is shown in the words of the server
  at("error").textContent = "";
  try { await work(); } catch (error) {
    if (error.name !== "AbortError") at("error").textContent = error.message;
  }
}

const digits = new Intl.NumberFormat("en-US", {minimumSignificantDigits: 3, maximumSignificantDigits: 3});
const whole = new Intl.NumberFormat("en-US", {maximumFractionDigits: 0});
export const number = value => value === null || value === undefined ? "none" : digits.format(value);
export const count = value => whole.format(value);
export const percent = share => share === null ? "none" : share > 0 && share < 0.001 ? "< 0.1 %" : (share * 100).toPrecision(share >= 0.9995 ? 3 : share >= 0.1 ? 3 : 2) + " %";
export const seen = text => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
export const quoted = text => "“" + seen(text) + "”";
export const size = bytes => bytes < 1e6 ? (bytes / 1e3).toFixed(1) + " kB" : bytes < 1e9 ? (bytes / 1e6).toFixed(1) + " MB" : (bytes / 1e9).toFixed(1) + " GB";

export function choices(select, values, chosen, name = String) {  // fills a select, and keeps what was chosen where it can
  const wanted = String(chosen ?? select.value);
  select.replaceChildren(...values.map(value => new Option(name(value), value)));
  if (values.map(String).includes(wanted)) select.value = wanted;
  select.disabled = !values.length;
}
