// The sessions, newest first: what was kept, to search, download and delete.

import {call, got} from "./api.js";
import {at, count, guarded, make, on, size} from "./parts.js";

const PAGE = 10;
let all = [];
let first = 0;  // of those on the page

export function start() {
  on("kept", () => guarded(load));
  at("search").oninput = () => { first = 0; render(); };
  at("newer").onclick = () => { first = Math.max(0, first - PAGE); render(); };
  at("older").onclick = () => { first += PAGE; render(); };
  document.addEventListener("visibilitychange", () => { if (!document.hidden && !at("bench").hidden) guarded(load); });
}

export async function load() {  // finished ones: another may be stopped, and is gone then
  all = (await got("/v1/activations/sessions")).data.filter(each => each.status === "finished").toReversed();
  render();
}

const words = each => [each.id, each.model, each.label, each.prompt, ...(each.points ?? [])].join("\n").toLowerCase();

function render() {
  const wanted = at("search").value.trim().toLowerCase(), found = all.filter(each => words(each).includes(wanted));
  first = Math.min(first, Math.max(0, Math.ceil(found.length / PAGE - 1) * PAGE));
  const shown = found.slice(first, first + PAGE);
  at("total").textContent = all.length ? `${count(all.length)}, ${size(all.reduce((sum, each) => sum + each.bytes, 0))}` : "none";
  at("which-sessions").textContent = found.length ? `${first + 1} to ${first + shown.length} of ${count(found.length)}, newest first` : all.length ? "none is found" : "";
  at("newer").disabled = first === 0;
  at("older").disabled = first + PAGE >= found.length;
  at("sessions").replaceChildren(...shown.map(session));
}

function session(told) {
  const when = new Date(told.created * 1000).toLocaleString("en-GB", {dateStyle: "medium", timeStyle: "short"});
  const name = `session of ${when}`, title = told.prompt || "no text";
  const button = (text, what, work, danger) => make("button", {type: "button", className: danger ? "danger" : "", ariaLabel: `${what} ${name}`, onclick: () => guarded(work)}, text);
  return make("li", {},
    make("div", {className: "about"}, make("b", {title}, title), ...(told.label ? [make("span", {className: "label"}, told.label)] : []),
      make("small", {}, [when, told.model, (told.points ?? []).join(", "), size(told.bytes)].filter(Boolean).join(" · "))),
    make("code", {title: told.id}, told.id),
    make("div", {className: "bar"}, button("Download", "Download", () => download(told)), button("Delete", "Delete", () => drop(told), true)));
}

async function download(told) {
  const data = await (await call(`/v1/activations/sessions/${told.id}/archive`)).blob();
  const link = make("a", {href: URL.createObjectURL(data), download: told.id + ".zip"});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function drop(told) {
  at("what").textContent = `Delete session ${told.id} (${size(told.bytes)})? Its rows cannot be brought back.`;
  at("sure").returnValue = "";
  at("sure").showModal();
  await new Promise(closed => at("sure").addEventListener("close", closed, {once: true}));
  if (at("sure").returnValue !== "yes") return;
  await call("/v1/activations/sessions/" + told.id, {method: "DELETE"});
  await load();
  (at("sessions").querySelector("button") ?? at("sessions-name")).focus();
}
