/* What is around every page? The header with scope, range and liveness; banners; what is shown before there is data. */
import { html, useContext, useEffect, useState } from "../vendor/preact-htm.js";
import { ICON } from "./icons.js";
import { Faults, Page } from "./parts.js";
import { leave, serverNow, togglePause, tryNow, useFact, useSnapshot } from "./store.js";
import { clock, count, span } from "./words.js";

export const PAGES = [
  ["overview", "Overview"], ["tenants", "Tenants"], ["sessions", "Sessions"], ["evictions", "Evictions"], ["policy", "Policy"],
];

const RANGES = [[300, "5 min"], [600, "10 min"], [900, "15 min"], [3600, "1 hour"]];

export function Header({ link, route, theme, setTheme }) {
  const { range, setRange } = useContext(Page);
  const overview = useSnapshot("overview");
  return html`
    <header class="top">
      <span class="logo">${ICON.flame}<span>rekindle</span></span>
      <${Tabs} route=${route} />
      <div class="facts num">
        ${overview.data && html`<${Node} overview=${overview.data} readOnly=${link.me?.read_only} />`}
        <${Scope} />
        <select class="opt2" aria-label="Time range" value=${String(range)} onChange=${(e) => setRange(Number(e.target.value))}>
          ${RANGES.map(([seconds, word]) => html`<option value=${String(seconds)}>${word}</option>`)}
        </select>
        <${Liveness} link=${link} />
        <${Tools} theme=${theme} setTheme=${setTheme} />
      </div>
    </header>`;
}

/** Links that keep the tenant and the range. */
function Tabs({ route }) {
  const { args } = useContext(Page);
  const kept = new URLSearchParams(Object.entries({ tenant: args.tenant, range: args.range }).filter(([, v]) => v)).toString();
  return html`
    <nav class="tabs" aria-label="Pages">
      ${PAGES.map(([name, word]) => html`
        <a href=${`#/${name}${kept ? "?" + kept : ""}`} aria-current=${route === name ? "page" : undefined}>${word}</a>`)}
    </nav>`;
}

const Node = ({ overview: { node, model, isolation_faults: faults }, readOnly }) => html`
  ${faults > 0 && html`<${Faults} faults=${faults} />`}
  ${readOnly && html`<span class="pill" title="[admin] read_only: nothing can be changed from here">Read only</span>`}
  <span class="fact opt"><b>${node.id}</b> ${node.version}, up ${span(node.uptime_s)}</span>
  <span class="fact opt2 ell model" title=${model.id}><b>${model.id}</b> ${model.kv_dtype} KV</span>`;

function Scope() {
  const tenants = useSnapshot("tenants");
  const { scope, setScope } = useContext(Page);
  const ids = (tenants.data?.items || []).map((tenant) => tenant.id);
  if (scope && !ids.includes(scope)) ids.unshift(scope);
  return html`
    <select class="scope" aria-label="Tenant scope" value=${scope} onChange=${(event) => setScope(event.target.value)}>
      <option value="">All tenants</option>
      ${ids.map((id) => html`<option value=${id}>${id}</option>`)}
    </select>`;
}

const LIVENESS = {
  live: ["ok", "Live"], connecting: ["watch", "Connecting"], down: ["bad", "Reconnecting"], polling: ["watch", "Polling"],
};

function Liveness({ link }) {
  const [kind, word] = link.paused ? ["watch", "Paused"] : LIVENESS[link.link.state];
  const event = link.seq === null ? "No event yet" : `Event ${count(link.seq)}`;
  const title = `${event}. ${link.paused ? "Click to resume." : "Click to pause."}`;
  return html`<button class=${"pill live " + kind} onClick=${togglePause} title=${title}><i></i>${word}</button>`;
}

const NEXT_THEME = { "": "dark", dark: "light", light: "" };

function Tools({ theme, setTheme }) {
  const { ask } = useContext(Page);
  const tool = (label, icon, onClick) => html`
    <button class="btn icon ghost" aria-label=${label} title=${label} onClick=${onClick}>${icon}</button>`;
  return html`
    <span class="tools">
      ${tool("Theme: " + (theme || "system"), ICON.theme, () => setTheme(NEXT_THEME[theme]))}
      ${tool("Keyboard help", ICON.help, () => ask({ kind: "help" }))}
      ${tool("Sign out", ICON.leave, leave)}
    </span>`;
}

export function Banners({ link }) {
  const { link: { state }, seq } = link;
  if (state === "down") return html`<${Disconnected} link=${link} seq=${seq} />`;
  return link.phase === "ready" && html`<${Notices} state=${state} />`;
}

function Notices({ state }) {
  const draining = useFact("overview", ({ node }) => node.state === "draining");
  return html`
    ${state === "polling" && html`
      <div class="banner" role="status">${ICON.warn}
        <span>Four other tabs of this sign-in are live, so this one asks every few seconds instead. Close one of them.</span>
      </div>`}
    ${draining && html`
      <div class="banner" role="status">${ICON.warn}
        <span>This node is draining: running turns end, and new ones go elsewhere.</span>
      </div>`}`;
}

function Disconnected({ link: { link }, seq }) {
  const [, beat] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => beat((n) => n + 1), 1000);
    return () => clearInterval(timer);
  }, []);
  const wait = Math.max(0, Math.ceil((link.retryAt - Date.now()) / 1000));
  const now = serverNow();
  const lost = seq === null
    ? "The server does not answer."
    : `The stream broke at event ${count(seq)}. Figures are frozen at ${clock(link.since)} UTC` +
      `${now && link.since ? `, ${span(Math.max(0, (now - link.since) / 1000))} old` : ""}; actions are off.`;
  return html`
    <section class="banner" aria-label="Connection">${ICON.warn}
      <span role="status">${lost}</span><span class="num">Next try ${wait > 0 ? `in ${wait} s` : "now"}.</span>
      <button class="btn sm" onClick=${tryNow}>Try now</button>
    </section>`;
}

const EXAMPLE = `curl ${location.origin}/v1/responses -H "Authorization: Bearer $KEY" \\
  -H "Content-Type: application/json" \\
  -d '{"input": "Hello"}'`;

export const Empty = () => html`
  <section class="panel">
    <div class="empty">
      <h2>No conversation yet.</h2>
      <p>The engine is ready. The first turn will appear here within a second.</p>
      <pre tabindex="0">${EXAMPLE}</pre>
    </div>
  </section>`;

/** The shape of the overview, before its figures are there: width in columns, height. */
const SHAPE = [[5, 158], [7, 158], [8, 378], [4, 378], [12, 200]];

export const Skeleton = () => html`
  <div class="grid" role="status" aria-busy="true" aria-label="Loading">
    ${SHAPE.map(([columns, height]) => html`<div class=${"skel c" + columns} style=${{ height: height + "px" }}></div>`)}
  </div>`;

export const Toasts = ({ toasts, dismiss }) => html`
  <div class="toasts" role="status" aria-live="polite">
    ${toasts.map(({ id, text, undo }) => html`
      <div class="toast" key=${id}>
        <span>${text}</span>
        ${undo && html`<button onClick=${() => {
          dismiss(id);
          undo();
        }}>Undo</button>`}
      </div>`)}
  </div>`;
