/* Why was it evicted? Entries of the journal: the server's own sentence beside who lost, for whom, and what it freed. */
import { html, useContext } from "../../vendor/preact-htm.js";
import { KIND_ICON } from "../icons.js";
import { Page, Panel, Session, Tenant } from "../parts.js";
import { useSnapshot } from "../store.js";
import { bytes, clock, kindName, ms } from "../words.js";

/** Decisions that took something, or that made somebody wait: what a short list must not lose among the others. */
const LOSSES = ["evict", "drop", "refuse", "preempt", "mismatch", "bad_slot"];

export function RecentJournal({ limit = 14 }) {
  const journal = useSnapshot("journal"), overview = useSnapshot("overview");
  const aside = html`<a class="muted" href="#/evictions">journal</a>`;
  return html`
    <${Panel} title="Why it was evicted" size="tall journal" aside=${aside} snapshots=${[journal, overview]}>
      ${() => html`<${Feed} entries=${journal.data.items.filter((e) => LOSSES.includes(e.kind)).slice(0, limit)} />`}
    <//>`;
}

/** Of entries that the scope concerns: it lost, or it was for it. */
function useScoped(entries) {
  const { scope } = useContext(Page);
  return scope ? entries.filter((entry) => entry.tenant === scope || entry.for?.tenant === scope) : entries;
}

function Feed({ entries }) {
  const shown = useScoped(entries);
  return html`
    <ol class="feed" tabindex="0" aria-label="Journal, newest first">
      ${shown.map((entry) => html`<${Brief} key=${entry.id} entry=${entry} />`)}
      ${!shown.length && html`<li><span></span><span class="muted">Nothing was evicted yet, and no turn had to wait.</span></li>`}
    </ol>`;
}

/** One entry where there is little room. */
export function Brief({ entry }) {
  return html`
    <li>
      <${Kind} kind=${entry.kind} />
      <div>
        <${Concerned} entry=${entry} />
        <span class="why"> ${entry.sentence}</span>
      </div>
      <time>${clock(entry.ts)}</time>
    </li>`;
}

export const Kind = ({ kind }) => html`
  <span class=${"k-" + kind} title=${kindName(kind)}>${KIND_ICON[kind]}<span class="sr">${kindName(kind)}</span></span>`;

/** Who did it, whose it was, for whom, and how much. */
export function Concerned({ entry }) {
  const others = entry.for && entry.for.tenant !== entry.tenant;
  return html`
    <span class="who">
      ${entry.actor && html`<b>${entry.actor}</b>: `}
      ${entry.session && html`<${Session} id=${entry.session} /> `}
      ${entry.tenant && html`<${Tenant} id=${entry.tenant} /> `}
      ${entry.freed_bytes > 0 && html`<b class="num">${bytes(entry.freed_bytes)}</b> `}
      ${others && html`<span class="muted">for </span><${Tenant} id=${entry.for.tenant} />`}
    </span>`;
}

/** What the return of what was taken will cost, beside encoding it again. */
export function EntryCost({ entry: { return: cost } }) {
  if (!cost) return html`<span class="cost"></span>`;
  return html`
    <span class="cost num">
      <span class="muted">return </span><b>${ms(cost.predicted_ms)}</b><br />
      <span class="muted">re-encode ${ms(cost.reencode_ms)}</span>
    </span>`;
}
