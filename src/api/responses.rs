//! How does a turn of a conversation go, as one response object or as its events?
//!
//! What is not built yet is refused by name, never half done: chains (`previous_response_id`), `background`, retrieval.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Map, Value, json};

use super::auth::{self, Caller};
use super::error::ApiError;
use super::fields::Fields;
use super::sse::{self, Narrator};
use super::{ApiSettings, ApiState, body, ids, input, items, queue_deadline, unix_now, usage};
use crate::sessions::messages::{ConversationId, FinishReason, OnConflict, Respond, TokenLogprob, TurnDone, TurnError};

/// GET `/v1/responses` is the WebSocket mode, which is not there.
pub async fn upgrade() -> Result<HttpResponse, ApiError> {
    Err(ApiError::upgrade_required())
}

/// GET and DELETE `/v1/responses/{id}`: responses are not kept, and their `store` says so.
pub async fn get() -> Result<HttpResponse, ApiError> {
    Err(ApiError::response_not_found())
}

/// POST `/v1/responses`.
pub async fn create(
    request: HttpRequest,
    payload: web::Payload,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let settings = &state.settings;
    let parsed = body::object(&request, payload, &settings.limits).await?;
    let mut fields = Fields::of(&parsed);
    let (turn, streams) = parse(&mut fields, settings, queue_deadline(request.headers(), settings))?;
    auth::check_model(&caller, settings)?;
    let ignored = body::unknown(&fields, settings)?;

    let conversation = turn.conversation;
    let echo = Echo::of(&parsed, conversation, settings);
    let turn = state.sessions.respond(&caller, turn).await;
    let turn = turn.map_err(|error| ApiError::from(error).of_param("messages", "input"))?;
    let events = Events { echo, item_id: turn.item_id().to_owned(), text: String::new(), begun: false, sequence: 0 };
    let response = if streams {
        sse::respond(turn, events, settings.keep_alive)
    } else {
        let done = sse::finish(turn).await.map_err(|error| {
            let error = ApiError::from(error);
            if conversation.is_some() { error.after_storing() } else { error }
        })?;
        HttpResponse::Ok().json(events.echo.response(&Outcome::Ended(&done)))
    };
    Ok(body::answer_naming(response, ignored))
}

pub(super) fn parse(
    fields: &mut Fields<'_>,
    settings: &ApiSettings,
    deadline: Duration,
) -> Result<(Respond, bool), ApiError> {
    input::model(fields, settings, false)?;
    let conversation = conversation(fields)?;
    if fields.string("previous_response_id")?.is_some() {
        if conversation.is_some() {
            let message = "give `conversation` or `previous_response_id`, not both";
            return Err(ApiError::mutually_exclusive("previous_response_id", message));
        }
        return Err(ApiError::unsupported_parameter("previous_response_id"));
    }
    fields.refuse(&[
        "background",
        "prompt",
        "moderation",
        "context_management",
        "background_options",
        "image",
        "access_programs",
    ])?;
    if fields.boolean("generate")? == Some(false) {
        return Err(ApiError::unsupported_value("generate", "encoding without generating is not supported yet"));
    }
    if let Some(mut options) = fields.object("prompt_cache_options")?
        && options.boolean("prewarm")? == Some(true)
    {
        let message = "encoding without generating is not supported yet";
        return Err(ApiError::unsupported_value("prompt_cache_options.prewarm", message));
    }
    match fields.string("truncation")? {
        None | Some("disabled") => {}
        Some("auto") => {
            let message = "leaving out old turns is not supported yet; use disabled";
            return Err(ApiError::unsupported_value("truncation", message));
        }
        Some(_) => return Err(ApiError::invalid_value("truncation", "`truncation` must be disabled or auto")),
    }

    let instructions = input::instructions(fields, &settings.limits)?;
    let input = input::input(fields, &settings.limits)?;
    if input.as_ref().is_none_or(Vec::is_empty) && conversation.is_none() {
        return Err(ApiError::missing("input"));
    }

    let (on_conflict, patience) = ours(fields)?;
    let mut limits = input::limits(fields, settings, patience.map_or(deadline, |patience| patience.min(deadline)))?;
    limits.max_tokens = input::max_tokens(fields, "max_output_tokens")?;
    let top = input::top_logprobs(fields)?;
    let include = fields.array("include")?.unwrap_or_default();
    let wants_logprobs = include.iter().any(|name| name == "message.output_text.logprobs");
    limits.logprobs = wants_logprobs.then_some(top.unwrap_or(0));

    input::no_tools(fields, true)?;
    if let Some(mut text) = fields.object("text")? {
        input::text_format_only(text.object("format")?)?;
        text.string("verbosity")?;
    }
    if let Some(mut reasoning) = fields.object("reasoning")? {
        reasoning.string("effort")?;
        reasoning.string("summary")?;
    }
    fields.metadata()?;
    fields.boolean("store")?;
    for name in ["user", "safety_identifier", "prompt_cache_key", "service_tier"] {
        fields.string(name)?;
    }
    fields.count("max_tool_calls", 1)?;
    fields.accept(&["metadata", "prompt_cache_retention", "stream_options"]);
    let streams = fields.boolean("stream")?.unwrap_or(false);
    Ok((Respond { conversation, input: input.unwrap_or_default(), instructions, limits, on_conflict }, streams))
}

/// `conversation`: an id, or an object that has one.
fn conversation(fields: &mut Fields<'_>) -> Result<Option<ConversationId>, ApiError> {
    let text = match fields.value("conversation") {
        Some(Value::Object(_)) => match fields.object("conversation")? {
            Some(mut object) => object.required_string("id")?,
            None => return Ok(None),
        },
        Some(_) => match fields.string("conversation")? {
            Some(text) => text,
            None => return Ok(None),
        },
        None => return Ok(None),
    };
    ids::parse_conversation(text).map(Some).ok_or_else(|| TurnError::NoConversation.into())
}

/// `rekindle: {on_conflict, timeout_ms}`.
fn ours(fields: &mut Fields<'_>) -> Result<(OnConflict, Option<Duration>), ApiError> {
    let Some(mut ours) = fields.object("rekindle")? else { return Ok((OnConflict::Queue, None)) };
    let path = ours.path("on_conflict");
    let on_conflict = match ours.string("on_conflict")? {
        None | Some("queue") => OnConflict::Queue,
        Some("reject") => OnConflict::Reject,
        Some(_) => return Err(ApiError::invalid_value(&path, format!("`{path}` must be queue or reject"))),
    };
    let patience = ours.count("timeout_ms", 1)?.map(|ms| Duration::from_millis(u64::from(ms)));
    Ok((on_conflict, patience))
}

/// How far a response is.
enum Outcome<'a> {
    Running,
    Ended(&'a TurnDone),
    Failed(&'a ApiError),
}

/// What a response repeats of its request, and its identity: the same in all its events.
struct Echo {
    id: String,
    created_at: i64,
    model: String,
    conversation: Option<ConversationId>,
    request: Map<String, Value>,
}

impl Echo {
    fn of(request: &Map<String, Value>, conversation: Option<ConversationId>, settings: &ApiSettings) -> Self {
        const REPEATED: [&str; 16] = [
            "instructions",
            "metadata",
            "max_output_tokens",
            "max_tool_calls",
            "parallel_tool_calls",
            "tool_choice",
            "temperature",
            "top_p",
            "top_logprobs",
            "truncation",
            "text",
            "reasoning",
            "prompt_cache_key",
            "safety_identifier",
            "user",
            "service_tier",
        ];
        let repeated = request.iter().filter(|(key, value)| REPEATED.contains(&key.as_str()) && !value.is_null());
        Self {
            id: ids::new("resp_"),
            created_at: unix_now(),
            model: settings.model.clone(),
            conversation,
            request: repeated.map(|(key, value)| (key.clone(), value.clone())).collect(),
        }
    }

    fn or(&self, key: &str, default: Value) -> Value {
        self.request.get(key).cloned().unwrap_or(default)
    }

    fn within(&self, object: &str, key: &str, default: Value) -> Value {
        let value = self.request.get(object).and_then(|object| object.get(key)).filter(|value| !value.is_null());
        value.cloned().unwrap_or(default)
    }

    /// The object; every field is always there, since SDKs read them blindly.
    fn response(&self, outcome: &Outcome<'_>) -> Value {
        let (status, completed_at, error, incomplete_details, output, usage) = match outcome {
            Outcome::Running => ("in_progress", None, None, None, Vec::new(), Value::Null),
            Outcome::Failed(error) => ("failed", None, Some(error.as_response_error()), None, Vec::new(), Value::Null),
            Outcome::Ended(done) => {
                let (status, reason) = match done.finish {
                    FinishReason::Stop => ("completed", None),
                    FinishReason::Length => ("incomplete", Some(json!({"reason": "max_output_tokens"}))),
                    FinishReason::Cancelled => ("cancelled", None),
                };
                let completed_at = (done.finish == FinishReason::Stop).then(unix_now);
                (status, completed_at, None, reason, vec![answer(done)], usage::of_response(done))
            }
        };
        json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": completed_at,
            "status": status,
            "background": false,
            "error": error,
            "incomplete_details": incomplete_details,
            "conversation": self.conversation.map(|id| json!({"id": ids::conversation(id)})),
            "previous_response_id": null,
            "instructions": self.or("instructions", Value::Null),
            "model": self.model,
            "metadata": self.or("metadata", json!({})),
            "max_output_tokens": self.or("max_output_tokens", Value::Null),
            "max_tool_calls": self.or("max_tool_calls", Value::Null),
            "output": output,
            "parallel_tool_calls": self.or("parallel_tool_calls", json!(true)),
            "tool_choice": self.or("tool_choice", json!("auto")),
            "tools": [],
            "temperature": self.or("temperature", json!(1.0)),
            "top_p": self.or("top_p", json!(1.0)),
            "top_logprobs": self.or("top_logprobs", json!(0)),
            "truncation": self.or("truncation", json!("disabled")),
            // Whatever was asked for: no response can be retrieved here yet.
            "store": false,
            "text": {"format": {"type": "text"}, "verbosity": self.within("text", "verbosity", json!("medium"))},
            "reasoning": {
                "effort": self.within("reasoning", "effort", Value::Null),
                "summary": self.within("reasoning", "summary", Value::Null),
            },
            "service_tier": "default",
            "prompt_cache_key": self.or("prompt_cache_key", Value::Null),
            "safety_identifier": self.or("safety_identifier", Value::Null),
            "user": self.or("user", Value::Null),
            "usage": usage,
        })
    }
}

/// The answer as the one item of `output`.
fn answer(done: &TurnDone) -> Value {
    let status = match done.finish {
        FinishReason::Stop => "completed",
        FinishReason::Length | FinishReason::Cancelled => "incomplete",
    };
    items::message(&done.item_id, "assistant", status, &[items::output_text(&done.text, &done.logprobs)])
}

/// The events of one response, numbered from 0.
struct Events {
    echo: Echo,
    item_id: String,
    /// The deltas so far.
    text: String,
    /// Whether the answer's item has been opened.
    begun: bool,
    sequence: u64,
}

impl Events {
    fn event(&mut self, kind: &str, body: Value) -> String {
        let mut event = Map::new();
        event.insert("type".into(), json!(kind));
        event.insert("sequence_number".into(), json!(self.sequence));
        self.sequence += 1;
        if let Value::Object(body) = body {
            event.extend(body);
        }
        format!("event: {kind}\ndata: {}\n\n", Value::Object(event))
    }

    /// An event about the answer's only part.
    fn part_event(&mut self, kind: &str, body: Value) -> String {
        let mut about = json!({"item_id": self.item_id, "output_index": 0, "content_index": 0});
        if let (Value::Object(about), Value::Object(body)) = (&mut about, body) {
            about.extend(body);
        }
        self.event(kind, about)
    }

    /// Opens the answer's item, once.
    fn begin(&mut self) -> String {
        if std::mem::replace(&mut self.begun, true) {
            return String::new();
        }
        let item = items::message(&self.item_id, "assistant", "in_progress", &[]);
        let added = self.event("response.output_item.added", json!({"output_index": 0, "item": item}));
        added + &self.part_event("response.content_part.added", json!({"part": items::output_text("", &[])}))
    }
}

impl Narrator for Events {
    fn open(&mut self) -> String {
        let response = self.echo.response(&Outcome::Running);
        let created = self.event("response.created", json!({"response": response}));
        created + &self.event("response.in_progress", json!({"response": response}))
    }

    fn text(&mut self, delta: &str, tokens: &[TokenLogprob]) -> String {
        let begin = self.begin();
        self.text += delta;
        let body = json!({"delta": delta, "logprobs": items::logprobs(tokens)});
        begin + &self.part_event("response.output_text.delta", body)
    }

    fn done(&mut self, done: TurnDone) -> String {
        let mut events = self.begin();
        if self.text != done.text {
            tracing::error!(item = self.item_id, "the deltas of an answer are not its text");
        }
        let tokens = items::logprobs(&done.logprobs);
        events += &self.part_event("response.output_text.done", json!({"text": done.text, "logprobs": tokens}));
        let part = items::output_text(&done.text, &done.logprobs);
        events += &self.part_event("response.content_part.done", json!({"part": part}));
        events += &self.event("response.output_item.done", json!({"output_index": 0, "item": answer(&done)}));
        let last = match done.finish {
            FinishReason::Stop => "response.completed",
            FinishReason::Length | FinishReason::Cancelled => "response.incomplete",
        };
        let response = self.echo.response(&Outcome::Ended(&done));
        events + &self.event(last, json!({"response": response}))
    }

    fn failed(&mut self, error: ApiError) -> String {
        let response = self.echo.response(&Outcome::Failed(&error));
        self.event("response.failed", json!({"response": response}))
    }
}

#[cfg(test)]
mod tests {
    use super::super::fields::parse_object;
    use super::super::tests::settings;
    use super::super::usage::tests::done;
    use super::*;

    fn events(request: &str) -> Events {
        let echo = Echo::of(&parse_object(request.as_bytes(), 64).unwrap(), Some(ConversationId(1)), &settings());
        Events { echo, item_id: "msg_1".into(), text: String::new(), begun: false, sequence: 0 }
    }

    fn read(events: &str) -> Vec<Value> {
        let read = |event: &str| {
            let (kind, data) = event.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
            let data: Value = serde_json::from_str(data).unwrap();
            assert_eq!(data["type"], kind);
            data
        };
        events.split_terminator("\n\n").map(read).collect()
    }

    const ORDER: [&str; 8] = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ];

    #[test]
    fn events_come_in_order_numbered_and_add_up_to_the_response() {
        for (finish, last, status, item_status) in [
            (FinishReason::Stop, "response.completed", "completed", "completed"),
            (FinishReason::Length, "response.incomplete", "incomplete", "incomplete"),
            (FinishReason::Cancelled, "response.incomplete", "cancelled", "incomplete"),
        ] {
            let mut narrator = events("{}");
            let told = [
                narrator.open(),
                narrator.text("Hel", &[]),
                narrator.text("lo!", &[]),
                narrator.done(TurnDone { finish, ..done() }),
            ];
            let told = read(&told.concat());
            let mut kinds: Vec<_> = told.iter().map(|event| event["type"].as_str().unwrap()).collect();
            kinds.dedup();
            assert_eq!(kinds, [&ORDER[..], &[last]].concat());
            let numbers: Vec<_> = told.iter().map(|event| event["sequence_number"].as_u64().unwrap()).collect();
            assert_eq!(numbers, (0..told.len() as u64).collect::<Vec<_>>());
            let text: String = told.iter().filter_map(|event| event["delta"].as_str()).collect();
            let response = &told.last().unwrap()["response"];
            assert_eq!(response["output"][0]["content"][0]["text"], text.as_str());
            assert_eq!(response["output"][0], told[told.len() - 2]["item"]);
            assert_eq!(response["output"][0]["id"], told[2]["item"]["id"]);
            assert_eq!((&response["status"], &response["output"][0]["status"]), (&json!(status), &json!(item_status)));
            assert_eq!(response["incomplete_details"].is_null(), finish != FinishReason::Length);
            assert_eq!(response["id"], told[0]["response"]["id"]);
        }
    }

    #[test]
    fn an_answer_without_text_still_has_its_item() {
        let mut narrator = events("{}");
        let told = read(&(narrator.open() + &narrator.done(TurnDone { text: String::new(), ..done() })));
        let kinds: Vec<_> = told.iter().map(|event| event["type"].as_str().unwrap()).collect();
        assert_eq!(kinds.len(), 8);
        assert_eq!(kinds[2..4], ORDER[2..4]);
    }

    #[test]
    fn a_failure_ends_the_stream_with_the_sdks_own_error_code() {
        let mut narrator = events("{}");
        let told = read(&(narrator.open() + &narrator.failed(TurnError::QueueTimeout("late".into()).into())));
        let last = told.last().unwrap();
        assert_eq!((&last["type"], &last["sequence_number"]), (&json!("response.failed"), &json!(2)));
        assert_eq!(last["response"]["error"], json!({"code": "server_error", "message": "late (queue_timeout)"}));
        assert_eq!(last["response"]["status"], "failed");
    }

    #[test]
    fn a_response_always_has_every_field() {
        let narrator = events(r#"{"temperature":0.7,"metadata":{"a":"b"},"text":{"verbosity":"low"},"top_p":null}"#);
        let running = narrator.echo.response(&Outcome::Running);
        let keys: Vec<_> = running.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            [
                "id",
                "object",
                "created_at",
                "completed_at",
                "status",
                "background",
                "error",
                "incomplete_details",
                "conversation",
                "previous_response_id",
                "instructions",
                "model",
                "metadata",
                "max_output_tokens",
                "max_tool_calls",
                "output",
                "parallel_tool_calls",
                "tool_choice",
                "tools",
                "temperature",
                "top_p",
                "top_logprobs",
                "truncation",
                "store",
                "text",
                "reasoning",
                "service_tier",
                "prompt_cache_key",
                "safety_identifier",
                "user",
                "usage"
            ]
        );
        assert_eq!(running["temperature"], json!(0.7));
        assert_eq!(running["top_p"], json!(1.0));
        assert_eq!(running["text"], json!({"format": {"type": "text"}, "verbosity": "low"}));
        assert_eq!(running["output"], json!([]));
        let ended = narrator.echo.response(&Outcome::Ended(&done()));
        let same: Vec<_> = ended.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, same);
        assert!(ended["completed_at"].is_i64());
    }

    #[test]
    fn a_bad_request_is_refused_by_its_field() {
        let table = [
            (r#"{}"#, 400, "missing_required_parameter", "input"),
            (r#"{"input":[]}"#, 400, "missing_required_parameter", "input"),
            (r#"{"input":"a","model":"gpt-9"}"#, 404, "model_not_found", "model"),
            (r#"{"input":"a","model":1}"#, 400, "invalid_type", "model"),
            (r#"{"input":"a","conversation":"conv_1"}"#, 404, "conversation_not_found", "conversation"),
            (r#"{"input":"a","conversation":{}}"#, 400, "missing_required_parameter", "conversation.id"),
            (r#"{"input":"a","conversation":7}"#, 400, "invalid_type", "conversation"),
            (r#"{"input":"a","previous_response_id":"resp_1"}"#, 400, "unsupported_parameter", "previous_response_id"),
            (
                r#"{"input":"a","previous_response_id":"r","conversation":"conv_00000000000000000000000000000001"}"#,
                400,
                "mutually_exclusive_parameters",
                "previous_response_id",
            ),
            (r#"{"input":"a","background":true}"#, 400, "unsupported_parameter", "background"),
            (r#"{"input":"a","prompt":{"id":"p"}}"#, 400, "unsupported_parameter", "prompt"),
            (r#"{"input":"a","generate":false}"#, 400, "unsupported_value", "generate"),
            (r#"{"input":"a","truncation":"auto"}"#, 400, "unsupported_value", "truncation"),
            (r#"{"input":"a","max_output_tokens":0}"#, 400, "invalid_value", "max_output_tokens"),
            (r#"{"input":"a","text":{"format":{"type":"json_schema"}}}"#, 400, "unsupported_value", "text.format.type"),
            (r#"{"input":"a","tools":[{"type":"web_search"}]}"#, 400, "unsupported_value", "tools[0].type"),
            (r#"{"input":"a","rekindle":{"on_conflict":"wait"}}"#, 400, "invalid_value", "rekindle.on_conflict"),
            (r#"{"input":"a","rekindle":{"timeout_ms":0}}"#, 400, "invalid_value", "rekindle.timeout_ms"),
            (r#"{"input":"a","instructions":["x"]}"#, 400, "invalid_type", "instructions"),
        ];
        for (json, status, code, param) in table {
            let object = parse_object(json.as_bytes(), 64).unwrap();
            let error = parse(&mut Fields::of(&object), &settings(), Duration::ZERO).expect_err(json);
            let found = (error.status().as_u16(), error.code(), error.param().unwrap_or_default());
            assert_eq!(found, (status, code, param), "{json}");
        }
    }

    #[test]
    fn what_agents_send_with_every_turn_is_accepted() {
        let json = r#"{"input":"a","include":[],"tools":[],"instructions":"Be brief.","stream":true,"background":false,
            "conversation":{"id":"conv_00000000000000000000000000000001"},"store":true,"metadata":{},"prompt":null,
            "tool_choice":"auto","parallel_tool_calls":true,"reasoning":{"effort":"none"},"text":{"format":{"type":"text"}},
            "rekindle":{"on_conflict":"reject","timeout_ms":100},"x_vendor":1}"#;
        let object = parse_object(json.as_bytes(), 64).unwrap();
        let mut fields = Fields::of(&object);
        let (turn, streams) = parse(&mut fields, &settings(), Duration::from_secs(60)).unwrap();
        assert!(streams);
        assert_eq!((turn.conversation, turn.on_conflict), (Some(ConversationId(1)), OnConflict::Reject));
        assert_eq!(turn.limits.queue_deadline, Duration::from_millis(100));
        assert_eq!(fields.unknown(), ["x_vendor"]);
    }
}
