// How is a small picture of few colours kept? As a PNG with a palette, written by node alone.
import zlib from "node:zlib";

const MOST_COLOURS = 256, BY_FREQUENCY = 160;

/** A PNG of pixels `[r, g, b, …]` by a palette, each pixel as the nearest of its colours. */
export function encode({ width, height, rgb }) {
  const palette = paletteOf(rgb);
  const nearest = new Map();
  const place = (r, g, b) => {
    const key = (r << 16) | (g << 8) | b;
    if (!nearest.has(key)) nearest.set(key, closest(palette, r, g, b));
    return nearest.get(key);
  };
  const lines = Buffer.alloc((width + 1) * height);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at += 3) lines[y * (width + 1) + 1 + x] = place(rgb[at], rgb[at + 1], rgb[at + 2]);
  }
  const head = Buffer.alloc(13);
  head.writeUInt32BE(width, 0);
  head.writeUInt32BE(height, 4);
  // 8 bits a pixel, by palette.
  head.set([8, 3], 8);
  const chunks = [["IHDR", head], ["PLTE", Buffer.from(palette.flat())], ["IDAT", zlib.deflateSync(lines, { level: 9 })], ["IEND"]];
  return Buffer.concat([Buffer.from("\x89PNG\r\n\x1a\n", "latin1"), ...chunks.map(([name, data]) => chunk(name, data))]);
}

/** The most frequent colours, then those that are the farthest from all of these: no pixel is far from its own. */
function paletteOf(rgb) {
  const colours = byFrequency(rgb), palette = colours.slice(0, BY_FREQUENCY), rest = colours.slice(BY_FREQUENCY);
  const far = rest.map((colour) => Math.min(...palette.map((other) => apart(colour, other))));
  while (palette.length < MOST_COLOURS && palette.length < colours.length) {
    const next = far.indexOf(Math.max(...far));
    palette.push(rest[next]);
    rest.forEach((colour, i) => (far[i] = Math.min(far[i], apart(colour, rest[next]))));
  }
  return palette;
}

const apart = ([r, g, b], [x, y, z]) => (x - r) ** 2 + (y - g) ** 2 + (z - b) ** 2;

/** Colours that are nearly the same count as one. */
function byFrequency(rgb) {
  const counts = new Map();
  for (let i = 0; i < rgb.length; i += 3) {
    const key = ((rgb[i] >> 2) << 12) | ((rgb[i + 1] >> 2) << 6) | (rgb[i + 2] >> 2);
    const found = counts.get(key);
    if (found) found.n += 1;
    else counts.set(key, { n: 1, colour: [rgb[i], rgb[i + 1], rgb[i + 2]] });
  }
  return [...counts.values()].sort((a, b) => b.n - a.n).map(({ colour }) => colour);
}

function closest(palette, r, g, b) {
  let best = 0, least = Infinity;
  palette.forEach((colour, i) => {
    const far = apart(colour, [r, g, b]);
    if (far < least) [best, least] = [i, far];
  });
  return best;
}

function chunk(name, data = Buffer.alloc(0)) {
  const body = Buffer.concat([Buffer.from(name, "latin1"), data]);
  const frame = Buffer.alloc(8);
  frame.writeUInt32BE(data.length, 0);
  frame.writeUInt32BE(crc32(body), 4);
  return Buffer.concat([frame.subarray(0, 4), body, frame.subarray(4)]);
}

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return (crc ^ 0xffffffff) >>> 0;
}
