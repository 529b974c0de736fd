/* How is a tier drawn? Width is bytes against capacity; a treemap per tenant on the device, a strip of ages below it.
 *
 * Pure layout, then drawing on a canvas. Saturated: running; colour fades as a session cools; hatched: reloading or free. */
import { FONT, colour } from "./look.js";
import { count, percent } from "./words.js";

const LABEL_HEIGHT = 17;
const GAP = 3;
const RAMP = { device: "--hot", host: "--warm", disk: "--cold" };
const COOLING_S = [20, 60, 120, 300];

/** Boxes of cells and segments of tenants, in CSS pixels. */
export function layOut(map, width, height, scope) {
  const top = map.tier === "device" ? LABEL_HEIGHT : 0;
  const scale = map.capacity_bytes ? width / map.capacity_bytes : 0;
  const boxes = [], segments = [];
  let x = 0;
  for (const tenant of map.tenants) {
    const w = Math.min(tenant.used_bytes * scale, width - x);
    if (w >= 0.7) {
      segments.push({ tenant, x, w });
      const area = { x, y: top, w: Math.max(1, w - GAP), h: height - top };
      const placed = map.tier === "device" ? treemap(tenant.cells, area) : strip(tenant.cells, area);
      for (const box of placed) boxes.push({ ...box, tenant, dim: Boolean(scope) && scope !== tenant.id });
    }
    x += w;
  }
  return { boxes, segments, end: x, top, width, height };
}

/** One cell beside the other, youngest first. */
function strip(cells, { x, y, w, h }) {
  const total = sum(cells);
  const byAge = [...cells].sort((a, b) => a.age - b.age);
  let at = x;
  return byAge.map((cell) => {
    const width = total ? (cell.bytes / total) * w : 0;
    at += width;
    return { cell, x: at - width, y, w: width, h };
  });
}

/** A squarified treemap (Bruls, Huizing, van Wijk 2000): rows along the shorter side, as near to squares as they get. */
function treemap(cells, area) {
  const sorted = cells.filter((cell) => cell.bytes > 0).sort((a, b) => b.bytes - a.bytes);
  const total = sum(sorted);
  const scale = total ? (area.w * area.h) / total : 0;
  const boxes = [];
  let { x, y, w, h } = area;
  for (let i = 0; i < sorted.length && w > 0.5 && h > 0.5;) {
    const side = Math.min(w, h);
    const row = bestRow(sorted, i, scale, side);
    const thick = (sum(row) * scale) / side;
    let along = 0;
    for (const cell of row) {
      const long = (cell.bytes * scale) / thick;
      boxes.push(w >= h ? { cell, x, y: y + along, w: thick, h: long } : { cell, x: x + along, y, w: long, h: thick });
      along += long;
    }
    if (w >= h) [x, w] = [x + thick, w - thick];
    else [y, h] = [y + thick, h - thick];
    i += row.length;
  }
  return boxes;
}

/** As many of the next cells as make the row's worst shape better. */
function bestRow(sorted, from, scale, side) {
  const row = [];
  let area = 0, worst = Infinity;
  for (let i = from; i < sorted.length; i++) {
    const next = area + sorted[i].bytes * scale;
    const largest = (row[0] || sorted[i]).bytes * scale, smallest = sorted[i].bytes * scale;
    const shape = Math.max((side * side * largest) / (next * next), (next * next) / (side * side * smallest));
    if (row.length && shape > worst) break;
    row.push(sorted[i]);
    [area, worst] = [next, shape];
  }
  return row;
}

const sum = (cells) => cells.reduce((total, cell) => total + cell.bytes, 0);

/** How long a cell's session has been idle at `now`, in seconds. */
export function idleOf(cell, now) {
  if (cell.idle_s == null) return null;
  const since = cell.at && now ? Math.max(0, (now - cell.at) / 1000) : 0;
  return cell.st === "running" || cell.st === "reloading" ? cell.idle_s : cell.idle_s + since;
}

const cooled = (idle) => (idle == null ? COOLING_S.length : COOLING_S.filter((s) => idle >= s).length);

export function draw(canvas, map, plan, { scope, chosen, ceilings, now }) {
  const ratio = window.devicePixelRatio || 1;
  const { width, height, top } = plan;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const g = canvas.getContext("2d");
  g.scale(ratio, ratio);
  g.textBaseline = "middle";
  g.fillStyle = colour("--grid");
  g.fillRect(0, top, width, height - top);
  hatch(g, { x: plan.end, y: top, w: width - plan.end, h: height - top }, colour("--line2"), 7, 1);
  for (const box of plan.boxes) drawCell(g, map.tier, box, now);
  g.globalAlpha = 1;
  for (const segment of plan.segments) {
    if (map.tier === "device") nameAbove(g, segment, ceilings[segment.tenant.id]);
    else nameInside(g, segment, height, scope);
  }
  const box = plan.boxes[chosen];
  if (!box) return;
  g.strokeStyle = colour("--focus");
  g.lineWidth = 2.5;
  g.strokeRect(box.x + 1, box.y + 1, Math.max(3, box.w - 3), Math.max(3, box.h - 3));
}

function drawCell(g, tier, { cell, x, y, w, h, dim }, now) {
  const inner = { x, y, w: Math.max(0.6, w - 1), h: Math.max(0.6, h - 1) };
  g.globalAlpha = dim ? 0.18 : 1;
  g.fillStyle = fill(tier, cell, now);
  g.fillRect(inner.x, inner.y, inner.w, inner.h);
  if (cell.st === "reloading") drawReloading(g, inner);
  if (cell.st === "running" && inner.w > 7 && inner.h > 7) drawRunning(g, inner);
  if (cell.pin) drawPin(g, inner);
  if (tier !== "device") return;
  if (cell.s === null) drawText(g, inner, `×${count(cell.n)}`);
  else if (cell.rank && cell.rank <= 9) drawText(g, inner, String(cell.rank));
}

function fill(tier, cell, now) {
  if (cell.st === "running") return colour("--run");
  if (cell.st === "reloading") return colour("--grid");
  const age = cell.s ? cooled(idleOf(cell, now)) : Math.min(4, cell.age ?? 4);
  return colour(RAMP[tier] + age);
}

function drawReloading(g, { x, y, w, h }) {
  hatch(g, { x, y, w, h }, colour("--reload"), 5, 2);
  g.strokeStyle = colour("--reload");
  g.lineWidth = 2;
  g.strokeRect(x + 1, y + 1, Math.max(0, w - 2), Math.max(0, h - 2));
}

function drawRunning(g, { x, y, w, h }) {
  g.fillStyle = colour("--panel");
  g.beginPath();
  g.arc(x + w / 2, y + h / 2, Math.min(3, w / 4), 0, 7);
  g.fill();
}

function drawPin(g, { x, y, w, h }) {
  g.strokeStyle = g.fillStyle = colour("--text");
  g.lineWidth = 2;
  g.strokeRect(x + 1, y + 1, Math.max(0, w - 2), Math.max(0, h - 2));
  g.fillRect(x + w / 2 - 2, y + h / 2 - 4, 4, 8);
}

function drawText(g, { x, y, w, h }, text) {
  g.font = `600 10px ${FONT}`;
  if (g.measureText(text).width + 5 > w || h < 12) return;
  g.fillStyle = colour("--cell-text");
  g.textAlign = "center";
  g.fillText(text, x + w / 2, y + h / 2 + 0.5);
  g.textAlign = "left";
}

function hatch(g, { x, y, w, h }, stroke, step, thick) {
  if (w <= 0) return;
  g.save();
  g.beginPath();
  g.rect(x, y, w, h);
  g.clip();
  g.strokeStyle = stroke;
  g.lineWidth = thick;
  g.beginPath();
  for (let i = -h; i < w; i += step) {
    g.moveTo(x + i, y + h);
    g.lineTo(x + i + h, y);
  }
  g.stroke();
  g.restore();
}

/** The tenant over its cells, red and marked where it is over its ceiling, with its part of the ceiling. */
function nameAbove(g, { tenant, x, w }, ceiling) {
  if (w <= 26) return;
  const ratio = ceiling ? tenant.used_bytes / ceiling : null;
  const over = ratio > 1;
  g.font = `600 11px ${FONT}`;
  g.fillStyle = colour(over ? "--bad" : "--text");
  const name = cut(g, (over ? "▲ " : "") + tenant.id, w - 5);
  g.fillText(name, x + 1, 8);
  const used = g.measureText(name).width;
  g.font = `500 11px ${FONT}`;
  g.fillStyle = colour(over ? "--bad" : "--muted");
  const part = ratio === null ? "" : percent(ratio);
  if (part && w > used + g.measureText(part).width + 12) g.fillText(part, x + used + 7, 8);
}

function nameInside(g, { tenant, x, w }, height, scope) {
  g.globalAlpha = scope && scope !== tenant.id ? 0.35 : 1;
  g.fillStyle = colour("--text");
  g.font = `600 11px ${FONT}`;
  const name = g.measureText(tenant.id).width;
  if (name + 12 < w) {
    g.fillText(tenant.id, x + 6, height / 2 + 0.5);
    g.font = `500 11px ${FONT}`;
    const sessions = count(tenant.cells.reduce((n, cell) => n + cell.n, 0));
    if (name + g.measureText(sessions).width + 22 < w) g.fillText(sessions, x + name + 12, height / 2 + 0.5);
  }
  g.globalAlpha = 1;
}

function cut(g, text, width) {
  if (g.measureText(text).width <= width) return text;
  let short = text;
  while (short.length > 2 && g.measureText(short + "…").width > width) short = short.slice(0, -1);
  return short + "…";
}
