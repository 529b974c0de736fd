//! What waits until a socket's client reads it?
//!
//! Whoever has something to say puts it here and never waits; one task writes it out at the client's pace. A lane asks for
//! the next event of its turn only while there is room: until then the turn's text gathers as one longer delta.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_ws::{CloseCode, CloseReason, Session};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// With more than this waiting, lanes wait too.
const ROOM_EVENTS: usize = 64;
const ROOM_BYTES: usize = 256 << 10;
/// With more than this waiting, the client is too slow.
const MOST_EVENTS: usize = 256;
const MOST_BYTES: usize = 1 << 20;
/// Answers to pings and the like that wait: a client that floods pings is answered some of them.
const MOST_CONTROLS: usize = 8;

/// Why a socket closes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Close {
    pub code: CloseCode,
    pub reason: &'static str,
}

/// Something small that goes before all events.
enum Control {
    Ping,
    Pong(Vec<u8>),
}

#[derive(Default)]
struct Waiting {
    controls: VecDeque<Control>,
    events: VecDeque<String>,
    bytes: usize,
    close: Option<Close>,
    /// When an event was last handed to the connection, or the first one came to an empty box.
    moved: Option<Instant>,
    over: bool,
}

impl Waiting {
    fn has_room(&self) -> bool {
        self.events.len() < ROOM_EVENTS && self.bytes < ROOM_BYTES
    }
}

/// The box. Cheap to clone.
#[derive(Clone, Default)]
pub struct Outbox {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    filled: Notify,
    emptied: Notify,
}

impl Outbox {
    /// Puts an event at the end. What comes after the close is dropped.
    pub fn push(&self, event: String) {
        let mut waiting = self.shared.waiting.lock();
        if waiting.close.is_some() || waiting.over {
            return;
        }
        if waiting.events.is_empty() {
            waiting.moved = Some(Instant::now());
        }
        waiting.bytes += event.len();
        waiting.events.push_back(event);
        drop(waiting);
        self.shared.filled.notify_one();
    }

    pub fn ping(&self) {
        self.control(Control::Ping);
    }

    pub fn pong(&self, payload: &[u8]) {
        self.control(Control::Pong(payload.to_vec()));
    }

    fn control(&self, control: Control) {
        let mut waiting = self.shared.waiting.lock();
        if waiting.controls.len() < MOST_CONTROLS {
            waiting.controls.push_back(control);
            drop(waiting);
            self.shared.filled.notify_one();
        }
    }

    /// Says goodbye behind what waits; nothing comes after it.
    pub fn close(&self, close: Close) {
        let mut waiting = self.shared.waiting.lock();
        if waiting.close.is_none() {
            waiting.close = Some(close);
        }
        drop(waiting);
        self.shared.filled.notify_one();
    }

    /// Says goodbye now: what waits is not said.
    pub fn close_at_once(&self, close: Close) {
        let mut waiting = self.shared.waiting.lock();
        waiting.events.clear();
        waiting.bytes = 0;
        waiting.close = Some(close);
        drop(waiting);
        self.shared.filled.notify_one();
        self.shared.emptied.notify_waiters();
    }

    /// Resolves when there is room for an event, or nobody will read any more.
    pub async fn room(&self) {
        loop {
            let emptied = self.shared.emptied.notified();
            tokio::pin!(emptied);
            emptied.as_mut().enable();
            {
                let waiting = self.shared.waiting.lock();
                if waiting.has_room() || waiting.over {
                    return;
                }
            }
            emptied.await;
        }
    }

    /// Whether more waits than may, or nothing has moved for so long.
    pub fn is_stuck(&self, patience: Duration) -> bool {
        let waiting = self.shared.waiting.lock();
        let too_much = waiting.events.len() > MOST_EVENTS || waiting.bytes > MOST_BYTES;
        let still = !waiting.events.is_empty() && waiting.moved.is_some_and(|moved| moved.elapsed() > patience);
        too_much || still
    }

    /// Writes out what comes, to the goodbye or until the client is gone.
    pub async fn write_out(self, mut session: Session) {
        while let Some(next) = self.next().await {
            let written = match next {
                Next::Control(Control::Ping) => session.ping(b"").await,
                Next::Control(Control::Pong(payload)) => session.pong(&payload).await,
                Next::Event(event) => session.text(event).await,
                Next::Close(close) => {
                    // The client may be gone: then nobody is left to hear it.
                    drop(
                        session
                            .close(Some(CloseReason { code: close.code, description: Some(close.reason.into()) }))
                            .await,
                    );
                    break;
                }
            };
            if written.is_err() {
                break;
            }
        }
        let mut waiting = self.shared.waiting.lock();
        waiting.over = true;
        waiting.events.clear();
        waiting.bytes = 0;
        drop(waiting);
        self.shared.emptied.notify_waiters();
    }

    async fn next(&self) -> Option<Next> {
        loop {
            let filled = self.shared.filled.notified();
            if let Some(next) = self.take() {
                return Some(next);
            }
            filled.await;
        }
    }

    fn take(&self) -> Option<Next> {
        let mut waiting = self.shared.waiting.lock();
        if let Some(control) = waiting.controls.pop_front() {
            return Some(Next::Control(control));
        }
        if let Some(event) = waiting.events.pop_front() {
            waiting.bytes -= event.len();
            waiting.moved = Some(Instant::now());
            drop(waiting);
            self.shared.emptied.notify_waiters();
            return Some(Next::Event(event));
        }
        waiting.close.take().map(Next::Close)
    }
}

enum Next {
    Control(Control),
    Event(String),
    Close(Close),
}
