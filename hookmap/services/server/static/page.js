// The page: which model, with which key, and its parts.

import {got, NoKey} from "./api.js";
import * as attention from "./attention.js";
import * as changes from "./changes.js";
import * as chat from "./chat.js";
import * as keeping from "./keeping.js";
import * as map from "./map.js";
import {at, bench, choices, guarded, tell} from "./parts.js";
import * as sessions from "./sessions.js";
import * as token from "./token.js";
import * as tree from "./tree.js";

bench.defaults = [];
for (const part of [tree, map, token, attention, changes, keeping, sessions, chat]) part.start();

async function open() {  // a server with a key asks for it first
  const tried = Boolean(at("key").value);
  try {
    const models = (await got("/v1/models")).data;
    at("entry").hidden = true;
    at("bench").hidden = at("of-model").hidden = false;
    choices(at("model"), models.map(each => each.id));
  } catch (error) {
    if (!(error instanceof NoKey)) throw error;
    at("entry").hidden = false;
    at("key").select();
    at("key").focus();
    if (tried) throw new Error("This is not the server’s key.");
    return;
  }
  await model();
  await sessions.load();
  at("text").focus();
}

async function model() {
  const name = at("model").value;
  if (!name) throw new Error("No model is loaded.");
  chat.forget();
  bench.structure = await got("/v1/model/structure?model=" + encodeURIComponent(name));
  bench.defaults = (await got("/v1/interventions?model=" + encodeURIComponent(name))).data;
  tell("model");
}

at("entry").onsubmit = event => { event.preventDefault(); guarded(open); };
at("model").onchange = () => guarded(model);
guarded(open);
