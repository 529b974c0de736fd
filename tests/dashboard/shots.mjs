// Which pictures show the page in README? Writes them to SHOTS (required).
//
// Expects: a server under load of several tenants, past the pool's size, for some minutes already.
import { ask, expect, noFaults, open, required, run, settled, shot } from "./lib.mjs";

required("SHOTS");

await run(async (browser) => {
  const { body } = await ask("/sessions?sort=-turns&limit=1");
  expect(body.items.length, "there is no session");
  const pictures = [
    ["dashboard", { route: "overview" }],
    ["dashboard-dark", { route: "overview", theme: "dark" }],
    ["dashboard-session", { route: `sessions?s=${body.items[0].id}` }],
    ["dashboard-policy", { route: "policy", theme: "dark" }],
  ];
  for (const [name, options] of pictures) {
    const page = await open(browser, options);
    await settled(page);
    await page.waitForTimeout(3_000);
    await page.evaluate(() => document.activeElement?.blur());
    await shot(page, name);
    noFaults(page);
    await page.context().close();
  }
});
