/* What holds the page together? The route in the hash, the header, the keys, toasts and dialogs. */
import { html, render, useEffect, useLayoutEffect, useRef, useState } from "../vendor/preact-htm.js";
import { actions } from "./actions.js";
import { Banners, Empty, Header, PAGES, Skeleton, Toasts } from "./frame.js";
import { forgetColours } from "./look.js";
import { Page } from "./parts.js";
import { connected, setRange, setScope, start, togglePause, useFact, useLink } from "./store.js";
import { Dialog } from "./views/dialogs.js";
import { Drawer } from "./views/drawer.js";
import { Evictions } from "./views/evictions.js";
import { Login } from "./views/login.js";
import { Overview } from "./views/overview.js";
import { Policy } from "./views/policy.js";
import { Sessions } from "./views/sessions.js";
import { Tenants } from "./views/tenants.js";

const VIEWS = { overview: Overview, tenants: Tenants, sessions: Sessions, evictions: Evictions, policy: Policy };
const DEFAULT_RANGE = 600;
/** What stays when one goes to another page. */
const KEPT = ["tenant", "range"];
const TOAST_S = 6;

function App() {
  const link = useLink();
  if (link.phase === "login") return html`<${Login} />`;
  if (link.phase === "starting") return html`<${Starting} link=${link} />`;
  return html`<${Dashboard} link=${link} />`;
}

const Starting = ({ link }) => html`
  <${Banners} link=${link} />
  <main><h1 class="sr">Loading</h1><${Skeleton} /></main>`;

function Dashboard({ link }) {
  const [{ route, args }, go] = useRoute();
  const [theme, setTheme, look] = useTheme();
  const [toasts, toast, dismiss] = useToasts();
  const [question, ask] = useState(null);
  const scope = args.tenant || "", range = Number(args.range) || DEFAULT_RANGE;
  useScopeAndRange(scope, range);
  const act = useRef(actions({ toast, ask })).current;
  const open = (id) => go(route, { ...args, s: id });
  const page = {
    args, go, open, act, ask, toast, scope, range, look, connected,
    setScope: (tenant) => go(route, { ...args, tenant }), setRange: (s) => go(route, { ...args, range: s === DEFAULT_RANGE ? "" : s }),
  };
  useKeys({ route, args, go, open, ask });
  const down = link.link.state === "down";
  return html`
    <${Page.Provider} value=${page}>
      <div class=${down ? "stale" : ""}>
        <a class="skip" href="#main" onClick=${skip}>Skip to content</a>
        <${Header} link=${link} route=${route} theme=${theme} setTheme=${setTheme} />
        <${Banners} link=${link} />
        <${Main} route=${route} />
        ${args.s && html`<${Drawer} key=${args.s} id=${args.s} />`}
        <${Toasts} toasts=${toasts} dismiss=${dismiss} />
        ${question && html`<${Dialog} question=${question} onClose=${() => ask(null)} />`}
      </div>
    <//>`;
}

function Main({ route }) {
  const none = useFact("overview", (overview) => overview.sessions.total === 0);
  const empty = none && ["overview", "sessions"].includes(route);
  const View = VIEWS[route];
  return html`
    <main id="main" tabindex="-1">
      ${(route !== "overview" || empty) && html`<h1 class="sr">${PAGES.find(([name]) => name === route)[1]}</h1>`}
      ${empty ? html`<${Empty} />` : html`<${View} key=${route} />`}
    </main>`;
}

function skip(event) {
  event.preventDefault();
  document.getElementById("main").focus();
}

// ---------------------------------------------------------------- the route

function readHash() {
  const [name, fields] = location.hash.replace(/^#\/?/, "").split("?");
  return { route: VIEWS[name] ? name : "overview", args: Object.fromEntries(new URLSearchParams(fields || "")) };
}

/** Page, filters and the open session live in the hash, so that a link reproduces the view. */
function useRoute() {
  const [at, setAt] = useState(readHash);
  useEffect(() => {
    const moved = () => setAt(readHash());
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  const go = (route, args = null, { replace = false } = {}) => {
    const now = readHash().args;
    const fields = args || Object.fromEntries(KEPT.map((key) => [key, now[key]]));
    const text = new URLSearchParams(Object.entries(fields).filter(([, value]) => value)).toString();
    const hash = `#/${route}${text ? "?" + text : ""}`;
    if (hash === location.hash) return;
    if (!replace) return void (location.hash = hash);
    history.replaceState(null, "", hash);
    setAt(readHash());
  };
  return [at, go];
}

function useScopeAndRange(scope, range) {
  useEffect(() => setScope(scope), [scope]);
  useEffect(() => setRange(range), [range]);
}

// ---------------------------------------------------------------- looks

const THEME_KEY = "rekindle.theme";

/** The chosen theme ("" follows the system), and a word that changes with every change of colours. */
function useTheme() {
  const [theme, choose] = useState(() => localStorage.getItem(THEME_KEY) || "");
  const [beat, setBeat] = useState(0);
  const apply = () => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    forgetColours();
    setBeat((n) => n + 1);
  };
  useEffect(apply, [theme]);
  useEffect(() => {
    const media = matchMedia("(prefers-color-scheme: dark)");
    media.addEventListener("change", apply);
    return () => media.removeEventListener("change", apply);
  });
  const set = (next) => {
    localStorage.setItem(THEME_KEY, next);
    choose(next);
  };
  return [theme, set, `${theme}${beat}`];
}

function useToasts() {
  const [toasts, set] = useState([]);
  const dismiss = (id) => set((had) => had.filter((toast) => toast.id !== id));
  const add = (text, { undo = null, seconds = TOAST_S } = {}) => {
    const toast = { id: crypto.getRandomValues(new Uint32Array(1))[0], text, undo };
    set((had) => [...had.slice(-2), toast]);
    setTimeout(() => dismiss(toast.id), (seconds || TOAST_S) * 1000);
  };
  return [toasts, add, dismiss];
}

// ---------------------------------------------------------------- keys

function useKeys({ route, args, go, open, ask }) {
  // With what is drawn, not after it: a key that follows at once finds the page that it sees.
  useLayoutEffect(() => {
    const press = (event) => {
      if (event.metaKey || event.ctrlKey || event.altKey || document.querySelector("dialog[open]")) return;
      if (/INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return void (event.key === "Escape" && event.target.blur());
      const page = PAGES["12345".indexOf(event.key)];
      if (page) return go(page[0]);
      if (event.key === "?") return ask({ kind: "help" });
      if (event.key === "Escape" && args.s) return open("");
      if (event.key === "/") return find(event, route, go);
      if (event.key === " " && (event.target === document.body || event.target.id === "main")) {
        event.preventDefault();
        togglePause();
      }
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  });
}

function find(event, route, go) {
  event.preventDefault();
  if (route !== "sessions") go("sessions");
  focusOn("find", 40);
}

/** As soon as it is drawn, which takes a busy machine a while. */
function focusOn(id, tries) {
  const element = document.getElementById(id);
  if (element) element.focus();
  else if (tries > 0) setTimeout(() => focusOn(id, tries - 1), 25);
}

const root = document.getElementById("app");
root.textContent = "";
render(html`<${App} />`, root);
start();
