//! Where does each setting come from?
//!
//! Layers of TOML, the later over the earlier, each leaf with its source. A key is known if the defaults have it.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use toml::{Table, Value};

use super::{ConfigError, DEFAULTS};

/// Variables of the environment that are settings: `REKINDLE__KV__DEVICE_BYTES` is `kv.device_bytes`.
const PREFIX: &str = "REKINDLE__";

/// Where a setting came from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    Default,
    File(String),
    Environment(String),
    /// A command-line flag, such as `--set` or `--listen`.
    Flag(&'static str),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("the default"),
            Self::File(path) => write!(f, "in {path}"),
            Self::Environment(name) => write!(f, "from {name}"),
            Self::Flag(flag) => write!(f, "from {flag}"),
        }
    }
}

/// Settings on their way to a `Config`.
#[derive(Clone, Debug)]
pub struct Layers {
    table: Table,
    /// By full key; what is not in it is a default.
    sources: BTreeMap<String, Source>,
}

impl Layers {
    pub fn defaults() -> Result<Self, ConfigError> {
        let table = DEFAULTS.parse::<Table>().map_err(|error| ConfigError::Syntax {
            path: "config/default.toml (in the binary)".to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Self { table, sources: BTreeMap::new() })
    }

    /// Lays a TOML file on top.
    pub fn file(mut self, path: &Path) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::Unreadable { path: name.clone(), reason: error.to_string() })?;
        let table = text
            .parse::<Table>()
            .map_err(|error| ConfigError::Syntax { path: name.clone(), reason: error.to_string() })?;
        self.lay_table("", table, &Source::File(name))?;
        Ok(self)
    }

    /// Lays those variables on top that begin with `REKINDLE__`; the others are none of our business.
    pub fn environment(mut self, variables: impl IntoIterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        for (name, text) in variables {
            if let Some(rest) = name.strip_prefix(PREFIX) {
                let key = rest.to_ascii_lowercase().replace("__", ".");
                self.lay_text(&key, &text, Source::Environment(name))?;
            }
        }
        Ok(self)
    }

    /// Lays `key=value` pairs on top.
    pub fn pairs<'a>(mut self, pairs: impl IntoIterator<Item = &'a str>) -> Result<Self, ConfigError> {
        for pair in pairs {
            let (key, text) = pair.split_once('=').ok_or_else(|| ConfigError::NotAPair(pair.to_owned()))?;
            self.lay_text(key.trim(), text.trim(), Source::Flag("--set"))?;
        }
        Ok(self)
    }

    /// Lays the value of a flag that has a setting of its own on top.
    pub fn flag(mut self, flag: &'static str, key: &str, text: Option<&str>) -> Result<Self, ConfigError> {
        if let Some(text) = text {
            self.lay(key, Value::String(text.to_owned()), Source::Flag(flag))?;
        }
        Ok(self)
    }

    pub(super) fn table(&self) -> &Table {
        &self.table
    }

    pub(super) fn impossible(&self, key: &str, reason: &str) -> ConfigError {
        let from = self.sources.get(key).cloned().unwrap_or(Source::Default);
        ConfigError::Impossible { key: key.to_owned(), from, reason: reason.trim_end().to_owned() }
    }

    fn lay_table(&mut self, prefix: &str, table: Table, source: &Source) -> Result<(), ConfigError> {
        for (name, value) in table {
            let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
            match (value, find(&self.table, &key)) {
                (Value::Table(inner), Some(Value::Table(_))) => self.lay_table(&key, inner, source)?,
                (value, _) => self.lay(&key, value, source.clone())?,
            }
        }
        Ok(())
    }

    /// Lays a value that came as text: as it stands where the setting is a text, else as TOML.
    fn lay_text(&mut self, key: &str, text: &str, source: Source) -> Result<(), ConfigError> {
        let is_text = matches!(find(&self.table, key), Some(Value::String(_)));
        let parsed = || format!("value = {text}").parse::<Table>().ok().and_then(|mut table| table.remove("value"));
        let value = if is_text { None } else { parsed() };
        self.lay(key, value.unwrap_or_else(|| Value::String(text.to_owned())), source)
    }

    fn lay(&mut self, key: &str, value: Value, from: Source) -> Result<(), ConfigError> {
        let Some(place) = find_mut(&mut self.table, key) else {
            let suggestion = nearest(key, &keys(&self.table));
            return Err(ConfigError::UnknownKey { key: key.to_owned(), from, suggestion });
        };
        let reason = match (&*place, &value) {
            (Value::Table(_), _) => Some("it is a section, and its settings are set one by one"),
            (_, Value::Table(_)) => Some("it is a setting, not a section"),
            _ => None,
        };
        if let Some(reason) = reason {
            return Err(ConfigError::Impossible { key: key.to_owned(), from, reason: reason.to_owned() });
        }
        *place = value;
        self.sources.insert(key.to_owned(), from);
        Ok(())
    }
}

fn find<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    match key.split_once('.') {
        Some((section, rest)) => find(table.get(section)?.as_table()?, rest),
        None => table.get(key),
    }
}

fn find_mut<'a>(table: &'a mut Table, key: &str) -> Option<&'a mut Value> {
    match key.split_once('.') {
        Some((section, rest)) => find_mut(table.get_mut(section)?.as_table_mut()?, rest),
        None => table.get_mut(key),
    }
}

/// Full keys of all settings.
pub(super) fn keys(table: &Table) -> Vec<String> {
    let mut all = Vec::new();
    for (name, value) in table {
        match value {
            Value::Table(inner) => all.extend(keys(inner).into_iter().map(|key| format!("{name}.{key}"))),
            _ => all.push(name.clone()),
        }
    }
    all
}

/// The known key that a wrong one was most likely meant to be: few letters away, or of the same last name.
fn nearest(wrong: &str, known: &[String]) -> Option<String> {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let close = known.iter().map(|key| (distance(wrong, key), key)).min()?;
    if close.0 <= 1 + wrong.len() / 5 {
        return Some(close.1.clone());
    }
    known.iter().find(|key| last(key) == last(wrong)).cloned()
}

/// Letters to insert, delete or replace to get from one text to the other (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.chars().count()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut corner = i; // the value left above
        let mut left = i + 1;
        for (cell, b) in row.iter_mut().skip(1).zip(to.chars()) {
            let here = (corner + usize::from(a != b)).min(left + 1).min(*cell + 1);
            corner = std::mem::replace(cell, here);
            left = here;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distance_of_two_words_counts_insertions_deletions_and_replacements() {
        for (a, b, n) in
            [("", "", 0), ("abc", "", 3), ("", "abc", 3), ("kitten", "sitting", 3), ("kv.blok", "kv.block", 1)]
        {
            assert_eq!(distance(a, b), n, "{a} {b}");
        }
    }
}
