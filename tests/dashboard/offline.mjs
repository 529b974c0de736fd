// 7. Is the page small, and does it need nobody else?
//
// Expects: any server with a session or more. What it asks for on all pages is counted gzipped, against LIMIT_KB (150).
import { gzipSync } from "node:zlib";
import { ROUTES, ask, check, equal, expect, noFaults, open, run, server, settled } from "./lib.mjs";

const LIMIT_KB = Number(process.env.LIMIT_KB || 150);

await run(async (browser) => {
  const assets = new Set();
  const page = await open(browser, { route: "overview" });
  page.on("request", (request) => {
    const [url] = request.url().split("#");
    if (url.startsWith(`${server}/admin`) && !url.startsWith(`${server}/admin/api`)) assets.add(url);
  });
  await page.reload();
  const { body } = await ask("/sessions?limit=1");
  for (const route of [...ROUTES, `overview?s=${body.items[0]?.id}`]) {
    await page.goto(`${server}/admin#/${route}`);
    await settled(page);
  }

  await check("nothing is asked for elsewhere", () => equal(page.faults.foreign, [], "foreign requests"));
  await check(`the page is under ${LIMIT_KB} KB gzipped`, async () => {
    const sizes = await Promise.all([...assets].map(async (url) => {
      const bytes = Buffer.from(await (await fetch(url)).arrayBuffer());
      return [url.replace(server, ""), gzipSync(bytes, { level: 9 }).length];
    }));
    const total = sizes.reduce((sum, [, size]) => sum + size, 0) / 1000;
    console.log(`      ${total.toFixed(1)} KB in ${sizes.length} files`);
    expect(sizes.length > 10, `only ${sizes.length} files were seen`);
    expect(total < LIMIT_KB, `${total.toFixed(1)} KB: ${JSON.stringify(sizes.sort((a, b) => b[1] - a[1]).slice(0, 5))}`);
  });
  await check("what does not change is not sent again", async () => {
    const style = [...assets].find((url) => url.endsWith("/style.css"));
    const first = await fetch(style);
    const tag = first.headers.get("etag");
    if (!tag) return expect(/immutable|max-age/.test(first.headers.get("cache-control") || ""), "neither an ETag nor a lifetime");
    const again = await fetch(style, { headers: { "if-none-match": tag } });
    return equal(again.status, 304, "asked again with its ETag");
  });
  await check("no page breaks", () => noFaults(page));
});
