//! How do block bytes move between tiers, and how is it known that they arrived whole?
//!
//! `manager` orders, a driver executes (`engine::thread` on a copier thread, a simulation when it likes), and the outcome
//! comes back as a value. Every copy is summed (CRC-32C) in the same pass; a reload whose sum differs is not used.

use crate::kernels::memory::Arena;

/// Names one transfer until its outcome is back.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Ticket(pub u64);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// Device → host.
    Offload,
    /// Host → device.
    Reload,
}

/// A transfer to make. The manager holds source and destination until its outcome is back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TransferOrder {
    pub ticket: Ticket,
    pub direction: Direction,
    /// (from, to): places in the source's and the destination's arena.
    pub pairs: Vec<(u32, u32)>,
}

/// The outcome of a transfer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TransferDone {
    pub ticket: Ticket,
    /// CRC-32C of the bytes that were copied, a pair each.
    pub sums: Vec<u32>,
    pub took_us: u64,
}

/// Makes the copies of an order. Returns each one's sum.
pub fn execute(order: &TransferOrder, device: &Arena, host: &Arena) -> Vec<u32> {
    let (source, destination) = match order.direction {
        Direction::Offload => (device, host),
        Direction::Reload => (host, device),
    };
    order.pairs.iter().map(|&(from, to)| destination.copy_from(to, source, from)).collect()
}
