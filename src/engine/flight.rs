//! What is kept of what the engine was told, so that its decisions can be repeated?
//!
//! The *flight record*: all that the pure core takes in, without content. A *run* is one process's; it begins with the
//! settings and what the disk tier held, and goes on with a *step* a round of the engine's loop: its ticks, its commands,
//! and which rows said something. Tokens are written as pseudonyms (`pseudonyms`), so that equal prefixes of a tenant are
//! equal and nothing else can be told. `writing` and `reading` are the two halves of the format, `ring` the files,
//! `recorder` the thread that fills them.
//! Invariant: the same steps under the same settings give the same decisions.

pub(super) mod bytes;
mod pseudonyms;
pub mod reading;
pub mod recorder;
pub mod ring;
mod settings;
mod writing;

use std::collections::HashSet;
use std::path::PathBuf;

use super::core::{Command, CoreSettings, Event};
use super::{FinishReason, TurnEvent};
use crate::kernels::files::Contents;
use crate::kv::KvSettings;
use crate::types::{KvKey, TenantId, TenantKey, Tick, TokenId, TurnId};

/// The record's folder in a server's data folder.
pub const FLIGHT_FOLDER: &str = "flight";

/// Where the record is, and how large it may get.
#[derive(Clone, Debug)]
pub struct FlightSettings {
    pub folder: PathBuf,
    pub bytes: u64,
}

/// What a run began with, beside what its disk tier held.
#[derive(Clone, Debug, PartialEq)]
pub struct Beginning {
    /// Of the program: another version may decide otherwise.
    pub version: String,
    /// Tick 0 in microseconds since 1970.
    pub tick_zero_us: u64,
    pub core: CoreSettings,
    pub kv: KvSettings,
}

/// What a disk tier held when a run began, and what of it was to be taken over.
#[derive(Clone, Debug, Default)]
pub struct DiskBefore {
    pub found: Contents,
    pub tenants: Vec<(TenantId, TenantKey)>,
    pub lives: HashSet<KvKey>,
}

/// A token that a turn's row said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Said {
    pub turn: TurnId,
    pub token: TokenId,
    /// It was a stop token, and ended the turn.
    pub stops: bool,
}

/// What the model said of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Said(Vec<Said>),
    Failed,
}

/// One round of the engine's loop.
#[derive(Clone, Debug, Default)]
pub struct Step {
    pub planned: Tick,
    pub commands: Vec<Command>,
    /// `None`: the plan had no rows.
    pub committed: Option<(Tick, Outcome)>,
    /// Turns that ended in it.
    pub ended: Vec<TurnId>,
    /// Steps before it that are not in the record.
    pub lost_before: u64,
}

impl Step {
    /// A step whose plan is about to be made.
    pub fn begin(planned: Tick, commands: &[Command]) -> Self {
        Self { planned, commands: commands.to_vec(), ..Self::default() }
    }

    /// Notes what the core told when it planned.
    pub fn plan(&mut self, events: &[Event]) {
        self.ended.extend(events.iter().filter_map(ended));
    }

    /// Notes what the core told when it committed.
    pub fn commit(&mut self, committed: Tick, failed: bool, events: &[Event]) {
        self.ended.extend(events.iter().filter_map(ended));
        if failed {
            self.committed = Some((committed, Outcome::Failed));
            return;
        }
        let mut said: Vec<Said> = Vec::new();
        for event in events {
            match event {
                Event::Turn(turn, TurnEvent::Token(token)) => {
                    said.push(Said { turn: *turn, token: token.id, stops: false });
                }
                Event::Turn(turn, TurnEvent::Finished { reason: FinishReason::Stop, .. }) => {
                    let last = said.last_mut().filter(|said| said.turn == *turn);
                    last.into_iter().for_each(|said| said.stops = true);
                }
                Event::Turn(..) | Event::Forgotten(..) | Event::Left(..) | Event::Pinned(_) => {}
            }
        }
        self.committed = Some((committed, Outcome::Said(said)));
    }
}

fn ended(event: &Event) -> Option<TurnId> {
    match event {
        Event::Turn(turn, TurnEvent::Finished { .. } | TurnEvent::Failed(_)) => Some(*turn),
        Event::Turn(..) | Event::Forgotten(..) | Event::Left(..) | Event::Pinned(_) => None,
    }
}

/// What each entry begins with.
mod tag {
    pub const LOST: u8 = 0;
    pub const DISK: u8 = 1;
    pub const DISK_LEFT_OUT: u8 = 2;
    /// A step, with flags beside it.
    pub const STEP: u8 = 0x10;
    pub const HAS_COMMANDS: u8 = 1;
    pub const COMMITTED: u8 = 2;
    pub const FAILED: u8 = 4;
}

/// What each command begins with.
mod command {
    pub const START: u8 = 0;
    pub const CANCEL: u8 = 1;
    pub const FORGET: u8 = 2;
    pub const LEAVE_TO_HOST: u8 = 3;
    pub const LEAVE_TO_DISK: u8 = 4;
    pub const LET_GO: u8 = 5;
    pub const END: u8 = 6;
    pub const AWAIT_TOOL: u8 = 7;
    pub const PIN: u8 = 8;
    pub const UNPIN: u8 = 9;
    pub const TRANSFERRED: u8 = 10;
    pub const GRANT: u8 = 11;
    pub const GO_ON_FROM: u8 = 12;
    pub const REOPEN: u8 = 13;
}

/// How the outcome of one block's transfer is written.
mod sum {
    pub const NONE: u8 = 0;
    pub const ZERO: u8 = 1;
    pub const SOME: u8 = 2;
}

#[cfg(test)]
mod tests;
