// 3. Does the page act, take back, ask before what can't be undone, and pass on refusals?
//
// Expects: two or more idle sessions on the device, a host tier that has room, and a pin budget too small for the largest of
// them all to be pinned (KV pins capped low). No load is needed. REKINDLE_READONLY_URL: a second server with the same admin
// key and `[admin] read_only = true`; without it, those checks are skipped, and that is said.
import { ask, axe, check, equal, expect, key, noFaults, open, run, server, settled, shot, until } from "./lib.mjs";

await run(async (browser) => {
  const page = await open(browser, { route: "sessions?state=hot&sort=-device" });
  await settled(page);
  const rows = await page.$$eval("tr[data-row] .lnk.mono", (all) => all.map((el) => el.title));
  expect(rows.length >= 2, `two idle sessions on the device are needed, there are ${rows.length}`);

  await check("evict changes the row within a second, and undo brings it back", async () => {
    const id = rows[0];
    await rowButton(page, id, "Evict").click();
    await until(async () => !(await rowText(page, id)).includes("Hot"), "the row changes", { ms: 1_000 });
    const { body: gone } = await ask(`/sessions/${id}`);
    equal(gone.bytes.device, 0, "bytes on the device");
    await shot(page, "actions-evicted");
    await page.click(".toast button:has-text('Undo')");
    await until(async () => (await ask(`/sessions/${id}`)).body.bytes.device > 0, "it is back on the device", { ms: 10_000 });
    await until(async () => /Hot|Reloading|Running/.test(await rowText(page, id)), "the row says so", { ms: 3_000 });
  });

  await check("an action is a journal entry with its actor", async () => {
    const { body } = await ask(`/evictions?session=${rows[0]}&limit=20`);
    const entry = body.items.find((item) => item.rule === "operator" && item.actor);
    expect(entry, "no entry of the journal names an operator");
  });

  await check("pin and unpin change the row, and undo of pin unpins", async () => {
    const id = rows[1];
    await page.click(`tr:has([title="${id}"]) [aria-label="Pin ${id}"]`);
    await until(async () => (await rowText(page, id)).includes("pinned"), "the row says pinned", { ms: 1_000 });
    await page.click(".toast:last-child button:has-text('Undo')");
    await until(async () => !(await ask(`/sessions/${id}`)).body.pinned, "it is unpinned", { ms: 2_000 });
  });

  await check("for how long to pin is chosen by keyboard", async () => {
    const id = rows[1];
    await page.focus(`[aria-label="How long to pin ${id}"]`);
    await page.keyboard.press("Enter");
    await page.waitForSelector(".menu:popover-open [role=menuitem]:focus");
    equal(await axe(page), [], "axe");
    await page.keyboard.press("Escape");
    await until(async () => !(await page.$(".menu")), "Esc closes the menu", { ms: 1_000 });
    await page.keyboard.press("Enter");
    await page.waitForSelector(".menu:popover-open [role=menuitem]:focus");
    await page.keyboard.press("ArrowDown");
    await page.keyboard.press("ArrowDown");
    const asked = page.waitForRequest((request) => request.url().endsWith(`/sessions/${id}/pin`));
    await page.keyboard.press("Enter");
    equal((await asked).postDataJSON().ttl_seconds, 8 * 3600, "seconds asked for");
    await until(async () => (await rowText(page, id)).includes("pinned"), "the row says pinned", { ms: 1_000 });
    await ask(`/sessions/${id}/unpin`, { method: "POST", body: {} });
    await until(async () => !(await rowText(page, id)).includes("pinned"), "the row says that it is not", { ms: 3_000 });
  });

  await check("a pin over the budget is refused with the server's sentence", async () => {
    const pinned = [];
    let refusal = null;
    for (const id of rows) {
      const { status, body } = await ask(`/sessions/${id}/pin`, { method: "POST", body: {} });
      if (status === 200) pinned.push(id);
      else { refusal = { id, message: body.error.message }; break; }
    }
    expect(refusal, `all ${rows.length} sessions could be pinned: the budget is too large for this check`);
    const button = page.locator(`[aria-label="Pin ${refusal.id}"]`);
    await button.click();
    await page.waitForSelector(".toast");
    const said = () => page.textContent(".toasts");
    await until(async () => (await said()).includes(refusal.message.slice(0, 30)), "the sentence", { ms: 2_000 }).catch(async (error) => {
      throw new Error(`${error.message}; it says: ${await said()}`);
    });
    for (const id of pinned) await ask(`/sessions/${id}/unpin`, { method: "POST", body: {} });
  });

  await check("drop needs the last four characters, and says what the next turn costs", async () => {
    const id = rows.at(-1);
    await page.goto(`${server}/admin#/sessions?s=${id}`);
    await page.click(".drawer button:has-text('Drop KV')");
    const dialog = page.locator("dialog[open]");
    expect((await dialog.textContent()).includes("cannot be undone"), "the dialog does not say so");
    const drop = dialog.locator("button:has-text('Drop KV')");
    await dialog.locator("input").fill("zzzz");
    expect(await drop.isDisabled(), "it may be dropped with the wrong characters");
    await dialog.locator("input").fill(id.slice(-4));
    await shot(page, "actions-drop");
    await drop.click();
    await until(async () => (await ask(`/sessions/${id}`)).body.state === "none", "it has no KV left", { ms: 3_000 });
    equal(await page.locator(".toast:last-child button").count(), 0, "undo of a drop");
  });

  await check("what changed since it was read is not acted on", async () => {
    const { status, body } = await ask(`/sessions/${rows[0]}/evict`, { method: "POST", body: { if_seq: 0 } });
    equal([status, body.error.code], [409, "session_changed"], "an action on an old sight of it");
  });

  await check("keys walk the table and open the drawer", async () => {
    await page.goto(`${server}/admin#/sessions`);
    await settled(page);
    await page.keyboard.press("j");
    await page.keyboard.press("j");
    await page.keyboard.press("Enter");
    await page.waitForSelector(".drawer");
    const opened = await page.$eval("#drawer-title", (el) => el.title);
    equal(opened, await page.$eval("tr.cur .lnk.mono", (el) => el.title), "the session that the keys opened");
    await page.keyboard.press("Escape");
    await until(async () => !(await page.$(".drawer")), "Esc closes it", { ms: 1_000 });
    await page.keyboard.press("5");
    await page.waitForSelector("[aria-current=page]:has-text('Policy')");
    await page.keyboard.press("/");
    await until(() => page.evaluate(() => document.activeElement?.id === "find"), "/ goes to the search", { ms: 1_000 });
  });

  noFaults(page);
  await readOnly(browser);
});

function rowButton(page, id, word) {
  return page.locator(`tr:has([title="${id}"]) button:has-text("${word}")`);
}

async function rowText(page, id) {
  return (await page.locator(`tr:has([title="${id}"])`).first().textContent()) || "";
}

async function readOnly(browser) {
  const url = process.env.REKINDLE_READONLY_URL?.replace(/\/+$/, "");
  if (!url) return console.log("skip  read-only: REKINDLE_READONLY_URL is not set");
  await check("read-only: actions are hidden, and refused", async () => {
    const context = await browser.newContext();
    await context.request.post(`${url}/admin/api/login`, { data: { key }, headers: { origin: url } });
    const page = await context.newPage();
    await page.goto(`${url}/admin#/sessions`);
    await page.waitForSelector("tr[data-row]");
    equal(await page.locator("tr[data-row] button:has-text('Evict'), [aria-label^='Pin ']").count(), 0, "buttons");
    const id = await page.$eval("tr[data-row] .lnk.mono", (el) => el.title);
    const refused = await fetch(`${url}/admin/api/sessions/${id}/pin`, {
      method: "POST", headers: { authorization: `Bearer ${key}`, "content-type": "application/json" }, body: "{}",
    });
    equal(refused.status, 403, "a pin by script");
    await context.close();
  });
}
