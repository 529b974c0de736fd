/* Where do sessions live? The map of each tier, to look at, point at, and walk through with the arrow keys. */
import { html, useContext, useEffect, useMemo, useRef, useState } from "../../vendor/preact-htm.js";
import { ICON, SHAPE } from "../icons.js";
import { draw, idleOf, layOut } from "../map.js";
import { Page, Panel } from "../parts.js";
import { serverNow, useSnapshot } from "../store.js";
import { STATE, TIER, bytes, count, counted, percent, shortId, span } from "../words.js";

const HEIGHT = { device: 178, host: 38, disk: 38 };
const COOLS_EVERY_MS = 5_000;

export function ResidencyMap() {
  const { open, go, scope } = useContext(Page);
  const overview = useSnapshot("overview"), device = useSnapshot("device");
  const host = useSnapshot("host"), disk = useSnapshot("disk"), tenants = useSnapshot("tenants");
  const [tip, setTip] = useState(null);
  const list = (state) => (box) => go("sessions", { tenant: box.tenant.id, state });
  const pick = {
    device: (box) => (box.cell.s ? open(box.cell.s) : list("hot")(box)), host: list("warm"), disk: list("cold"),
  };
  const ceilings = Object.fromEntries((tenants.data?.items || []).map((tenant) => [tenant.id, tenant.device.ceiling_bytes]));
  const tiers = Object.entries({ device, host, disk });
  return html`
    <${Panel} title="Where sessions live" note="width = bytes; free space is hatched" size="c8 map"
      aside=${html`<${Legend} />`} snapshots=${[overview, device]}>
      ${() => html`
        ${tiers.map(([name, snapshot]) => html`
          <${Tier} key=${name} info=${overview.data.tiers.find((tier) => tier.tier === name)} snapshot=${snapshot}
            scope=${scope} ceilings=${ceilings} onPick=${pick[name]} onTip=${setTip} />`)}
        ${tip && html`<${Tip} ...${tip} />`}`}
    <//>`;
}

const Legend = () => html`
  <div class="legend">
    <span>
      <i class="ramp">${[0, 1, 2, 3, 4].map((i) => html`<i style=${{ background: `var(--hot${i})` }}></i>`)}</i>idle 20 s → 5 m
    </span>
    <span class="st st-running">${SHAPE.running}running</span>
    <span class="st st-reloading">${SHAPE.reloading}reloading</span>
    <span class="st">${ICON.pin}pinned</span>
    <span><b>1</b> next victim</span>
  </div>`;

const HOW_TO_TURN_ON = {
  host: "Off: evicted sessions go to disk, or are encoded again. Turn it on with kv.host_bytes.",
  disk: "Off: what host memory cannot hold is encoded again, and nothing survives a restart. Turn it on with kv.disk_bytes.",
};

function Tier({ info, snapshot, ...rest }) {
  if (!info) return null;
  if (!info.enabled && info.tier !== "device") {
    return html`
      <div class="tier off">
        <div class="cap"><b>${TIER[info.tier]}</b><span class="muted">${HOW_TO_TURN_ON[info.tier]}</span></div>
      </div>`;
  }
  return html`
    <div class="tier">
      <${Caption} info=${info} />
      ${snapshot.error
        ? html`<p class="muted">${snapshot.error.message} <button class="lnk" onClick=${snapshot.retry}>Retry</button></p>`
        : snapshot.data
          ? html`<${Canvas} info=${info} map=${snapshot.data} version=${snapshot.version} ...${rest} />`
          : html`<div class="skel" style=${{ height: HEIGHT[info.tier] + "px" }}></div>`}
    </div>`;
}

function Caption({ info }) {
  const full = info.capacity_bytes ? percent(info.used_bytes / info.capacity_bytes) : "–";
  const facts = [
    info.pinned_bytes > 0 && `${bytes(info.pinned_bytes)} pinned`,
    info.waiting_bytes > 0 && `${bytes(info.waiting_bytes)} to be overwritten`,
    info.bad_slots > 0 && counted(info.bad_slots, "bad slot"),
    `in ${bytes(info.in_bps)}/s · out ${bytes(info.out_bps)}/s`,
  ];
  return html`
    <div class="cap">
      <b>${TIER[info.tier]}</b>
      <span class="num">${bytes(info.used_bytes)} of ${bytes(info.capacity_bytes)} <span class="muted">· ${full}</span></span>
      <span class="muted num">${counted(info.sessions, "session")}</span>
      ${info.resting && html`
        <span class="pill watch" title="It refused a write a moment ago, and is left alone">${ICON.warn}resting</span>`}
      <span class="grow"></span>
      <span class="muted num ell">${facts.filter(Boolean).join(" · ")}</span>
    </div>`;
}

function Canvas({ info, map, version, scope, ceilings, onPick, onTip }) {
  const { look } = useContext(Page);
  const canvas = useRef();
  const width = useWidth(canvas);
  const cooling = useBeat(info.tier === "device" ? COOLS_EVERY_MS : null);
  const [chosen, setChosen] = useState(-1);
  const height = HEIGHT[info.tier];
  const plan = useMemo(() => layOut(map, width, height, scope), [map, version, width, scope]);
  useEffect(() => {
    if (width) draw(canvas.current, map, plan, { scope, chosen, ceilings, now: serverNow() });
  }, [plan, chosen, look, cooling]);

  const under = (event) => {
    const box = canvas.current.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    return plan.boxes.find((b) => x >= b.x && x < b.x + b.w && y >= b.y && y < b.y + b.h);
  };
  const point = (event) => {
    const box = under(event);
    onTip(box ? { box, x: event.clientX, y: event.clientY } : null);
  };
  const pick = (event) => {
    const box = under(event);
    if (box) onPick(box);
  };
  const walk = (event) => {
    if (event.key === "Enter" && plan.boxes[chosen]) return onPick(plan.boxes[chosen]);
    const to = step(event.key, chosen, plan.boxes.length - 1);
    if (to === null) return;
    event.preventDefault();
    setChosen(to);
  };
  const said = plan.boxes[chosen] ? describe(plan.boxes[chosen]) : "";
  const full = percent(info.capacity_bytes ? info.used_bytes / info.capacity_bytes : 0);
  return html`
    <canvas ref=${canvas} tabindex="0" role="img" style=${{ height: height + "px" }}
      aria-label=${`${TIER[info.tier]} by tenant and session, ${full} full. Arrow keys inspect, Enter opens. ${said}`}
      onMouseMove=${point} onMouseLeave=${() => onTip(null)} onClick=${pick} onKeyDown=${walk}
      onBlur=${() => setChosen(-1)}></canvas>
    <span class="sr" aria-live="polite">${said}</span>`;
}

function step(key, at, last) {
  if (key === "ArrowRight" || key === "ArrowDown") return Math.min(last, at + 1);
  if (key === "ArrowLeft" || key === "ArrowUp") return Math.max(0, at - 1);
  if (key === "Home") return 0;
  return key === "End" ? last : null;
}

/** The width that an element has, in CSS pixels. */
function useWidth(ref) {
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const resized = new ResizeObserver(() => ref.current && setWidth(ref.current.clientWidth));
    resized.observe(ref.current);
    setWidth(ref.current.clientWidth);
    return () => resized.disconnect();
  }, []);
  return width;
}

function useBeat(everyMs) {
  const [beat, setBeat] = useState(0);
  useEffect(() => {
    if (!everyMs) return undefined;
    const timer = setInterval(() => setBeat((n) => n + 1), everyMs);
    return () => clearInterval(timer);
  }, [everyMs]);
  return beat;
}

function describe({ cell, tenant }) {
  if (!cell.s) return `${tenant.id}: ${counted(cell.n, "session")} idle ${cell.bucket}, ${bytes(cell.bytes)}`;
  const facts = [shortId(cell.s), tenant.id, STATE[cell.st], cell.pin && "pinned", bytes(cell.bytes)];
  const idle = idleOf(cell, serverNow());
  if (idle !== null) facts.push(`idle ${span(idle)}`);
  if (cell.rank) facts.push(`number ${cell.rank} in the order of eviction`);
  return facts.filter(Boolean).join(", ");
}

const TIP_WIDTH = 250, TIP_HEIGHT = 150;

function Tip({ box: { cell, tenant }, x, y }) {
  const place = {
    left: Math.min(innerWidth - TIP_WIDTH - 14, x + 14) + "px", top: Math.min(innerHeight - TIP_HEIGHT, y + 14) + "px",
    width: TIP_WIDTH + "px",
  };
  const facts = cell.s
    ? [["Tenant", tenant.id], ["State", STATE[cell.st] + (cell.pin ? " · pinned" : "")], ["On the device", bytes(cell.bytes)],
      ["Idle", span(idleOf(cell, serverNow()))], cell.rank && ["Order of eviction", "#" + cell.rank]]
    : [["Idle", cell.bucket], ["Sessions", count(cell.n)], ["Bytes", bytes(cell.bytes)]];
  return html`
    <div class="tip" style=${place}>
      ${cell.s ? html`<b class="mono">${shortId(cell.s)}</b>` : html`<b>${tenant.id}</b>`}
      <dl>${facts.filter(Boolean).map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}</dl>
      ${!cell.s && html`<span class="muted">Click to list them</span>`}
    </div>`;
}
