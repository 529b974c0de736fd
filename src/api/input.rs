//! What did the client say, and how does it want its answer?
//!
//! Messages of chat completions, items of responses and conversations, and the sampling fields that both share.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::time::Duration;

use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, number, wrong_type};
use super::{ApiSettings, Limits, ids};
use crate::sessions::messages::{
    Argument, Message, NewItem, Part, RESERVED, Role, Sampling, ToolCall, TurnError, TurnLimits,
};
use crate::types::{TokenCount, TokenId};

const STOPS_MAX: usize = 16;
const STOP_MAX_BYTES: usize = 256;
const BIASES_MAX: usize = 1024;
/// Values for the chat template.
const ARGUMENTS_MAX: usize = 64;

/// `messages` of a chat completion.
pub fn messages(fields: &mut Fields<'_>, limits: &Limits) -> Result<Vec<Message>, ApiError> {
    let list = fields.array("messages")?.ok_or_else(|| ApiError::missing("messages"))?;
    if list.is_empty() {
        return Err(ApiError::invalid_value("messages", "`messages` is empty; give at least one message"));
    }
    if list.len() > limits.messages {
        return Err(ApiError::array_too_long("messages", list.len(), limits.messages));
    }
    list.iter().enumerate().map(|(index, value)| chat_message(format!("messages[{index}]"), value, limits)).collect()
}

fn chat_message(path: String, value: &Value, limits: &Limits) -> Result<Message, ApiError> {
    let mut fields = Fields::at(path, value)?;
    let role = role(&mut fields)?;
    fields.refuse(&["function_call", "audio"])?;
    let calls = tool_calls(&mut fields, role)?;
    let call_id = match role {
        Role::Tool => Some(fields.required_string("tool_call_id")?.to_owned()),
        Role::System | Role::Developer | Role::User | Role::Assistant => None,
    };
    let name = fields.string("name")?.map(str::to_owned);
    let refusal = fields.string("refusal")?;
    let path = fields.path("content");
    let mut content = match fields.value("content") {
        Some(value) => parts(&path, value, &["text", "refusal"], limits)?,
        None if role == Role::Assistant => Vec::new(),
        None if fields.has("content") => return Err(wrong_type(&path, "a string or an array of parts", &Value::Null)),
        None => return Err(ApiError::missing(&path)),
    };
    if let (true, Some(refusal)) = (content.is_empty(), refusal) {
        content.push(Part::Refusal(refusal.to_owned()));
    }
    Ok(Message { role, name, content, calls, call_id })
}

/// What an assistant's message called, in a history: whether it can be rendered is the template's to say.
fn tool_calls(fields: &mut Fields<'_>, role: Role) -> Result<Vec<ToolCall>, ApiError> {
    let path = fields.path("tool_calls");
    let list = fields.array("tool_calls")?.unwrap_or_default();
    if !list.is_empty() && role != Role::Assistant {
        return Err(ApiError::invalid_value(&path, "only messages of the assistant have `tool_calls`"));
    }
    let call = |(index, value): (usize, &Value)| {
        let mut call = Fields::at(format!("{path}[{index}]"), value)?;
        let type_path = call.path("type");
        if call.string("type")?.unwrap_or("function") != "function" {
            return Err(ApiError::unsupported_value(&type_path, "calls of this type are not supported"));
        }
        let id = call.required_string("id")?.to_owned();
        let function_path = call.path("function");
        let mut function = call.object("function")?.ok_or_else(|| ApiError::missing(&function_path))?;
        let name = function.required_string("name")?.to_owned();
        Ok(ToolCall { id, name, arguments: function.required_string("arguments")?.to_owned() })
    };
    list.iter().enumerate().map(call).collect()
}

fn role(fields: &mut Fields<'_>) -> Result<Role, ApiError> {
    let path = fields.path("role");
    match fields.required_string("role")? {
        "system" => Ok(Role::System),
        "developer" => Ok(Role::Developer),
        "user" => Ok(Role::User),
        "assistant" => Ok(Role::Assistant),
        "tool" => Ok(Role::Tool),
        _ => Err(ApiError::invalid_value(&path, format!("`{path}` must be system, developer, user or assistant"))),
    }
}

/// A message's content: a string, or parts of the given types.
fn parts(path: &str, value: &Value, types: &[&str], limits: &Limits) -> Result<Vec<Part>, ApiError> {
    match value {
        Value::String(text) => Ok(vec![Part::Text(bounded(path, text, limits)?)]),
        Value::Array(list) => list
            .iter()
            .enumerate()
            .map(|(index, value)| part(format!("{path}[{index}]"), value, types, limits))
            .collect(),
        other => Err(wrong_type(path, "a string or an array of parts", other)),
    }
}

fn part(path: String, value: &Value, types: &[&str], limits: &Limits) -> Result<Part, ApiError> {
    let mut fields = Fields::at(path, value)?;
    let type_path = fields.path("type");
    let kind = fields.required_string("type")?;
    if !types.contains(&kind) {
        let message =
            format!("content parts of this type are not supported; `{type_path}` may be {}", types.join(", "));
        return Err(ApiError::unsupported_value(&type_path, message));
    }
    let key = if kind == "refusal" { "refusal" } else { "text" };
    let text = bounded(&fields.path(key), fields.required_string(key)?, limits)?;
    Ok(if kind == "refusal" { Part::Refusal(text) } else { Part::Text(text) })
}

fn bounded(path: &str, text: &str, limits: &Limits) -> Result<String, ApiError> {
    let fewest = TokenCount(u32::try_from(text.len() / limits.longest_token_bytes.max(1)).unwrap_or(u32::MAX));
    if text.len() > limits.text_bytes && fewest >= limits.window {
        // Whatever it says: clients know what to do about this one.
        return Err(TurnError::ContextLength { prompt: fewest, window: limits.window }.into());
    }
    if text.len() > limits.text_bytes {
        let (length, most) = (text.len(), limits.text_bytes);
        let message = format!("`{path}` has {length} bytes, at most {most} are allowed in one text");
        return Err(ApiError::string_too_long(path, message));
    }
    Ok(text.to_owned())
}

/// One item of a request.
#[derive(Debug)]
pub enum Given {
    Item(NewItem),
    /// The id of one that the tenant has, and where the request names it.
    Reference {
        id: String,
        path: String,
    },
}

/// `input` of a response: a string, or items.
pub fn input(fields: &mut Fields<'_>, limits: &Limits) -> Result<Option<Vec<Given>>, ApiError> {
    match fields.value("input") {
        None => Ok(None),
        Some(Value::String(text)) => {
            let content = vec![Part::Text(bounded("input", text, limits)?)];
            Ok(Some(vec![Given::Item(NewItem { id: None, message: Message::new(Role::User, content) })]))
        }
        Some(Value::Array(list)) => given("input", list, limits.input_items, limits).map(Some),
        Some(other) => Err(wrong_type("input", "a string or an array of items", other)),
    }
}

/// Items of `path`, none of them a reference.
pub fn items(path: &str, list: &[Value], most: usize, limits: &Limits) -> Result<Vec<NewItem>, ApiError> {
    let item = |given| match given {
        Given::Item(item) => Ok(item),
        Given::Reference { path, .. } => {
            Err(ApiError::unsupported_value(&path, "references to items are for `input`; give the item itself"))
        }
    };
    given(path, list, most, limits)?.into_iter().map(item).collect()
}

/// Items of `path`. Reasoning is dropped: no template that is served here renders it.
fn given(path: &str, list: &[Value], most: usize, limits: &Limits) -> Result<Vec<Given>, ApiError> {
    if list.len() > most {
        return Err(ApiError::array_too_long(path, list.len(), most));
    }
    let items: Result<Vec<_>, _> =
        list.iter().enumerate().map(|(index, value)| item(format!("{path}[{index}]"), value, limits)).collect();
    Ok(items?.into_iter().flatten().collect())
}

fn item(path: String, value: &Value, limits: &Limits) -> Result<Option<Given>, ApiError> {
    let mut fields = Fields::at(path, value)?;
    let type_path = fields.path("type");
    match fields.string("type")? {
        None | Some("message") => {}
        Some("reasoning") => return Ok(None),
        Some("item_reference") => {
            let path = fields.path("id");
            return Ok(Some(Given::Reference { id: fields.required_string("id")?.to_owned(), path }));
        }
        Some(kind) => {
            let kind: String = kind.chars().take(64).collect();
            let message = format!(
                "items of type `{kind}` are not supported; `{type_path}` may be message, reasoning or item_reference"
            );
            return Err(ApiError::unsupported_value(&type_path, message));
        }
    }
    let role = role(&mut fields)?;
    if role == Role::Tool {
        let path = fields.path("role");
        return Err(ApiError::invalid_value(&path, format!("`{path}` must be system, developer, user or assistant")));
    }
    let path = fields.path("content");
    let value = fields.value("content").ok_or_else(|| ApiError::missing(&path))?;
    let content = parts(&path, value, &["input_text", "output_text", "text", "refusal"], limits)?;
    let id = fields.string("id")?.filter(|id| ids::is_usable_item_id(id)).map(str::to_owned);
    Ok(Some(Given::Item(NewItem { id, message: Message::new(role, content) })))
}

/// `instructions`: one system message, for this response only.
pub fn instructions(fields: &mut Fields<'_>, limits: &Limits) -> Result<Option<String>, ApiError> {
    fields.string("instructions")?.map(|text| bounded("instructions", text, limits)).transpose()
}

/// The model that the client names must be the one that is served.
pub fn model(fields: &mut Fields<'_>, settings: &ApiSettings, required: bool) -> Result<(), ApiError> {
    match fields.string("model")? {
        Some(name) if name == settings.model => Ok(()),
        Some(name) => Err(ApiError::model_not_found(name, &settings.model)),
        None if required => Err(ApiError::missing("model")),
        None => Ok(()),
    }
}

/// Everything about how to answer that chat completions and responses share. `max_tokens` and `logprobs` are the
/// routes' own.
pub fn limits(fields: &mut Fields<'_>, settings: &ApiSettings, deadline: Duration) -> Result<TurnLimits, ApiError> {
    let sampling = Sampling {
        temperature: narrow(fields.number_in("temperature", 0.0..=2.0)?.unwrap_or(1.0)),
        top_p: narrow(fields.number_in("top_p", 0.0..=1.0)?.unwrap_or(1.0)),
        top_k: top_k(fields)?,
        min_p: narrow(fields.number_in("min_p", 0.0..=1.0)?.unwrap_or(0.0)),
        repetition_penalty: repetition_penalty(fields)?,
        presence_penalty: narrow(fields.number_in("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0)),
        frequency_penalty: narrow(fields.number_in("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0)),
        logit_bias: logit_bias(fields, settings.vocab)?,
        seed: fields.integer("seed")?.map_or_else(rand::random, i64::cast_unsigned),
        min_tokens: fields.count("min_tokens", 0)?.unwrap_or(0),
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
    };
    let arguments = template_arguments(fields)?;
    let stop = stop(fields)?;
    Ok(TurnLimits { sampling, max_tokens: None, stop, queue_deadline: deadline, logprobs: None, arguments })
}

/// `chat_template_kwargs`: plain values for variables of the template's own.
fn template_arguments(fields: &mut Fields<'_>) -> Result<Vec<(String, Argument)>, ApiError> {
    let Some(given) = fields.object("chat_template_kwargs")? else { return Ok(Vec::new()) };
    if given.count_all() > ARGUMENTS_MAX {
        return Err(ApiError::array_too_long("chat_template_kwargs", given.count_all(), ARGUMENTS_MAX));
    }
    let argument = |(name, value): (&String, &Value)| {
        let shown: String = name.chars().take(64).collect();
        let path = format!("chat_template_kwargs.{shown}");
        if RESERVED.contains(&name.as_str()) {
            return Err(ApiError::invalid_value(&path, format!("`{path}` is the server's own to give")));
        }
        let value = match value {
            Value::Bool(value) => Argument::Bool(*value),
            Value::String(text) => Argument::Text(text.clone()),
            Value::Number(number) => match (number.as_i64(), number.as_f64()) {
                (Some(number), _) => Argument::Integer(number),
                (None, Some(number)) => Argument::Number(number),
                (None, None) => return Err(ApiError::invalid_value(&path, format!("`{path}` is no usable number"))),
            },
            other => return Err(wrong_type(&path, "a boolean, a number or a string", other)),
        };
        Ok((name.clone(), value))
    };
    given.pairs().filter(|(_, value)| !value.is_null()).map(argument).collect()
}

/// An effort of `none` turns thinking off where the template can; any other leaves it on.
pub fn thinking(effort: Option<&str>, limits: &mut TurnLimits) {
    const SWITCH: &str = "enable_thinking";
    if effort == Some("none") && limits.arguments.iter().all(|(name, _)| name != SWITCH) {
        limits.arguments.push((SWITCH.to_owned(), Argument::Bool(false)));
    }
}

#[expect(clippy::cast_possible_truncation, reason = "sampling is done in f32, and the ranges are small")]
fn narrow(number: f64) -> f32 {
    number as f32
}

fn top_k(fields: &mut Fields<'_>) -> Result<u32, ApiError> {
    // vLLM's clients send -1 for "all".
    let number = fields.integer_in("top_k", -1..=i64::from(u32::MAX))?.unwrap_or(0);
    Ok(u32::try_from(number).unwrap_or(0))
}

fn repetition_penalty(fields: &mut Fields<'_>) -> Result<f32, ApiError> {
    let penalty = fields.number_in("repetition_penalty", 0.0..=100.0)?.unwrap_or(1.0);
    if penalty < 0.01 {
        let message = "`repetition_penalty` must be from 0.01 to 100; 1 is off";
        return Err(ApiError::invalid_value("repetition_penalty", message));
    }
    Ok(narrow(penalty))
}

/// Ids are checked here against the vocabulary, so that the engine never sees one that isn't there.
fn logit_bias(fields: &mut Fields<'_>, vocab: usize) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let Some(bias) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    if bias.count_all() > BIASES_MAX {
        return Err(ApiError::array_too_long("logit_bias", bias.count_all(), BIASES_MAX));
    }
    let entry = |(key, value): (&String, &Value)| {
        let shown: String = key.chars().take(64).collect();
        let path = format!("logit_bias.{shown}");
        let digits = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_digit());
        let id = digits.then(|| key.parse().ok()).flatten().filter(|id: &u32| (*id as usize) < vocab);
        let id = id.ok_or_else(|| {
            let message = format!("`{shown}` is not a token id: they go from 0 to {}", vocab.saturating_sub(1));
            ApiError::invalid_value(&path, message)
        })?;
        Ok((TokenId(id), narrow(number(&path, value, -100.0..=100.0)?)))
    };
    bias.pairs().map(entry).collect()
}

fn stop(fields: &mut Fields<'_>) -> Result<Vec<String>, ApiError> {
    let one = |path: &str, value: &Value| {
        let text = value.as_str().ok_or_else(|| wrong_type(path, "a string", value))?;
        match text.len() {
            0 => Err(ApiError::invalid_value(path, format!("`{path}` is empty; leave it out for no stop string"))),
            1..=STOP_MAX_BYTES => Ok(text.to_owned()),
            long => {
                let message = format!("`{path}` has {long} bytes, at most {STOP_MAX_BYTES} are allowed");
                Err(ApiError::string_too_long(path, message))
            }
        }
    };
    match fields.value("stop") {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() > STOPS_MAX => {
            Err(ApiError::array_too_long("stop", list.len(), STOPS_MAX))
        }
        Some(Value::Array(list)) => {
            list.iter().enumerate().map(|(index, value)| one(&format!("stop[{index}]"), value)).collect()
        }
        Some(value @ Value::String(_)) => Ok(vec![one("stop", value)?]),
        Some(other) => Err(wrong_type("stop", "a string or an array of strings", other)),
    }
}

/// A limit on the answer's tokens, at least 1.
pub fn max_tokens(fields: &mut Fields<'_>, key: &'static str) -> Result<Option<TokenCount>, ApiError> {
    Ok(fields.count(key, 1)?.map(TokenCount))
}

/// How many alternatives to report with each token.
pub fn top_logprobs(fields: &mut Fields<'_>) -> Result<Option<u8>, ApiError> {
    let number = fields.integer_in("top_logprobs", 0..=20)?;
    Ok(number.and_then(|number| u8::try_from(number).ok()))
}

/// `tools` and their company: until function calls exist only "none of them" is accepted.
pub fn no_tools(fields: &mut Fields<'_>, function_tools_only: bool) -> Result<(), ApiError> {
    let tools = fields.array("tools")?.unwrap_or(&[]);
    if function_tools_only {
        for (index, tool) in tools.iter().enumerate() {
            let mut tool = Fields::at(format!("tools[{index}]"), tool)?;
            let path = tool.path("type");
            if tool.required_string("type")? != "function" {
                return Err(ApiError::unsupported_value(&path, "tools of this type are not supported"));
            }
        }
    }
    if !tools.is_empty() {
        return Err(ApiError::unsupported_parameter("tools"));
    }
    fields.boolean("parallel_tool_calls")?;
    match fields.value("tool_choice") {
        None => Ok(()),
        Some(Value::String(choice)) if choice == "auto" || choice == "none" => Ok(()),
        Some(_) => {
            let message = "without `tools` there is nothing to choose; `tool_choice` may be auto or none";
            Err(ApiError::unsupported_value("tool_choice", message))
        }
    }
}

/// `response_format` (chat) or `text.format` (responses): only plain text until constrained output exists.
pub fn text_format_only(format: Option<Fields<'_>>) -> Result<(), ApiError> {
    let Some(mut format) = format else { return Ok(()) };
    let path = format.path("type");
    match format.required_string("type")? {
        "text" => Ok(()),
        kind @ ("json_object" | "json_schema") => Err(ApiError::unsupported_value(
            &path,
            format!("Invalid parameter: 'response_format' of type '{kind}' is not supported with this model; use text"),
        )),
        _ => Err(ApiError::invalid_value(&path, format!("`{path}` must be text, json_object or json_schema"))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fields::parse_object;
    use super::super::tests::{LIMITS, settings};
    use super::*;

    fn refusal<T: std::fmt::Debug>(
        json: &str,
        read: impl FnOnce(&mut Fields<'_>) -> Result<T, ApiError>,
    ) -> (&'static str, String) {
        let body = parse_object(json.as_bytes(), 64).unwrap();
        let error = read(&mut Fields::of(&body)).expect_err(json);
        (error.code(), error.param().unwrap_or_default().to_owned())
    }

    #[test]
    fn a_bad_message_is_refused_by_its_path() {
        let table = [
            (r#"{}"#, "missing_required_parameter", "messages"),
            (r#"{"messages":[]}"#, "invalid_value", "messages"),
            (r#"{"messages":"hi"}"#, "invalid_type", "messages"),
            (r#"{"messages":["hi"]}"#, "invalid_type", "messages[0]"),
            (r#"{"messages":[{"content":"a"}]}"#, "missing_required_parameter", "messages[0].role"),
            (r#"{"messages":[{"role":7,"content":"a"}]}"#, "invalid_type", "messages[0].role"),
            (r#"{"messages":[{"role":"bot","content":"a"}]}"#, "invalid_value", "messages[0].role"),
            (r#"{"messages":[{"role":"user"}]}"#, "missing_required_parameter", "messages[0].content"),
            (r#"{"messages":[{"role":"user","content":null}]}"#, "invalid_type", "messages[0].content"),
            (r#"{"messages":[{"role":"user","content":3}]}"#, "invalid_type", "messages[0].content"),
            (r#"{"messages":[{"role":"user","content":"a","name":1}]}"#, "invalid_type", "messages[0].name"),
            (
                r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{}}]}]}"#,
                "unsupported_value",
                "messages[0].content[0].type",
            ),
            (
                r#"{"messages":[{"role":"user","content":[{"type":"text"}]}]}"#,
                "missing_required_parameter",
                "messages[0].content[0].text",
            ),
            (
                r#"{"messages":[{"role":"tool","content":"a"}]}"#,
                "missing_required_parameter",
                "messages[0].tool_call_id",
            ),
            (
                r#"{"messages":[{"role":"assistant","content":null,"tool_calls":[{"id":"c"}]}]}"#,
                "missing_required_parameter",
                "messages[0].tool_calls[0].function",
            ),
            (
                r#"{"messages":[{"role":"user","content":"","tool_calls":[{"id":"c"}]}]}"#,
                "invalid_value",
                "messages[0].tool_calls",
            ),
        ];
        for (json, code, param) in table {
            assert_eq!(refusal(json, |fields| messages(fields, &LIMITS)), (code, param.to_owned()), "{json}");
        }
    }

    #[test]
    fn messages_come_as_strings_parts_and_nothing() {
        let json = r#"{"messages":[{"role":"developer","content":""},{"role":"assistant"},
            {"role":"assistant","content":null,"refusal":"no","tool_calls":[]},
            {"role":"user","name":"ann","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}]}"#;
        let body = parse_object(json.as_bytes(), 64).unwrap();
        let messages = messages(&mut Fields::of(&body), &LIMITS).unwrap();
        let text = |text: &str| Part::Text(text.into());
        assert_eq!(messages[0], Message::new(Role::Developer, vec![text("")]));
        assert_eq!(messages[1].content, []);
        assert_eq!(messages[2].content, [Part::Refusal("no".into())]);
        assert_eq!(messages[3].name.as_deref(), Some("ann"));
        assert_eq!(messages[3].content, [text("a"), text("b")]);
    }

    #[test]
    fn a_bad_item_is_refused_by_its_path() {
        let table = [
            (r#"{"input":7}"#, "invalid_type", "input"),
            (r#"{"input":[{"role":"user"}]}"#, "missing_required_parameter", "input[0].content"),
            (r#"{"input":[{"role":"tool","content":""}]}"#, "invalid_value", "input[0].role"),
            (r#"{"input":[{"type":"item_reference"}]}"#, "missing_required_parameter", "input[0].id"),
            (r#"{"input":[{"type":"function_call_output"}]}"#, "unsupported_value", "input[0].type"),
            (
                r#"{"input":[{"role":"user","content":[{"type":"input_text","text":"a"},{"type":"input_image"}]}]}"#,
                "unsupported_value",
                "input[0].content[1].type",
            ),
            (
                r#"{"input":[{"role":"user","content":"a"},{"role":"user","content":"a"},{"role":"user","content":"a"}]}"#,
                "array_above_max_length",
                "input",
            ),
        ];
        let limits = Limits { input_items: 2, ..LIMITS };
        for (json, code, param) in table {
            assert_eq!(refusal(json, |fields| input(fields, &limits)), (code, param.to_owned()), "{json}");
        }
    }

    #[test]
    fn items_as_we_return_them_are_accepted_back() {
        let json = r#"{"input":[{"id":"msg_1","type":"message","role":"assistant","status":"completed","phase":"x",
            "content":[{"type":"output_text","text":"a","annotations":[],"logprobs":[]}]},
            {"type":"reasoning","id":"rs_1","summary":[]},{"role":"user","id":"not usable!","content":"b"},
            {"type":"item_reference","id":"msg_9"}]}"#;
        let body = parse_object(json.as_bytes(), 64).unwrap();
        let items = input(&mut Fields::of(&body), &LIMITS).unwrap().unwrap();
        let id = |given: &Given| match given {
            Given::Item(item) => item.id.clone(),
            Given::Reference { id, path } => Some(format!("{id} at {path}")),
        };
        let ids: Vec<_> = items.iter().map(id).collect();
        assert_eq!(ids, [Some("msg_1".into()), None, Some("msg_9 at input[3].id".into())]);
    }

    #[test]
    fn a_bad_sampling_field_is_refused_by_its_name() {
        let table = [
            (r#"{"temperature":3}"#, "invalid_value", "temperature"),
            (r#"{"temperature":"1"}"#, "invalid_type", "temperature"),
            (r#"{"top_p":-0.1}"#, "invalid_value", "top_p"),
            (r#"{"top_k":1.5}"#, "invalid_type", "top_k"),
            (r#"{"seed":1.5}"#, "invalid_type", "seed"),
            (r#"{"seed":18446744073709551615}"#, "invalid_type", "seed"),
            (r#"{"presence_penalty":2.1}"#, "invalid_value", "presence_penalty"),
            (r#"{"frequency_penalty":-2.1}"#, "invalid_value", "frequency_penalty"),
            (r#"{"repetition_penalty":0}"#, "invalid_value", "repetition_penalty"),
            (r#"{"logit_bias":{"999999999":1}}"#, "invalid_value", "logit_bias.999999999"),
            (r#"{"logit_bias":{"hello":1}}"#, "invalid_value", "logit_bias.hello"),
            (r#"{"logit_bias":{"+1":1}}"#, "invalid_value", "logit_bias.+1"),
            (r#"{"logit_bias":{"1":"x"}}"#, "invalid_type", "logit_bias.1"),
            (r#"{"logit_bias":{"1":101}}"#, "invalid_value", "logit_bias.1"),
            (r#"{"logit_bias":[]}"#, "invalid_type", "logit_bias"),
            (r#"{"stop":""}"#, "invalid_value", "stop"),
            (r#"{"stop":["a",1]}"#, "invalid_type", "stop[1]"),
            (r#"{"stop":7}"#, "invalid_type", "stop"),
            (r#"{"ignore_eos":1}"#, "invalid_type", "ignore_eos"),
        ];
        for (json, code, param) in table {
            let read = |fields: &mut Fields<'_>| limits(fields, &settings(), Duration::ZERO);
            assert_eq!(refusal(json, read), (code, param.to_owned()), "{json}");
        }
        let stops = format!(r#"{{"stop":[{}]}}"#, vec![r#""a""#; 17].join(","));
        assert_eq!(refusal(&stops, stop).0, "array_above_max_length");
        let long = format!(r#"{{"stop":"{}"}}"#, "a".repeat(257));
        assert_eq!(refusal(&long, stop).0, "string_above_max_length");
    }

    #[test]
    fn sampling_defaults_are_those_of_the_contract() {
        let body = parse_object(br#"{"stop":[],"logit_bias":null,"seed":-1}"#, 64).unwrap();
        let limits = limits(&mut Fields::of(&body), &settings(), Duration::from_secs(60)).unwrap();
        let expected = Sampling { temperature: 1.0, seed: u64::MAX, ..Sampling::default() };
        assert_eq!(limits.sampling, expected);
        assert!(limits.stop.is_empty());
    }

    #[test]
    fn structured_output_is_refused_in_the_words_that_langchain_looks_for() {
        let body = parse_object(br#"{"response_format":{"type":"json_schema","json_schema":{}}}"#, 64).unwrap();
        let error = text_format_only(Fields::of(&body).object("response_format").unwrap()).unwrap_err();
        assert_eq!((error.code(), error.param()), ("unsupported_value", Some("response_format.type")));
        assert!(error.to_string().contains("'response_format' of type 'json_schema' is not supported with this model"));
    }

    #[test]
    fn tools_are_refused_and_no_tools_are_fine() {
        for fine in [r#"{}"#, r#"{"tools":[],"tool_choice":"auto"}"#, r#"{"tools":null,"parallel_tool_calls":false}"#] {
            let body = parse_object(fine.as_bytes(), 64).unwrap();
            no_tools(&mut Fields::of(&body), true).unwrap();
        }
        let read = |fields: &mut Fields<'_>| no_tools(fields, true);
        assert_eq!(refusal(r#"{"tools":[{"type":"web_search"}]}"#, read).1, "tools[0].type");
        assert_eq!(refusal(r#"{"tools":[{"type":"function"}]}"#, read), ("unsupported_parameter", "tools".to_owned()));
        assert_eq!(refusal(r#"{"tool_choice":"required"}"#, read).1, "tool_choice");
    }
}
