//! Is it quicker to bring a sequence's blocks back, or to encode them again?
//!
//! Bytes over the speed at which each tier was seen to give them, against tokens over the speed at which the model was seen
//! to encode. What was never seen is tried. Host and disk are read side by side; what is encoded again is encoded from some
//! block on, since each block needs those before it.

use super::lookup::{Match, Matched, TailMatch};
use super::manager::{Admit, Found, Manager};
use crate::types::TokenCount;

/// A load that takes this many times as long as foretold is not waited for any longer.
const STALLS_AT: u64 = 4;
/// The shortest wait for a load, in microseconds: a disk may sleep, or be busy for a moment.
const LEAST_WAIT_US: u64 = 1_000_000;

/// Microseconds for so many units at so many a second; 0 where the speed is not known.
fn time_us(units: u64, per_s: u64) -> u64 {
    units.saturating_mul(1_000_000).checked_div(per_s).unwrap_or(0)
}

impl Manager {
    /// Leaves out of what was found whatever is quicker encoded again.
    pub(super) fn weigh(&mut self, admit: &Admit<'_>, matched: &mut Matched) {
        let first = |wanted: fn(&Match) -> bool| matched.arrivals.iter().position(wanted);
        let on_disk = first(|found| matches!(found, Match::OnDisk(_)));
        let Some(below) = first(|found| !matches!(found, Match::Here(_))) else { return };
        let (all, size) = (matched.arrivals.len(), u64::from(self.settings.block_size.0));
        let tokens = |blocks: usize| blocks as u64 * size;
        let cost = |keep: usize| {
            let (host, disk) = count(&matched.arrivals[..keep]);
            self.bring_us(host, disk).saturating_add(time_us(tokens(all - keep), admit.prefill_per_s))
        };
        // Ties go to what keeps more.
        let mut choices = vec![(all, if admit.avoids_disk && on_disk.is_some() { u64::MAX } else { cost(all) })];
        choices.extend(on_disk.map(|keep| (keep, cost(keep))));
        if admit.prefill_per_s > 0 {
            choices.push((below, cost(below)));
        }
        let Some(&(keep, _)) = choices.iter().min_by_key(|(_, us)| *us) else { return };
        if keep < all {
            matched.arrivals.truncate(keep);
            matched.tail = TailMatch::None;
            if on_disk.is_some_and(|disk| keep <= disk) {
                // Or it would never be seen again how fast it is by now.
                self.rates.load_bytes_per_s.hope();
            }
        }
    }

    /// How long bringing so many host and disk blocks takes.
    fn bring_us(&self, host: u64, disk: u64) -> u64 {
        let (rates, bytes) = (&self.rates, self.settings.block_bytes);
        // Those before it share the disk, and its threads.
        let queue = disk * self.loads_under_way as u64;
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
