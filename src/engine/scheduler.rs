//! Which rows go into the next step?
//!
//! Every running sequence with one token to feed decodes; what is left of the step's tokens goes to prefill chunks, oldest
//! admission first; then waiting turns are admitted as fairness says. A sequence that finds no place for its next token
//! preempts the newest of the tenant furthest above its floor, or of its own tenant if that is at its ceiling. Nothing is admitted in a step in which a running sequence
//! lacks a place, so that the oldest always gets on.

use super::core::{Core, Plan, Span};
use super::sequence::Phase;
use crate::kv::manager::{Admission, Admit, NoPlace};
use crate::types::{BlockCount, Tick, TokenCount, TurnId};

/// Whether a sequence got its rows.
enum Placed {
    Yes,
    /// Copies under way will make room.
    Later,
    /// It gave its own places up.
    Preempted,
}

impl Core {
    pub(super) fn schedule(&mut self, now: Tick, plan: &mut Plan) {
        let mut stalled = false;
        let (decodes, prefills): (Vec<TurnId>, Vec<TurnId>) = self
            .running
            .iter()
            .filter(|turn| self.sequences[turn].phase != Phase::Reloading)
            .partition(|turn| self.to_feed(**turn) == 1);
        for turn in decodes.into_iter().chain(prefills) {
            let budget = self.settings.step_tokens.saturating_sub(plan.tokens.len());
            // A sequence that was preempted for an older one has left; a decode always has its row.
            let runs = self.sequences.get(&turn).is_some_and(|sequence| sequence.phase != Phase::Queued);
            let rows = if runs { self.to_feed(turn).min(budget.max(1)) } else { 0 };
            if rows == 0 || (budget == 0 && self.to_feed(turn) > 1) {
                continue;
            }
            match self.place(now, turn, rows, plan) {
                Placed::Yes => {}
                Placed::Later | Placed::Preempted => stalled = true,
            }
        }
        if !stalled {
            self.admit(now, plan);
        }
    }

    /// Tokens of a running sequence whose KV is not there yet.
    fn to_feed(&self, turn: TurnId) -> usize {
        let sequence = &self.sequences[&turn];
        sequence.tokens.len() - self.manager.resident(sequence.key).context().get()
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
        let sequence = self.sequences.get_mut(&victim).expect("a running turn is known");
        sequence.phase = Phase::Queued;
        sequence.carry_chain_on(self.manager.settings().block_size);
        let (tenant, key) = (sequence.tenant, sequence.key);
        self.running.retain(|running| *running != victim);
        self.fairness.push_front(tenant, victim);
        // While it is known: one that has nothing in place yet, after a damaged reload, leaves no record.
        self.note_preemption(now, key, for_tenant);
        self.manager.rest(now, key);
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
            let admit = Admit { key, tenant, tenant_key, tokens: &sequence.tokens, hashes: &sequence.hashes };
            let (phase, found) = match self.manager.admit(now, admit) {
                Admission::Ready(found) => (Phase::Prefill, found),
                Admission::Reloading(_, found) => (Phase::Reloading, found),
                Admission::Wait | Admission::NoRoom => {
                    passed_over.push(tenant);
                    continue;
                }
            };
            self.fairness.remove(tenant, turn);
            self.admissions += 1;
            let sequence = self.sequences.get_mut(&turn).expect("a waiting turn is known");
            sequence.phase = phase;
            sequence.admission = self.admissions;
            if !sequence.admitted_once {
                sequence.admitted_once = true;
                sequence.found = found;
                sequence.ready = now;
                sequence.usage.prompt.queue_ms = now.ms_since(sequence.arrived);
                if phase == Phase::Prefill {
                    let context = self.manager.resident(key).context();
                    sequence.account(context);
                }
            }
            self.running.push(turn);
            if phase == Phase::Prefill {
                let budget = self.settings.step_tokens - plan.tokens.len();
                let rows = self.to_feed(turn).min(budget);
                match self.place(now, turn, rows, plan) {
                    Placed::Yes => {}
                    Placed::Later | Placed::Preempted => return,
                }
            }
        }
    }
}
