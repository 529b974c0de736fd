// How does a test drive the page? Chromium without a window, signed in, with everything collected that must not happen.
//
// Read by all scripts here. From the environment:
//   REKINDLE_URL          where the server listens, such as http://127.0.0.1:8080 (required)
//   REKINDLE_ADMIN_KEY    an admin key of it (required)
//   REKINDLE_TENANT_KEY   a tenant's API key, where a script says that it needs one
//   CHROMIUM              the browser; /usr/bin/chromium if not set
//   SHOTS                 a folder for screenshots; none are kept if not set
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const AXE = fs.readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

export const ROUTES = ["overview", "tenants", "sessions", "evictions", "policy"];
export const SIZES = [{ width: 1440, height: 900 }, { width: 900, height: 700 }];
export const THEMES = ["light", "dark"];

export const server = required("REKINDLE_URL").replace(/\/+$/, "");
export const key = required("REKINDLE_ADMIN_KEY");

export function required(name) {
  const value = process.env[name];
  if (value) return value;
  console.error(`${name} is not set; see the head of lib.mjs and of the script`);
  process.exit(2);
}

// ---------------------------------------------------------------- checks

const failures = [];

/** One check: its name says what is so. A failure is told at once, and counts at the end. */
export async function check(name, body) {
  try {
    await body();
    console.log(`ok    ${name}`);
  } catch (error) {
    failures.push(name);
    console.error(`FAIL  ${name}\n      ${String(error.message || error).split("\n").join("\n      ")}`);
  }
}

export function expect(condition, message) {
  if (!condition) throw new Error(message);
}

export function equal(found, wanted, what) {
  const [a, b] = [JSON.stringify(found), JSON.stringify(wanted)];
  expect(a === b, `${what}: ${a} is not ${b}`);
}

/** Runs a script's checks; the exit status is 0 only if all of them held. `env`: more for the browser's environment. */
export async function run(body, env = {}) {
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM || "/usr/bin/chromium", headless: true, args: ["--no-sandbox", "--disable-gpu"],
    env: { ...process.env, ...env },
  });
  try {
    await body(browser);
  } catch (error) {
    failures.push("the script itself");
    console.error(error);
  }
  await browser.close();
  console.log(failures.length ? `${failures.length} not so: ${failures.join("; ")}` : "all so");
  process.exit(failures.length ? 1 : 0);
}

/** Waits until `probe()` is truthy, and says what was waited for if it never is. */
export async function until(probe, what, { ms = 5_000, every = 50 } = {}) {
  const end = performance.now() + ms;
  for (;;) {
    const found = await probe();
    if (found) return found;
    if (performance.now() > end) throw new Error(`${what}: not within ${ms} ms`);
    await new Promise((then) => setTimeout(then, every));
  }
}

// ---------------------------------------------------------------- the browser

/** A signed-in page in a context of its own; `page.faults` collects what must not happen. */
export async function open(browser, { size = SIZES[0], theme = "light", route = "overview", signedIn = true, ...more } = {}) {
  const context = await browser.newContext({ viewport: size, colorScheme: theme, reducedMotion: "reduce", ...more });
  if (signedIn) await signIn(context);
  return openIn(context, route);
}

/** Another tab of the same sign-in. */
export async function openIn(context, route = "overview") {
  const page = await context.newPage();
  page.faults = collectFaults(page);
  await page.goto(`${server}/admin#/${route}`);
  return page;
}

/** Through the same API as the form, so that each test needs not type. */
export async function signIn(context) {
  const answer = await context.request.post(`${server}/admin/api/login`, { data: { key }, headers: { origin: server } });
  expect(answer.ok(), `sign-in was refused: ${answer.status()} ${await answer.text()}`);
}

/** Console errors, violations of the content security policy, and requests that leave the origin. */
function collectFaults(page) {
  const faults = { console: [], csp: [], foreign: [], failed: [] };
  page.on("console", (message) => {
    const text = message.text();
    if (/Content Security Policy/i.test(text)) faults.csp.push(text);
    // The browser itself logs each answer of 400 and above; those are judged where they are expected.
    else if (message.type() === "error" && !/^Failed to load resource/.test(text)) faults.console.push(text);
  });
  page.on("pageerror", (error) => faults.console.push(String(error.stack || error)));
  page.on("request", (request) => {
    const url = request.url();
    if (!url.startsWith(server + "/") && !url.startsWith("data:")) faults.foreign.push(url);
  });
  page.on("response", (response) => {
    if (response.status() >= 500) faults.failed.push(`${response.status()} ${response.url()}`);
  });
  page.addInitScript(() => {
    document.addEventListener("securitypolicyviolation", (event) =>
      console.error(`Content Security Policy: ${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}`));
  });
  return faults;
}

/** `except`: kinds of faults that the script itself brought about. */
export function noFaults(page, { except = [] } = {}) {
  for (const [kind, found] of Object.entries(page.faults)) {
    if (except.includes(kind)) continue;
    expect(found.length === 0, `${kind}: ${[...new Set(found)].slice(0, 5).join("\n")}`);
  }
}

/** The page has its figures: no panel waits, and the fonts are there. */
export async function settled(page) {
  await page.waitForFunction(() => document.querySelector("main") && !document.querySelector(".skel"), null, { timeout: 15_000 });
  await page.evaluate(() => document.fonts.ready);
  await page.waitForTimeout(250);
}

export async function axe(page) {
  // Not by a script element, which the page's own policy forbids.
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  return violations.map((v) => `${v.id}: ${v.help}\n  ${v.nodes.slice(0, 4).map((n) => n.html.slice(0, 160)).join("\n  ")}`);
}

/** Elements whose text does not fit into them and is neither cut with an ellipsis nor scrolled. */
export function clipped(page) {
  return page.evaluate(() => {
    const bad = [];
    for (const el of document.querySelectorAll("main *, header *, aside *")) {
      if (el.closest("canvas, svg, .plot, .sr, select, .scroll, .feed") || !el.textContent.trim() || el.children.length) continue;
      const style = getComputedStyle(el);
      if (style.textOverflow === "ellipsis" || style.overflowX === "auto") continue;
      if (el.scrollWidth > el.clientWidth + 2 && style.display !== "inline" && style.overflowX !== "visible") bad.push(el);
    }
    const sideways = document.documentElement.scrollWidth > innerWidth + 1;
    return [...bad.slice(0, 5).map((el) => el.outerHTML.slice(0, 120)), ...(sideways ? ["the page scrolls sideways"] : [])];
  });
}

export async function shot(page, name, options = {}) {
  if (!process.env.SHOTS) return;
  fs.mkdirSync(process.env.SHOTS, { recursive: true });
  await page.screenshot({ path: path.join(process.env.SHOTS, `${name}.png`), ...options });
}

/** The part of pixels that differ clearly between two screenshots of one size, compared in the browser. */
export async function difference(page, a, b) {
  return page.evaluate(async ([first, second]) => {
    const pixels = async (base64) => {
      const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
      const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
      const g = new OffscreenCanvas(image.width, image.height).getContext("2d");
      g.drawImage(image, 0, 0);
      return g.getImageData(0, 0, image.width, image.height).data;
    };
    const [x, y] = [await pixels(first), await pixels(second)];
    if (x.length !== y.length) return 1;
    let differ = 0;
    for (let i = 0; i < x.length; i += 4) if (Math.abs(x[i] - y[i]) + Math.abs(x[i + 1] - y[i + 1]) > 48) differ += 1;
    return differ / (x.length / 4);
  }, [a.toString("base64"), b.toString("base64")]);
}

// ---------------------------------------------------------------- the API, as a script would use it

/** A GET of the admin API with the key, `{status, body, headers}`. */
export async function ask(route, { method = "GET", headers = {}, body } = {}) {
  const response = await fetch(`${server}/admin/api${route}`, {
    method, headers: { authorization: `Bearer ${key}`, ...(body ? { "content-type": "application/json" } : {}), ...headers },
    body: body ? JSON.stringify(body) : undefined,
  });
  const text = await response.text();
  return { status: response.status, headers: response.headers, text, body: parsed(text) };
}

/** The metrics page, a line for each series. */
export async function metrics() {
  const response = await fetch(`${server}/metrics`, { headers: { authorization: `Bearer ${key}` } });
  expect(response.ok, `/metrics answers ${response.status}`);
  return (await response.text()).split("\n").filter((line) => line && !line.startsWith("#"));
}

/** All series of a metric that have these labels, together. */
export function sum(lines, name, labels = "") {
  const mine = lines.filter((line) => line.startsWith(name) && /[ {]/.test(line[name.length]) && line.includes(labels));
  return mine.reduce((total, line) => total + Number(line.split(" ").pop()), 0);
}

/** All decisions of the journal that match, newest first. */
export async function wholeJournal(filter) {
  const items = [];
  let after = "";
  do {
    const { body } = await ask(`/evictions?${filter}&limit=100${after && `&after=${encodeURIComponent(after)}`}`);
    items.push(...body.items);
    after = body.next || "";
  } while (after);
  return items;
}

/** How the page itself says numbers, times and bytes. */
export function words() {
  const source = fs.readFileSync(new URL("../../src/dashboard/page/src/words.js", import.meta.url));
  return import(`data:text/javascript;base64,${source.toString("base64")}`);
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
