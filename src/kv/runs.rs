//! Which tier has each part of a conversation, from its first block on?

use crate::types::Tier;

/// Runs that are told; what lies behind them is counted to the last one.
const MOST: usize = 6;

/// Runs of blocks, each in one tier, the fastest that has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    /// `None`: no tier. And the index after its last block.
    ends: [(Option<Tier>, u32); MOST],
    len: u8,
}

impl Runs {
    /// Adds so many blocks behind those that there are.
    pub(super) fn add(&mut self, tier: Option<Tier>, blocks: usize) {
        let blocks = u32::try_from(blocks).expect("a window bounds a table");
        let len = usize::from(self.len);
        let end = self.blocks() + blocks;
        let is_new = len == 0 || (self.ends[len - 1].0 != tier && len < MOST);
        if blocks == 0 {
            return;
        }
        if is_new {
            self.ends[len] = (tier, end);
            self.len += 1;
        } else {
            self.ends[len - 1].1 = end;
        }
    }

    /// All blocks, those that no tier has included.
    pub fn blocks(&self) -> u32 {
        usize::from(self.len).checked_sub(1).map_or(0, |last| self.ends[last].1)
    }

    /// (tier, first block, index after the last one), in order.
    pub fn iter(&self) -> impl Iterator<Item = (Option<Tier>, u32, u32)> {
        let ends = &self.ends[..usize::from(self.len)];
        let starts = std::iter::once(0).chain(ends.iter().map(|(_, end)| *end));
        ends.iter().zip(starts).map(|((tier, end), start)| (*tier, start, *end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined_and_past_the_sixth_counted_to_it() {
        let mut runs = Runs::default();
        for (tier, blocks) in
            [(Some(Tier::Device), 3), (Some(Tier::Device), 1), (None, 0), (None, 2), (Some(Tier::Disk), 5)]
        {
            runs.add(tier, blocks);
        }
        let told: Vec<_> = runs.iter().collect();
        assert_eq!(told, [(Some(Tier::Device), 0, 4), (None, 4, 6), (Some(Tier::Disk), 6, 11)]);
        for tier in [Tier::Host, Tier::Disk, Tier::Host, Tier::Disk] {
            runs.add(Some(tier), 1);
        }
        assert_eq!(runs.iter().last(), Some((Some(Tier::Host), 13, 15)));
        assert_eq!((runs.iter().count(), runs.blocks()), (6, 15));
    }
}
