//! What has a driver to do to the bytes before a step?

use std::sync::Arc;

use super::block::{Slot, TailBlock};
use crate::kernels::memory::Arena;
use crate::types::{BlockId, HostBlockId};

/// What a driver has to do to the bytes, in this order: copies, then zeros; places are held until it has.
#[derive(Debug, Default)]
pub struct Chores {
    /// Device blocks to copy before the step, (from, to): copy-on-write.
    pub copies: Vec<(BlockId, BlockId)>,
    pub(super) copied_from: Vec<Arc<TailBlock<BlockId>>>,
    /// Places of forgotten blocks, to overwrite with zeros.
    pub zero_device: Vec<Slot<BlockId>>,
    pub zero_host: Vec<Slot<HostBlockId>>,
}

impl Chores {
    /// Does them. The places that they hold are free once the chores are dropped.
    pub fn execute(&self, device: &Arena, host: &Arena) {
        for (from, to) in &self.copies {
            device.copy_from(to.0, device, from.0);
        }
        for slot in &self.zero_device {
            device.zero(slot.place().0);
        }
        for slot in &self.zero_host {
            host.zero(slot.place().0);
        }
    }
}
