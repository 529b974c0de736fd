// Is one of something told as one? The page's own words for counts, and all that it shows where there is one of most things.
//
// Expects: a server with a single session that had a single turn.
import { ROUTES, ask, check, equal, expect, noFaults, open, run, server, settled, words } from "./lib.mjs";

/** What follows a 1 and ends with an s though it is no plural. */
const SINGULAR = ["is", "was", "has", "waits", "runs", "matches", "ms"];

await run(async (browser) => {
  await check("a count has the word that goes with it", async () => {
    const { counted, noun } = await words();
    equal([0, 1, 2, 1234].map((n) => counted(n, "turn")), ["0 turns", "1 turn", "2 turns", "1,234 turns"], "turns");
    equal([counted(1, "matches", "match"), counted(2, "matches", "match")], ["1 matches", "2 match"], "verbs");
    equal([counted(null, "turn"), noun(1.2, "token"), noun(null, "token")], ["– turns", "token", "tokens"], "no data, and rounding");
  });

  const { body } = await ask("/sessions");
  equal([body.items.length, body.items[0]?.turns], [1, 1], "sessions, and turns of the first");
  const page = await open(browser);
  for (const route of [...ROUTES, `overview?s=${body.items[0].id}`]) {
    await check(`${route.includes("?s=") ? "drawer" : route}: one is not several`, async () => {
      await page.goto(`${server}/admin#/${route}`);
      await settled(page);
      const { found, plurals } = await page.evaluate(countsOfOne, SINGULAR);
      equal(plurals, [], "plurals");
      if (route !== "evictions" && route !== "tenants") expect(found > 0, "nothing here is told to be one");
    });
  }
  noFaults(page);
});

/** In the page: how often a word follows a 1, and where that word is a plural. */
function countsOfOne(singular) {
  const said = [];
  for (const element of document.querySelectorAll("body *")) {
    if (element.children.length <= 2) said.push(element.textContent);
    said.push(element.getAttribute("aria-label"), element.getAttribute("title"));
  }
  const found = said.filter(Boolean).flatMap((text) => [...text.matchAll(/(?<![\w.,:#×–-])1\s?([a-z]+)/g)]);
  const plurals = found.filter(([, word]) => word.endsWith("s") && word !== "s" && !singular.includes(word));
  return { found: found.length, plurals: [...new Set(plurals.map(([whole]) => whole))] };
}
