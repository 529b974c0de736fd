//! How do block bytes move between tiers, and how is it known that they arrived whole?
//!
//! `manager` orders, a driver executes (`engine::thread` on threads of its own, a simulation when it likes), and the outcome
//! comes back as a value. Every copy is summed (CRC-32C) in the same pass; what is read back and is not what was written is
//! not used.

use crate::kernels::cold::ColdForm;
use crate::kernels::files::{Buffer, Label, Slots};
use crate::kernels::memory::Arena;
use crate::types::Tier;

/// Names one transfer until its outcome is back.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Ticket(pub u64);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// Device → host.
    Offload,
    /// Host → device.
    Reload,
    /// Host or device → disk.
    Store { from: Tier },
    /// Disk → device.
    Load,
    /// Zeros → disk.
    Erase,
}

impl Direction {
    /// Its word in the metrics.
    pub fn name(self) -> &'static str {
        match self {
            Direction::Offload => "offload",
            Direction::Reload => "reload",
            Direction::Store { .. } => "store",
            Direction::Load => "load",
            Direction::Erase => "erase",
        }
    }

    /// Whether it is between memories.
    pub fn is_copy(self) -> bool {
        match self {
            Direction::Offload | Direction::Reload => true,
            Direction::Store { .. } | Direction::Load | Direction::Erase => false,
        }
    }
}

/// A transfer to make. The manager holds source and destination until its outcome is back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TransferOrder {
    pub ticket: Ticket,
    pub direction: Direction,
    /// (from, to): places in the source and the destination.
    pub pairs: Vec<(u32, u32)>,
    /// What the slots say, or must say, of a store or a load, and the sum of the bytes where it is known; a pair each.
    pub labels: Vec<(Label, Option<u32>)>,
}

/// The outcome of a transfer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TransferDone {
    pub ticket: Ticket,
    /// CRC-32C of the bytes that were moved, a pair each. `None`: not moved, or not what the label says.
    pub sums: Vec<Option<u32>>,
    /// Of the time that transfers of its kind took, the part that no other one was counted for.
    pub took_us: u64,
}

/// Blocks of a reload that two threads share: below that a thread costs what it saves.
const SHARED_BLOCKS: usize = 16;

/// Makes the copies of an order between memories. Returns each one's sum, of the bytes on the host. Panics if it is an order
/// for the disk.
pub fn execute(order: &TransferOrder, device: &Arena, host: &Arena, cold: ColdForm) -> Vec<Option<u32>> {
    let copy = |(from, to)| match order.direction {
        Direction::Offload => cold.offload(device, from, host, to),
        Direction::Reload => cold.reload(host, from, device, to),
        Direction::Store { .. } | Direction::Load | Direction::Erase => panic!("no copy between memories: {order:?}"),
    };
    let copies = |pairs: &[(u32, u32)]| pairs.iter().map(|pair| Some(copy(*pair))).collect::<Vec<_>>();
    // Nobody waits for an offload, and a short reload is over before a thread has begun.
    if order.direction == Direction::Offload || order.pairs.len() < SHARED_BLOCKS {
        return copies(&order.pairs);
    }
    let (front, back) = order.pairs.split_at(order.pairs.len() / 2);
    in_two(|| copies(front), || copies(back))
}

/// Does both halves at the same time.
fn in_two<T: Send>(front: impl FnOnce() -> Vec<T> + Send, back: impl FnOnce() -> Vec<T>) -> Vec<T> {
    std::thread::scope(|scope| {
        let front = scope.spawn(front);
        let back = back();
        let mut done = front.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        done.extend(back);
        done
    })
}

/// What a thread that moves blocks from and to disk needs.
pub type Buffers = [Buffer; 2];

/// Makes a transfer from or to disk. A store's bytes are on the disk before their labels, and both when this returns; what
/// goes wrong is logged, and `None` in the sums. Panics if it is a copy between memories.
pub fn execute_on_disk(
    order: &TransferOrder,
    slots: &Slots,
    device: &Arena,
    host: &Arena,
    cold: ColdForm,
    buffers: &Buffers,
) -> Vec<Option<u32>> {
    let buffer = &buffers[0];
    let done = match order.direction {
        Direction::Store { from: Tier::Device } => store(order, slots, device, cold, buffer),
        // They are in the cold form already.
        Direction::Store { .. } => store(order, slots, host, ColdForm::Same, buffer),
        Direction::Load => return load(order, slots, device, cold, buffers),
        Direction::Erase => {
            let places: Vec<u32> = order.pairs.iter().map(|(_, to)| *to).collect();
            return slots.erase(&places, buffer).into_iter().map(|erased| told(erased).map(|()| 0)).collect();
        }
        Direction::Offload | Direction::Reload => panic!("no transfer of the disk's: {order:?}"),
    };
    done.unwrap_or_else(|error| {
        tracing::debug!(%error, direction = ?order.direction, blocks = order.pairs.len(), "the disk tier failed");
        vec![None; order.pairs.len()]
    })
}

/// What went wrong is told to the log.
fn told(erased: std::io::Result<()>) -> Option<()> {
    erased.inspect_err(|error| tracing::debug!(%error, "a slot could not be overwritten")).ok()
}

fn store(
    order: &TransferOrder,
    slots: &Slots,
    source: &Arena,
    cold: ColdForm,
    buffer: &Buffer,
) -> std::io::Result<Vec<Option<u32>>> {
    let mut room = Vec::new();
    let mut sums = Vec::with_capacity(order.pairs.len());
    for &(from, to) in &order.pairs {
        sums.push(Some(slots.write(to, cold.narrow(source.bytes(from), &mut room), buffer)?));
    }
    let written = || order.pairs.iter().map(|(_, to)| *to);
    slots.sync(written())?;
    for ((to, (label, expected)), sum) in written().zip(&order.labels).zip(sums.iter().flatten()) {
        // Damaged above: a label would make it good. Nor is what follows it of any use.
        if expected.is_some_and(|expected| expected != *sum) {
            break;
        }
        slots.label(to, label, *sum, buffer)?;
    }
    slots.sync(written())?;
    Ok(sums)
}

/// Two halves at a time, so that one is read while the other is looked through.
fn load(order: &TransferOrder, slots: &Slots, device: &Arena, cold: ColdForm, buffers: &Buffers) -> Vec<Option<u32>> {
    let (front, back) = order.pairs.split_at(order.pairs.len() / 2);
    let (front_labels, back_labels) = order.labels.split_at(front.len());
    in_two(
        || load_part(front, front_labels, slots, (device, cold), &buffers[0]),
        || load_part(back, back_labels, slots, (device, cold), &buffers[1]),
    )
}

fn load_part(
    pairs: &[(u32, u32)],
    labels: &[(Label, Option<u32>)],
    slots: &Slots,
    (device, cold): (&Arena, ColdForm),
    buffer: &Buffer,
) -> Vec<Option<u32>> {
    let mut loaded = vec![None; pairs.len()];
    let mut start = 0;
    while start < pairs.len() {
        let run = slots.run(pairs[start..].iter().map(|(from, _)| *from));
        let wanted: Vec<&Label> = labels[start..][..run].iter().map(|(label, _)| label).collect();
        slots.read(pairs[start].0, &wanted, buffer, &mut |index, read| match read {
            Ok((bytes, sum)) => {
                device.with_bytes_mut(pairs[start + index].1, |into| cold.widen(bytes, into));
                loaded[start + index] = Some(sum);
            }
            Err(error) => tracing::debug!(%error, slot = pairs[start + index].0, "a block did not come back from disk"),
        });
        start += run;
    }
    loaded
}
