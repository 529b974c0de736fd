/* What does one event change in a snapshot? A function for each snapshot; the events carry absolute values, so order is all
 * that matters. Each says whether it changed anything. */

const SAMPLES = { fine: 900, coarse: 360 };
const JOURNAL_LENGTH = 400;

/** By the snapshot's name: what an event does to its data. Snapshots that are not here are asked for again instead. */
export const APPLY = {
  overview: (data, { type, data: tick }) => type === "tick" && Boolean(tick.ov) && assign(data, tick.ov),
  tenants: (data, { type, data: tick }) => type === "tick" && Boolean(tick.tenants) && patchTenants(data, tick.tenants),
  history: (data, { type, data: tick }) => type === "tick" && Boolean(tick.hist) && addSample(data, tick.hist),
  device: (data, { type, data: tick }) => type === "tick" && patchMap(data, tick),
  journal: (data, { type, data: news }) => type === "journal" && addEntries(data, news),
};

function assign(data, fields) {
  Object.assign(data, fields);
  return true;
}

function patchTenants(data, changed) {
  for (const tenant of data.items) if (changed[tenant.id]) merge(tenant, changed[tenant.id]);
  if (changed.displaced) data.displaced = changed.displaced;
  return true;
}

const isObject = (x) => x != null && typeof x === "object" && !Array.isArray(x);

function merge(target, fields) {
  for (const [key, value] of Object.entries(fields)) {
    if (isObject(value) && isObject(target[key])) Object.assign(target[key], value);
    else target[key] = value;
  }
}

function addSample(data, sample) {
  const last = data.ts.at(-1) ?? 0;
  const step = data.step || 1;
  if (sample.ts == null || sample.ts < last + step * 0.9) return false;
  const longest = step > 1 ? SAMPLES.coarse : SAMPLES.fine;
  for (const [key, column] of Object.entries(data)) {
    if (!Array.isArray(column)) continue;
    column.push(sample[key] ?? null);
    if (column.length > longest) column.shift();
  }
  return true;
}

function patchMap(data, tick) {
  if (tick.map) patchCells(data, tick.map, tick.ts);
  for (const tenant of data.tenants) {
    const used = tick.tenants?.[tenant.id]?.device?.used_bytes;
    if (used != null) tenant.used_bytes = used;
  }
  return Boolean(tick.map || tick.tenants);
}

function patchCells(data, { upsert = [], drop = [] }, at) {
  const changed = new Map(upsert.map((cell) => [cell.s, cell]));
  const gone = new Set([...drop, ...changed.keys()]);
  for (const tenant of data.tenants) {
    const before = sum(tenant.cells);
    tenant.cells = tenant.cells.filter((cell) => cell.s === null || !gone.has(cell.s));
    for (const cell of changed.values()) if (cell.tenant === tenant.id) tenant.cells.push({ ...cell, at });
    tenant.used_bytes = Math.max(0, tenant.used_bytes + sum(tenant.cells) - before);
  }
  addTenants(data, changed, at);
}

/** A tenant that had nothing on the device until now. */
function addTenants(data, changed, at) {
  const known = new Set(data.tenants.map((tenant) => tenant.id));
  for (const { tenant: id } of changed.values()) {
    if (known.has(id)) continue;
    known.add(id);
    const cells = [...changed.values()].filter((cell) => cell.tenant === id).map((cell) => ({ ...cell, at }));
    data.tenants.push({ id, used_bytes: sum(cells), share_bytes: null, cells });
  }
}

const sum = (cells) => cells.reduce((total, cell) => total + cell.bytes, 0);

function addEntries(data, { items = [] }) {
  const known = new Set(data.items.slice(0, items.length + 20).map((entry) => entry.id));
  const fresh = items.filter((entry) => !known.has(entry.id));
  data.items = [...fresh.sort((a, b) => b.seq - a.seq), ...data.items].slice(0, JOURNAL_LENGTH);
  return fresh.length > 0;
}
