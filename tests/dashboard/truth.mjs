// 2. Does the page show what the engine did?
//
// Expects: two tenants (TENANT_A and TENANT_B, `a` and `b` if not set) driven past the device pool's size, the policy that
// POLICY names (`lru` if not set), a journal that was not yet full, and no load while this runs. The verdict, the matrix,
// the journal's sentences, the order of victims and the tiers' bytes on the page are those of the API and of /metrics.
import { ask, check, equal, expect, metrics, open, run, server, settled, shot, sum, until, wholeJournal } from "./lib.mjs";

const A = process.env.TENANT_A || "a", B = process.env.TENANT_B || "b", POLICY = process.env.POLICY || "lru";
const text = (page, selector) => page.$eval(selector, (el) => el.textContent.replace(/\s+/g, " ").trim());

await run(async (browser) => {
  const counted = await metrics();
  const page = await open(browser, { route: "overview" });
  await settled(page);
  await shot(page, "truth-overview");

  await check("the verdict is the server's sentence", async () => {
    // Its rates go on falling while both are asked: at some moment they say the same.
    let said, shown;
    const same = async () => {
      const { body: { verdict } } = await ask("/overview");
      const detail = verdict.detail.map((piece) => piece.tenant ?? (piece.session ? piece.session.slice(0, 13) : piece)).join("");
      said = [verdict.title, detail.replace(/\s+/g, " ").trim()];
      shown = [await text(page, ".verdict h1"), await text(page, ".verdict p")];
      return said.join("\n") === shown.join("\n");
    };
    await until(same, "the same sentence").catch(() => equal(shown, said, "title and detail"));
  });

  await check("there is no isolation fault, on the page, in the API and in /metrics", async () => {
    const { body } = await ask("/overview");
    equal(body.isolation_faults, 0, "API");
    equal(sum(counted, "rekindle_isolation_faults_total"), 0, "/metrics");
    await page.goto(`${server}/admin#/tenants`);
    await settled(page);
    expect((await page.textContent("main")).includes("0 isolation faults"), "the page does not say it");
  });

  await check("the matrix is the counters of who made room for whom", async () => {
    const { body } = await ask("/tenants");
    const losses = lossesOf(counted);
    equal(sorted(ownAndOther(body.displaced)), sorted(losses), "API against /metrics");
    expect(Object.keys(losses).some((pair) => pair.startsWith(`${A}>`) || pair.startsWith(`${B}>`)), "neither tenant lost anything");
    equal(sorted(await matrixOf(page)), sorted(body.displaced), "page against API");
  });

  await check("the journal's sentences and their order are those of /evictions", async () => {
    await page.goto(`${server}/admin#/evictions`);
    await settled(page);
    const { body } = await ask("/evictions?limit=100");
    const shown = await page.$$eval(".feed.big li .why", (all) => all.map((el) => el.textContent.trim()));
    equal(shown.slice(0, 50), body.items.slice(0, 50).map((entry) => entry.sentence.trim()), "sentences");
  });

  await check("the journal counts the evictions that /metrics counts", async () => {
    const rules = ["ended", "lru", "return_rate", "over_ceiling"];
    const evictions = (await wholeJournal("")).filter((entry) => rules.includes(entry.rule));
    equal(evictions.length, sum(counted, "rekindle_tenant_evictions_total"), "evictions by these rules");
    for (const rule of rules) {
      const found = evictions.filter((entry) => entry.rule === rule).length;
      equal(found, sum(counted, "rekindle_tenant_evictions_total", `rule="${rule}"`), rule);
    }
  });

  await check("the victims are in the server's order, under the server's policy", async () => {
    await page.goto(`${server}/admin#/policy`);
    await settled(page);
    const { body } = await ask("/policy");
    equal(body.active.policy, POLICY, "policy");
    const shown = await page.$$eval(".order tbody tr:not(.grp) .lnk.mono", (all) => all.map((el) => el.title));
    equal(shown, body.victims.slice(0, shown.length).map((victim) => victim.session), "order");
    expect(body.victims.length === 0 || shown.length > 0, "no victim is shown");
    const silences = body.victims.filter((victim) => victim.rule === "lru").map((victim) => victim.idle_s);
    if (POLICY === "lru") equal(silences, [...silences].sort((x, y) => y - x), "the silent the longest go first");
  });

  await check("each tier's bytes sum up to its pool's", async () => {
    const { body: { tiers } } = await ask("/overview");
    const { body: { items } } = await ask("/tenants");
    for (const tier of tiers.filter((t) => t.enabled)) {
      const labels = `tier="${tier.tier}"`;
      equal(tier.capacity_bytes, sum(counted, "rekindle_pool_bytes", labels), `${tier.tier}: capacity`);
      equal(tier.used_bytes, tier.capacity_bytes - sum(counted, "rekindle_pool_free_bytes", labels), `${tier.tier}: used`);
      const tenants = items.reduce((n, t) => n + (tier.tier === "device" ? t.device.used_bytes : t[`${tier.tier}_bytes`]), 0);
      equal(tenants + tier.waiting_bytes, tier.used_bytes, `${tier.tier}: tenants and what waits`);
    }
  });

  await check("the map's cells are the sessions that have bytes on the device", async () => {
    const { body: map } = await ask("/map?tier=device");
    const { body: overview } = await ask("/overview");
    const cells = map.tenants.flatMap((tenant) => tenant.cells);
    const sessions = cells.reduce((n, cell) => n + cell.n, 0);
    equal(sessions, overview.tiers.find((t) => t.tier === "device").sessions, "sessions on the device");
  });
});

/** {"a>own": n, "a>other": n} of {"a>a": n, "a>b": n}: a scraper is not told of pairs. */
function ownAndOther(pairs) {
  const folded = {};
  for (const [pair, n] of Object.entries(pairs)) {
    const [lost, by] = pair.split(">"), whose = `${lost}>${by === lost ? "own" : "other"}`;
    folded[whose] = (folded[whose] || 0) + n;
  }
  return folded;
}

/** {"a>own": n, "a>other": n} of the counter. */
function lossesOf(lines) {
  const pairs = {};
  for (const line of lines.filter((l) => l.startsWith("rekindle_displaced_evictions_total{"))) {
    const lost = line.match(/[{,]tenant="([^"]*)"/)[1], by = line.match(/for_tenant="([^"]*)"/)[1], n = Number(line.split(" ").pop());
    if (n > 0) pairs[`${lost}>${by}`] = n;
  }
  return pairs;
}

function sorted(pairs) {
  return Object.entries(pairs).filter(([, n]) => n > 0).sort(([x], [y]) => x.localeCompare(y));
}

async function matrixOf(page) {
  const { heads, rows } = await page.$eval(".mat", (table) => ({
    heads: [...table.querySelectorAll("thead th")].slice(1).map((th) => th.title),
    rows: [...table.querySelectorAll("tbody tr")].map((tr) => [...tr.children].map((cell) => cell.textContent.trim())),
  }));
  const pairs = {};
  for (const [lost, ...cells] of rows) {
    cells.forEach((cell, i) => { if (cell !== "·") pairs[`${lost}>${heads[i]}`] = Number(cell.replaceAll(",", "")); });
  }
  return pairs;
}
