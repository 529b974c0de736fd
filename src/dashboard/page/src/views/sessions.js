/* Which sessions are there? Pages of 100 in the server's order, at most 60 rows in the document.
 *
 * The order is that of the moment it was asked for: rows change in place, and never jump under the pointer. */
import { html, useContext, useEffect, useLayoutEffect, useMemo, useRef, useState } from "../../vendor/preact-htm.js";
import { STATELESS } from "../actions.js";
import { get, query } from "../api.js";
import { ICON, SHAPE } from "../icons.js";
import { Failure, Figure, Page, ReturnCost, Session, State } from "../parts.js";
import { useEvents, useRestart, useRows, useSnapshot, state as store } from "../store.js";
import { NONE, PATH, STATE, bytes, copies, count, counted, ms, percent, span } from "../words.js";
import { PinFor } from "./pin.js";

const PAGE = 100, ROW = 32, MOST_ROWS = 60, SPARE_ROWS = 8;
const TYPING_MS = 30;
/** Of rows that changed, at most so many are asked for again a second. */
const REFRESHES_PER_S = 4;

/** name, sort key, width, right-aligned */
const COLUMNS = [
  ["Session", "", 138], ["Tenant", "", 122], ["State", "", 120], ["Idle", "idle", 92, 1], ["Turns", "turns", 66, 1],
  ["Tokens", "tokens", 80, 1], ["Device", "device", 88, 1], ["Copies", "", 116], ["Last TTFT", "", 144, 1],
  ["Return cost", "return", 156, 1], ["Order", "rank", 66, 1], ["Actions", "", 128],
];

const STATES = ["", "running", "reloading", "hot", "warm", "cold", "none", "pinned"];

export function Sessions() {
  const { args, go, scope } = useContext(Page);
  const filter = { sort: args.sort || "idle", tenant: scope, state: args.state || "", q: (args.q || "").trim() };
  const set = (fields, more) => go("sessions", { ...args, ...fields }, more);
  const list = usePages(filter);
  return html`
    <section class="panel" aria-label="Sessions">
      <${Toolbar} filter=${filter} typed=${args.q || ""} set=${set} list=${list} />
      ${list.error ? html`<${Failure} snapshot=${{ error: list.error, retry: list.refresh }} />` : html`
        <${Table} list=${list} filter=${filter} set=${set} />`}
    </section>`;
}

/** Pages of the sessions that match, in the order of the first of them. */
function usePages(filter) {
  const none = { items: [], next: null, total: null, at: 0, seq: null, truncated: false };
  const [pages, setPages] = useState(none);
  const [error, setError] = useState(null);
  const request = useRef(null);
  const path = (after) => "/sessions?" + query({ ...filter, limit: PAGE, after });

  const ask = async (after) => {
    request.current?.abort();
    const mine = (request.current = new AbortController());
    try {
      const page = await get(path(after), mine.signal);
      if (request.current !== mine) return;
      setError(null);
      setPages((had) => (after ? append(had, page) : fresh(page)));
    } catch (failure) {
      if (failure.name !== "AbortError" && !(failure.unreachable && pages.items.length)) setError(failure);
    }
    if (request.current === mine) request.current = null;
  };
  // Before the next frame, which an effect would wait for.
  useLayoutEffect(() => {
    const timer = filter.q ? setTimeout(ask, TYPING_MS) : void ask();
    return () => {
      clearTimeout(timer);
      request.current?.abort();
    };
  }, [path()]);
  useRestart(() => ask());

  const patch = (row, seq) => setPages((had) => replaceRow(had, row, seq));
  useRows(patch);
  useLiveRows(pages.items, patch);
  return { ...pages, error, refresh: () => ask(), more: () => pages.next && !request.current && ask(pages.next) };
}

const fresh = (page) => ({
  items: page.items.map((row) => ({ ...row, seq: page.as_of.seq })), next: page.next, total: page.total,
  truncated: page.truncated, at: Date.now(),
});

function append(had, page) {
  const known = new Set(had.items.map((row) => row.id));
  const items = page.items.filter((row) => !known.has(row.id)).map((row) => ({ ...row, seq: page.as_of.seq }));
  return { ...had, items: [...had.items, ...items], next: page.next };
}

function replaceRow(had, row, seq) {
  const at = had.items.findIndex((item) => item.id === row.id);
  if (at < 0) return had;
  const items = had.items.slice();
  items[at] = { ...items[at], ...row, seq: seq ?? items[at].seq };
  return { ...had, items };
}

/** Rows that the stream names: what it says is put in place; what it leaves open is asked for, a few at a time. */
function useLiveRows(items, patch) {
  const due = useRef(new Set());
  const known = useRef();
  known.current = new Map(items.map((row) => [row.id, row]));
  const ask = (id) => known.current.has(id) && due.current.add(id);
  useEvents("journal", ({ items: entries }) => entries.forEach((entry) => ask(entry.session)));
  useEvents("tick", ({ map, seq }) => {
    map?.drop?.forEach(ask);
    for (const cell of map?.upsert || []) {
      const row = known.current.get(cell.s);
      if (!row) continue;
      // It came up from below, so what its return costs is another matter now.
      if (!row.bytes.device) due.current.add(row.id);
      patch({ ...onDevice(cell), id: row.id, bytes: { ...row.bytes, device: cell.bytes } }, seq);
    }
  });
  useEffect(() => {
    const timer = setInterval(() => {
      const next = [...due.current].slice(0, REFRESHES_PER_S);
      for (const id of next) {
        due.current.delete(id);
        get(`/sessions/${id}`).then((row) => patch(row, row.as_of.seq)).catch(() => {});
      }
    }, 1000);
    return () => clearInterval(timer);
  }, []);
}

const onDevice = ({ st, pin, rank, idle_s }) => ({ state: st, pinned: pin, rank, idle_s });

function Toolbar({ filter, typed, set, list }) {
  const overview = useSnapshot("overview");
  const counts = overview.data?.sessions || {};
  return html`
    <div class="toolbar">
      <input type="search" id="find" aria-label="Find a session by the start of its id" placeholder="Find by id…  /"
        value=${typed} onInput=${(event) => set({ q: event.target.value }, { replace: true })} />
      <div class="chips" role="group" aria-label="State">
        ${STATES.map((name) => html`
          <button class="chip" aria-pressed=${filter.state === name} onClick=${() => set({ state: name })}>
            ${name && html`<span class=${"st st-" + name}>${SHAPE[name]}</span>`}${name ? STATE[name] : "All"}${" "}
            <b>${count(name ? counts[name] : counts.total)}</b>
          </button>`)}
      </div>
      <span class="grow"></span>
      <${Age} list=${list} />
      <button class="btn sm" onClick=${list.refresh}>Refresh order</button>
    </div>`;
}

function Age({ list }) {
  const [, beat] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => beat((n) => n + 1), 1000);
    return () => clearInterval(timer);
  }, []);
  if (list.total === null) return html`<span class="muted">asking…</span>`;
  const old = (Date.now() - list.at) / 1000;
  const note = list.truncated && html`
    <span class="k-refuse" title="The search had to stop early; narrow it down">, not all looked at</span>`;
  return html`
    <span class="muted num">
      ${counted(list.total, "matches", "match")}${note} · ${old < 2 ? "order is fresh" : `order is ${span(old)} old`}
    </span>`;
}

function Table({ list, filter, set }) {
  const { act, open, args } = useContext(Page);
  const box = useRef();
  const [top, setTop] = useState(0);
  const height = useHeightToBottom(box);
  // Keys may come faster than the page is drawn: the ref is where they are, the state what is on show.
  const at = useRef(0);
  const [current, showCurrent] = useState(0);
  const setCurrent = (index) => {
    at.current = index;
    showCurrent(index);
  };
  const walked = useRef(false);
  useEffect(() => {
    box.current.scrollTop = 0;
    setTop(0);
    setCurrent(0);
  }, [filter.sort, filter.state, filter.tenant, filter.q, list.at]);

  const seen = Math.min(MOST_ROWS, Math.ceil(height / ROW));
  const spare = Math.min(SPARE_ROWS, Math.floor((MOST_ROWS - seen) / 2));
  const from = Math.max(0, Math.min(Math.floor(top / ROW) - spare, list.items.length - 1));
  const to = Math.min(list.items.length, from + seen + 2 * spare);
  const scrolled = ({ target }) => {
    setTop(target.scrollTop);
    ahead(target.scrollTop);
  };
  // The next page is asked for while there is one to scroll through; where it came too late, at once when it is there.
  const ahead = (y) => y + height > (list.items.length - PAGE) * ROW && list.more();
  useEffect(() => void (top > 0 && ahead(top)), [list.items.length]);
  const walk = (by) => {
    const next = Math.max(0, Math.min(list.items.length - 1, at.current + by));
    walked.current = true;
    setCurrent(next);
    keepInView(box.current, next * ROW, height);
  };
  useEffect(() => {
    if (!walked.current) return;
    walked.current = false;
    box.current.querySelector(`[data-row="${current}"] .lnk`)?.focus({ preventScroll: true });
  });
  useTableKeys({ walk, rowNow: () => list.items[at.current], act, open, busy: Boolean(args.s) });

  return html`
    <div class="scroll" ref=${box} onScroll=${scrolled} tabindex="0" role="region" aria-label="Table of sessions"
      style=${{ height: height + "px" }}>
      <table class="vt num" aria-rowcount=${list.total ?? -1}>
        <colgroup>${COLUMNS.map(([, , width]) => html`<col style=${{ width: width + "px" }} />`)}</colgroup>
        <thead><tr>${COLUMNS.map((column) => html`<${Heading} column=${column} sort=${filter.sort} set=${set} />`)}</tr></thead>
        <tbody>
          <${Spacer} rows=${from} />
          ${list.items.slice(from, to).map((row, i) => html`
            <${Row} key=${row.id} row=${row} index=${from + i} current=${from + i === current} onCurrent=${setCurrent} />`)}
          <${Spacer} rows=${list.items.length - to} />
        </tbody>
      </table>
      ${list.total === 0 && html`<${NoMatch} filter=${filter} set=${set} />`}
    </div>`;
}

function keepInView(box, y, height) {
  if (y < box.scrollTop) box.scrollTop = y;
  else if (y > box.scrollTop + height - 3 * ROW) box.scrollTop = y - height + 3 * ROW;
}

const Spacer = ({ rows }) => html`
  <tr class="sp" aria-hidden="true"><td colspan=${COLUMNS.length} style=${{ height: rows * ROW + "px" }}></td></tr>`;

function NoMatch({ filter, set }) {
  const narrowed = filter.q || filter.state || filter.tenant;
  if (!narrowed) return html`<div class="empty"><h2>No session yet.</h2><p>The first turn will appear here.</p></div>`;
  return html`
    <div class="empty">
      <h2>No session matches.</h2><p>Clear the search, the state or the tenant.</p>
      <button class="btn" onClick=${() => set({ q: "", state: "", tenant: "" })}>Clear filters</button>
    </div>`;
}

function useHeightToBottom(box) {
  const [height, setHeight] = useState(560);
  useEffect(() => {
    const fit = () => {
      if (box.current) setHeight(Math.max(240, innerHeight - box.current.getBoundingClientRect().top - 16));
    };
    fit();
    addEventListener("resize", fit);
    return () => removeEventListener("resize", fit);
  }, []);
  return height;
}

const STEP = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1, PageDown: 15, PageUp: -15 };
const VERB = { w: "warm", o: "offload", e: "evict" };

/** j and k walk, Enter opens, w p o e act on the current row; nothing while one types, or the drawer takes the keys. */
function useTableKeys({ walk, rowNow, act, open, busy }) {
  useEffect(() => {
    const press = (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
      if (/INPUT|SELECT|TEXTAREA/.test(event.target.tagName) || event.target.closest?.(".drawer")) return;
      if (STEP[event.key]) {
        event.preventDefault();
        return walk(STEP[event.key]);
      }
      const row = rowNow();
      if (!row || busy) return;
      if (event.key === "Enter" && !event.target.closest("a, button:not(.lnk)")) {
        event.preventDefault();
        open(row.id);
      }
      if (event.key === "p") act(row, row.pinned ? "unpin" : "pin");
      if (VERB[event.key]) act(row, VERB[event.key]);
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  });
}

function Heading({ column: [name, key, , right], sort, set }) {
  const on = key && sort.replace("-", "") === key, down = sort.startsWith("-");
  const label = key
    ? html`<button onClick=${() => set({ sort: on && !down ? "-" + key : key })}>${name}${on ? (down ? " ↓" : " ↑") : ""}</button>`
    : name;
  return html`
    <th scope="col" class=${right ? "r" : ""} aria-sort=${on ? (down ? "descending" : "ascending") : undefined}>${label}</th>`;
}

function Row({ row, index, current, onCurrent }) {
  const { open, args } = useContext(Page);
  const show = () => {
    onCurrent(index);
    open(row.id);
  };
  const opened = args.s === row.id;
  // A row that is as it was is not drawn again: while one scrolls, that is nearly all of them.
  return useMemo(() => cells({ row, index, current, opened, show }), [row, index, current, opened, location.hash]);
}

function cells({ row, index, current, opened, show }) {
  return html`
    <tr class=${(opened ? "sel " : "") + (current ? "cur" : "")} data-row=${index} aria-rowindex=${index + 2} onClick=${show}>
      <td><${Session} id=${row.id} /></td>
      <td>${row.tenant}</td>
      <td><${State} state=${row.state} pinned=${row.pinned} /></td>
      <td class="r">${span(row.idle_s)}</td>
      <td class="r">${count(row.turns)}</td>
      <td class="r">${count(row.tokens)}</td>
      <td class="r">${row.bytes.device ? bytes(row.bytes.device) : html`<span class="muted">–</span>`}</td>
      <td><${Copies} held=${row.bytes} /></td>
      <td class="r"><${Figure} value=${ms(row.last_ttft_ms)} word=${PATH[row.last_path] || ""} /></td>
      <td class="r"><${ReturnCost} cost=${row.return} /></td>
      <td class="r">${row.rank ? "#" + row.rank : html`<span class="muted">–</span>`}</td>
      <td><${RowActions} row=${row} /></td>
    </tr>`;
}

function Copies({ held }) {
  const where = copies(held);
  const third = (tier, mark) => html`<i class=${held[tier] > 0 ? mark : ""}></i>`;
  return html`
    <div class="row" title=${`copies: ${where}`}>
      <div class="mix thirds" role="img" aria-label=${`copies: ${where}`}>
        ${third("device", "d")}${third("host", "h")}${third("disk", "k")}
      </div>
      <span class="muted">${held.total > 0 && held.shared > 0 ? percent(held.shared / held.total) + " sh." : NONE}</span>
    </div>`;
}

function RowActions({ row }) {
  const { act } = useContext(Page);
  if (store.me?.read_only) return html`<span class="muted">read only</span>`;
  if (row.stateless) return html`<span class="muted" title=${STATELESS}>stateless</span>`;
  const onDevice = row.bytes.device > 0;
  const fixed = row.state === "running" || row.pinned;
  const main = onDevice
    ? html`<button class="btn sm ghost verb" disabled=${fixed} onClick=${() => act(row, "evict")}>Evict</button>`
    : html`<button class="btn sm ghost verb" onClick=${() => act(row, "warm")}>Warm</button>`;
  const pin = row.pinned ? "Unpin" : "Pin";
  return html`
    <span class="acts" onClick=${(event) => event.stopPropagation()}>
      ${main}
      <button class="btn sm icon ghost" aria-label=${`${pin} ${row.id}`} title=${pin} onClick=${() => act(row, pin.toLowerCase())}>
        ${ICON.pin}
      </button>
      ${!row.pinned && html`<${PinFor} row=${row} />`}
    </span>`;
}
