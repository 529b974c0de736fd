//! Does every room of the house use only the rooms that it may?
//!
//! Reads each `crate::` and `super::` path of `src/` and fails with the file, the line and the rule that it breaks. The
//! rules are ARCHITECTURE.md's table. Also here: where unsafe, actix, serde and the clock may be, and how long a file may
//! get. Test modules (`#[cfg(test)] mod`, `tests.rs`) may wire what they like.

#![expect(clippy::unwrap_used, reason = "a test: what can't be read fails it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What a room may use, besides itself, `types` and `telemetry`. The order is the house's, top down.
const MAY_USE: &[(&str, &[&str])] = &[
    (
        "main",
        &["api", "cli", "cluster", "config", "dashboard", "engine", "model", "server", "sessions", "store", "tenants"],
    ),
    ("cli", &["config", "engine::replay", "model", "server", "tenants"]),
    ("server", &["api", "cluster", "config", "dashboard", "engine", "model", "sessions", "store", "tenants"]),
    ("config", &[]),
    ("api", &["cluster", "engine::status", "engine::replay", "sessions", "tenants"]),
    ("dashboard", &["api", "cluster", "engine", "sessions", "tenants"]),
    ("cluster", &["sessions", "store"]),
    ("tenants", &["config", "store"]),
    ("sessions", &["engine", "store", "tenants"]),
    (
        "engine",
        // arenas, slots, and how blocks lie there; sampling
        &["kv", "model", "kernels::memory", "kernels::files", "kernels::cold", "kernels::isa", "kernels::softmax"],
    ),
    ("kv", &["kernels::memory", "kernels::files", "kernels::cold", "kernels::prefetch"]),
    ("model", &["kernels"]),
    ("kernels", &[]),
    ("store", &[]),
    ("telemetry", &[]),
    ("types", &[]),
];
const OPEN_TO_ALL: &[&str] = &["types", "telemetry"];

/// Words that only some rooms may say: the word, where it is allowed, and why nowhere else.
const WORDS: &[(&str, &[&str], &str)] = &[
    ("unsafe", &["kernels"], "unsafe lives in kernels/ and explains itself"),
    ("actix::", &["sessions"], "actix is passively maintained: only sessions/ knows it"),
    ("serde::", &["api", "dashboard", "cluster", "store", "config", "sessions", "cli"], "serde lives at the edges"),
    ("serde_json::", &["api", "dashboard", "cluster", "store", "sessions", "cli"], "JSON lives at the edges"),
    ("opentelemetry", &["telemetry"], "traces have one way out: telemetry/trace.rs"),
    ("rusqlite::", &["store"], "SQLite is the embedded store's own business"),
];

/// The clock is an argument in the pure parts; these files of them are drivers.
const CLOCKS: &[&str] = &["Instant::now", "SystemTime::now", ".elapsed("];
const MAY_READ_THE_CLOCK: &[&str] = &["engine/thread.rs", "engine/movers.rs", "engine/handle.rs"];

/// Lines of a file without its tests; past that it answers two questions. Exceptions are named with their reason.
const LONGEST: usize = 600;
const LONGER: &[(&str, &str)] = &[];

#[test]
fn every_room_uses_only_what_it_may() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&src, &mut files);
    assert!(files.len() > 20, "the scanner finds only {} files", files.len());
    let mut faults = Vec::new();
    for path in files {
        let name = path.strip_prefix(&src).unwrap().to_str().unwrap().to_owned();
        faults.extend(check(&name, &fs::read_to_string(&path).unwrap()));
    }
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
            files.push(path);
        }
    }
}

/// The faults of one file; `name` is its path under `src/`.
fn check(name: &str, source: &str) -> Vec<String> {
    let room = room(name);
    if room == "lib" {
        return Vec::new(); // the map itself
    }
    let mut faults = Vec::new();
    let Some((_, allowed)) = MAY_USE.iter().find(|(r, _)| *r == room) else {
        return vec![format!("src/{name}: `{room}` is no room of the graph; give it its row in tests/architecture.rs")];
    };
    let code = without_tests(&without_comments_and_texts(source));
    for (line, path) in paths(name, &code) {
        let used = path.split("::").next().unwrap_or_default();
        let within = |rule: &str| path == rule || path.starts_with(&format!("{rule}::"));
        if used != room && !OPEN_TO_ALL.contains(&used) && !allowed.iter().any(|rule| within(rule)) {
            faults.push(format!(
                "src/{name}:{line}: `{room}` uses `{path}`; besides types and telemetry it may use only: {}",
                allowed.join(", ")
            ));
        }
    }
    for (n, line) in code.lines().enumerate() {
        let n = n + 1;
        for (word, rooms, why) in WORDS {
            if says(line, word) && !rooms.contains(&room) {
                faults.push(format!("src/{name}:{n}: `{word}` in `{room}`: {why}"));
            }
        }
        for clock in CLOCKS {
            if line.contains(clock) && ["kv", "engine"].contains(&room) && !MAY_READ_THE_CLOCK.contains(&name) {
                faults.push(format!("src/{name}:{n}: `{clock}`: time is an argument in `{room}` (`Tick`)"));
            }
        }
    }
    let lines = code.lines().count();
    if lines > LONGEST && !LONGER.iter().any(|(file, _)| *file == name) {
        faults.push(format!("src/{name}: {lines} lines; which second question does it answer?"));
    }
    faults
}

/// The room of a file: its first folder, or its own name.
fn room(name: &str) -> &str {
    let first = name.split('/').next().unwrap_or(name);
    first.strip_suffix(".rs").unwrap_or(first)
}

/// Whether a line says a word that is not the end of a longer one.
fn says(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        let letter = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        !letter(before) && (word.ends_with(':') || !letter(after))
    })
}

/// Every path of the crate that the code names, from its room on, and its line: `crate::a::{b, c::d}` gives `a::b` and
/// `a::c::d`; `super::` is followed up from the file's own place.
fn paths(name: &str, code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for start in ["crate::", "super::", "rekindle::"] {
        for (at, _) in code.match_indices(start) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':' || c == '$') {
                continue; // the middle of a longer path: its beginning counts
            }
            if start == "rekindle::" && room(name) != "main" {
                continue;
            }
            let line = code[..at].lines().count().max(1);
            for tail in tree(&code[at..]) {
                if let Some(path) = absolute(name, &tail) {
                    found.push((line, path));
                }
            }
        }
    }
    found
}

/// The paths of a use tree or of a plain path at the beginning of `code`.
fn tree(code: &str) -> Vec<String> {
    fn walk(code: &[char], at: &mut usize, prefix: &str, out: &mut Vec<String>) {
        let mut path = prefix.to_owned();
        loop {
            while code.get(*at).is_some_and(|c| c.is_whitespace()) {
                *at += 1;
            }
            let start = *at;
            while code.get(*at).is_some_and(|c| c.is_alphanumeric() || *c == '_' || *c == '*') {
                *at += 1;
            }
            let name: String = code[start..*at].iter().collect();
            let join = if path.is_empty() || name.is_empty() { "" } else { "::" };
            path = format!("{path}{join}{name}");
            if code.get(*at) == Some(&':') && code.get(*at + 1) == Some(&':') {
                *at += 2;
                if code.get(*at) == Some(&'{') {
                    *at += 1;
                    while code.get(*at).is_some_and(|c| *c != '}') {
                        let before = *at;
                        walk(code, at, &path, out);
                        // Behind a name there may be ` as other`.
                        while code.get(*at).is_some_and(|c| *c != ',' && *c != '}') {
                            *at += 1;
                        }
                        if code.get(*at) == Some(&',') {
                            *at += 1;
                        }
                        if *at == before {
                            return;
                        }
                        while code.get(*at).is_some_and(|c| c.is_whitespace()) {
                            *at += 1;
                        }
                    }
                    *at += 1;
                    return;
                }
            } else {
                out.push(path);
                return;
            }
        }
    }
    let mut out = Vec::new();
    walk(&code.chars().take(4000).collect::<Vec<_>>(), &mut 0, "", &mut out);
    out
}

/// A path from the crate's root on; `None` if it stays in its own file.
fn absolute(name: &str, path: &str) -> Option<String> {
    let stem = name.strip_suffix(".rs").unwrap_or(name);
    let stem = stem.strip_suffix("/mod").unwrap_or(stem);
    let mut place: Vec<&str> = stem.split('/').collect();
    let mut parts = path.split("::").peekable();
    match parts.next()? {
        "crate" | "rekindle" => place.clear(),
        "super" => {
            place.pop();
            while parts.peek() == Some(&"super") {
                parts.next();
                place.pop();
            }
        }
        _ => return None,
    }
    place.extend(parts.filter(|part| *part != "self" && !part.is_empty()));
    // A path that ends at the root names no room.
    if place.is_empty() { None } else { Some(place.join("::")) }
}

/// The code with comments and the insides of texts blanked, line for line.
fn without_comments_and_texts(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let chars: Vec<char> = source.chars().collect();
    let mut at = 0;
    let blank = |out: &mut String, c: char| out.push(if c == '\n' { '\n' } else { ' ' });
    while at < chars.len() {
        let next = chars.get(at + 1).copied();
        match (chars[at], next) {
            ('/', Some('/')) => {
                while at < chars.len() && chars[at] != '\n' {
                    at += 1;
                }
            }
            ('/', Some('*')) => {
                while at < chars.len() && !(chars[at] == '*' && chars.get(at + 1) == Some(&'/')) {
                    blank(&mut out, chars[at]);
                    at += 1;
                }
                at += 2;
            }
            ('r', Some('"' | '#')) if raw_text(&chars[at..]).is_some() => {
                let length = raw_text(&chars[at..]).unwrap_or(1);
                chars[at..at + length].iter().for_each(|c| blank(&mut out, *c));
                at += length;
            }
            ('"', _) => {
                out.push('"');
                at += 1;
                while at < chars.len() && chars[at] != '"' {
                    if chars[at] == '\\' {
                        blank(&mut out, ' ');
                        at += 1;
                    }
                    blank(&mut out, chars.get(at).copied().unwrap_or(' '));
                    at += 1;
                }
                out.push('"');
                at += 1;
            }
            // A quoted character, so that '"' opens no text. Lifetimes have no closing quote there.
            ('\'', Some('\\')) => {
                at += 2;
                while at < chars.len() && chars[at] != '\'' {
                    at += 1;
                }
                at += 1;
            }
            ('\'', Some(_)) if chars.get(at + 2) == Some(&'\'') => at += 3,
            (c, _) => {
                out.push(c);
                at += 1;
            }
        }
    }
    out
}

/// Length of the raw text at the beginning, if there is one.
fn raw_text(chars: &[char]) -> Option<usize> {
    let hashes = chars.iter().skip(1).take_while(|c| **c == '#').count();
    if chars.get(1 + hashes) != Some(&'"') {
        return None;
    }
    let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let body = 2 + hashes;
    chars[body..].windows(end.len()).position(|w| w == end).map(|at| body + at + end.len())
}

/// The code up to its test module, which is the last thing in a file here.
fn without_tests(code: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut lines = code.lines().peekable();
    while let Some(line) = lines.next() {
        let opens = |next: &&str| next.trim_start().starts_with("mod ") && next.trim_end().ends_with('{');
        if line.trim() == "#[cfg(test)]" && lines.peek().is_some_and(opens) {
            break;
        }
        kept.push(line);
    }
    kept.join("\n")
}

// ---- The scanner can fail

fn fault(name: &str, source: &str) -> String {
    let faults = check(name, source);
    assert_eq!(faults.len(), 1, "{name}: {source}: {faults:?}");
    faults.into_iter().next().unwrap()
}

#[test]
fn a_forbidden_path_is_found_however_it_is_written() {
    for (name, source) in [
        ("kv/evictor.rs", "use crate::sessions::Registry;"),
        ("kv/evictor.rs", "use crate::{types::Tick, sessions::Registry};"),
        ("kv/evictor.rs", "use super::super::sessions::Registry;"),
        ("kv/evictor.rs", "fn f() -> crate::engine::EngineHandle {}"),
        ("kv/evictor.rs", "use crate::{\n    types::Tick,\n    engine::status as s,\n};"),
        ("api/ops.rs", "use crate::engine::handle::EngineHandle;"),
        ("api/ops.rs", "use crate::engine::{status::EngineStatus, EngineHandle};"),
        ("sessions/actor.rs", "use crate::model::language::Language;"),
        ("engine/core.rs", "use crate::kernels::attention::decode;"),
        ("sessions/actor.rs", "use crate::config::Config;"),
        ("kernels/memory.rs", "pub use crate::kv::block::BlockId;"),
        ("types.rs", "use crate::api::error;"),
        ("store/embedded/records.rs", "use super::super::super::tenants::Tenant;"),
        ("telemetry/metrics.rs", "use crate::engine::status::EngineStatus;"),
        ("main.rs", "use rekindle::kv::manager;"),
    ] {
        let said = fault(name, source);
        assert!(said.contains(name) && said.contains("may use only"), "{said}");
    }
}

#[test]
fn an_allowed_path_passes_however_it_is_written() {
    for (name, source) in [
        (
            "kv/evictor.rs",
            "use super::block::BlockId; use super::{pool, table::Table}; use crate::kernels::memory::Arena;",
        ),
        ("api/ops.rs", "use crate::engine::status::{EngineStatus, Residency}; use crate::telemetry::metrics;"),
        ("sessions/actor.rs", "use crate::engine::{Language, KvHandle}; use crate::store::Store; use actix::Actor;"),
        ("store/embedded.rs", "use super::{Store, StoreError}; use crate::types::TokenId;"),
        ("engine/thread.rs", "let now = Instant::now(); use crate::kv::manager::Manager;"),
        (
            "kv/pool.rs",
            "// use crate::sessions::X;\n/* crate::api */ let s = \"crate::api::x unsafe\"; let q = '\"'; let r = r#\"crate::api\"#;",
        ),
        ("kv/pool.rs", "fn f() {}\n#[cfg(test)]\nmod tests {\n    use crate::engine::X;\n}"),
        ("main.rs", "use rekindle::cli::pull; use rekindle::server;"),
        ("model/mod.rs", "#![deny(unsafe_code)] use actix_web as _; fn f<'a>(x: &'a str) -> &'a str { x }"),
    ] {
        assert_eq!(check(name, source), Vec::<String>::new(), "{name}: {source}");
    }
}

#[test]
fn words_and_clocks_are_found_where_they_may_not_be() {
    assert!(fault("kv/pool.rs", "unsafe { x() }").contains("explains itself"));
    assert!(fault("api/ws.rs", "use actix::Addr;").contains("passively maintained"));
    assert!(fault("engine/mod.rs", "#[derive(serde::Serialize)]").contains("edges"));
    assert!(fault("engine/core.rs", "let now = Instant::now();").contains("argument"));
    assert!(fault("kv/pool.rs", "let t = SystemTime::now();").contains("argument"));
    assert!(fault("sessions/store.rs", "use rusqlite::Connection;").contains("store's own"));
    assert!(fault("attic/x.rs", "").contains("no room of the graph"));
    assert!(fault("kv/pool.rs", &"x();\n".repeat(LONGEST + 1)).contains("second question"));
}

#[test]
fn use_trees_are_read_to_their_leaves() {
    let leaves = tree("crate::{a, b::{c, d::*}, e as f, g::{self, h}};");
    assert_eq!(leaves, ["crate::a", "crate::b::c", "crate::b::d::*", "crate::e", "crate::g::self", "crate::g::h"]);
    assert_eq!(absolute("kv/pool.rs", "super::super::api::x").as_deref(), Some("api::x"));
    assert_eq!(absolute("kv/mod.rs", "super::api").as_deref(), Some("api"));
    assert_eq!(
        absolute("store/embedded/schema.rs", "super::StoreError").as_deref(),
        Some("store::embedded::StoreError")
    );
}

#[test]
fn the_graph_has_no_way_round() {
    let graph: BTreeMap<&str, Vec<&str>> = MAY_USE
        .iter()
        .map(|(room, uses)| (*room, uses.iter().map(|path| path.split("::").next().unwrap()).collect()))
        .collect();
    fn reaches<'a>(graph: &BTreeMap<&'a str, Vec<&'a str>>, from: &str, to: &str) -> bool {
        graph[from].iter().any(|next| *next == to || reaches(graph, next, to))
    }
    for room in graph.keys() {
        assert!(!reaches(&graph, room, room), "`{room}` can reach itself");
    }
}
