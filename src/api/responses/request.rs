//! What does the body of a response's create ask for?
//!
//! Everything of the contract is checked before anything happens; what is not offered is refused by its name.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::time::Duration;

use serde_json::{Map, Value};

use super::super::error::ApiError;
use super::super::fields::Fields;
use super::super::input::Given;
use super::super::{ApiSettings, ApiState, auth, ids, input};
use super::object::Echo;
use crate::sessions::messages::{
    Audience, ConversationId, Goal, NewItem, NewResponse, OnConflict, Overflow, Place, Respond, ResponseId, TurnError,
    TurnLimits,
};
use crate::tenants::Tenant;

/// What is known of a request besides its body.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// A digest of the request.
    pub digest: [u8; 32],
    /// Whether the client may have sent it before.
    pub is_retry: bool,
    /// How long it may queue.
    pub deadline: Duration,
}

/// Reads the fields of a create into a turn. The transport's own fields (`stream`) are left to the caller.
pub async fn read(
    state: &ApiState,
    tenant: &Tenant,
    body: &Map<String, Value>,
    fields: &mut Fields<'_>,
    sent: Sent,
) -> Result<Respond, ApiError> {
    let (mut turn, given) = parse(body, fields, &state.settings, sent)?;
    auth::check_model(tenant, &state.settings)?;
    for given in given {
        turn.input.push(match given {
            Given::Item(item) => item,
            // Said again, as an item of its own.
            Given::Reference { id, path } => {
                let found = state.sessions.item(tenant, &id).await?;
                let found = found.ok_or_else(|| ApiError::item_not_found(Some(&path)))?;
                NewItem { id: None, message: found.message }
            }
        });
    }
    Ok(turn)
}

/// The turn without its input, and that as it was given.
pub fn parse(
    body: &Map<String, Value>,
    fields: &mut Fields<'_>,
    settings: &ApiSettings,
    sent: Sent,
) -> Result<(Respond, Vec<Given>), ApiError> {
    input::model(fields, settings, false)?;
    let store = fields.boolean("store")?.unwrap_or(true);
    let place = place(fields, store)?;
    fields.refuse(&["prompt", "moderation", "context_management", "background_options", "image", "access_programs"])?;
    let background = fields.boolean("background")?.unwrap_or(false);
    if background && !store {
        let message = "`background` needs `store: true`: nobody else would keep the response";
        return Err(ApiError::invalid_value("background", message));
    }
    let goal = goal(fields)?;
    let overflow = match fields.string("truncation")? {
        None | Some("disabled") => Overflow::Refuse,
        Some("auto") => Overflow::DropOldest,
        Some(_) => return Err(ApiError::invalid_value("truncation", "`truncation` must be disabled or auto")),
    };
    let instructions = input::instructions(fields, &settings.limits)?;
    let input = input::input(fields, &settings.limits)?;
    if input.as_ref().is_none_or(Vec::is_empty) && matches!(place, Place::Alone | Place::NewChain) {
        return Err(ApiError::missing("input"));
    }

    let (on_conflict, patience) = ours(fields)?;
    let deadline = patience.map_or(sent.deadline, |patience| patience.min(sent.deadline));
    let mut limits = input::limits(fields, settings, deadline)?;
    limits.max_tokens = input::max_tokens(fields, "max_output_tokens")?;
    let top = input::top_logprobs(fields)?;
    let include = fields.array("include")?.unwrap_or_default();
    let wants_logprobs = include.iter().any(|name| name == "message.output_text.logprobs");
    limits.logprobs = wants_logprobs.then_some(top.unwrap_or(0));
    accept_the_rest(fields, &mut limits)?;

    let response = NewResponse {
        id: ResponseId(rand::random()),
        about: Echo::of(body, place, settings).to_about()?,
        kept: store,
        request: sent.digest,
        is_retry: sent.is_retry,
    };
    let turn = Respond {
        sees_unkept: false,
        place,
        response,
        input: Vec::new(),
        instructions,
        limits,
        on_conflict,
        overflow,
        goal,
        audience: if background { Audience::Background } else { Audience::Readers },
    };
    Ok((turn, input.unwrap_or_default()))
}

/// What is checked, repeated in the response, and changes little or nothing.
fn accept_the_rest(fields: &mut Fields<'_>, limits: &mut TurnLimits) -> Result<(), ApiError> {
    input::no_tools(fields, true)?;
    if let Some(mut text) = fields.object("text")? {
        input::text_format_only(text.object("format")?)?;
        text.string("verbosity")?;
    }
    if let Some(mut reasoning) = fields.object("reasoning")? {
        input::thinking(reasoning.string("effort")?, limits);
        reasoning.string("summary")?;
    }
    fields.metadata()?;
    for name in ["user", "safety_identifier", "prompt_cache_key", "service_tier"] {
        fields.string(name)?;
    }
    fields.count("max_tool_calls", 1)?;
    fields.accept(&["metadata", "prompt_cache_retention", "stream_options"]);
    Ok(())
}

/// Where the history is.
fn place(fields: &mut Fields<'_>, store: bool) -> Result<Place, ApiError> {
    let conversation = conversation(fields)?;
    let previous = fields.string("previous_response_id")?;
    match (conversation, previous) {
        (Some(_), Some(_)) => {
            let message = "give `conversation` or `previous_response_id`, not both";
            Err(ApiError::mutually_exclusive("previous_response_id", message))
        }
        (Some(id), None) => Ok(Place::Conversation(id)),
        (None, Some(previous)) => {
            ids::parse_response(previous).map(Place::After).ok_or_else(|| TurnError::NoPrevious.into())
        }
        (None, None) if store => Ok(Place::NewChain),
        (None, None) => Ok(Place::Alone),
    }
}

/// `generate: false`, and its other name.
fn goal(fields: &mut Fields<'_>) -> Result<Goal, ApiError> {
    let generate = fields.boolean("generate")?.unwrap_or(true);
    let options = fields.object("prompt_cache_options")?;
    let prewarm = options.map(|mut options| options.boolean("prewarm")).transpose()?.flatten().unwrap_or(false);
    Ok(if generate && !prewarm { Goal::Answer } else { Goal::Encode })
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

#[cfg(test)]
mod tests {
    use super::super::super::fields::parse_object;
    use super::super::super::tests::settings;
    use super::*;

    const SENT: Sent = Sent { digest: [0; 32], is_retry: false, deadline: Duration::from_secs(60) };

    fn read(json: &str) -> Result<Respond, ApiError> {
        let body = parse_object(json.as_bytes(), 64).unwrap();
        parse(&body, &mut Fields::of(&body), &settings(), SENT).map(|(turn, _)| turn)
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
            (r#"{"input":"a","previous_response_id":"r"}"#, 400, "previous_response_not_found", "previous_response_id"),
            (
                r#"{"input":"a","previous_response_id":"r","conversation":"conv_00000000000000000000000000000001"}"#,
                400,
                "mutually_exclusive_parameters",
                "previous_response_id",
            ),
            (r#"{"input":"a","background":true,"store":false}"#, 400, "invalid_value", "background"),
            (r#"{"input":"a","prompt":{"id":"p"}}"#, 400, "unsupported_parameter", "prompt"),
            (r#"{"input":"a","generate":0}"#, 400, "invalid_type", "generate"),
            (r#"{"input":"a","truncation":"oldest"}"#, 400, "invalid_value", "truncation"),
            (r#"{"input":"a","max_output_tokens":0}"#, 400, "invalid_value", "max_output_tokens"),
            (r#"{"input":"a","text":{"format":{"type":"json_schema"}}}"#, 400, "unsupported_value", "text.format.type"),
            (r#"{"input":"a","tools":[{"type":"web_search"}]}"#, 400, "unsupported_value", "tools[0].type"),
            (r#"{"input":"a","rekindle":{"on_conflict":"wait"}}"#, 400, "invalid_value", "rekindle.on_conflict"),
            (r#"{"input":"a","rekindle":{"timeout_ms":0}}"#, 400, "invalid_value", "rekindle.timeout_ms"),
            (r#"{"input":"a","instructions":["x"]}"#, 400, "invalid_type", "instructions"),
        ];
        for (json, status, code, param) in table {
            let error = read(json).expect_err(json);
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
        let body = parse_object(json.as_bytes(), 64).unwrap();
        let mut fields = Fields::of(&body);
        let (turn, _) = parse(&body, &mut fields, &settings(), SENT).unwrap();
        assert_eq!((turn.place, turn.on_conflict), (Place::Conversation(ConversationId(1)), OnConflict::Reject));
        assert_eq!(turn.limits.queue_deadline, Duration::from_millis(100));
        fields.accept(&["stream"]);
        assert_eq!(fields.unknown(), ["x_vendor"]);
    }

    #[test]
    fn what_is_not_stored_and_continues_nothing_is_alone() {
        assert_eq!(read(r#"{"input":"a"}"#).unwrap().place, Place::NewChain);
        assert_eq!(read(r#"{"input":"a","store":false}"#).unwrap().place, Place::Alone);
        let previous = ids::response(ResponseId(7));
        let continued = read(&format!(r#"{{"previous_response_id":"{previous}","store":false}}"#)).unwrap();
        assert_eq!((continued.place, continued.response.kept), (Place::After(ResponseId(7)), false));
    }

    #[test]
    fn both_names_of_encoding_without_an_answer_mean_the_same() {
        for field in [r#""generate":false"#, r#""prompt_cache_options":{"prewarm":true}"#] {
            assert_eq!(read(&format!(r#"{{"input":"a",{field}}}"#)).unwrap().goal, Goal::Encode);
        }
        assert_eq!(read(r#"{"input":"a","generate":true}"#).unwrap().goal, Goal::Answer);
    }
}
