/* What is a session made of? Its blocks by tier, its turns by where their time went, its forks. */
import { html, useContext, useEffect, useRef } from "../../vendor/preact-htm.js";
import { colour } from "../look.js";
import { Bar, Page, Session } from "../parts.js";
import { useSnapshot } from "../store.js";
import { PATH, STATE, bytes, count, counted, minute, ms } from "../words.js";

const COLUMNS = 50, MOST_CELLS = 300;
const TIER_TOKEN = { device: "--hot1", host: "--warm0", disk: "--cold0" };

/** A cell for each block, or for several where there are many; coloured by the highest tier that has it. */
export function Blocks({ session: { blocks, bytes: held, holding } }) {
  const { look } = useContext(Page);
  const overview = useSnapshot("overview");
  const canvas = useRef();
  const perCell = Math.max(1, Math.ceil(blocks.total / MOST_CELLS));
  const runs = blocks.runs || [];
  useEffect(() => drawBlocks(canvas.current, blocks.total, runs, perCell), [look, blocks.total, JSON.stringify(runs)]);
  if (!blocks.total) return html`<p class="muted">It has no blocks: nothing was encoded yet, or all of it was dropped.</p>`;
  const size = overview.data?.model.block_size;
  const legend = Object.entries(byTier(blocks.total, runs)).filter(([, n]) => n > 0);
  return html`
    <canvas class="blocks" ref=${canvas} role="img"
      aria-label=${`${counted(blocks.total, "block")}: ${legend.map(([tier, n]) => `${n} ${TIER_WORD[tier]}`).join(", ")}`}></canvas>
    <div class="legend gap">
      <span>
        ${counted(blocks.total, "block")}${size ? ` of ${counted(size, "token")}` : ""}${perCell > 1 ? ` (1 cell = ${perCell})` : ""}
      </span>
      ${legend.map(([tier, n]) => html`<span><i class=${"key tier-" + tier}></i>${count(n)} ${TIER_WORD[tier]}</span>`)}
      ${held.shared > 0 && html`<span>${bytes(held.shared)} shared${ofIt(holding)}</span>`}
    </div>`;
}

const TIER_WORD = { device: "on the device", host: "in host memory", disk: "on disk", none: "in no tier" };

/** Its part of what it shares, as it is counted against its tenant. */
function ofIt(holding) {
  const parts = Object.entries(holding || {}).filter(([, n]) => n > 0).map(([tier, n]) => `${bytes(n)} ${TIER_WORD[tier]}`);
  return parts.length ? `; its part: ${parts.join(", ")}` : "";
}

const known = (tier) => (TIER_TOKEN[tier] ? tier : "none");

function byTier(total, runs) {
  const counts = { device: 0, host: 0, disk: 0, none: 0 };
  for (const run of runs) counts[known(run.tier)] += run.to - run.from;
  counts.none += Math.max(0, total - runs.reduce((n, run) => n + run.to - run.from, 0));
  return counts;
}

function drawBlocks(canvas, total, runs, perCell) {
  if (!canvas) return;
  const cells = Math.ceil(total / perCell), width = canvas.clientWidth, cell = width / COLUMNS, ratio = devicePixelRatio || 1;
  const height = Math.ceil(cells / COLUMNS) * cell;
  canvas.style.height = height + "px";
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const g = canvas.getContext("2d");
  g.scale(ratio, ratio);
  for (let i = 0; i < cells; i++) {
    const run = runs.find((r) => i * perCell >= r.from && i * perCell < r.to);
    g.fillStyle = colour(TIER_TOKEN[run?.tier] || "--grid");
    g.fillRect((i % COLUMNS) * cell, Math.floor(i / COLUMNS) * cell, cell - 1.5, cell - 1.5);
  }
}

const PARTS = [
  ["wait_ms", "wait", "sg-wait"], ["reload_ms", "reload", "sg-reload"], ["reencode_ms", "re-encode", "sg-enc"],
  ["prefill_ms", "new tokens", "sg-pre"],
];

/** Where the time to the first token went, turn by turn. */
export function Turns({ turns }) {
  if (!turns.length) return html`<p class="muted">No turn since the server's start.</p>`;
  const longest = Math.max(...turns.map((turn) => turn.ttft_ms || 0), 1e-9);
  return html`
    <div class="legend gap">
      ${PARTS.map(([, word, mark]) => html`<span><i class=${"key " + mark}></i>${word}</span>`)}
    </div>
    <div class="tl num">${turns.map((turn) => html`<${Turn} key=${turn.n} turn=${turn} longest=${longest} />`)}</div>`;
}

function Turn({ turn, longest }) {
  let at = 0;
  const segments = PARTS.map(([field, , mark]) => {
    const took = turn[field] || 0, left = at;
    at += took;
    return took > 0 && html`<i class=${mark} style=${{ left: (left / longest) * 100 + "%", width: (took / longest) * 100 + "%" }}></i>`;
  });
  const words = `${counted(turn.history_tokens, "token")} of history, ${count(turn.input_tokens)} in, ${count(turn.output_tokens)} out`;
  return html`
    <div title=${`${PATH[turn.path] || turn.path}; ${words}; ${ms(turn.decode_ms)} to generate`}>
      <span class="muted">#${turn.n}</span><span class="muted">${minute(turn.ts)}</span>
      <div class="seg" role="img" aria-label=${`turn ${turn.n}: ${PATH[turn.path] || turn.path}, ${ms(turn.ttft_ms)}`}>${segments}</div>
      <span class="muted">${PATH[turn.path] || ""}</span><span class="r">${ms(turn.ttft_ms)}</span>
    </div>`;
}

/** The tree that this session is part of, each as long as its tokens. */
export function Forks({ session }) {
  const forks = session.forks || [];
  if (forks.length < 2) return html`<p class="muted">Never forked.</p>`;
  const parents = new Map(forks.map((fork) => [fork.id, fork.parent]));
  const longest = Math.max(...forks.map((fork) => fork.tokens || 0), 1);
  return html`
    <ul class="forks">
      ${forks.map((fork) => html`
        <li key=${fork.id} class=${fork.self ? "self" : ""}>
          <span style=${{ paddingLeft: depth(fork, parents) * 14 + "px" }}>${fork.parent ? "└ " : ""}<${Session} id=${fork.id} /></span>
          <${Bar} ratio=${(fork.tokens || 0) / longest} kind=${fork.self ? "hot" : ""} />
          <span class="num r">${counted(fork.tokens, "token")}</span>
          <span class="muted">${fork.self ? "this one" : (STATE[fork.state] || "").toLowerCase()}</span>
        </li>`)}
    </ul>`;
}

function depth(fork, parents) {
  let n = 0;
  for (let id = fork.parent; id && parents.has(id) && n < 8; id = parents.get(id)) n += 1;
  return n;
}
