/* Which decisions were made, and were they too early? The whole journal, filtered, live, and to take away. */
import { html, useContext, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { get, query, url } from "../api.js";
import { CHART, Chart } from "../charts.js";
import { KIND_ICON } from "../icons.js";
import { Bar, Failure, Page, Panel } from "../parts.js";
import { useEvents, useRestart, useSnapshot } from "../store.js";
import { KIND, clock, count, kindName, percent, ruleName } from "../words.js";
import { Concerned, EntryCost, Kind } from "./journal.js";

const PAGE = 100, MOST = 1_000;
const RULES_EVERY_MS = 5_000;

export function Evictions() {
  const { args, go, scope } = useContext(Page);
  const filter = { tenant: scope, kind: args.kind || "", rule: args.rule || "" };
  const set = (fields) => go("evictions", { ...args, ...fields });
  return html`
    <div class="grid">
      <div class="c12 charts even">
        ${["evictions", "transfer", "occupancy"].map((name) => html`<${Chart} key=${name} chart=${CHART[name]} height=${104} />`)}
        <${ByRule} filter=${filter} set=${set} /><${TooEarly} />
      </div>
      <${WholeJournal} filter=${filter} set=${set} />
    </div>`;
}

function ByRule({ filter, set }) {
  const rules = useRules();
  const snapshot = { data: rules.by_rule, error: rules.error, retry: rules.load };
  const entries = Object.entries(rules.by_rule || {}).sort((a, b) => b[1] - a[1]);
  const most = Math.max(...entries.map(([, n]) => n), 1);
  return html`
    <${Panel} title="By rule" note="last 15 minutes" snapshots=${[snapshot]}>
      ${() => entries.length ? html`
        <div class="pad cmp rule-bars">
          ${entries.map(([rule, n]) => html`
            <button class="lnk ell" title=${ruleName(rule)} aria-pressed=${filter.rule === rule}
              onClick=${() => set({ rule: filter.rule === rule ? "" : rule })}>${ruleName(rule)}</button>
            <${Bar} ratio=${n / most} /><span class="r">${count(n)}</span>`)}
        </div>` : html`<p class="pad muted">Nothing was evicted yet.</p>`}
    <//>`;
}

function useRules() {
  const [rules, setRules] = useState({ by_rule: null, error: null });
  const load = () =>
    get("/evictions?limit=1").then(
      ({ by_rule }) => setRules({ by_rule: by_rule || {}, error: null }),
      (error) => setRules((had) => (error.unreachable && had.by_rule ? had : { by_rule: null, error })),
    );
  useEffect(() => {
    load();
    const timer = setInterval(() => document.hidden || load(), RULES_EVERY_MS);
    return () => clearInterval(timer);
  }, []);
  return { ...rules, load };
}

function TooEarly() {
  const overview = useSnapshot("overview");
  const ratio = overview.data?.rates.early_return_ratio;
  return html`
    <${Panel} title="Too early?" snapshots=${[overview]}>
      ${() => html`
        <div class="pad too-early">
          <b class="num">${percent(ratio, 1)}</b>
          <p class="muted">${ratio == null
            ? "No evicted session was due back yet."
            : "of evicted sessions came back within 60 s. Above 10 %, the pool is too small for this load, or the policy is wrong."}</p>
        </div>`}
    <//>`;
}

function WholeJournal({ filter, set }) {
  const list = useEntries(filter);
  return html`
    <section class="panel c12" aria-label="Journal">
      <div class="toolbar">
        <div class="chips" role="group" aria-label="Kind">
          ${["", ...Object.keys(KIND)].map((kind) => html`
            <button class="chip" aria-pressed=${filter.kind === kind} onClick=${() => set({ kind })}>
              ${kind ? html`<span class=${"k-" + kind}>${KIND_ICON[kind]}</span>${kindName(kind)}` : "All decisions"}
            </button>`)}
        </div>
        ${filter.rule && html`
          <button class="chip" aria-pressed="true" onClick=${() => set({ rule: "" })}>${ruleName(filter.rule)} ×</button>`}
        <span class="grow"></span>
        ${list.unread > 0 && html`<button class="btn sm" onClick=${list.showUnread}>${count(list.unread)} newer</button>`}
        <a class="btn sm" href=${url("/evictions?" + query({ ...filter, format: "jsonl" }))} download="journal.jsonl">
          Export JSON Lines
        </a>
      </div>
      ${list.error ? html`<${Failure} snapshot=${{ error: list.error, retry: list.reload }} />`
        : html`<${Entries} list=${list} filter=${filter} />`}
    </section>`;
}

const matches = (filter) => (entry) =>
  (!filter.kind || entry.kind === filter.kind) &&
  (!filter.rule || entry.rule === filter.rule) &&
  (!filter.tenant || entry.tenant === filter.tenant || entry.for?.tenant === filter.tenant);

/** Entries that match, newest first. New ones appear at once, or wait while one reads further down. */
function useEntries(filter) {
  const [list, setList] = useState({ items: null, next: null });
  const [waiting, setWaiting] = useState({ items: [], dropped: 0 });
  const [error, setError] = useState(null);
  const reading = useRef(false);
  const path = (after) => "/evictions?" + query({ ...filter, limit: PAGE, after });
  const ask = async (after) => {
    const asked = path();
    try {
      const page = await get(path(after));
      if (asked !== current.current) return;
      setError(null);
      setList((had) => ({ items: after ? union(had.items, page.items) : page.items, next: page.next || null }));
      if (!after) setWaiting({ items: [], dropped: 0 });
    } catch (failure) {
      if (!failure.unreachable || list.items === null) setError(failure);
    }
  };
  const current = useRef();
  current.current = path();
  useEffect(() => {
    setList({ items: null, next: null });
    ask();
  }, [path()]);
  useRestart(() => ask());
  useEvents("journal", ({ items, dropped = 0 }) => {
    const mine = items.filter(matches(filter)).sort((a, b) => b.seq - a.seq);
    if (!mine.length && !dropped) return;
    if (reading.current || dropped) {
      return setWaiting((had) => ({ items: union(mine, had.items), dropped: had.dropped + dropped }));
    }
    setList((had) => (had.items ? { ...had, items: union(mine, had.items).slice(0, MOST) } : had));
  });
  // What the stream left out is only in the journal itself.
  const showUnread = () => {
    if (waiting.dropped) return ask();
    setList((had) => ({ ...had, items: union(waiting.items, had.items || []).slice(0, MOST) }));
    setWaiting({ items: [], dropped: 0 });
  };
  const read = (isReading) => {
    reading.current = isReading;
    if (!isReading && waiting.items.length && !waiting.dropped) showUnread();
  };
  return {
    ...list, error, read, showUnread, unread: waiting.items.length + waiting.dropped, reload: () => ask(),
    older: () => ask(list.next),
  };
}

function union(newer, older) {
  const known = new Set(newer.map((entry) => entry.id));
  return [...newer, ...(older || []).filter((entry) => !known.has(entry.id))];
}

function Entries({ list, filter }) {
  if (list.items === null) return html`<div class="pad"><div class="skel fill" role="status" aria-label="Loading"></div></div>`;
  const narrowed = filter.kind || filter.rule || filter.tenant;
  return html`
    <ol class="feed big" tabindex="0" aria-label="Journal, newest first" onScroll=${(event) => list.read(event.target.scrollTop > 40)}>
      ${list.items.map((entry) => html`<${Entry} key=${entry.id} entry=${entry} />`)}
      ${!list.items.length && html`
        <li><span></span><span class="muted">
          ${narrowed ? "No decision matches." : "No decision was made yet: memory has not run short."}
        </span></li>`}
      ${list.next && html`<li><span></span><span><button class="btn sm" onClick=${list.older}>Older decisions</button></span></li>`}
    </ol>`;
}

const Entry = ({ entry }) => html`
  <li>
    <${Kind} kind=${entry.kind} />
    <div>
      <${Concerned} entry=${entry} /> <span class="muted">· ${ruleName(entry.rule)}</span><br />
      <span class="why">${entry.sentence}</span>
    </div>
    <${EntryCost} entry=${entry} />
    <time title=${entry.id}>${clock(entry.ts)}<br />#${entry.seq}</time>
  </li>`;
