//! Does a JSON body have the fields and types that a route asks for?
//!
//! `Fields` walks one object and knows its path, so that every refusal names its `param` (`messages[2].role`). Types are
//! strict, `null` equals absent, and the names nobody asked for are kept, to be told to the client.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// Pairs that metadata may have.
pub const METADATA_PAIRS: usize = 16;
const METADATA_KEY_CHARS: usize = 64;
const METADATA_VALUE_CHARS: usize = 512;

/// Parses a body: one JSON object, at most `deepest` arrays and objects deep. An empty body is an empty object.
pub fn parse_object(body: &[u8], deepest: usize) -> Result<Map<String, Value>, ApiError> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(Map::new());
    }
    if depth(body) > deepest {
        return Err(ApiError::invalid_json(format!("the body nests more than {deepest} arrays and objects")));
    }
    match serde_json::from_slice(body) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(ApiError::invalid_json(format!("the body must be a JSON object, not {}", kind(&other)))),
        Err(error) => Err(ApiError::invalid_json(format!("the body is not JSON: {error}"))),
    }
}

/// How deep brackets nest outside strings. Wrong JSON gets some number; the parser refuses it.
fn depth(body: &[u8]) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0_usize, 0, false, false);
    for byte in body {
        match (in_string, byte) {
            (true, _) if escaped => escaped = false,
            (true, b'\\') => escaped = true,
            (_, b'"') => in_string = !in_string,
            (false, b'[' | b'{') => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            (false, b']' | b'}') => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// What a value is, in a sentence.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(number) if number.is_f64() => "a number",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// One object of a body, and where it lies.
pub struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: String,
    asked: Vec<&'a str>,
}

impl<'a> Fields<'a> {
    /// The body itself.
    pub fn of(object: &'a Map<String, Value>) -> Self {
        Self { object, path: String::new(), asked: Vec::new() }
    }

    /// An element that must be an object, at `path`.
    pub fn at(path: String, value: &'a Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(object) => Ok(Self { object, path, asked: Vec::new() }),
            other => Err(wrong_type(&path, "an object", other)),
        }
    }

    /// The path of one of this object's fields.
    pub fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// A field as it is; `None` if absent or null.
    pub fn value(&mut self, key: &'a str) -> Option<&'a Value> {
        self.asked.push(key);
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Whether the field is there, be it null.
    pub fn has(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    pub fn string(&mut self, key: &'a str) -> Result<Option<&'a str>, ApiError> {
        self.typed(key, "a string", Value::as_str)
    }

    pub fn required_string(&mut self, key: &'a str) -> Result<&'a str, ApiError> {
        self.string(key)?.ok_or_else(|| ApiError::missing(&self.path(key)))
    }

    pub fn boolean(&mut self, key: &'a str) -> Result<Option<bool>, ApiError> {
        self.typed(key, "a boolean", Value::as_bool)
    }

    pub fn array(&mut self, key: &'a str) -> Result<Option<&'a [Value]>, ApiError> {
        self.typed(key, "an array", |value| value.as_array().map(Vec::as_slice))
    }

    pub fn object(&mut self, key: &'a str) -> Result<Option<Fields<'a>>, ApiError> {
        let path = self.path(key);
        self.value(key).map(|value| Fields::at(path, value)).transpose()
    }

    /// An integer that fits an `i64`.
    pub fn integer(&mut self, key: &'a str) -> Result<Option<i64>, ApiError> {
        self.typed(key, "an integer of at most 64 bits", Value::as_i64)
    }

    pub fn integer_in(&mut self, key: &'a str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        // Larger than any `i64` is still an integer, only out of range.
        let number = match value.as_i64() {
            Some(number) => number,
            None if value.is_u64() => i64::MAX,
            None => return Err(wrong_type(&self.path(key), "an integer", value)),
        };
        if range.contains(&number) {
            return Ok(Some(number));
        }
        Err(ApiError::invalid_value(&self.path(key), out_of_range(&self.path(key), range.start(), range.end(), value)))
    }

    /// A count of at least `least`; what is more than a `u32` holds is that.
    pub fn count(&mut self, key: &'a str, least: u32) -> Result<Option<u32>, ApiError> {
        let number = self.integer_in(key, i64::from(least)..=i64::MAX)?;
        Ok(number.map(|number| u32::try_from(number).unwrap_or(u32::MAX)))
    }

    /// A finite number in a range.
    pub fn number_in(&mut self, key: &'a str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        number(&self.path(key), value, range).map(Some)
    }

    /// The metadata pairs: strings, as many and as long as API.md allows.
    pub fn metadata(&mut self) -> Result<Option<BTreeMap<String, String>>, ApiError> {
        let path = self.path("metadata");
        let Some(fields) = self.object("metadata")? else { return Ok(None) };
        if fields.object.len() > METADATA_PAIRS {
            let message = format!("`{path}` has {} pairs, at most {METADATA_PAIRS} are allowed", fields.object.len());
            return Err(ApiError::invalid_value(&path, message));
        }
        let pair = |(key, value): (&String, &Value)| {
            let path = fields.path(key);
            if key.chars().count() > METADATA_KEY_CHARS {
                let message = format!("a key of `metadata` may have at most {METADATA_KEY_CHARS} characters");
                return Err(ApiError::string_too_long("metadata", message));
            }
            let Value::String(text) = value else { return Err(wrong_type(&path, "a string", value)) };
            if text.chars().count() > METADATA_VALUE_CHARS {
                let message = format!("`{path}` may have at most {METADATA_VALUE_CHARS} characters");
                return Err(ApiError::string_too_long(&path, message));
            }
            Ok((key.clone(), text.clone()))
        };
        fields.object.iter().map(pair).collect::<Result<_, _>>().map(Some)
    }

    /// Fields that are known and have no effect here.
    pub fn accept(&mut self, keys: &[&'a str]) {
        self.asked.extend_from_slice(keys);
    }

    /// Fields that are known and not offered: anything but absent, null, `false` or empty is refused.
    pub fn refuse(&mut self, keys: &[&'a str]) -> Result<(), ApiError> {
        for key in keys {
            let offered = self.value(key).is_some_and(|value| match value {
                Value::Bool(on) => *on,
                Value::Array(list) => !list.is_empty(),
                Value::Null => false,
                Value::Number(_) | Value::String(_) | Value::Object(_) => true,
            });
            if offered {
                return Err(ApiError::unsupported_parameter(&self.path(key)));
            }
        }
        Ok(())
    }

    /// The names that no call above asked for.
    pub fn unknown(&self) -> Vec<&'a str> {
        self.object.keys().map(String::as_str).filter(|key| !self.asked.contains(key)).collect()
    }

    /// The fields that were asked for, in tests: the document has the same.
    #[cfg(test)]
    pub fn asked(&self) -> &[&'a str] {
        &self.asked
    }

    /// All pairs, for objects whose keys are the client's own.
    pub fn pairs(&self) -> impl Iterator<Item = (&'a String, &'a Value)> + use<'a> {
        self.object.iter()
    }

    /// How many fields there are.
    pub fn count_all(&self) -> usize {
        self.object.len()
    }

    fn typed<T>(
        &mut self,
        key: &'a str,
        wanted: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| wrong_type(&self.path(key), wanted, value))
    }
}

/// A finite number in a range, wherever it lies.
pub fn number(path: &str, value: &Value, range: RangeInclusive<f64>) -> Result<f64, ApiError> {
    let number = value.as_f64().ok_or_else(|| wrong_type(path, "a number", value))?;
    if range.contains(&number) {
        return Ok(number);
    }
    Err(ApiError::invalid_value(path, out_of_range(path, range.start(), range.end(), value)))
}

/// 400 `invalid_type`, in a sentence.
pub fn wrong_type(path: &str, wanted: &str, found: &Value) -> ApiError {
    ApiError::invalid_type(path, format!("`{path}` must be {wanted}, not {}", kind(found)))
}

fn out_of_range<T: std::fmt::Display + PartialEq>(path: &str, least: &T, most: &T, value: &Value) -> String {
    let most = most.to_string();
    if most == i64::MAX.to_string() {
        format!("`{path}` must be at least {least}, and is {value}")
    } else {
        format!("`{path}` must be from {least} to {most}, and is {value}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nesting_is_counted_outside_strings_only() {
        assert_eq!(depth(br#"{"a":"[[[[","b":[{}]}"#), 3);
        assert_eq!(depth(br#"{"a":"\"[[","b":[]}"#), 2);
        let deep = |levels: usize| format!("{{\"a\":{}1{}}}", "[".repeat(levels - 1), "]".repeat(levels - 1));
        assert!(parse_object(deep(64).as_bytes(), 64).is_ok());
        assert_eq!(parse_object(deep(65).as_bytes(), 64).unwrap_err().code(), "invalid_json");
        assert_eq!(parse_object("[".repeat(1_000_000).as_bytes(), 64).unwrap_err().code(), "invalid_json");
    }

    #[test]
    fn null_equals_absent_and_unasked_names_are_kept() {
        let body = parse_object(br#"{"a":null,"b":1,"zzz":2}"#, 64).unwrap();
        let mut fields = Fields::of(&body);
        assert_eq!(fields.string("a").unwrap(), None);
        assert_eq!(fields.integer("b").unwrap(), Some(1));
        assert_eq!(fields.unknown(), ["zzz"]);
    }

    #[test]
    fn a_wrong_type_names_its_path() {
        let body = parse_object(br#"{"outer":{"inner":"x"}}"#, 64).unwrap();
        let mut fields = Fields::of(&body);
        let error = fields.object("outer").unwrap().unwrap().integer("inner").unwrap_err();
        assert_eq!((error.code(), error.param()), ("invalid_type", Some("outer.inner")));
        assert!(error.to_string().contains("must be an integer"), "{error}");
    }

    #[test]
    fn huge_counts_are_cut_and_fractions_refused() {
        let body = parse_object(br#"{"a":99999999999999999999,"b":18446744073709551615,"c":1.5,"d":0}"#, 64).unwrap();
        let mut fields = Fields::of(&body);
        assert_eq!(fields.count("a", 1).unwrap_err().code(), "invalid_type");
        assert_eq!(fields.count("b", 1).unwrap(), Some(u32::MAX));
        assert_eq!(fields.count("c", 1).unwrap_err().code(), "invalid_type");
        assert_eq!(fields.count("d", 1).unwrap_err().code(), "invalid_value");
    }

    #[test]
    fn metadata_holds_short_strings_only() {
        let check = |json: String| {
            let body = parse_object(json.as_bytes(), 64).unwrap();
            Fields::of(&body).metadata().map(|_| ()).map_err(|error| (error.code(), error.param().map(str::to_owned)))
        };
        assert_eq!(check(r#"{"metadata":{"a":"b"}}"#.into()), Ok(()));
        assert_eq!(check(r#"{"metadata":{"a":1}}"#.into()), Err(("invalid_type", Some("metadata.a".into()))));
        let long = format!(r#"{{"metadata":{{"a":"{}"}}}}"#, "x".repeat(513));
        assert_eq!(check(long), Err(("string_above_max_length", Some("metadata.a".into()))));
        let many: Vec<_> = (0..17).map(|i| format!(r#""k{i}":"""#)).collect();
        assert_eq!(
            check(format!(r#"{{"metadata":{{{}}}}}"#, many.join(","))),
            Err(("invalid_value", Some("metadata".into())))
        );
    }
}
