#!/usr/bin/env node
// Does an OpenAI-shaped server work with the real npm `openai` SDK, unchanged?
//
//   npm ci                     (in the folder you run from, with this folder's package.json and its lock)
//   node conformance.mjs --base-url http://127.0.0.1:8080/v1 --api-key KEY --model NAME [--only regexp] [--without NAME,NAME]
//
// One line a check: PASS, FAIL with the reason, or skip. The exit status is the number of failures.
// The Python twin has more checks; this one is for what the JavaScript SDK is stricter about.
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';
import path from 'node:path';

const arg = (name, dflt) => { const i = process.argv.indexOf('--' + name); return i < 0 ? dflt : process.argv[i + 1]; };
const base = arg('base-url', 'http://127.0.0.1:8080/v1').replace(/\/+$/, ''), key = arg('api-key', 'none'), model = arg('model'), only = new RegExp(arg('only', '')), without = arg('without', '').split(',');
if (!model) { console.error('--model is required'); process.exit(2); }
const req = createRequire(pathToFileURL(path.join(process.cwd(), 'x.js'))); // packages of the caller's folder, not of this file's
const OpenAI = req('openai'), { ResponsesWS } = req('openai/resources/responses/ws'), version = req('openai/version').VERSION;
const client = new OpenAI({ baseURL: base, apiKey: key, maxRetries: 0, timeout: 120000 });
const messages = [{ role: 'user', content: 'Say hello in five words.' }], LONG = 'Please count from 1 to 300, one number after another, and do not stop early.';
const chat = (o = {}) => client.chat.completions.create({ model, messages, temperature: 0, max_completion_tokens: 24, ...o });
const resp = (o = {}) => client.responses.create({ model, input: 'Say hello in five words.', temperature: 0, max_output_tokens: 24, ...o });

class Skip extends Error {}
const ok = (c, what) => { if (!c) throw new Error(what); };
const eq = (a, b, what = 'value') => { const [x, y] = [JSON.stringify(a), JSON.stringify(b)]; if (x !== y) throw new Error(`${what}: got ${x}, want ${y}`); };
async function raises(cls, fn, code) {
  try { await fn(); } catch (e) {
    ok(e.constructor === cls, `raised ${e.constructor.name} ${e.status} ${e.code}, want ${cls.name}`);
    ok(e.error && typeof e.error.message === 'string' && e.type, `error body ${JSON.stringify(e.error)}`); ok(e.requestID, 'no x-request-id');
    if (code) eq(e.code, code, 'error code');
    return e;
  }
  throw new Error(`no error, want ${cls.name}`);
}
const collect = async (it) => { const out = []; for await (const x of it) out.push(x); return out; };
const terminal = (t) => ['response.completed', 'response.incomplete', 'response.failed', 'error'].includes(t);

const checks = {
  async models() {
    const ms = (await collect(client.models.list())); ok(ms.some((m) => m.id === model), `${model} isn't listed`);
    for (const m of ms) ok(m.object === 'model' && Number.isInteger(m.created) && m.owned_by, `fields ${JSON.stringify(m)}`);
    await raises(OpenAI.NotFoundError, () => client.models.retrieve('no-such-model'), 'model_not_found');
  },
  async chat_shape() {
    const r = await chat(); eq(r.object, 'chat.completion'); eq(r.choices[0].message.role, 'assistant'); ok(typeof r.choices[0].message.content === 'string', 'content');
    eq(r.usage.prompt_tokens + r.usage.completion_tokens, r.usage.total_tokens, 'usage'); ok(r._request_id, '_request_id');
  },
  async chat_stream_helper_is_strict() { // throws on a missing role or finish_reason
    const s = client.chat.completions.stream({ model, messages, temperature: 0, max_completion_tokens: 24, stream_options: { include_usage: true } });
    let text = ''; s.on('content', (d) => { text += d; }); const f = await s.finalChatCompletion();
    eq(f.choices[0].message.content, text, 'text'); eq(f.choices[0].message.role, 'assistant'); ok(f.usage && f.usage.completion_tokens > 0, 'usage'); eq(text, (await chat()).choices[0].message.content, 'streamed against plain');
  },
  async chat_stream_n_two() {
    const s = client.chat.completions.stream({ model, messages, n: 2, max_completion_tokens: 6 }); const f = await s.finalChatCompletion();
    eq(f.choices.map((c) => c.index), [0, 1], 'indices'); ok(f.choices.every((c) => c.finish_reason && c.message.role), 'finish_reason and role of each choice');
  },
  async chat_stream_logprobs() {
    const s = client.chat.completions.stream({ model, messages, temperature: 0, max_completion_tokens: 4, logprobs: true, top_logprobs: 1 }); const f = await s.finalChatCompletion();
    const lp = f.choices[0].logprobs.content; ok(lp.length > 0 && lp.every((t) => typeof t.token === 'string' && t.top_logprobs.length === 1), JSON.stringify(lp));
  },
  async chat_abort_midway() {
    const s = await chat({ messages: [{ role: 'user', content: LONG }], stream: true, max_completion_tokens: 2000 }); let n = 0;
    for await (const _ of s) if (++n > 3) break; // the SDK aborts the request
    const t = performance.now(); await chat({ max_completion_tokens: 1 }); ok(performance.now() - t < 10000, 'the next request waited for the abandoned one');
  },
  async errors_map() {
    await raises(OpenAI.AuthenticationError, () => client.withOptions({ apiKey: 'wrong' }).models.list(), 'invalid_api_key');
    await raises(OpenAI.NotFoundError, () => chat({ model: 'no-such-model' }), 'model_not_found'); await raises(OpenAI.BadRequestError, () => chat({ temperature: 3 }));
    await raises(OpenAI.BadRequestError, () => chat({ messages: [{ role: 'user', content: 'word '.repeat(300000) }] }), 'context_length_exceeded');
    await raises(OpenAI.BadRequestError, () => chat({ stream: true, messages: [] }));
  },
  async response_shape() {
    const r = await resp({ metadata: { k: 'v' } }); ok(r.id.startsWith('resp_') && ['completed', 'incomplete'].includes(r.status) && r.output_text.length > 0, JSON.stringify(r).slice(0, 200));
    eq(r.metadata, { k: 'v' }); ok(r.usage.input_tokens_details.cached_tokens >= 0 && r.usage.output_tokens_details.reasoning_tokens >= 0, 'usage details');
  },
  async response_stream_order() {
    const evs = await collect(await resp({ stream: true })); eq(evs.map((e) => e.sequence_number), evs.map((_, i) => i), 'sequence numbers');
    const kinds = evs.map((e) => e.type).filter((k, i, a) => k !== a[i - 1] && k !== 'response.queued');
    eq(kinds.slice(0, -1), ['response.created', 'response.in_progress', 'response.output_item.added', 'response.content_part.added', 'response.output_text.delta', 'response.output_text.done', 'response.content_part.done', 'response.output_item.done'], 'order');
    ok(terminal(kinds.at(-1)), `last event ${kinds.at(-1)}`);
  },
  async response_stream_helper_is_strict() { // throws on index, id or type that disagree between events
    const s = client.responses.stream({ model, input: 'Say hello.', temperature: 0, max_output_tokens: 24 }); let text = '';
    s.on('response.output_text.delta', (e) => { text += e.delta; }); const f = await s.finalResponse(); eq(f.output_text, text, 'final text'); ok(['completed', 'incomplete'].includes(f.status), f.status);
  },
  async response_chain_and_errors() {
    const a = await resp({ input: 'My name is Ann. '.repeat(12) }), b = await resp({ input: 'And now?', previous_response_id: a.id });
    ok(b.usage.input_tokens >= a.usage.total_tokens, 'history missing'); await raises(OpenAI.BadRequestError, () => resp({ previous_response_id: 'resp_' + '0'.repeat(32) }), 'previous_response_not_found');
    await client.responses.delete(a.id); await raises(OpenAI.NotFoundError, () => client.responses.retrieve(a.id));
  },
  async response_retrieve_as_stream() {
    const a = await resp().catch((e) => { throw e; }); const evs = await collect(await client.responses.retrieve(a.id, { stream: true, starting_after: 1 }));
    ok(evs.length > 0 && evs[0].sequence_number === 2 && terminal(evs.at(-1).type), `events ${evs.map((e) => e.sequence_number)}`);
  },
  async conversations() {
    const v = await client.conversations.create({ metadata: { t: 'a' } }); ok(v.id.startsWith('conv_'), v.id); eq((await client.conversations.update(v.id, { metadata: { t: 'b' } })).metadata, { t: 'b' });
    await client.conversations.items.create(v.id, { items: Array.from({ length: 7 }, (_, i) => ({ type: 'message', role: 'user', content: `n${i}` })) });
    eq((await collect(client.conversations.items.list(v.id, { order: 'asc', limit: 3 }))).map((i) => i.content[0].text), [0, 1, 2, 3, 4, 5, 6].map((i) => `n${i}`), 'three a page');
    const r = await resp({ conversation: v.id }); eq(r.conversation.id, v.id); eq((await client.conversations.items.list(v.id, { limit: 2 })).data.map((i) => i.role), ['assistant', 'user'], 'newest two');
    eq((await client.conversations.delete(v.id)).deleted, true); await raises(OpenAI.NotFoundError, () => client.conversations.retrieve(v.id)); await raises(OpenAI.NotFoundError, () => resp({ conversation: v.id }));
  },
  async websocket() {
    const ws = new ResponsesWS(client), queue = [], wake = []; const push = (e) => { queue.push(e); wake.shift()?.(); };
    ws.on('event', push); ws.on('error', (e) => { if (!e.error) push({ type: 'socket', message: e.message }); });
    const next = async () => { while (!queue.length) await new Promise((r, j) => { wake.push(r); setTimeout(() => j(new Error('no event in 60 s')), 60000).unref(); }); return queue.shift(); };
    const turn = async (o) => { ws.send({ type: 'response.create', model, max_output_tokens: 8, ...o }); for (const evs = []; ;) { const e = await next(); ok(e.type !== 'socket', e.message); evs.push(e); if (terminal(e.type)) return evs; } };
    try {
      const a = await turn({ input: 'Say hello. '.repeat(20), store: false }); eq(a.map((e) => e.sequence_number), a.map((_, i) => i), 'sequence numbers');
      const b = await turn({ input: 'Again.', previous_response_id: a.at(-1).response.id, store: false, stream_id: 'lane.1' }); ok(b.every((e) => e.stream_id === 'lane.1'), 'stream_id echoed on every event');
      ok(b.at(-1).response.usage.input_tokens >= a.at(-1).response.usage.total_tokens, 'history missing');
      const c = (await turn({ input: 'x', previous_response_id: 'resp_' + '0'.repeat(32) })).at(-1); eq([c.type, c.status, c.error.code], ['error', 400, 'previous_response_not_found']); ok(terminal((await turn({ input: 'Still there?' })).at(-1).type), 'socket lost');
    } finally { ws.close(); }
  },
  async cors_preflight() {
    const r = await fetch(base + '/responses', { method: 'OPTIONS', headers: { Origin: 'https://app.example', 'Access-Control-Request-Method': 'POST', 'Access-Control-Request-Headers': 'authorization,content-type,x-stainless-lang' } });
    const allow = r.headers.get('access-control-allow-origin'); if (!allow) throw new Skip('CORS is off for this origin');
    const hs = (r.headers.get('access-control-allow-headers') || '').toLowerCase(); ok(r.status < 300 && hs.includes('authorization') && (hs.includes('x-stainless-lang') || hs.includes('*')), `status ${r.status}, allow-headers ${hs}`);
  },
};

console.log(`openai ${version} (node ${process.version}), ${base}, model ${model}`);
const n = { PASS: 0, FAIL: 0, skip: 0 };
for (const [name, fn] of Object.entries(checks)) {
  if (!only.test(name) || without.includes(name)) continue;
  const t = performance.now(); let res = 'PASS', why = '';
  try { await fn(); } catch (e) { res = e instanceof Skip ? 'skip' : 'FAIL'; why = e instanceof Error ? (e.constructor === Error || e instanceof Skip ? e.message : `${e.constructor.name}: ${e.message}`) : String(e); }
  n[res]++; console.log(`${res}  ${name.padEnd(36)} ${((performance.now() - t) / 1000).toFixed(2).padStart(6)} s  ${why.slice(0, 300)}`);
}
console.log(`${n.PASS} passed, ${n.FAIL} failed, ${n.skip} skipped`);
process.exit(Math.min(n.FAIL, 125));
