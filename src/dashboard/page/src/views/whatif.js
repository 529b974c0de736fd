/* What if the policy or the memory were another? The server replays the recorded turns, which takes it some seconds. */
import { html, useContext, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { post } from "../api.js";
import { Bar, Failure, Page, Panel } from "../parts.js";
import { useSnapshot } from "../store.js";
import { NONE, POLICY, brief, bytes, clock, count, counted, ms, percent } from "../words.js";

const SIZES = [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4];
const LENGTHS = [1024, 2048, 4096, 8192, 16_384, 32_768];
const TIERS = [["device", "Device memory"], ["host", "Host memory"], ["disk", "Disk"]];
const AS_IT_IS = { policy: "", weight: "", device: "1", host: "1", disk: "1" };

export function WhatIf() {
  const policy = useSnapshot("policy");
  return html`
    <${Panel} title="What if" note="the last recorded hour, replayed" snapshots=${[policy]}>
      ${() => html`<${Replay} active=${policy.data.active} config=${policy.data.config} tenants=${policy.data.tenants || []} />`}
    <//>`;
}

function Replay({ active, config, tenants }) {
  const { ask, connected } = useContext(Page);
  const [choice, setChoice] = useState(AS_IT_IS);
  const [bounds, setBounds] = useState({});
  const run = useReplay();
  const set = (field) => (event) => setChoice((had) => ({ ...had, [field]: event.target.value }));
  const chosen = { ...settings(choice, active), tenants: boundsOf(bounds) };
  return html`
    <form class="pad" onSubmit=${(event) => {
      event.preventDefault();
      run.start(chosen);
    }}>
      <${Choice} label="Policy" value=${choice.policy} onChange=${set("policy")}>
        <option value="">as it is: ${POLICY[active.policy] || active.policy}</option>
        ${Object.entries(POLICY).map(([name, word]) => html`<option value=${name}>${word}</option>`)}
      <//>
      ${TIERS.filter(([tier]) => active[tier + "_bytes"] > 0).map(([tier, label]) => html`
        <${Choice} label=${label} value=${choice[tier]} onChange=${set(tier)}>
          ${SIZES.map((size) => html`
            <option value=${String(size)}>
              ${size === 1 ? "as it is" : size + "×"}: ${bytes(active[tier + "_bytes"] * size)}
            </option>`)}
        <//>`)}
      <${Choice} label="Weight of length" value=${choice.weight} onChange=${set("weight")}>
        <option value="">
          as it is: ${active.eviction_doubles_at ? `doubles at ${counted(active.eviction_doubles_at, "token")}` : "off"}
        </option>
        <option value="0">off</option>
        ${LENGTHS.map((n) => html`<option value=${String(n)}>doubles at ${count(n)} tokens</option>`)}
      <//>
      ${tenants.length > 0 && html`<${Bounds} tenants=${tenants} bounds=${bounds} set=${setBounds} />`}
      <div class="row run">
        <button class="btn pri sm" disabled=${run.busy || !connected()}>Replay</button>
        ${run.busy && html`<button type="button" class="btn sm" onClick=${run.cancel}>Cancel</button>`}
        <${Progress} run=${run} />
        <span class="grow"></span>
        <button type="button" class="btn sm" onClick=${() => ask({ kind: "config", text: asConfig(config, chosen) })}>
          Copy as config
        </button>
      </div>
    </form>
    ${run.error && html`<${Outcome} error=${run.error} retry=${() => run.start(chosen)} />`}
    ${run.result && html`<${Comparison} result=${run.result} />`}`;
}

const Choice = ({ label, value, onChange, children }) => html`
  <label class="choice"><span>${label}</span><select value=${value} onChange=${onChange}>${children}</select></label>`;

/** The body of the request; null is "as it ran". */
function settings(choice, active) {
  const size = (tier) => (choice[tier] === "1" || !active[tier + "_bytes"] ? null : Math.round(active[tier + "_bytes"] * choice[tier]));
  return {
    policy: choice.policy || active.policy, eviction_doubles_at: choice.weight === "" ? null : Number(choice.weight),
    device_bytes: size("device"), host_bytes: size("host"), disk_bytes: size("disk"),
  };
}

const MOST_TENANTS = 12, MIB = 2 ** 20;
const ENDS = ["floor", "ceiling"];

/** What tenants of the device pool would be guaranteed, and where they would stop; what is left empty is as it is. */
function Bounds({ tenants, bounds, set }) {
  const shown = [...tenants].sort((a, b) => b.used_bytes - a.used_bytes).slice(0, MOST_TENANTS);
  const field = (tenant, end) => html`
    <input type="number" min="0" step="any" aria-label=${`${end} of ${tenant.id}, MiB`}
      placeholder=${inMib(tenant[end + "_bytes"])} value=${bounds[tenant.id]?.[end] ?? ""}
      onInput=${({ target }) => set((had) => ({ ...had, [tenant.id]: { ...had[tenant.id], [end]: target.value } }))} />`;
  return html`
    <div class="bounds">
      <table class="num">
        <thead><tr><th scope="col">Tenant</th>${ENDS.map((end) => html`<th scope="col">${end}, MiB</th>`)}</tr></thead>
        <tbody>${shown.map((tenant) => html`
          <tr key=${tenant.id}>
            <td class="ell" title=${tenant.id}>${tenant.id}</td>${ENDS.map((end) => html`<td>${field(tenant, end)}</td>`)}
          </tr>`)}</tbody>
      </table>
    </div>`;
}

const inMib = (b) => (b == null ? "none" : String(Number((b / MIB).toPrecision(4))));

/** `{tenant: {floor, ceiling}}` in bytes, of what was typed; null if nothing was. */
function boundsOf(bounds) {
  const typed = Object.entries(bounds).flatMap(([id, ends]) => {
    const set = Object.entries(ends).filter(([, mib]) => mib !== "").map(([end, mib]) => [end, Math.round(Number(mib) * MIB)]);
    return set.length ? [[id, Object.fromEntries(set)]] : [];
  });
  return typed.length ? Object.fromEntries(typed) : null;
}

/** The [kv] settings in force, with those that were chosen put in their places. */
function asConfig(config, chosen) {
  const named = { eviction_policy: `"${chosen.policy}"`, eviction_doubles_at: chosen.eviction_doubles_at };
  for (const [tier] of TIERS) named[tier + "_bytes"] = chosen[tier + "_bytes"] === null ? null : `"${chosen[tier + "_bytes"]}"`;
  let text = config || "[kv]\n";
  for (const [key, value] of Object.entries(named)) {
    if (value === null) continue;
    const line = new RegExp(`^${key}\\s*=.*$`, "m");
    text = line.test(text) ? text.replace(line, `${key} = ${value}`) : `${text.trimEnd()}\n${key} = ${value}\n`;
  }
  return text + tenantsFile(chosen.tenants);
}

/** Floors and ceilings are not in that file. */
function tenantsFile(tenants) {
  if (!tenants) return "";
  const lines = Object.entries(tenants).map(([id, ends]) =>
    [`[[tenant]]`, `id = "${id}"`, ...Object.entries(ends).map(([end, size]) => `${end} = { device = "${size}" }`)].join("\n"));
  return `\n# In the tenants file, beside what it says of each:\n${lines.join("\n")}\n`;
}

function useReplay() {
  const [run, setRun] = useState({ busy: false, since: 0, result: null, error: null });
  const request = useRef(null);
  useEffect(() => () => request.current?.abort(), []);
  const start = async (body) => {
    request.current?.abort();
    const mine = (request.current = new AbortController());
    setRun((had) => ({ ...had, busy: true, since: Date.now(), error: null }));
    try {
      const result = await post("/policy/replay", body, mine.signal);
      setRun({ busy: false, since: 0, result, error: null });
    } catch (error) {
      if (error.name !== "AbortError") setRun({ busy: false, since: 0, result: null, error });
      else if (request.current === mine) setRun((had) => ({ ...had, busy: false }));
    }
  };
  return { ...run, start, cancel: () => request.current?.abort() };
}

function Progress({ run }) {
  const [, beat] = useState(0);
  useEffect(() => {
    if (!run.busy) return undefined;
    const timer = setInterval(() => beat((n) => n + 1), 1000);
    return () => clearInterval(timer);
  }, [run.busy]);
  const seconds = run.busy ? Math.floor((Date.now() - run.since) / 1000) : 0;
  return html`<span class="muted num" role="status">${run.busy ? `replaying, ${seconds} s` : ""}</span>`;
}

/** Refusals that are part of the day are told as they are; others as failures. */
function Outcome({ error, retry }) {
  if (!["replay_running", "nothing_recorded"].includes(error.code)) return html`<${Failure} snapshot=${{ error, retry }} />`;
  return html`<p class="pad muted" role="status">${error.message}</p>`;
}

const short = (x) => (x >= 100_000 ? brief(x) : count(x));

/** name, value, its format, and whether more of it is better (1), worse (-1) or neither (0) */
const MEASURES = [
  ["TTFT p50, foretold", (o) => o.ttft?.p50_ms, ms, -1],
  ["TTFT p95, foretold", (o) => o.ttft?.p95_ms, ms, -1],
  ["Turns", (o) => o.turns, short, 0],
  ["Reusable tokens", (o) => o.reusable_tokens, short, 0],
  ["Encoded again", (o) => o.reencoded_tokens, short, -1],
  ["Found of reusable", (o) => o.cached_ratio, (x) => percent(x, 1), 1],
  ["Found on device", (o) => o.hits?.device, short, 1],
  ["Found in host", (o) => o.hits?.host, short, 0],
  ["Found on disk", (o) => o.hits?.disk, short, 0],
  ["Evictions", (o) => o.evictions, short, -1],
  ["Bytes moved", (o) => o.bytes_moved, bytes, -1],
];

function Comparison({ result: { window, base, sim, by_tenant: tenants, assumptions } }) {
  return html`
    <table class="num replayed">
      <thead><tr>
        <th scope="col">Measure</th><th scope="col" class="r">${baseName(base)}</th><th scope="col" class="r">What if</th>
        <th scope="col" class="r">Change</th>
      </tr></thead>
      <tbody>${MEASURES.map(([name, of, format, good]) => html`
        <tr><td>${name}</td><td class="r">${format(of(base))}</td><td class="r"><b>${format(of(sim))}</b></td>
          <${Change} from=${of(base)} to=${of(sim)} good=${good} /></tr>`)}</tbody>
    </table>
    <${TimesCompared} tenants=${tenants || []} base=${base} />
    <${TenantsCompared} tenants=${tenants || []} />
    <p class="pad muted">
      ${counted(window.turns, "turn")} from ${clock(window.from)} to ${clock(window.to)} UTC,${" "}
      ${window.trace}.${" "}
      ${base.measured && html`Measured then, with all waiting: <b>${ms(base.measured.p50_ms)}</b> at the median,
        ${" "}<b>${ms(base.measured.p95_ms)}</b> at p95, of ${counted(base.measured.turns, "turn")}. `}
      ${assumptions}
    </p>`;
}

/** Where the record can't be replayed as it was, both sides are a what-if. */
const baseName = (base) => (base.replayed === "what_if" ? "These settings" : "As it ran");

function TimesCompared({ tenants, base }) {
  if (!tenants.length) return null;
  return html`
    <h3 class="pad">TTFT p95 foretold, by tenant</h3>
    <table class="num replayed">
      <thead><tr>
        <th scope="col">Tenant</th><th scope="col" class="r">${baseName(base)}</th><th scope="col" class="r">What if</th>
        <th scope="col" class="r">Change</th>
      </tr></thead>
      <tbody>${tenants.map((tenant) => html`
        <tr key=${tenant.id} title=${timesTitle(tenant)}>
          <td class="ell">${tenant.id}</td><td class="r">${ms(tenant.base_ms)}</td><td class="r"><b>${ms(tenant.sim_ms)}</b></td>
          <${Change} from=${tenant.base_ms} to=${tenant.sim_ms} good=${-1} />
        </tr>`)}</tbody>
    </table>`;
}

const timesTitle = ({ turns, measured_ms: measured }) =>
  `${counted(turns, "turn")}${measured == null ? "" : `; measured then, with all waiting: ${ms(measured)}`}`;

/** `good`: 1 where more is better, -1 where less is, 0 where neither is. */
function Change({ from, to, good }) {
  if (from == null || to == null) return html`<td class="r muted">${NONE}</td>`;
  const change = from === 0 ? (to === 0 ? 0 : null) : (to - from) / Math.abs(from);
  if (change === null) return html`<td class="r muted">from 0</td>`;
  if (Math.abs(change) < 0.005) return html`<td class="r muted">same</td>`;
  const size = `${change > 0 ? "+" : "−"}${Math.abs(change * 100).toFixed(0)} %`;
  if (!good) return html`<td class="r muted">${size}</td>`;
  const better = change * good > 0;
  return html`<td class=${"r delta " + (better ? "good" : "worse")}>${size} ${better ? "better" : "worse"}</td>`;
}

function TenantsCompared({ tenants }) {
  if (!tenants.length) return null;
  const most = Math.max(...tenants.flatMap((t) => [t.base_reencoded_tokens || 0, t.sim_reencoded_tokens || 0]), 1);
  return html`
    <h3 class="pad">Tokens encoded again, by tenant</h3>
    <div class="pad cmp by-tenant num">
      ${tenants.map(({ id, base_reencoded_tokens: base, sim_reencoded_tokens: sim }) => html`
        <span class="ell">${id}</span>
        <${Bar} ratio=${(sim || 0) / most} mark=${base == null ? null : base / most} />
        <span class="r">${short(base)} → <b>${short(sim)}</b></span>`)}
    </div>`;
}
