/* What happens when an operator acts? At once with an undo, or after a question; a refusal is the server's sentence. */
import { get, post } from "./api.js";
import { connected, state, tellRow } from "./store.js";
import { shortId } from "./words.js";

const DONE = {
  warm: "is on its way to the device", pin: "is pinned", unpin: "is no longer pinned", offload: "has a copy below the device",
  evict: "left the device", drop: "has no KV left in any tier", cancel: "has no running turn any more",
};

/** Why nothing can be done to KV that no conversation owns. */
export const STATELESS = "A stateless chat: nothing to act on; its blocks go as memory is needed.";

const QUESTIONS = ["drop", "cancel"];

/** `act(row, verb, body)`: `row` is a session as the page knows it. `toast(text, {undo, seconds})`, `ask(question)`. */
export function actions({ toast, ask }) {
  const act = (row, verb, body) => {
    if (!connected()) return toast("Not connected. Nothing was done.");
    if (state.me?.read_only) return toast("This node's dashboard is read only.");
    if (row.stateless) return toast(STATELESS);
    if (QUESTIONS.includes(verb)) return ask({ kind: verb, row, onYes: (now) => run(now, verb, body) });
    return run(row, verb, body);
  };

  const run = async (row, verb, body) => {
    ask(null);
    const seq = row.seq ?? row.as_of?.seq;
    try {
      const done = await post(`/sessions/${row.id}/${verb}`, { if_seq: seq, ...defaults(verb), ...body });
      tell(done);
      const undo = done.undo && (() => takeBack(done.undo.token));
      toast(`${shortId(row.id)} ${DONE[verb]}.`, { undo, seconds: done.undo?.expires_s });
    } catch (error) {
      toast(said(error));
      if (error.code === "session_changed") refresh(row.id);
    }
  };

  const takeBack = async (token) => {
    try {
      tell(await post(`/undo/${token}`));
      toast("Undone.");
    } catch (error) {
      toast(said(error));
    }
  };

  return act;
}

const defaults = (verb) => (verb === "offload" ? { to: "host" } : {});

const said = (error) => error.message + (error.requestId ? ` (${error.code}, ${error.requestId})` : "");

function tell(answer) {
  if (answer.session) tellRow(answer.session, answer.as_of?.seq ?? answer.session.seq);
}

/** The row has changed since it was read: it is shown as it is now, and the operator decides again. */
function refresh(id) {
  get(`/sessions/${id}`).then((now) => tellRow(now, now.as_of.seq), () => {});
}
