/* In which order would sessions go, by which rule, and what if the rule were another? */
import { html, useContext } from "../../vendor/preact-htm.js";
import { ICON } from "../icons.js";
import { Faults, Page, Panel, Session, Tenant } from "../parts.js";
import { useSnapshot } from "../store.js";
import { NONE, POLICY, bytes, count, counted, ms, noun, percent, ruleName, span } from "../words.js";
import { WhatIf } from "./whatif.js";

const MOST_VICTIMS = 24;

export const Policy = () => html`
  <div class="grid">
    <div class="c8 stack"><${Order} /><${Bounds} /></div>
    <div class="c4 stack"><${WhatIf} /><${RuleInWords} /></div>
  </div>`;

function Order() {
  const policy = useSnapshot("policy"), { scope } = useContext(Page);
  const victims = (policy.data?.victims || []).filter((victim) => !scope || victim.tenant === scope).slice(0, MOST_VICTIMS);
  const note = policy.data && `${POLICY[policy.data.active.policy] || policy.data.active.policy}, live`;
  const aside = policy.data && html`<${Faults} faults=${policy.data.isolation_faults} />`;
  return html`
    <${Panel} title="Order of next victims" note=${note} aside=${aside} snapshots=${[policy]}>
      ${() => html`
        <div class="scroll" tabindex="0" role="region" aria-label="Table of next victims">
          <table class="num order">
            <thead><tr>
              <th scope="col">#</th><th scope="col">Session</th><th scope="col">Tenant</th><th scope="col" class="r">Idle</th>
              <th scope="col" class="r">Frees</th><th scope="col">Copy</th>
              <th scope="col" class="r" title="predicted / if encoded again">Return cost</th>
              <th scope="col" class="r" title="how often those like it came back">Returns/min</th>
              <th scope="col">Why</th>
            </tr></thead>
            <tbody>
              ${victims.map((victim, i) => html`
                ${startsGroup(victims, i) && html`<${Group} over=${isOver(victim)} />`}
                <${Victim} key=${victim.session} victim=${victim} />`)}
              ${!victims.length && html`<tr><td colspan="9" class="muted">No session of this scope can be evicted now.</td></tr>`}
            </tbody>
          </table>
        </div>
        <${Protected} groups=${policy.data.protected} />`}
    <//>`;
}

const isOver = (victim) => victim.rule === "over_ceiling" || victim.of_ceiling > 1;
const startsGroup = (victims, i) => i === 0 || isOver(victims[i - 1]) !== isOver(victims[i]);

const Group = ({ over }) => html`
  <tr class="grp"><td colspan="9">${over
    ? html`${ICON.warn}<b>Tenants over their ceiling</b> <span class="muted">go first; those that ended before the others</span>`
    : html`<b>Everyone above their floor</b> <span class="muted">ended conversations first</span>`}</td></tr>`;

function Victim({ victim }) {
  const { rank, session, tenant, of_ceiling: part, idle_s: idle, frees_bytes: frees, clean, return: cost, rate_per_min: rate } = victim;
  return html`
    <tr>
      <td>${rank}</td>
      <td><${Session} id=${session} /></td>
      <td><${Tenant} id=${tenant} /> ${part != null && html`<span class="muted">${percent(part)}</span>`}</td>
      <td class="r">${span(idle)}</td><td class="r">${bytes(frees)}</td>
      <td>${clean ? "ready" : html`<span class="muted">must copy</span>`}</td>
      <td class="r"><b>${ms(cost?.predicted_ms)}</b> <span class="muted">/ ${ms(cost?.reencode_ms)}</span></td>
      <td class="r">${rate == null ? NONE : rate < 0.1 ? rate.toPrecision(2) : rate.toFixed(1)}</td>
      <td class="why muted"><div class="two-lines" title=${why(victim)}>${why(victim)}</div></td>
    </tr>`;
}

/** The rule, unless the group's heading or the policy says it already; then what it was judged by. */
function why({ rule, class: likeIt }) {
  const plain = rule === "over_ceiling" || rule === "return_rate";
  return likeIt && plain ? likeIt : [ruleName(rule), likeIt].filter(Boolean).join(", ");
}

function Protected({ groups: { running, pinned, below_floor: floor } }) {
  return html`
    <div class="pad muted">
      Never chosen: ${count(running)} running, ${count(pinned)} pinned, and those of${" "}
      ${counted(floor, "tenant that is at or below its floor", "tenants that are at or below their floor")}, for another tenant.
    </div>`;
}

/** What each tenant is guaranteed and where it stops, beside what it uses. */
function Bounds() {
  const policy = useSnapshot("policy");
  return html`
    <${Panel} title="Floors and ceilings" note="device memory" snapshots=${[policy]}>
      ${() => html`
        <div class="scroll" tabindex="0" role="region" aria-label="Table of floors and ceilings">
          <table class="num">
            <thead><tr>
              <th scope="col">Tenant</th><th scope="col" class="r">Uses</th><th scope="col" class="r">Floor</th>
              <th scope="col" class="r">Ceiling</th><th scope="col" class="r">Of ceiling</th>
            </tr></thead>
            <tbody>
              ${(policy.data.tenants || []).map((tenant) => html`<${Bound} key=${tenant.id} tenant=${tenant} />`)}
              ${!policy.data.tenants?.length && html`<tr><td colspan="5" class="muted">No tenant has had a turn yet.</td></tr>`}
            </tbody>
          </table>
        </div>`}
    <//>`;
}

function Bound({ tenant: { id, used_bytes: used, floor_bytes: floor, ceiling_bytes: ceiling } }) {
  const part = ceiling ? used / ceiling : null;
  return html`
    <tr>
      <td><${Tenant} id=${id} /></td><td class="r">${bytes(used)}</td><td class="r">${bytes(floor)}</td>
      <td class="r">${bytes(ceiling)}</td>
      <td class="r">${part > 1 ? html`<b class="k-drop">▲ ${percent(part)}</b>` : percent(part)}</td>
    </tr>`;
}

function RuleInWords() {
  const policy = useSnapshot("policy");
  return html`
    <${Panel} title="The rule, in words" snapshots=${[policy]}>
      ${() => html`<${Words} active=${policy.data.active} free=${policy.data.free_bytes} />`}
    <//>`;
}

function Words({ active, free }) {
  const byRate = active.policy === "return_rate";
  const silences = html`<b>${count(active.learned_silences)}</b> ${noun(active.learned_silences, "silence")}`;
  const learned = active.learned_enough
    ? html`, judged from ${silences} seen here`
    : html`; until enough was seen (${silences} so far), the one silent the longest`;
  return html`
    <div class="pad">
      <ol class="rules">
        <li>Room is made when a turn needs it: <b>${bytes(free)}</b> of ${bytes(active.device_bytes)} are free now.</li>
        <li><b>Tenants over their ceiling first</b>; nobody is pushed below a floor for another.</li>
        <li>A turn of a tenant <b>at its ceiling displaces only its own</b> sessions, or waits.</li>
        <li>Among those, conversations that <b>ended</b>; then ${byRate
          ? html`<b>the least likely to return</b>${learned}` : html`the one <b>silent the longest</b>`}.</li>
        ${active.eviction_doubles_at > 0 && html`
          <li>Length counts: at <b>${counted(active.eviction_doubles_at, "token")}</b>, a return is worth twice as much.</li>`}
        <li>Inside a session, <b>tail blocks first</b>${active.front_first_from
          ? html`; from ${counted(active.front_first_from, "token")} on, the front first` : ""}: prefixes are worth more.</li>
        <li>${active.background_offload
          ? "Idle sessions are copied down ahead of need, so that evicting waits for no copy."
          : "Nothing is copied ahead of need: an eviction waits for its copy."}</li>
      </ol>
      <p class="muted facts-line">
        KV is ${active.kv_dtype} on the device, ${active.cold_dtype === "same" ? "the same" : active.cold_dtype} below it;
        host ${bytes(active.host_bytes)}, disk ${bytes(active.disk_bytes)}.
      </p>
    </div>`;
}
