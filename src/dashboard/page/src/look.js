/* Which colours may a canvas use? The tokens of style.css, resolved for the theme in force. */

let probe = null;
let palette = new Map();

/** A token's colour, such as `colour("--run")`. */
export function colour(token) {
  if (!palette.has(token)) palette.set(token, resolve(token));
  return palette.get(token);
}

/** The same, mostly transparent, for fills under lines. */
export function faint(token, alpha) {
  const [r, g, b] = colour(token).match(/[\d.]+/g);
  return `rgba(${r}, ${g}, ${b}, ${alpha})`;
}

/** The theme changed: every colour is read anew. */
export function forgetColours() {
  palette = new Map();
}

// A canvas does not understand light-dark(); a styled element does.
function resolve(token) {
  if (!probe) {
    probe = document.createElement("span");
    probe.hidden = true;
    document.body.append(probe);
  }
  probe.style.color = `var(${token})`;
  return getComputedStyle(probe).color;
}

export const FONT = "Inter, system-ui, sans-serif";
