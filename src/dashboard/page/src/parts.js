/* Which small parts do all views share? Links to sessions and tenants, states, panels with their failures, dialogs. */
import { createContext, html, useContext, useEffect, useRef } from "../vendor/preact-htm.js";
import { ICON, SHAPE } from "./icons.js";
import { PLAN, STATE, counted, ms, shortId } from "./words.js";

/** What a view may do to the page: `{args, go, open, act, scope, setScope, range, look, toast, ask}`. */
export const Page = createContext({});

export function Session({ id }) {
  const { open } = useContext(Page);
  const show = (event) => {
    event.stopPropagation();
    open(id);
  };
  return html`<button class="lnk mono" title=${id} onClick=${show}>${shortId(id)}</button>`;
}

export function Tenant({ id }) {
  const { scope, setScope } = useContext(Page);
  const show = (event) => {
    event.stopPropagation();
    setScope(scope === id ? "" : id);
  };
  const title = scope === id ? "Show all tenants" : `Show only ${id}`;
  return html`<button class="lnk" title=${title} aria-pressed=${scope === id} onClick=${show}>${id}</button>`;
}

export function State({ state, pinned }) {
  const pin = pinned && html`<span class="row" title="Pinned">${ICON.pin}<span class="sr">, pinned</span></span>`;
  return html`<span class=${"st st-" + state}>${SHAPE[state]}<span>${STATE[state] || state}</span>${pin}</span>`;
}

/** A number in a column of numbers, and the word that says what it is. */
export const Figure = ({ value, word, quiet = false }) => html`
  <span class="fig"><span class=${quiet ? "muted" : ""}>${value}</span><span class="muted">${word}</span></span>`;

/** What bringing a session back will cost, and how. */
export function ReturnCost({ cost }) {
  if (!cost) return html`<span class="muted">–</span>`;
  const [figure, word] = cost.plan === "resident"
    ? [cost.if_evicted_ms == null ? "resident" : ms(cost.if_evicted_ms), cost.if_evicted_ms == null ? "" : "if evicted"]
    : [html`<b>${ms(cost.predicted_ms)}</b>`, PLAN[cost.plan] || cost.plan];
  return html`<${Figure} value=${figure} word=${word} quiet=${cost.plan === "resident"} />`;
}

/** A panel of the page. Where its data can't be had, it alone says so; until there is any, it shows its shape. */
export function Panel({ title, note, aside, size = "", snapshots = [], children, ...rest }) {
  const failed = snapshots.find((snapshot) => snapshot.error);
  const waits = snapshots.some((snapshot) => snapshot.data === null);
  const content = failed ? html`<${Failure} snapshot=${failed} />` : waits ? html`<${Waiting} />` : children;
  return html`
    <section class=${"panel " + size} aria-label=${title} ...${rest}>
      <header><h2>${title}</h2>${note && html`<span class="muted num ell">${note}</span>`}<span class="grow"></span>${aside}</header>
      ${typeof content === "function" ? content() : content}
    </section>`;
}

export function Failure({ snapshot: { error, retry } }) {
  return html`
    <div class="failure" role="alert">
      <p>${ICON.warn}<span>${error.message}</span></p>
      <p class="muted mono">${error.code}${error.requestId ? ` · ${error.requestId}` : ""}</p>
      <button class="btn sm" onClick=${retry}>Retry</button>
    </div>`;
}

const Waiting = () => html`<div class="pad grow"><div class="skel fill" role="status" aria-label="Loading"></div></div>`;

export const LineKey = ({ token, dash }) => html`
  <svg width="16" height="8" viewBox="0 0 16 8" aria-hidden="true">
    <path d="M0 4h16" stroke=${`var(${token})`} stroke-width="2.2" stroke-dasharray=${dash ? dash.join(" ") : ""} />
  </svg>`;

/** A bar filled to `ratio`, with a mark at `mark`; both of the bar's width. */
export function Bar({ ratio, mark, kind = "", label }) {
  const width = { width: `${Math.max(0, Math.min(1, ratio || 0)) * 100}%` };
  return html`
    <div class=${"bar " + kind} role=${label ? "img" : undefined} aria-label=${label}>
      <i style=${width}></i>${mark != null && html`<u style=${{ left: `${Math.min(0.99, mark) * 100}%` }}></u>`}
    </div>`;
}

export function Faults({ faults }) {
  const title = "Evictions for another tenant that took one below its floor, or that served a tenant at its ceiling";
  return html`
    <span class=${"pill " + (faults > 0 ? "bad" : "ok")} title=${title}>
      ${faults > 0 ? ICON.warn : ICON.ok}${counted(faults, "isolation fault")}
    </span>`;
}

export function Modal({ label, onClose, children }) {
  const dialog = useRef();
  useEffect(() => {
    const before = document.activeElement;
    dialog.current.showModal();
    return () => before?.focus?.({ preventScroll: true });
  }, []);
  return html`<dialog ref=${dialog} aria-label=${label} onClose=${onClose}>${children}</dialog>`;
}
