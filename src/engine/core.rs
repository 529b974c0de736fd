//! What happens in the next step? Pure: no clock, channel, thread or randomness of its own.
//!
//! `plan(now, commands)` takes in what was asked and chooses the step's rows; `commit(plan, logits)` takes in what the
//! model said. The same inputs give the same outputs, so a thread, a simulation and a replay drive the same core.

use std::collections::HashMap;

use super::answers::{Answer, Answers};
use super::batch::Rows;
use super::fairness::Fairness;
use super::gains::Gains;
use super::sampler;
use super::sequence::{Phase, Sequence};
use super::status::{EngineStatus, LastEviction, PoolStatus, PromptTotals, Residency, ResidencyState, TierShare, Why};
use super::{FinishReason, Path, Token, TurnEvent, TurnFailure, TurnRequest};
use crate::kv::block::PrefixHash;
use crate::kv::chores::Chores;
use crate::kv::forget::Freed;
use crate::kv::journal::Rule;
use crate::kv::pins::{PinBudget, PinRefused};
use crate::kv::rate::EncodingRate;
use crate::kv::return_rate::Learned;
use crate::kv::transfer::{TransferDone, TransferOrder};
use crate::kv::{KvSettings, Manager};
use crate::model::{ForwardError, Logits};
use crate::types::{BlockCount, Grant, KvKey, TenantId, TenantKey, Tick, Tier, TokenCount, TokenId, TurnId};

/// A turn to start.
#[derive(Clone, Debug)]
pub struct StartTurn {
    pub turn: TurnId,
    pub key: KvKey,
    pub tenant: TenantId,
    pub tenant_key: TenantKey,
    /// The chain over the prompt's full blocks.
    pub hashes: Vec<PrefixHash>,
    pub request: TurnRequest,
}

/// What the core is told.
#[derive(Clone, Debug)]
pub enum Command {
    Start(Box<StartTurn>),
    Cancel(TurnId),
    /// Give up every copy of a conversation's KV; a running turn of it is cancelled.
    Forget(KvKey),
    /// Take an idle conversation down to a tier, and off those above it.
    Leave(KvKey, Tier),
    /// Give up every copy of an idle conversation's KV.
    LetGo(KvKey),
    /// The conversation is over.
    End(KvKey),
    /// It is not, whatever was said before.
    Reopen(KvKey),
    /// The turn that has just ended called a tool, whose answer will come.
    AwaitTool(KvKey),
    /// Keep a conversation's blocks from the evictor for so many microseconds; `None`: no longer.
    Pin {
        key: KvKey,
        tenant: TenantId,
        tenant_key: TenantKey,
        for_us: Option<u64>,
    },
    Transferred(TransferDone),
    /// What all tenants are given from now on.
    Grant(Vec<Grant>),
    /// What was learned of conversations' returns before a restart.
    GoOnFrom(Learned),
}

/// What the core tells.
#[derive(Debug, PartialEq)]
pub enum Event {
    Turn(TurnId, TurnEvent),
    /// Every tier has let go.
    Forgotten(KvKey, Freed),
    /// An asked-for offload is over, with the device bytes given up. `None`: a turn runs or waits.
    Left(KvKey, Option<u64>),
    /// The answers to `Pin` come in the order of the commands: until when it is pinned, or why it isn't.
    Pinned(Result<(PinBudget, Option<Tick>), PinRefused>),
}

/// Bounds of the scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoreSettings {
    /// Most sequences in a step.
    pub max_running: usize,
    /// Most rows of a step: all decodes, and prefill chunks up to this.
    pub step_tokens: usize,
}

/// The rows of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub turn: TurnId,
    pub key: KvKey,
    pub first_row: usize,
    pub rows: usize,
    /// Whether the last row's logits are wanted.
    pub samples: bool,
}

/// One step: what to tell, what to copy, what to run.
#[derive(Debug, Default)]
pub struct Plan {
    pub started: Tick,
    pub events: Vec<Event>,
    /// To be done before the model runs; holds places until it is dropped.
    pub chores: Chores,
    /// To be started in this order.
    pub orders: Vec<TransferOrder>,
    pub tokens: Vec<TokenId>,
    pub spans: Vec<Span>,
    pub sampled: Vec<usize>,
}

impl Plan {
    /// Whether the model has nothing to do.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }
}

/// How often deadlines of waiting turns are looked at, in microseconds.
const DEADLINE_EVERY_US: u64 = 20_000;

/// The engine's state and decisions.
#[derive(Debug)]
pub struct Core {
    pub(super) settings: CoreSettings,
    pub(super) manager: Manager,
    pub(super) sequences: HashMap<TurnId, Sequence>,
    /// Turns that hold places on the device, oldest admission first.
    pub(super) running: Vec<TurnId>,
    pub(super) fairness: Fairness,
    pub(super) admissions: u64,
    preemptions: u64,
    pub(super) stalled_loads: u64,
    /// Conversations that are over as soon as their turn is.
    ending: Vec<KvKey>,
    deadlines_seen: Tick,
    steps: u64,
    finished: u64,
    cancelled: u64,
    failed: u64,
    prompt: PromptTotals,
    pub(super) gains: Gains,
    generated: u64,
    pub(super) prefill: EncodingRate,
    scratch: sampler::Scratch,
}

impl Core {
    pub fn new(settings: CoreSettings, kv: KvSettings) -> Self {
        Self::over(settings, Manager::new(kv))
    }

    /// Over a manager that may hold something already: what a disk tier had.
    pub fn over(settings: CoreSettings, manager: Manager) -> Self {
        Self {
            settings,
            manager,
            sequences: HashMap::new(),
            running: Vec::new(),
            fairness: Fairness::default(),
            admissions: 0,
            preemptions: 0,
            stalled_loads: 0,
            ending: Vec::new(),
            deadlines_seen: Tick(0),
            steps: 0,
            finished: 0,
            cancelled: 0,
            failed: 0,
            prompt: PromptTotals::default(),
            gains: Gains::default(),
            generated: 0,
            prefill: EncodingRate::default(),
            scratch: sampler::Scratch::default(),
        }
    }

    /// Takes in what was asked, and chooses the next step. The driver does the plan's chores, starts its orders, runs the
    /// model on `rows` unless the plan is empty, and commits it.
    pub fn plan(&mut self, now: Tick, commands: &mut Vec<Command>) -> Plan {
        let mut plan = Plan { started: now, ..Plan::default() };
        self.manager.expire_pins(now);
        for command in commands.drain(..) {
            self.take_in(now, command, &mut plan.events);
        }
        self.end_waits(now, &mut plan.events);
        self.schedule(now, &mut plan);
        self.manager.work_ahead(now);
        self.collect(&mut plan);
        plan
    }

    /// The plan's rows as the model reads them. Nothing can be evicted while they live.
    pub fn rows<'a>(&'a self, plan: &'a Plan) -> Rows<'a> {
        Rows::new(plan, &self.manager)
    }

    /// Takes in what the model said of a plan: KV of all its rows, and `logits` of those that sample. On an error the
    /// step's turns fail; nothing of the step counts as written. `logits` come back as they were: see `Sampler::sample`.
    pub fn commit(
        &mut self,
        now: Tick,
        plan: &Plan,
        logits: Result<&mut Logits, ForwardError>,
        events: &mut Vec<Event>,
    ) {
        self.take_answers(now, plan, logits.map(Answers::Logits), events);
    }

    /// The same where it is known already which tokens were chosen, one for each row that samples: in a replay.
    pub fn commit_known(
        &mut self,
        now: Tick,
        plan: &Plan,
        tokens: Result<&[TokenId], ForwardError>,
        events: &mut Vec<Event>,
    ) {
        self.take_answers(now, plan, tokens.map(Answers::Known), events);
    }

    fn take_answers(
        &mut self,
        now: Tick,
        plan: &Plan,
        answers: Result<Answers<'_>, ForwardError>,
        events: &mut Vec<Event>,
    ) {
        self.steps += 1;
        self.manager.tell_time(now);
        let mut answers = match answers {
            Ok(answers) => answers,
            Err(error) => {
                for span in &plan.spans {
                    self.fail_turn(now, span.turn, TurnFailure::Model(error.to_string()), events);
                }
                return;
            }
        };
        self.observe_prefill(now, plan);
        let mut sampled = 0;
        for span in &plan.spans {
            self.manager.append(span.key, &plan.tokens[span.first_row..][..span.rows]);
            let sequence = self.sequences.get_mut(&span.turn).expect("a planned turn is known");
            if sequence.first_token.is_none() {
                sequence.encoded.0 += u32::try_from(span.rows).expect("a window bounds a sequence");
            }
            self.fairness.serve(sequence.tenant, span.rows as u64);
            if span.samples {
                self.sample(now, span.turn, answers.get(sampled), events);
                sampled += 1;
            }
        }
    }

    /// Takes in a step's speed, if it was mostly prefill.
    fn observe_prefill(&mut self, now: Tick, plan: &Plan) {
        let took_us = now.0.saturating_sub(plan.started.0);
        let prefills = || plan.spans.iter().filter(|span| span.rows > 1);
        let tokens: usize = prefills().map(|span| span.rows).sum();
        let decodes = plan.tokens.len() - tokens;
        // A replay's steps take no time, and say nothing of the model's speed.
        if took_us > 0 && tokens > decodes {
            let middle = |span: &Span| self.manager.resident(span.key).context().get() as f64 + span.rows as f64 / 2.0;
            let positions: f64 = prefills().map(|span| span.rows as f64 * middle(span)).sum();
            self.prefill.add(tokens as u64, positions / tokens as f64, took_us);
        }
    }

    /// Chooses a sequence's next token, tells it, and ends the turn if that was the last.
    fn sample(&mut self, now: Tick, turn: TurnId, answer: Answer<'_>, events: &mut Vec<Event>) {
        let window = self.manager.settings().window;
        let sequence = self.sequences.get_mut(&turn).expect("a planned turn is known");
        let request = &sequence.start.request;
        let may_stop = !request.sampling.ignore_eos;
        let too_early = sequence.usage.generated.0 < request.sampling.min_tokens;
        let banned: &[TokenId] = if may_stop && too_early { &request.stop_tokens } else { &[] };
        let (id, logprob) = match answer {
            Answer::Known(id) => (id, None),
            Answer::Logits(row) => {
                let id = sequence.sampler.sample(row, banned, &mut self.scratch);
                (id, request.logprobs.map(|top| sampler::logprob(row, id, top, &mut self.scratch)))
            }
        };
        sequence.phase = Phase::Decode;
        if sequence.first_token.is_none() {
            sequence.first_token = Some(now);
            sequence.account();
            sequence.usage.prompt.prefill_ms = now.ms_since(sequence.ready);
            sequence.usage.ttft_ms = now.ms_since(sequence.arrived);
            let prompt = sequence.usage.prompt;
            self.prompt.add(&prompt);
            let path = Path::of(prompt.decision(), sequence.start.request.shape.number);
            self.gains.note(sequence.tenant, path, &sequence.usage, self.prefill.per_s());
            events.push(Event::Turn(turn, TurnEvent::Started(prompt)));
        }
        sequence.tokens.push(id);
        sequence.usage.generated.0 += 1;
        self.generated += 1;
        events.push(Event::Turn(turn, TurnEvent::Token(Token { id, logprob })));
        let reason = if may_stop && sequence.start.request.stop_tokens.contains(&id) {
            FinishReason::Stop
        } else if sequence.usage.generated >= sequence.start.request.max_tokens
            || TokenCount::of(&sequence.tokens) >= window
        {
            FinishReason::Length
        } else {
            return;
        };
        self.finish(now, turn, reason, events);
    }

    /// Ends a turn, wherever it is on its way. Its blocks come to rest.
    fn finish(&mut self, now: Tick, turn: TurnId, reason: FinishReason, events: &mut Vec<Event>) {
        let Some(sequence) = self.take_out(now, turn) else { return };
        let mut usage = sequence.usage;
        usage.decode_ms = sequence.first_token.map_or(0, |first| now.ms_since(first));
        match reason {
            FinishReason::Stop | FinishReason::Length => self.finished += 1,
            FinishReason::Cancelled => self.cancelled += 1,
        }
        events.push(Event::Turn(turn, TurnEvent::Finished { reason, usage }));
    }

    fn fail_turn(&mut self, now: Tick, turn: TurnId, failure: TurnFailure, events: &mut Vec<Event>) {
        if self.take_out(now, turn).is_some() {
            self.failed += 1;
            events.push(Event::Turn(turn, TurnEvent::Failed(failure)));
        }
    }

    /// Takes a turn out of wherever it is. `None` if it has ended already.
    fn take_out(&mut self, now: Tick, turn: TurnId) -> Option<Sequence> {
        let sequence = self.sequences.remove(&turn)?;
        let shape = sequence.start.request.shape;
        match sequence.phase {
            Phase::Queued => {
                self.fairness.remove(sequence.tenant, turn);
                self.manager.fall_silent(now, sequence.key, shape);
            }
            Phase::Reloading | Phase::Prefill | Phase::Decode => {
                self.running.retain(|running| *running != turn);
                self.manager.rest(now, sequence.key, shape);
            }
        }
        if let Some(place) = self.ending.iter().position(|key| *key == sequence.key) {
            self.ending.swap_remove(place);
            self.manager.end(sequence.key);
        }
        Some(sequence)
    }

    fn take_in(&mut self, now: Tick, command: Command, events: &mut Vec<Event>) {
        match command {
            Command::Start(start) => {
                self.manager.expect_soon(now, start.key);
                self.fairness.push(start.tenant, start.turn);
                self.sequences.insert(start.turn, Sequence::new(start, now));
            }
            Command::Cancel(turn) => self.finish(now, turn, FinishReason::Cancelled, events),
            Command::Forget(key) => {
                for turn in self.turns_of(key) {
                    self.finish(now, turn, FinishReason::Cancelled, events);
                }
                self.manager.forget(key);
            }
            Command::Leave(key, _) | Command::LetGo(key) if !self.turns_of(key).is_empty() => {
                events.push(Event::Left(key, None));
            }
            Command::Leave(key, to) => self.manager.leave(now, key, to),
            Command::LetGo(key) => self.manager.forget(key),
            // One that waits would make it an idle one again when it ends.
            Command::End(key) if !self.turns_of(key).is_empty() => {
                if !self.ending.contains(&key) {
                    self.ending.push(key);
                }
            }
            Command::End(key) => self.manager.end(key),
            Command::Reopen(key) => {
                self.ending.retain(|ending| *ending != key);
                self.manager.reopen(now, key);
            }
            Command::AwaitTool(key) => self.manager.await_tool(key),
            Command::Pin { key, tenant, tenant_key, for_us: Some(for_us) } => {
                let until = Tick(now.0.saturating_add(for_us));
                let pinned = self.manager.pin(tenant, tenant_key, key, until);
                events.push(Event::Pinned(pinned.map(|budget| (budget, Some(until)))));
            }
            Command::Pin { key, tenant, for_us: None, .. } => {
                self.manager.unpin(now, key);
                events.push(Event::Pinned(Ok((self.manager.pin_budget(tenant), None))));
            }
            Command::Grant(grants) => {
                grants.iter().for_each(|grant| self.fairness.weigh(grant.tenant, grant.weight));
                self.manager.grant(&grants);
            }
            Command::GoOnFrom(learned) => self.manager.go_on_from(learned),
            Command::Transferred(done) => {
                if let Some(reloaded) = self.manager.transferred(now, done) {
                    self.go_on(now, reloaded.key, reloaded.took_ms);
                }
            }
        }
    }

    /// A conversation's turns, oldest first. Asked for rarely, and the queue bounds them: no index is kept for it.
    fn turns_of(&self, key: KvKey) -> Vec<TurnId> {
        let turns = self.sequences.values().filter(|sequence| sequence.key == key);
        let mut turns: Vec<TurnId> = turns.map(|sequence| sequence.turn).collect();
        turns.sort_unstable();
        turns
    }

    /// A reload is back: its sequence encodes what is left of its tokens.
    fn go_on(&mut self, now: Tick, key: KvKey, took_ms: u64) {
        let Some(turn) = self.running.iter().find(|turn| self.sequences[*turn].key == key) else { return };
        let sequence = self.sequences.get_mut(turn).expect("a running turn is known");
        sequence.patience = None;
        if sequence.phase == Phase::Reloading {
            sequence.phase = Phase::Prefill;
            sequence.ready = now;
        }
        if sequence.first_token.is_none() {
            sequence.usage.prompt.reload_ms += took_ms;
        }
    }

    /// Fails turns that waited for their first admission longer than they may.
    fn end_waits(&mut self, now: Tick, events: &mut Vec<Event>) {
        if self.fairness.waiting() == 0 || now.0 < self.deadlines_seen.0 + DEADLINE_EVERY_US {
            return;
        }
        self.deadlines_seen = now;
        let late = self.sequences.values().filter(|sequence| {
            let waited_us = u128::from(now.0.saturating_sub(sequence.arrived.0));
            sequence.phase == Phase::Queued
                && sequence.found.is_none()
                && waited_us > sequence.start.request.queue_deadline.as_micros()
        });
        let mut late: Vec<(TurnId, u64)> =
            late.map(|sequence| (sequence.turn, now.ms_since(sequence.arrived))).collect();
        late.sort_unstable();
        for (turn, waited_ms) in late {
            let sequence = &self.sequences[&turn];
            let need = TokenCount::of(&sequence.tokens).blocks(self.manager.settings().block_size);
            let failure = if self.manager.is_short(need) && self.manager.is_at_ceiling(sequence.tenant, need) {
                TurnFailure::AtCeiling { waited_ms }
            } else {
                TurnFailure::QueueTimeout { waited_ms }
            };
            self.fail_turn(now, turn, failure, events);
        }
    }

    fn collect(&mut self, plan: &mut Plan) {
        plan.orders = self.manager.take_orders();
        plan.chores = self.manager.take_chores();
        let forgotten = self.manager.take_forgotten().into_iter();
        plan.events.extend(forgotten.map(|(key, freed)| Event::Forgotten(key, freed)));
        let left = self.manager.take_left().into_iter();
        plan.events.extend(left.map(|(key, bytes)| Event::Left(key, Some(bytes))));
    }

    /// Whether no turn is in the engine.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// All turns that have not ended, in no order.
    pub fn turns(&self) -> impl Iterator<Item = TurnId> {
        self.sequences.keys().copied()
    }

    pub fn manager(&self) -> &Manager {
        &self.manager
    }

    pub(super) fn note_preemption(&mut self, now: Tick, key: KvKey, for_tenant: TenantId) {
        self.preemptions += 1;
        self.manager.note_decision(now, key, for_tenant, Rule::Preempted);
    }

    /// Residency of the conversations whose whereabouts changed since the last call; `None`: no tier holds any.
    pub fn take_residencies(&mut self) -> Vec<(KvKey, Option<Residency>)> {
        let mut touched = self.manager.take_touched();
        touched.sort_unstable();
        touched.dedup();
        touched.into_iter().map(|key| (key, self.residency(key))).collect()
    }

    fn residency(&self, key: KvKey) -> Option<Residency> {
        let at = self.manager.whereabouts(key)?;
        let block_bytes = self.manager.settings().block_bytes;
        let share = |tier, tokens, (private, shared): (BlockCount, BlockCount)| TierShare {
            tokens,
            bytes_private: u64::from(private.0) * block_bytes.of(tier),
            bytes_shared: u64::from(shared.0) * block_bytes.of(tier),
        };
        let below = at.below.0.0 + at.below.1.0;
        let nothing = at.device_tokens.0 == 0 && below == 0;
        let state = if at.reloading {
            ResidencyState::Reloading
        } else if at.running {
            ResidencyState::Running
        } else if nothing {
            ResidencyState::Nowhere
        } else if at.device_tokens.0 == 0 {
            ResidencyState::Offloaded
        } else if below > 0 {
            ResidencyState::Partial
        } else {
            ResidencyState::Resident
        };
        Some(Residency {
            tenant: at.tenant,
            state,
            device: share(Tier::Device, at.device_tokens, at.device_blocks),
            host: share(Tier::Host, at.host_tokens, at.host_blocks),
            disk: share(Tier::Disk, at.disk_tokens, at.disk_blocks),
            below: at.below,
            runs: at.runs,
            last_used: at.last_used,
            pinned_until: at.pinned_until,
            last_eviction: at.last_eviction.map(|entry| LastEviction {
                journal: entry.id,
                at: entry.at,
                rule: entry.rule.name(),
                why: Why { entry, block_size: self.manager.settings().block_size },
                for_tenant: entry.for_tenant,
                from: entry.from,
                freed_bytes: u64::from(entry.freed.0) * block_bytes.of(entry.from),
            }),
        })
    }

    /// A snapshot of counters and gauges. Cost: O(running sequences).
    pub fn status(&self, now: Tick) -> EngineStatus {
        let settings = self.manager.settings();
        let pool = |tier, total, pinned| PoolStatus {
            total,
            free: self.manager.free(tier),
            pinned,
            block_bytes: settings.block_bytes.of(tier),
        };
        let (device_pinned, host_pinned) = self.manager.pinned();
        let reloading = self.running.iter().filter(|turn| self.sequences[*turn].phase == Phase::Reloading).count();
        let counters = self.manager.counters();
        let small = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        EngineStatus {
            now,
            steps: self.steps,
            running: small(self.running.len()),
            queued: small(self.fairness.waiting()),
            reloading: small(reloading),
            running_blocks: self.running.iter().map(|turn| self.manager.blocks(self.sequences[turn].key)).sum(),
            device: pool(Tier::Device, settings.device_blocks, device_pinned),
            host: pool(Tier::Host, settings.host_blocks, host_pinned),
            disk: pool(Tier::Disk, settings.disk_blocks, BlockCount(0)),
            disk_rests: self.manager.disk_rests(now),
            disk_bad_slots: self.manager.bad_slots() as u64,
            disk_write_failures: counters.disk_write_failures,
            turns_finished: self.finished,
            turns_cancelled: self.cancelled,
            turns_failed: self.failed,
            preemptions: self.preemptions,
            stalled_loads: self.stalled_loads,
            evictions: counters.evictions,
            prompt: self.prompt,
            generated_tokens: self.generated,
            isolation_faults: counters.isolation_faults,
            verification_failures: counters.verification_failures,
            offloaded_bytes: counters.offloaded_bytes,
            reloaded_bytes: counters.reloaded_bytes,
            stored_bytes: counters.stored_bytes,
            loaded_bytes: counters.loaded_bytes,
            prefill_tokens_per_s: self.prefill.per_s(),
            encoding: self.prefill.encoding(),
            reload_bytes_per_s: self.manager.rates().reload_bytes_per_s.per_s(),
            load_bytes_per_s: self.manager.rates().load_bytes_per_s.per_s(),
        }
    }
}
