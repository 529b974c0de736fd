//! What does a client ask for over a socket?
//!
//! One JSON object a frame, told apart by `type`. What is wrong with one is answered in its own lane and harms no other.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use serde_json::{Map, Value, json};

use super::super::error::ApiError;
use super::super::fields::{self, Fields};
use super::super::warming::{self, Wanted};
use super::super::{ids, items};
use super::lanes::Name;
use crate::sessions::messages::{ConversationId, ResponseId};

/// What a frame asks for.
#[derive(Clone, PartialEq, Debug)]
pub enum Ask {
    /// A turn: the fields of a create, without those of the socket.
    Create(Map<String, Value>),
    Cancel(ResponseId),
    /// Not offered; `input` goes back.
    Steer(Value),
    Warm {
        wanted: Wanted,
        instructions: Option<String>,
        typing: bool,
    },
    /// The conversation is over.
    Done(Wanted),
}

/// Why a frame is refused, and in which lane.
#[derive(Debug)]
pub struct Refused {
    pub lane: Name,
    pub error: ApiError,
}

/// Longest name of a lane.
const LANE_MAX: usize = 256;

/// Reads one frame.
pub fn read(text: &str, depth: usize) -> Result<(Name, Ask), Box<Refused>> {
    let in_no_lane = |error| Box::new(Refused { lane: None, error });
    let mut object = fields::parse_object(text.as_bytes(), depth).map_err(in_no_lane)?;
    let lane = lane(&object).map_err(in_no_lane)?;
    match ask(&mut object) {
        Ok(ask) => Ok((lane, ask)),
        Err(error) => Err(Box::new(Refused { lane, error })),
    }
}

fn lane(object: &Map<String, Value>) -> Result<Name, ApiError> {
    let Some(name) = Fields::of(object).string("stream_id")? else { return Ok(None) };
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    if name.is_empty() || name.len() > LANE_MAX || !name.bytes().all(is_plain) {
        let message = format!("`stream_id` must have 1 to {LANE_MAX} characters of A-Z, a-z, 0-9, `_`, `.` and `-`");
        return Err(ApiError::invalid_value("stream_id", message));
    }
    Ok(Some(name.to_owned()))
}

fn ask(object: &mut Map<String, Value>) -> Result<Ask, ApiError> {
    let kind = Fields::of(object).required_string("type")?.to_owned();
    match kind.as_str() {
        "response.create" => {
            if object.get("response").is_some_and(Value::is_object) {
                let message = "the fields of a create stand at the top level of the event, not in `response`";
                return Err(ApiError::invalid_value("response", message));
            }
            if Fields::of(object).boolean("background")? == Some(true) {
                let message =
                    "a turn over a socket ends with the socket; create it over HTTP to run it in the background";
                return Err(ApiError::unsupported_value("background", message));
            }
            for name in ["type", "stream_id", "stream"] {
                object.remove(name);
            }
            Ok(Ask::Create(std::mem::take(object)))
        }
        "response.cancel" => {
            let id = Fields::of(object).required_string("response_id")?.to_owned();
            ids::parse_response(&id).map(Ask::Cancel).ok_or_else(ApiError::response_not_found)
        }
        "response.steer" => Ok(Ask::Steer(object.get("input").cloned().unwrap_or(Value::Null))),
        "session.typing" | "session.warm" => {
            let mut fields = Fields::of(object);
            let instructions = fields.string("instructions")?.map(str::to_owned);
            warming::check_tier(&mut fields)?;
            Ok(Ask::Warm { wanted: wanted(&mut fields)?, instructions, typing: kind == "session.typing" })
        }
        "session.done" => wanted(&mut Fields::of(object)).map(Ask::Done),
        _ => {
            let message = "`type` must be response.create, response.cancel, response.steer, session.typing, \
                           session.warm or session.done";
            Err(ApiError::invalid_value("type", message))
        }
    }
}

fn wanted(fields: &mut Fields<'_>) -> Result<Wanted, ApiError> {
    if let Some(id) = fields.string("previous_response_id")? {
        let missing = || ApiError::response_not_found().about("previous_response_id");
        let chain = |tip| Wanted::Chain { tip, sees_unkept: false };
        return ids::parse_response(id).map(chain).ok_or_else(missing);
    }
    let id = fields.required_string("conversation")?;
    let missing = || ApiError::conversation_not_found().about("conversation");
    ids::parse_conversation(id).map(Wanted::Conversation).ok_or_else(missing)
}

/// `?conversation=…` of the upgrade.
pub fn conversation_of(query: &str) -> Result<Option<ConversationId>, ApiError> {
    let asked = items::pairs(query)?.into_iter().find(|(key, _)| key == "conversation");
    let Some((_, id)) = asked else { return Ok(None) };
    ids::parse_conversation(&id).map(Some).ok_or_else(ApiError::conversation_not_found)
}

/// An event of the socket's own: an error that belongs to no response.
pub fn error_event(error: &ApiError, lane: &Name) -> String {
    let mut event = error.body();
    if let Value::Object(event) = &mut event {
        event.insert("type".into(), json!("error"));
        event.insert("status".into(), json!(error.status().as_u16()));
    }
    in_lane(event, lane)
}

/// An event as it is sent: with the name of its lane, if that has one.
pub fn in_lane(mut event: Value, lane: &Name) -> String {
    if let (Value::Object(event), Some(name)) = (&mut event, lane) {
        event.insert("stream_id".into(), json!(name));
    }
    event.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_create_is_its_fields_without_those_of_the_socket() {
        let (lane, ask) =
            read(r#"{"type":"response.create","stream_id":"a.b-1","stream":true,"input":"Hi","generate":false}"#, 64)
                .unwrap();
        assert_eq!(lane.as_deref(), Some("a.b-1"));
        let Ask::Create(fields) = ask else { panic!("{ask:?}") };
        let mut names: Vec<_> = fields.keys().collect();
        names.sort_unstable();
        assert_eq!(names, ["generate", "input"]);
    }

    #[test]
    fn what_is_wrong_is_said_by_its_name_and_in_its_lane() {
        let long = format!(r#"{{"type":"response.create","stream_id":"{}"}}"#, "x".repeat(257));
        let table = [
            ("[]", "invalid_json", "", None),
            ("{", "invalid_json", "", None),
            (r#"{"input":"a"}"#, "missing_required_parameter", "type", None),
            (r#"{"type":"response.go","stream_id":"a"}"#, "invalid_value", "type", Some("a")),
            (r#"{"type":"response.create","stream_id":7}"#, "invalid_type", "stream_id", None),
            (r#"{"type":"response.create","stream_id":"a b"}"#, "invalid_value", "stream_id", None),
            (r#"{"type":"response.create","stream_id":""}"#, "invalid_value", "stream_id", None),
            (&long, "invalid_value", "stream_id", None),
            (
                r#"{"type":"response.create","background":true,"stream_id":"a"}"#,
                "unsupported_value",
                "background",
                Some("a"),
            ),
            (r#"{"type":"response.create","response":{"input":"a"}}"#, "invalid_value", "response", None),
            (r#"{"type":"response.cancel"}"#, "missing_required_parameter", "response_id", None),
            (r#"{"type":"response.cancel","response_id":"resp_x"}"#, "response_not_found", "", None),
            (r#"{"type":"session.warm"}"#, "missing_required_parameter", "conversation", None),
            (r#"{"type":"session.done","stream_id":"a"}"#, "missing_required_parameter", "conversation", Some("a")),
            (
                r#"{"type":"session.done","previous_response_id":"resp_x"}"#,
                "response_not_found",
                "previous_response_id",
                None,
            ),
            (r#"{"type":"session.typing","conversation":"conv_x"}"#, "conversation_not_found", "conversation", None),
        ];
        for (frame, code, param, lane) in table {
            let refused = read(frame, 64).expect_err(frame);
            let found = (refused.error.code(), refused.error.param().unwrap_or_default(), refused.lane.as_deref());
            assert_eq!(found, (code, param, lane), "{frame}");
        }
    }

    #[test]
    fn an_error_bears_its_status_and_its_lane() {
        let event: Value =
            serde_json::from_str(&error_event(&ApiError::response_not_found(), &Some("a".into()))).unwrap();
        assert_eq!(
            (&event["type"], &event["status"], &event["stream_id"]),
            (&json!("error"), &json!(404), &json!("a"))
        );
        assert_eq!(event["error"].as_object().unwrap().len(), 4);
        let event: Value = serde_json::from_str(&error_event(&ApiError::response_not_found(), &None)).unwrap();
        assert!(event.get("stream_id").is_none());
    }
}
