/* Which shapes does the page draw? States and kinds differ by shape as well as by colour. */
import { html } from "../vendor/preact-htm.js";

const stroke = (d) => html`
  <svg class="glyph" viewBox="0 0 16 16" fill="none" stroke="currentColor" stroke-width="1.6"
    stroke-linecap="round" stroke-linejoin="round" aria-hidden="true"><path d=${d} /></svg>`;

const solid = (d) => html`<svg class="glyph" viewBox="0 0 16 16" fill="currentColor" aria-hidden="true"><path d=${d} /></svg>`;

const CROSS = "M4 4l8 8M12 4l-8 8";

export const ICON = {
  flame: solid(
    "M8 1c.6 2.6 4.3 4 4.3 8.2a4.3 4.3 0 0 1-8.6 0c0-1.7.7-2.7 1.7-3.8.1 1.1.5 1.7 1.1 2C6.3 5.4 6.7 3 8 1z",
  ),
  warn: stroke("M8 2.2 14.5 13.5h-13zM8 6.6v3M8 11.6v.1"),
  ok: stroke("M3 8.5 6.5 12 13 4.5"),
  pin: stroke("M6 2.5h4l-.5 4.5 2 2v1h-7v-1l2-2zM8 10v4"),
  close: stroke(CROSS),
  down: stroke("M4.5 6.5 8 10l3.5-3.5"),
  theme: stroke(
    "M8 5.2a2.8 2.8 0 1 0 .01 0M8 1.5v1M8 13.5v1M1.5 8h1M13.5 8h1M3.4 3.4l.7.7M11.9 11.9l.7.7M12.6 3.4l-.7.7M4.1 11.9l-.7.7",
  ),
  help: stroke("M6 6.2a2 2 0 1 1 2.8 1.9c-.6.3-.8.7-.8 1.4M8 12.3v.1"),
  leave: stroke("M9.5 2.5h-6v11h6M6.5 8h8M11.5 5l3 3-3 3"),
};

/** By the kind of a journal entry. */
export const KIND_ICON = {
  evict: stroke("M8 2.5v8M4.5 7.5 8 11l3.5-3.5M3 13.5h10"),
  offload: stroke("M3 5h10v6H3zM6 8h.01M9 8h3"),
  reload: stroke("M8 13.5v-8M4.5 8.5 8 5l3.5 3.5M3 2.5h10"),
  reencode: stroke("M12.5 6A5 5 0 1 0 13 8.5M13 2.5V6H9.5"),
  drop: stroke(CROSS),
  refuse: stroke("M8 2.5a5.5 5.5 0 1 0 .01 0M8 5v3.2l2 1.3"),
  preempt: stroke("M12.5 3.5v9M10 8H3M6 5 3 8l3 3"),
  mismatch: stroke("M4 6h8M4 10h8M10.5 3l-5 10"),
  bad_slot: stroke("M3 3h10v10H3zM6 6l4 4M10 6l-4 4"),
  action: stroke("M5.5 7.5V3.5M8 7V2.5M10.5 7.5V3.5M5.5 6 4 8.5 6 13h5l1.5-4V6"),
};

const mark = (inner) => html`<svg viewBox="0 0 12 12" aria-hidden="true">${inner}</svg>`;

/** By the state of a session. */
export const SHAPE = {
  running: mark(html`<circle cx="6" cy="6" r="5" fill="currentColor" /><circle cx="6" cy="6" r="1.8" fill="var(--panel)" />`),
  hot: mark(html`<rect x="1" y="1" width="10" height="10" rx="2" fill="currentColor" />`),
  warm: mark(html`<path d="M1 2.5h10M1 6h10M1 9.5h10" stroke="currentColor" stroke-width="2" />`),
  cold: mark(html`<g fill="currentColor">
    <circle cx="2.5" cy="2.5" r="1.5" /><circle cx="6" cy="6" r="1.5" /><circle cx="9.5" cy="2.5" r="1.5" />
    <circle cx="2.5" cy="9.5" r="1.5" /><circle cx="9.5" cy="9.5" r="1.5" /></g>`),
  reloading: mark(html`<path d="M6 11V2M2 5.5 6 1.5l4 4" stroke="currentColor" stroke-width="2" fill="none" />`),
  none: mark(html`<rect x="1.7" y="1.7" width="8.6" height="8.6" rx="2" fill="none" stroke="currentColor"
    stroke-width="1.4" stroke-dasharray="2 1.5" />`),
  pinned: ICON.pin,
};
