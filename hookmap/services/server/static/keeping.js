// What is kept of each answer: points, layers and a label.

import {at, bench, make, on} from "./parts.js";

export function start() {
  on("model", () => {
    const names = [...Object.keys(bench.structure.places).filter(point => !["pattern", "attn_scores"].includes(point)), ...bench.structure.points.filter(point => !(point in bench.structure.places))];
    at("points").replaceChildren(...[...new Set(names)].map(name => make("label", {className: "check"}, make("input", {type: "checkbox", value: name, checked: name === "resid_post", onchange: told}), " " + name)));
    told();
  });
  at("keep").onchange = at("layers").oninput = told;
}

const chosen = () => [...at("points").querySelectorAll("input:checked")].map(box => box.value);

function told() {
  const points = chosen(), on = at("keep").checked;
  at("layers").setCustomValidity(layers(at("layers").value) === null ? "all, or numbers and ranges such as 0, 8, 12-15" : "");
  at("kept").textContent = !on ? "nothing" : points.length ? `${points.slice(0, 3).join(", ")}${points.length > 3 ? " …" : ""}, layers ${at("layers").value}` : "no point is chosen";
}

function layers(text) {  // "all" or numbers; null where it is neither
  if (text.trim() === "all") return "all";
  const found = [];
  for (const part of text.split(",")) {
    const range = part.trim().match(/^(\d{1,5})(?:\s*-\s*(\d{1,5}))?$/);
    if (!range || Number(range[2] ?? range[1]) < Number(range[1])) return null;
    for (let layer = Number(range[1]); layer <= Number(range[2] ?? range[1]); layer++) found.push(layer);
  }
  return [...new Set(found)];
}

export function keeping() {  // the `hookmap` field of an answer
  if (!at("keep").checked || !chosen().length) return {return: "none"};
  if (!at("layers").reportValidity()) throw new Error("Layers to keep: expected all, or numbers and ranges such as 0, 8, 12-15.");
  const label = at("label").value.trim();
  return {points: chosen(), layers: layers(at("layers").value), return: "store", ...(label ? {label} : {})};
}
