//! Who would lose device memory next, if turns of a new tenant came and nothing else happened?
//!
//! For those who look: `reclaim` decides by itself, when a turn needs room. The same order by the same judge: tenants over
//! their ceiling first, down to it, then those above their floor, down to that. Cost: O(tenants), and their lists for each
//! that is named.

use std::iter::Peekable;

use super::evictor::{Judge, Victim};
use super::journal::Rule;
use super::manager::Manager;
use crate::types::{BlockCount, TenantId, Tick};

/// One of those who would go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next {
    pub victim: Victim,
    pub tenant: TenantId,
    /// Device blocks that it names.
    pub blocks: BlockCount,
    /// Its last device block has a copy below, so that it can go at once.
    pub is_clean: bool,
}

/// A tenant's line, and how far it has come down.
struct Line<I: Iterator<Item = Victim>> {
    tenant: TenantId,
    held: u32,
    victims: Peekable<I>,
}

impl Manager {
    /// The first `most` in line.
    pub fn next_victims(&self, now: Tick, most: usize) -> Vec<Next> {
        let judge = Judge::new(self.settings.policy, self.settings.doubles_at, &self.returns, now);
        let tenants = (0..).map(TenantId).take(self.device_line.tenants());
        let mut lines: Vec<_> = tenants
            .map(|tenant| Line {
                tenant,
                held: self.device.held(tenant).0,
                victims: self.device_line.in_order(&judge, tenant).peekable(),
            })
            .collect();
        let mut next = Vec::new();
        let budget = &self.device_budget;
        for (keeps, rule) in [(true, Some(Rule::OverCeiling)), (false, None)] {
            let kept = |tenant| if keeps { budget.ceiling(tenant) } else { budget.floor(tenant) };
            while next.len() < most {
                let first = lines
                    .iter_mut()
                    .filter(|line| line.held > kept(line.tenant).0)
                    .filter_map(|line| Some((line.victims.peek()?.rank, line)))
                    .min_by_key(|(rank, line)| (*rank, line.tenant));
                let Some((_, line)) = first else { break };
                let Some(victim) = line.victims.next() else { break };
                let Some(conversation) = self.conversations.get(&victim.key) else { continue };
                let blocks = conversation.device.blocks();
                line.held = line.held.saturating_sub(blocks.0);
                let rule = rule.filter(|_| victim.rule != Rule::Ended).unwrap_or(victim.rule);
                let (tenant, is_clean) = (line.tenant, conversation.end_is_clean());
                next.push(Next { victim: Victim { rule, ..victim }, tenant, blocks, is_clean });
            }
        }
        next
    }

    /// A tenant's part of the device pool: by weight, and what its pins may keep.
    pub fn device_part(&self, tenant: TenantId) -> DevicePart {
        let budget = &self.device_budget;
        DevicePart {
            weight: budget.weight(tenant).map_or(0, |weight| weight.0),
            share: budget.share(tenant),
            floor: budget.floor(tenant),
            ceiling: budget.ceiling(tenant),
            pins: self.pin_budget(tenant).limit,
            pinned: self.pin_budget(tenant).used,
        }
    }
}

/// What a tenant has of the device pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DevicePart {
    /// In thousandths; 0: it is gone.
    pub weight: u32,
    /// By the weights of those who have had a turn: for comparison, nothing is decided by it.
    pub share: BlockCount,
    pub floor: BlockCount,
    pub ceiling: BlockCount,
    pub pins: BlockCount,
    pub pinned: BlockCount,
}
