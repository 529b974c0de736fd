/* Who uses what, who is slow and why, and does anyone harm anyone else? */
import { html, useContext, useState } from "../../vendor/preact-htm.js";
import { get } from "../api.js";
import { CHART, Chart } from "../charts.js";
import { Faults, Page, Panel, Tenant } from "../parts.js";
import { useSnapshot } from "../store.js";
import { NONE, byteHours, bytes, count, counted, ms, percent, span } from "../words.js";

/** A matrix of more tenants than this is read by nobody. */
const MATRIX_LIMIT = 12;

export const Tenants = () => html`
  <div class="grid">
    <div class="c12"><${TenantsTable} /></div>
    <${Displacement} /><${Worth} />
    <div class="c12 charts">
      ${["ttft", "occupancy", "evictions", "saved", "tokens"].map((name) => html`
        <${Chart} key=${name} chart=${CHART[name]} height=${150} />`)}
    </div>
  </div>`;

export function TenantsTable() {
  const tenants = useSnapshot("tenants");
  const [more, setMore] = useState({ items: [], next: undefined, error: "" });
  const next = more.next === undefined ? tenants.data?.next : more.next;
  const load = () =>
    get(`/tenants?after=${encodeURIComponent(next)}`)
      .then((page) => setMore((had) => ({ items: [...had.items, ...page.items], next: page.next || null, error: "" })))
      .catch((error) => setMore((had) => ({ ...had, error: error.message })));
  return html`
    <${Panel} title="Tenants" note="last 5 minutes" aside=${html`<${Legend} />`} snapshots=${[tenants]}>
      ${() => html`
        <div class="scroll" tabindex="0" role="region" aria-label="Table of tenants">
          <table class="num ten">
            <thead><tr>${COLUMNS.map(Heading)}</tr></thead>
            <tbody>
              ${[...tenants.data.items, ...more.items].map((tenant) => html`<${Row} key=${tenant.id} tenant=${tenant} />`)}
              ${!tenants.data.items.length && html`
                <tr><td colspan=${COLUMNS.length} class="muted">No tenant has had a turn on this node yet.</td></tr>`}
            </tbody>
          </table>
        </div>
        ${(next || more.error) && html`
          <div class="pad row">
            <button class="btn sm" onClick=${load}>More tenants</button><span class="muted">${more.error}</span>
          </div>`}`}
    <//>`;
}

const Heading = ([name, right]) => html`<th scope="col" class=${right ? "r" : ""}>${name}</th>`;

const COLUMNS = [
  ["Tenant"], ["Device use against floor, share and ceiling"], ["Of ceiling", 1], ["Host", 1], ["Disk", 1], ["Sessions", 1],
  ["Running", 1], ["Turns/min", 1], ["Resident / reloaded / re-encoded"], ["TTFT p95", 1], ["Evicted", 1], ["Caused", 1], ["Why slow"],
];

const Legend = () => html`
  <div class="legend">
    <span><i class="key use"></i>device bytes</span><span><i class="key over"></i>over ceiling</span>
    <span>┊ floor</span><span>┃ share</span><span><b class="k-drop">┃</b> ceiling</span>
  </div>`;

function Row({ tenant }) {
  const { scope } = useContext(Page), { device } = tenant;
  const part = device.ceiling_bytes ? device.used_bytes / device.ceiling_bytes : null;
  return html`
    <tr class=${scope === tenant.id ? "sel" : ""}>
      <td title=${tenant.name || tenant.id}><${Tenant} id=${tenant.id} /></td>
      <td><${UseBar} device=${device} /></td>
      <td class="r">${part > 1 ? html`<b class="k-drop">▲ ${percent(part)}</b>` : percent(part)}</td>
      <td class="r">${bytes(tenant.host_bytes)}</td>
      <td class="r">${bytes(tenant.disk_bytes)}</td>
      <td class="r">${count(tenant.sessions)}</td>
      <td class="r">${count(tenant.running)}</td>
      <td class="r">${rate(tenant.turns_per_min)}</td>
      <td><${Paths} paths=${tenant.paths} /></td>
      <td class="r">${ms(tenant.ttft_p95_ms)}</td>
      <td class="r">${count(tenant.evictions?.suffered)}</td>
      <td class="r">${count(tenant.evictions?.caused)}</td>
      <td class="why muted"><div class="two-lines" title=${tenant.slow_because || ""}>${tenant.slow_because || NONE}</div></td>
    </tr>`;
}

const rate = (perMinute) => (perMinute > 0 && perMinute < 10 ? perMinute.toFixed(1) : count(perMinute));

/** Bytes on the device as a bar, with the floor, the weighted share and the ceiling as marks. */
function UseBar({ device }) {
  const { used_bytes: used, share_bytes: share, floor_bytes: floor, ceiling_bytes: ceiling, pinned_bytes: pinned } = device;
  const whole = Math.max(ceiling || 0, used, share || 0, 1) * 1.03;
  const at = (b) => (b / whole) * 100 + "%";
  const inside = Math.min(used, ceiling ?? used);
  const words = `${bytes(used)} used; floor ${bytes(floor)}, share ${bytes(share)}, ceiling ${bytes(ceiling)}, ${bytes(pinned)} pinned`;
  return html`
    <div class="sbar" role="img" aria-label=${words} title=${words}>
      <i class="u" style=${{ width: at(inside) }}></i>
      ${used > inside && html`<i class="o" style=${{ left: at(inside), width: at(used - inside) }}></i>`}
      <i class="p" style=${{ width: at(pinned || 0) }}></i>
      ${floor > 0 && html`<i class="tk fl" style=${{ left: at(floor) }}></i>`}
      ${share != null && html`<i class="tk" style=${{ left: at(share) }}></i>`}
      ${ceiling != null && html`<i class="tk li" style=${{ left: at(ceiling) }}></i>`}
    </div>`;
}

function Paths({ paths }) {
  const { hot = 0, reloaded = 0, reencoded = 0 } = paths || {};
  if (!(hot + reloaded + reencoded > 0)) return html`<span class="muted">–</span>`;
  const words = `resident ${percent(hot)}, reloaded ${percent(reloaded)}, re-encoded ${percent(reencoded)}`;
  return html`
    <div class="mix" title=${words} role="img" aria-label=${words}>
      <i class="d" style=${{ width: hot * 100 + "%" }}></i><i class="sg-reload" style=${{ width: reloaded * 100 + "%" }}></i>
      <i class="sg-enc" style=${{ width: reencoded * 100 + "%" }}></i>
    </div>`;
}

function Displacement() {
  const tenants = useSnapshot("tenants"), overview = useSnapshot("overview");
  const aside = overview.data && html`<${Faults} faults=${overview.data.isolation_faults} />`;
  return html`
    <${Panel} title="Who made room for whom" note="row lost to column" size="c6" aside=${aside} snapshots=${[tenants]}>
      ${() => html`<${Matrix} displaced=${tenants.data.displaced || {}} tenants=${tenants.data.items} />`}
    <//>`;
}

function Matrix({ displaced, tenants }) {
  const pairs = Object.entries(displaced).map(([pair, n]) => [...pair.split(">"), n]);
  if (!pairs.length) return html`<p class="pad muted">Nobody had to make room for anybody.</p>`;
  const { shown, left } = busiest(pairs, tenants);
  const columns = pairs.some(([, to]) => to === "") ? [...shown, ""] : shown;
  const most = Math.max(...pairs.map(([, , n]) => n));
  return html`
    <div class="scroll" tabindex="0" role="region" aria-label="Table of who made room for whom">
      <table class="num mat">
        <thead><tr>
          <th scope="col">Lost</th>
          ${columns.map((id) => html`<th scope="col" class="r" title=${id}>${id || "pool"}</th>`)}
        </tr></thead>
        <tbody>
          ${shown.map((row) => html`
            <tr key=${row}>
              <th scope="row">${row}</th>
              ${columns.map((to) => html`<${Cell} n=${displaced[`${row}>${to}`]} most=${most} own=${row === to || !to} />`)}
            </tr>`)}
        </tbody>
      </table>
    </div>
    <div class="pad muted">
      The diagonal is a tenant making room for itself.${left ? ` Not shown: ${counted(left, "more tenant")} with fewer evictions.` : ""}
    </div>`;
}

/** The tenants that lost or caused most, in the table's order. */
function busiest(pairs, tenants) {
  const weight = new Map();
  for (const [from, to, n] of pairs) for (const id of new Set([from, to])) if (id) weight.set(id, (weight.get(id) || 0) + n);
  const most = [...weight.keys()].sort((a, b) => weight.get(b) - weight.get(a)).slice(0, MATRIX_LIMIT);
  const order = new Map(tenants.map((tenant, i) => [tenant.id, i]));
  const place = (id) => order.get(id) ?? order.size;
  return { shown: most.sort((a, b) => place(a) - place(b)), left: Math.max(0, weight.size - most.length) };
}

function Cell({ n, most, own }) {
  if (!n) return html`<td class="r"><span class="muted">·</span></td>`;
  const shade = `color-mix(in srgb, var(--${own ? "muted" : "run"}) ${Math.round(8 + (n / most) * 40)}%, transparent)`;
  return html`<td class=${"r " + (own ? "self" : "")} style=${{ background: shade }}>${count(n)}</td>`;
}

function Worth() {
  const tenants = useSnapshot("tenants");
  return html`
    <${Panel} title="What each tenant gets out of the cache" note="held in GiB·h" size="c6" snapshots=${[tenants]}>
      ${() => html`
        <div class="scroll" tabindex="0" role="region" aria-label="Table of what each tenant gets">
          <table class="num">
            <thead><tr>
              <th scope="col">Tenant</th><th scope="col" class="r">Held: device</th><th scope="col" class="r">host</th>
              <th scope="col" class="r">disk</th><th scope="col" class="r">Pinned of budget</th>
              <th scope="col" class="r">Back too soon</th><th scope="col" class="r">Time saved</th>
            </tr></thead>
            <tbody>
              ${tenants.data.items.map((tenant) => html`<${WorthRow} key=${tenant.id} tenant=${tenant} />`)}
              ${!tenants.data.items.length && html`<tr><td colspan="7" class="muted">Nothing was kept for anybody yet.</td></tr>`}
            </tbody>
          </table>
        </div>
        <div class="pad muted">Back too soon: sessions that were evicted and came back within 60 s.</div>`}
    <//>`;
}

function WorthRow({ tenant: { id, device, byte_seconds: held = {}, early, saved_device_s: saved } }) {
  return html`
    <tr>
      <td>${id}</td>
      ${["device", "host", "disk"].map((tier) => html`<td class="r">${byteHours(held[tier])}</td>`)}
      <td class="r">${bytes(device.pinned_bytes)} <span class="muted">of ${bytes(device.pin_budget_bytes)}</span></td>
      <td class="r">${early?.evicted ? html`${count(early.returned)} <span class="muted">of ${count(early.evicted)}</span>` : NONE}</td>
      <td class="r">${saved > 0 ? span(saved) : NONE}</td>
    </tr>`;
}
