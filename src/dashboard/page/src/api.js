/* How does the page ask the server? JSON over /admin/api with the session's cookie; a failure says what, which and where. */

const BASE = "/admin/api";

let csrf = "";
let signedOut = () => {};

/** A refusal by the server (`status` is HTTP's), or no answer at all (`status` 0). */
class ApiError extends Error {
  constructor(message, { status, code, requestId = null, retryAfter = null }) {
    super(message);
    Object.assign(this, { status, code, requestId, retryAfter });
  }

  get unreachable() {
    return this.status === 0;
  }
}

/** The token of `/me`: each POST proves with it that this page sent it. */
export function useCsrf(token) {
  csrf = token;
}

/** `then` runs whenever the server no longer knows this session. */
export function onSignedOut(then) {
  signedOut = then;
}

export const get = (path, signal) => call("GET", path, undefined, signal);
export const post = (path, body = {}, signal) => call("POST", path, body, signal);
export const url = (path) => BASE + path;

async function call(method, path, body, signal) {
  const response = await reach(method, path, body, signal);
  const answer = await response.json().catch(() => null);
  if (response.ok && answer) return answer;
  const error = refusal(response, answer);
  if (error.status === 401 && path !== "/login") signedOut();
  throw error;
}

async function reach(method, path, body, signal) {
  const headers = { accept: "application/json" };
  if (method === "POST") Object.assign(headers, { "content-type": "application/json", "x-rk-csrf": csrf });
  try {
    return await fetch(BASE + path, {
      method, headers, signal, credentials: "same-origin", cache: "no-store",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server did not answer.", { status: 0, code: "unreachable" });
  }
}

/** The error in an answer; also of an answer that is not the server's own, such as a proxy's. */
export function refusal(response, answer) {
  const said = answer?.error || {};
  return new ApiError(said.message || `The server answered ${response.status} without a reason.`, {
    status: response.status,
    code: said.code || said.type || `http_${response.status}`,
    requestId: response.headers.get("x-request-id"),
    retryAfter: Number(response.headers.get("retry-after")) || null,
  });
}

/** A query string of what is set. */
export function query(fields) {
  const set = Object.entries(fields).filter(([, value]) => value !== "" && value != null);
  return new URLSearchParams(set).toString();
}
