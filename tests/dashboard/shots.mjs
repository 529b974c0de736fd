// Which picture shows the page in README? Writes it to SHOTS (required).
//
// Expects: a server under load of several tenants, past the pool's size, for some minutes already.
import { noFaults, open, required, run, settled, shot } from "./lib.mjs";

required("SHOTS");

await run(async (browser) => {
  const page = await open(browser, { route: "overview?range=300" });
  await settled(page);
  await page.waitForTimeout(3_000);
  await page.evaluate(() => document.activeElement?.blur());
  await shot(page, "dashboard");
  noFaults(page);
});
