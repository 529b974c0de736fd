// 8. Does every page still look as it did?
//
// Expects: any server; its files are the page, while its answers are those of frozen/ (made by record.mjs), at the time when
// they were given. Each page, both themes and sizes, is compared with its picture in pictures/ at half the size: few pixels
// may be of another colour, and nowhere many of them together. In one window each panel is hidden once, and that must be
// seen: so it is known that the comparison can fail. UPDATE=1 draws the pictures anew; look at them before you commit them.
// PICTURES: a folder for what was found where something differs.
import fs from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { answer, frozen } from "./frozen.mjs";
import { ROUTES, SIZES, THEMES, check, equal, expect, noFaults, open, run, server, settled, shot } from "./lib.mjs";
import { encode } from "./png.mjs";

const FOLDER = new URL("./pictures/", import.meta.url);
const UPDATE = process.env.UPDATE === "1", FOUND = process.env.PICTURES;
/** A pixel differs if one of red, green and blue is off by more than this of 255: more than smoothing and palette make. */
const OFF = 48;
/** Most of a picture's pixels that may differ, and most of any part of SQUARE by SQUARE: one missing panel is small. */
const MOST = 0.01, MOST_OF_SQUARE = 0.05, SQUARE = 40;

await run(async (browser) => {
  const recorded = frozen();
  expect(fs.existsSync("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf"), "the pictures' font is missing: fonts-dejavu-core");
  const blank = await (await browser.newContext()).newPage();
  for (const theme of THEMES) {
    for (const size of SIZES) await all(browser, { theme, size, blank, recorded });
  }
}, { FONTCONFIG_FILE: fileURLToPath(new URL("./fonts.conf", import.meta.url)) });

/** All pages in one window. */
async function all(browser, { theme, size, blank, recorded }) {
  const page = await open(browser, { theme, size, signedIn: false, route: "overview" });
  const answers = await answer(page.context(), recorded);
  await page.reload();
  for (const route of [...ROUTES, `overview?s=${recorded.drawer}`]) {
    const title = route.includes("?s=") ? "drawer" : route;
    const name = `${title}-${theme}-${size.width}x${size.height}`;
    await check(name, async () => {
      await page.goto(`${server}/admin#/${route}`);
      const seen = await halved(blank, await still(page));
      await shot(page, name);
      if (UPDATE) return keep(name, seen);
      const wanted = await kept(blank, name);
      const differing = judge(seen, wanted);
      if (FOUND && differing.complaint) fs.writeFileSync(path.join(FOUND, `${name}.png`), encode(seen));
      console.log(`      ${differing.told}`);
      expect(!differing.complaint, differing.complaint);
      if (theme === "light" && size === SIZES[0]) await misses(page, title === "drawer" ? ".drawer" : ".panel", blank, wanted);
    });
  }
  await check(`${theme} ${size.width}x${size.height}: all that it asks for was recorded`, () => equal(answers.missing, [], "missing"));
  noFaults(page);
  await page.context().close();
  answers.close();
}

/** The whole page, also what is below the window. */
function picture(page) {
  return page.screenshot({ fullPage: true });
}

/** A screenshot, once two in a row are the same. */
async function still(page) {
  await settled(page);
  await page.waitForSelector(".live:has-text('Live')");
  await page.evaluate(() => document.activeElement?.blur());
  let before = null;
  for (let n = 0; n < 20; n++) {
    const now = await picture(page);
    if (before?.equals(now)) return now;
    before = now;
    await page.waitForTimeout(100);
  }
  throw new Error("it never stands still");
}

/** The comparison can fail: it would if any one panel were not there. Each is hidden in turn, and nothing moves up. */
async function misses(page, selector, blank, wanted) {
  const panels = await page.$$(selector);
  expect(panels.length > 0, "no panel was there to hide");
  const unseen = [];
  for (const panel of panels) {
    await panel.evaluate((element) => (element.style.visibility = "hidden"));
    const { complaint } = judge(await halved(blank, await picture(page)), wanted);
    if (!complaint) unseen.push(await panel.evaluate((element) => element.getAttribute("aria-label") || element.className));
    await panel.evaluate((element) => (element.style.visibility = ""));
  }
  equal(unseen, [], "panels whose absence is not seen");
}

/** `told`: the counts; `complaint`: what is too much, if anything. */
function judge(seen, wanted) {
  if (seen.width !== wanted.width || seen.height !== wanted.height) {
    return { told: "another size", complaint: `${seen.width}×${seen.height} is not ${wanted.width}×${wanted.height}` };
  }
  const across = Math.ceil(seen.width / SQUARE), squares = new Map();
  let differ = 0;
  for (let i = 0, at = 0; at < seen.rgb.length; i += 1, at += 3) {
    const off = (n) => Math.abs(seen.rgb[at + n] - wanted.rgb[at + n]);
    if (Math.max(off(0), off(1), off(2)) <= OFF) continue;
    differ += 1;
    const square = Math.floor(i / seen.width / SQUARE) * across + Math.floor((i % seen.width) / SQUARE);
    squares.set(square, (squares.get(square) || 0) + 1);
  }
  const pixels = seen.width * seen.height, allowed = Math.floor(pixels * MOST);
  const [worst, most] = [...squares].reduce((a, b) => (b[1] > a[1] ? b : a), [0, 0]);
  const inSquare = Math.floor(SQUARE * SQUARE * MOST_OF_SQUARE);
  const where = `${(worst % across) * SQUARE * 2}, ${Math.floor(worst / across) * SQUARE * 2}`;
  const told = `${differ} of ${pixels} pixels differ, ${allowed} may; at most ${most} in one part, ${inSquare} may`;
  return { told, complaint: differ > allowed || most > inSquare ? `${told}; most of them at ${where}` : null };
}

// ---------------------------------------------------------------- pixels, by the browser

function halved(blank, png) {
  return pixels(blank, png, 2);
}

/** A PNG's pixels `{width, height, rgb}`, each the mean of `by` × `by` of them. */
async function pixels(blank, png, by) {
  const { width, height, text } = await blank.evaluate(async ([base64, n]) => {
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
    const g = new OffscreenCanvas(image.width, image.height).getContext("2d");
    g.drawImage(image, 0, 0);
    const { data } = g.getImageData(0, 0, image.width, image.height);
    const w = Math.floor(image.width / n), h = Math.floor(image.height / n);
    const rgb = new Uint8Array(w * h * 3);
    for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) for (let c = 0; c < 3; c++) {
      let sum = 0;
      for (let j = 0; j < n; j++) for (let i = 0; i < n; i++) sum += data[((y * n + j) * image.width + x * n + i) * 4 + c];
      rgb[(y * w + x) * 3 + c] = Math.round(sum / (n * n));
    }
    const pieces = [];
    for (let at = 0; at < rgb.length; at += 32_768) pieces.push(String.fromCharCode(...rgb.subarray(at, at + 32_768)));
    return { width: w, height: h, text: btoa(pieces.join("")) };
  }, [png.toString("base64"), by]);
  return { width, height, rgb: Buffer.from(text, "base64") };
}

function keep(name, seen) {
  fs.mkdirSync(FOLDER, { recursive: true });
  fs.writeFileSync(new URL(`${name}.png`, FOLDER), encode(seen));
}

function kept(blank, name) {
  const file = new URL(`${name}.png`, FOLDER);
  expect(fs.existsSync(file), `there is no picture yet; UPDATE=1 draws it`);
  return pixels(blank, fs.readFileSync(file), 1);
}
