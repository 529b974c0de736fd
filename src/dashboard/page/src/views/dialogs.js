/* What is asked before something that can't be undone, and what is explained? */
import { html, useContext, useEffect, useState } from "../../vendor/preact-htm.js";
import { get } from "../api.js";
import { Modal, Page } from "../parts.js";
import { state } from "../store.js";
import { bytes, counted, ms, shortId } from "../words.js";

export function Dialog({ question, onClose }) {
  const kinds = { drop: DropKv, cancel: CancelTurn, config: Config, help: Help };
  return html`<${kinds[question.kind]} ...${question} onClose=${onClose} />`;
}

/** Says what is freed, what stays, what the next turn will cost; the last four characters of the id are typed. */
function DropKv({ row, onYes, onClose }) {
  const [typed, setTyped] = useState("");
  const session = useFresh(row);
  const wanted = row.id.slice(-4);
  const { total, shared } = session.bytes;
  const stays = shared > 0 ? ` ${bytes(shared)} stays, because other sessions of ${session.tenant} share it.` : "";
  return html`
    <${Modal} label="Drop KV" onClose=${onClose}>
      <h2>Drop all KV of ${shortId(row.id)}?</h2>
      <p>
        Frees ${bytes(total - shared)} that is private to it, in all tiers.${stays} The transcript stays. The next turn encodes
        ${" "}${counted(session.tokens, "token")} again, about <b>${ms(session.return?.reencode_ms)}</b>. This cannot be undone.
      </p>
      <label>Type <kbd>${wanted}</kbd> to confirm${" "}
        <input type="text" autocomplete="off" spellcheck="false" value=${typed} onInput=${(event) => setTyped(event.target.value)} />
      </label>
      <div class="row">
        <button class="btn" onClick=${onClose}>Keep it</button>
        <button class="btn danger" disabled=${typed !== wanted} onClick=${() => onYes(session)}>Drop KV</button>
      </div>
    <//>`;
}

/** The session as it is now, since what is said about it must be true. */
function useFresh(row) {
  const [session, setSession] = useState(row);
  useEffect(() => void get(`/sessions/${row.id}`).then((now) => setSession({ ...now, seq: now.as_of.seq }), () => {}), [row.id]);
  return session;
}

const CancelTurn = ({ row, onYes, onClose }) => html`
  <${Modal} label="Cancel turn" onClose=${onClose}>
    <h2>Cancel the running turn of ${shortId(row.id)}?</h2>
    <p>Its client gets an incomplete answer; what was said until now is kept.</p>
    <div class="row">
      <button class="btn" onClick=${onClose}>Let it run</button>
      <button class="btn danger" onClick=${() => onYes(row)}>Cancel turn</button>
    </div>
  <//>`;

function Config({ text, onClose }) {
  const { toast } = useContext(Page);
  const copy = () =>
    navigator.clipboard?.writeText(text).then(() => toast("Copied the settings."), () => toast("The browser did not allow it."));
  return html`
    <${Modal} label="Copy as config" onClose=${onClose}>
      <h2>As configuration</h2>
      <p>Policy is applied by the config file, at the next start of the node.</p>
      <pre class="config" tabindex="0">${text}</pre>
      <div class="row">
        <button class="btn" onClick=${onClose}>Close</button>
        ${navigator.clipboard && html`<button class="btn pri" onClick=${copy}>Copy</button>`}
      </div>
    <//>`;
}

const KEYS = [
  ["1 … 5", "pages"], ["/", "find a session"], ["j  k", "move in the sessions table"], ["Enter", "open the session"],
  ["w p o e", "warm, pin or unpin, offload, evict"], ["Space", "pause or resume"], ["Esc", "close"], ["?", "this help"],
];

const Help = ({ onClose }) => html`
  <${Modal} label="Keyboard" onClose=${onClose}>
    <h2>Keyboard</h2>
    <dl>${KEYS.map(([keys, what]) => html`<dt><kbd>${keys}</kbd></dt><dd>${what}</dd>`)}</dl>
    <p class="muted signed">
      Signed in as ${state.me?.actor}${state.me?.read_only ? ", read only" : ""}.
      ${state.me && !state.me.secure ? " This connection is not encrypted, which only this machine itself is allowed." : ""}
      ${" "}All times are UTC.
    </p>
    <div class="row"><button class="btn" onClick=${onClose}>Close</button></div>
  <//>`;
