/* What happened to this one conversation? Its turns, tiers, blocks, return cost, forks and journal, beside any page. */
import { html, useContext, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { STATELESS } from "../actions.js";
import { get } from "../api.js";
import { ICON } from "../icons.js";
import { Bar, Failure, Page, State, Tenant } from "../parts.js";
import { useRestart, useRows, useSnapshot, state as store, watch } from "../store.js";
import { PLAN, WHEREABOUTS, bytes, copies, count, ms, noun, span } from "../words.js";
import { Blocks, Forks, Turns } from "./anatomy.js";
import { Brief } from "./journal.js";
import { PinFor } from "./pin.js";

/** A session that changes all the time is asked for again no more often. */
const REFRESH_MS = 1_000;

export function Drawer({ id }) {
  const { open, act } = useContext(Page);
  const drawer = useRef();
  const { session, error, retry } = useSession(id);
  useFocusInside(drawer, id);
  const keys = (event) => {
    const verb = { w: "warm", p: session?.pinned ? "unpin" : "pin", o: "offload", e: "evict" }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (verb && session) act(session, verb);
    if (event.key !== "Escape") return;
    event.stopPropagation();
    open("");
  };
  return html`
    <section class="drawer" ref=${drawer} tabindex="-1" role="dialog" aria-labelledby="drawer-title" onKeyDown=${keys}>
      <div class="dh">
        <${Title} id=${id} />
        ${session && html`<${Summary} session=${session} />`}
      </div>
      ${error ? html`<${Gone} error=${error} retry=${retry} />`
        : session ? html`<${Body} session=${session} />`
          : html`<div class="db"><div class="skel fill" role="status" aria-label="Loading"></div></div>`}
    </section>`;
}

/** The session, asked for again whenever the stream or an action says that it changed. */
function useSession(id) {
  const [known, setKnown] = useState({});
  const timer = useRef(null);
  const load = async () => {
    timer.current = null;
    try {
      const session = await get(`/sessions/${id}`);
      setKnown({ session });
    } catch (error) {
      setKnown((had) => (error.unreachable && had.session ? had : { error }));
    }
  };
  const soon = () => (timer.current ??= setTimeout(load, REFRESH_MS));
  useEffect(() => {
    setKnown({});
    load();
    watch(id);
    return () => {
      watch("");
      clearTimeout(timer.current);
    };
  }, [id]);
  useRows((row, seq) => {
    if (row.id !== id) return;
    setKnown((had) => (had.session ? { session: { ...had.session, ...row, as_of: { ...had.session.as_of, seq } } } : had));
    soon();
  });
  useRestart(load);
  const mine = known.session?.id === id || known.error ? known : {};
  return { ...mine, retry: load };
}

/** Focus goes into the drawer, and back where it was. */
function useFocusInside(drawer, id) {
  useEffect(() => {
    const before = document.activeElement;
    drawer.current.focus({ preventScroll: true });
    return () => before?.focus?.({ preventScroll: true });
  }, [id]);
}

function Title({ id }) {
  const { open, toast } = useContext(Page);
  const copy = () =>
    navigator.clipboard
      ? navigator.clipboard.writeText(id).then(() => toast("Copied the id."), () => toast("The browser did not allow it."))
      : toast("The browser copies only over HTTPS or from this machine.");
  return html`
    <div class="row">
      <h2 id="drawer-title" title=${id}>${id}</h2>
      <button class="btn sm ghost" onClick=${copy}>Copy</button>
      <span class="grow"></span>
      <button class="btn icon ghost" aria-label="Close" onClick=${() => open("")}>${ICON.close}</button>
    </div>`;
}

function Summary({ session }) {
  const age = session.created && session.as_of.ts ? span(Math.max(1, (session.as_of.ts - session.created) / 1000)) : null;
  return html`
    <div class="row under">
      <${State} state=${session.state} pinned=${session.pinned} />
      <span class="muted ell">
        ${WHEREABOUTS[session.state]} · <${Tenant} id=${session.tenant} />${age && ` · started ${age} ago`}
      </span>
    </div>
    ${session.stateless ? html`<p class="muted under">${STATELESS}</p>` : !store.me?.read_only && html`<${Actions} session=${session} />`}`;
}

function Actions({ session }) {
  const { act } = useContext(Page);
  const overview = useSnapshot("overview");
  const has = (tier) => overview.data?.tiers.some((t) => t.tier === tier && t.enabled);
  const { device, host, disk } = session.bytes;
  const busy = session.state === "running" || session.state === "reloading";
  const button = (word, verb, { off = false, why, body, kind = "" } = {}) => html`
    <button class=${"btn sm " + kind} disabled=${off} title=${why} onClick=${() => act(session, verb, body)}>${word}</button>`;
  return html`
    <div class="row acts-row">
      ${button("Warm", "warm", { off: device > 0 && device >= session.bytes.total, why: "Bring to the device what is not there" })}
      ${session.pinned ? button("Unpin", "unpin") : html`<span class="split">${button("Pin", "pin")}<${PinFor} row=${session} /></span>`}
      ${has("host") && button("Offload", "offload", {
        off: !device || host >= device, why: host >= device && device ? "Host memory has a copy already" : "Copy to host memory",
        body: { to: "host" },
      })}
      ${has("disk") && button("To disk", "offload", {
        off: disk >= session.bytes.total, why: disk >= session.bytes.total ? "The disk has a copy already" : "Copy to disk",
        body: { to: "disk" },
      })}
      ${button("Evict", "evict", {
        off: !device || session.pinned || busy,
        why: busy ? "It is running" : session.pinned ? "It is pinned" : "Give up the device copy alone",
      })}
      ${busy && button("Cancel turn…", "cancel", { kind: "danger" })}
      <span class="grow"></span>
      ${button("Drop KV…", "drop", { kind: "danger", off: !(session.bytes.total > 0) || copies(session.bytes) === "nowhere" })}
    </div>`;
}

function Gone({ error, retry }) {
  if (error.status !== 404) return html`<${Failure} snapshot=${{ error, retry }} />`;
  return html`
    <div class="empty">
      <h2>No such conversation here.</h2>
      <p>${error.message}</p>
      <p>It may have been deleted, or another node owns it.</p>
    </div>`;
}

function Body({ session }) {
  return html`
    <div class="db">
      <div class="kv">
        <div><b>${count(session.tokens)}</b>${noun(session.tokens, "token")}</div><div><b>${bytes(session.bytes.total)}</b>KV</div>
        <div><b>${count(session.turns)}</b>${noun(session.turns, "turn")}</div><div><b>${span(session.idle_s)}</b>idle</div>
      </div>
      <${IfAMessageCame} cost=${session.return} />
      <h3>Blocks <span class="muted">${whereabouts(session.bytes)}</span></h3>
      <${Blocks} session=${session} />
      <h3>Turns <span class="muted">time to first token, newest first</span></h3>
      <${Turns} turns=${session.turns_detail || []} />
      <h3>Forks</h3>
      <${Forks} session=${session} />
      <h3>Journal of this session</h3>
      <${Decisions} entries=${session.evictions || []} />
    </div>`;
}

const whereabouts = (held) => (copies(held) === "nowhere" ? "nowhere" : `on ${copies(held)}`);

function Decisions({ entries }) {
  if (!entries.length) return html`<p class="muted">No decision about it is in the journal.</p>`;
  return html`<ol class="feed whole">${entries.map((entry) => html`<${Brief} key=${entry.id} entry=${entry} />`)}</ol>`;
}

/** What the next turn would find, beside what the other ways would cost. */
function IfAMessageCame({ cost }) {
  if (!cost) return null;
  const most = Math.max(cost.reencode_ms || 0, cost.reload_ms || 0, cost.predicted_ms || 0, 1e-9);
  const ways = {
    resident: [["Resident", 0, "resident"]],
    reload: [["Reload", cost.reload_ms, "reload"]],
    split: [["Reload", cost.reload_ms, "reload"], ["Split", cost.predicted_ms, "split"]],
    reencode: [["Reload", cost.reload_ms, "reload"]],
  };
  const rows = [...(ways[cost.plan] || []), ["Re-encode", cost.reencode_ms, "reencode"]];
  const plan = cost.plan === "resident" ? "nothing to bring back" : `plan: ${PLAN[cost.plan] || cost.plan}`;
  return html`
    <h3>If a message came now <span class="muted">${plan}</span></h3>
    <div class="cmp">
      ${rows.map(([word, cost_ms, way]) => html`
        <span class=${way === cost.plan ? "on" : ""}>${word}</span>
        <${Bar} ratio=${cost_ms == null ? 0 : cost_ms / most} kind=${way === cost.plan ? "on" : ""} />
        <span class=${"r " + (way === cost.plan ? "on" : "")}>${cost_ms == null ? "not held" : ms(cost_ms)}</span>`)}
    </div>`;
}
