/* What must an operator know within five seconds? The verdict, key figures, the map, who is next, and why it happened. */
import { html, useContext } from "../../vendor/preact-htm.js";
import { CHART, Chart, Spark } from "../charts.js";
import { ICON } from "../icons.js";
import { Failure, LineKey, Page, Panel, Session, Tenant } from "../parts.js";
import { useSnapshot } from "../store.js";
import { NONE, bytes, clock, count, counted, ms, percent, span } from "../words.js";
import { RecentJournal } from "./journal.js";
import { ResidencyMap } from "./residency.js";
import { TenantsTable } from "./tenants.js";

export const Overview = () => html`
  <div class="grid">
    <${Verdict} /><${KeyFigures} /><${ResidencyMap} />
    <div class="c4 side"><${NextVictims} limit=${4} /><${RecentJournal} /></div>
    <div class="c12 charts">
      ${["ttft", "occupancy", "evictions", "transfer", "tokens"].map((name) => html`<${Chart} key=${name} chart=${CHART[name]} />`)}
    </div>
    <div class="c12"><${TenantsTable} /></div>
  </div>`;

function Verdict() {
  const overview = useSnapshot("overview");
  if (overview.error) return html`<section class="panel c5"><${Failure} snapshot=${overview} /></section>`;
  const { verdict } = overview.data;
  const meters = [
    ["memory", "Memory", "of the device pool"], ["compute", "Compute", "of the step's budget"],
    ["transfer", "Transfer", "of the bandwidth seen"],
  ];
  const title = verdict.since ? `Since ${clock(verdict.since)} UTC` : undefined;
  return html`
    <section class=${"panel c5 verdict " + verdict.severity} aria-label="Verdict" title=${title}>
      <h1>${verdict.severity === "ok" ? ICON.ok : ICON.warn}<span>${verdict.title}</span></h1>
      <p>${verdict.detail.map((piece) => html`<${Piece} piece=${piece} />`)}</p>
      <div class="press">
        ${meters.map(([name, label, note]) => html`
          <${Meter} label=${label} note=${note} ratio=${verdict.pressures[name]} hot=${verdict.bottleneck === name} />`)}
      </div>
    </section>`;
}

/** A piece of a sentence: words, or whom they are about. */
function Piece({ piece }) {
  if (piece.tenant) return html`<${Tenant} id=${piece.tenant} />`;
  return piece.session ? html`<${Session} id=${piece.session} />` : piece;
}

const Meter = ({ label, ratio, hot, note }) => html`
  <div class="meter">
    <div class="row"><span class="muted">${label}</span><b class="num">${percent(ratio)}</b></div>
    <div class=${"bar " + (hot ? "hot" : "")} role="meter" aria-label=${label} aria-valuemin="0" aria-valuemax="100"
      aria-valuenow=${Math.round((ratio || 0) * 100)}><i style=${{ width: Math.min(100, (ratio || 0) * 100) + "%" }}></i></div>
    <span class="muted ell">${note}</span>
  </div>`;

function KeyFigures() {
  const overview = useSnapshot("overview"), history = useSnapshot("history");
  if (overview.error) return html`<section class="panel c7"><${Failure} snapshot=${overview} /></section>`;
  const { rates, saved, sessions, ttft } = overview.data, past = history.data || {};
  const backSoon = rates.early_return_ratio === null ? "none was due back yet" : percent(rates.early_return_ratio, 1) + " back in 60 s";
  return html`
    <section class="panel c7 tiles" aria-label="Key figures">
      <div class="tile"><span class="lab">TTFT p95, by path</span><${TtftByPath} ttft=${ttft} /></div>
      <${Tile} label="Evictions" value=${count(rates.evictions_per_min)} unit="/ min" note=${backSoon}
        column=${past.evm} token="--run" />
      <${Tile} label="Prefill saved" value=${percent(rates.prefill_saved_ratio, 1)}
        note=${`${span(saved.device_seconds)} of device time, ${counted(saved.turns, "turn")}`} column=${past.saved} token="--ok" />
      <${Tile} label="Generated" value=${count(rates.tokens_per_s)} unit="tok/s"
        note=${`${count(sessions.running)} running, ${count(rates.queued)} queued`} column=${past.toks} token="--muted" />
      <${SessionsTile} sessions=${sessions} />
    </section>`;
}

const Tile = ({ label, value, unit, note, column, token }) => html`
  <div class="tile">
    <span class="lab">${label}</span>
    <span class="big">${value}${unit && html`<small>${unit}</small>`}</span>
    <span class="sub">${note}</span>
    <${Spark} column=${column} token=${token} />
  </div>`;

const PATHS = [
  ["hot", "resident", "--c-hot", null], ["reloaded", "reloaded", "--reload", [5, 3]],
  ["reencoded", "re-encoded", "--bad", [1.5, 2.5]], ["fresh", "first turn", "--none", [8, 4]],
];

const figure = (time_ms) => (time_ms < 10_000 ? count(time_ms) : (time_ms / 1000).toFixed(1));

const TtftByPath = ({ ttft }) => html`
  <div class="ttft">
    ${PATHS.map(([path, word, token, dash]) => {
      const { p95_ms: p95, p50_ms: p50, turns } = ttft[path] || {};
      const title = `${counted(turns, "turn")} in the last minute; p50 ${ms(p50)}`;
      return html`
        <div title=${title}>
          <${LineKey} token=${token} dash=${dash} /><span>${word}</span>
          <b>${p95 == null ? NONE : html`${figure(p95)}<small>${p95 < 10_000 ? "ms" : "s"}</small>`}</b>
        </div>`;
    })}
  </div>`;

function SessionsTile({ sessions }) {
  const onDevice = sessions.hot + sessions.running + sessions.reloading;
  const part = (n, least) => ({ width: sessions.total ? (n / sessions.total) * 100 + "%" : 0, minWidth: n ? least : 0 });
  const words = `${count(onDevice)} device · ${count(sessions.warm)} host · ${count(sessions.cold)} disk`;
  return html`
    <div class="tile wide">
      <span class="lab">Sessions</span><span class="big">${count(sessions.total)}</span><span class="sub">${words}</span>
      <div class="mix low" role="img" aria-label=${words}>
        <i class="d" style=${part(onDevice, "3px")}></i><i class="h" style=${part(sessions.warm, "4px")}></i>
        <i class="k" style=${part(sessions.cold, "4px")}></i>
      </div>
      <span class="sub">${count(sessions.none)} history only</span>
    </div>`;
}

function NextVictims({ limit }) {
  const policy = useSnapshot("policy"), { scope } = useContext(Page);
  const victims = (policy.data?.victims || []).filter((victim) => !scope || victim.tenant === scope).slice(0, limit);
  const free = policy.data?.free_bytes;
  const note = free > 0 ? `when ${bytes(free)} more is needed` : free === 0 ? "as soon as a turn needs room" : "";
  const aside = html`<a class="muted" href="#/policy">policy</a>`;
  return html`
    <${Panel} title="Who is evicted next" note=${note} aside=${aside} snapshots=${[policy]}>
      ${() => html`
        <table class="num vic">
          <thead><tr>
            <th scope="col">#</th><th scope="col">Session</th><th scope="col" class="r">Idle</th><th scope="col" class="r">Frees</th>
            <th scope="col" class="r" title="predicted / if encoded again">Return cost</th>
          </tr></thead>
          <tbody>
            ${victims.map((victim) => html`<${Victim} key=${victim.session} victim=${victim} />`)}
            ${!victims.length && html`<tr><td></td><td class="muted" colspan="4">No session of this scope can be evicted now.</td></tr>`}
          </tbody>
        </table>`}
    <//>`;
}

const Victim = ({ victim: { rank, session, tenant, idle_s: idle, frees_bytes: frees, return: cost } }) => html`
  <tr>
    <td>${rank}</td>
    <td class="ell"><${Session} id=${session} /> <span class="muted">${tenant}</span></td>
    <td class="r">${span(idle)}</td><td class="r">${bytes(frees)}</td>
    <td class="r" title=${"encoding it again would take " + ms(cost?.reencode_ms)}>
      <b>${ms(cost?.predicted_ms)}</b> <span class="muted">/ ${ms(cost?.reencode_ms)}</span>
    </td>
  </tr>`;
