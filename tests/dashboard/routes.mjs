// 1. Does every page, in both themes and both sizes, look right and break nothing?
//
// Expects: a server that has had turns of two tenants or more, past the pool's size, so that no panel is empty. It may be
// under load. Environment: lib.mjs. No console error, no violation of the content security policy, nothing clipped, no
// violation of axe; paused, the page does not move by itself, and dark is the same page as light.
import { ROUTES, SIZES, THEMES, ask, axe, check, clipped, difference, equal, expect, noFaults, open, run, settled, shot } from "./lib.mjs";

await run(async (browser) => {
  const { body } = await ask("/sessions?limit=1&sort=idle");
  expect(body?.items?.length, "the server has no session yet");
  const pages = [...ROUTES, `overview?s=${body.items[0].id}`];
  for (const route of pages) {
    const boxes = {};
    for (const theme of THEMES) {
      for (const size of SIZES) await one(browser, { route, theme, size, boxes });
    }
    await check(`${title(route)}: dark is laid out as light`, () => equal(boxes.dark, boxes.light, "panels"));
  }
});

async function one(browser, { route, theme, size, boxes }) {
  const name = `${title(route)} ${theme} ${size.width}x${size.height}`;
  await check(name, async () => {
    const page = await open(browser, { route, theme, size });
    await settled(page);
    await pause(page);
    const first = await page.screenshot();
    await shot(page, name.replaceAll(" ", "-"));
    equal(await axe(page), [], "axe");
    equal(await clipped(page), [], "clipped");
    await emptyPanels(page);
    const moved = await difference(page, first, await page.screenshot());
    expect(moved < 0.002, `paused, ${(moved * 100).toFixed(2)} % of the page changed`);
    if (size === SIZES[0]) boxes[theme] = await panels(page);
    noFaults(page);
    await page.context().close();
  });
}

function title(route) {
  return route.includes("?s=") ? "drawer" : route;
}

async function pause(page) {
  await page.click(".live");
  await page.waitForSelector(".live:has-text('Paused')");
  await page.waitForTimeout(100);
}

/** No panel is without a figure or a sentence. */
async function emptyPanels(page) {
  const mute = (all) => all.filter((p) => p.textContent.trim().length < 8).map((p) => p.outerHTML.slice(0, 120));
  const empty = await page.$$eval(".panel", mute);
  equal(empty, [], "panels without a sentence");
}

/** What each panel is, and how wide: heights depend on how many rows there were at that moment. */
function panels(page) {
  const told = (all) => all.map((p) => `${p.getAttribute("aria-label")} ${Math.round(p.getBoundingClientRect().width)}`);
  return page.$$eval(".panel", told);
}
