//! How do messages become the text of a prompt?
//!
//! By the Jinja template in the model's file, run in minijinja as `transformers` would run it in Jinja2: its options, its
//! functions, its JSON. A template is somebody's program: it runs on bounded fuel, and its errors are answers, not
//! crashes. What it refuses in the form it was given is offered again with system messages merged, then with neighbours
//! of one role merged, then with the system text in front of the first user's: templates differ in what they demand.
//! Invariant: no system or tool message is dropped in silence.
#![deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value};

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
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TemplateMessage {
    pub role: String,
    pub name: Option<String>,
    pub content: String,
}

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
}

impl ChatTemplate {
    /// Parses `source`. `bos` and `eos`: the texts of these tokens, or empty. Errors with the place of a syntax error.
    pub fn new(source: &str, bos: String, eos: String) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let syntax =
            environment.syntax().to_builder().trim_blocks(true).lstrip_blocks(true).build().map_err(failure)?;
        environment.set_syntax(syntax);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_formatter(print_as_python);
        environment.set_debug(false);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_template_owned("chat", without_generation_tags(source)).map_err(failure)?;
        let knows_developer = source.contains("developer");
        let mut template = Self { environment, bos, eos, shape: ContentShape::Text, knows_developer };
        template.shape = template.probe_shape();
        Ok(template)
    }

    /// Text reaches most templates as a string; those that show only lists of parts are found by trying.
    fn probe_shape(&mut self) -> ContentShape {
        let probe = TemplateMessage { role: "user".to_owned(), name: None, content: "rekindle".to_owned() };
        let mut shows = |shape| {
            self.shape = shape;
            self.run(std::slice::from_ref(&probe), true).is_ok_and(|text| text.contains("rekindle"))
        };
        if !shows(ContentShape::Text) && shows(ContentShape::Parts) { ContentShape::Parts } else { ContentShape::Text }
    }

    /// Renders. The error is the first form's, the messages as they came.
    pub fn render(
        &self,
        mut messages: Vec<TemplateMessage>,
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        for message in &mut messages {
            if message.role == "developer" && !self.knows_developer {
                "system".clone_into(&mut message.role);
            }
        }
        let mut refused = match self.offer(&messages, add_generation_prompt) {
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
            match self.offer(&messages, add_generation_prompt) {
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

    /// Renders the messages in this form, and makes sure that none was dropped.
    fn offer(&self, messages: &[TemplateMessage], add_generation_prompt: bool) -> Result<String, TemplateError> {
        let text = self.run(messages, add_generation_prompt)?;
        for role in ["system", "developer", "tool"] {
            let mut rest = text.as_str();
            for message in messages.iter().filter(|message| message.role == role) {
                rest = after_content(rest, message.content.trim())
                    .ok_or_else(|| TemplateError::Dropped { role: role.to_owned() })?;
            }
        }
        Ok(text)
    }

    fn run(&self, messages: &[TemplateMessage], add_generation_prompt: bool) -> Result<String, TemplateError> {
        let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
        let fuel = FUEL + FUEL_A_MESSAGE * messages.len() as u64 + FUEL_A_CHUNK * (bytes as u64 / 64);
        let messages: Vec<Value> = messages.iter().map(|message| context_message(message, self.shape)).collect();
        let context = Value::from_pairs([
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("bos_token", Value::from(self.bos.as_str())),
            ("eos_token", Value::from(self.eos.as_str())),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ]);
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let template = environment.get_template("chat").map_err(failure)?;
        template.render(context).map_err(|error| match failure(error) {
            TemplateError::OutOfFuel { .. } => TemplateError::OutOfFuel { fuel },
            error => error,
        })
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
    Value::from_pairs(role_and_content.into_iter().chain(name))
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
            Some(last) if last.role == message.role => merged.push(join(last, message)),
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
    serde_json::Value::from(text).to_string()
}

fn strftime_now(format: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    strftime(format, now.as_secs())
}

/// A time in UTC, `seconds` after 1970, by those of C's conversions that templates use; others stay as they are.
fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let (year, month, day, day_of_year) = date(days);
    let name =
        |names: &[&'static str], index: u64| names.iter().cycle().nth(index as usize).copied().unwrap_or_default();
    let (month_name, day_name) = (name(&MONTHS, month - 1), name(&DAYS, days % 7));
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(c) = characters.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        out.push_str(&match characters.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('j') => format!("{day_of_year:03}"),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name.chars().take(3).collect(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name.chars().take(3).collect(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{other}"),
            None => "%".to_owned(),
        });
    }
    out
}

/// Year, month from 1, day from 1 and day of the year from 1, of a day counted from 1970-01-01.
fn date(mut days: u64) -> (u64, u64, u64, u64) {
    let mut year = 1970;
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let day_of_year = days + 1;
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1, day_of_year)
}
