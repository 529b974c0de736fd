//! Is it quicker to bring a sequence's blocks back, or to encode them again?
//!
//! Bytes over the speed at which each tier was seen to give them, against tokens over the speed at which the model was seen
//! to encode. What was never seen is tried. Host and disk are read side by side; what is encoded again is encoded from some
//! block on, since each block needs those before it.

use super::lookup::{Match, Matched, TailMatch};
use super::manager::{Admit, Found, Manager};
use crate::types::{KvKey, TokenCount};

/// A load that takes this many times as long as foretold is not waited for any longer.
const STALLS_AT: u64 = 4;
/// The shortest wait for a load, in microseconds: a disk may sleep, or be busy for a moment.
const LEAST_WAIT_US: u64 = 1_000_000;

/// Microseconds for so many units at so many a second; 0 where the speed is not known.
fn time_us(units: u64, per_s: u64) -> u64 {
    units.saturating_mul(1_000_000).checked_div(per_s).unwrap_or(0)
}

/// Which tiers were passed over although they had something.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PassedOver {
    host: bool,
    disk: bool,
}

impl Manager {
    /// Leaves out of what was found whatever is quicker encoded again, and what a disk that hangs would not give.
    pub(super) fn weigh(&self, admit: &Admit<'_>, matched: &mut Matched) -> PassedOver {
        let first = |wanted: fn(&Match) -> bool| matched.arrivals.iter().position(wanted);
        let on_disk = first(|found| matches!(found, Match::OnDisk(_)));
        let on_host = first(|found| matches!(found, Match::Below(_)));
        let all = matched.arrivals.len();
        let cost = |keep: usize| {
            let (host, disk) = count(&matched.arrivals[..keep]);
            let encoded = (all - keep) as u64 * u64::from(self.settings.block_size.0);
            self.bring_us(host, disk).saturating_add(time_us(encoded, admit.prefill_per_s))
        };
        let may_load = !admit.avoids_disk && self.disk_gives(count(&matched.arrivals).1);
        let whole = on_disk.is_none() || may_load;
        // The first of equals: what keeps more.
        let mut choices = Vec::from_iter(whole.then(|| (all, cost(all))));
        choices.extend(on_disk.map(|keep| (keep, cost(keep))));
        if admit.prefill_per_s > 0 {
            choices.extend(on_host.map(|keep| (keep, cost(keep))));
        }
        let keep = choices.iter().min_by_key(|(_, us)| *us).map_or(all, |(keep, _)| *keep);
        if keep < all {
            matched.arrivals.truncate(keep);
            matched.tail = TailMatch::None;
        }
        let left_out = |first: Option<usize>| first.is_some_and(|first| keep <= first);
        PassedOver { host: left_out(on_host), disk: left_out(on_disk) && may_load }
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
        self.hanging_loads.is_empty() && self.loading_places + blocks <= u64::from(most)
    }

    /// Says that a turn does not wait for its load any longer. Until that is back nobody asks the disk for another.
    pub fn load_hangs(&mut self, key: KvKey) {
        if let Some(ticket) = self.conversation(key).running().and_then(|running| running.arriving) {
            self.hanging_loads.insert(ticket);
        }
    }

    /// How long bringing so many host and disk blocks takes.
    fn bring_us(&self, host: u64, disk: u64) -> u64 {
        let (rates, bytes) = (&self.rates, self.settings.block_bytes.cold);
        // Those before it share the disk, and its threads.
        let queue = if disk > 0 { self.loading_places } else { 0 };
        let from_disk = time_us((disk + queue) * bytes, rates.load_bytes_per_s.per_s());
        time_us(host * bytes, rates.reload_bytes_per_s.per_s()).max(from_disk)
    }

    /// How long a reload of what was found is waited for, in microseconds; `None`: until it is there, since it comes from
    /// memory.
    pub fn patience_us(&self, found: Found) -> Option<u64> {
        let blocks = |tokens: TokenCount| u64::from(tokens.blocks(self.settings.block_size).0);
        let host = TokenCount(found.reloaded.0 - found.from_disk.0);
        let foretold = self.bring_us(blocks(host), blocks(found.from_disk));
        (found.from_disk.0 > 0).then(|| foretold.saturating_mul(STALLS_AT).max(LEAST_WAIT_US))
    }
}

/// Blocks of the host, and of the disk.
fn count(arrivals: &[Match]) -> (u64, u64) {
    arrivals.iter().fold((0, 0), |(host, disk), found| match found {
        Match::Here(_) => (host, disk),
        Match::Below(_) => (host + 1, disk),
        Match::OnDisk(_) => (host, disk + 1),
    })
}
