// Interventions by form: steer by a vector that the server offers, ablate a head, clamp a feature.

import {got} from "./api.js";
import {at, bench, choices, guarded, make, number, on, tell} from "./parts.js";

let listed = [];  // {name, document}
let vectors = [];
export const changes = () => listed;

export function start() {
  on("model", () => guarded(async () => {
    listed = [];
    vectors = (await got("/v1/vectors")).data.filter(each => each.width === bench.structure.map.d_model);
    choices(at("vector"), vectors.map(each => each.name));
    const points = bench.structure.summary.norm;
    choices(at("clamp-point"), points, points.includes("mlp_post") ? "mlp_post" : "resid_post");
    fields();
    render();
  }));
  at("kind").onchange = at("vector").onchange = at("clamp-point").onchange = fields;
  at("change").onsubmit = event => { event.preventDefault(); guarded(add); };
}

function fields() {  // those of the kind that is chosen
  const kind = at("kind").value, places = bench.structure.places;
  for (const label of at("change").querySelectorAll("label[class]")) label.hidden = !label.classList.contains(kind);
  at("no-vectors").hidden = kind !== "steer" || vectors.length > 0;
  const vector = vectors.find(each => each.name === at("vector").value);
  const layers = {steer: vector?.layers, ablate: places.z?.layers, clamp: places[at("clamp-point").value]?.layers}[kind] ?? [];
  choices(at("change-layer"), layers);
  choices(at("change-head"), Array.from({length: places.z?.heads ?? 0}, (_, head) => head));
  at("add").disabled = !layers.length;
}

async function add() {
  if (!at("change").reportValidity()) return;
  listed.push(await made(at("kind").value, Number(at("change-layer").value)));
  render();
}

async function made(kind, layer) {
  if (kind === "steer") {
    const name = at("vector").value, strength = Number(at("strength").value);
    const {point, vector} = await got(`/v1/vectors/${encodeURIComponent(name)}?layer=${layer}`);
    return {name: `steered by ${name} × ${strength} (${point}, layer ${layer})`, document: {do: "steer", point, layers: [layer], vector, strength}};
  }
  if (kind === "ablate") {
    const head = Number(at("change-head").value);
    return {name: `head ${head} of layer ${layer} ablated`, document: {do: "ablate", point: "z", layers: [layer], heads: [head]}};
  }
  const point = at("clamp-point").value, feature = Number(at("feature").value), value = Number(at("value").value);
  return {name: `feature ${feature} of ${point} clamped to ${number(value)} (layer ${layer})`, document: {do: "clamp", point, layers: [layer], feature, value}};
}

function render() {
  at("changes").replaceChildren(...listed.map(each => make("li", {}, each.name, make("button", {
    type: "button", ariaLabel: "Remove: " + each.name,
    onclick: () => { listed = listed.filter(other => other !== each); render(); at("kind").focus(); },
  }, "Remove"))));
  const all = bench.defaults.length ? `, and ${bench.defaults.length} of this server in every answer` : "";
  at("changes-count").textContent = (listed.length ? String(listed.length) : "none") + all;
  tell("changes");
}
