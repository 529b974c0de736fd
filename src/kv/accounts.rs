//! Who holds the places of a tier, and for how long?
//!
//! A tenant holds what its slots hold. A place is the conversation's that it was taken for until the block in it is full; a
//! full block is split evenly among the conversations whose tables name it. What only a copy under way holds, and what
//! waits to be overwritten, is nobody's.
//! Invariants: what conversations hold and what is nobody's is what their tenant holds; what tenants hold and what waits is
//! the pool less its free places. So are their sums over time: what an even split leaves over, at each change less than a
//! unit a holder, is nobody's too. Cost: O(1) a change. A block keeps what one holder's part has come to, and who joins or
//! leaves adds or takes only that, however many others there are.

use std::collections::HashMap;

use crate::types::{BlockCount, TenantId, Tick};

/// Units of a block's microsecond: parts of blocks are whole numbers of them.
pub const UNITS: u64 = 1 << 16;

/// A number of blocks, and what it has come to over time.
#[derive(Clone, Copy, Debug, Default)]
struct Level {
    blocks: u32,
    since: Tick,
    block_us: u128,
}

impl Level {
    fn rise(&mut self, now: Tick, by: u32) {
        self.settle(now);
        self.blocks += by;
    }

    fn fall(&mut self, now: Tick, by: u32) {
        self.settle(now);
        self.blocks -= by;
    }

    fn settle(&mut self, now: Tick) {
        self.block_us = self.until(now);
        self.since = self.since.max(now);
    }

    fn until(&self, now: Tick) -> u128 {
        self.block_us + u128::from(self.blocks) * u128::from(now.0.saturating_sub(self.since.0))
    }

    fn held(&self, now: Tick) -> Held {
        Held { blocks: BlockCount(self.blocks), block_us: self.until(now) }
    }
}

/// Blocks, and their microseconds since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    pub blocks: BlockCount,
    pub block_us: u128,
}

/// A conversation's part of a tier, in `UNITS` of a block and of a block's microsecond.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    pub units: u64,
    pub unit_us: u128,
}

impl Holding {
    /// Its bytes, where a block has so many.
    pub fn bytes(&self, block_bytes: u64) -> u64 {
        // Less than the tier's bytes.
        (u128::from(self.units) * u128::from(block_bytes) / u128::from(UNITS)) as u64
    }

    /// Its bytes over time, in whole bytes times microseconds.
    pub fn byte_us(&self, block_bytes: u64) -> u128 {
        self.unit_us * u128::from(block_bytes) / u128::from(UNITS)
    }
}

/// Names a conversation's account with one tier.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct HolderId(u32);

/// One conversation's account.
#[derive(Debug)]
struct Holder {
    tenant: TenantId,
    /// Places of blocks that are not full, or not there yet.
    own: Level,
    /// Of full blocks, in units: what had come to each when it left, less what had when it joined.
    split: i128,
    /// Its conversation is known no more.
    closed: bool,
}

/// How a full block is split among those who hold it. It lies in the block, where they are at work already.
#[derive(Clone, Copy, Debug, Default)]
pub struct Split {
    holders: u32,
    since: Tick,
    /// What one holder's part has come to since the first of them joined, in units: enough for nine years.
    each: u64,
}

impl Split {
    /// Conversations that hold the block.
    pub fn holders(&self) -> u32 {
        self.holders
    }

    /// What one holder's part has come to, and what is left over of all of them.
    fn until(&self, now: Tick) -> (u64, u64) {
        let units = now.0.saturating_sub(self.since.0) * UNITS;
        let holders = u64::from(self.holders);
        match units.checked_div(holders) {
            Some(part) => (self.each + part, units - part * holders),
            None => (0, 0),
        }
    }
}

/// A tenant's account.
#[derive(Clone, Copy, Debug, Default)]
struct TenantLine {
    held: Level,
    nobodys: Level,
    /// What even splits left over, in units.
    left_over: u128,
    /// What conversations held that are gone, in units.
    gone: i128,
}

/// What a tenant's places of a tier have come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TenantHeld {
    pub held: Held,
    /// The part of it that is no conversation's.
    pub nobodys: Held,
}

/// The accounts of one tier.
#[derive(Debug, Default)]
pub struct Accounts {
    tenants: Vec<TenantLine>,
    holders: Vec<Holder>,
    vacant: Vec<HolderId>,
    /// Places that are not free, and no tenant's.
    waiting: Level,
}

impl Accounts {
    /// Opens a conversation's account.
    pub fn open(&mut self, tenant: TenantId) -> HolderId {
        let holder = Holder { tenant, own: Level::default(), split: 0, closed: false };
        self.tenant(tenant);
        if let Some(id) = self.vacant.pop() {
            self.holders[id.0 as usize] = holder;
            return id;
        }
        self.holders.push(holder);
        HolderId(u32::try_from(self.holders.len() - 1).expect("memory bounds the conversations"))
    }

    /// Closes the account of a conversation that is in no split any more.
    pub fn close(&mut self, now: Tick, id: HolderId) {
        self.holders[id.0 as usize].closed = true;
        self.vacate(now, id);
    }

    /// Sums up an account that is closed and holds nothing.
    fn vacate(&mut self, now: Tick, id: HolderId) {
        let holder = &self.holders[id.0 as usize];
        if holder.closed && holder.own.blocks == 0 {
            let sum = holder.split + units(holder.own.until(now));
            let tenant = holder.tenant;
            self.tenant(tenant).gone += sum;
            self.vacant.push(id);
        }
    }

    /// A tenant takes a place, for a conversation or for nobody.
    pub fn take(&mut self, now: Tick, tenant: TenantId, owner: Option<HolderId>) {
        let line = self.tenant(tenant);
        line.held.rise(now, 1);
        match owner {
            Some(id) => self.holders[id.0 as usize].own.rise(now, 1),
            None => line.nobodys.rise(now, 1),
        }
    }

    /// A tenant gives back a place that was a conversation's, or nobody's.
    pub fn give_back(&mut self, now: Tick, tenant: TenantId, owner: Option<HolderId>) {
        let line = self.tenant(tenant);
        line.held.fall(now, 1);
        match owner {
            Some(id) => {
                self.holders[id.0 as usize].own.fall(now, 1);
                self.vacate(now, id);
            }
            None => line.nobodys.fall(now, 1),
        }
    }

    /// A conversation's place is nobody's from now on: its block is full, or waits to be overwritten.
    pub fn disown(&mut self, now: Tick, tenant: TenantId, owner: HolderId) {
        self.holders[owner.0 as usize].own.fall(now, 1);
        self.tenant(tenant).nobodys.rise(now, 1);
        self.vacate(now, owner);
    }

    /// A conversation's table names the full block that is split so from now on.
    pub fn join(&mut self, now: Tick, split: &mut Split, id: HolderId) {
        let each = self.settle(now, split, id);
        let holder = &mut self.holders[id.0 as usize];
        holder.split -= i128::from(each);
        let tenant = holder.tenant;
        split.holders += 1;
        if split.holders == 1 {
            self.tenant(tenant).nobodys.fall(now, 1);
        }
    }

    /// It does so no more.
    pub fn leave(&mut self, now: Tick, split: &mut Split, id: HolderId) {
        let each = self.settle(now, split, id);
        let holder = &mut self.holders[id.0 as usize];
        holder.split += i128::from(each);
        let tenant = holder.tenant;
        split.holders -= 1;
        if split.holders == 0 {
            self.tenant(tenant).nobodys.rise(now, 1);
        }
    }

    /// Brings a split up to now, before its holders change. Says what has come to each.
    fn settle(&mut self, now: Tick, split: &mut Split, id: HolderId) -> u64 {
        let (each, left_over) = split.until(now);
        (split.each, split.since) = (each, split.since.max(now));
        let tenant = self.holders[id.0 as usize].tenant;
        self.tenant(tenant).left_over += u128::from(left_over);
        each
    }

    /// So many places are neither free nor a tenant's, beside those that there are.
    pub fn wait(&mut self, now: Tick, places: usize) {
        self.waiting.rise(now, u32::try_from(places).expect("a pool has at most u32::MAX places"));
    }

    /// So many of these are free, or a tenant's.
    pub fn end_wait(&mut self, now: Tick, places: usize) {
        self.waiting.fall(now, u32::try_from(places).expect("a pool has at most u32::MAX places"));
    }

    /// What a conversation holds: its parts of the full blocks that its table names, and what is its own.
    pub fn holding(&self, now: Tick, id: HolderId, splits: impl Iterator<Item = Split>) -> Holding {
        let holder = &self.holders[id.0 as usize];
        let mut units_held = u64::from(holder.own.blocks) * UNITS;
        let mut sum = holder.split + units(holder.own.until(now));
        for split in splits {
            units_held += UNITS / u64::from(split.holders);
            sum += i128::from(split.until(now).0);
        }
        // What came to a block when it was left is no less than when it was joined.
        Holding { units: units_held, unit_us: u128::try_from(sum).unwrap_or(0) }
    }

    /// What a tenant holds.
    pub fn of_tenant(&self, now: Tick, tenant: TenantId) -> TenantHeld {
        let Some(line) = self.tenants.get(tenant.0 as usize) else { return TenantHeld::default() };
        TenantHeld { held: line.held.held(now), nobodys: line.nobodys.held(now) }
    }

    /// Places that are neither free nor a tenant's.
    pub fn waiting(&self, now: Tick) -> Held {
        self.waiting.held(now)
    }

    /// Tenants that have an account: ids from 0 on.
    pub fn tenants(&self) -> usize {
        self.tenants.len()
    }

    fn tenant(&mut self, tenant: TenantId) -> &mut TenantLine {
        let index = tenant.0 as usize;
        if self.tenants.len() <= index {
            self.tenants.resize(index + 1, TenantLine::default());
        }
        &mut self.tenants[index]
    }

    /// Checks that all times add up, where conversations that are known hold these sums together, and full blocks are held
    /// so many times; for tests. Cost: O(everything).
    pub fn assert_sums(&self, now: Tick, of_conversations: &HashMap<TenantId, u128>, holders: u32) {
        for (id, line) in (0..).map(TenantId).zip(&self.tenants) {
            let left =
                self.holders.iter().filter(|holder| holder.tenant == id && holder.closed && holder.own.blocks > 0);
            let left: i128 = left.map(|holder| holder.split + units(holder.own.until(now))).sum();
            let known = of_conversations.get(&id).copied().unwrap_or(0) + line.left_over;
            let known = i128::try_from(known).expect("a test is short");
            let missing = units(line.held.until(now)) - units(line.nobodys.until(now)) - known - line.gone - left;
            // What splits have left over since they changed is not counted yet.
            assert!((0..=i128::from(holders)).contains(&missing), "{missing} units of {id}'s are missing");
        }
    }

    /// Checks that conversations have so many places of their own; for tests.
    pub fn assert_own(&self, own: &HashMap<HolderId, u32>) {
        for (id, holder) in (0..).map(HolderId).zip(&self.holders) {
            let places = own.get(&id).copied().unwrap_or(0);
            assert_eq!(holder.own.blocks, places, "places that were taken for a conversation: {holder:?}");
        }
    }
}

/// Microseconds of whole blocks, in units.
fn units(block_us: u128) -> i128 {
    i128::try_from(block_us * u128::from(UNITS)).unwrap_or(i128::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: TenantId = TenantId(0);
    const S: u64 = 1_000_000;

    /// A full block, taken at the start by the first of three conversations.
    fn shared() -> (Accounts, Split, [HolderId; 3]) {
        let (mut accounts, mut split) = (Accounts::default(), Split::default());
        let holders = [accounts.open(T), accounts.open(T), accounts.open(T)];
        accounts.take(Tick(0), T, Some(holders[0]));
        accounts.disown(Tick(4 * S), T, holders[0]);
        accounts.join(Tick(4 * S), &mut split, holders[0]);
        (accounts, split, holders)
    }

    /// Units of a block's second.
    fn seconds(blocks: u64) -> u128 {
        u128::from(blocks * S * UNITS)
    }

    #[test]
    fn three_share_a_block_and_one_after_the_other_leaves() {
        let (mut accounts, mut split, [a, b, c]) = shared();
        accounts.join(Tick(6 * S), &mut split, b);
        accounts.join(Tick(10 * S), &mut split, c);
        assert_eq!(split.holders(), 3);
        accounts.leave(Tick(16 * S), &mut split, a);
        accounts.leave(Tick(20 * S), &mut split, c);
        let now = Tick(25 * S);
        // a: 4 s as it was filled, 2 s alone, 4 s with b, 6 s with both.
        assert_eq!(accounts.holding(now, a, [].into_iter()), Holding { units: 0, unit_us: seconds(6 + 2 + 2) });
        // b: 4 s with a, 6 s with both, 4 s with c, 5 s alone.
        assert_eq!(
            accounts.holding(now, b, [split].into_iter()),
            Holding { units: UNITS, unit_us: seconds(2 + 2 + 2 + 5) }
        );
        assert_eq!(accounts.holding(now, c, [].into_iter()).unit_us, seconds(2 + 2));
        let line = accounts.of_tenant(now, T);
        assert_eq!(line.held, Held { blocks: BlockCount(1), block_us: u128::from(25 * S) });
        assert_eq!(line.nobodys, Held::default());
        accounts.assert_sums(now, &HashMap::from([(T, seconds(25))]), 1);
    }

    #[test]
    fn what_a_third_of_a_microsecond_leaves_over_is_nobodys() {
        let (mut accounts, mut split, [a, b, c]) = shared();
        accounts.join(Tick(4 * S), &mut split, b);
        accounts.join(Tick(4 * S), &mut split, c);
        let thirds =
            |accounts: &Accounts, now| [a, b, c].map(|id| accounts.holding(now, id, [split].into_iter()).unit_us);
        let now = Tick(4 * S + 1);
        let part = u128::from(UNITS / 3);
        assert_eq!(thirds(&accounts, now), [seconds(4) + part, part, part]);
        for id in [a, b, c] {
            accounts.leave(now, &mut split, id);
        }
        let sum: u128 = [a, b, c].map(|id| accounts.holding(now, id, [].into_iter()).unit_us).iter().sum();
        assert_eq!(sum, seconds(4) + u128::from(UNITS) - 1, "one of 65536 units is left over");
        accounts.assert_sums(now, &HashMap::from([(T, sum)]), 0);
    }

    #[test]
    fn a_block_that_no_table_names_is_nobodys_until_one_does_again() {
        let (mut accounts, mut split, [a, b, _]) = shared();
        accounts.leave(Tick(5 * S), &mut split, a);
        assert_eq!(accounts.of_tenant(Tick(8 * S), T).nobodys, Held { blocks: BlockCount(1), block_us: 3_000_000 });
        accounts.join(Tick(8 * S), &mut split, b);
        assert_eq!(accounts.holding(Tick(9 * S), b, [split].into_iter()).unit_us, seconds(1), "it begins anew");
        accounts.assert_sums(Tick(9 * S), &HashMap::from([(T, seconds(5 + 1))]), 1);
    }

    #[test]
    fn an_account_that_is_closed_is_summed_up_and_used_again() {
        let (mut accounts, mut split, [a, b, _]) = shared();
        accounts.take(Tick(4 * S), T, Some(a));
        accounts.leave(Tick(5 * S), &mut split, a);
        accounts.close(Tick(5 * S), a);
        // A copy under way still has a place of its.
        assert_ne!(accounts.open(T), a);
        accounts.give_back(Tick(7 * S), T, Some(a));
        accounts.give_back(Tick(7 * S), T, None);
        assert_eq!(accounts.open(T), a);
        assert_eq!(accounts.holding(Tick(8 * S), a, [].into_iter()), Holding::default());
        accounts.close(Tick(8 * S), b);
        accounts.assert_sums(Tick(8 * S), &HashMap::new(), 0);
    }
}
