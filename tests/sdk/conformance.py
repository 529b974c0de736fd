#!/usr/bin/env python3
"""Does an OpenAI-shaped server work with the real `openai` Python SDK, unchanged?

  pip install -r requirements.txt
  conformance.py --base-url http://127.0.0.1:8080/v1 --api-key KEY --model NAME
  conformance.py ... --part chat,errors        (for peers that are stateless)
  conformance.py ... --only websocket --verbose
  conformance.py ... --without NAME,NAME       (what the server is known not to have)

One line a check: PASS, FAIL with the reason, or skip. The exit status is the number of failures (125 at
most). No check needs a clever model: they look at shapes, orders, token counts and exception classes.
Parts: chat, errors, responses, conversations, ws, ext (ours).
"""
import argparse, asyncio, json, re, sys, threading, time, traceback, urllib.error, urllib.request, uuid
import openai
from openai import AsyncOpenAI, OpenAI

CHECKS = []
class Skip(Exception): pass

def check(part):
    def deco(fn):
        CHECKS.append((part, fn)); return fn
    return deco

def eq(got, want, what=""):
    if got != want: raise AssertionError(f"{what or 'value'}: got {got!r}, want {want!r}")
def ok(cond, what):
    if not cond: raise AssertionError(what)
def raises(cls, fn, code=None, param=None):
    try: fn()
    except openai.APIStatusError as e:
        ok(type(e) is cls, f"raised {type(e).__name__} {e.status_code} {e.code!r}, want {cls.__name__}")
        ok(isinstance(e.body, dict) and isinstance(e.body.get("message"), str) and e.body.get("type"), f"error body is {e.body!r}")
        ok(e.request_id, "no x-request-id on the error")
        if code: eq(e.code, code, "error code")
        if param: ok((e.param or "").startswith(param), f"error param {e.param!r}, want {param}…")
        return e
    raise AssertionError(f"no error, want {cls.__name__}")

class Ctx:
    def __init__(s, a):
        s.a, s.model = a, a.model
        kw = dict(base_url=a.base_url, api_key=a.api_key, timeout=a.timeout, max_retries=0)
        s.c, s.ac = OpenAI(**kw), (lambda: AsyncOpenAI(**kw))
        s.c2 = OpenAI(**{**kw, "api_key": a.api_key2}) if a.api_key2 else None
        s.msg = [{"role": "user", "content": "Say hello in five words."}]
    def chat(s, **k):
        return s.c.chat.completions.create(**{**dict(model=s.model, messages=s.msg, temperature=0, max_completion_tokens=24), **k})
    def resp(s, **k):
        return s.c.responses.create(**{**dict(model=s.model, input="Say hello in five words.", temperature=0, max_output_tokens=24), **k})
    LONG = "Please count from 1 to 300, one number after another, and do not stop early."

# ---------------------------------------------------------------- chat
@check("chat")
def models_list_and_retrieve(x):
    ms = list(x.c.models.list()); ok(ms, "no models")
    for m in ms: eq(m.object, "model"); ok(isinstance(m.created, int) and m.owned_by, f"model fields {m!r}")
    ok(x.model in [m.id for m in ms], f"{x.model} isn't listed")
    eq(x.c.models.retrieve(x.model).id, x.model)

@check("chat")
def chat_shape(x):
    r = x.chat(); eq(r.object, "chat.completion"); ok(r.id.startswith("chatcmpl-"), f"id {r.id}")
    ok(isinstance(r.created, int) and r.model, "created, model"); eq(len(r.choices), 1)
    c = r.choices[0]; eq(c.index, 0); eq(c.message.role, "assistant"); ok(isinstance(c.message.content, str) and c.message.content, "content")
    ok(c.finish_reason in ("stop", "length"), f"finish_reason {c.finish_reason}"); eq(c.logprobs, None, "logprobs")
    u = r.usage; eq(u.prompt_tokens + u.completion_tokens, u.total_tokens, "usage sum"); ok(r._request_id, "no x-request-id")

@check("chat")
def chat_length_both_names(x):
    for name in ("max_completion_tokens", "max_tokens"):
        k = {"max_completion_tokens": openai.omit, name: 3} if name == "max_tokens" else {name: 3}
        r = x.chat(messages=[{"role": "user", "content": x.LONG}], **k)
        eq(r.choices[0].finish_reason, "length", f"finish_reason with {name}"); eq(r.usage.completion_tokens, 3, f"completion_tokens with {name}")

@check("chat")
def chat_stream_order(x):
    chunks = list(x.chat(stream=True)); ok(len(chunks) >= 3, f"{len(chunks)} chunks")
    d = chunks[0].choices[0].delta; eq(d.role, "assistant", "role in the first delta"); ok(d.content in ("", None) or len(chunks) > 2, "first delta")
    eq(len({c.id for c in chunks}), 1, "ids"); eq({c.object for c in chunks}, {"chat.completion.chunk"}, "object")
    ok(all(c.usage is None for c in chunks), "usage came though include_usage wasn't asked for")
    fins = [i for i, c in enumerate(chunks) if c.choices and c.choices[0].finish_reason]; eq(fins, [len(chunks) - 1], "where finish_reason is")
    ok(not any(c.choices[0].delta.role for c in chunks[1:] if c.choices), "role repeated")
    eq("".join(c.choices[0].delta.content or "" for c in chunks), x.chat().choices[0].message.content, "streamed text against plain")

@check("chat")
def chat_stream_usage_chunk(x):
    chunks = list(x.chat(stream=True, stream_options={"include_usage": True}))
    eq(chunks[-1].choices, [], "choices of the last chunk"); u = chunks[-1].usage; ok(u, "no usage in the last chunk")
    ok(u.prompt_tokens > 0 and u.completion_tokens > 0, f"usage {u}"); ok(all(c.usage is None for c in chunks[:-1]), "usage before the last chunk")
    ok(chunks[-2].choices[0].finish_reason, "finish_reason isn't in the chunk before usage")

@check("chat")
def chat_stream_wire(x):
    with x.c.chat.completions.with_streaming_response.create(model=x.model, messages=x.msg, stream=True, max_completion_tokens=4) as r:
        ok(r.headers["content-type"].startswith("text/event-stream"), f"content-type {r.headers['content-type']}")
        lines = [l for l in r.iter_lines() if l]
    ok(all(l.startswith(("data: ", ":")) for l in lines), f"odd line {[l for l in lines if not l.startswith(('data: ', ':'))][:1]}")
    eq(lines[-1], "data: [DONE]", "last line")

@check("chat")
def chat_stream_helper(x):
    kinds, text = [], ""
    with x.c.chat.completions.stream(model=x.model, messages=x.msg, temperature=0, max_completion_tokens=24, stream_options={"include_usage": True}) as s:
        for e in s:
            kinds.append(e.type)
            if e.type == "content.delta": text += e.delta
        try: f = s.get_final_completion(); eq(f.choices[0].message.content, text); ok(f.usage, "usage lost: a chunk came after it")
        except openai.LengthFinishReasonError as e: ok(e.completion.choices[0].message.content == text, "snapshot")
    ok({"chunk", "content.delta", "content.done"} <= set(kinds), f"events {sorted(set(kinds))}")

@check("chat")
def chat_async_stream(x):
    async def go():
        async with x.ac() as c:
            s = await c.chat.completions.create(model=x.model, messages=x.msg, stream=True, max_completion_tokens=8)
            return [ch async for ch in s]
    ok(asyncio.run(go())[-1].choices[0].finish_reason, "no finish_reason")

@check("chat")
def chat_n_two(x):
    r = x.chat(n=2, max_completion_tokens=6); eq([c.index for c in r.choices], [0, 1], "indices")
    chunks = list(x.chat(n=2, max_completion_tokens=6, stream=True)); seen = []
    for c in chunks:
        for ch in c.choices:
            if ch.index not in seen: seen.append(ch.index); eq(ch.delta.role, "assistant", f"role of choice {ch.index}")
    eq(seen, [0, 1], "first sight of the choices: the SDK's stream helper needs 0, 1, …")
    eq(sorted(ch.index for c in chunks for ch in c.choices if ch.finish_reason), [0, 1], "one finish_reason a choice")

@check("chat")
def chat_logprobs(x):
    r = x.chat(logprobs=True, top_logprobs=2, max_completion_tokens=4); lp = r.choices[0].logprobs
    ok(lp and lp.content, "no logprobs.content"); eq(len(lp.content), r.usage.completion_tokens, "entries against tokens")
    for t in lp.content: ok(isinstance(t.token, str) and t.logprob <= 0 and len(t.top_logprobs) == 2 and (t.bytes is None or all(0 <= b < 256 for b in t.bytes)), f"entry {t!r}")
    s = [e for c in x.chat(logprobs=True, top_logprobs=2, max_completion_tokens=4, stream=True) for ch in c.choices if ch.logprobs for e in (ch.logprobs.content or [])]
    eq([e.token for e in s], [e.token for e in lp.content], "streamed tokens"); ok(all(len(e.top_logprobs) == 2 for e in s), "streamed top_logprobs")

@check("chat")
def chat_stop_never_leaks(x):
    text = x.chat().choices[0].message.content; ok(len(text) > 8, "the answer is too short to cut")
    stop = text[4:8]; want = text[: text.index(stop)]
    r = x.chat(stop=[stop]); eq(r.choices[0].message.content, want, "plain"); eq(r.choices[0].finish_reason, "stop")
    got = "".join(ch.delta.content or "" for c in x.chat(stop=[stop], stream=True) for ch in c.choices); eq(got, want, "streamed")

@check("chat")
def chat_unicode_whole(x):
    m = [{"role": "system", "content": "Tu parles ñ, 中文 and 👩🏽‍🚀."}, {"role": "user", "content": "Repeat exactly: 👋🏽 世界 é 🏳️‍🌈"}]
    plain = x.chat(messages=m).choices[0].message.content
    ds = [ch.delta.content or "" for c in x.chat(messages=m, stream=True) for ch in c.choices]
    ok(not any("\ufffd" in d for d in ds[:-2]), "U+FFFD inside the stream: a character was split"); eq("".join(ds), plain, "streamed against plain")

@check("chat")
def chat_roles_and_parts(x):
    x.chat(messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "name": "ann", "content": [{"type": "text", "text": "Say"}, {"type": "text", "text": " hello."}]},
                     {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]}, {"role": "user", "content": "Again."}, {"role": "assistant", "content": None}, {"role": "user", "content": "Once more."}])
    a = x.chat(messages=[{"role": "developer", "content": "Be brief. " * 20}] + x.msg).usage.prompt_tokens
    ok(a > x.chat().usage.prompt_tokens + 20, "the developer message didn't reach the model")

@check("chat")
def chat_tool_history(x):
    m = [{"role": "user", "content": "Weather in Paris?"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "w", "arguments": "{\"c\":\"Paris\"}"}}]},
         {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"}, {"role": "user", "content": "Thanks!"}]
    try: x.chat(messages=m)
    except openai.BadRequestError as e:
        if str(e.code).startswith("unsupported"): raise Skip(f"refused clearly: {e.code} {e.param}")
        raise

@check("chat")
def chat_greedy_and_seed_repeat(x):
    outs = [[] for _ in range(4)]; ts = [threading.Thread(target=lambda o=o: o.append(x.chat().choices[0].message.content)) for o in outs]
    for t in ts: t.start()
    for t in ts: t.join()
    eq([len(o) for o in outs], [1] * 4, "answers"); eq(len({o[0] for o in outs}), 1, "different greedy answers when run together")
    eq(*[x.chat(temperature=1, seed=7).choices[0].message.content for _ in range(2)], "same seed, different answers")

@check("chat")
def chat_vendor_fields_tolerated(x):
    x.chat(extra_body={"x_vendor_thing": {"a": 1}, "top_k": 40}, user="u1", metadata={"a": "b"}, store=False, service_tier="auto", parallel_tool_calls=openai.omit, tools=openai.omit)

@check("chat")
def chat_disconnect_frees_the_slot(x):
    for _ in range(3):
        s = x.chat(messages=[{"role": "user", "content": x.LONG}], stream=True, max_completion_tokens=2000)
        for i, _c in enumerate(s):
            if i > 2: break
        s.close()
    t = time.perf_counter(); x.chat(max_completion_tokens=1); ok(time.perf_counter() - t < x.a.quick, f"the next request took {time.perf_counter() - t:.1f} s")

# ---------------------------------------------------------------- errors
@check("errors")
def error_wrong_key(x):
    raises(openai.AuthenticationError, lambda: x.c.with_options(api_key="wrong").models.list(), "invalid_api_key")
    raises(openai.AuthenticationError, lambda: x.c.with_options(api_key="wrong").chat.completions.create(model=x.model, messages=x.msg, stream=True))
@check("errors")
def error_unknown_model(x):
    raises(openai.NotFoundError, lambda: x.chat(model="no-such-model"), "model_not_found"); raises(openai.NotFoundError, lambda: x.c.models.retrieve("no-such-model"))
@check("errors")
def error_bad_values(x):
    raises(openai.BadRequestError, lambda: x.chat(temperature=3), param="temperature")
    raises(openai.BadRequestError, lambda: x.chat(messages=[]), param="messages")
    raises(openai.BadRequestError, lambda: x.chat(logit_bias={"999999999": 1}), param="logit_bias")
    raises(openai.BadRequestError, lambda: x.chat(logit_bias={"hello": 1}), param="logit_bias")
@check("errors")
def error_context_overflow(x):
    e = raises(openai.BadRequestError, lambda: x.chat(messages=[{"role": "user", "content": "word " * x.a.overflow}]), "context_length_exceeded")
    ok("context" in e.message, f"message {e.message!r}")
    raises(openai.BadRequestError, lambda: list(x.chat(stream=True, messages=[{"role": "user", "content": "word " * x.a.overflow}])), "context_length_exceeded")
@check("errors")
def error_image_part(x):
    raises(openai.BadRequestError, lambda: x.chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}]), param="messages")
@check("errors")
def error_bad_json_and_route(x):
    rq = urllib.request.Request(x.a.base_url + "/chat/completions", b"{not json", {"Authorization": "Bearer " + x.a.api_key, "Content-Type": "application/json"})
    try: urllib.request.urlopen(rq, timeout=30); raise AssertionError("bad JSON was accepted")
    except urllib.error.HTTPError as e: eq(e.code, 400, "status of bad JSON"); ok(isinstance(json.loads(e.read())["error"]["message"], str), "body")
    raises(openai.NotFoundError, lambda: x.c.get("/no/such/route", cast_to=object))

# ---------------------------------------------------------------- responses
ORDER = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added", "response.output_text.delta",
         "response.output_text.done", "response.content_part.done", "response.output_item.done"]
def events_ok(evs):
    eq([e.sequence_number for e in evs], list(range(len(evs))), "sequence numbers")
    kinds = [e.type for e in evs if e.type != "response.queued"]; uniq = [k for i, k in enumerate(kinds) if i == 0 or kinds[i - 1] != k]
    ok(uniq[-1] in ("response.completed", "response.incomplete"), f"last event {uniq[-1]}"); eq(uniq[:-1], ORDER, "order of events")
    text = "".join(e.delta for e in evs if e.type == "response.output_text.delta"); last = evs[-1].response
    eq([e.text for e in evs if e.type == "response.output_text.done"], [text], "output_text.done"); eq(last.output_text, text, "text of the final response")
    added = [e.item.id for e in evs if e.type == "response.output_item.added"]; eq([o.id for o in last.output], added, "item ids"); eq(len({e.response.id for e in evs if hasattr(e, "response")}), 1, "response ids")
    ok(last.usage and last.usage.total_tokens == last.usage.input_tokens + last.usage.output_tokens, "usage in the last event"); eq(evs[0].response.status in ("in_progress", "queued"), True, "first status")
    return last

@check("responses")
def response_shape(x):
    r = x.resp(metadata={"k": "v"}); eq(r.object, "response"); ok(r.id.startswith("resp_"), r.id); ok(r.status in ("completed", "incomplete"), f"status {r.status}")
    ok(r.output_text and r.output[0].type == "message" and r.output[0].id.startswith("msg_") and r.output[0].content[0].annotations == [], f"output {r.output}")
    eq(r.metadata, {"k": "v"}, "metadata"); ok(isinstance(r.tools, list) and r.tool_choice and r.parallel_tool_calls is not None, "tools, tool_choice, parallel_tool_calls are required")
    u = r.usage; ok(0 <= u.input_tokens_details.cached_tokens <= u.input_tokens and u.output_tokens_details.reasoning_tokens >= 0, f"usage {u}"); ok(r.error is None and r.created_at, "error, created_at")
@check("responses")
def response_stream_events(x): events_ok(list(x.resp(stream=True)))
@check("responses")
def response_stream_helper(x):
    with x.c.responses.stream(model=x.model, input="Say hello.", max_output_tokens=400, temperature=0) as s:
        snap = ""; last = None
        for e in s:
            last = e
            if e.type == "response.output_text.delta": snap += e.delta; eq(e.snapshot, snap, "snapshot")
        if last.type == "response.completed": eq(s.get_final_response().output_text, snap, "final text")
        else: eq(last.type, "response.incomplete")
@check("responses")
def response_async_stream_helper(x):
    async def go():
        async with x.ac() as c:
            async with c.responses.stream(model=x.model, input="Say hello.", max_output_tokens=16) as s: return [e.type async for e in s]
    ok(asyncio.run(go())[-1] in ("response.completed", "response.incomplete"), "last event")
@check("responses")
def response_chain(x):
    a = x.resp(input="My name is Ann. " * 12); b = x.resp(input="And now?", previous_response_id=a.id); eq(b.previous_response_id, a.id)
    ok(b.usage.input_tokens >= a.usage.input_tokens + a.usage.output_tokens, f"turn 2 read {b.usage.input_tokens} tokens, turn 1 made {a.usage.total_tokens}: the history is missing")
    ok(b.usage.input_tokens_details.cached_tokens >= a.usage.input_tokens // 2, f"cached_tokens {b.usage.input_tokens_details.cached_tokens} of {b.usage.input_tokens}: the history was encoded again")
    c = x.resp(input="Or else?", previous_response_id=a.id); ok(c.usage.input_tokens < b.usage.total_tokens + 8, "a fork from turn 1 must not hold turn 2")
@check("responses")
def response_chain_errors(x):
    raises(openai.BadRequestError, lambda: x.resp(previous_response_id="resp_" + "0" * 32), "previous_response_not_found", "previous_response_id")
    a = x.resp(max_output_tokens=2); v = x.c.conversations.create()
    raises(openai.BadRequestError, lambda: x.resp(previous_response_id=a.id, conversation=v.id)); raises(openai.NotFoundError, lambda: x.resp(conversation="conv_" + "0" * 32))
    raises(openai.BadRequestError, lambda: x.resp(tools=[{"type": "web_search"}]), param="tools")
@check("responses")
def response_retrieve_delete(x):
    a = x.resp(instructions="Be brief."); b = x.c.responses.retrieve(a.id); eq((b.output_text, b.status, b.instructions), (a.output_text, a.status, "Be brief."), "retrieved")
    x.c.responses.delete(a.id); raises(openai.NotFoundError, lambda: x.c.responses.retrieve(a.id)); raises(openai.NotFoundError, lambda: x.c.responses.delete(a.id))
    raises(openai.BadRequestError, lambda: x.resp(previous_response_id=a.id), "previous_response_not_found")
@check("responses")
def response_not_stored(x): a = x.resp(store=False); eq(a.store if hasattr(a, "store") else False, False); raises(openai.NotFoundError, lambda: x.c.responses.retrieve(a.id))
@check("responses")
def response_input_items(x):
    a = x.resp(input=[{"role": "user", "content": f"part {i}"} for i in range(5)]); it = list(x.c.responses.input_items.list(a.id, order="asc", limit=2))
    eq([i.content[0].text for i in it], [f"part {i}" for i in range(5)], "items, two a page"); ok(all(i.id and i.type == "message" and i.role == "user" for i in it), "fields")
@check("responses")
def response_incomplete(x):
    r = x.resp(input=x.LONG, max_output_tokens=5); eq(r.status, "incomplete"); eq(r.incomplete_details.reason, "max_output_tokens"); eq(r.usage.output_tokens, 5)
    evs = list(x.resp(input=x.LONG, max_output_tokens=5, stream=True)); eq(evs[-1].type, "response.incomplete"); eq(evs[-1].response.output[0].status, "incomplete"); events_ok(evs)
@check("responses")
def response_background_cancel_resume(x):
    try: a = x.resp(input=x.LONG, max_output_tokens=2000, background=True)
    except openai.BadRequestError as e: raise Skip(f"background refused: {e.code}")
    ok(a.status in ("queued", "in_progress"), f"status {a.status}"); n, seqs = 0, []
    for e in x.c.responses.retrieve(a.id, stream=True, starting_after=2):
        seqs.append(e.sequence_number); n += 1
        if n >= 4: break
    eq(seqs, [3, 4, 5, 6], "events after 2"); x.c.responses.cancel(a.id); t = time.time()
    while (r := x.c.responses.retrieve(a.id)).status in ("queued", "in_progress") and time.time() - t < 20: time.sleep(.1)
    eq(r.status, "cancelled"); eq(x.c.responses.cancel(a.id).status, "cancelled", "cancelling twice")
@check("responses")
def response_count_tokens(x):
    try: n = x.c.responses.input_tokens.count(model=x.model, input="Say hello in five words.").input_tokens
    except openai.NotFoundError: raise Skip("no /responses/input_tokens")
    eq(n, x.resp().usage.input_tokens, "counted against used")

# ---------------------------------------------------------------- conversations
@check("conversations")
def conversation_crud(x):
    v = x.c.conversations.create(metadata={"topic": "a"}); ok(v.id.startswith("conv_") and v.object == "conversation" and isinstance(v.created_at, int), f"{v}")
    eq(x.c.conversations.retrieve(v.id).metadata, {"topic": "a"}); eq(x.c.conversations.update(v.id, metadata={"topic": "b"}).metadata, {"topic": "b"})
    d = x.c.conversations.delete(v.id); eq((d.id, d.deleted, d.object), (v.id, True, "conversation.deleted")); raises(openai.NotFoundError, lambda: x.c.conversations.retrieve(v.id))
    raises(openai.NotFoundError, lambda: x.resp(conversation=v.id)); x.c.conversations.delete(x.c.conversations.create(items=[]).id)
@check("conversations")
def conversation_items_paging(x):
    v = x.c.conversations.create(); mk = lambda a, b: [{"type": "message", "role": "user", "content": f"n{i}"} for i in range(a, b)]
    r = x.c.conversations.items.create(v.id, items=mk(0, 20)); eq((r.object, len(r.data), r.has_more), ("list", 20, False)); x.c.conversations.items.create(v.id, items=mk(20, 25))
    eq([i.content[0].text for i in x.c.conversations.items.list(v.id, order="asc", limit=10)], [f"n{i}" for i in range(25)], "asc, ten a page")
    p = x.c.conversations.items.list(v.id, limit=3); eq([i.content[0].text for i in p.data], ["n24", "n23", "n22"], "default order is desc"); eq(p.has_more, True); eq(p.last_id, p.data[-1].id)
    eq(x.c.conversations.items.list(x.c.conversations.create().id).data, [], "empty list"); raises(openai.BadRequestError, lambda: x.c.conversations.items.list(v.id, limit=1000), param="limit")
    raises(openai.BadRequestError, lambda: x.c.conversations.items.create(v.id, items=mk(0, 21)), param="items")
@check("conversations")
def conversation_item_retrieve_delete(x):
    v = x.c.conversations.create(items=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]); ids = [i.id for i in x.c.conversations.items.list(v.id, order="asc")]
    eq(x.c.conversations.items.retrieve(ids[0], conversation_id=v.id).content[0].text, "a"); eq(x.c.conversations.items.delete(ids[0], conversation_id=v.id).id, v.id, "delete answers the conversation")
    eq([i.id for i in x.c.conversations.items.list(v.id)], ids[1:]); raises(openai.NotFoundError, lambda: x.c.conversations.items.retrieve(ids[0], conversation_id=v.id))
@check("conversations")
def conversation_turns(x):
    v = x.c.conversations.create(); a = x.resp(input="One. " * 30, conversation=v.id); eq(a.conversation.id, v.id); b = events_ok(list(x.resp(input="Two.", conversation={"id": v.id}, stream=True)))
    it = list(x.c.conversations.items.list(v.id, order="asc")); eq([i.role for i in it], ["user", "assistant"] * 2, "roles"); eq([it[1].content[0].text, it[3].content[0].text], [a.output_text, b.output_text], "answers")
    eq([it[1].id, it[3].id], [a.output[0].id, b.output[0].id], "ids"); ok(b.usage.input_tokens > a.usage.total_tokens, "history missing")
    ok(b.usage.input_tokens_details.cached_tokens >= a.usage.input_tokens // 2, f"cached_tokens {b.usage.input_tokens_details.cached_tokens}")
    w = x.c.conversations.create(); x.c.conversations.items.create(w.id, items=[{**i.model_dump(exclude_unset=True), "id": "msg_" + uuid.uuid4().hex} for i in it])  # what openai-agents does
    raises(openai.BadRequestError, lambda: x.c.conversations.items.create(v.id, items=[it[0].model_dump(exclude_unset=True)]))
@check("conversations")
def conversation_two_turns_at_once(x):
    v = x.c.conversations.create(); out = []
    def go(i):
        try: out.append(x.resp(input=f"turn {i}", conversation=v.id).status)
        except openai.BadRequestError as e: out.append(e.code)
        except Exception as e: out.append(repr(e))
    ts = [threading.Thread(target=go, args=(i,)) for i in range(3)]
    for t in ts: t.start()
    for t in ts: t.join()
    ok(set(out) <= {"completed", "incomplete", "conversation_locked"} and set(out) & {"completed", "incomplete"}, f"outcomes {out}")
    roles = [i.role for i in x.c.conversations.items.list(v.id, order="asc")]; eq(roles, ["user", "assistant"] * (len(roles) // 2), "turns interleaved"); eq(len(roles) // 2, sum(o != "conversation_locked" for o in out), "turns kept")
@check("conversations")
def conversation_other_tenant(x):
    if not x.c2: raise Skip("give --api-key2")
    v, r = x.c.conversations.create(), x.resp(); raises(openai.NotFoundError, lambda: x.c2.conversations.retrieve(v.id)); raises(openai.NotFoundError, lambda: x.c2.responses.retrieve(r.id))
    raises(openai.BadRequestError, lambda: x.c2.responses.create(model=x.model, input="hi", previous_response_id=r.id), "previous_response_not_found"); raises(openai.NotFoundError, lambda: x.c2.conversations.delete(v.id))

@check("conversations")
def conversation_listed_by_metadata(x):
    tag = uuid.uuid4().hex; ids = [x.c.conversations.create(metadata={"tag": tag, "n": str(i)}).id for i in range(3)]; x.c.conversations.create()
    page = lambda **q: x.c.get("/conversations", cast_to=object, options={"params": {"metadata[tag]": tag, **q}})
    eq([v["id"] for v in page(order="asc")["data"]], ids, "listed"); p = page(limit=2); eq(([v["id"] for v in p["data"]], p["has_more"]), (ids[:0:-1], True), "newest two")
    p = page(limit=2, after=p["last_id"]); eq(([v["id"] for v in p["data"]], p["has_more"]), (ids[:1], False), "the rest"); eq(page(**{"metadata[n]": "1", "state": "empty"})["data"][0]["id"], ids[1], "two filters")
@check("conversations")
def conversation_retry_is_one_turn(x):
    v = x.c.conversations.create(); retry = {"X-Stainless-Retry-Count": "1"}
    a, b = x.resp(conversation=v.id), x.resp(conversation=v.id, extra_headers=retry); eq((b.id, b.output_text, b.output[0].id), (a.id, a.output_text, a.output[0].id), "a retry of a finished turn")
    s = x.resp(input=x.LONG, conversation=v.id, stream=True, max_output_tokens=400)
    for i, _e in enumerate(s):
        if i > 5: break
    s.close(); r = x.resp(input=x.LONG, conversation=v.id, stream=True, max_output_tokens=400, extra_headers=retry); events_ok(list(r))
    it = list(x.c.conversations.items.list(v.id, order="asc")); eq([i.role for i in it], ["user", "assistant"] * 2, "roles after a turn that was broken off and sent again")
    x.resp(conversation=v.id); eq(len(list(x.c.conversations.items.list(v.id))), 6, "the same text without a retry count is another turn")
@check("conversations")
def idempotency_key_is_one_turn(x):
    v = x.c.conversations.create(); h = {"Idempotency-Key": uuid.uuid4().hex}
    a = x.c.responses.with_raw_response.create(model=x.model, input="Hi.", conversation=v.id, max_output_tokens=4, extra_headers=h); b = x.c.responses.with_raw_response.create(model=x.model, input="Hi.", conversation=v.id, max_output_tokens=4, extra_headers=h)
    eq((a.headers.get("idempotent-replayed"), b.headers.get("idempotent-replayed")), (None, "true"), "idempotent-replayed"); eq(b.parse().id, a.parse().id, "id"); eq(len(list(x.c.conversations.items.list(v.id))), 2, "items")
    raises(openai.BadRequestError, lambda: x.c.responses.create(model=x.model, input="Other.", conversation=v.id, extra_headers=h), "idempotency_key_reused")
    h = {"Idempotency-Key": uuid.uuid4().hex}; one, two = [list(x.chat(stream=True, extra_headers=h)) for _ in range(2)]; eq([c.model_dump() for c in two], [c.model_dump() for c in one], "a replayed stream")

# ---------------------------------------------------------------- websocket
def ws_turn(conn, **k):
    conn.response.create(**k); evs = []
    while True:
        e = conn.recv(); evs.append(e)
        if e.type in ("response.completed", "response.incomplete", "response.failed", "error"): return evs
def connect(x, **k):
    if not hasattr(x.c.responses, "connect"): raise Skip("this SDK has no responses.connect")
    return x.c.responses.connect(**k)
@check("ws")
def websocket_two_turns(x):
    with connect(x) as w:
        a = events_ok(ws_turn(w, model=x.model, input="Say hello. " * 20, max_output_tokens=12, store=False)); b = events_ok(ws_turn(w, model=x.model, input="Again.", previous_response_id=a.id, max_output_tokens=12, store=False, stream=True))
        ok(b.usage.input_tokens >= a.usage.total_tokens, "history missing"); eq(ws_turn(w, model=x.model, input="x", previous_response_id=a.id, max_output_tokens=2, store=False)[-1].type in ("response.completed", "response.incomplete", "error"), True)
@check("ws")
def websocket_error_keeps_socket(x):
    with connect(x) as w:
        e = ws_turn(w, model=x.model, input="x", previous_response_id="resp_" + "0" * 32)[-1]; eq((e.type, e.status, e.error.code), ("error", 400, "previous_response_not_found")); ok(e.error.message and e.error.type, "nested error")
        w.send_raw("{not json"); eq(w.recv().error.code, "invalid_json"); w.send_raw('{"type":"no.such.event"}'); eq(w.recv().type, "error"); events_ok(ws_turn(w, model=x.model, input="Still there?", max_output_tokens=4))
@check("ws")
def websocket_conversation_and_prewarm(x):
    v = x.c.conversations.create()
    with connect(x) as w:
        r = ws_turn(w, model=x.model, input="Background facts. " * 30, generate=False)[-1]; eq((r.type, r.response.output), ("response.completed", []), "generate=false")
        b = events_ok(ws_turn(w, model=x.model, input="And?", previous_response_id=r.response.id, max_output_tokens=4)); ok(b.usage.input_tokens_details.cached_tokens >= r.response.usage.input_tokens // 2, "the prewarmed input was encoded again")
        eq(events_ok(ws_turn(w, model=x.model, input="Hi.", conversation=v.id, max_output_tokens=4)).conversation.id, v.id)
@check("ws")
def websocket_lanes(x):
    try: from openai.lib.responses_websocket import AsyncResponsesWebSocketSession, ResponsesWebSocketLimits
    except ImportError: raise Skip("this SDK has no lanes")
    async def go():
        async with x.ac() as c:
            async with c.responses.connect() as conn:
                async with AsyncResponsesWebSocketSession(conn, limits=ResponsesWebSocketLimits(max_lanes=4, max_events_per_lane=4096, max_events=9999, max_bytes_per_lane=1 << 24, max_bytes=1 << 25)) as s:
                    ls = [s.lane(n) for n in ("a", "b.2")]
                    for l in ls: await l.send({"type": "response.create", "model": x.model, "input": "Say hello.", "max_output_tokens": 8})
                    return await asyncio.wait_for(asyncio.gather(*(l.get_final_response() for l in ls)), x.a.timeout)
    rs = asyncio.run(go()); eq(len({r.id for r in rs}), 2); ok(all(r.output_text for r in rs), "texts")
@check("ws")
def websocket_cancel_and_close(x):
    with connect(x) as w:
        w.response.create(model=x.model, input=x.LONG, max_output_tokens=2000); rid = w.recv().response.id; w.send_raw(json.dumps({"type": "response.cancel", "response_id": rid}))
        while (e := w.recv()).type not in ("response.completed", "response.incomplete", "response.failed", "error"): pass
        eq((e.type, e.response.status), ("response.incomplete", "cancelled"), "after response.cancel")
    w = connect(x).enter(); w.response.create(model=x.model, input=x.LONG, max_output_tokens=2000); w.recv(); w.close()
    t = time.perf_counter(); x.chat(max_completion_tokens=1); ok(time.perf_counter() - t < x.a.quick, "closing the socket didn't stop the turn")
@check("ws")
def websocket_wrong_key(x):
    from websockets.exceptions import InvalidStatus
    try:
        with x.c.with_options(api_key="wrong").responses.connect() as w: w.recv()
        raise AssertionError("connected with a wrong key")
    except InvalidStatus as e: eq(e.response.status_code, 401, "status of the upgrade")

# ---------------------------------------------------------------- ours
@check("ext")
def ext_residency_warm_pin(x):
    v = x.c.conversations.create(); x.resp(input="One. " * 40, conversation=v.id); p = f"/conversations/{v.id}"
    r = x.c.get(p + "/residency", cast_to=object); eq(r["object"], "conversation.residency"); ok({"device", "host", "disk"} <= set(r["tiers"]) and "predicted" in r and "state" in r, f"{r}")
    eq(x.c.post(p + "/pin", cast_to=object, body={"ttl_seconds": 60})["pinned"], True); eq(x.c.delete(p + "/pin", cast_to=object)["pinned"], False)
    ok(x.c.post(p + "/offload", cast_to=object, body={"to": "host"})["object"] == "conversation.offload", "offload"); w = x.c.post(p + "/warm", cast_to=object, body={"wait": True}); ok(w["state"] in ("warm", "warming", "skipped") and "cost" in w, f"{w}")
@check("ext")
def ext_fork_and_usage(x):
    v = x.c.conversations.create(); a = x.resp(input="One. " * 40, conversation=v.id); f = x.c.post(f"/conversations/{v.id}/fork", cast_to=object, body={})
    ok(f["id"].startswith("conv_") and f["id"] != v.id and f["rekindle"]["forked_from"] == v.id, f"{f}"); b = x.resp(input="Two.", conversation=f["id"]); eq(len(list(x.c.conversations.items.list(v.id))), 2, "the fork wrote into its parent")
    k = b.usage.model_extra["rekindle"]; n = sum(k[i] for i in ("resident_tokens", "shared_tokens", "reloaded_tokens", "encoded_tokens")); eq(n, b.usage.input_tokens, "resident + shared + reloaded + encoded"); eq(n - k["encoded_tokens"], b.usage.input_tokens_details.cached_tokens, "cached_tokens")
@check("ext")
def ext_delete_proves(x):
    v = x.c.conversations.create(); x.resp(conversation=v.id); d = x.c.conversations.delete(v.id); eq(d.model_extra["rekindle"]["remaining_bytes"], 0)
@check("ext")
def ext_typing_warms(x):
    v = x.c.conversations.create(); x.resp(input="One. " * 40, conversation=v.id)
    with connect(x) as w:
        w.send_raw(json.dumps({"type": "session.typing", "conversation": v.id})); e = w.recv(); eq(e.type, "session.warm"); ok("cost" in (e.model_extra or {}) or hasattr(e, "cost"), "no cost"); events_ok(ws_turn(w, model=x.model, input="Hi.", conversation=v.id, max_output_tokens=4))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base-url", default="http://127.0.0.1:8080/v1"); p.add_argument("--api-key", default="none"); p.add_argument("--api-key2", default=""); p.add_argument("--model", required=True)
    p.add_argument("--part", default="", help="comma list of parts; all if empty"); p.add_argument("--only", default="", help="regular expression on check names"); p.add_argument("--verbose", action="store_true"); p.add_argument("--without", default="", help="comma list of checks to leave out")
    p.add_argument("--timeout", type=float, default=120); p.add_argument("--quick", type=float, default=10, help="seconds in which a freed server must answer"); p.add_argument("--overflow", type=int, default=300000, help="words that no context holds")
    a = p.parse_args(); a.base_url = a.base_url.rstrip("/"); x = Ctx(a); n = {"PASS": 0, "FAIL": 0, "skip": 0}
    print(f"openai {openai.__version__}, {a.base_url}, model {a.model}")
    for part, fn in CHECKS:
        if fn.__name__ in a.without.split(","): continue
        if (a.part and part not in a.part.split(",")) or not re.search(a.only, fn.__name__): continue
        t = time.perf_counter(); why = ""
        try: fn(x); res = "PASS"
        except Skip as e: res, why = "skip", str(e)
        except Exception as e:
            res, why = "FAIL", f"{type(e).__name__}: {e}" if not isinstance(e, AssertionError) else str(e)
            if a.verbose: traceback.print_exc()
        n[res] += 1; print(f"{res:4}  {part:13} {fn.__name__:36} {time.perf_counter() - t:6.2f} s  {why[:300]}", flush=True)
    print(f"{n['PASS']} passed, {n['FAIL']} failed, {n['skip']} skipped"); sys.exit(min(n["FAIL"], 125))

if __name__ == "__main__": main()
