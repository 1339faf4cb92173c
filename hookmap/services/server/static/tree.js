// The model's tree of modules, with its points; those that the map can show are buttons.

import {at, bench, make, on, tell} from "./parts.js";

export function start() {
  on("model", () => at("tree").replaceChildren(...bench.structure.tree.trimEnd().split("\n").flatMap(branch)));
}

function branch(line) {
  const [, lines, mark, name, rest] = line.match(/^([│├└─\s]*)([●○] )?(.*?)(  .*)?$/);
  if (mark !== "● ") return [lines, make("b", {}, (mark ?? "") + name), rest ?? "", "\n"];
  const names = name.split(" = ").flatMap((point, place) => [place ? " = " : "", pointName(point)]);
  return [lines, mark, ...names, rest ?? "", "\n"];
}

function pointName(point) {
  if (!bench.structure.summary.norm.includes(point)) return make("b", {}, point);
  return make("button", {type: "button", value: point, title: "Show it in the map", onclick: () => tell("point", point)}, point);
}
