/* How does the page say numbers, times, states and rules? Pure functions and tables; no data is a dash, never 0 or NaN. */

export const NONE = "–";

const KIB = 1024, MIB = 1024 * KIB, GIB = 1024 * MIB, TIB = 1024 * GIB;
const plain = new Intl.NumberFormat("en");
const known = (x) => x != null && !Number.isNaN(x);

export const count = (x) => (known(x) ? plain.format(Math.round(x)) : NONE);

/** So many of something, as a sentence says it: 1 turn, 12 turns, – turns. */
export const counted = (n, one, many = one + "s") => `${count(n)} ${noun(n, one, many)}`;

/** The word beside a number that stands by itself. */
export const noun = (n, one, many = one + "s") => (known(n) && Math.round(n) === 1 ? one : many);

export function bytes(b) {
  if (!known(b)) return NONE;
  if (b === 0) return "0 B";
  if (b >= 0.95 * TIB) return (b / TIB).toFixed(2) + " TiB";
  if (b >= 9.95 * GIB) return (b / GIB).toFixed(0) + " GiB";
  if (b >= 0.95 * GIB) return (b / GIB).toFixed(1) + " GiB";
  if (b >= 9.95 * MIB) return (b / MIB).toFixed(0) + " MiB";
  if (b >= 0.95 * MIB) return (b / MIB).toFixed(1) + " MiB";
  return b >= KIB ? (b / KIB).toFixed(0) + " KiB" : Math.round(b) + " B";
}

/** What an axis has room for: 1.5k, 20M, 3G. */
export function brief(x) {
  const [size, unit] = [[1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([s]) => Math.abs(x) >= s) || [1, ""];
  return String(Number((x / size).toPrecision(3))) + unit;
}

/** Bytes that were held for a while: GiB·h. */
export function byteHours(byteSeconds) {
  if (!known(byteSeconds)) return NONE;
  const gibHours = byteSeconds / GIB / 3600;
  return gibHours >= 100 ? count(gibHours) : gibHours.toFixed(gibHours >= 1 ? 1 : 3);
}

export function ms(x) {
  if (!known(x)) return NONE;
  if (x === 0) return "0 ms";
  if (x < 10) return x.toFixed(1) + " ms";
  if (x < 1000) return Math.round(x) + " ms";
  return (x / 1000).toFixed(x < 10_000 ? 2 : 1) + " s";
}

const two = (x) => String(Math.floor(x)).padStart(2, "0");

/** How long, in its two largest units. */
export function span(s) {
  if (!known(s)) return NONE;
  if (s < 1) return "now";
  if (s < 59.5) return Math.round(s) + " s";
  if (s < 3600) return Math.floor(s / 60) + " m " + two(s % 60) + " s";
  if (s < 172_800) return Math.floor(s / 3600) + " h " + two((s % 3600) / 60) + " m";
  return Math.floor(s / 86_400) + " d";
}

/** The time of day in UTC, with seconds. */
export const clock = (epochMs) => (known(epochMs) ? new Date(epochMs).toISOString().slice(11, 19) : NONE);
export const minute = (epochMs) => clock(epochMs).slice(0, 5);

export const percent = (ratio, digits = 0) => (known(ratio) ? (ratio * 100).toFixed(digits) + " %" : NONE);

/** conv_ + 32 hex digits as conv_ + 8: enough to tell them apart in a table; the whole id is in titles and copies. */
export const shortId = (id) => (id || "").replace(/^([a-z]+_[0-9a-f]{8})[0-9a-f]{8,}$/, "$1");

export const STATE = {
  running: "Running", reloading: "Reloading", hot: "Hot", warm: "Warm", cold: "Cold", none: "History only", pinned: "Pinned",
};

export const WHEREABOUTS = {
  running: "generating now, on the device", reloading: "coming back to the device", hot: "idle on the device",
  warm: "in host memory", cold: "on disk", none: "no KV kept; the next turn re-encodes",
};

export const TIER = { device: "Device", host: "Host memory", disk: "Disk" };

export const PATH = { hot: "resident", reloaded: "reloaded", reencoded: "re-encoded", fresh: "first turn" };

export const PLAN = { resident: "resident", reload: "reload", split: "split", reencode: "re-encode" };

export const KIND = {
  evict: "Evicted", offload: "Offloaded", reload: "Reloaded", reencode: "Re-encoded", drop: "Dropped", refuse: "Made wait",
  preempt: "Set back", mismatch: "Mismatch", bad_slot: "Bad slot", action: "By hand",
};

const RULE = {
  over_ceiling: "over its ceiling", ended: "ended", return_rate: "least likely to return", lru: "silent the longest",
  preempted: "set back for a turn", requested: "asked for by a client", operator: "by an operator", reload: "reload was cheaper",
  split: "encode front, load back", reencode: "encoding was cheaper", at_ceiling: "tenant at its ceiling",
  no_victim: "nothing to evict", checksum: "checksum mismatch",
};

export const POLICY = { return_rate: "return rate", lru: "least recently used" };

/** The rule of an entry or a victim, also one that this page does not know yet. */
export const ruleName = (rule) => RULE[rule] || (rule || "").replaceAll("_", " ");
export const kindName = (kind) => KIND[kind] || (kind || "").replaceAll("_", " ");

/** Where a conversation has bytes: "device + host". */
export function copies(held) {
  return ["device", "host", "disk"].filter((tier) => held[tier] > 0).join(" + ") || "nowhere";
}
