//! What of a sequence do the tiers hold?
//!
//! Found by chain hash, never by trust: a conversation's own blocks first, then any block of the tenant with the same
//! prefix, then what can be reloaded; the part-full tail by its tokens.

use std::sync::Arc;

use super::Manager;
use super::block::{PrefixHash, SealedBlock, TailBlock};
use super::manager::Admit;
use crate::types::{BlockId, BlockSize, DiskBlockId, HostBlockId, TokenCount, TokenId};

pub(super) struct Matched {
    /// Own full blocks on the device.
    pub own: usize,
    /// Full blocks that follow them.
    pub arrivals: Vec<Match>,
    pub tail: TailMatch,
    /// Full blocks up to the last one that another conversation has or had too.
    pub shared: usize,
}

pub(super) enum Match {
    Here(Arc<SealedBlock<BlockId>>),
    Below(Arc<SealedBlock<HostBlockId>>),
    OnDisk(Arc<SealedBlock<DiskBlockId>>),
}

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
        let same = |table: &mut dyn Iterator<Item = PrefixHash>| table.zip(hashes).take_while(|(a, b)| a == *b).count();
        let own = same(&mut conversation.device.sealed.iter().map(|block| block.hash()));
        let host = same(&mut conversation.host.sealed.iter().map(|block| block.hash()));
        conversation.device.truncate(own);
        conversation.host.truncate(host);
        let disk = same(&mut conversation.disk.sealed.iter().map(|block| block.hash()));
        conversation.disk.truncate(disk);
        let mut arrivals = Vec::new();
        let mut shared = conversation.shared.min(own.max(host));
        for (index, hash) in hashes.iter().enumerate().skip(own) {
            if let Some(block) = self.device_index.get(hash) {
                shared = index + 1;
                arrivals.push(Match::Here(block));
            } else if let Some(block) = conversation.host.sealed.get(index) {
                arrivals.push(Match::Below(Arc::clone(block)));
            } else if let Some(block) = self.host_index.get(hash) {
                shared = index + 1;
                arrivals.push(Match::Below(block));
            } else if let Some(block) = conversation.disk.sealed.get(index) {
                arrivals.push(Match::OnDisk(Arc::clone(block)));
            } else if let Some(block) = self.disk.index.get(hash) {
                arrivals.push(Match::OnDisk(block));
            } else {
                break;
            }
        }
        let full = own + arrivals.len();
        let rest = &admit.tokens[full * size.0 as usize..];
        let rest = &rest[..rest.len() - 1];
        let common = |tail: &[TokenId]| tail.iter().zip(rest).take_while(|(a, b)| a == b).count();
        let keep = |tail: &[TokenId]| TokenCount(u32::try_from(common(tail)).expect("a block bounds a tail"));
        let mut tail = TailMatch::None;
        if let Some(block) = &conversation.device.tail
            && full == conversation.device.sealed.len()
            && common(block.tokens()) > 0
        {
            tail = TailMatch::Resident { keep: keep(block.tokens()), alone: Arc::strong_count(block) == 1 };
        } else if let Some(block) = &conversation.host.tail
            && full == conversation.host.sealed.len()
            && common(block.tokens()) > 0
        {
            tail = TailMatch::Below { keep: keep(block.tokens()), block: Arc::clone(block) };
        }
        Matched { own, arrivals, tail, shared }
    }
}
