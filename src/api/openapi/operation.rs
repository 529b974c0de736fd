//! What does one method of a route take, and what may it answer?
//!
//! The words that stand beside a handler in the router's table.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::super::codes;

/// A type of the document, and all that it is made of.
#[derive(Clone, Copy)]
struct Type {
    name: fn() -> String,
    schemas: fn() -> Vec<(String, Value)>,
}

impl Type {
    fn of<T: ToSchema>() -> Self {
        Self { name: || T::name().into_owned(), schemas: schemas_of::<T> }
    }

    fn reference(self) -> Value {
        json!({"$ref": format!("#/components/schemas/{}", (self.name)())})
    }
}

/// A type by its name, and those within it.
pub fn schemas_of<T: ToSchema>() -> Vec<(String, Value)> {
    let mut all = vec![(T::name().into_owned(), T::schema())];
    T::schemas(&mut all);
    // A schema that is no JSON can't be: it is made of texts and numbers.
    all.into_iter().map(|(name, schema)| (name, serde_json::to_value(schema).unwrap_or_default())).collect()
}

/// One possible success.
enum Answer {
    Json(u16, Type),
    Events(Type),
    Media(&'static str),
    Empty(u16),
}

/// What is said of one method of a route.
pub struct Doc {
    pub summary: &'static str,
    body: Option<(Type, bool)>,
    pages: bool,
    replays: bool,
    answers: Vec<Answer>,
    codes: Vec<&'static str>,
}

/// Begins with one line of what it does.
pub fn doc(summary: &'static str) -> Doc {
    Doc { summary, body: None, pages: false, replays: false, answers: Vec::new(), codes: Vec::new() }
}

/// One server-sent event whose data is this type, as OpenAPI describes such streams: `schema` is that of each event.
fn event(of: &Type) -> Value {
    let holds = json!({"type": "string", "contentMediaType": "application/json", "contentSchema": of.reference()});
    let data = json!({"anyOf": [{"const": "[DONE]"}, holds]});
    json!({"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}, "data": data}})
}

impl Doc {
    /// Needs a body.
    pub fn takes<T: ToSchema>(self) -> Self {
        Self { body: Some((Type::of::<T>(), true)), ..self }.refuses(codes::BODY)
    }

    /// Does with a body or without.
    pub fn may_take<T: ToSchema>(self) -> Self {
        Self { body: Some((Type::of::<T>(), false)), ..self }.refuses(codes::BODY)
    }

    /// Is a list of which a query asks for one page.
    pub fn pages(self) -> Self {
        Self { pages: true, ..self }.refuses(&["invalid_value", "item_not_found"])
    }

    /// Gives events again, from a number that the query names.
    pub fn replays(self) -> Self {
        Self { replays: true, ..self }.refuses(&["invalid_value"])
    }

    pub fn gives<T: ToSchema>(self) -> Self {
        self.gives_as::<T>(200)
    }

    pub fn gives_as<T: ToSchema>(mut self, status: u16) -> Self {
        self.answers.push(Answer::Json(status, Type::of::<T>()));
        self
    }

    /// Answers with `stream: true` as server-sent events of this type.
    pub fn streams<T: ToSchema>(mut self) -> Self {
        self.answers.push(Answer::Events(Type::of::<T>()));
        self
    }

    /// Answers with something that is no JSON.
    pub fn gives_media(mut self, media_type: &'static str) -> Self {
        self.answers.push(Answer::Media(media_type));
        self
    }

    /// Answers with its headers alone.
    pub fn gives_nothing(mut self, status: u16) -> Self {
        self.answers.push(Answer::Empty(status));
        self
    }

    /// Runs a turn.
    pub fn turns(self) -> Self {
        self.refuses(codes::TURN)
    }

    /// Reads or writes history.
    pub fn stored(self) -> Self {
        self.refuses(codes::STORE)
    }

    pub fn refuses(mut self, codes: &[&'static str]) -> Self {
        self.codes.extend(codes);
        self
    }

    pub(super) fn schemas(&self) -> Vec<(String, Value)> {
        let answers = self.answers.iter().filter_map(|answer| match answer {
            Answer::Json(_, of) | Answer::Events(of) => Some(*of),
            Answer::Media(_) | Answer::Empty(_) => None,
        });
        answers.chain(self.body.map(|(of, _)| of)).flat_map(|of| (of.schemas)()).collect()
    }

    pub(super) fn query(&self) -> Vec<Value> {
        let parameter = |name: &str, schema: Value, about: &str| json!({"name": name, "in": "query", "required": false, "schema": schema, "description": about});
        if self.replays {
            return vec![
                parameter("stream", json!({"type": "boolean", "default": false}), "Whether to give the events."),
                parameter(
                    "starting_after",
                    json!({"type": "integer", "minimum": 0}),
                    "Only events with a greater number; needs `stream=true`.",
                ),
            ];
        }
        if !self.pages {
            return Vec::new();
        }
        vec![
            parameter(
                "limit",
                json!({"type": "integer", "minimum": 1, "maximum": 100, "default": 20}),
                "Most entries of the page.",
            ),
            parameter("order", json!({"type": "string", "enum": ["asc", "desc"], "default": "desc"}), "By age."),
            parameter("after", json!({"type": "string"}), "An id: the page begins behind it, in that order."),
        ]
    }

    pub(super) fn body(&self) -> Option<Value> {
        let (of, required) = self.body?;
        Some(json!({"required": required, "content": {"application/json": {"schema": of.reference()}}}))
    }

    /// By status, with the codes that are for all routes of a kind.
    pub(super) fn responses(&self, more: impl Iterator<Item = &'static str>) -> Value {
        let mut responses = Map::new();
        for answer in &self.answers {
            let (status, media_type, schema) = match answer {
                Answer::Json(status, of) => (*status, "application/json", of.reference()),
                Answer::Events(of) => (200, "text/event-stream", event(of)),
                Answer::Media(media_type) => (200, *media_type, json!({"type": "string"})),
                Answer::Empty(status) => {
                    responses.insert(status.to_string(), json!({"description": outcome(*status)}));
                    continue;
                }
            };
            let response = responses
                .entry(status.to_string())
                .or_insert_with(|| json!({"description": outcome(status), "content": {}}));
            if let Some(Value::Object(content)) = response.get_mut("content") {
                content.insert(media_type.to_owned(), json!({"schema": schema}));
            }
        }
        let mut refusals: BTreeMap<u16, Vec<&codes::Code>> = BTreeMap::new();
        for code in self.codes.iter().copied().chain(more).filter_map(codes::find) {
            let listed = refusals.entry(code.status).or_default();
            if listed.iter().all(|other| other.name != code.name) {
                listed.push(code);
            }
        }
        let error = Type::of::<super::objects::Error>().reference();
        for (status, codes) in refusals {
            let lines: Vec<_> = codes.iter().map(|code| format!("`{}`: {}.", code.name, code.when)).collect();
            let response = responses.entry(status.to_string()).or_insert_with(|| json!({"content": {}}));
            if let Value::Object(response) = response {
                response.insert("description".to_owned(), json!(lines.join(" ")));
                response.insert("content".to_owned(), json!({"application/json": {"schema": error}}));
            }
        }
        Value::Object(responses)
    }
}

/// What an answer of its own kind, no refusal, says by its status.
fn outcome(status: u16) -> &'static str {
    if status < 300 { "Done." } else { "Not now." }
}
