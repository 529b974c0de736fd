//! Which rows go into the next step?
//!
//! Every running sequence with one token to feed decodes; what is left of the step's tokens goes to prefill chunks, oldest
//! admission first; then waiting turns are admitted as fairness says. A chunk takes half of what is left while others want
//! some, so that a short prompt does not wait for the end of a long one. A sequence that finds no place for its next token
//! preempts the newest of the tenant furthest above its floor, or of its own tenant if that is at its ceiling. Nothing is
//! admitted in a step in which a running sequence lacks a place, so that the oldest always gets on.

use super::core::{Core, Plan, Span};
use super::sequence::Phase;
use crate::kv::cost::Patience;
use crate::kv::manager::{Admission, Admit, NoPlace};
use crate::types::{BlockCount, KvKey, Tick, TokenCount, TurnId};

/// Whether a sequence got its rows.
enum Placed {
    Yes,
    /// Copies under way will make room.
    Later,
    /// What it waits for besides will come: it takes nobody's place for the time until then.
    NotNow,
    /// It gave its own places up.
    Preempted,
}

/// The part of a step's tokens that one prefill chunk takes.
fn share(left: usize, others_want_some: bool) -> usize {
    if others_want_some { left.div_ceil(2) } else { left }
}

impl Core {
    pub(super) fn schedule(&mut self, now: Tick, plan: &mut Plan) {
        self.end_patience(now);
        let mut stalled = false;
        let (decodes, prefills): (Vec<TurnId>, Vec<TurnId>) = self
            .running
            .iter()
            .filter(|turn| self.sequences[turn].phase != Phase::Reloading)
            .partition(|turn| self.to_feed(**turn) == 1);
        let first_prefill = decodes.len();
        let turns: Vec<TurnId> = decodes.into_iter().chain(prefills).collect();
        for (index, turn) in turns.iter().copied().enumerate() {
            let left = self.settings.step_tokens.saturating_sub(plan.tokens.len());
            let others_want_some = index + 1 < turns.len() || self.fairness.waiting() > 0;
            let budget = if index < first_prefill { left } else { share(left, others_want_some) };
            // A sequence that was preempted for an older one has left; a decode always has its row.
            let runs = self.sequences.get(&turn).is_some_and(|sequence| sequence.phase != Phase::Queued);
            let rows = if runs { self.to_feed(turn).min(budget.max(1)) } else { 0 };
            if rows == 0 || (budget == 0 && self.to_feed(turn) > 1) {
                continue;
            }
            match self.place(now, turn, rows, plan) {
                Placed::Yes | Placed::NotNow => {}
                Placed::Later | Placed::Preempted => stalled = true,
            }
        }
        if !stalled {
            self.admit(now, plan);
        }
    }

    /// Lets turns whose load from disk takes longer than foretold encode meanwhile: whatever is there first is taken.
    fn end_patience(&mut self, now: Tick) {
        let waiting = self.running.iter().filter_map(|turn| Some((*turn, self.sequences[turn].patience?)));
        let late: Vec<(TurnId, Patience)> = waiting.filter(|(_, patience)| patience.until < now).collect();
        for (turn, patience) in late {
            let sequence = self.sequences.get_mut(&turn).expect("a running turn is known");
            if !self.manager.encode_meanwhile(sequence.key) {
                sequence.patience = None;
                continue;
            }
            if sequence.phase == Phase::Reloading {
                sequence.phase = Phase::Prefill;
                sequence.ready = now;
            }
            if patience.hangs < now && self.manager.load_hangs(sequence.key) {
                tracing::warn!(%turn, "a load from disk hangs: nobody asks the disk until it is back");
                self.stalled_loads += 1;
            }
        }
    }

    /// Tokens of a running sequence that can be fed now: those whose KV is not there yet, up to what is there already or
    /// comes by itself.
    fn to_feed(&self, turn: TurnId) -> usize {
        let sequence = &self.sequences[&turn];
        let resident = self.manager.resident(sequence.key);
        let end = resident.gap_ends().map_or(sequence.tokens.len(), TokenCount::get);
        end.saturating_sub(resident.context().get())
    }

    /// Gives a sequence its next `rows` rows, if there are places for them.
    fn place(&mut self, now: Tick, turn: TurnId, rows: usize, plan: &mut Plan) -> Placed {
        let key = self.sequences[&turn].key;
        let context = self.manager.resident(key).context().get();
        let tokens = TokenCount(u32::try_from(context + rows).expect("a window bounds a sequence"));
        loop {
            match self.manager.grow(now, key, tokens) {
                Ok(()) => break,
                Err(NoPlace::Coming) => return Placed::Later,
                Err(NoPlace::Short) => {}
            }
            // Its load's places come to it; were that to hang, they don't, and it begins anew without the disk.
            if self.manager.hangs(key) {
                let key = self.back_in_queue(turn);
                self.manager.set_back(now, key);
                return Placed::Preempted;
            }
            if self.manager.is_arriving(key) {
                return Placed::NotNow;
            }
            let Some(victim) = self.to_preempt(turn, plan) else { return Placed::Later };
            self.preempt(now, victim, turn);
            if victim == turn {
                return Placed::Preempted;
            }
        }
        let sequence = &self.sequences[&turn];
        let samples = context + rows == sequence.tokens.len();
        let first_row = plan.tokens.len();
        plan.tokens.extend_from_slice(&sequence.tokens[context..][..rows]);
        if samples {
            plan.sampled.push(plan.tokens.len() - 1);
        }
        plan.spans.push(Span { turn, key, first_row, rows, samples });
        Placed::Yes
    }

    /// The newest sequence of the tenant furthest above its floor, of those that have no rows in this step; for a turn of a
    /// tenant at its ceiling, the newest of its own. The last one that may go is never preempted: it can always evict what
    /// rests.
    fn to_preempt(&self, for_turn: TurnId, plan: &Plan) -> Option<TurnId> {
        let tenant = self.sequences[&for_turn].tenant;
        let own_only = self.manager.is_at_ceiling(tenant, BlockCount(1));
        let running = self.running.iter().map(|turn| &self.sequences[turn]);
        let may_go: Vec<_> = running.filter(|sequence| !own_only || sequence.tenant == tenant).collect();
        if may_go.len() < 2 {
            return None;
        }
        let above = |tenant| i64::from(self.manager.held(tenant).0) - i64::from(self.manager.floor(tenant).0);
        let free_to_go = may_go.into_iter().filter(|sequence| {
            sequence.phase != Phase::Reloading && plan.spans.iter().all(|span| span.turn != sequence.turn)
        });
        let victim = free_to_go.max_by_key(|sequence| (above(sequence.tenant), sequence.admission))?;
        Some(victim.turn)
    }

    /// Takes a running sequence's places; it waits, first of its tenant's, and loses nothing.
    fn preempt(&mut self, now: Tick, victim: TurnId, for_turn: TurnId) {
        let for_tenant = self.sequences[&for_turn].tenant;
        let key = self.back_in_queue(victim);
        // While it is known: one that has nothing in place yet, after a damaged reload, leaves no record.
        self.note_preemption(now, key, for_tenant);
        self.manager.set_back(now, key);
    }

    /// Makes a running turn one that waits, first of its tenant's.
    fn back_in_queue(&mut self, turn: TurnId) -> KvKey {
        let sequence = self.sequences.get_mut(&turn).expect("a running turn is known");
        sequence.phase = Phase::Queued;
        sequence.carry_chain_on(self.manager.settings().block_size);
        let (tenant, key) = (sequence.tenant, sequence.key);
        self.running.retain(|running| *running != turn);
        self.fairness.push_front(tenant, turn);
        key
    }

    /// Notes, once, that a turn has to wait for memory.
    fn note_wait(&mut self, now: Tick, turn: TurnId) {
        let sequence = self.sequences.get_mut(&turn).expect("a waiting turn is known");
        if std::mem::replace(&mut sequence.told_to_wait, true) {
            return;
        }
        let need = sequence.tokens.len().div_ceil(self.manager.settings().block_size.0 as usize);
        let need = BlockCount(u32::try_from(need).expect("a window bounds a sequence"));
        self.manager.note_wait(now, sequence.key, sequence.tenant, need);
    }

    /// Lets waiting turns in, as long as the step has tokens left for them. A turn that must wait for memory holds its
    /// own tenant's later ones back, and nobody else's.
    fn admit(&mut self, now: Tick, plan: &mut Plan) {
        let mut passed_over = Vec::new();
        while self.running.len() < self.settings.max_running && plan.tokens.len() < self.settings.step_tokens {
            let Some((tenant, turn)) = self.fairness.next(&passed_over) else { return };
            let sequence = &self.sequences[&turn];
            let key = sequence.key;
            if self.manager.runs(key) {
                // The turn before it was cancelled a moment ago, or the caller broke its word: in order, either way.
                passed_over.push(tenant);
                continue;
            }
            let tenant_key = sequence.start.tenant_key;
            let prefill_per_s = self.prefill.encoding().per_s(TokenCount::of(&sequence.tokens));
            let admit =
                Admit { key, tenant, tenant_key, tokens: &sequence.tokens, hashes: &sequence.hashes, prefill_per_s };
            let (phase, found) = match self.manager.admit(now, admit) {
                Admission::Ready(found) => (Phase::Prefill, found),
                Admission::Reloading(found) => (Phase::Reloading, found),
                Admission::Wait => {
                    passed_over.push(tenant);
                    continue;
                }
                Admission::NoRoom => {
                    self.note_wait(now, turn);
                    passed_over.push(tenant);
                    continue;
                }
            };
            self.fairness.remove(tenant, turn);
            self.admissions += 1;
            let patience = self.manager.patience(now, found, prefill_per_s);
            let sequence = self.sequences.get_mut(&turn).expect("a waiting turn is known");
            sequence.phase = phase;
            sequence.admission = self.admissions;
            sequence.patience = patience;
            if sequence.found.is_none() {
                sequence.found = Some(found);
                sequence.usage.prompt.queue_ms = now.ms_since(sequence.arrived);
            }
            if sequence.first_token.is_none() {
                sequence.ready = now;
            }
            self.running.push(turn);
            if phase == Phase::Prefill {
                let left = self.settings.step_tokens - plan.tokens.len();
                let rows = self.to_feed(turn).min(share(left, self.fairness.waiting() > 0));
                match self.place(now, turn, rows, plan) {
                    Placed::Yes | Placed::NotNow => {}
                    Placed::Later | Placed::Preempted => return,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::core::{Command, CoreSettings, Event, StartTurn};
    use super::super::{Sampling, TurnEvent, TurnFailure, TurnRequest, TurnShape};
    use super::*;
    use crate::kv::KvSettings;
    use crate::kv::block::PrefixHash;
    use crate::kv::evictor::Policy;
    use crate::model::Logits;
    use crate::types::{BlockBytes, BlockSize, Grant, PoolPart, TenantId, TenantKey, TierBudget, TokenId, Weight};

    const SIZE: BlockSize = BlockSize(16);
    const STEP: usize = 64;

    fn core() -> Core {
        let kv = KvSettings {
            block_size: SIZE,
            block_bytes: BlockBytes::all(64),
            device_blocks: BlockCount(1000),
            host_blocks: BlockCount(0),
            disk_blocks: BlockCount(0),
            window: TokenCount(8000),
            background_offload: false,
            policy: Policy::Lru,
            doubles_at: None,
            front_first_from: None,
            journal_entries: 10,
            reuse: false,
        };
        Core::new(CoreSettings { max_running: 8, step_tokens: STEP }, kv)
    }

    fn start(turn: u64, prompt: u32) -> Command {
        start_of(TenantId(0), turn, prompt)
    }

    fn start_of(tenant: TenantId, turn: u64, prompt: u32) -> Command {
        let prompt: Vec<_> = (0..prompt).map(TokenId).collect();
        let tenant_key = TenantKey([1; 32]);
        let hashes = PrefixHash::chain(&tenant_key, &prompt, SIZE);
        let request = TurnRequest {
            prompt: prompt.into(),
            encoded_before: TokenCount(0),
            shape: TurnShape { number: 1, new_tokens: TokenCount(0) },
            sampling: Sampling::default(),
            max_tokens: TokenCount(1),
            stop_tokens: [].into(),
            queue_deadline: std::time::Duration::from_secs(60),
            logprobs: None,
        };
        let key = KvKey(turn.into());
        Command::Start(Box::new(StartTurn { turn: TurnId(turn), key, tenant, tenant_key, hashes, request }))
    }

    /// One step; rows by turn, and the turns that said something.
    fn step(core: &mut Core, commands: Vec<Command>) -> (Vec<(u64, usize)>, Vec<u64>) {
        let mut plan = core.plan(Tick(0), &mut commands.into_iter().collect());
        let mut logits = Logits::default();
        logits.reset(plan.sampled.len(), 8).fill(0.0);
        let mut events = std::mem::take(&mut plan.events);
        core.commit(Tick(0), &plan, Ok(&mut logits), &mut events);
        let said = events.into_iter().filter_map(|event| match event {
            Event::Turn(turn, TurnEvent::Token(_)) => Some(turn.0),
            _ => None,
        });
        (plan.spans.iter().map(|span| (span.turn.0, span.rows)).collect(), said.collect())
    }

    #[test]
    fn a_short_prompt_does_not_wait_for_the_end_of_a_long_one() {
        let mut core = core();
        assert_eq!(step(&mut core, vec![start(0, 4000)]).0, [(0, STEP)], "alone it has the whole step");
        let (rows, said) = step(&mut core, vec![start(1, 20)]);
        assert_eq!((rows, said), (vec![(0, STEP / 2), (1, 20)], vec![1]));
        assert_eq!(step(&mut core, vec![]).0, [(0, STEP)]);
    }

    #[test]
    fn a_turn_that_waits_at_its_tenants_ceiling_is_told_so() {
        let mut core = core();
        let ceiling = Some(PoolPart::Permille(500));
        let budget = TierBudget { floor: Some(PoolPart::Bytes(0)), ceiling, pins: None };
        let grant = |tenant| Grant { tenant, weight: Weight::ORDINARY, device: budget, host: budget, disk: budget };
        let grants = Command::Grant(vec![grant(TenantId(0)), grant(TenantId(1))]);
        // Both tenants' ceilings are full, and so is the pool.
        step(&mut core, vec![grants, start(0, 7900), start_of(TenantId(1), 1, 7900)]);
        let mut commands = vec![start(2, 1000)];
        core.plan(Tick(0), &mut commands);
        let plan = core.plan(Tick(61_000_000), &mut commands);
        let failed = Event::Turn(TurnId(2), TurnEvent::Failed(TurnFailure::AtCeiling { waited_ms: 61_000 }));
        assert_eq!(plan.events, [failed]);
    }

    #[test]
    fn each_of_many_prompts_gets_on_and_the_oldest_most() {
        let mut core = core();
        let (rows, _) = step(&mut core, (0..4).map(|turn| start(turn, 500)).collect());
        assert_eq!(rows, [(0, 32), (1, 16), (2, 8), (3, 8)]);
        let (rows, _) = step(&mut core, vec![]);
        assert_eq!(rows, [(0, 32), (1, 16), (2, 8), (3, 8)]);
    }
}
