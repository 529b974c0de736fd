//! How much of a prompt's text stays as it is when messages follow?
//!
//! A chat template is a program, and what it writes depends on what it has read. So its loop over the messages is watched:
//! the list of messages and the `loop` are ours, and note what they are asked. A round that begins before anything was asked
//! that more messages would answer otherwise (how many are there? is this the last?) begins just so in every longer
//! conversation, and what was written before it is written there too: a *front*. In another conversation it is only if that
//! begins with the same messages, those included that the template looked ahead at. And since a round leaves nothing behind
//! but its text (Jinja forgets its variables; templates with a `namespace` are not watched), the loop may begin at that round
//! the next time, all messages within its reach, and writes what follows the front.
//! Invariant: what can't be watched is never guessed. It makes `Watch::finish` give nothing, and the prompt is rendered whole.
#![deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::Arc;

use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Enumerator, Object, ObjectRepr};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use parking_lot::Mutex;

/// The names of ours that a watched template says; no client's argument begins so.
pub(super) const OURS: &str = "rekindle_";
const ROUNDS: &str = "rekindle_rounds";
const AFTER: &str = "rekindle_after";
const ROUND: &str = "rekindle_round";
const BEGIN: &str = "begin";

/// Where the loop may begin the next time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Resume {
    /// Messages before that round.
    pub messages: usize,
    /// Messages, from the first, that what was written before it depends on: a template may have looked ahead of it.
    pub depends_on: usize,
    /// What the clock said to the template before its loop.
    clock: Vec<String>,
}

/// What a watched template wrote from the round where it resumed, or from the start.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Written {
    pub text: String,
    /// The newest round that every longer conversation has too, and the byte of `text` where it begins.
    pub next: Option<(Resume, usize)>,
}

/// Gives a message, ready for the template.
pub(super) type Messages = Box<dyn Fn(usize) -> Value + Send + Sync>;

/// The messages of one rendering, and what the template asked and wrote so far.
pub(super) struct Watch {
    messages: Messages,
    count: usize,
    resume: Option<Resume>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    values: HashMap<usize, Value>,
    text: Vec<u8>,
    /// Where the first round began.
    start: Option<usize>,
    next: Option<(Resume, usize)>,
    /// The messages up to the last one that the template asked for by itself.
    asked: usize,
    clock: Vec<String>,
    loops: usize,
    /// Something was asked that more messages would answer otherwise.
    is_open: bool,
    /// Something was asked that only the template's own objects answer.
    is_foreign: bool,
}

impl Watch {
    pub fn new(messages: Messages, count: usize, resume: Option<Resume>) -> Arc<Self> {
        let asked = resume.as_ref().map_or(0, |resume| resume.depends_on);
        Arc::new(Self { messages, count, resume, seen: Mutex::new(Seen { asked, ..Seen::default() }) })
    }

    /// The list of messages that the template gets.
    pub fn list(self: &Arc<Self>) -> Value {
        Value::from_object(List { watch: Arc::clone(self), first: 0 })
    }

    /// What the template's own output goes to.
    pub fn pen(self: &Arc<Self>) -> impl io::Write {
        Pen(Arc::clone(self))
    }

    /// Notes what the clock says: before the loop it is compared the next time, in it nobody could.
    pub fn saw_clock(&self, time: &str) {
        let mut seen = self.seen.lock();
        seen.is_open |= seen.start.is_some();
        seen.clock.push(time.to_owned());
    }

    /// What was written, when the template is done. `None` if it was used in a way that can't be watched, or if it did not
    /// come by where it was to resume.
    pub fn finish(&self) -> Option<Written> {
        let seen = std::mem::take(&mut *self.seen.lock());
        if seen.is_foreign {
            return None;
        }
        let start = match &self.resume {
            None => 0,
            Some(resume) if resume.clock == seen.clock => seen.start?,
            Some(_) => return None,
        };
        let text = String::from_utf8(seen.text.get(start..)?.to_vec()).ok()?;
        let next = seen.next.map(|(resume, at)| (Resume { clock: seen.clock, ..resume }, at - start));
        Some(Written { text, next })
    }

    /// The messages that are to be written: all, or those from the round where it resumes.
    fn first_round(&self) -> usize {
        self.resume.as_ref().map_or(0, |resume| resume.messages)
    }

    fn message(&self, index: usize) -> Option<Value> {
        if index >= self.count {
            self.seen.lock().is_open = true;
            return None;
        }
        if let Some(known) = self.seen.lock().values.get(&index) {
            return Some(known.clone());
        }
        let value = (self.messages)(index);
        self.seen.lock().values.insert(index, value.clone());
        Some(value)
    }

    /// A message that isn't given by its round: the template asks for it, and what it writes then depends on it.
    fn asked_for(&self, index: usize) -> Option<Value> {
        self.depends_on(index);
        self.message(index)
    }

    fn depends_on(&self, index: usize) {
        let mut seen = self.seen.lock();
        seen.asked = seen.asked.max(index.saturating_add(1));
    }

    fn begin(&self, message: usize) {
        let mut seen = self.seen.lock();
        let at = seen.text.len();
        seen.start.get_or_insert(at);
        if !seen.is_open {
            let depends_on = seen.asked.max(message);
            seen.next = Some((Resume { messages: message, depends_on, clock: Vec::new() }, at));
        }
    }

    fn foreign(&self) {
        self.seen.lock().is_foreign = true;
    }

    fn open(&self) {
        self.seen.lock().is_open = true;
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("count", &self.count).field("resume", &self.resume).finish_non_exhaustive()
    }
}

struct Pen(Arc<Watch>);

impl io::Write for Pen {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.seen.lock().text.extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The messages from `first` on.
#[derive(Debug)]
struct List {
    watch: Arc<Watch>,
    first: usize,
}

impl Object for List {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.watch.asked_for(self.first.checked_add(key.as_usize()?)?)
    }

    /// Whoever goes through it by himself, or wants its length, learns how many there are.
    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.watch.open();
        Enumerator::Seq(self.watch.count.saturating_sub(self.first))
    }

    fn is_true(self: &Arc<Self>) -> bool {
        let has_any = self.first < self.watch.count;
        if has_any {
            self.watch.depends_on(self.first);
        } else {
            self.watch.open();
        }
        has_any
    }
}

/// A round of the loop over a list of messages: what Jinja calls `loop`.
#[derive(Debug)]
struct Round {
    watch: Arc<Watch>,
    index: usize,
    message: usize,
}

impl Round {
    /// Whether a message follows. That one does stays true when more are added, and is so wherever a later round begins.
    fn is_last(&self) -> bool {
        let is_last = self.message + 1 >= self.watch.count;
        if is_last {
            self.watch.open();
        }
        is_last
    }
}

impl Object for Round {
    /// Jinja's `loop` is a map, for those who ask, and holds true.
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn is_true(self: &Arc<Self>) -> bool {
        true
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.watch.foreign();
        Enumerator::NonEnumerable
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match key.as_str()? {
            "index0" => Some(Value::from(self.index)),
            "index" => Some(Value::from(self.index + 1)),
            "first" => Some(Value::from(self.index == 0)),
            "last" => Some(Value::from(self.is_last())),
            "previtem" if self.index == 0 => Some(Value::UNDEFINED),
            "previtem" => self.watch.asked_for(self.message - 1),
            "nextitem" => Some(self.watch.asked_for(self.message + 1).unwrap_or_default()),
            // Others need the length, or are rare.
            _ => {
                self.watch.foreign();
                None
            }
        }
    }

    fn call_method(self: &Arc<Self>, _: &mut State<'_, '_>, method: &str, _: &[Value]) -> Result<Value, Error> {
        if method == BEGIN {
            self.watch.begin(self.message);
        } else {
            self.watch.foreign();
        }
        Ok(Value::UNDEFINED)
    }

    fn call(self: &Arc<Self>, _: &mut State<'_, '_>, _: &[Value]) -> Result<Value, Error> {
        self.watch.foreign();
        Ok(Value::UNDEFINED)
    }

    fn render(self: &Arc<Self>, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.watch.foreign();
        Ok(())
    }
}

/// Teaches an environment the functions that watched templates call.
pub(super) fn teach(environment: &mut Environment<'_>) {
    environment.add_function(ROUNDS, rounds);
    environment.add_function(AFTER, after);
}

/// Each message from the first that is to be written, with its round.
fn rounds(list: Value) -> Result<Value, Error> {
    let list = list.downcast_object::<List>().ok_or_else(not_ours)?;
    {
        let mut seen = list.watch.seen.lock();
        seen.loops += 1;
        seen.is_foreign |= seen.loops > 1;
    }
    Ok(Value::make_object_iterable(list, |list| {
        let first = list.first.max(list.watch.first_round());
        Box::new((first..list.watch.count).filter_map(|message| {
            let round = Round { watch: Arc::clone(&list.watch), index: message - list.first, message };
            Some(Value::from(vec![list.watch.message(message)?, Value::from_object(round)]))
        }))
    }))
}

/// `list[skip:]`.
fn after(list: Value, skip: usize) -> Result<Value, Error> {
    let list = list.downcast_object::<List>().ok_or_else(not_ours)?;
    Ok(Value::from_object(List { watch: Arc::clone(&list.watch), first: list.first.saturating_add(skip) }))
}

/// A list that the template made of the messages: it is rendered with plain ones.
fn not_ours() -> Error {
    Error::new(ErrorKind::InvalidOperation, "not a list of messages that is watched")
}

/// A template whose loop can be watched.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Watched {
    pub source: String,
    /// Whether it asks before the end of its loop if the prompt is to be answered, so that a front depends on that.
    pub is_prompted_early: bool,
}

/// A template that does the same and can be watched, if this one has a loop `for message in messages` whose text goes
/// straight to the prompt. The list may have another name or be `messages[1:]`.
pub(super) fn watched(source: &str, syntax: SyntaxConfig) -> Option<Watched> {
    let tokens: Vec<_> = tokenize(source, false, syntax).collect::<Result<_, _>>().ok()?;
    let tokens: Vec<Said<'_>> =
        tokens.into_iter().map(|(token, span)| Said::new(token, span.start_offset, span.end_offset)).collect();
    let mut edits = Edits::default();
    let mut open: Vec<Open> = Vec::new();
    let mut rest = tokens.as_slice();
    while let Some((first, after)) = rest.split_first() {
        let tag_end = after.iter().position(|said| matches!(said.kind, Kind::TagEnd));
        match (&first.kind, tag_end) {
            (Kind::TagStart, Some(end)) => {
                let (tag, following) = after.split_at_checked(end)?;
                edits.take(tag, &open)?;
                edits.follow(tag, &mut open)?;
                rest = following;
            }
            _ => {
                let until = after.iter().position(|said| matches!(said.kind, Kind::TagStart)).unwrap_or(after.len());
                let (between, following) = after.split_at_checked(until)?;
                edits.take(between, &open)?;
                rest = following;
            }
        }
    }
    edits.applied(source)
}

/// A token of a template, and its bytes.
struct Said<'s> {
    kind: Kind<'s>,
    start: usize,
    end: usize,
}

enum Kind<'s> {
    TagStart,
    TagEnd,
    Word(&'s str),
    Number(u64),
    Assign,
    Dot,
    Colon,
    BracketOpen,
    BracketClose,
    Other,
}

impl<'s> Said<'s> {
    fn new(token: Token<'s>, start: u32, end: u32) -> Self {
        let kind = match token {
            Token::BlockStart => Kind::TagStart,
            Token::BlockEnd => Kind::TagEnd,
            Token::Ident(word) => Kind::Word(word),
            Token::Int(number) => Kind::Number(number),
            Token::Assign => Kind::Assign,
            Token::Dot => Kind::Dot,
            Token::Colon => Kind::Colon,
            Token::BracketOpen => Kind::BracketOpen,
            Token::BracketClose => Kind::BracketClose,
            _ => Kind::Other,
        };
        Self { kind, start: start as usize, end: end as usize }
    }

    fn word(&self) -> Option<&'s str> {
        if let Kind::Word(word) = self.kind { Some(word) } else { None }
    }
}

/// A tag whose end is still to come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Open {
    If,
    /// The loop that is watched.
    Rounds,
    /// Another loop.
    For,
    /// One that takes its text for itself.
    Capture,
}

/// What is to be changed in a template: bytes, and what stands there instead.
#[derive(Default)]
struct Edits {
    edits: Vec<(usize, usize, String)>,
    has_rounds: bool,
    /// Whether `add_generation_prompt` was said so far, and before the end of a watched loop.
    is_prompted: bool,
    is_prompted_early: bool,
}

impl Edits {
    /// Takes in the names in a stretch of tokens: the watched loop's `loop`, and slices of the messages. `None`: the template
    /// can't be watched.
    fn take(&mut self, said: &[Said<'_>], open: &[Open]) -> Option<()> {
        let is_rounds = open.iter().rev().find(|open| matches!(open, Open::Rounds | Open::For)) == Some(&Open::Rounds);
        for (at, one) in said.iter().enumerate() {
            let is_attribute =
                at.checked_sub(1).and_then(|before| said.get(before)).is_some_and(|b| matches!(b.kind, Kind::Dot));
            let after = said.get(at + 1..)?;
            match one.word() {
                // What keeps something between rounds, and what shows everything.
                Some("namespace" | "debug") => return None,
                Some(word) if word.starts_with(OURS) => return None,
                Some("add_generation_prompt") => self.is_prompted = true,
                Some("loop") if is_rounds && !is_attribute => {
                    if matches!(after.first(), Some(Said { kind: Kind::Assign, .. })) {
                        return None;
                    }
                    self.edits.push((one.start, one.end, ROUND.to_owned()));
                }
                Some("messages") if !is_attribute => {
                    if let Some((skip, end)) = slice(after) {
                        self.edits.push((one.start, end, format!("{AFTER}(messages, {skip})")));
                    }
                }
                _ => {}
            }
        }
        Some(())
    }

    /// Takes in what a tag opens or closes.
    fn follow(&mut self, tag: &[Said<'_>], open: &mut Vec<Open>) -> Option<()> {
        let (first, rest) = tag.split_first()?;
        let in_rounds = open.contains(&Open::Rounds);
        match first.word()? {
            "for" => {
                // Of a filter it can't be told whose `loop` it means.
                let says = |word: &str| rest.iter().any(|said| said.word() == Some(word));
                if says("loop") && says("if") {
                    return None;
                }
                let goes_straight_out = open.iter().all(|open| *open == Open::If);
                let is_rounds = goes_straight_out && self.rounds(rest);
                open.push(if is_rounds { Open::Rounds } else { Open::For });
            }
            "if" => open.push(Open::If),
            "set" if rest.iter().any(|said| matches!(said.kind, Kind::Assign)) => {}
            "set" | "filter" | "with" | "autoescape" => open.push(Open::Capture),
            "macro" | "call" if !in_rounds => open.push(Open::Capture),
            "endfor" | "endif" | "endset" | "endfilter" | "endwith" | "endautoescape" | "endmacro" | "endcall" => {
                if open.pop()? == Open::Rounds {
                    self.is_prompted_early |= self.is_prompted;
                }
            }
            // What a loop over nothing has instead stands outside of it: `loop` is that of the loop around it.
            "else" => {
                if let Some(innermost @ (Open::Rounds | Open::For)) = open.last_mut() {
                    let ended = std::mem::replace(innermost, Open::If);
                    self.is_prompted_early |= ended == Open::Rounds && self.is_prompted;
                }
            }
            "elif" | "do" | "break" | "continue" => {}
            // Blocks and other files.
            _ => return None,
        }
        Some(())
    }

    /// Makes a tag's `message in list` a watched loop, if it is that simple.
    fn rounds(&mut self, header: &[Said<'_>]) -> bool {
        let [item, is_in, list, after @ ..] = header else { return false };
        let (Some(name), Some("in"), Some(list_name)) = (item.word(), is_in.word(), list.word()) else { return false };
        let end = match (list_name, slice(after)) {
            (_, None) if after.is_empty() => list.end,
            ("messages", Some((_, end))) if after.last().is_some_and(|last| last.end == end) => end,
            _ => return false,
        };
        self.edits.push((item.start, item.end, format!("({name}, {ROUND})")));
        self.edits.push((list.start, list.start, format!("{ROUNDS}(")));
        // The tag's own end, with its white space, becomes that of the tag behind it.
        self.edits.push((end, end, format!(") %}}{{% do {ROUND}.{BEGIN}() ")));
        self.has_rounds = true;
        true
    }

    fn applied(mut self, source: &str) -> Option<Watched> {
        // Stable: at one place the list's opening comes before a slice that replaces it.
        self.edits.sort_by_key(|(start, end, _)| (*start, *end));
        let (mut out, mut done) = (String::with_capacity(2 * source.len()), 0);
        for (start, end, text) in &self.edits {
            out.push_str(source.get(done..*start)?);
            out.push_str(text);
            done = *end;
        }
        out.push_str(source.get(done..)?);
        self.has_rounds.then_some(Watched { source: out, is_prompted_early: self.is_prompted_early })
    }
}

/// The number in `[number:]` at the front, and the byte where it ends.
fn slice(said: &[Said<'_>]) -> Option<(u64, usize)> {
    match said {
        [
            Said { kind: Kind::BracketOpen, .. },
            Said { kind: Kind::Number(skip), .. },
            Said { kind: Kind::Colon, .. },
            Said { kind: Kind::BracketClose, end, .. },
            ..,
        ] => Some((*skip, *end)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
