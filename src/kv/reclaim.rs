//! How is room made in a pool?
//!
//! A turn of a tenant at its ceiling displaces only its own conversations. Others' turns take from tenants over their
//! ceiling first, down to it, then from those above their floor, down to that. The evictor names the victim; its blocks go
//! from the tail, only as many as are needed. A device block that has a copy below goes at once; one that has none is
//! copied first, and the requester waits for that. Where the last copy of a long conversation goes, its own first blocks go
//! before its last ones.

use super::evictor::{Judge, Standing, Victim};
use super::journal::{Entry, Rule};
use super::manager::Manager;
use super::residency::Conversation;
use super::return_rate::Class;
use crate::types::{BlockCount, Grant, KvKey, TenantId, Tick, Tier};

/// What came of asking for room.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Room {
    Made,
    /// Copies are under way that will free some; ask again when they are done.
    Coming,
    /// Running turns and others' floors hold the rest.
    None,
}

impl Manager {
    /// Replaces what all tenants were given of the pools. Whoever is not named is gone: what it holds is anybody's.
    pub fn grant(&mut self, grants: &[Grant]) {
        self.device_budget.grant(grants.iter().map(|grant| (grant.tenant, grant.weight, grant.device)));
        self.host_budget.grant(grants.iter().map(|grant| (grant.tenant, grant.weight, grant.host)));
        self.disk.budget.grant(grants.iter().map(|grant| (grant.tenant, grant.weight, grant.disk)));
        self.settle_all_pins();
    }

    /// The part of the device pool that other tenants' turns leave this one.
    pub fn floor(&self, tenant: TenantId) -> BlockCount {
        self.device_budget.floor(tenant)
    }

    /// Whether so many places more, while memory is short, are more than a tenant may have: then its turns displace
    /// nobody but its own conversations.
    pub fn is_at_ceiling(&self, tenant: TenantId, need: BlockCount) -> bool {
        self.device.held(tenant).0 + need.0 > self.device_budget.ceiling(tenant).0
    }

    /// Whether fewer device places than that are free.
    pub fn is_short(&self, need: BlockCount) -> bool {
        self.device.free() < need
    }

    /// Makes `need` device places free for a turn of `tenant`.
    pub(super) fn make_room(&mut self, now: Tick, need: BlockCount, tenant: TenantId) -> Room {
        while self.device.free() < need {
            let Some(victim) = self.device_victim(now, need, tenant) else { break };
            if self.stands_as_shared(&victim, Tier::Device) {
                continue;
            }
            // With no room below, what has no copy is given up for good, from the tail.
            if self.needs_copy_first(victim.key) && self.copy_down_now(now, victim.key) {
                return Room::Coming;
            }
            self.evict(now, victim, need, tenant);
        }
        if self.device.free() >= need {
            Room::Made
        } else if self.copies_under_way() {
            Room::Coming
        } else {
            Room::None
        }
    }

    /// Who gives up device blocks for a turn of `tenant` that needs so many, and by which rule.
    fn device_victim(&mut self, now: Tick, need: BlockCount, tenant: TenantId) -> Option<Victim> {
        let at_ceiling = self.is_at_ceiling(tenant, need);
        let judge = Judge::new(self.settings.policy, self.settings.doubles_at, &self.returns, now);
        let (device, budget, line) = (&self.device, &self.device_budget, &mut self.device_line);
        if at_ceiling {
            return line.victim(&judge, |other| other == tenant);
        }
        if let Some(victim) = line.victim(&judge, |other| device.held(other) > budget.ceiling(other)) {
            let rule = if victim.rule == Rule::Ended { Rule::Ended } else { Rule::OverCeiling };
            return Some(Victim { rule, ..victim });
        }
        line.victim(&judge, |other| other == tenant || device.held(other) > budget.floor(other))
    }

    /// Puts what is left of a victim in a tier's line as the shared prefix that it is, if it isn't there already.
    pub(super) fn stands_as_shared(&mut self, victim: &Victim, tier: Tier) -> bool {
        let conversation = self.conversations.get(&victim.key).expect("a conversation in line is known");
        if victim.reason.class == Some(Class::SHARED) {
            return false;
        }
        let size = self.settings.block_size;
        let (line, used, length) = match tier {
            Tier::Device => {
                let table = &conversation.device;
                (&mut self.device_line, table.last_of_shared(), table.tokens(size))
            }
            Tier::Host => {
                let table = &conversation.host;
                (&mut self.host_line, table.last_of_shared(), table.tokens(size))
            }
            Tier::Disk => {
                let table = &conversation.disk;
                (&mut self.disk.line, table.last_of_shared(), table.tokens(size))
            }
        };
        let Some(used) = used else { return false };
        let since = used.max(conversation.silent_since);
        line.add(conversation.tenant, victim.key, since, Standing::Idle(Class::SHARED), length);
        true
    }

    /// Whether a victim's last block would be lost although the host pool exists.
    fn needs_copy_first(&mut self, key: KvKey) -> bool {
        self.adopt_host_copies(key);
        let conversation = self.conversations.get(&key).expect("a conversation in line is known");
        self.host.total().0 > 0 && !conversation.end_is_clean()
    }

    /// Takes device blocks off a conversation until `need` places are free, its tenant has come down to its ceiling
    /// or floor, or what is left has a copy while what went had none. Writes one journal entry.
    fn evict(&mut self, now: Tick, victim: Victim, need: BlockCount, for_tenant: TenantId) {
        let Victim { key, rule, reason, .. } = victim;
        let conversation = self.conversations.get_mut(&key).expect("a conversation in line is known");
        let tenant = conversation.tenant;
        let floor = self.device_budget.floor(tenant);
        let ceiling = self.device_budget.ceiling(tenant);
        let keeps = if self.device.held(tenant) > ceiling { ceiling } else { floor };
        let for_one_at_its_ceiling = self.device.held(for_tenant).0 + need.0 > self.device_budget.ceiling(for_tenant).0;
        let starts_clean = conversation.end_is_clean();
        let front = conversation.front_to_lose(self.settings.front_first_from, self.settings.block_size);
        let front = front.filter(|_| !starts_clean);
        let (mut freed, mut lost) = (BlockCount(0), BlockCount(0));
        while self.device.free() < need && conversation.exposes_device() && conversation.end_is_clean() == starts_clean
        {
            if tenant != for_tenant && self.device.held(tenant) <= keeps {
                break;
            }
            let from_front = front.and_then(|from| conversation.device.take_front(from));
            let Some(taken) = from_front.or_else(|| conversation.device.take_end()) else { break };
            freed.0 += u32::from(taken.freed);
            let is_lost = if from_front.is_some() { !conversation.is_below(taken.index) } else { !starts_clean };
            lost.0 += u32::from(taken.freed && is_lost);
            // What conversations share is worth more than what was its own: its turn comes later.
            if reason.class != Some(Class::SHARED) && conversation.device.last_of_shared().is_some() {
                break;
            }
        }
        self.device_line.shorten(key, conversation.device.tokens(self.settings.block_size));
        if tenant != for_tenant && (self.device.held(tenant) < floor || for_one_at_its_ceiling) {
            self.counters.isolation_faults += 1;
        }
        if !conversation.exposes_device() {
            self.device_line.remove(key);
        }
        self.counters.evictions += 1;
        let from = Tier::Device;
        self.note(Entry { id: 0, at: now, victim: key, tenant, for_tenant, rule, reason, from, freed, lost });
        self.drop_if_empty(key);
    }

    /// Makes up to `need` host places free for copies of a conversation: those that go before it give up theirs, of the
    /// same tenant or, unless that is at its ceiling, of those above their floor.
    pub(super) fn make_host_room(&mut self, now: Tick, need: BlockCount, key: KvKey) {
        let conversation = self.conversation(key);
        let tenant = conversation.tenant;
        let length = conversation.length(self.settings.block_size);
        let (standing, since) = (conversation.standing(), conversation.silent_since);
        while self.host.free() < need {
            let held = |tenant| self.host.held(tenant);
            let at_ceiling = held(tenant).0 + need.0 > self.host_budget.ceiling(tenant).0;
            let others_may = |other| !at_ceiling && held(other) > self.host_budget.floor(other);
            let judge = Judge::new(self.settings.policy, self.settings.doubles_at, &self.returns, now);
            let own_rank = judge.rank(standing, since, length);
            let victim = self.host_line.victim(&judge, |other| other == tenant || others_may(other));
            // Nor does it make room for itself by what it has there.
            let Some(victim) = victim.filter(|victim| victim.rank < own_rank && victim.key != key) else { return };
            if !self.stands_as_shared(&victim, Tier::Host) {
                self.drop_host_end(now, victim, need, tenant);
            }
        }
    }

    /// Takes host blocks off a conversation until `need` places are free. Journalled where copies were the last.
    fn drop_host_end(&mut self, now: Tick, victim: Victim, need: BlockCount, for_tenant: TenantId) {
        let Victim { key, rule, reason, .. } = victim;
        let conversation = self.conversations.get_mut(&key).expect("a conversation in line is known");
        let tenant = conversation.tenant;
        let floor = self.host_budget.floor(tenant);
        let (mut freed, mut lost) = (BlockCount(0), BlockCount(0));
        let may_lose = |held: BlockCount| tenant == for_tenant || held > floor;
        let is_elsewhere = |conversation: &Conversation, index| {
            conversation.device.get(index).is_some() || conversation.disk.get(index).is_some()
        };
        let front = conversation.front_to_lose(self.settings.front_first_from, self.settings.block_size);
        let front = front.filter(|from| !is_elsewhere(conversation, conversation.host.first_from(*from)));
        while self.host.free() < need && conversation.exposes_host() && may_lose(self.host.held(tenant)) {
            let from_front = front.and_then(|from| conversation.host.take_front(from));
            let is_tail = from_front.is_none() && conversation.host.tail.is_some();
            let Some(taken) = from_front.or_else(|| conversation.host.take_end()) else { break };
            freed.0 += u32::from(taken.freed);
            let is_lost = if is_tail {
                conversation.device.end_with_tail() <= taken.index
            } else {
                !is_elsewhere(conversation, taken.index)
            };
            lost.0 += u32::from(taken.freed && is_lost);
            if reason.class != Some(Class::SHARED) && conversation.host.last_of_shared().is_some() {
                break;
            }
        }
        if !conversation.exposes_host() {
            self.host_line.remove(key);
        }
        if lost.0 > 0 {
            self.counters.evictions += 1;
            let from = Tier::Host;
            self.note(Entry { id: 0, at: now, victim: key, tenant, for_tenant, rule, reason, from, freed, lost });
        }
        self.drop_if_empty(key);
    }

    /// Writes a decision down, in the journal and at the conversation that it took blocks from.
    pub(super) fn note(&mut self, entry: Entry) {
        let id = self.journal.add(entry);
        self.displacements.note(&entry, self.settings.block_bytes.of(entry.from));
        if let Some(conversation) = self.conversations.get_mut(&entry.victim) {
            if entry.rule.takes() {
                conversation.last_eviction = Some(Entry { id, ..entry });
            }
            let loses = Rule::EVICTIONS.contains(&entry.rule) && entry.from == Tier::Device && entry.freed.0 > 0;
            if loses && conversation.is_silent() {
                let first = !std::mem::replace(&mut conversation.lost_in_silence, true);
                self.early_returns.lose(entry.at, entry.victim, entry.tenant, first);
            }
        }
        self.touch(entry.victim);
    }
}

#[cfg(test)]
mod tests {
    use super::super::block::PrefixHash;
    use super::super::evictor::Policy;
    use super::super::manager::{Admission, Admit};
    use super::super::pins::{PinBudget, PinRefused};
    use super::super::return_rate::TurnShape;
    use super::*;
    use crate::kv::KvSettings;
    use crate::types::{BlockBytes, BlockSize, PoolPart, TenantKey, TierBudget, TokenCount, TokenId, Weight};

    const A: TenantId = TenantId(0);
    const B: TenantId = TenantId(1);
    const BLOCKS: u32 = 4;

    impl Manager {
        fn device_tokens(&self, conversation: u128) -> u32 {
            self.whereabouts(KvKey(conversation)).map_or(0, |at| at.device_tokens.0)
        }
    }

    /// A pool for five conversations of four blocks each; the window is one.
    struct Pool {
        manager: Manager,
        conversations: u128,
    }

    impl Pool {
        /// Floors and ceilings in blocks.
        fn granted(a: (u64, u64), b: (u64, u64)) -> Self {
            let settings = KvSettings {
                block_size: BlockSize(4),
                block_bytes: BlockBytes::all(64),
                device_blocks: BlockCount(5 * BLOCKS),
                host_blocks: BlockCount(0),
                disk_blocks: BlockCount(0),
                window: TokenCount(4 * BLOCKS),
                background_offload: false,
                policy: Policy::ReturnRate,
                doubles_at: None,
                front_first_from: None,
                journal_entries: 16,
                reuse: true,
            };
            let mut manager = Manager::new(settings);
            let grant = |tenant, (floor, ceiling): (u64, u64)| {
                let part = |blocks| Some(PoolPart::Bytes(blocks * 64));
                let budget = TierBudget { floor: part(floor), ceiling: part(ceiling), pins: None };
                Grant { tenant, weight: Weight::ORDINARY, device: budget, host: budget, disk: budget }
            };
            manager.grant(&[grant(A, a), grant(B, b)]);
            Self { manager, conversations: 0 }
        }

        /// Another conversation of a tenant has a turn, and rests.
        fn turn(&mut self, tenant: TenantId) {
            self.conversations += 1;
            let key = KvKey(self.conversations);
            let tokens: Vec<TokenId> = (0..4 * BLOCKS).map(|i| TokenId(i + 100 * self.conversations as u32)).collect();
            self.turn_of(tenant, key, &tokens);
        }

        fn turn_of(&mut self, tenant: TenantId, key: KvKey, tokens: &[TokenId]) {
            let tenant_key = TenantKey([tenant.0 as u8; 32]);
            let hashes = PrefixHash::chain(&tenant_key, tokens, BlockSize(4));
            let admit = Admit { key, tenant, tenant_key, tokens, hashes: &hashes, prefill_per_s: 0 };
            let now = Tick(u64::try_from(self.conversations).unwrap());
            assert!(matches!(self.manager.admit(now, admit), Admission::Ready(_)), "there is room");
            let found = self.manager.resident(key).context().get();
            self.manager.append(key, &tokens[found..]);
            self.manager.rest(now, key, TurnShape { number: 1, new_tokens: TokenCount(4 * BLOCKS) });
            self.manager.assert_invariants();
        }

        fn pin(&mut self, tenant: TenantId, conversation: u128, until: u64) -> Result<PinBudget, PinRefused> {
            let tenant_key = TenantKey([tenant.0 as u8; 32]);
            self.manager.pin(tenant, tenant_key, KvKey(conversation), Tick(until))
        }

        fn held(&self) -> (u32, u32) {
            (self.manager.held(A).0, self.manager.held(B).0)
        }

        fn newest_rule(&self) -> Rule {
            self.manager.journal().entries().last().unwrap().rule
        }
    }

    #[test]
    fn a_tenant_at_its_ceiling_displaces_only_its_own() {
        let mut pool = Pool::granted((0, 8), (0, 20));
        [B, B, B, A, A].into_iter().for_each(|tenant| pool.turn(tenant));
        pool.turn(A);
        assert_eq!(pool.held(), (8, 12), "the coldest are B's, and stay");
        assert_eq!(pool.newest_rule(), Rule::Lru);
    }

    #[test]
    fn what_conversations_share_goes_by_itself_once_the_last_of_them_has_lost_its_own() {
        let mut pool = Pool::granted((0, 20), (0, 20));
        for (key, own) in [(101, 500), (102, 600)] {
            let tokens: Vec<TokenId> = (0..8).map(TokenId).chain((own..own + 8).map(TokenId)).collect();
            pool.conversations += 1;
            pool.turn_of(A, KvKey(key), &tokens);
        }
        assert_eq!(pool.held().0, 6, "two blocks are shared");
        [A, A, A].into_iter().for_each(|tenant| pool.turn(tenant));
        // Two blocks are free; two more are the first one's own.
        pool.turn(A);
        assert_eq!((pool.manager.device_tokens(101), pool.manager.device_tokens(102)), (8, 16));
        // Two are the second one's own, and then what both shared.
        pool.turn(A);
        assert_eq!((pool.manager.device_tokens(101), pool.manager.device_tokens(102)), (0, 0));
        let entries = pool.manager.journal().entries();
        let classes = entries.map(|entry| (entry.victim.0, entry.freed.0, entry.reason.class == Some(Class::SHARED)));
        assert_eq!(classes.skip(1).collect::<Vec<_>>().last(), Some(&(102, 2, true)));
    }

    #[test]
    fn free_memory_is_lent_past_a_ceiling_and_taken_back_first() {
        let mut pool = Pool::granted((0, 8), (0, 20));
        [B, B, A, A, A].into_iter().for_each(|tenant| pool.turn(tenant));
        assert_eq!(pool.held(), (12, 8), "nobody else wanted it");
        pool.turn(B);
        assert_eq!((pool.held(), pool.newest_rule()), ((8, 12), Rule::OverCeiling));
        // A is at its ceiling now, no more over it: the coldest goes, which is B's own.
        pool.turn(B);
        assert_eq!((pool.held(), pool.newest_rule()), ((8, 12), Rule::Lru));
    }

    #[test]
    fn nobody_is_pushed_below_the_floor_for_another() {
        let mut pool = Pool::granted((8, 20), (0, 20));
        [A, A, A, B, B].into_iter().for_each(|tenant| pool.turn(tenant));
        pool.turn(B);
        assert_eq!(pool.held(), (8, 12), "A had 4 above its floor");
        pool.turn(B);
        assert_eq!(pool.held(), (8, 12), "A is colder, and at its floor");
    }

    #[test]
    fn a_pinned_conversation_stays_until_its_time_is_over() {
        let mut pool = Pool::granted((8, 20), (0, 20));
        [A, A, B, B, B].into_iter().for_each(|tenant| pool.turn(tenant));
        let budget = PinBudget { limit: BlockCount(8), used: BlockCount(4) };
        assert_eq!(pool.pin(A, 1, 7), Ok(budget), "a tenant may pin its floor");
        pool.turn(A);
        assert_eq!(pool.manager.device_tokens(2), 0, "the coldest that is not pinned");
        pool.turn(A);
        assert_eq!((pool.manager.device_tokens(1), pool.manager.device_tokens(3)), (16, 0));
        pool.manager.expire_pins(Tick(6));
        assert!(pool.manager.whereabouts(KvKey(1)).unwrap().pinned_until.is_some());
        pool.manager.expire_pins(Tick(7));
        // As if it had been used just now: everybody else goes first.
        (0..4).for_each(|_| pool.turn(A));
        assert_eq!(pool.manager.device_tokens(1), 16);
        pool.turn(A);
        assert_eq!(pool.manager.device_tokens(1), 0);
    }

    #[test]
    fn pins_beyond_the_budget_are_refused_and_growth_beyond_it_goes() {
        let mut pool = Pool::granted((5, 20), (0, 20));
        [A, A, B, B, B].into_iter().for_each(|tenant| pool.turn(tenant));
        assert!(pool.pin(A, 1, 100).is_ok());
        let budget = PinBudget { limit: BlockCount(5), used: BlockCount(4) };
        assert_eq!(pool.pin(A, 2, 100), Err(PinRefused::OverBudget(budget, BlockCount(4))));
        pool.manager.unpin(Tick(8), KvKey(1));
        assert!(pool.pin(A, 2, 100).is_ok());
        // A smaller budget keeps the front of what is pinned.
        let given = |floor: u64| TierBudget { floor: Some(PoolPart::Bytes(floor * 64)), ..TierBudget::default() };
        let grant =
            |tenant, budget| Grant { tenant, weight: Weight::ORDINARY, device: budget, host: budget, disk: budget };
        pool.manager.grant(&[grant(A, given(3)), grant(B, given(0))]);
        (0..6).for_each(|_| pool.turn(A));
        assert_eq!(pool.manager.device_tokens(2), 12);
        pool.manager.assert_invariants();
    }
}
