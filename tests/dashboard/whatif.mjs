// Does the what-if panel show what the server's replay came to, and is a replay ended when nobody waits for it any more?
//
// Expects: tenant `b` lost its conversation on the device to turns of `a`, and went on; a floor would have kept it. No load.
// REKINDLE_PID: the server's process; REKINDLE_TENANT_KEY: the key of `a`, who goes on talking while replays run. A replay's
// process is halted where a check looks at the page meanwhile, so that it is there for sure.
import fs from "node:fs";
import { ask, check, equal, expect, metrics, noFaults, open, required, run, server, settled, shot, sum, until, wholeJournal, words } from "./lib.mjs";

const PID = Number(required("REKINDLE_PID")), TENANT_KEY = required("REKINDLE_TENANT_KEY");
const PANEL = '[aria-label="What if"]';
const MIB = 2 ** 20, FLOOR_MIB = 20, CEILING_MIB = 200;
const { bytes, count, ms, percent } = await words();

/** What the panel tells of each side, beside its name there. */
const MEASURES = {
  "TTFT p50, foretold": (side) => ms(side.ttft.p50_ms),
  "TTFT p95, foretold": (side) => ms(side.ttft.p95_ms),
  "Turns": (side) => count(side.turns),
  "Reusable tokens": (side) => count(side.reusable_tokens),
  "Encoded again": (side) => count(side.reencoded_tokens),
  "Found of reusable": (side) => percent(side.cached_ratio, 1),
  "Found on device": (side) => count(side.hits.device),
  "Found in host": (side) => count(side.hits.host),
  "Found on disk": (side) => count(side.hits.disk),
  "Evictions": (side) => count(side.evictions),
  "Bytes moved": (side) => bytes(side.bytes_moved),
};

await run(async (browser) => {
  const page = await open(browser, { route: "policy" });
  await settled(page);
  const { body: { active } } = await ask("/policy");

  let answer;
  await check("what is chosen is asked for, and its progress is shown until the end", async () => {
    await choose(page, "Policy", "lru");
    await choose(page, "Device memory", "2");
    await type(page, "floor of b", FLOOR_MIB);
    await type(page, "ceiling of b", CEILING_MIB);
    const started = start(page);
    const worker = await halted();
    await page.waitForSelector(`${PANEL} [role=status]:has-text("replaying, 1 s")`, { timeout: 10_000 });
    expect(await page.isDisabled(`${PANEL} button:has-text("Replay")`), "another can be begun meanwhile");
    const busy = await ask("/policy/replay", { method: "POST", body: {} });
    equal([busy.status, busy.body.error.code], [409, "replay_running"], "a second replay at the same time");
    await shot(page, "whatif-running");
    process.kill(worker, "SIGCONT");
    const { asked, response } = await started;
    equal(response.status(), 200, "the answer's status");
    answer = await response.json();
    const tenants = { b: { floor: FLOOR_MIB * MIB, ceiling: CEILING_MIB * MIB } };
    const sizes = { device_bytes: 2 * active.device_bytes, host_bytes: null, disk_bytes: null };
    equal(asked, { policy: "lru", eviction_doubles_at: null, ...sizes, tenants }, "the request");
    await page.waitForSelector(`${PANEL} table.replayed`);
    equal(await page.textContent(`${PANEL} [role=status]`), "", "progress after the end");
    await shot(page, "whatif-ended");
  });

  await check("the panel says what the API answers to the same settings", async () => {
    const tenants = { b: { floor: FLOOR_MIB * MIB, ceiling: CEILING_MIB * MIB } };
    const body = { policy: "lru", device_bytes: 2 * active.device_bytes, tenants };
    const { body: same } = await ask("/policy/replay", { method: "POST", body });
    for (const part of ["window", "base", "sim", "by_tenant"]) equal(same[part], answer[part], part);
    equal([same.sim.evictions, same.sim.reencoded_tokens], [0, 0], "evictions and tokens encoded again, with twice the memory");
    await told(page, same);
  });

  await check("as it ran is what /metrics and the journal say", async () => {
    equal(await page.textContent(`${PANEL} table.replayed th:nth-child(2)`), "As it ran", "the column's name");
    const counted = await metrics(), { base } = answer;
    equal(base.turns, sum(counted, "rekindle_turns_total", 'outcome="finished"'), "turns");
    equal(base.evictions, sum(counted, "rekindle_evictions_total"), "evictions");
    equal(base.evictions, (await wholeJournal("kind=evict")).length, "evictions of the journal");
    const found = ["resident", "shared"].map((source) => sum(counted, "rekindle_prompt_tokens_total", `source="${source}"`));
    equal(base.hits.device, found[0] + found[1], "tokens found on the device");
    const { measured } = base, panel = await text(page, PANEL);
    equal(measured.turns, base.turns, "turns that were measured");
    const times = `Measured then, with all waiting: ${ms(measured.p50_ms)} at the median, ${ms(measured.p95_ms)} at p95`;
    expect(panel.includes(times), `it does not say: ${times}`);
  });

  await check("a floor given to b by its name changes b's rows alone", async () => {
    await choose(page, "Policy", "");
    await choose(page, "Device memory", "1");
    await type(page, "ceiling of b", "");
    const { response } = await start(page);
    const replayed = await response.json();
    await told(page, replayed);
    const [a, b] = ["a", "b"].map((id) => replayed.by_tenant.find((tenant) => tenant.id === id));
    equal([a.base_ms, a.base_reencoded_tokens], [a.sim_ms, a.sim_reencoded_tokens], "a, as it was and if");
    expect(b.base_reencoded_tokens > 0 && b.sim_reencoded_tokens === 0, `b: ${JSON.stringify(b)}`);
  });

  await check("what can't be is refused with the server's sentence", async () => {
    await type(page, "ceiling of b", FLOOR_MIB / 2);
    await refused(page, "the floor of `b` is above its ceiling");
    // The page offers the tenants that it knows; this one was taken for one.
    await page.route("**/admin/api/policy", async (route) => {
      const response = await route.fetch(), policy = await response.json();
      policy.tenants.push({ ...policy.tenants[0], id: "ghost" });
      await route.fulfill({ response, json: policy });
    });
    await type(page, "ceiling of b", "");
    await type(page, "floor of ghost", 1);
    await refused(page, "there is no tenant `ghost` here; known are a, b");
    await page.unroute("**/admin/api/policy");
    await page.reload();
    await settled(page);
  });

  const ended = async () => until(() => workers().length === 0, "the replay's process is gone");
  await check("Cancel ends the replay", async () => {
    start(page);
    await halted();
    await page.click(`${PANEL} button:has-text("Cancel")`);
    await ended();
    await page.waitForSelector(`${PANEL} button:has-text("Replay"):enabled`);
  });

  await check("who leaves the page ends the replay and nothing of the engine's", async () => {
    const tab = await page.context().newPage();
    const ways = [() => page.goto(`${server}/admin#/overview`), () => tab.close()];
    await tab.goto(`${server}/admin#/policy`);
    await settled(tab);
    for (const [left, leave] of [[page, ways[0]], [tab, ways[1]]]) {
      start(left);
      await halted();
      const turn = say();
      await leave();
      await ended();
      equal(await turn, "completed", "a turn that ran meanwhile");
    }
    const counted = await metrics();
    for (const outcome of ["failed", "cancelled"]) equal(sum(counted, "rekindle_turns_total", `outcome="${outcome}"`), 0, outcome);
    equal((await ask("/policy/replay", { method: "POST", body: {} })).status, 200, "the next replay");
    equal(workers(), [], "processes of replays");
  });

  noFaults(page);
});

function choose(page, label, value) {
  return page.selectOption(`${PANEL} .choice:has-text("${label}") select`, value);
}

function type(page, label, mib) {
  return page.fill(`${PANEL} [aria-label="${label}, MiB"]`, String(mib));
}

async function text(page, selector) {
  return (await page.textContent(selector)).replace(/\s+/g, " ").trim();
}

/** Begins a replay: what is asked and answered, for those who wait for it. */
function start(page) {
  const isReplay = (url) => url.endsWith("/admin/api/policy/replay");
  const asked = page.waitForRequest((request) => isReplay(request.url())).then((request) => request.postDataJSON());
  const response = page.waitForResponse((answer) => isReplay(answer.url()));
  const clicked = page.click(`${PANEL} button:has-text("Replay")`);
  const both = Promise.all([asked, response, clicked]).then(([body, answer]) => ({ asked: body, response: answer }));
  both.catch(() => {});
  return both;
}

/** The processes that the server has begun, of those that are not reaped yet. */
function workers() {
  return fs.readdirSync("/proc").filter((name) => /^\d+$/.test(name)).map(Number).filter((pid) => parentOf(pid) === PID);
}

function parentOf(pid) {
  try {
    const stat = fs.readFileSync(`/proc/${pid}/stat`, "utf8");
    return Number(stat.slice(stat.lastIndexOf(")") + 2).split(" ")[1]);
  } catch {
    return null; // it is gone
  }
}

/** The replay that is running, at a standstill. */
async function halted() {
  const [pid] = await until(() => workers().length && workers(), "a replay's process is there", { every: 1 });
  process.kill(pid, "SIGSTOP");
  return pid;
}

/** The panel's tables are those of the answer. */
async function told(page, { base, sim, by_tenant: tenants }) {
  const sides = Object.entries(MEASURES).map(([name, of]) => [name, of(base), of(sim)]);
  const times = tenants.map((tenant) => [tenant.id, ms(tenant.base_ms), ms(tenant.sim_ms)]);
  const again = tenants.map((tenant) => `${tenant.id} ${count(tenant.base_reencoded_tokens)} → ${count(tenant.sim_reencoded_tokens)}`);
  await until(async () => JSON.stringify((await tables(page))[0]) === JSON.stringify(sides), "the new figures").catch(() => {});
  equal(await tables(page), [sides, times], "tables");
  const shown = await page.$$eval(`${PANEL} .by-tenant > span`, (all) => all.map((span) => span.textContent.trim()));
  const pairs = shown.filter((_, i) => i % 2 === 0).map((id, i) => `${id} ${shown[2 * i + 1]}`);
  equal(pairs, again, "tokens encoded again, by tenant");
}

function tables(page) {
  const cells = (all) => all.map((table) =>
    [...table.querySelectorAll("tbody tr")].map((row) => [...row.children].slice(0, 3).map((cell) => cell.textContent.trim())));
  return page.$$eval(`${PANEL} table.replayed`, cells);
}

async function refused(page, sentence) {
  const { response } = await start(page);
  equal(response.status(), 400, "status");
  equal((await response.json()).error.message, sentence, "the server's sentence");
  await page.waitForSelector(`${PANEL} .failure`);
  equal(await text(page, `${PANEL} .failure p`), sentence, "the panel's sentence");
}

/** A turn of tenant `a`; how it ended. */
async function say() {
  const headers = { authorization: `Bearer ${TENANT_KEY}`, "content-type": "application/json" };
  const body = JSON.stringify({ input: "Who sails at night?", max_output_tokens: 8, ignore_eos: true });
  const response = await fetch(`${server}/v1/responses`, { method: "POST", headers, body });
  const { status } = await response.json();
  return status === "incomplete" ? "completed" : status;
}
