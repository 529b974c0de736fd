// 4. Does the page stay true when the connection does not?
//
// Expects: a server on 127.0.0.1 under load that makes several events a second, for the whole run (about a minute).
// REKINDLE_RESTART: a shell command that restarts that server at the same address and waits until it is ready; without it,
// the restart is skipped, and that is said. STALL_S: for how long a reader stalls (15).
import { execFileSync } from "node:child_process";
import net from "node:net";
import { ask, check, equal, expect, key, noFaults, open, openIn, run, server, settled, shot, until } from "./lib.mjs";
import { proxy } from "./proxy.mjs";

await run(async (browser) => {
  const network = await proxy(server);
  const page = await open(browser, { route: "overview" });
  await page.goto(`${network.url}/admin#/overview`);
  await settled(page);
  await live(page);

  await check("a cut connection shows a banner, greys the page and refuses actions", async () => {
    network.refuse(true);
    network.cut();
    await page.waitForSelector(".banner:has-text('The stream broke at event')", { timeout: 3_000 });
    expect(await page.$(".stale"), "the figures are not greyed");
    await shot(page, "stream-down");
  });

  await check("it resumes after the last event, without a hole", async () => {
    const before = network.streams.length, seen = network.streams.at(-1).ids.at(-1);
    await new Promise((then) => setTimeout(then, 1_500));
    network.refuse(false);
    await page.click(".banner button:has-text('Try now')");
    await live(page);
    await until(() => network.streams[before]?.ids.length > 5, "events come again", { ms: 10_000 });
    const resumed = network.streams[before];
    equal(Number(resumed.after), seen, "where it went on");
    const ids = resumed.ids.filter((id) => id > seen);
    ids.forEach((id, i) => equal(id, seen + 1 + i, "the next event's number"));
    expect(!(await page.$(".banner")), "the banner is still there");
  });

  await check("a fifth tab polls, and says why", async () => {
    const tabs = [];
    for (let i = 0; i < 4; i++) tabs.push(await openIn(page.context(), "overview"));
    const fifth = tabs.at(-1);
    let polls = 0;
    fifth.on("request", (request) => { if (request.url().endsWith("/admin/api/overview")) polls += 1; });
    await fifth.waitForSelector(".live:has-text('Polling')", { timeout: 5_000 });
    await until(() => polls >= 2, "it polls", { ms: 15_000 });
    await shot(fifth, "stream-polling");
    for (const tab of tabs) await tab.close();
  });

  await check("a hidden tab closes its stream, and resumes on show", async () => {
    const before = network.streams.length;
    await visibility(page, "hidden");
    await new Promise((then) => setTimeout(then, 1_000));
    await visibility(page, "visible");
    await until(() => network.streams.length > before && network.streams.at(-1).ids.length > 2, "it resumes", { ms: 10_000 });
    expect(network.streams.at(-1).after !== null, "it started over instead of going on");
  });

  await check("a stalled reader slows nobody", async () => {
    const before = await pace();
    const stalled = stall();
    await new Promise((then) => setTimeout(then, Number(process.env.STALL_S || 15) * 1000));
    const during = await pace();
    stalled.destroy();
    expect(during.answer_ms < 250, `/overview took ${during.answer_ms.toFixed(0)} ms`);
    if (before.tokens > 0) expect(during.tokens > before.tokens * 0.6, `tokens a second: ${before.tokens} before, ${during.tokens} then`);
  });

  await check("numbers that can't be resumed start over", async () => {
    const answer = await readStream("after=4000000000", 2_000);
    expect(/event: ?reset/.test(answer), `no reset for an event that this server never sent: ${answer.slice(0, 200)}`);
  });

  await restart(page, network);
  noFaults(page, { except: ["foreign"] });
  network.close();
});

function live(page) {
  return page.waitForSelector(".live:has-text('Live')", { timeout: 40_000 });
}

/** As if the tab were hidden: Chromium without a window always shows its tabs. */
function visibility(page, value) {
  return page.evaluate((v) => {
    Object.defineProperty(document, "hidden", { configurable: true, get: () => v === "hidden" });
    Object.defineProperty(document, "visibilityState", { configurable: true, get: () => v });
    document.dispatchEvent(new Event("visibilitychange"));
  }, value);
}

async function pace() {
  const start = performance.now();
  const { body } = await ask("/overview");
  return { answer_ms: performance.now() - start, tokens: body.rates.tokens_per_s };
}

/** A stream that is opened and never read. */
function stall() {
  const { hostname, port, host } = new URL(server);
  const socket = net.connect({ host: hostname, port: Number(port), highWaterMark: 1 });
  socket.write(`GET /admin/api/stream HTTP/1.1\r\nHost: ${host}\r\nAuthorization: Bearer ${key}\r\nAccept: text/event-stream\r\n\r\n`);
  socket.pause();
  socket.on("error", () => {});
  return socket;
}

async function readStream(query, ms) {
  const abort = new AbortController();
  setTimeout(() => abort.abort(), ms);
  let text = "";
  try {
    const headers = { authorization: `Bearer ${key}` };
    const response = await fetch(`${server}/admin/api/stream?${query}`, { headers, signal: abort.signal });
    for await (const part of response.body) text += Buffer.from(part).toString();
  } catch {
    // Aborted after `ms`, as meant.
  }
  return text;
}

async function restart(page, network) {
  const command = process.env.REKINDLE_RESTART;
  if (!command) return console.log("skip  restart: REKINDLE_RESTART is not set");
  await check("after a restart the page starts over with the new boot's figures", async () => {
    const { body: old } = await ask("/overview");
    execFileSync("sh", ["-c", command], { stdio: "inherit", timeout: 60_000 });
    const { body: now } = await until(() => ask("/overview").catch(() => null), "the server is back", { ms: 30_000 });
    expect(now.as_of.boot !== old.as_of.boot, "the boot is the same");
    // A restart may end the sign-in as well: the page then asks for the key again, and that is right too.
    const back = async () => (await page.$("#key")) || (await page.$(".live:has-text('Live')"));
    await until(back, "live again, or signed out", { ms: 40_000 });
    expect(network.streams.length > 0, "no stream was opened");
  });
}
