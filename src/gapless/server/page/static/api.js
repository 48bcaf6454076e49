// Calls of the server this page came from. The API key stays in this tab and goes into one header, never into a URL.
import { events } from "./sse.js";

const KEY = "gapless.key";
const PATIENCE = 10_000; // milliseconds that a poll may take

let key = sessionStorage.getItem(KEY) ?? "";
let asking = null; // the promise of an answer to the dialog
let declined = false;
let show = null;

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** `ask(refused)` shows the dialog; `keyGiven` ends it. */
export function onKeyNeeded(ask) {
  show = ask;
}

export function hasKey() {
  return key !== "";
}

export function keyGiven(given) {
  declined = given === null;
  if (given !== null) remember(given);
  const { settle } = asking ?? {};
  asking = null;
  settle?.(given !== null);
}

export function forgetKey() {
  declined = false;
  remember("");
}

/** A dialog that was closed without a key opens again at the next call. */
export function askAgain() {
  declined = false;
}

function remember(given) {
  key = given;
  if (given) sessionStorage.setItem(KEY, given);
  else sessionStorage.removeItem(KEY);
}

function needsKey(refused) {
  if (asking === null) {
    asking = {};
    asking.promise = new Promise((resolve) => (asking.settle = resolve));
    show(refused);
  }
  return asking.promise;
}

/** A response that is fine. Throws ApiError for others; AbortError as fetch does. */
export async function call(path, { body, signal } = {}) {
  for (;;) {
    const used = key;
    const headers = used ? { Authorization: `Bearer ${used}` } : {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "same-origin",
    }).catch((error) => {
      if (error.name === "AbortError" || error.name === "TimeoutError") throw error;
      throw new ApiError(0, "The server cannot be reached.");
    });
    if (response.ok) return response;
    const message = await reason(response);
    if (response.status !== 401) throw new ApiError(response.status, message);
    if (used !== key) continue; // it was given while this call was on its way
    if (declined || !(await needsKey(used !== ""))) throw new ApiError(401, "The server asks for an API key.");
  }
}

async function reason(response) {
  const text = await response.text();
  try {
    const { error, detail } = JSON.parse(text);
    const message = error?.message ?? (typeof error === "string" ? error : detail);
    if (typeof message === "string") return message;
  } catch {
    // not JSON: the status says it
  }
  return `The server answered with status ${response.status}.`;
}

export async function get(path, signal = AbortSignal.timeout(PATIENCE)) {
  return (await call(path, { signal })).json();
}

export async function post(path, body, signal) {
  return (await call(path, { body, signal })).json();
}

/** The chunks of a streamed answer. */
export async function* stream(path, body, signal) {
  const response = await call(path, { body, signal });
  for await (const text of events(response)) {
    const chunk = JSON.parse(text);
    if (chunk.error) throw new ApiError(chunk.error.code ?? 500, chunk.error.message ?? "The answer broke off.");
    yield chunk;
  }
}

/** 32 random hexadecimal digits. Over plain http, browsers have no crypto.randomUUID. */
export function randomWord() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
