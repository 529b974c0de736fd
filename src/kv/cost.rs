//! Is it quicker to bring a sequence's blocks back, or to encode them again?
//!
//! Bytes over the speed at which each tier was seen to give them, against tokens over the speed at which the model was seen
//! to encode. What was never seen is tried. Host and disk are read side by side, and while they are read the front can be
//! encoded, since what lies behind it needs it only once it is attended to. A load that takes longer than foretold is not
//! waited for: its sequence encodes meanwhile, and takes what has come when it has come.

use super::lookup::{Match, Matched, TailMatch};
use super::manager::{Admit, Found, Manager};
use crate::types::{KvKey, Tick, TokenCount};

/// A load that takes this many times as long as foretold hangs: nobody asks the disk until it is back.
const HANGS_AT: u64 = 4;
/// The shortest time after which a load hangs, in microseconds: a disk may sleep, or be busy for a moment.
const LEAST_HANG_US: u64 = 1_000_000;
/// How much longer than foretold a load is waited for at the least before its sequence encodes, in microseconds: a step of
/// encoding can't be broken off when the load comes after all.
const GRACE_US: u64 = 20_000;
/// What encoding the front of a load meanwhile must save, in microseconds: it takes steps from others.
const SPLIT_SAVES_US: u64 = 50_000;

/// Microseconds for so many units at so many a second; 0 where the speed is not known.
fn time_us(units: u64, per_s: u64) -> u64 {
    units.saturating_mul(1_000_000).checked_div(per_s).unwrap_or(0)
}

/// Whether encoding the front of a load meanwhile saves a tenth at least, and some steps.
pub fn split_pays(split_us: u64, whole_us: u64) -> bool {
    split_us < (whole_us / 10 * 9).min(whole_us.saturating_sub(SPLIT_SAVES_US))
}

/// Which tiers were passed over although they had something.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PassedOver {
    host: bool,
    disk: bool,
}

/// What is brought of what was found: all before block `front`, and all from block `back` on. The rest is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Split {
    front: usize,
    back: usize,
}

/// How long a load is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// From then on its sequence encodes.
    pub until: Tick,
    /// From then on nobody asks the disk for another.
    pub hangs: Tick,
}

/// Blocks of host and disk before each place of what was found, so that any part can be counted at once.
struct Below(Vec<(u64, u64)>);

impl Below {
    fn new(found: &[Option<Match>]) -> Self {
        let mut so_far = (0, 0);
        let counted = found.iter().map(|found| {
            match found {
                Some(Match::Below(_)) => so_far.0 += 1,
                Some(Match::OnDisk(_)) => so_far.1 += 1,
                Some(Match::Here(_)) | None => {}
            }
            so_far
        });
        Self(std::iter::once((0, 0)).chain(counted).collect())
    }

    /// Blocks of the host, and of the disk, that a split brings.
    fn brought(&self, split: Split) -> (u64, u64) {
        let (all, front, back) = (self.0[self.0.len() - 1], self.0[split.front], self.0[split.back]);
        (front.0 + all.0 - back.0, front.1 + all.1 - back.1)
    }
}

impl Manager {
    /// Leaves out of what was found whatever is quicker encoded again, and what a disk that hangs would not give.
    pub(super) fn weigh(&self, admit: &Admit<'_>, matched: Matched) -> (Matched, PassedOver) {
        let Matched { own, front, gap, back, tail, shared } = matched;
        let (contiguous, gap_ends) = (front.len(), front.len() + gap);
        let found = front.into_iter().map(Some).chain((0..gap).map(|_| None)).chain(back.into_iter().map(Some));
        let mut found: Vec<Option<Match>> = found.collect();
        let below = Below::new(&found);
        let end = found.len();
        let here = found.iter().take_while(|found| found.as_ref().is_some_and(Match::is_here)).count();
        let first = |wanted: fn(&Match) -> bool| found.iter().position(|found| found.as_ref().is_some_and(wanted));
        let on_disk = first(|found| matches!(found, Match::OnDisk(_)));
        let on_host = first(|found| matches!(found, Match::Below(_)));
        let cost = |split: Split| {
            let (host, disk) = below.brought(split);
            let encoded = (split.back - split.front) as u64 * u64::from(self.settings.block_size.0);
            let (brings, encodes) = (self.bring_us(host, disk), time_us(encoded, admit.prefill_per_s));
            // What comes before a gap is there before the gap is encoded; what comes behind it may come meanwhile.
            if split.front > here { brings.saturating_add(encodes) } else { brings.max(encodes) }
        };
        let may_load = |split: Split| self.disk_gives(below.brought(split).1);
        let whole = Split { front: contiguous, back: gap_ends };
        let until = |front: usize| Split { front: front.min(contiguous), back: end };
        // The first of equals: what keeps more.
        let mut choices = vec![whole];
        // Before it is known what encoding takes, what can be brought is brought.
        if admit.prefill_per_s > 0 || !may_load(whole) {
            choices.extend(on_disk.map(until));
        }
        if admit.prefill_per_s > 0 {
            choices.extend(on_host.map(until));
        }
        choices.retain(|split| may_load(*split));
        // Nothing before the first block on disk is on disk, so that one is left.
        let mut split = choices.into_iter().min_by_key(|split| cost(*split)).unwrap_or(until(here));
        let first_back = if gap > 0 { gap_ends } else { here + 1 };
        let meanwhile = (first_back..end).map(|back| Split { front: here, back }).filter(|s| may_load(*s));
        if admit.prefill_per_s > 0
            && let Some(quickest) = meanwhile.min_by_key(|split| cost(*split))
            && split_pays(cost(quickest), cost(split))
        {
            split = quickest;
        }
        let brought = below.brought(split);
        let passed_over = PassedOver {
            host: on_host.is_some() && brought.0 == 0,
            disk: on_disk.is_some() && brought.1 == 0 && may_load(whole),
        };
        let back: Vec<Match> = found.split_off(split.back).into_iter().flatten().collect();
        let front: Vec<Match> = found.drain(..split.front).flatten().collect();
        let keeps_tail = split.back < end || split.front == end;
        let tail = if keeps_tail { tail } else { TailMatch::None };
        let gap = if back.is_empty() { 0 } else { split.back - split.front };
        (Matched { own, front, gap, back, tail, shared }, passed_over)
    }

    /// After what was passed over was not tried: or nobody would ever see how fast it is by now.
    pub(super) fn hope_for(&mut self, passed_over: PassedOver) {
        if passed_over.host {
            self.rates.reload_bytes_per_s.hope();
        }
        if passed_over.disk {
            self.rates.load_bytes_per_s.hope();
        }
    }

    /// Whether the disk can be asked for so many blocks: no load hangs, and even if all of them did, they would leave room
    /// for others.
    fn disk_gives(&self, blocks: u64) -> bool {
        let (total, window) = (self.device.total().0, self.settings.window.blocks(self.settings.block_size).0);
        let most = (total - window).max(total / 2);
        blocks == 0 || self.hanging_loads.is_empty() && self.loading_places + blocks <= u64::from(most)
    }

    /// Lets a sequence that waits for a load encode meanwhile. False if it waits for none.
    pub fn encode_meanwhile(&mut self, key: KvKey) -> bool {
        let conversation = self.conversations.get_mut(&key).expect("the caller knows the conversation");
        let sealed: Vec<_> = conversation.device.sealed.iter().map(|block| block.id()).collect();
        let Some(running) = conversation.running_mut() else { return false };
        let Some(arriving) = &mut running.arriving else { return false };
        arriving.waited_for = false;
        running.list(sealed.into_iter());
        true
    }

    /// Whether some of a running sequence is on its way.
    pub fn is_arriving(&self, key: KvKey) -> bool {
        self.running(key).arriving.is_some()
    }

    /// Whether what a running sequence waits for hangs.
    pub fn hangs(&self, key: KvKey) -> bool {
        self.running(key).arriving.is_some_and(|arriving| self.hanging_loads.contains(&arriving.ticket))
    }

    /// Says that a load hangs. Until it is back nobody asks the disk for another. False if the sequence waits for none.
    pub fn load_hangs(&mut self, key: KvKey) -> bool {
        let arriving = self.conversation(key).running().and_then(|running| running.arriving);
        arriving.is_some_and(|arriving| self.hanging_loads.insert(arriving.ticket))
    }

    /// How long bringing so many host and disk blocks takes, behind those that are being loaded.
    fn bring_us(&self, host: u64, disk: u64) -> u64 {
        let (rates, bytes) = (&self.rates, self.settings.block_bytes.cold);
        // They share the disk, and its threads.
        let queue = if disk > 0 { self.loading_places } else { 0 };
        let from_disk = time_us((disk + queue) * bytes, rates.load_bytes_per_s.per_s());
        time_us(host * bytes, rates.reload_bytes_per_s.per_s()).max(from_disk)
    }

    /// How long a reload of what was found is waited for: a quarter longer than foretold, and no more than a tenth of what
    /// encoding takes. `None`: until it is there, since it comes from memory. A disk whose speed was never seen has the
    /// time that encoding would take.
    pub fn patience(&self, now: Tick, found: Found, prefill_per_s: u64) -> Option<Patience> {
        let blocks = |tokens: TokenCount| u64::from(tokens.blocks(self.settings.block_size).0);
        let host = TokenCount(found.reloaded.0 - found.from_disk.0);
        // Its own are among those that are being loaded by now.
        let foretold = self.bring_us(blocks(host), u64::from(found.from_disk.0 > 0));
        let encodes = time_us(u64::from(found.from_disk.0), prefill_per_s);
        let unknown = if encodes > 0 { encodes } else { LEAST_HANG_US };
        let foretold = if self.rates.load_bytes_per_s.per_s() > 0 { foretold } else { unknown };
        (found.from_disk.0 > 0).then(|| Patience {
            until: Tick(now.0.saturating_add(foretold + (foretold / 4).min(encodes / 10).max(GRACE_US))),
            hangs: Tick(now.0.saturating_add(foretold.saturating_mul(HANGS_AT).max(LEAST_HANG_US))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::KvSettings;
    use super::super::block::PrefixHash;
    use super::super::evictor::Policy;
    use super::super::manager::Admission;
    use super::super::rate::Rate;
    use super::super::return_rate::TurnShape;
    use super::super::transfer::TransferDone;
    use super::*;
    use crate::types::{BlockBytes, BlockCount, BlockSize, TenantId, TenantKey, Tier, TokenId};

    const SIZE: BlockSize = BlockSize(4);
    const KEY: KvKey = KvKey(1);
    const T: TenantId = TenantId(0);
    const SECRET: TenantKey = TenantKey([7; 32]);
    /// Of each conversation here.
    const BLOCKS: u32 = 10;

    /// A host tier, and one conversation in it alone.
    fn offloaded() -> Manager {
        let mut manager = Manager::new(KvSettings {
            block_size: SIZE,
            block_bytes: BlockBytes::all(1000),
            device_blocks: BlockCount(2 * BLOCKS),
            host_blocks: BlockCount(40),
            disk_blocks: BlockCount(0),
            window: TokenCount(SIZE.0 * (BLOCKS + 2)),
            background_offload: true,
            policy: Policy::ReturnRate,
            doubles_at: None,
            front_first_from: Some(TokenCount(0)),
            journal_entries: 16,
            reuse: true,
        });
        assert!(matches!(admit(&mut manager, 1, KEY, 0), Admission::Ready(_)));
        encode(&mut manager, 1, KEY);
        manager.leave(at(1), KEY, Tier::Host);
        copy_all(&mut manager, 1);
        assert_eq!(manager.whereabouts(KEY).unwrap().device_tokens, TokenCount(0));
        manager
    }

    fn at(minute: u64) -> Tick {
        Tick(minute * 60_000_000)
    }

    fn tokens(key: KvKey) -> Vec<TokenId> {
        (0..BLOCKS * SIZE.0 + 1).map(|i| TokenId(i + 1000 * key.0 as u32)).collect()
    }

    fn admit(manager: &mut Manager, minute: u64, key: KvKey, prefill_per_s: u64) -> Admission {
        let tokens = tokens(key);
        let hashes = PrefixHash::chain(&SECRET, &tokens, SIZE);
        let admit = Admit { key, tenant: T, tenant_key: SECRET, tokens: &tokens, hashes: &hashes, prefill_per_s };
        manager.admit(at(minute), admit)
    }

    /// Encodes what is left of the sequence, and lets it rest.
    fn encode(manager: &mut Manager, minute: u64, key: KvKey) {
        let tokens = tokens(key);
        let mut context = manager.resident(key).context().get();
        while context < tokens.len() {
            let end = manager.resident(key).gap_ends().map_or(tokens.len(), TokenCount::get);
            assert!(end > context, "a sequence waits for nothing");
            manager.grow(at(minute), key, TokenCount(end as u32)).unwrap();
            manager.append(key, &tokens[context..end]);
            context = manager.resident(key).context().get();
        }
        manager.rest(at(minute), key, TurnShape { number: 1, new_tokens: TokenCount(9) });
        manager.assert_invariants();
    }

    /// Makes all copies, in no time.
    fn copy_all(manager: &mut Manager, minute: u64) {
        let now = at(minute);
        loop {
            manager.work_ahead(now);
            let orders = manager.take_orders();
            drop(manager.take_chores());
            if orders.is_empty() {
                return;
            }
            for order in orders {
                let sums = vec![Some(0); order.pairs.len()];
                manager.transferred(now, TransferDone { ticket: order.ticket, sums, took_us: 1 });
            }
        }
    }

    fn rate(per_s: u64) -> Rate {
        let mut rate = Rate::default();
        rate.add(per_s, 1_000_000);
        rate
    }

    #[test]
    fn the_front_is_encoded_while_the_back_comes_so_that_both_end_together() {
        let mut manager = offloaded();
        // 10 blocks a second come up, and 40 tokens are encoded in one.
        manager.rates.reload_bytes_per_s = rate(10_000);
        let Admission::Ready(found) = admit(&mut manager, 9, KEY, 40) else {
            panic!("it does not wait for what comes")
        };
        assert_eq!((found.resident.0, found.reloaded.0), (0, 5 * SIZE.0));
        assert_eq!(manager.resident(KEY).gap_ends(), Some(TokenCount(5 * SIZE.0)));
        let front = &tokens(KEY)[..5 * SIZE.0 as usize];
        manager.append(KEY, front);
        let waits = manager.resident(KEY);
        assert_eq!(waits.gap_ends(), Some(waits.context()), "the front is there, the back isn't");
        copy_all(&mut manager, 9);
        let joined = manager.resident(KEY);
        assert_eq!((joined.context().0, joined.gap_ends()), (BLOCKS * SIZE.0, None));
        encode(&mut manager, 9, KEY);
    }

    #[test]
    fn what_comes_at_once_or_far_too_late_is_not_split() {
        let mut manager = offloaded();
        manager.rates.reload_bytes_per_s = rate(10_000_000);
        let Admission::Reloading(found) = admit(&mut manager, 9, KEY, 40) else { panic!("all of it is reloaded") };
        assert_eq!(found.reloaded.0, BLOCKS * SIZE.0);
        let mut manager = offloaded();
        manager.rates.reload_bytes_per_s = rate(10);
        let Admission::Ready(found) = admit(&mut manager, 9, KEY, 4000) else { panic!("all of it is encoded") };
        assert_eq!(found.reloaded.0, 0);
    }

    #[test]
    fn what_has_come_by_the_time_that_it_is_encoded_is_taken_and_the_rest_given_back() {
        let mut manager = offloaded();
        let Admission::Reloading(_) = admit(&mut manager, 9, KEY, 40) else { panic!("all of it is reloaded") };
        assert!(manager.encode_meanwhile(KEY));
        // The middle of the fourth block.
        let front = &tokens(KEY)[..14];
        manager.grow(at(9), KEY, TokenCount(14)).unwrap();
        manager.append(KEY, front);
        copy_all(&mut manager, 9);
        assert_eq!(manager.resident(KEY).context().0, BLOCKS * SIZE.0);
        encode(&mut manager, 9, KEY);
        assert_eq!(manager.device.held(T), BlockCount(BLOCKS + 1), "places that were taken twice are free again");
    }

    #[test]
    fn a_long_conversation_loses_its_front_and_keeps_what_follows() {
        let mut manager = offloaded();
        let blocks = |manager: &Manager, key| manager.whereabouts(key).map_or(0, |at| at.host_blocks.0.0);
        // What the host has no room for goes from the one that was silent the longest.
        for minute in 2..=4 {
            let key = KvKey(u128::from(minute));
            assert!(matches!(admit(&mut manager, minute, key, 0), Admission::Ready(_)));
            encode(&mut manager, minute, key);
            copy_all(&mut manager, minute);
            manager.leave(at(minute), key, Tier::Host);
            copy_all(&mut manager, minute);
        }
        let left = blocks(&manager, KEY);
        assert!(left > 0 && left < BLOCKS, "{left} blocks of the oldest are left");
        let Admission::Ready(found) = admit(&mut manager, 9, KEY, 40) else { panic!("its front is encoded at once") };
        assert_eq!(
            found.reloaded.0,
            (left - 1) * SIZE.0,
            "all that is left of it, but for the tail, whose one token is the last"
        );
        let gap = (BLOCKS + 1 - left) * SIZE.0;
        assert_eq!((manager.resident(KEY).context().0, manager.resident(KEY).gap_ends()), (0, Some(TokenCount(gap))));
        copy_all(&mut manager, 9);
        encode(&mut manager, 9, KEY);
    }
}
