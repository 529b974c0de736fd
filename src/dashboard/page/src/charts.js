/* How do figures look over time? uPlot for the last minutes, an inline shape for a tile. */
import uPlot from "../vendor/uplot.js";
import { html, useContext, useEffect, useRef } from "../vendor/preact-htm.js";
import { FONT, colour, faint } from "./look.js";
import { LineKey, Page, Panel } from "./parts.js";
import { useSnapshot } from "./store.js";
import { NONE, brief, bytes, count, minute } from "./words.js";

const DASHED = [5, 3], DOTTED = [1.5, 2.5], LONG = [8, 4];
const percents = (v) => v.toFixed(0) + " %";
const perSecond = (v) => bytes(v) + "/s";

/** `low`: the column of the band's lower edge. */
export const CHART = {
  ttft: {
    title: "TTFT", unit: "ms, p50 / p95, log scale", log: true, two: true, format: (v) => (v < 10_000 ? count(v) : brief(v)),
    series: [
      { key: "hot95", low: "hot50", label: "resident", token: "--c-hot" },
      { key: "rel95", low: "rel50", label: "reloaded", token: "--reload", dash: DASHED },
      { key: "enc95", low: "enc50", label: "re-enc.", token: "--bad", dash: DOTTED },
      { key: "fresh95", low: "fresh50", label: "first", token: "--none", dash: LONG },
    ],
  },
  occupancy: {
    title: "Tier occupancy", unit: "% of capacity", max: 100, format: percents,
    series: [
      { key: "dev", label: "device", token: "--c-hot" },
      { key: "host", label: "host", token: "--warm", dash: DASHED },
      { key: "disk", label: "disk", token: "--cold", dash: DOTTED },
    ],
  },
  evictions: {
    title: "Evictions", unit: "per minute", format: count,
    series: [{ key: "evm", label: "evictions", token: "--run", fill: true }],
  },
  transfer: {
    title: "Transfer", unit: "bytes per second", format: perSecond,
    series: [
      { key: "inb", label: "up", token: "--reload", dash: DASHED },
      { key: "outb", label: "down", token: "--warm" },
    ],
  },
  tokens: {
    title: "Tokens", unit: "per second", format: count,
    series: [
      { key: "toks", label: "generated", token: "--c-hot", fill: true },
      { key: "pre", label: "prefilled", token: "--cold", dash: DASHED },
    ],
  },
  saved: {
    title: "Prefill saved", unit: "% of prompt tokens", max: 100, format: percents,
    series: [{ key: "saved", label: "saved", token: "--ok", fill: true }],
  },
};

export function Chart({ chart, height = 128 }) {
  const history = useSnapshot("history");
  return html`
    <${Panel} title=${chart.title} note=${chart.unit} size="chart" snapshots=${[history]}>
      ${() => html`<${Plot} chart=${chart} height=${height} history=${history} />`}
    <//>`;
}

function Plot({ chart, height, history: { data, version } }) {
  const { range, look } = useContext(Page);
  const box = useRef(), plot = useRef();
  useEffect(() => {
    const { clientWidth: width } = box.current;
    plot.current = new uPlot({ width, height, ...options(chart) }, columns(chart, data, range), box.current);
    const resized = new ResizeObserver(() => {
      if (box.current?.clientWidth) plot.current.setSize({ width: box.current.clientWidth, height });
    });
    resized.observe(box.current);
    return () => {
      resized.disconnect();
      plot.current.destroy();
    };
  }, [look, chart]);
  useEffect(() => plot.current.setData(columns(chart, data, range)), [version, range]);
  return html`
    <div class=${chart.two ? "leg two" : "leg"}>
      ${chart.series.map((line) => html`<${Key} line=${line} chart=${chart} data=${data} />`)}
    </div>
    <div class="plot" ref=${box} role="img" aria-label=${spoken(chart, data)}></div>`;
}

function Key({ line, chart, data }) {
  const low = line.low && newest(data[line.low]) != null ? chart.format(newest(data[line.low])) + "/" : "";
  return html`
    <span><${LineKey} token=${line.token} dash=${line.dash} />${line.label} <b>${low}${said(chart, data, line)}</b></span>`;
}

const newest = (column = []) => column.findLast((value) => value != null);

function said(chart, data, line) {
  const value = newest(data[line.key]);
  return value == null ? NONE : chart.format(value);
}

const spoken = (chart, data) =>
  `${chart.title}, ${chart.unit}. Newest: ` +
  chart.series.map((line) => `${line.label} ${said(chart, data, line)}`).join(", ");

/** Time, then the lines, then the lower edges of their bands. */
function columns(chart, data, range) {
  const from = Math.max(0, data.ts.findIndex((ts) => ts >= (data.ts.at(-1) ?? 0) - range));
  const keys = [...chart.series.map((line) => line.key), ...lows(chart).map((line) => line.low)];
  return [data.ts, ...keys.map((key) => data[key] || [])].map((column) => column.slice(from));
}

const lows = (chart) => chart.series.filter((line) => line.low);

function options(chart) {
  const first = chart.series.length + 1;
  return {
    legend: { show: false },
    padding: [8, 8, 0, 0],
    cursor: { sync: { key: "rekindle" }, y: false, points: { size: 5 }, drag: { x: false, y: false } },
    scales: { x: { time: true }, y: chart.log ? { distr: 3, log: 10, range: decades } : { range: fromZero(chart.max) } },
    axes: [timeAxis(), chart.log ? logAxis() : plainAxis(chart)],
    series: [{}, ...chart.series.map(lineOf), ...lows(chart).map((line) => ({ stroke: colour(line.token), width: 0, ...QUIET }))],
    bands: lows(chart).map((line, i) => ({ series: [chart.series.indexOf(line) + 1, first + i], fill: faint(line.token, 0.15) })),
  };
}

const QUIET = { spanGaps: true, points: { show: false } };

const lineOf = (line) => ({
  label: line.label, stroke: colour(line.token), width: 1.6, dash: line.dash,
  fill: line.fill ? faint(line.token, 0.13) : undefined, ...QUIET,
});

const fromZero = (max) => (_, low, high) => [0, max || (high > 0 ? high * 1.12 : 1)];

/** Whole decades around the data, one at the least. */
function decades(_, low, high) {
  if (!(low > 0)) return [10, 1000];
  const from = Math.floor(Math.log10(low)), to = Math.max(from + 1, Math.ceil(Math.log10(high)));
  return [10 ** from, 10 ** to];
}

const axis = (more) => ({
  stroke: colour("--muted"), ticks: { show: false }, font: `11px ${FONT}`, grid: { stroke: colour("--grid"), width: 1 }, ...more,
});

const timeAxis = () => axis({ size: 22, space: 70, values: (_, seconds) => seconds.map((s) => minute(s * 1000)) });

const plainAxis = (chart) =>
  axis({ size: 40, space: 28, values: (_, values) => values.map((v) => (chart.max ? v : brief(v))) });

function logAxis() {
  const isDecade = (v) => Math.abs(Math.log10(v) % 1) < 1e-9;
  const values = (_, splits) => splits.map((v) => (isDecade(v) ? brief(v) : ""));
  const filter = (_, splits) => splits.map((v) => (isDecade(v) ? v : null));
  return axis({ size: 40, space: 4, values, grid: { stroke: colour("--grid"), width: 1, filter } });
}

/** The last two minutes of a column, for a tile; gaps stay gaps. */
export function Spark({ column, token, samples = 120 }) {
  const W = 160, H = 26;
  const values = (column || []).slice(-samples);
  const known = values.filter((v) => v != null);
  if (known.length < 2) return html`<svg class="spark" viewBox=${`0 0 ${W} ${H}`} aria-hidden="true"></svg>`;
  const low = Math.min(...known), high = Math.max(...known, low + 1e-6);
  const x = (i) => ((i / (values.length - 1)) * W).toFixed(1);
  const y = (v) => (H - 2 - ((v - low) / (high - low)) * (H - 5)).toFixed(1);
  const points = values.flatMap((v, i) => (v == null ? [] : [`${x(i)},${y(v)}`]));
  const [firstX, lastX] = [points[0], points.at(-1)].map((point) => point.split(",")[0]);
  return html`
    <svg class="spark" viewBox=${`0 0 ${W} ${H}`} preserveAspectRatio="none" aria-hidden="true">
      <polygon points=${`${firstX},${H} ${points.join(" ")} ${lastX},${H}`} fill=${`var(${token})`} opacity=".13" />
      <polyline points=${points.join(" ")} fill="none" stroke=${`var(${token})`} stroke-width="1.5"
        vector-effect="non-scaling-stroke" />
    </svg>`;
}
