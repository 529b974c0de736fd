//! Who writes the record, without the engine's loop waiting for it?
//!
//! The loop notes a step and hands it over through a bounded queue; a thread makes pseudonyms of it and writes. The thread
//! gathers for a moment before it writes, so that a busy loop wakes it few times a second. A step for which the queue has no
//! room is lost, which is counted and written down: the loop never waits. A disk that takes no write costs the record, never
//! a turn.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::ring::{Head, Ring};
use super::writing::Writer;
use super::{Beginning, DiskBefore, FlightSettings, Step};
use crate::engine::core::{Command, Event};
use crate::telemetry::metrics;
use crate::types::Tick;

/// Steps that wait for the thread, with their turns' prompts. A loop that makes no more than this in `GATHER` loses none.
const QUEUE: usize = 1024;
/// How long the thread gathers steps before it writes: what a killed process loses of its record.
const GATHER: Duration = Duration::from_millis(50);
/// Bytes of a chunk after which it is written, whatever else waits.
const CHUNK: usize = 64 << 10;
/// Of a slot's entry, at most about; and which part of the record what the disk held may take.
const SLOT_BYTES: u64 = 64;
const DISK_PART: u64 = 16;

impl FlightSettings {
    /// Whether there is room to write down a disk tier of so many blocks.
    pub fn has_room_for_disk(&self, blocks: usize) -> bool {
        blocks as u64 * SLOT_BYTES <= self.bytes / DISK_PART
    }
}

/// Writes steps to the record: the whole of it but the thread.
pub struct Scribe {
    writer: Writer,
    ring: Ring,
    head: Head,
    /// Steps that are in the writer, or were and could not be written.
    unwritten: u64,
    failing: bool,
}

impl Scribe {
    /// Begins a run. `disk`: what the tier held; `None` if that can't be written down.
    pub fn begin(settings: &FlightSettings, beginning: Beginning, disk: Option<&DiskBefore>) -> io::Result<Self> {
        let mut ring = Ring::open(&settings.folder, settings.bytes)?;
        let mut writer = Writer::new(beginning.kv.block_size);
        let head = Head { run: rand::random(), part: 0, beginning };
        ring.begin_part(&head)?;
        match disk {
            Some(disk) => writer.disk(disk),
            None => writer.disk_left_out(),
        }
        let mut scribe = Self { writer, ring, head, unwritten: 0, failing: false };
        scribe.write();
        Ok(scribe)
    }

    pub fn step(&mut self, step: &Step) {
        self.writer.step(step);
        self.unwritten += 1;
        if self.writer.written() >= CHUNK {
            self.write();
        }
    }

    /// Writes what was gathered.
    pub fn write(&mut self) {
        if self.writer.written() == 0 {
            return;
        }
        let chunk = self.writer.take();
        match self.append(&chunk) {
            Ok(()) => {
                self.unwritten = 0;
                self.failing = false;
            }
            Err(error) => {
                if !self.failing {
                    tracing::warn!(%error, "the flight record was not written; it goes on when it can be");
                }
                self.failing = true;
                metrics::FLIGHT_RECORD_LOST.add(self.unwritten, &[]);
                // A new part, so that nothing in it needs what was lost.
                self.begin_part();
                self.writer.lost(self.unwritten.max(1));
                self.unwritten = 0;
            }
        }
        metrics::FLIGHT_RECORD_BYTES.set(self.ring.bytes() as f64, &[]);
    }

    fn append(&mut self, chunk: &[u8]) -> io::Result<()> {
        if chunk.len() > self.ring.largest() {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "a step is larger than a part of the record"));
        }
        self.ring.append(chunk)?;
        if self.ring.wants_part() {
            self.begin_part();
        }
        Ok(())
    }

    fn begin_part(&mut self) {
        self.head.part += 1;
        self.writer.begin_part();
        if let Err(error) = self.ring.begin_part(&self.head) {
            tracing::debug!(%error, "a part of the flight record could not be begun");
        }
    }
}

/// What the engine's loop notes its steps with.
pub struct Recorder {
    queue: SyncSender<Box<Step>>,
    step: Step,
    lost: u64,
    thread: JoinHandle<()>,
}

impl Recorder {
    /// Starts the thread. A record that can't be written is left out, and service goes on without it.
    pub fn start(settings: &FlightSettings, beginning: Beginning, disk: Option<&DiskBefore>) -> Option<Self> {
        let started = Scribe::begin(settings, beginning, disk).and_then(|scribe| {
            let (queue, steps) = sync_channel(QUEUE);
            let thread = std::thread::Builder::new().name("flight".into()).spawn(move || write(scribe, &steps))?;
            Ok(Self { queue, step: Step::default(), lost: 0, thread })
        });
        let told = |error: &io::Error| {
            tracing::warn!(%error, folder = %settings.folder.display(), "the flight record is left out");
        };
        started.inspect_err(told).ok()
    }

    /// A step's plan is about to be made.
    pub fn begin(&mut self, planned: Tick, commands: &[Command]) {
        self.step = Step::begin(planned, commands);
    }

    /// The core planned, and told this.
    pub fn planned(&mut self, events: &[Event]) {
        self.step.plan(events);
    }

    /// The core committed, and told this.
    pub fn committed(&mut self, at: Tick, failed: bool, events: &[Event]) {
        self.step.commit(at, failed, events);
    }

    /// The step is over.
    pub fn end_step(&mut self) {
        let mut step = Box::new(std::mem::take(&mut self.step));
        step.lost_before = self.lost;
        match self.queue.try_send(step) {
            Ok(()) => self.lost = 0,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.lost += 1;
                metrics::FLIGHT_RECORD_LOST.add(1, &[]);
            }
        }
    }

    /// Returns when all that was noted is written.
    pub fn end(self) {
        drop(self.queue);
        if self.thread.join().is_err() {
            tracing::error!("the thread that writes the flight record panicked; the record ends there");
        }
    }
}

fn write(mut scribe: Scribe, steps: &Receiver<Box<Step>>) {
    while let Ok(first) = steps.recv() {
        std::thread::sleep(GATHER);
        scribe.step(&first);
        while let Ok(step) = steps.try_recv() {
            scribe.step(&step);
        }
        scribe.write();
    }
}
