//! Whose turn is admitted next?
//!
//! Start-time fair queueing (Goyal et al., SIGCOMM '96) over tenants: each has a virtual time that rises with the tokens
//! it was served, over its weight; the lowest goes first, and within a tenant the oldest. A tenant that was away starts at
//! the present, so that silence saves nothing up. Cost: O(tenants) a choice.

use std::collections::VecDeque;

use crate::types::{TenantId, TurnId, Weight};

/// Virtual time of one token served to a tenant of weight 1/1000: fine enough that no token is lost in the division.
const SCALE: u64 = 1_000_000;

#[derive(Debug)]
struct Queue {
    turns: VecDeque<TurnId>,
    /// Virtual time: tokens served over weight, times `SCALE`.
    served: u64,
    weight: Weight,
}

impl Default for Queue {
    fn default() -> Self {
        Self { turns: VecDeque::new(), served: 0, weight: Weight::ORDINARY }
    }
}

/// The turns that wait, by tenant.
#[derive(Debug, Default)]
pub struct Fairness {
    queues: Vec<Queue>,
    /// Virtual time of the newest choice.
    present: u64,
    waiting: usize,
}

impl Fairness {
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    fn queue(&mut self, tenant: TenantId) -> &mut Queue {
        let index = tenant.0 as usize;
        if self.queues.len() <= index {
            self.queues.resize_with(index + 1, Queue::default);
        }
        &mut self.queues[index]
    }

    /// Puts a new turn last of its tenant's.
    pub fn push(&mut self, tenant: TenantId, turn: TurnId) {
        let present = self.present;
        let queue = self.queue(tenant);
        if queue.turns.is_empty() {
            queue.served = queue.served.max(present);
        }
        queue.turns.push_back(turn);
        self.waiting += 1;
    }

    /// Puts a preempted turn back, first of its tenant's.
    pub fn push_front(&mut self, tenant: TenantId, turn: TurnId) {
        self.queue(tenant).turns.push_front(turn);
        self.waiting += 1;
    }

    /// The turn to admit next, which stays in its queue; tenants in `passed_over` wait for this step.
    pub fn next(&mut self, passed_over: &[TenantId]) -> Option<(TenantId, TurnId)> {
        let queues = (0u32..).map(TenantId).zip(&self.queues);
        let open = queues.filter(|(tenant, queue)| !queue.turns.is_empty() && !passed_over.contains(tenant));
        let (tenant, queue) = open.min_by_key(|(tenant, queue)| (queue.served, *tenant))?;
        let turn = *queue.turns.front()?;
        self.present = self.present.max(queue.served);
        Some((tenant, turn))
    }

    /// Takes a turn out of its queue: it was admitted, cancelled, or waited too long. O(1) for the first in line.
    pub fn remove(&mut self, tenant: TenantId, turn: TurnId) {
        let queue = self.queue(tenant);
        if let Some(place) = queue.turns.iter().position(|waiting| *waiting == turn) {
            queue.turns.remove(place);
            self.waiting -= 1;
        }
    }

    /// Notes that a tenant was served tokens.
    pub fn serve(&mut self, tenant: TenantId, tokens: u64) {
        let queue = self.queue(tenant);
        queue.served += tokens * SCALE / u64::from(queue.weight.0.max(1));
    }

    /// Sets what a tenant weighs from now on.
    pub fn weigh(&mut self, tenant: TenantId, weight: Weight) {
        self.queue(tenant).weight = weight;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: TenantId = TenantId(0);
    const B: TenantId = TenantId(1);

    #[test]
    fn a_flood_of_one_tenant_does_not_delay_another() {
        let mut fairness = Fairness::default();
        for turn in 0..10 {
            fairness.push(A, TurnId(turn));
        }
        fairness.push(B, TurnId(100));
        let mut order = Vec::new();
        while let Some((tenant, turn)) = fairness.next(&[]) {
            fairness.remove(tenant, turn);
            fairness.serve(tenant, 50);
            order.push(turn.0);
        }
        assert_eq!(order[..3], [0, 100, 1]);
        assert_eq!(fairness.waiting(), 0);
    }

    #[test]
    fn a_tenant_of_twice_the_weight_gets_twice_the_turns() {
        let mut fairness = Fairness::default();
        fairness.weigh(B, Weight(2000));
        for turn in 0..30 {
            fairness.push(A, TurnId(turn));
            fairness.push(B, TurnId(100 + turn));
        }
        let mut of_b = 0;
        for _ in 0..30 {
            let (tenant, turn) = fairness.next(&[]).unwrap();
            fairness.remove(tenant, turn);
            fairness.serve(tenant, 50);
            of_b += u32::from(tenant == B);
        }
        assert_eq!(of_b, 20);
    }

    #[test]
    fn silence_saves_nothing_up() {
        let mut fairness = Fairness::default();
        for turn in 0..4 {
            fairness.push(A, TurnId(turn));
            let (tenant, turn) = fairness.next(&[]).unwrap();
            fairness.remove(tenant, turn);
            fairness.serve(A, 1000);
        }
        fairness.push(A, TurnId(10));
        for turn in 20..23 {
            fairness.push(B, TurnId(turn));
        }
        let mut order = Vec::new();
        while let Some((tenant, turn)) = fairness.next(&[]) {
            fairness.remove(tenant, turn);
            fairness.serve(tenant, 1000);
            order.push(turn.0);
        }
        assert_eq!(order, [20, 10, 21, 22], "B does not get four turns in a row for having been away");
    }
}
