/* For how long is a session pinned? A menu beside the pin, which pins for as long as the server does by itself. */
import { html, useContext, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { ICON } from "../icons.js";
import { Page } from "../parts.js";

/** A pin always ends: the longest that a server allows, unless it is set up otherwise, is a day. */
const LENGTHS = [[900, "15 minutes"], [3600, "1 hour"], [28_800, "8 hours"], [86_400, "24 hours"]];

export function PinFor({ row }) {
  const { act } = useContext(Page);
  const [isOpen, setOpen] = useState(false);
  const button = useRef(), menu = useRef();
  useEffect(() => {
    if (!isOpen) return;
    menu.current.showPopover();
    place(menu.current, button.current.getBoundingClientRect());
    menu.current.firstElementChild.focus();
  }, [isOpen]);
  const close = () => {
    setOpen(false);
    button.current.focus();
  };
  const keys = (event) => {
    event.stopPropagation();
    const to = walk(event.key, [...menu.current.children], document.activeElement);
    if (!to && event.key !== "Escape" && event.key !== "Tab") return;
    event.preventDefault();
    if (to) to.focus();
    else close();
  };
  const pin = (seconds) => {
    close();
    act(row, "pin", { ttl_seconds: seconds });
  };
  return html`
    <button class="btn sm icon ghost more" ref=${button} aria-label=${`How long to pin ${row.id}`} title="Pin for how long"
      aria-haspopup="menu" aria-expanded=${isOpen} onClick=${() => setOpen(!isOpen)}>${ICON.down}</button>
    ${isOpen && html`
      <div class="menu" ref=${menu} popover="auto" role="menu" aria-label="Pin for" onKeyDown=${keys}
        onToggle=${(event) => event.newState === "closed" && setOpen(false)}>
        ${LENGTHS.map(([seconds, word]) => html`
          <button role="menuitem" tabindex="-1" onClick=${() => pin(seconds)}>Pin for ${word}</button>`)}
      </div>`}`;
}

/** Under what opened it, or over it where there is no room. */
function place(menu, { left, right, top, bottom }) {
  const { offsetWidth: width, offsetHeight: height } = menu;
  const under = bottom + 4 + height < innerHeight;
  menu.style.left = `${Math.max(8, Math.min(left, right - width, innerWidth - width - 8))}px`;
  menu.style.top = `${under ? bottom + 4 : top - 4 - height}px`;
}

/** Where a key leads from an item; null where it leads nowhere. */
function walk(key, items, from) {
  const at = items.indexOf(from), last = items.length - 1;
  const to = { ArrowDown: at === last ? 0 : at + 1, ArrowUp: at <= 0 ? last : at - 1, Home: 0, End: last }[key];
  return items[to] || null;
}
