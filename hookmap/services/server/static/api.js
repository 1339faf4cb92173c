// Asks this server only, as any client does: docs/server.md has the routes and the fields.

import {at} from "./parts.js";

export class NoKey extends Error {}

export async function call(path, options = {}) {
  const headers = {"Content-Type": "application/json"};
  if (at("key").value) headers.Authorization = "Bearer " + at("key").value;
  const answer = await fetch(path, {...options, headers});
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  const message = told?.error?.message ?? `${answer.status} ${answer.statusText}`;
  throw answer.status === 401 ? new NoKey(message) : new Error(message);
}

export const got = async path => (await call(path)).json();

export const post = (path, body, signal) => call(path, {method: "POST", body: JSON.stringify(body), signal});

export async function* events(stream) {  // the JSON of server-sent events
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let read; !(read = await reader.read()).done;) {
    const lines = (rest + read.value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

export function tensors(base64) {  // of a safetensors document: name -> {shape, values}
  const bytes = Uint8Array.from(atob(base64), letter => letter.charCodeAt(0)), view = new DataView(bytes.buffer);
  const start = 8 + Number(view.getBigUint64(0, true));
  const found = {};
  for (const [name, told] of Object.entries(JSON.parse(new TextDecoder().decode(bytes.subarray(8, start))))) {
    if (name === "__metadata__") continue;
    const [first, end] = told.data_offsets.map(offset => start + offset);
    found[name] = {shape: told.shape, values: floats(told.dtype, bytes.slice(first, end).buffer)};
  }
  return found;
}

function floats(dtype, buffer) {
  if (dtype === "F32") return new Float32Array(buffer);
  const halves = new Uint16Array(buffer);
  if (dtype === "BF16") return new Float32Array(Uint32Array.from(halves, half => half << 16).buffer);
  if (dtype === "F16") return Float32Array.from(halves, half);
  throw new Error(`the page does not read ${dtype}`);
}

function half(bits) {  // float16
  const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, rest = bits & 1023;
  if (exponent === 31) return rest ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + rest / 1024) : 2 ** -14 * rest / 1024);
}
