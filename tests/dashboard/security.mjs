// 6. Can nobody but an admin read, act, or find a secret?
//
// Expects: a server on loopback, without load. REKINDLE_TENANT_KEY: a tenant's API key (required). REKINDLE_LOG: the
// server's log file; without it, that the log holds no key is not checked, and that is said. The last check uses up the
// tries of this address: run this script last, or give it a server of its own.
import fs from "node:fs";
import { ROUTES, check, equal, expect, key, noFaults, open, required, run, server, settled } from "./lib.mjs";

const tenantKey = required("REKINDLE_TENANT_KEY");
const READS = [
  "/me", "/overview", "/history?range=60&step=1", "/map?tier=device", "/tenants", "/sessions", "/evictions", "/policy", "/stream",
];
const HEADERS = {
  "x-content-type-options": /nosniff/, "referrer-policy": /no-referrer/,
  "content-security-policy": /default-src 'none'.*script-src 'self'.*frame-ancestors 'none'/,
};

await run(async (browser) => {
  await check("without a cookie or key, nothing is answered", async () => {
    for (const path of READS) equal((await api(path)).status, 401, path);
    equal((await api("/sessions/conv_00000000000000000000000000000000/evict", post())).status, 401, "an action");
  });

  await check("a tenant's key is refused, on the API and on the form", async () => {
    const byHeader = (await api("/overview", { headers: { authorization: `Bearer ${tenantKey}` } })).status;
    expect([401, 403].includes(byHeader), `a tenant's key reads: ${byHeader}`);
    equal((await signIn(tenantKey)).status, 401, "sign-in with a tenant's key");
  });

  const signedIn = await signIn(key);
  await check("the cookie is for this host alone, and for no script", async () => {
    equal(signedIn.status, 200, "sign-in");
    const cookie = signedIn.headers.get("set-cookie") || "";
    for (const flag of ["HttpOnly", "SameSite=Strict", "Path=/"]) expect(cookie.includes(flag), `${flag} is not in ${flags(cookie)}`);
    const secure = server.startsWith("https:");
    expect(cookie.startsWith(secure ? "__Host-rk_admin=" : "rk_admin="), `its name is ${cookie.split("=")[0]}`);
    if (secure) expect(cookie.includes("Secure"), "it is not Secure");
    expect(/^[^=]+=[A-Za-z0-9_-]{22,}/.test(cookie), "it is shorter than 128 bits");
  });
  const cookie = (signedIn.headers.get("set-cookie") || "").split(";")[0];
  const me = await (await api("/me", { headers: { cookie } })).json();

  await check("a POST from elsewhere, or without the token, is refused", async () => {
    const route = "/sessions/conv_00000000000000000000000000000000/pin";
    const from = (origin, token) => api(route, post({}, { cookie, ...(origin && { origin }), ...(token && { "x-rk-csrf": token }) }));
    equal((await from("https://elsewhere.example", me.csrf)).status, 403, "another origin");
    equal((await from(server, "0".repeat(32))).status, 403, "a wrong token");
    equal((await from(server, "")).status, 403, "no token");
    equal((await from(server, me.csrf)).status, 404, "right origin and token, and no such session");
  });

  await check("headers forbid what the page does not need", async () => {
    const page = await fetch(`${server}/admin`);
    for (const [name, wanted] of Object.entries(HEADERS)) {
      expect(wanted.test(page.headers.get(name) || ""), `${name}: ${page.headers.get(name)}`);
    }
    expect(!/unsafe/.test(page.headers.get("content-security-policy")), "the policy allows something unsafe");
    const answer = await api("/overview", { headers: { cookie } });
    expect(/no-store/.test(answer.headers.get("cache-control") || ""), "the API's answers may be stored");
    expect(answer.headers.get("x-request-id"), "no x-request-id");
  });

  await check("no secret is in the page, its storage, its requests or its addresses", async () => {
    const page = await open(browser, { signedIn: false });
    const seen = [];
    page.on("request", (request) => {
      const isForm = request.url().endsWith("/admin/api/login");
      seen.push(`${request.url()} ${isForm ? "" : request.postData() || ""}`);
    });
    await page.fill("#key", key);
    await page.click("form button");
    await settled(page);
    for (const route of ROUTES) {
      await page.goto(`${server}/admin#/${route}`);
      await settled(page);
      seen.push(await page.content(), page.url());
    }
    seen.push(await page.evaluate(() => JSON.stringify([{ ...localStorage }, { ...sessionStorage }, document.cookie])));
    const where = seen.find((text) => text.includes(key) || text.includes(tenantKey));
    expect(!where, `a key is in: ${where?.replaceAll(key, "<key>").slice(0, 160)}`);
    equal(await page.evaluate(() => document.cookie), "", "cookies that a script can read");
    noFaults(page);
    await page.context().close();
  });

  await check("signing out ends the session at the server", async () => {
    equal((await api("/logout", post({}, { cookie, origin: server, "x-rk-csrf": me.csrf }))).status, 200, "sign-out");
    equal((await api("/overview", { headers: { cookie } })).status, 401, "the old cookie");
  });

  await check("guesses are few: a sixth within the minute waits", async () => {
    const answers = [];
    for (let i = 0; i < 7; i++) answers.push(await signIn(`wrong-${i}`));
    expect(answers.some((answer) => answer.status === 429 && Number(answer.headers.get("retry-after")) > 0), "no 429 with Retry-After");
  });

  if (!process.env.REKINDLE_LOG) return console.log("skip  log: REKINDLE_LOG is not set");
  await check("the log holds no key", async () => {
    const log = fs.readFileSync(process.env.REKINDLE_LOG, "utf8");
    for (const secret of [key, tenantKey, "wrong-3"]) expect(!log.includes(secret), "a key is in the log");
  });
});

function api(path, options = {}) {
  return fetch(`${server}/admin/api${path}`, { signal: AbortSignal.timeout(10_000), ...options });
}

function post(body = {}, headers = {}) {
  return { method: "POST", headers: { "content-type": "application/json", ...headers }, body: JSON.stringify(body) };
}

function signIn(secret) {
  return api("/login", post({ key: secret }, { origin: server }));
}

/** What follows a cookie's value, which is a secret. */
function flags(cookie) {
  return cookie.split(";").slice(1).join(";");
}
