//! Do the recorded inputs lead to the recorded decisions?
//!
//! The core under the settings of each run, with the run's own ticks, commands and outcomes, from its beginning to its end or
//! to the first step that is missing. What the core plans must be what it planned then: where it isn't, as when another
//! version decides otherwise, the replay says so and ends.
//! Invariant: no record panics the core. What it could not have been told is refused before it hears it.

use std::collections::HashMap;

use super::record::{Read, Record, Run, read};
use super::{Moved, Outcome, ReplayError, ReplaySettings, Reuse, cost_of, empty};
use crate::engine::PromptUsage;
use crate::engine::TurnEvent;
use crate::engine::core::{Command, Core, Event};
use crate::engine::flight::reading::{Entry, HeldDisk, Reader};
use crate::engine::flight::{Outcome as Answers, Said, Step};
use crate::kv::transfer::{Ticket, TransferDone};
use crate::kv::{KvSettings, Manager};
use crate::model::ForwardError;
use crate::types::{KvKey, TenantId, Tick, TokenCount, TokenId, TurnId};

/// Replays all runs whose beginning is known.
pub(super) fn replay(
    record: &Record,
    settings: &ReplaySettings,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Outcome, ReplayError> {
    let total = record.trace.requests.len();
    let warm = settings.first_counted(&record.trace);
    let (mut outcome, mut first) = (empty(), 0);
    for (number, run) in (1..).zip(&record.runs) {
        if run.has_beginning {
            let mut driver = Driver::new(record, run, settings, (first, warm), &mut outcome);
            let told = |(at, why): (Tick, &'static str)| {
                let version = run.beginning.version.clone();
                ReplayError::Diverged { run: number, at, why, version }
            };
            driver.run(&mut |request| progress(request, total)).map_err(told)?;
        }
        first += run.requests;
    }
    let surplus = outcome.journal.len().saturating_sub(settings.journal_entries);
    outcome.journal.drain(..surplus);
    Ok(outcome)
}

/// Why a step can't have been that of this core.
type Why = &'static str;

struct Driver<'a> {
    record: &'a Record,
    run: &'a Run,
    settings: &'a ReplaySettings,
    /// From which request on it counts.
    warm: usize,
    outcome: &'a mut Outcome,
    core: Core,
    next_request: usize,
    requests: HashMap<TurnId, usize>,
    /// Transfers under way, and of how many blocks.
    tickets: HashMap<Ticket, usize>,
    tenants: HashMap<KvKey, TenantId>,
    /// What had been moved when counting began; `None`: it has not.
    before: Option<Moved>,
}

impl<'a> Driver<'a> {
    fn new(
        record: &'a Record,
        run: &'a Run,
        settings: &'a ReplaySettings,
        (first, warm): (usize, usize),
        outcome: &'a mut Outcome,
    ) -> Self {
        let core = Core::new(run.beginning.core, kv(run, settings));
        let before = (first >= warm).then(Moved::default);
        let (requests, tickets, tenants) = (HashMap::new(), HashMap::new(), HashMap::new());
        Self { record, run, settings, warm, outcome, core, next_request: first, requests, tickets, tenants, before }
    }

    fn run(&mut self, progress: &mut dyn FnMut(usize)) -> Result<(), (Tick, Why)> {
        let mut reader = Reader::new(self.run.beginning.kv.block_size);
        let mut went = Ok(());
        read(&self.run.parts, &mut reader, &mut |read| {
            match read {
                Read::Entry(Entry::Disk(held)) => self.take_over(&held),
                Read::Entry(Entry::Step(step)) => {
                    let at = step.planned;
                    went = self.step(*step, progress).map_err(|why| (at, why));
                    return went.is_ok();
                }
                // What comes after a gap came of what is in it.
                Read::Entry(Entry::Lost(_) | Entry::DiskLeftOut) | Read::Fault(_) => return false,
            }
            true
        });
        went?;
        if let Some(before) = self.before {
            let moved = Moved::of(&self.core);
            self.outcome.bytes_down += moved.down - before.down;
            self.outcome.bytes_up += moved.up - before.up;
            self.outcome.evictions += moved.evictions - before.evictions;
        }
        self.outcome.journal.extend(self.core.manager().journal().entries());
        Ok(())
    }

    /// What the disk held when the run began.
    fn take_over(&mut self, held: &HeldDisk) {
        let mut manager = Manager::new(kv(self.run, self.settings));
        let (contents, lives) = held.contents(&self.run.held_hashes);
        self.tenants.extend(held.owners());
        manager.recover(contents, &held.tenants(), |key| lives.contains(&key));
        self.core = Core::over(self.run.beginning.core, manager);
        self.tickets.clear();
    }

    fn step(&mut self, step: Step, progress: &mut dyn FnMut(usize)) -> Result<(), Why> {
        let Step { planned, mut commands, committed, .. } = step;
        for command in &commands {
            self.check(command)?;
            if let Command::Start(start) = command {
                if self.next_request.is_multiple_of(1000) {
                    progress(self.next_request);
                }
                if self.next_request == self.warm {
                    self.before = Some(Moved::of(&self.core));
                }
                self.requests.insert(start.turn, self.next_request);
                self.next_request += 1;
            }
        }
        let mut plan = self.core.plan(planned, &mut commands);
        self.tickets.extend(plan.orders.drain(..).map(|order| (order.ticket, order.pairs.len())));
        drop(std::mem::take(&mut plan.chores));
        let mut events = std::mem::take(&mut plan.events);
        match committed {
            None if plan.is_empty() => {}
            Some((at, answers)) if !plan.is_empty() => {
                let sampling = plan.spans.iter().filter(|span| span.samples).map(|span| span.turn);
                let tokens: Vec<TokenId>;
                let answers = match answers {
                    Answers::Failed => Err(ForwardError::Shape { tokens: 0, rows: 0, sampled: Vec::new() }),
                    Answers::Said(said) if sampling.eq(said.iter().map(|said| said.turn)) => {
                        tokens = said.into_iter().map(|Said { token, .. }| token).collect();
                        Ok(tokens.as_slice())
                    }
                    Answers::Said(_) => return Err("other turns said something"),
                };
                self.core.commit_known(at, &plan, answers, &mut events);
            }
            None => return Err("it has rows where there were none"),
            Some(_) => return Err("it has no rows where there were some"),
        }
        for event in events {
            if let Event::Turn(turn, TurnEvent::Started(usage)) = event {
                self.count(turn, usage);
            }
        }
        // Nobody asks where conversations are.
        drop(self.core.take_residencies());
        Ok(())
    }

    /// Whether the core may be told this: it takes its drivers at their word.
    fn check(&mut self, command: &Command) -> Result<(), Why> {
        let owner = match command {
            Command::Start(start) => {
                let window = self.run.beginning.kv.window;
                if TokenCount::of(&start.request.prompt) >= window || self.requests.contains_key(&start.turn) {
                    return Err("a turn begins that could not");
                }
                Some((start.key, start.tenant))
            }
            Command::Pin { key, tenant, .. } => Some((*key, *tenant)),
            Command::Transferred(TransferDone { ticket, sums, .. }) => {
                if self.tickets.remove(ticket) != Some(sums.len()) {
                    return Err("a transfer ends that was not ordered");
                }
                None
            }
            Command::Cancel(_)
            | Command::Forget(_)
            | Command::Leave(..)
            | Command::LetGo(_)
            | Command::End(_)
            | Command::Reopen(_)
            | Command::AwaitTool(_)
            | Command::Grant(_)
            | Command::GoOnFrom(_) => None,
        };
        match owner {
            Some((key, tenant)) if *self.tenants.entry(key).or_insert(tenant) != tenant => {
                Err("a conversation changes its tenant")
            }
            Some(_) | None => Ok(()),
        }
    }

    fn count(&mut self, turn: TurnId, usage: PromptUsage) {
        let counted = self.requests.get(&turn).filter(|number| **number >= self.warm);
        let Some(request) = counted.and_then(|number| self.record.trace.requests.get(*number)) else { return };
        let tokens = |count: TokenCount| u64::from(count.0);
        let cached = tokens(usage.cached());
        // What the disk had from before the record was of use too.
        let reusable = tokens(request.reusable()).min(tokens(request.prompt).saturating_sub(1)).max(cached);
        let reuse = Reuse {
            requests: 1,
            prompt_tokens: tokens(request.prompt),
            reusable_tokens: reusable,
            device_tokens: tokens(usage.resident) + tokens(usage.shared),
            host_tokens: tokens(usage.reloaded_host),
            disk_tokens: tokens(usage.reloaded_disk),
            reencoded_tokens: reusable - cached,
            reencode_cost: cost_of(cached, reusable, self.settings.doubles_at),
        };
        let kv = &self.run.beginning.kv;
        self.outcome.count(request.tenant, reuse, kv.block_bytes.cold / u64::from(kv.block_size.0));
    }
}

/// The run's settings, with as long a journal as is wanted: that decides nothing.
fn kv(run: &Run, settings: &ReplaySettings) -> KvSettings {
    KvSettings { journal_entries: settings.journal_entries, ..run.beginning.kv }
}
