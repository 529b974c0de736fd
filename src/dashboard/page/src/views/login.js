/* Who may come in? The admin key is sent once, in the body of a POST, for a cookie that scripts cannot read. */
import { html, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { ICON } from "../icons.js";
import { signIn } from "../store.js";
import { span } from "../words.js";

const REFUSED = {
  invalid_admin_key: "That admin key was not accepted. It is the key of the configuration, or the one in <data-dir>/admin.key; " +
    "tenants' API keys do not work here.",
};

export function Login() {
  const field = useRef();
  const [failure, setFailure] = useState(null);
  const [busy, setBusy] = useState(false);
  const locked = useLock(failure);
  useEffect(() => field.current.focus(), []);
  const submit = async (event) => {
    event.preventDefault();
    setBusy(true);
    const key = field.current.value;
    field.current.value = "";
    try {
      await signIn(key);
    } catch (error) {
      setFailure({ error, until: error.retryAfter ? Date.now() + error.retryAfter * 1000 : 0 });
      setBusy(false);
      field.current?.focus();
    }
  };
  return html`
    <main class="login">
      <form onSubmit=${submit}>
        <span class="logo">${ICON.flame}rekindle</span>
        <h1>Sign in to this node</h1>
        <label for="key" class="muted">Admin key</label>
        <input id="key" ref=${field} type="password" autocomplete="current-password" required aria-describedby="refused" />
        <p id="refused" role="alert" class="k-drop">${failure && told(failure.error, locked)}</p>
        <button class="btn pri" disabled=${busy || locked > 0}>${busy ? "Signing in…" : "Sign in"}</button>
        <p class="muted">The key is exchanged once for a session cookie that scripts cannot read. It is never put in a URL.</p>
      </form>
    </main>`;
}

function told(error, locked) {
  if (error.status === 429) return `Too many tries. ${locked > 0 ? `Try again in ${span(locked)}.` : "Try again now."}`;
  return REFUSED[error.code] || error.message;
}

/** Seconds until the server listens to another try. */
function useLock(failure) {
  const [, beat] = useState(0);
  const left = Math.max(0, Math.ceil(((failure?.until || 0) - Date.now()) / 1000));
  useEffect(() => {
    if (left === 0) return undefined;
    const timer = setTimeout(() => beat((n) => n + 1), 1000);
    return () => clearTimeout(timer);
  });
  return left;
}
