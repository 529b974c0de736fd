/* How do the server's events reach the page? One request that stays open, read as server-sent events.
 *
 * Read with `fetch` rather than `EventSource`, which hides what is needed here: the status of a refusal (401: sign in;
 * 429: too many tabs) and the heartbeats, whose absence is the only sign of a connection that died silently.
 * Reconnects after 1, 2, 4 … 30 s with jitter. Gives a connection up after 40 s without a byte. */
import { refusal, url } from "./api.js";

const SILENCE_MS = 40_000;
const LONGEST_WAIT_S = 30;
const CROWDED_WAIT_S = 30;

export class Stream {
  /** `path()` says where to go on, `event({id, type, data})` takes what comes, `link(state, {retryAt, error})` the state. */
  constructor({ path, event, link }) {
    Object.assign(this, { path, event, link, failures: 0, request: null, timer: null });
  }

  open() {
    this.close();
    const request = (this.request = new AbortController());
    this.#run(request).catch((error) => {
      if (this.request === request) this.#retry(error);
    });
  }

  close() {
    clearTimeout(this.timer);
    clearTimeout(this.silence);
    this.request?.abort();
    this.request = null;
  }

  async #run(request) {
    this.#listen(request);
    const response = await fetch(url(this.path()), {
      headers: { accept: "text/event-stream" }, signal: request.signal, credentials: "same-origin", cache: "no-store",
    });
    if (!response.ok) throw refusal(response, await response.json().catch(() => null));
    this.failures = 0;
    this.link("live", {});
    await this.#read(response.body.getReader(), request);
    throw new Error("the stream ended");
  }

  async #read(reader, request) {
    const decoder = new TextDecoder();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done || this.request !== request) return;
      this.#listen(request);
      const parts = (text + decoder.decode(value, { stream: true })).split(/\r?\n\r?\n/);
      text = parts.pop();
      for (const part of parts) this.#hear(part);
    }
  }

  #hear(part) {
    const event = parse(part);
    if (event) this.event(event);
  }

  /** Something came, or may still come within 40 s. */
  #listen(request) {
    clearTimeout(this.silence);
    this.silence = setTimeout(() => {
      request.abort();
      if (this.request === request) this.#retry(new Error("silent for too long"));
    }, SILENCE_MS);
  }

  #retry(error) {
    this.close();
    if (error.status === 401) return this.link("signed out", { error });
    const crowded = error.status === 429;
    const wait = crowded ? error.retryAfter || CROWDED_WAIT_S : Math.min(LONGEST_WAIT_S, 2 ** this.failures);
    const jittered = wait * (0.75 + Math.random() / 2);
    if (!crowded) this.failures += 1;
    this.timer = setTimeout(() => this.open(), jittered * 1000);
    this.link(crowded ? "polling" : "down", { error, retryAt: Date.now() + jittered * 1000 });
  }
}

/** One block of lines; null for a comment, which is a heartbeat. */
function parse(part) {
  const event = { id: null, type: "message", data: "" };
  for (const line of part.split(/\r?\n/)) {
    const [, field, value] = line.match(/^(\w+): ?(.*)$/) || [];
    if (field === "id") event.id = Number(value);
    if (field === "event") event.type = value;
    if (field === "data") event.data += value;
  }
  return event.data ? { ...event, data: JSON.parse(event.data) } : null;
}
