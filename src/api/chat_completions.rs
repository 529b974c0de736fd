//! How does a stateless chat completion go, in one piece or as chunks?
//!
//! The client sends all messages; whatever prefix of them the tenant has in a tier is used, unasked.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::future::join_all;
use futures_util::{Stream, StreamExt, stream};
use serde_json::{Map, Value, json};

use super::auth::{self, Caller};
use super::error::ApiError;
use super::fields::Fields;
use super::sse;
use super::{ApiSettings, ApiState, body, ids, input, items, queue_deadline, unix_now, usage};
use crate::sessions::TurnStream;
use crate::sessions::messages::{Complete, FinishReason, TokenLogprob, TurnDone, TurnError, TurnUpdate};

/// POST `/v1/chat/completions`.
pub async fn create(
    request: HttpRequest,
    payload: web::Payload,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let settings = &state.settings;
    let object = body::object(&request, payload, &settings.limits).await?;
    let mut fields = Fields::of(&object);
    let (turn, stream) = parse(&mut fields, settings, queue_deadline(request.headers(), settings))?;
    auth::check_model(&caller, settings)?;
    let ignored = body::unknown(&fields, settings)?;

    let head = Head {
        id: ids::new("chatcmpl-"),
        created: unix_now(),
        model: settings.model.clone(),
        system_fingerprint: settings.system_fingerprint.clone(),
        logprobs: turn.limits.logprobs.is_some(),
    };
    let mut choices = state.sessions.complete(&caller, turn).await?;
    let response = match stream {
        Some(StreamOptions { include_usage }) => {
            let chunks = Chunks::new(head, include_usage, choices.len());
            sse::respond(tell(choices, chunks), settings.keep_alive)
        }
        None => {
            let ends = join_all(choices.iter_mut().map(sse::finish)).await;
            let done: Vec<_> = ends.into_iter().collect::<Result<_, TurnError>>()?;
            HttpResponse::Ok().json(head.completion(&done)?)
        }
    };
    Ok(body::answer_naming(response, ignored))
}

pub(super) struct StreamOptions {
    include_usage: bool,
}

pub(super) fn parse(
    fields: &mut Fields<'_>,
    settings: &ApiSettings,
    deadline: Duration,
) -> Result<(Complete, Option<StreamOptions>), ApiError> {
    input::model(fields, settings, true)?;
    let messages = input::messages(fields, &settings.limits)?;
    let mut limits = input::limits(fields, settings, deadline)?;
    let (new_name, old_name) =
        (input::max_tokens(fields, "max_completion_tokens")?, input::max_tokens(fields, "max_tokens")?);
    if let (Some(new), Some(old)) = (new_name, old_name)
        && new != old
    {
        let message = "`max_tokens` and `max_completion_tokens` are one limit under two names; give one of them";
        return Err(ApiError::mutually_exclusive("max_tokens", message));
    }
    limits.max_tokens = new_name.or(old_name);

    let wants_logprobs = fields.boolean("logprobs")?.unwrap_or(false);
    let top = input::top_logprobs(fields)?;
    if top.is_some_and(|top| top > 0) && !wants_logprobs {
        return Err(ApiError::invalid_value("top_logprobs", "`top_logprobs` needs `logprobs: true`"));
    }
    limits.logprobs = wants_logprobs.then_some(top.unwrap_or(0));

    let choices = fields.integer_in("n", 1..=8)?.and_then(|n| u8::try_from(n).ok()).unwrap_or(1);
    input::no_tools(fields, false)?;
    input::text_format_only(fields.object("response_format")?)?;
    if let Some(modalities) = fields.array("modalities")?
        && modalities.iter().any(|modality| modality != "text")
    {
        return Err(ApiError::unsupported_value("modalities", "only [\"text\"] is supported"));
    }
    fields.refuse(&["audio", "functions", "function_call", "web_search_options", "moderation"])?;
    fields.metadata()?;
    input::thinking(fields.string("reasoning_effort")?, &mut limits);
    fields.string("service_tier")?;
    fields.boolean("store")?;
    fields.accept(&[
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "metadata",
        "prediction",
        "verbosity",
    ]);
    let stream = stream(fields)?;
    Ok((Complete { messages, limits, choices }, stream))
}

/// `stream_options` without `stream: true` is ignored.
fn stream(fields: &mut Fields<'_>) -> Result<Option<StreamOptions>, ApiError> {
    let streams = fields.boolean("stream")?.unwrap_or(false);
    let options = fields.object("stream_options")?;
    if !streams {
        return Ok(None);
    }
    let include_usage = options.map(|mut options| options.boolean("include_usage")).transpose()?.flatten();
    Ok(Some(StreamOptions { include_usage: include_usage.unwrap_or(false) }))
}

/// What every object of one completion has.
struct Head {
    id: String,
    created: i64,
    model: String,
    system_fingerprint: String,
    /// Whether the client asked for log probabilities.
    logprobs: bool,
}

impl Head {
    fn object(&self, kind: &str) -> Map<String, Value> {
        let mut object = Map::new();
        object.insert("id".into(), json!(self.id));
        object.insert("object".into(), json!(kind));
        object.insert("created".into(), json!(self.created));
        object.insert("model".into(), json!(self.model));
        object.insert("system_fingerprint".into(), json!(self.system_fingerprint));
        object.insert("service_tier".into(), json!("default"));
        object
    }

    fn completion(&self, choices: &[TurnDone]) -> Result<Value, ApiError> {
        let choice = |(index, done): (usize, &TurnDone)| {
            let finish_reason = finish_reason(done.finish)?;
            let logprobs = if self.logprobs { logprobs(&done.logprobs) } else { Value::Null };
            let message = json!({"role": "assistant", "content": done.text, "refusal": null, "annotations": []});
            Ok(json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}))
        };
        let mut object = self.object("chat.completion");
        let told: Result<Vec<Value>, ApiError> = choices.iter().enumerate().map(choice).collect();
        object.insert("choices".into(), Value::from(told?));
        object.insert("usage".into(), usage(choices));
        Ok(Value::Object(object))
    }
}

/// The prompt counts once, each generated token as well.
fn usage(choices: &[TurnDone]) -> Value {
    let generated = choices.iter().map(|done| done.usage.generated.0).sum();
    choices.first().map_or(Value::Null, |first| usage::of_chat(first, generated))
}

/// A turn is cancelled under a client that still listens only when the server drains.
fn finish_reason(finish: FinishReason) -> Result<&'static str, ApiError> {
    match finish {
        FinishReason::Stop => Ok("stop"),
        FinishReason::Length => Ok("length"),
        FinishReason::Cancelled => Err(TurnError::Draining.into()),
    }
}

fn logprobs(tokens: &[TokenLogprob]) -> Value {
    json!({"content": items::logprobs(tokens), "refusal": null})
}

/// The choices' updates as chunks, each as it comes.
fn tell(choices: Vec<TurnStream>, mut chunks: Chunks) -> impl Stream<Item = String> {
    let updates = choices.into_iter().enumerate().map(|(index, turn)| {
        stream::unfold(Some(turn), move |turn| async move {
            let mut turn = turn?;
            let update = turn.next().await.unwrap_or_else(|| TurnUpdate::Failed(sse::cut_short()));
            let goes_on = matches!(update, TurnUpdate::Started { .. } | TurnUpdate::Text { .. });
            Some(((index, update), goes_on.then_some(turn)))
        })
        .boxed_local()
    });
    let opening = chunks.open();
    let updates = stream::select_all(updates);
    let rest = stream::unfold((updates, Some(chunks)), |(mut updates, chunks)| async move {
        let mut chunks = chunks?;
        let (index, update) = updates.next().await?;
        let events = match update {
            TurnUpdate::Started { .. } => String::new(),
            TurnUpdate::Text { delta, logprobs } => chunks.text(index, &delta, &logprobs),
            TurnUpdate::Done(done) => chunks.done(index, done),
            TurnUpdate::Failed(error) => chunks.failed(&error.into()),
        };
        let goes_on = !chunks.ended;
        Some((events, (updates, goes_on.then_some(chunks))))
    });
    stream::once(async { opening }).chain(rest)
}

/// The chunks of one completion, in the order that clients rely on.
struct Chunks {
    head: Head,
    include_usage: bool,
    choices: Vec<Choice>,
    /// Nothing comes any more.
    ended: bool,
}

/// How far a choice is.
#[derive(Default)]
struct Choice {
    told_logprobs: usize,
    done: Option<TurnDone>,
}

impl Chunks {
    fn new(head: Head, include_usage: bool, choices: usize) -> Self {
        let choices = (0..choices).map(|_| Choice::default()).collect();
        Self { head, include_usage, choices, ended: false }
    }

    fn chunk(&self, index: usize, delta: &Value, logprobs: &Value, finish_reason: Option<&str>) -> String {
        let choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason});
        self.with_choices(json!([choice]), Value::Null)
    }

    fn with_choices(&self, choices: Value, usage: Value) -> String {
        let mut object = self.head.object("chat.completion.chunk");
        object.insert("choices".into(), choices);
        if self.include_usage {
            object.insert("usage".into(), usage);
        }
        data(&Value::Object(object))
    }

    fn told(&mut self, index: usize, tokens: &[TokenLogprob]) -> Value {
        if let Some(choice) = self.choices.get_mut(index) {
            choice.told_logprobs += tokens.len();
        }
        if self.head.logprobs && !tokens.is_empty() { logprobs(tokens) } else { Value::Null }
    }

    /// All roles, so that choices are seen for the first time in their order.
    fn open(&mut self) -> String {
        let role = json!({"role": "assistant", "content": ""});
        (0..self.choices.len()).map(|index| self.chunk(index, &role, &Value::Null, None)).collect()
    }

    fn text(&mut self, index: usize, delta: &str, tokens: &[TokenLogprob]) -> String {
        let logprobs = self.told(index, tokens);
        if delta.is_empty() && logprobs.is_null() {
            return String::new();
        }
        self.chunk(index, &json!({"content": delta}), &logprobs, None)
    }

    fn done(&mut self, index: usize, done: TurnDone) -> String {
        let finish_reason = match finish_reason(done.finish) {
            Ok(reason) => reason,
            Err(error) => return self.failed(&error),
        };
        // Tokens whose text was never sent, such as the end token's: none is lost.
        let told = self.choices.get(index).map(|choice| choice.told_logprobs).unwrap_or_default();
        let rest = self.told(index, done.logprobs.get(told..).unwrap_or_default());
        let mut events = self.chunk(index, &json!({}), &rest, Some(finish_reason));
        if let Some(choice) = self.choices.get_mut(index) {
            choice.done = Some(done);
        }
        let ended: Option<Vec<TurnDone>> = self.choices.iter().map(|choice| choice.done.clone()).collect();
        if let Some(ended) = ended {
            if self.include_usage {
                events += &self.with_choices(json!([]), usage(&ended));
            }
            events += LAST;
            self.ended = true;
        }
        events
    }

    fn failed(&mut self, error: &ApiError) -> String {
        self.ended = true;
        data(&error.body()) + LAST
    }
}

fn data(value: &Value) -> String {
    format!("data: {value}\n\n")
}

const LAST: &str = "data: [DONE]\n\n";

#[cfg(test)]
mod tests {
    use super::super::fields::parse_object;
    use super::super::tests::settings;
    use super::super::usage::tests::done;
    use super::*;
    use crate::types::{TokenCount, TokenId};

    fn head(logprobs: bool) -> Head {
        Head {
            id: "chatcmpl-1".into(),
            created: 1,
            model: "smollm2".into(),
            system_fingerprint: "fp_test".into(),
            logprobs,
        }
    }

    fn token(text: &str) -> TokenLogprob {
        let top = vec![(TokenId(1), text.as_bytes().to_vec(), -0.5)];
        TokenLogprob { token: TokenId(1), bytes: text.as_bytes().to_vec(), logprob: -0.5, top }
    }

    /// The JSON of every `data:` line; the last must be `[DONE]`.
    fn chunks(events: &str) -> Vec<Value> {
        let lines: Vec<_> = events.split_terminator("\n\n").map(|line| line.strip_prefix("data: ").unwrap()).collect();
        let (last, rest) = lines.split_last().unwrap();
        assert_eq!(*last, "[DONE]");
        rest.iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn told(include_usage: bool) -> Vec<Value> {
        let mut narrator = Chunks::new(head(false), include_usage, 1);
        let events =
            [narrator.open(), narrator.text(0, "Hel", &[]), narrator.text(0, "lo!", &[]), narrator.done(0, done())];
        chunks(&events.concat())
    }

    #[test]
    fn chunks_come_as_role_text_finish_and_usage() {
        let chunks = told(true);
        let deltas: Vec<_> = chunks.iter().map(|chunk| chunk["choices"][0]["delta"].clone()).collect();
        assert_eq!(deltas[0], json!({"role": "assistant", "content": ""}));
        assert_eq!(deltas[1..4], [json!({"content": "Hel"}), json!({"content": "lo!"}), json!({})]);
        let finishes: Vec<_> = chunks.iter().map(|chunk| chunk["choices"][0]["finish_reason"].clone()).collect();
        assert_eq!(finishes, [json!(null), json!(null), json!(null), json!("stop"), json!(null)]);
        assert_eq!(chunks[4]["choices"], json!([]));
        assert_eq!(chunks[4]["usage"]["total_tokens"], 43);
        assert!(chunks[..4].iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)));
        assert!(chunks.iter().all(|chunk| chunk["id"] == "chatcmpl-1" && chunk["object"] == "chat.completion.chunk"));
    }

    #[test]
    fn without_include_usage_no_chunk_has_the_key() {
        let chunks = told(false);
        assert_eq!(chunks.len(), 4);
        assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));
    }

    #[test]
    fn streamed_log_probabilities_are_those_of_the_plain_answer() {
        let done = TurnDone { logprobs: vec![token("Hel"), token("lo!"), token("")], ..done() };
        let plain = head(true).completion(std::slice::from_ref(&done)).unwrap();
        let mut narrator = Chunks::new(head(true), false, 1);
        let events = [
            narrator.open(),
            narrator.text(0, "Hel", &[token("Hel")]),
            narrator.text(0, "lo!", &[token("lo!")]),
            narrator.done(0, done),
        ];
        let streamed: Vec<_> = chunks(&events.concat())
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned())
            .flatten()
            .collect();
        assert_eq!(Value::from(streamed), plain["choices"][0]["logprobs"]["content"]);
        assert_eq!(plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["bytes"], json!([72, 101, 108]));
    }

    #[test]
    fn a_failure_after_the_first_byte_is_an_error_and_an_end() {
        let mut narrator = Chunks::new(head(false), true, 1);
        let chunks = chunks(&(narrator.open() + &narrator.failed(&ApiError::internal())));
        assert_eq!(chunks[1]["error"]["code"], "internal_error");
        let cancelled = TurnDone { finish: FinishReason::Cancelled, ..done() };
        assert!(narrator.done(0, cancelled).contains("\"draining\""));
    }

    #[test]
    fn a_bad_request_is_refused_by_its_field() {
        let table = [
            (r#""temperature":0"#, "", ""),
            (r#""n":8"#, "", ""),
            (r#""n":9"#, "invalid_value", "n"),
            (r#""n":"1""#, "invalid_type", "n"),
            (r#""max_tokens":0"#, "invalid_value", "max_tokens"),
            (r#""max_tokens":5,"max_completion_tokens":6"#, "mutually_exclusive_parameters", "max_tokens"),
            (r#""top_logprobs":2"#, "invalid_value", "top_logprobs"),
            (r#""logprobs":true,"top_logprobs":21"#, "invalid_value", "top_logprobs"),
            (r#""stream":"yes""#, "invalid_type", "stream"),
            (r#""stream":true,"stream_options":{"include_usage":1}"#, "invalid_type", "stream_options.include_usage"),
            (r#""modalities":["text","audio"]"#, "unsupported_value", "modalities"),
            (r#""audio":{"voice":"a"}"#, "unsupported_parameter", "audio"),
            (r#""functions":[{}]"#, "unsupported_parameter", "functions"),
            (r#""metadata":{"a":1}"#, "invalid_type", "metadata.a"),
            (r#""tools":[{"type":"function"}]"#, "unsupported_parameter", "tools"),
        ];
        for (field, code, param) in table {
            let json = format!(r#"{{"model":"smollm2","messages":[{{"role":"user","content":"a"}}],{field}}}"#);
            let object = parse_object(json.as_bytes(), 64).unwrap();
            let parsed = parse(&mut Fields::of(&object), &settings(), Duration::ZERO);
            let found = parsed.err().map(|error| (error.code(), error.param().unwrap_or_default().to_owned()));
            assert_eq!(found.unwrap_or_default(), (code, param.to_owned()), "{field}");
        }
        let other = parse_object(br#"{"model":"gpt-9","messages":[]}"#, 64).unwrap();
        let error = parse(&mut Fields::of(&other), &settings(), Duration::ZERO).err().unwrap();
        assert_eq!((error.status().as_u16(), error.code(), error.param()), (404, "model_not_found", Some("model")));
    }

    #[test]
    fn both_names_of_the_limit_mean_the_same() {
        for field in
            [r#""max_tokens":7"#, r#""max_completion_tokens":7"#, r#""max_tokens":7,"max_completion_tokens":7"#]
        {
            let json = format!(r#"{{"model":"smollm2","messages":[{{"role":"user","content":"a"}}],{field}}}"#);
            let object = parse_object(json.as_bytes(), 64).unwrap();
            let (turn, _) = parse(&mut Fields::of(&object), &settings(), Duration::ZERO).unwrap();
            assert_eq!(turn.limits.max_tokens, Some(TokenCount(7)));
        }
    }
}
