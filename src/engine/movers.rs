//! Which threads move blocks between tiers?
//!
//! One copies between memories; of a disk tier, some load and one stores, each kind with a queue of its own, so that a
//! load, which a turn waits for, never stands behind a store, which nobody waits for. What a queue does not take waits
//! here, in order; the core bounds how much that is.

use std::collections::{HashSet, VecDeque};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::handle::Message;
use super::thread::{DiskSettings, micros};
use crate::kernels::cold::ColdForm;
use crate::kernels::files::{Contents, Slots};
use crate::kernels::memory::Arena;
use crate::kv::transfer::{self, Buffers, Direction, TransferDone, TransferOrder};
use crate::telemetry::metrics::TRANSFER_SECONDS;
use crate::types::{KvKey, TenantId, TenantKey};

/// Transfers handed to a thread ahead of time.
const AHEAD: usize = 16;
/// Threads that read from disk: it serves several requests at once faster than one after another.
const LOADERS: usize = 2;

/// A disk tier that can be used, and what is in it.
pub(super) struct OpenDisk {
    pub slots: Slots,
    pub found: Contents,
    pub tenants: Vec<(TenantId, TenantKey)>,
    pub lives: HashSet<KvKey>,
}

/// Opens a disk tier. One that can't be used is left out, and service goes on without it.
pub(super) fn open_disk(settings: DiskSettings, block_bytes: usize, fingerprint: [u8; 32]) -> Option<OpenDisk> {
    let started = Instant::now();
    match Slots::open(&settings.folder, settings.bytes, block_bytes, fingerprint) {
        Ok((slots, found)) => {
            let (folder, count, direct) = (settings.folder.display(), slots.count(), slots.is_direct());
            let ms = started.elapsed().as_millis();
            tracing::info!(%folder, slots = count, found = found.blocks.len(), direct, %ms, "disk tier opened");
            Some(OpenDisk { slots, found, tenants: settings.tenants, lives: settings.lives })
        }
        Err(error) => {
            tracing::warn!(%error, "the disk tier is left out; KV is kept in memory alone");
            None
        }
    }
}

/// What the engine's thread hands transfers to. The threads end when this is dropped and their last outcome is told.
pub(super) struct Movers {
    copies: Queue,
    disk: Option<DiskQueues>,
    threads: Vec<JoinHandle<()>>,
}

struct DiskQueues {
    loads: Queue,
    stores: Queue,
}

impl Movers {
    pub fn start(
        mailbox: &SyncSender<Message>,
        device: &Arc<Arena>,
        host: &Arc<Arena>,
        cold: ColdForm,
        disk: Option<Slots>,
    ) -> Result<Self, std::io::Error> {
        let arenas = Arenas { device: Arc::clone(device), host: Arc::clone(host), cold };
        let mut threads = Vec::new();
        let mut spawn = |name: &str, orders: &Arc<Orders>, disk: Option<(Arc<Slots>, Buffers)>| {
            let mover = Mover { arenas: arenas.clone(), disk, orders: Arc::clone(orders), mailbox: mailbox.clone() };
            threads.push(std::thread::Builder::new().name(name.into()).spawn(move || mover.run())?);
            Ok::<_, std::io::Error>(())
        };
        let (copies, to_copy) = queue();
        spawn("copier", &to_copy, None)?;
        let disk = match disk {
            None => None,
            Some(slots) => {
                let slots = Arc::new(slots);
                let ((loads, to_load), (stores, to_store)) = (queue(), queue());
                for _ in 0..LOADERS {
                    spawn("disk-load", &to_load, Some((Arc::clone(&slots), [slots.buffer()?, slots.buffer()?])))?;
                }
                spawn("disk-store", &to_store, Some((Arc::clone(&slots), [slots.buffer()?, slots.buffer()?])))?;
                Some(DiskQueues { loads, stores })
            }
        };
        Ok(Self { copies, disk, threads })
    }

    /// Gives the threads as many orders as they take without waiting, each kind in order.
    pub fn hand_over(&mut self, orders: Vec<TransferOrder>) {
        for order in orders {
            let queue = match (&mut self.disk, order.direction) {
                (_, Direction::Offload | Direction::Reload) => &mut self.copies,
                (Some(disk), Direction::Load) => &mut disk.loads,
                (Some(disk), Direction::Store { .. } | Direction::Erase) => &mut disk.stores,
                (None, Direction::Load | Direction::Store { .. } | Direction::Erase) => {
                    unreachable!("the core orders nothing of a disk that is not there")
                }
            };
            queue.waiting.push_back(order);
        }
        self.copies.pass_on();
        if let Some(disk) = &mut self.disk {
            disk.loads.pass_on();
            disk.stores.pass_on();
        }
    }

    /// Whether all orders are with the threads.
    pub fn has_passed_on_all(&self) -> bool {
        let disk = self.disk.iter().flat_map(|disk| [&disk.loads, &disk.stores]);
        disk.chain([&self.copies]).all(|queue| queue.waiting.is_empty())
    }

    /// Ends the threads. Panics if one did.
    pub fn end(self) {
        let Self { copies, disk, threads } = self;
        drop((copies, disk));
        for thread in threads {
            if thread.join().is_err() {
                std::panic::resume_unwind(Box::new("a thread that moves blocks panicked"));
            }
        }
    }
}

/// Orders on their way to the threads of one kind.
struct Queue {
    orders: SyncSender<TransferOrder>,
    waiting: VecDeque<TransferOrder>,
}

/// What the threads of one kind share.
struct Orders {
    inbox: Mutex<Receiver<TransferOrder>>,
    /// Until then their work is counted.
    counted: Mutex<Instant>,
}

impl Orders {
    /// The part of an order's time for which no other of its kind has been counted: bytes over the sum of these are what
    /// all threads give together.
    fn count(&self, started: Instant, ended: Instant) -> Duration {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let part = ended.saturating_duration_since(started.max(*counted));
        *counted = ended.max(*counted);
        part
    }
}

fn queue() -> (Queue, Arc<Orders>) {
    let (orders, inbox) = sync_channel(AHEAD);
    let taken = Orders { inbox: Mutex::new(inbox), counted: Mutex::new(Instant::now()) };
    (Queue { orders, waiting: VecDeque::new() }, Arc::new(taken))
}

impl Queue {
    fn pass_on(&mut self) {
        while let Some(order) = self.waiting.pop_front() {
            match self.orders.try_send(order) {
                Ok(()) => {}
                Err(TrySendError::Full(order)) => return self.waiting.push_front(order),
                Err(TrySendError::Disconnected(_)) => panic!("a thread that moves blocks has ended"),
            }
        }
    }
}

#[derive(Clone)]
struct Arenas {
    device: Arc<Arena>,
    host: Arc<Arena>,
    cold: ColdForm,
}

/// One thread's work.
struct Mover {
    arenas: Arenas,
    disk: Option<(Arc<Slots>, Buffers)>,
    orders: Arc<Orders>,
    mailbox: SyncSender<Message>,
}

impl Mover {
    fn run(self) {
        let Arenas { device, host, cold } = &self.arenas;
        loop {
            // One waits for orders, and the others of its kind for it.
            let order = self.orders.inbox.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(order) = order else { return };
            let started = Instant::now();
            let sums = match &self.disk {
                None => transfer::execute(&order, device, host, *cold),
                Some((slots, buffers)) => transfer::execute_on_disk(&order, slots, device, host, *cold, buffers),
            };
            let ended = Instant::now();
            TRANSFER_SECONDS.record((ended - started).as_secs_f64(), &[("direction", order.direction.name())]);
            let took_us = micros(self.orders.count(started, ended));
            let done = TransferDone { ticket: order.ticket, sums, took_us };
            if self.mailbox.send(Message::Transferred(done)).is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_that_run_at_once_are_counted_for_the_time_that_all_of_them_take() {
        let (_, orders) = queue();
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let counted: Duration =
            [(0, 10), (2, 12), (5, 11), (20, 25)].map(|(from, to)| orders.count(at(from), at(to))).iter().sum();
        assert_eq!(counted, Duration::from_millis(12 + 5));
    }
}
