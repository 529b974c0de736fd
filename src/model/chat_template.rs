//! How do messages become the text of a prompt?
//!
//! By the Jinja template in the model's file, run in minijinja as `transformers` would run it in Jinja2: its options, its
//! functions, its JSON. A template is somebody's program: it runs on bounded fuel, and its errors are answers, not
//! crashes. What it refuses in the form it was given is offered again with system messages merged, then with neighbours
//! of one role merged, then with the system text in front of the first user's: templates differ in what they demand.
//! Invariant: no system or tool message is dropped in silence.
#![deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::sync::Arc;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value};

use super::rounds::{self, Resume, Watch, Written};
use super::strftime::strftime_now;

/// What a render may do: about an instruction, or 64 bytes made, a unit. A turn of a common template takes some dozens.
const FUEL: u64 = 1_000_000;
/// What it may do on top for each message.
const FUEL_A_MESSAGE: u64 = 2_000;
/// What it may do on top for each 64 bytes of content: look at it that often.
const FUEL_A_CHUNK: u64 = 64;
/// ChatML, for files without a template whose vocabulary has its tokens.
pub const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                          {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Why messages could not be rendered. No sentence holds text of the template but what it raises itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// What the template raised.
    #[error("{0}")]
    Raised(String),
    #[error("it has no place for a message of the role `{role}`")]
    Dropped { role: String },
    #[error("it does more work than {fuel} steps on them")]
    OutOfFuel { fuel: u64 },
    #[error("it fails in line {line}: {kind}")]
    Failed { line: usize, kind: String },
    #[error("they hold every character that could mark where a message begins")]
    NoShield,
}

/// A message as templates see it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct TemplateMessage {
    pub role: String,
    pub name: Option<String>,
    pub content: String,
    /// Functions that an assistant's message calls.
    pub calls: Vec<ToolCall>,
    /// The call that a tool's message answers.
    pub call_id: Option<String>,
}

/// A call of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    pub id: String,
    pub name: String,
    /// A JSON text.
    pub arguments: String,
}

/// A value for a variable of the template's own, such as `enable_thinking`.
#[derive(Clone, Debug, PartialEq)]
pub enum Argument {
    Bool(bool),
    Integer(i64),
    Number(f64),
    Text(String),
}

/// The variables that every template gets, which are not a client's to set.
pub const RESERVED: [&str; 6] = ["messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "documents"];

/// How a template reads a message's content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum ContentShape {
    Text,
    /// `[{"type": "text", "text": …}]`
    Parts,
}

/// A parsed template.
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
    shape: ContentShape,
    knows_developer: bool,
    /// Whether it has a twin in the environment whose loop can be watched.
    is_watched: bool,
    /// Whether what that writes before the end of its loop may depend on `add_generation_prompt`.
    is_prompted_early: bool,
}

/// The template's names in its environment: as it came, and with a loop that is watched.
const PLAIN: &str = "chat";
const WATCHED: &str = "chat, watched";

/// Gives a message by its place in the conversation, shielded.
pub(super) type MessageAt = Arc<dyn Fn(usize) -> TemplateMessage + Send + Sync>;

impl ChatTemplate {
    /// Parses `source`. `bos` and `eos`: the texts of these tokens, or empty. Errors with the place of a syntax error.
    pub fn new(source: &str, bos: String, eos: String) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let syntax =
            environment.syntax().to_builder().trim_blocks(true).lstrip_blocks(true).build().map_err(failure)?;
        environment.set_syntax(syntax.clone());
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_formatter(print_as_python);
        environment.set_debug(false);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        rounds::teach(&mut environment);
        let source = without_generation_tags(source);
        let watched = rounds::watched(&source, syntax);
        environment.add_template_owned(PLAIN, source.clone()).map_err(failure)?;
        let is_prompted_early = watched.as_ref().is_none_or(|watched| watched.is_prompted_early);
        let is_watched = watched.is_some_and(|watched| environment.add_template_owned(WATCHED, watched.source).is_ok());
        let (shape, knows_developer) = (ContentShape::Text, source.contains("developer"));
        let mut template = Self { environment, bos, eos, shape, knows_developer, is_watched, is_prompted_early };
        template.shape = template.probe_shape();
        template.is_watched &= template.probe_watch();
        Ok(template)
    }

    /// A template whose loop can't be watched in the plainest of conversations is not run twice for each that comes.
    fn probe_watch(&self) -> bool {
        let message = |(role, content): (&str, &str)| TemplateMessage {
            role: role.to_owned(),
            content: content.to_owned(),
            ..TemplateMessage::default()
        };
        let messages: Vec<_> = [("user", "a"), ("assistant", "b"), ("user", "c")].map(message).into();
        let plain = self.run(&messages, true, &[]);
        let count = messages.len();
        let at: MessageAt = Arc::new(move |index| messages.get(index).cloned().unwrap_or_default());
        let watched = self.write(&at, count, None, true, &[]);
        watched.is_some_and(|written| written.next.is_some() && plain == Ok(written.text))
    }

    /// Whether the front of a prompt may depend on `add_generation_prompt`.
    pub fn is_prompted_early(&self) -> bool {
        self.is_prompted_early
    }

    /// Text reaches most templates as a string; those that show only lists of parts are found by trying.
    fn probe_shape(&mut self) -> ContentShape {
        let (role, content) = ("user".to_owned(), "rekindle".to_owned());
        let probe = TemplateMessage { role, content, ..TemplateMessage::default() };
        let mut shows = |shape| {
            self.shape = shape;
            self.run(std::slice::from_ref(&probe), true, &[]).is_ok_and(|text| text.contains("rekindle"))
        };
        if !shows(ContentShape::Text) && shows(ContentShape::Parts) { ContentShape::Parts } else { ContentShape::Text }
    }

    /// Renders. The error is the first form's, the messages as they came.
    pub fn render(
        &self,
        mut messages: Vec<TemplateMessage>,
        add_generation_prompt: bool,
        arguments: &[(String, Argument)],
    ) -> Result<String, TemplateError> {
        messages.iter_mut().for_each(|message| name_role(message, self.knows_developer));
        let mut refused = match self.offer(&messages, add_generation_prompt, arguments) {
            Err(error @ TemplateError::OutOfFuel { .. }) => return Err(error),
            Err(error) => error,
            text => return text,
        };
        for form in [merge_system_messages, merge_neighbours, fold_system_into_user] {
            let before = messages.clone();
            messages = form(messages);
            if messages == before {
                continue;
            }
            match self.offer(&messages, add_generation_prompt, arguments) {
                Ok(text) => return Ok(text),
                // What a template raises says more than that it dropped something.
                Err(error @ TemplateError::Raised(_)) if !matches!(refused, TemplateError::Raised(_)) => {
                    refused = error
                }
                Err(_) => {}
            }
        }
        Err(refused)
    }

    /// Renders the messages as they came, from the round where it resumes, or all of them: what `render` gives of them.
    /// `None` if the template refuses them so, or can't be watched: then only the whole tells.
    pub fn write(
        &self,
        message_at: &MessageAt,
        count: usize,
        resume: Option<Resume>,
        add_generation_prompt: bool,
        arguments: &[(String, Argument)],
    ) -> Option<Written> {
        let is_ours = |(name, _): &(String, Argument)| name.starts_with(rounds::OURS);
        if !self.is_watched || arguments.iter().any(is_ours) {
            return None;
        }
        let first = resume.as_ref().map_or(0, |resume| resume.messages);
        let (message_at, shape, knows_developer) = (Arc::clone(message_at), self.shape, self.knows_developer);
        let message_at = move |index: usize| {
            let mut message = message_at(index);
            name_role(&mut message, knows_developer);
            message
        };
        let fresh: Arc<[TemplateMessage]> = (first..count).map(&message_at).collect();
        let oldest: Option<TemplateMessage> = (count > 0).then(|| message_at(0));
        let fuel = FUEL + fuel(&fresh) + fuel(oldest.as_slice());
        let known = Arc::clone(&fresh);
        let messages = move |index: usize| match index.checked_sub(first).and_then(|index| known.get(index)) {
            Some(message) => context_message(message, shape),
            None => context_message(&message_at(index), shape),
        };
        let watch = Watch::new(Box::new(messages), count, resume);
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let clock = Arc::clone(&watch);
        environment.add_function("strftime_now", move |format: &str| {
            let now = strftime_now(format);
            clock.saw_clock(&now);
            now
        });
        let context = self.context(watch.list(), add_generation_prompt, arguments);
        let template = environment.get_template(WATCHED).ok()?;
        template.render_captured_to(context, watch.pen()).ok()?;
        let written = watch.finish()?;
        accounts_for(&fresh, &written.text).ok()?;
        // A front is only one if what it has to say stands in it, and not in what follows for now.
        let in_front = written.next.as_ref().is_some_and(|(resume, at)| {
            let (messages, text) = (fresh.get(..resume.messages - first), written.text.get(..*at));
            messages.zip(text).is_some_and(|(messages, text)| accounts_for(messages, text).is_ok())
        });
        Some(Written { next: written.next.filter(|_| in_front), ..written })
    }

    /// Renders the messages in this form, and makes sure that none was dropped.
    fn offer(
        &self,
        messages: &[TemplateMessage],
        add_generation_prompt: bool,
        arguments: &[(String, Argument)],
    ) -> Result<String, TemplateError> {
        let text = self.run(messages, add_generation_prompt, arguments)?;
        accounts_for(messages, &text)?;
        Ok(text)
    }

    fn run(
        &self,
        messages: &[TemplateMessage],
        add_generation_prompt: bool,
        arguments: &[(String, Argument)],
    ) -> Result<String, TemplateError> {
        let fuel = FUEL + fuel(messages);
        let messages: Vec<Value> = messages.iter().map(|message| context_message(message, self.shape)).collect();
        let context = self.context(Value::from(messages), add_generation_prompt, arguments);
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let template = environment.get_template(PLAIN).map_err(failure)?;
        template.render(context).map_err(|error| match failure(error) {
            TemplateError::OutOfFuel { .. } => TemplateError::OutOfFuel { fuel },
            error => error,
        })
    }

    /// The variables that the template gets.
    fn context(&self, messages: Value, add_generation_prompt: bool, arguments: &[(String, Argument)]) -> Value {
        let argument = |(name, value): &(String, Argument)| {
            let value = match value {
                Argument::Bool(value) => Value::from(*value),
                Argument::Integer(value) => Value::from(*value),
                Argument::Number(value) => Value::from(*value),
                Argument::Text(value) => Value::from(value.as_str()),
            };
            (name.clone(), value)
        };
        let given = [
            ("messages", messages),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("bos_token", Value::from(self.bos.as_str())),
            ("eos_token", Value::from(self.eos.as_str())),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        let given = given.into_iter().map(|(name, value)| (name.to_owned(), value));
        Value::from(arguments.iter().map(argument).chain(given).collect::<BTreeMap<String, Value>>())
    }
}

/// What a render may do for these messages, on top of `FUEL`.
fn fuel(messages: &[TemplateMessage]) -> u64 {
    let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
    FUEL_A_MESSAGE * messages.len() as u64 + FUEL_A_CHUNK * (bytes as u64 / 64)
}

/// Makes sure that no system or tool message, and no call, is missing in a text.
fn accounts_for(messages: &[TemplateMessage], text: &str) -> Result<(), TemplateError> {
    let mut rest = text;
    for call in messages.iter().flat_map(|message| &message.calls) {
        rest = after_content(rest, &call.name)
            .ok_or_else(|| TemplateError::Dropped { role: "assistant, with its tool calls".to_owned() })?;
    }
    for role in ["system", "developer", "tool"] {
        let mut rest = text;
        for message in messages.iter().filter(|message| message.role == role) {
            rest = after_content(rest, message.content.trim())
                .ok_or_else(|| TemplateError::Dropped { role: role.to_owned() })?;
        }
    }
    Ok(())
}

/// Templates that know no developer call one the system.
fn name_role(message: &mut TemplateMessage, knows_developer: bool) {
    if message.role == "developer" && !knows_developer {
        "system".clone_into(&mut message.role);
    }
}

/// A message as `transformers` gives it.
fn context_message(message: &TemplateMessage, shape: ContentShape) -> Value {
    let content = match shape {
        ContentShape::Text => Value::from(message.content.as_str()),
        ContentShape::Parts => {
            Value::from(vec![Value::from_pairs([("type", "text"), ("text", message.content.as_str())])])
        }
    };
    let role_and_content = [("role", Value::from(message.role.as_str())), ("content", content)];
    let name = message.name.as_deref().map(|name| ("name", Value::from(name)));
    let call_id = message.call_id.as_deref().map(|id| ("tool_call_id", Value::from(id)));
    let calls: Vec<_> = message.calls.iter().map(context_call).collect();
    let calls = (!calls.is_empty()).then(|| ("tool_calls", Value::from(calls)));
    Value::from_pairs(role_and_content.into_iter().chain(name).chain(call_id).chain(calls))
}

/// A call as OpenAI's messages have it.
fn context_call(call: &ToolCall) -> Value {
    let function = Value::from_pairs([
        ("name", Value::from(call.name.as_str())),
        ("arguments", Value::from(call.arguments.as_str())),
    ]);
    let (id, kind) = (Value::from(call.id.as_str()), Value::from("function"));
    Value::from_pairs([("id", id), ("type", kind), ("function", function)])
}

fn is_system(message: &TemplateMessage) -> bool {
    matches!(message.role.as_str(), "system" | "developer")
}

/// All system messages as one, in front.
fn merge_system_messages(messages: Vec<TemplateMessage>) -> Vec<TemplateMessage> {
    let (system, others): (Vec<_>, Vec<_>) = messages.into_iter().partition(is_system);
    system.into_iter().reduce(join).into_iter().chain(others).collect()
}

/// Neighbours of one role as one.
fn merge_neighbours(messages: Vec<TemplateMessage>) -> Vec<TemplateMessage> {
    let mut merged: Vec<TemplateMessage> = Vec::new();
    for message in messages {
        match merged.pop() {
            // Each result of a tool answers a call of its own.
            Some(last) if last.role == message.role && last.call_id.is_none() => merged.push(join(last, message)),
            last => merged.extend(last.into_iter().chain([message])),
        }
    }
    merged
}

/// The system message in front of the first user's text, for templates that have no such role.
fn fold_system_into_user(messages: Vec<TemplateMessage>) -> Vec<TemplateMessage> {
    let (system, mut others): (Vec<_>, Vec<_>) = messages.into_iter().partition(is_system);
    let Some(mut system) = system.into_iter().reduce(join) else { return others };
    match others.iter_mut().find(|message| message.role == "user") {
        Some(user) => user.content = format!("{}\n\n{}", system.content, user.content),
        None => {
            "user".clone_into(&mut system.role);
            others.insert(0, system);
        }
    }
    others
}

fn join(mut first: TemplateMessage, second: TemplateMessage) -> TemplateMessage {
    if !first.content.is_empty() && !second.content.is_empty() {
        first.content.push_str("\n\n");
    }
    first.content.push_str(&second.content);
    first.name = first.name.or(second.name);
    first.calls.extend(second.calls);
    first
}

/// What follows `content` in `text`, where it stands as it is, or inside of a JSON string.
fn after_content<'t>(text: &'t str, content: &str) -> Option<&'t str> {
    if let Some((_, rest)) = text.split_once(content) {
        return Some(rest);
    }
    let quoted = quoted(content);
    let inside = quoted.strip_prefix('"').and_then(|text| text.strip_suffix('"'))?;
    text.split_once(inside).map(|(_, rest)| rest)
}

/// `{% generation %}` marks what to train on and changes nothing in a prompt: it becomes a condition that holds.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag, after)) = next_tag(rest) {
        out.push_str(before);
        match tag.trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out + rest
}

/// Splits `source` at its first block tag: up to and with `{%`, the tag's inside, and from `%}` on.
fn next_tag(source: &str) -> Option<(&str, &str, &str)> {
    let start = source.find("{%")? + 2;
    let (before, inside) = source.split_at_checked(start)?;
    let (tag, after) = inside.split_at_checked(inside.find("%}")?)?;
    Some((before, tag, after))
}

/// Our own error inside of minijinja's, so that what a template raises is told from what goes wrong in it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
}

/// What a minijinja error says to a client: never a line of the template.
fn failure(error: Error) -> TemplateError {
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(inner) = cause {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return TemplateError::Raised(message.clone());
        }
        if inner.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::OutOfFuel) {
            return TemplateError::OutOfFuel { fuel: FUEL };
        }
        cause = inner.source();
    }
    TemplateError::Failed { line: error.line().unwrap_or(0), kind: error.kind().to_string() }
}

/// Jinja2 prints truth values and nothing as Python does.
fn print_as_python(out: &mut minijinja::Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Bool => out.write_str(if value.is_true() { "True" } else { "False" }).map_err(Error::from),
        ValueKind::None => out.write_str("None").map_err(Error::from),
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// `json.dumps` as `transformers` calls it: no HTML escapes, Python's separators.
fn tojson(state: &State, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    let (between_items, after_key) = match separators.as_deref() {
        Some([items, key]) => (items.clone(), key.clone()),
        _ => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let style = PythonJson { indent, sort_keys: sort_keys == Some(true), between_items, after_key };
    let mut text = String::new();
    style.write(&mut text, value, 0)?;
    state.consume_fuel(text.len() as u64 / 64)?;
    Ok(Value::from(if ascii == Some(true) { escape_non_ascii(&text) } else { text }))
}

fn escape_non_ascii(text: &str) -> String {
    let mut units = [0; 2];
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        if c.is_ascii() {
            out.push(c);
        } else {
            out.extend(c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")));
        }
        out
    })
}

/// `json.dumps`'s layout.
struct PythonJson {
    /// Spaces a level; `None` writes one line.
    indent: Option<usize>,
    sort_keys: bool,
    between_items: String,
    after_key: String,
}

impl PythonJson {
    /// Values nested deeper are refused.
    const MAX_DEPTH: usize = 64;

    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        let refused = |what: &'static str| Error::new(ErrorKind::InvalidOperation, what);
        if depth > Self::MAX_DEPTH {
            return Err(refused("nested too deeply for JSON"));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&value.to_string()),
            ValueKind::String => out.push_str(&quoted(value.as_str().unwrap_or_default())),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|item| (None, item)).collect();
                self.write_items(out, ["[", "]"], items, depth)?;
            }
            ValueKind::Map => {
                let keys = value.try_iter()?;
                let mut items = keys
                    .map(|key| value.get_item(&key).map(|item| (Some(key.to_string()), item)))
                    .collect::<Result<Vec<_>, _>>()?;
                if self.sort_keys {
                    items.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.write_items(out, ["{", "}"], items, depth)?;
            }
            _ => return Err(refused("not JSON")),
        }
        Ok(())
    }

    fn write_items(
        &self,
        out: &mut String,
        [open, close]: [&str; 2],
        items: Vec<(Option<String>, Value)>,
        depth: usize,
    ) -> Result<(), Error> {
        let new_line = |out: &mut String, depth: usize| {
            if let Some(indent) = self.indent {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', indent.min(16) * depth));
            }
        };
        let is_empty = items.is_empty();
        out.push_str(open);
        for (index, (key, item)) in items.into_iter().enumerate() {
            if index > 0 {
                out.push_str(&self.between_items);
            }
            new_line(out, depth + 1);
            if let Some(key) = key {
                out.push_str(&quoted(&key));
                out.push_str(&self.after_key);
            }
            self.write(out, &item, depth + 1)?;
        }
        if !is_empty {
            new_line(out, depth);
        }
        out.push_str(close);
        Ok(())
    }
}

/// `text` as a JSON string.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\0'..='\u{1f}' => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            _ => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, "<s>".to_owned(), "</s>".to_owned()).unwrap()
    }

    fn messages(said: &[(&str, &str)]) -> Vec<TemplateMessage> {
        let message = |(role, content): &(&str, &str)| TemplateMessage {
            role: role.to_string(),
            content: content.to_string(),
            ..TemplateMessage::default()
        };
        said.iter().map(message).collect()
    }

    fn render(source: &str, said: &[(&str, &str)]) -> Result<String, TemplateError> {
        template(source).render(messages(said), false, &[])
    }

    const EACH: &str = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}";
    /// Demands one system message, in front, and alternation, as Mistral's does.
    const STRICT: &str = "
        {%- if messages[0].role == 'system' %}[system]{{ messages[0].content }}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
        {%- for m in rest %}
            {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
            {{- '[' + m.role + ']' + m.content }}
        {%- endfor %}";

    #[test]
    fn developer_is_system_where_the_template_does_not_name_it() {
        assert_eq!(render(EACH, &[("developer", "d"), ("user", "u")]).unwrap(), "[system]d[user]u");
        let knows = EACH.to_owned() + "{# developer #}";
        assert_eq!(render(&knows, &[("developer", "d"), ("user", "u")]).unwrap(), "[developer]d[user]u");
    }

    #[test]
    fn messages_are_merged_only_where_the_template_demands_it() {
        let said =
            [("user", "a"), ("user", "b"), ("system", "s"), ("assistant", "c"), ("assistant", "d"), ("system", "t")];
        assert_eq!(render(EACH, &said).unwrap(), "[user]a[user]b[system]s[assistant]c[assistant]d[system]t");
        assert_eq!(render(STRICT, &said).unwrap(), "[system]s\n\nt[user]a\n\nb[assistant]c\n\nd");
        assert_eq!(
            render(STRICT, &[("assistant", "a"), ("user", "b")]),
            Err(TemplateError::Raised("roles must alternate".into()))
        );
    }

    #[test]
    fn a_system_message_is_never_dropped() {
        let said = [("system", "Be kind."), ("user", "u")];
        let silent =
            "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}";
        assert_eq!(render(silent, &said).unwrap(), "[user]Be kind.\n\nu");
        let loud =
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}".to_owned() + EACH;
        assert_eq!(render(&loud, &said).unwrap(), "[user]Be kind.\n\nu");
        assert_eq!(render(&loud, &[("system", "Be kind.")]).unwrap(), "[user]Be kind.");
    }

    #[test]
    fn a_tool_message_without_a_place_is_refused() {
        let silent = "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}";
        let refused = render(silent, &[("user", "u"), ("tool", "t")]);
        assert_eq!(refused, Err(TemplateError::Dropped { role: "tool".into() }));
        let quoted = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}";
        assert_eq!(render(quoted, &[("tool", "a\"b\n")]).unwrap(), r#""a\"b\n""#);
    }

    #[test]
    fn a_template_that_reads_only_parts_gets_parts() {
        let source = "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}";
        assert_eq!(render(source, &[("user", "u")]).unwrap(), "u");
    }

    #[test]
    fn white_space_around_blocks_is_jinjas_as_transformers_sets_it() {
        let source = "{{ bos_token }}\n{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n";
        assert_eq!(render(source, &[("user", "u")]).unwrap(), "<s>\nu\n");
    }

    #[test]
    fn generation_tags_change_nothing() {
        let source = "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration %}{% generation %}!{% endgeneration %}{% endfor %}";
        assert_eq!(render(source, &[("user", "u")]).unwrap(), "u!");
    }

    #[test]
    fn json_is_pythons() {
        let value = "{% set v = {'b': [1, 2.5, none, true], 'a': '<é😀>\\n', 'e': {}} %}".to_owned();
        let render = |filter: &str| render(&format!("{value}{{{{ v | {filter} }}}}"), &[("user", "u")]).unwrap();
        assert_eq!(render("tojson"), r#"{"b": [1, 2.5, null, true], "a": "<é😀>\n", "e": {}}"#);
        assert_eq!(render("tojson(ensure_ascii=False)"), render("tojson"));
        let ascii = r#"{"a":"<\u00e9\ud83d\ude00>\n","b":[1,2.5,null,true],"e":{}}"#;
        assert_eq!(render("tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':'))"), ascii);
        let lines =
            "{\n  \"b\": [\n    1,\n    2.5,\n    null,\n    true\n  ],\n  \"a\": \"<é😀>\\n\",\n  \"e\": {}\n}";
        assert_eq!(render("tojson(indent=2)"), lines);
    }

    #[test]
    fn values_print_as_in_python() {
        assert_eq!(
            render("{{ true }} {{ none }} {{ 1.0 }} {{ nothing }}", &[("user", "u")]).unwrap(),
            "True None 1.0 "
        );
    }

    #[test]
    fn methods_of_python_strings_work() {
        let source = "{% set c = messages[0]['content'] %}{{ c.split('|')[-1].lstrip('\\n').rstrip() }}{{ c.startswith('a') }}{{ c[1:] | trim | length }}";
        assert_eq!(render(source, &[("user", "a|\n\nb ")]).unwrap(), "bTrue4");
    }

    #[test]
    fn a_template_that_never_ends_is_stopped() {
        for source in [
            "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}x{% endfor %}{% endfor %}{% endfor %}",
            "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
            "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(99999) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        ] {
            let refused = render(source, &[("user", "u")]).unwrap_err();
            assert!(
                matches!(refused, TemplateError::OutOfFuel { .. } | TemplateError::Failed { .. }),
                "{source}: {refused:?}"
            );
        }
    }

    #[test]
    fn long_conversations_have_fuel_enough() {
        let long = "word <b> ".repeat(1000);
        let said: Vec<(&str, &str)> = [("user", long.as_str()), ("assistant", "yes")].repeat(2048);
        assert!(render(STRICT, &said).is_ok());
    }

    #[test]
    fn calls_are_rendered_or_refused_and_never_dropped() {
        let call = ToolCall { id: "call_1".into(), name: "weather".into(), arguments: r#"{"c":"Paris"}"#.into() };
        let asked = TemplateMessage { role: "assistant".into(), calls: vec![call], ..TemplateMessage::default() };
        let told = TemplateMessage {
            role: "tool".into(),
            content: "Sunny".into(),
            call_id: Some("call_1".into()),
            ..TemplateMessage::default()
        };
        let refused = template(EACH).render(vec![asked.clone(), told.clone()], false, &[]);
        assert!(matches!(refused, Err(TemplateError::Dropped { .. })), "{refused:?}");
        let knows = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}\
                     {% endfor %}{{ m.tool_call_id }}:{{ m.content }};{% endfor %}";
        let text = template(knows).render(vec![asked, told], false, &[]).unwrap();
        assert_eq!(text, r#"weather{"c":"Paris"}:;call_1:Sunny;"#);
    }

    #[test]
    fn arguments_are_variables_and_take_no_message_away() {
        let source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ style }}{{ n }}{% if not enable_thinking %}!{% endif %}";
        let arguments = [
            ("style".to_owned(), Argument::Text("brief".into())),
            ("n".to_owned(), Argument::Integer(3)),
            ("enable_thinking".to_owned(), Argument::Bool(false)),
            ("messages".to_owned(), Argument::Bool(true)),
        ];
        assert_eq!(template(source).render(messages(&[("user", "u")]), false, &arguments).unwrap(), "ubrief3!");
    }

    #[test]
    fn errors_show_nothing_of_the_template() {
        let syntax = ChatTemplate::new("a\n{% if secret %}", String::new(), String::new()).err().unwrap();
        let run = render("a\n{{ messages.secret.word }}", &[("user", "u")]).unwrap_err();
        for error in [&syntax, &run] {
            assert!(matches!(error, TemplateError::Failed { line: 2, .. }), "{error:?}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }
}
