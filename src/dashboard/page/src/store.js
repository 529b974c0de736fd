/* What does the page know, and how does it stay true? Snapshots by GET, then events from one stream.
 *
 * A snapshot's `as_of.seq` says which events it holds already; those after it are applied, in order. A gap in the numbers,
 * another boot or the server's `reset` means that events were missed: what is on show is asked for again. Only what a
 * view has on show (`want`) is ever asked for. Nothing is made up here: without an answer, nothing is shown. */
import { useEffect, useState } from "../vendor/preact-htm.js";
import * as api from "./api.js";
import { APPLY } from "./apply.js";
import { Stream } from "./stream.js";

const KEPT_EVENTS = 200;
const GAP_PAUSE_MS = 5_000;

/** Snapshots: where each is, and after how many ms it is asked for again though the stream lives. */
const SOURCES = {
  overview: { path: () => "/overview" },
  tenants: { path: () => "/tenants" },
  history: { path: () => `/history?range=${state.range}&step=${state.range > 900 ? 10 : 1}` },
  journal: { path: () => "/evictions?" + api.query({ limit: 200, tenant: state.scope }) },
  device: { path: () => "/map?tier=device", every: 30_000 },
  host: { path: () => "/map?tier=host", every: 5_000 },
  disk: { path: () => "/map?tier=disk", every: 5_000 },
  policy: { path: () => "/policy", every: 2_000 },
};

/** With a fifth tab there is no stream for this one: what it shows is asked for now and then. */
const POLL_MS = { overview: 5_000, others: 15_000 };

export const state = {
  phase: "starting", // then "login" or "ready"
  me: null,
  link: { state: "connecting" },
  paused: false,
  seq: null,
  boot: null,
  heard: { ts: null, at: 0 }, // the server's clock, and when it was heard
  range: 600,
  scope: "",
  watched: "",
};

const slots = Object.fromEntries(
  Object.keys(SOURCES).map((name) => [name, { data: null, error: null, at: 0, busy: false, wanted: 0, version: 0 }]),
);
const kept = [];
const listeners = new Map();
const rowListeners = new Set();
const eventListeners = new Set();
let lastGap = 0;

// ---------------------------------------------------------------- who is told of changes

const due = new Set();
let flushing = false;

function changed(topic) {
  if (slots[topic]) slots[topic].version += 1;
  due.add(topic);
  if (flushing) return;
  flushing = true;
  setTimeout(flush, 16);
}

function flush() {
  flushing = false;
  const hear = new Set([...due].flatMap((topic) => [...(listeners.get(topic) || [])]));
  due.clear();
  hear.forEach((listener) => listener());
}

function listen(topics, listener) {
  for (const topic of topics) {
    if (!listeners.has(topic)) listeners.set(topic, new Set());
    listeners.get(topic).add(listener);
  }
  return () => topics.forEach((topic) => listeners.get(topic).delete(listener));
}

function useTopics(topics) {
  const [, redraw] = useState(0);
  useEffect(() => listen(topics, () => redraw((n) => n + 1)), [topics.join()]);
}

/** The snapshot of that name, kept true while the view is on show: `{data, error, version, retry}`. */
export function useSnapshot(name) {
  useTopics([name]);
  useEffect(() => want(name), [name]);
  const { data, error, version } = slots[name];
  return { data, error, version, retry: () => load(name) };
}

/** Whether the page hears the server, who is signed in, and whether it is paused. */
export function useLink() {
  useTopics(["link"]);
  return state;
}

/** `then(row, seq)` runs for each session row that an action or the stream brings. */
export function useRows(then) {
  useEffect(() => {
    rowListeners.add(then);
    return () => rowListeners.delete(then);
  });
}

export function tellRow(row, seq) {
  rowListeners.forEach((listener) => listener(row, seq));
}

/** `then(data)` runs for each event of that type, such as "journal" or "tick". */
export function useEvents(type, then) {
  useEffect(() => {
    const listener = (event) => event.type === type && then(event.data);
    eventListeners.add(listener);
    return () => eventListeners.delete(listener);
  });
}

/** One fact of a snapshot; the view is drawn again only when the fact changes. */
export function useFact(name, of) {
  const read = () => (slots[name].data === null ? null : of(slots[name].data));
  const [fact, setFact] = useState(read);
  useEffect(() => {
    const update = () => setFact(read());
    update();
    return listen([name], update);
  }, [name]);
  useEffect(() => want(name), [name]);
  return fact;
}

/** The server's time now, in epoch ms: what it said last, and the time since. Null before it said any. */
export function serverNow() {
  const { ts, at } = state.heard;
  return ts === null ? null : ts + performance.now() - at;
}

function hearClock(ts) {
  if (ts != null && ts >= (state.heard.ts ?? 0)) state.heard = { ts, at: performance.now() };
}

// ---------------------------------------------------------------- snapshots

function want(name) {
  const slot = slots[name];
  slot.wanted += 1;
  if (slot.data === null || !inStep(name)) load(name);
  return () => (slot.wanted -= 1);
}

/** Whether the events since it was asked for were applied to it. */
const inStep = (name) => Boolean(APPLY[name]) && state.link.state === "live" && !slots[name].missed;

export async function load(name) {
  const slot = slots[name];
  if (slot.busy) return void (slot.again = true);
  slot.busy = true;
  const path = SOURCES[name].path();
  try {
    const data = await api.get(path);
    take(name, data);
  } catch (error) {
    // Where nothing answers, the banner says so, and what was known stays on show, greyed.
    if (!error.unreachable || slot.data === null) slot.error = error;
  }
  slot.busy = false;
  slot.at = performance.now();
  changed(name);
  if (slot.again || path !== SOURCES[name].path()) {
    slot.again = false;
    load(name);
  }
}

function take(name, data) {
  Object.assign(slots[name], { data, error: null, missed: false });
  hearClock(data.as_of?.ts);
  if (name === "history") data.step = state.range > 900 ? 10 : 1;
  if (name === "device") stampCells(data);
  for (const event of kept) if (event.id > (data.as_of?.seq ?? Infinity)) APPLY[name]?.(data, event);
}

function stampCells(map) {
  for (const tenant of map.tenants) for (const cell of tenant.cells) cell.at = map.as_of?.ts ?? null;
}

/** Events were missed, so nothing that is known can be brought up to date by those that follow. */
function startOver() {
  kept.length = 0;
  for (const [name, slot] of Object.entries(slots)) {
    slot.missed = true;
    if (slot.wanted > 0) load(name);
  }
  changed("restart");
}

/** Runs `then` whenever events were missed, for what a view asked for by itself. */
export function useRestart(then) {
  useEffect(() => listen(["restart"], then));
}

// ---------------------------------------------------------------- the stream

const stream = new Stream({
  path: () => "/stream?" + api.query({ after: state.seq, watch: state.watched }),
  event: hear,
  link: (name, more) => {
    if (name === "signed out") return signOut();
    const was = state.link;
    state.link = { state: name, ...more, since: was.state === name ? was.since : serverNow() };
    if (name === "live" && (was.state === "polling" || was.state === "down")) reload();
    changed("link");
  },
});

/** What the stream does not carry may have changed while it was away. */
function reload() {
  for (const [name, slot] of Object.entries(slots)) if (slot.wanted > 0 && (!APPLY[name] || slot.error)) load(name);
}

function hear(event) {
  if (event.type === "hello") return greet(event.data);
  if (event.type === "reset") return reset(event);
  if (event.type === "bye") return;
  if (event.type === "session") tellRow(event.data.row || event.data, event.id);
  if (event.id <= state.seq) return;
  if (event.id > state.seq + 1 && event.type !== "session") missing();
  state.seq = event.id;
  hearClock(event.data.ts);
  kept.push(event);
  if (kept.length > KEPT_EVENTS) kept.shift();
  for (const [name, slot] of Object.entries(slots)) applyTo(name, slot, event);
  eventListeners.forEach((listener) => listener(event));
}

function applyTo(name, slot, event) {
  if (!slot.data || slot.missed || !APPLY[name] || event.id <= slot.data.as_of?.seq) return;
  if (APPLY[name](slot.data, event)) changed(name);
}

function greet({ boot, seq }) {
  const another = state.boot !== null && boot !== state.boot;
  state.boot = boot;
  if (another || state.seq === null) state.seq = seq;
  if (another) startOver();
  changed("link");
}

function reset({ id, data }) {
  state.seq = id ?? data.seq ?? state.seq;
  startOver();
}

function missing() {
  if (performance.now() - lastGap < GAP_PAUSE_MS) return;
  lastGap = performance.now();
  startOver();
}

// ---------------------------------------------------------------- from sign-in to sign-out

/** Asks who is signed in, and starts to listen. */
export async function start() {
  try {
    await enter();
  } catch (error) {
    if (error.status === 401) return;
    state.link = { state: "down", error, retryAt: Date.now() + 5_000 };
    changed("link");
    clearTimeout(start.timer);
    start.timer = setTimeout(start, 5_000);
  }
}

async function enter() {
  state.me = await api.get("/me");
  api.useCsrf(state.me.csrf);
  const overview = await api.get("/overview");
  take("overview", overview);
  Object.assign(state, { seq: overview.as_of.seq, boot: overview.as_of.boot, phase: "ready", link: { state: "connecting" } });
  changed("overview");
  changed("link");
  if (!state.paused && !document.hidden) stream.open();
}

export async function signIn(key) {
  await api.post("/login", { key });
  state.phase = "starting";
  changed("link");
  await start();
}

export async function leave() {
  await api.post("/logout").catch(() => {});
  signOut();
}

function signOut() {
  stream.close();
  for (const slot of Object.values(slots)) Object.assign(slot, { data: null, error: null });
  Object.assign(state, { phase: "login", me: null, seq: null, boot: null, link: { state: "connecting" } });
  kept.length = 0;
  changed("link");
}

api.onSignedOut(signOut);

export function tryNow() {
  if (state.phase === "starting") return start();
  stream.open();
}

/** Pause stops all updates; resuming goes on after the last event, or starts over if that is too long ago. */
export function togglePause() {
  state.paused = !state.paused;
  changed("link");
  if (state.paused) return stream.close();
  stream.open();
  reload();
}

export const connected = () => !["down", "connecting"].includes(state.link.state);

/** Which session the stream sends each change of. */
export function watch(id) {
  if (state.watched === id) return;
  state.watched = id;
  if (id && state.phase === "ready" && !state.paused && state.link.state === "live") stream.open();
}

export function setRange(seconds) {
  if (state.range === seconds) return;
  state.range = seconds;
  if (slots.history.wanted > 0) load("history");
  else slots.history.data = null;
}

export function setScope(tenant) {
  if (state.scope === tenant) return;
  state.scope = tenant;
  if (slots.journal.wanted > 0) load("journal");
  else slots.journal.data = null;
}

document.addEventListener("visibilitychange", () => {
  if (state.phase !== "ready" || state.paused) return;
  if (document.hidden) stream.close();
  else stream.open();
});

setInterval(() => {
  if (state.phase !== "ready" || state.paused || document.hidden || state.link.state === "down") return;
  const polling = state.link.state === "polling";
  for (const [name, slot] of Object.entries(slots)) {
    const every = polling ? POLL_MS[name] || POLL_MS.others : SOURCES[name].every;
    if (slot.wanted > 0 && every && performance.now() - slot.at >= every) load(name);
  }
}, 500);
