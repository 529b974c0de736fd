//! What does a server's flight record hold: which runs, and which turns?
//!
//! A run whose beginning is there can be replayed as recorded, up to the first step that is missing (`recorded`): the same
//! ticks, the same outcomes of transfers, and so the same journal. For other settings, and where the beginning is lost, the
//! record is a trace of turns (`replay`): they come when they came, on a memory that was empty, as if the server had never
//! been restarted; steps take no time, and copies end before the next turn.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::recorded;
use super::trace::{self, Notice, Request, Told, Trace};
use super::{Outcome, Policy, ReplayError, ReplaySettings, replay};
use crate::engine::core::{Command, StartTurn};
use crate::engine::flight::bytes::Cursor;
use crate::engine::flight::reading::{Entry, HeldHashes, Reader, tenant_key};
use crate::engine::flight::ring::{self, Part, ReadError};
use crate::engine::flight::{Beginning, Outcome as Answers, Said, Step};
use crate::kv::block::PrefixHash;
use crate::types::{KvKey, TenantId, Tick, TokenCount, TokenId, TurnId, counted};

/// Why a record can't be replayed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("the flight record has no turns yet")]
    NoTurns,
}

/// One process's part of the record.
pub(super) struct Run {
    pub beginning: Beginning,
    pub parts: Vec<Part>,
    pub held_hashes: HeldHashes,
    /// Its first step is there, and what the disk held.
    pub has_beginning: bool,
    /// Nothing of it is missing after its beginning.
    pub is_whole: bool,
    /// The turns that it started.
    pub requests: usize,
}

/// A server's record, read and understood.
pub struct Record {
    /// All its turns.
    pub trace: Trace,
    pub(super) runs: Vec<Run>,
    /// What of it is missing or damaged, in sentences.
    pub faults: Vec<String>,
    /// The trace's tick 0 in microseconds since 1970.
    pub zero_us: u64,
}

/// How a record was replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// With its own ticks and outcomes: what really happened, decision for decision.
    AsRecorded,
    /// As a trace of turns: what would have happened.
    WhatIf,
}

impl Record {
    /// Reads the record in a folder. A server may be writing it: what it wrote until now is read.
    pub fn read(folder: &Path) -> Result<Self, RecordError> {
        let (parts, refused) = ring::read(folder)?;
        let mut record = Self { trace: Trace::default(), runs: Vec::new(), faults: Vec::new(), zero_us: 0 };
        record
            .faults
            .extend(refused.iter().map(|name| format!("{name} is no part of a record that this version reads")));
        let mut runs: Vec<Vec<Part>> = Vec::new();
        for part in parts {
            match runs.last_mut().filter(|run| run.last().is_some_and(|last| last.head.run == part.head.run)) {
                Some(run) => run.push(part),
                None => runs.push(vec![part]),
            }
        }
        let mut survey = Survey::default();
        let newest = runs.len().saturating_sub(1);
        for (number, parts) in runs.into_iter().enumerate() {
            record.add(&mut survey, number == newest, parts);
        }
        record.zero_us = survey.first_zero_us.unwrap_or(0);
        record.trace = survey.trace;
        if record.trace.requests.is_empty() { Err(RecordError::NoTurns) } else { Ok(record) }
    }

    fn add(&mut self, survey: &mut Survey, is_newest: bool, parts: Vec<Part>) {
        let Some(beginning) = parts.first().map(|first| first.head.beginning.clone()) else { return };
        let before = survey.trace.requests.len();
        survey.begin_run(&beginning);
        let (mut has_beginning, mut left_out, mut lost, mut faults) = (false, false, 0, Vec::new());
        let mut reader = Reader::new(beginning.kv.block_size);
        read(&parts, &mut reader, &mut |read| {
            match read {
                Read::Entry(Entry::Lost(steps)) => lost += steps,
                Read::Entry(Entry::Disk(_)) => has_beginning = true,
                Read::Entry(Entry::DiskLeftOut) => left_out = true,
                Read::Entry(Entry::Step(step)) => survey.step(&step),
                Read::Fault(fault) => faults.push(fault),
            }
            true
        });
        if let (true, Some(last), Some(Fault::Torn { part, .. })) = (is_newest, parts.last(), faults.last())
            && *part == last.number
        {
            // It is being written, or its process was killed while it wrote.
            faults.pop();
        }
        let number = self.runs.len() + 1;
        let mut tell = |what: &str| self.faults.push(format!("run {number} {what}"));
        if left_out {
            tell("began with something on disk that is not written down: what memory held is not known");
        } else if !has_beginning {
            tell("has lost its beginning: what memory held then is not known");
        }
        let own = env!("CARGO_PKG_VERSION");
        if has_beginning && beginning.version != own {
            tell(&format!("was decided by version {}, and this is {own}", beginning.version));
            has_beginning = false;
        }
        if lost > 0 {
            tell(&format!("lacks {} in its middle", counted(lost, "step", "steps")));
        }
        faults.iter().for_each(|fault| tell(&fault.to_string()));
        let (requests, is_whole) = (survey.trace.requests.len() - before, lost == 0 && faults.is_empty());
        let held_hashes = reader.into_held_hashes();
        self.runs.push(Run { beginning, parts, held_hashes, has_beginning, is_whole, requests });
    }

    /// The settings of the newest run. Nothing is left out, and no ends are told but those that were.
    pub fn settings(&self) -> ReplaySettings {
        let kv = self.runs.last().map(|run| &run.beginning.kv);
        let size = kv.map_or(1, |kv| kv.block_size.0);
        let tokens = |blocks: Option<u32>| u64::from(blocks.unwrap_or(0)) * u64::from(size);
        ReplaySettings {
            policy: kv.map_or(Policy::ReturnRate, |kv| kv.policy),
            device_tokens: tokens(kv.map(|kv| kv.device_blocks.0)),
            host_tokens: tokens(kv.map(|kv| kv.host_blocks.0)),
            disk_tokens: tokens(kv.map(|kv| kv.disk_blocks.0)),
            block_tokens: size,
            device_token_bytes: kv.map_or(0, |kv| kv.block_bytes.device / u64::from(size)),
            token_bytes: kv.map_or(0, |kv| kv.block_bytes.cold / u64::from(size)),
            warm_up: 0.25,
            last: None,
            ends: 0.0,
            one_tenant: false,
            given: BTreeMap::new(),
            doubles_at: kv.and_then(|kv| kv.doubles_at).map_or(30_000.0, |tokens| f64::from(tokens.0)),
            weighs_length: kv.is_some_and(|kv| kv.doubles_at.is_some()),
            journal_entries: kv.map_or(0, |kv| kv.journal_entries),
        }
    }

    /// How many runs there are, and how many of them can be replayed as recorded.
    pub fn runs(&self) -> (usize, usize) {
        (self.runs.len(), self.runs.iter().filter(|run| run.has_beginning).count())
    }

    /// Whether a replay as recorded has all turns from this one on.
    fn is_whole_from(&self, first: usize) -> bool {
        let ends = self.runs.iter().scan(0, |end, run| {
            *end += run.requests;
            Some((run, *end))
        });
        let mut counted = ends.filter(|(run, end)| run.requests > 0 && *end > first);
        counted.all(|(run, _)| run.has_beginning && run.is_whole)
    }

    /// Whether these settings, and what is known of a beginning, let the record be replayed as recorded. Where a time is asked
    /// for, all of its turns must be there.
    pub fn how(&self, settings: &ReplaySettings) -> How {
        if settings.last.is_some() && !self.is_whole_from(settings.first_counted(&self.trace)) {
            return How::WhatIf;
        }
        let own = ReplaySettings {
            warm_up: settings.warm_up,
            last: settings.last,
            journal_entries: settings.journal_entries,
            doubles_at: if self.settings().weighs_length { self.settings().doubles_at } else { settings.doubles_at },
            ..self.settings()
        };
        if own == *settings && self.runs().1 > 0 { How::AsRecorded } else { How::WhatIf }
    }

    /// Replays the record. `progress` hears now and then of how many turns it is through.
    pub fn replay(
        &self,
        settings: &ReplaySettings,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(Outcome, How), ReplayError> {
        let how = self.how(settings);
        let outcome = match how {
            How::AsRecorded => recorded::replay(self, settings, progress)?,
            How::WhatIf => replay(&self.trace, settings, progress)?,
        };
        Ok((outcome, how))
    }
}

/// What comes next of a run.
pub(super) enum Read {
    Entry(Entry),
    Fault(Fault),
}

/// What is not there, or damaged.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("lacks the parts between {before} and {after}")]
    Missing { before: u64, after: u64 },
    #[error("is damaged: file {part} is whole up to byte {at} alone")]
    Torn { part: u64, at: u64 },
    #[error("is damaged: file {part} has an entry that means nothing")]
    Senseless { part: u64 },
}

/// Reads a run's parts, as long as somebody wants more.
pub(super) fn read(parts: &[Part], reader: &mut Reader, take: &mut dyn FnMut(Read) -> bool) {
    let mut before: Option<&Part> = None;
    for part in parts {
        if let Some(before) = before.filter(|before| before.head.part + 1 != part.head.part)
            && !take(Read::Fault(Fault::Missing { before: before.number, after: part.number }))
        {
            return;
        }
        before = Some(part);
        reader.begin_part();
        for chunk in &part.chunks {
            let mut cursor = Cursor::new(chunk);
            while !cursor.is_empty() {
                let read = reader.entry(&mut cursor);
                let makes_sense = read.is_some();
                let read = read.map_or(Read::Fault(Fault::Senseless { part: part.number }), Read::Entry);
                if !take(read) {
                    return;
                }
                if !makes_sense {
                    break;
                }
            }
        }
        if let Some(at) = part.torn_at
            && !take(Read::Fault(Fault::Torn { part: part.number, at }))
        {
            return;
        }
    }
}

/// Where a turn's sequence ends.
struct End {
    tenant: TenantId,
    /// The last full block, and the tokens after it.
    parent: PrefixHash,
    open: Vec<TokenId>,
}

/// Makes a trace of steps: who follows whom, and how far, is found by hashes over all that the record has.
#[derive(Default)]
struct Survey {
    trace: Trace,
    first_zero_us: Option<u64>,
    /// Where the run's tick 0 lies in the trace.
    offset_us: u64,
    block_size: usize,
    /// By block, the newest request that has it; and by a last full block, the newest that ends after it.
    by_block: HashMap<PrefixHash, usize>,
    by_end: HashMap<PrefixHash, usize>,
    /// Of the run's requests.
    ends: HashMap<usize, End>,
    turns: HashMap<TurnId, usize>,
    newest: HashMap<KvKey, usize>,
}

impl Survey {
    fn begin_run(&mut self, beginning: &Beginning) {
        let first = *self.first_zero_us.get_or_insert(beginning.tick_zero_us);
        let last = self.trace.requests.last().map_or(0, |request| request.at.0);
        // Wall clocks may be set back; the order stays.
        self.offset_us = beginning.tick_zero_us.saturating_sub(first).max(last);
        self.block_size = beginning.kv.block_size.0 as usize;
        // Pseudonyms are other ones in each run.
        self.by_block.clear();
        self.by_end.clear();
        self.ends.clear();
        self.turns.clear();
    }

    fn step(&mut self, step: &Step) {
        let at = Tick(self.offset_us.saturating_add(step.planned.0));
        for command in &step.commands {
            self.command(at, command);
        }
        if let Some((_, Answers::Said(said))) = &step.committed {
            for said in said {
                self.said(*said);
            }
        }
    }

    fn command(&mut self, at: Tick, command: &Command) {
        let told = match command {
            Command::Start(start) => return self.start(at, start),
            Command::AwaitTool(key) => {
                let newest = self.newest.get(key).and_then(|newest| self.trace.requests.get_mut(*newest));
                newest.into_iter().for_each(|request| request.end = trace::End::ToolCall);
                return;
            }
            // A turn's end, and what copies took, come of the replay itself.
            Command::Cancel(_) | Command::Transferred(_) => return,
            Command::Forget(key) | Command::LetGo(key) => Told::Forget(*key),
            Command::Leave(key, to) => Told::Leave(*key, *to),
            Command::End(key) => Told::Over(*key),
            Command::Reopen(key) => Told::NotOver(*key),
            Command::Pin { key, tenant, for_us, .. } => {
                Told::Pin { conversation: *key, tenant: *tenant, for_us: *for_us }
            }
            Command::Grant(grants) => Told::Grant(grants.clone()),
            Command::GoOnFrom(learned) => Told::GoOnFrom(learned.clone()),
        };
        self.trace.notices.push(Notice { at, before: self.trace.requests.len(), told });
    }

    fn start(&mut self, at: Tick, start: &StartTurn) {
        let number = self.trace.requests.len();
        let prompt = &start.request.prompt;
        let (shared, follows) = self.follows(start);
        let encoded_before = start.request.encoded_before.min(TokenCount::of(prompt));
        // Of the run before nothing is known by hash; the server knew what it had encoded.
        let before = self.newest.get(&start.key).and_then(|newest| Some((*newest, self.trace.requests.get(*newest)?)));
        let before = before.map(|(newest, request)| (encoded_before.min(request.sequence()), newest));
        let longest = follows.map(|follows| (shared, follows)).max(before);
        let request = Request {
            at,
            tenant: start.tenant,
            conversation: start.key,
            turn: start.request.shape.number,
            prompt: TokenCount::of(prompt),
            answer: TokenCount(0),
            follows: longest.filter(|(shared, _)| shared.0 > 0).map(|(shared, follows)| (follows, shared)),
            end: trace::End::Other,
        };
        self.trace.requests.push(request);
        self.newest.insert(start.key, number);
        self.turns.insert(start.turn, number);
        for hash in &start.hashes {
            self.by_block.insert(*hash, number);
        }
        let parent = start.hashes.last().copied().unwrap_or(PrefixHash::ROOT);
        let open = prompt[start.hashes.len() * self.block_size..].to_vec();
        self.by_end.insert(parent, number);
        self.ends.insert(number, End { tenant: start.tenant, parent, open });
    }

    /// With how many of its first tokens a prompt follows which request.
    fn follows(&self, start: &StartTurn) -> (TokenCount, Option<usize>) {
        let known = start.hashes.iter().enumerate().rev();
        let known = known.filter_map(|(index, hash)| Some((index, hash, *self.by_block.get(hash)?))).next();
        let (full, last, mut follows) = match known {
            Some((index, hash, request)) => (index + 1, *hash, Some(request)),
            None => (0, PrefixHash::ROOT, None),
        };
        let rest = &start.request.prompt[full * self.block_size..];
        let end = self.by_end.get(&last).and_then(|request| Some((*request, self.ends.get(request)?)));
        let end = end.filter(|(_, end)| end.tenant == start.tenant);
        let mut shared = full * self.block_size;
        if let Some((request, end)) = end {
            let more = end.open.iter().zip(rest).take_while(|(a, b)| a == b).count();
            if more > 0 {
                shared += more;
                follows = Some(request);
            }
        }
        (TokenCount(u32::try_from(shared).unwrap_or(u32::MAX)), follows)
    }

    fn said(&mut self, Said { turn, token, stops }: Said) {
        let Some(number) = self.turns.get(&turn).copied() else { return };
        if let Some(request) = self.trace.requests.get_mut(number) {
            request.answer.0 += 1;
        }
        // What stopped it was never fed.
        let Some(end) = self.ends.get_mut(&number).filter(|_| !stops) else { return };
        end.open.push(token);
        if end.open.len() == self.block_size {
            end.parent = end.parent.child(&tenant_key(end.tenant), &end.open);
            end.open.clear();
            self.by_block.insert(end.parent, number);
            self.by_end.insert(end.parent, number);
        }
    }
}
