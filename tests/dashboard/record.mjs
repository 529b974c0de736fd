// Which answers does pictures.mjs show? Writes those of a real server to frozen/, which is committed.
//
// Expects: a server under load of several tenants, past the pool's size, for some minutes already, with a pinned session and
// one or more that ended. After it, `UPDATE=1 node pictures.mjs` draws the references anew.
import { ANSWERS, write } from "./frozen.mjs";
import { ask, check, equal, expect, key, run, server } from "./lib.mjs";

const STREAM_MS = 4_000, MOST_BYTES = 300_000;
/** Decisions of the journal that are kept: more than any page shows at once. */
const DECISIONS = 60;

await run(async () => {
  let bytes = 0;
  const keep = (name, value) => {
    bytes += JSON.stringify(value).length;
    write(name, value);
  };

  await check("answers, and the events after them, are kept", async () => {
    const id = await eventful();
    const { body: { as_of: { seq } } } = await ask("/overview");
    for (const [name, path] of Object.entries(ANSWERS)) keep(name, small(await answerTo(path(id))));
    const events = await eventsAfter(seq, id);
    expect(events.some((event) => event.type === "journal"), "nothing was decided in the meantime: is there load?");
    keep("stream", events);
  });

  await check(`they are under ${MOST_BYTES} bytes`, () => expect(bytes < MOST_BYTES, `${bytes} bytes`));
});

/** A session with much to tell: it came back, and it has a journal. */
async function eventful() {
  const { body: { items } } = await ask("/sessions?sort=-turns&limit=12");
  const sessions = await Promise.all(items.map(async ({ id }) => (await ask(`/sessions/${id}`)).body));
  const told = (session) => Math.min(8, session.evictions.length) + new Set(session.turns_detail.map((turn) => turn.path)).size * 4;
  sessions.sort((a, b) => told(b) - told(a));
  expect(sessions[0]?.evictions.length, "no session has a journal yet");
  return sessions[0].id;
}

async function answerTo(path) {
  const { status, body } = await ask(path);
  equal(status, 200, path);
  return body;
}

/** Without what tells one sign-in from another, and without decisions that nobody sees. */
function small(answer) {
  if ("csrf" in answer) return { ...answer, actor: "admin", csrf: "recorded" };
  return answer.by_rule ? { ...answer, items: answer.items.slice(0, DECISIONS), next: null } : answer;
}

async function eventsAfter(seq, watched) {
  const abort = new AbortController();
  setTimeout(() => abort.abort(), STREAM_MS);
  let text = "";
  try {
    const headers = { authorization: `Bearer ${key}`, accept: "text/event-stream" };
    const response = await fetch(`${server}/admin/api/stream?after=${seq}&watch=${watched}`, { headers, signal: abort.signal });
    for await (const part of response.body) text += Buffer.from(part).toString();
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  }
  return text.split("\n\n").slice(0, -1).map(parsed).filter(Boolean);
}

function parsed(block) {
  const field = (name) => block.match(new RegExp(`^${name}: ?(.*)$`, "m"))?.[1];
  return field("data") && { id: Number(field("id")), type: field("event"), data: JSON.parse(field("data")) };
}
