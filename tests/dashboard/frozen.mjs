// What does the page ask a server for, and how does it get the answers of another day? Read by record.mjs and pictures.mjs.
import fs from "node:fs";
import http from "node:http";

const FOLDER = new URL("./frozen/", import.meta.url);

/** Paths under /admin/api by the name of the file that keeps the answer; `drawer` is of the session that was open. */
export const ANSWERS = {
  me: () => "/me",
  overview: () => "/overview",
  tenants: () => "/tenants",
  history: () => "/history?range=600&step=1",
  device: () => "/map?tier=device",
  host: () => "/map?tier=host",
  disk: () => "/map?tier=disk",
  policy: () => "/policy",
  sessions: () => "/sessions?sort=idle&limit=100",
  journal: () => "/evictions?limit=200",
  decisions: () => "/evictions?limit=100",
  rules: () => "/evictions?limit=1",
  drawer: (id) => `/sessions/${id}`,
};

export function write(name, value) {
  fs.mkdirSync(FOLDER, { recursive: true });
  fs.writeFileSync(new URL(`${name}.json`, FOLDER), JSON.stringify(value) + "\n");
}

export const read = (name) => JSON.parse(fs.readFileSync(new URL(`${name}.json`, FOLDER), "utf8"));

/** Whom the drawer shows, the server's time at the last event, and the answers by path. */
export function frozen() {
  const drawer = read("drawer").id, events = read("stream");
  const answers = new Map(Object.entries(ANSWERS).map(([name, path]) => [path(drawer), read(name)]));
  return { drawer, answers, events, now: Math.max(...events.map((event) => event.data.ts || 0)) };
}

/** From now on the page hears nothing but those answers. `missing` collects what was asked for besides. */
export async function answer(context, { answers, events, now }) {
  const missing = [];
  const stream = await hold(events);
  await context.clock.setFixedTime(now);
  // The ages of things are told by this one, whose start is that of the page.
  await context.addInitScript(() => (performance.now = () => 1_000));
  await context.route("**/admin/api/**", async (route) => {
    const { pathname, search } = new URL(route.request().url());
    const path = pathname.replace("/admin/api", "") + search;
    if (pathname.endsWith("/stream")) return route.continue({ url: stream.url });
    if (answers.has(path)) return route.fulfill({ json: answers.get(path) });
    missing.push(path);
    return route.fulfill({ status: 404, json: { error: { message: `${path} was not recorded`, code: "not_recorded" } } });
  });
  return { missing, close: () => stream.close() };
}

/** A stream that says these events and then stays open, which an answer of Playwright's can't. */
async function hold(events) {
  const text = events.map(({ id, type, data }) => `id: ${id}\nevent: ${type}\ndata: ${JSON.stringify(data)}\n\n`).join("");
  const server = http.createServer((_, response) => {
    response.writeHead(200, { "content-type": "text/event-stream", "cache-control": "no-store" });
    response.write(text);
  });
  await new Promise((then) => server.listen(0, "127.0.0.1", then));
  const close = () => {
    server.close();
    server.closeAllConnections();
  };
  return { url: `http://127.0.0.1:${server.address().port}/`, close };
}
