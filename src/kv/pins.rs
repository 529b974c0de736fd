//! Which blocks may nobody take, and how many of them may a tenant have?
//!
//! A pinned conversation keeps its blocks of a tier, from the first on, as far as the tenant's budget reaches: the oldest
//! pins first. What it grows beyond that goes as any other conversation's does.
//! Invariant: what all tenants' pins and floors keep leaves room for one sequence of the full window (`budget`), so that
//! pins never stop the oldest turn. Cost: O(pins of the tenant) when one of them changes, O(log pins) a step.

use std::collections::BTreeSet;

use super::manager::Manager;
use super::residency::{Activity, Conversation};
use crate::types::{BlockCount, KvKey, TenantId, TenantKey, Tick};

/// A conversation's pin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Pin {
    until: Tick,
    /// Blocks of each tier, from the first on, that nobody takes.
    pub device: BlockCount,
    pub host: BlockCount,
}

/// What a tenant's pins may keep on the device, and what they do keep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PinBudget {
    pub limit: BlockCount,
    pub used: BlockCount,
}

/// Why a conversation was not pinned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PinRefused {
    /// It has so many blocks, and they don't fit.
    OverBudget(PinBudget, BlockCount),
    /// It is being forgotten.
    Forgetting,
}

/// A tenant's pins.
#[derive(Debug, Default)]
struct Pinned {
    /// The oldest first.
    keys: Vec<KvKey>,
    device: BlockCount,
    host: BlockCount,
}

/// Who is pinned.
#[derive(Debug, Default)]
pub(super) struct Pins {
    tenants: Vec<Pinned>,
    /// The next to expire first.
    ends: BTreeSet<(Tick, KvKey)>,
}

impl Pins {
    fn of(&mut self, tenant: TenantId) -> &mut Pinned {
        let index = tenant.0 as usize;
        if self.tenants.len() <= index {
            self.tenants.resize_with(index + 1, Pinned::default);
        }
        &mut self.tenants[index]
    }
}

impl Conversation {
    /// Until when it is pinned.
    pub fn pinned_until(&self) -> Option<Tick> {
        self.pin.map(|pin| pin.until)
    }

    /// Whether the evictor may have some of its device blocks.
    pub fn exposes_device(&self) -> bool {
        self.device.blocks() > self.pin.map_or(BlockCount(0), |pin| pin.device)
    }

    /// Whether the evictor may have some of its host blocks.
    pub fn exposes_host(&self) -> bool {
        self.host.blocks() > self.pin.map_or(BlockCount(0), |pin| pin.host)
    }

    /// Device blocks that it has, or would have with all that the host has of it. A pin counts one at least, so that a
    /// budget bounds their number.
    fn size(&self) -> BlockCount {
        let running = self.running().map_or(0, |running| running.places);
        let running = BlockCount(u32::try_from(running).expect("a window bounds a table"));
        running.max(self.device.blocks()).max(self.host.blocks()).max(BlockCount(1))
    }
}

impl Manager {
    /// Keeps a conversation's blocks from the evictor until a moment; one that is pinned already stays so until then.
    pub fn pin(
        &mut self,
        tenant: TenantId,
        tenant_key: TenantKey,
        key: KvKey,
        until: Tick,
    ) -> Result<PinBudget, PinRefused> {
        if self.device_budget.see(tenant) | self.host_budget.see(tenant) | self.disk.budget.see(tenant) {
            self.settle_all_pins();
        }
        let conversation = self.conversations.entry(key).or_insert_with(|| Conversation::new(key, tenant, tenant_key));
        assert_eq!(conversation.tenant, tenant, "a conversation crossed tenants");
        if matches!(conversation.activity, Activity::Forgetting) {
            return Err(PinRefused::Forgetting);
        }
        if let Some(pin) = &mut conversation.pin {
            self.pins.ends.remove(&(pin.until, key));
            pin.until = until;
        } else {
            let size = conversation.size();
            let budget = self.pin_budget(tenant);
            if budget.used.0 + size.0 > budget.limit.0 {
                self.drop_if_empty(key);
                return Err(PinRefused::OverBudget(budget, size));
            }
            let conversation = self.conversations.get_mut(&key).expect("looked up above");
            conversation.pin = Some(Pin { until, device: BlockCount(0), host: BlockCount(0) });
            self.pins.of(tenant).keys.push(key);
            self.settle_pins(tenant);
        }
        self.pins.ends.insert((until, key));
        self.touch(key);
        Ok(self.pin_budget(tenant))
    }

    /// Gives a conversation's blocks back to the evictor, last of those like it. Nothing if it isn't pinned.
    pub fn unpin(&mut self, now: Tick, key: KvKey) {
        if self.conversations.get(&key).is_some_and(|conversation| conversation.pin.is_some()) {
            self.end_pin(key);
            self.freshen(now, key);
        }
    }

    /// Ends a pin, if there is one, and leaves the conversation where it is in line.
    pub(super) fn end_pin(&mut self, key: KvKey) {
        let Some(conversation) = self.conversations.get_mut(&key) else { return };
        let Some(pin) = conversation.pin.take() else { return };
        let tenant = conversation.tenant;
        self.pins.ends.remove(&(pin.until, key));
        self.pins.of(tenant).keys.retain(|pinned| *pinned != key);
        self.settle_pins(tenant);
        self.touch(key);
        self.drop_if_empty(key);
    }

    /// Ends the pins whose time has come.
    pub fn expire_pins(&mut self, now: Tick) {
        while let Some(&(until, key)) = self.pins.ends.first().filter(|(until, _)| *until <= now) {
            debug_assert_eq!(self.conversation(key).pinned_until(), Some(until));
            self.unpin(now, key);
        }
    }

    /// What a tenant may pin on the device, and what it has pinned.
    pub fn pin_budget(&self, tenant: TenantId) -> PinBudget {
        let used = self.pins.tenants.get(tenant.0 as usize).map_or(BlockCount(0), |pinned| pinned.device);
        PinBudget { limit: self.device_budget.pins(tenant), used }
    }

    /// Device and host blocks that pins keep. Cost: O(tenants).
    pub fn pinned(&self) -> (BlockCount, BlockCount) {
        let tenants = &self.pins.tenants;
        let sum = |of: fn(&Pinned) -> BlockCount| BlockCount(tenants.iter().map(|pinned| of(pinned).0).sum());
        (sum(|pinned| pinned.device), sum(|pinned| pinned.host))
    }

    /// After a conversation has grown or shrunk: if it is pinned, its tenant's pins share their budget anew.
    pub(super) fn settle_pin_of(&mut self, key: KvKey) {
        let pinned = self.conversations.get(&key).filter(|conversation| conversation.pin.is_some());
        if let Some(tenant) = pinned.map(|conversation| conversation.tenant) {
            self.settle_pins(tenant);
        }
    }

    /// After budgets have changed.
    pub(super) fn settle_all_pins(&mut self) {
        for tenant in (0..).take(self.pins.tenants.len()).map(TenantId) {
            self.settle_pins(tenant);
        }
    }

    /// Shares a tenant's budgets among its pins, and puts into line what is not kept.
    fn settle_pins(&mut self, tenant: TenantId) {
        let (device_limit, host_limit) = (self.device_budget.pins(tenant), self.host_budget.pins(tenant));
        let (mut device_left, mut host_left) = (device_limit, host_limit);
        for index in 0..self.pins.of(tenant).keys.len() {
            let key = self.pins.of(tenant).keys[index];
            let conversation = self.conversations.get_mut(&key).expect("a pinned conversation is known");
            let (size, host) = (conversation.size(), conversation.host.blocks());
            let pin = conversation.pin.as_mut().expect("it is in the list");
            (pin.device, pin.host) = (size.min(device_left), host.min(host_left));
            device_left.0 -= pin.device.0;
            host_left.0 -= pin.host.0;
            let (idle, exposes) = (conversation.is_idle(), conversation.exposes_device());
            if !exposes {
                self.device_line.remove(key);
            } else if idle && !self.device_line.contains(key) {
                // As silent as it has been: a budget's change is no use of it.
                let (since, standing) = (conversation.silent_since, conversation.standing());
                let length = conversation.length(self.settings.block_size);
                self.device_line.add_first(tenant, key, since, standing, length);
            }
            self.in_host_line(key);
        }
        let pinned = self.pins.of(tenant);
        pinned.device = BlockCount(device_limit.0 - device_left.0);
        pinned.host = BlockCount(host_limit.0 - host_left.0);
    }
}
