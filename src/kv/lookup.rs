//! What of a sequence do the tiers hold?
//!
//! Found by chain hash, never by trust: a conversation's own blocks first, then any block of the tenant with the same
//! prefix, then what can be reloaded; the part-full tail by its tokens. Behind a gap only what is the conversation's own
//! is looked for: what others share begins at the front.

use std::sync::Arc;

use super::Manager;
use super::block::{PrefixHash, SealedBlock, TailBlock};
use super::manager::Admit;
use crate::types::{BlockId, BlockSize, DiskBlockId, HostBlockId, TokenCount, TokenId};

#[derive(Debug)]
pub(super) struct Matched {
    /// Own full blocks on the device, from the first on.
    pub own: usize,
    /// Full blocks that follow them.
    pub front: Vec<Match>,
    /// Full blocks after those, which are to be encoded.
    pub gap: usize,
    /// Full blocks that follow the gap; none without one.
    pub back: Vec<Match>,
    pub tail: TailMatch,
    /// Full blocks up to the last one that another conversation has or had too.
    pub shared: usize,
}

#[derive(Clone, Debug)]
pub(super) enum Match {
    Here(Arc<SealedBlock<BlockId>>),
    Below(Arc<SealedBlock<HostBlockId>>),
    OnDisk(Arc<SealedBlock<DiskBlockId>>),
}

#[derive(Debug)]
pub(super) enum TailMatch {
    None,
    /// On the device; `alone` if it can be written without a copy.
    Resident {
        keep: TokenCount,
        alone: bool,
    },
    Below {
        keep: TokenCount,
        block: Arc<TailBlock<HostBlockId>>,
    },
}

impl Matched {
    /// Index of the first block behind the gap, or of the first that is nowhere.
    pub fn gap_ends(&self) -> usize {
        self.own + self.front.len() + self.gap
    }

    /// Index after the last full block that was found.
    pub fn end(&self) -> usize {
        self.gap_ends() + self.back.len()
    }

    /// Blocks that are on the device already, and not among its own first ones.
    pub fn here(&self) -> usize {
        self.front.iter().chain(&self.back).filter(|found| found.is_here()).count()
    }
}

impl Match {
    pub fn is_here(&self) -> bool {
        matches!(self, Match::Here(_))
    }
}

impl<'a> Admit<'a> {
    /// The chain as far as it may be found: at least one token is left to encode, since its logits are wanted.
    pub(super) fn usable_hashes(&self, size: BlockSize) -> &'a [PrefixHash] {
        let usable = (self.tokens.len() - 1) / size.0 as usize;
        &self.hashes[..usable.min(self.hashes.len())]
    }
}

impl Manager {
    /// What the tiers hold of a sequence. Own claims that the tokens contradict are given up.
    pub(super) fn find(&mut self, admit: &Admit<'_>) -> Matched {
        let size = self.settings.block_size;
        let conversation = self.conversations.get_mut(&admit.key).expect("the caller made it known");
        let hashes = admit.usable_hashes(size);
        conversation.device.keep(hashes);
        conversation.host.keep(hashes);
        conversation.disk.keep(hashes);
        let own = conversation.device.sealed.len();
        let mut front = Vec::new();
        let mut shared = conversation.shared.min(own.max(conversation.host.sealed.len()));
        for (index, hash) in hashes.iter().enumerate().skip(own) {
            if let Some(block) = conversation.device.get(index) {
                front.push(Match::Here(Arc::clone(block)));
            } else if let Some(block) = self.device_index.get(hash) {
                shared = index + 1;
                front.push(Match::Here(block));
            } else if let Some(block) = conversation.host.get(index) {
                front.push(Match::Below(Arc::clone(block)));
            } else if let Some(block) = self.host_index.get(hash) {
                shared = index + 1;
                front.push(Match::Below(block));
            } else if let Some(block) = conversation.disk.get(index) {
                front.push(Match::OnDisk(Arc::clone(block)));
            } else if let Some(block) = self.disk.index.get(hash) {
                front.push(Match::OnDisk(block));
            } else {
                break;
            }
        }
        let own_block = |index: usize| {
            let here = conversation.device.get(index).cloned().map(Match::Here);
            let below = || conversation.host.get(index).cloned().map(Match::Below);
            here.or_else(below).or_else(|| conversation.disk.get(index).cloned().map(Match::OnDisk))
        };
        let gap_begins = own + front.len();
        let gap = (gap_begins..hashes.len()).take_while(|index| own_block(*index).is_none()).count();
        let back: Vec<Match> = (gap_begins + gap..hashes.len()).map_while(own_block).collect();
        let gap = if back.is_empty() { 0 } else { gap };
        let end = gap_begins + gap + back.len();
        let rest = &admit.tokens[end * size.0 as usize..];
        let rest = &rest[..rest.len() - 1];
        let common = |tail: &[TokenId]| tail.iter().zip(rest).take_while(|(a, b)| a == b).count();
        let keep = |tail: &[TokenId]| TokenCount(u32::try_from(common(tail)).expect("a block bounds a tail"));
        let mut tail = TailMatch::None;
        if let Some(block) = &conversation.device.tail
            && end == conversation.device.end()
            && common(block.tokens()) > 0
        {
            tail = TailMatch::Resident { keep: keep(block.tokens()), alone: Arc::strong_count(block) == 1 };
        } else if let Some(block) = &conversation.host.tail
            && end == conversation.host.end()
            && common(block.tokens()) > 0
        {
            tail = TailMatch::Below { keep: keep(block.tokens()), block: Arc::clone(block) };
        }
        Matched { own, front, gap, back, tail, shared }
    }
}
