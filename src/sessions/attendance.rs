//! Which conversations are over because everybody has left, or because somebody says so?
//!
//! A socket attends the conversations that it talks about. When the last of its sockets has gone, and for a while nobody
//! comes back or asks anything of it, a conversation is over: its KV is the first to go when memory is short, and its next
//! turn finds what is left. All wait for the same time, so those that were left stand in one line, oldest first: to leave,
//! to come back and to ask cost O(1) each, and one clock looks at the line's front. Nothing here waits for the engine.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::command::{Command, Outlook};
use super::messages::{ConversationId, SessionError};
use super::registry::Key;
use super::{Sessions, Shared};
use crate::engine::SubmitError;
use crate::telemetry::metrics::CONVERSATIONS_ENDED;
use crate::tenants::Tenant;
use crate::types::KvKey;

/// How often the front of the line is looked at.
const TICK: Duration = Duration::from_millis(250);
/// Most that are ended at a time: a quarter of the engine's mailbox, so that turns find room in it.
const MOST_AT_ONCE: usize = 1024;
/// Most that stand in line. Of those that are left beyond it nothing is concluded.
const MOST_IN_LINE: usize = 250_000;

impl Sessions {
    /// Attends a conversation of the tenant's until the guard is dropped.
    pub fn attend(&self, tenant: &Tenant, id: ConversationId) -> Attendance {
        self.shared.attended.attend((tenant.id, id))
    }

    /// Says that a conversation is over, once the turns that were asked of it are.
    pub async fn end(&self, tenant: &Tenant, id: ConversationId) -> Result<(), SessionError> {
        self.ask(tenant, id, |reply| Command::Expect { outlook: Outlook::Over, reply }).await?;
        CONVERSATIONS_ENDED.add(1, &[("by", DONE)]);
        Ok(())
    }

    /// Says that a conversation goes on after all. Does nothing to one that isn't over.
    pub async fn reopen(&self, tenant: &Tenant, id: ConversationId) -> Result<(), SessionError> {
        self.ask(tenant, id, |reply| Command::Expect { outlook: Outlook::Open, reply }).await
    }
}

/// Values of the metric's label: everybody left, or the client said so.
const LEFT: &str = "left";
const DONE: &str = "done";

/// A socket's attendance of a conversation. Dropping it says that the client has gone.
pub struct Attendance {
    attended: Arc<Attended>,
    key: Key,
    client_left: bool,
}

impl Attendance {
    /// Ends it without a word about the client, who may well come back: it was not the one that hung up.
    pub fn release(mut self) {
        self.client_left = false;
    }
}

impl Drop for Attendance {
    fn drop(&mut self) {
        self.attended.leave(Instant::now(), self.key, self.client_left);
    }
}

/// All conversations that are attended, or were until a while ago.
pub(super) struct Attended {
    /// For how long nobody must be there; `None`: nothing is concluded from that.
    patience: Option<Duration>,
    books: Mutex<Books>,
}

#[derive(Default)]
struct Books {
    /// Sockets that attend each.
    sockets: HashMap<Key, usize>,
    /// When the last of them left, unless somebody has come or asked since.
    left: HashMap<Key, Instant>,
    /// The same in order of time, with those that have left it by now.
    line: VecDeque<(Instant, Key)>,
}

impl Attended {
    pub fn new(patience: Option<Duration>) -> Arc<Self> {
        Arc::new(Self { patience, books: Mutex::default() })
    }

    fn attend(self: &Arc<Self>, key: Key) -> Attendance {
        let mut books = self.books.lock();
        *books.sockets.entry(key).or_default() += 1;
        books.left.remove(&key);
        Attendance { attended: Arc::clone(self), key, client_left: true }
    }

    fn leave(&self, now: Instant, key: Key, client_left: bool) {
        let mut books = self.books.lock();
        let Entry::Occupied(mut sockets) = books.sockets.entry(key) else { return };
        *sockets.get_mut() -= 1;
        if *sockets.get() > 0 {
            return;
        }
        sockets.remove();
        if client_left && self.patience.is_some() && books.line.len() < MOST_IN_LINE {
            books.left.insert(key, now);
            books.line.push_back((now, key));
        }
    }

    /// Notes that something was asked of a conversation.
    pub fn hear_of(&self, key: &Key) {
        self.books.lock().left.remove(key);
    }

    /// Ends the conversations that were left long enough ago, so many at a time. What the engine has no room to hear waits.
    ///
    /// `end` is called under the lock: what is asked of a conversation afterwards reaches the engine afterwards.
    fn end_those_left(&self, now: Instant, mut end: impl FnMut(KvKey) -> Result<(), SubmitError>) {
        let Some(patience) = self.patience else { return };
        let mut books = self.books.lock();
        for _ in 0..MOST_AT_ONCE {
            let Some((since, key)) = books.line.front().copied().filter(|(since, _)| now - *since >= patience) else {
                return;
            };
            if books.left.get(&key) == Some(&since) {
                match end(KvKey(key.1.0)) {
                    Ok(()) => CONVERSATIONS_ENDED.add(1, &[("by", LEFT)]),
                    Err(SubmitError::Overloaded { .. }) => return,
                    Err(error) => tracing::debug!(%error, "the end of a conversation was not told to the engine"),
                }
                books.left.remove(&key);
            }
            books.line.pop_front();
        }
    }
}

/// The clock. Ends with the sessions.
pub(super) async fn tick(shared: Weak<Shared>) {
    let mut ticks = tokio::time::interval(TICK);
    loop {
        ticks.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        shared.attended.end_those_left(Instant::now(), |key| shared.engine.end(key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::TenantId;

    const PATIENCE: Duration = Duration::from_secs(30);
    const MOMENT: Duration = Duration::from_millis(1);

    fn key(id: u128) -> Key {
        (TenantId(0), ConversationId(id))
    }

    /// Attends it, and goes at this time.
    fn visit(attended: &Arc<Attended>, id: u128, until: Instant) {
        let mut books = attended.books.lock();
        *books.sockets.entry(key(id)).or_default() += 1;
        drop(books);
        attended.leave(until, key(id), true);
    }

    /// Those that are ended at this time.
    fn ended(attended: &Attended, now: Instant) -> Vec<u128> {
        let mut ended = Vec::new();
        attended.end_those_left(now, |key| {
            ended.push(key.0);
            Ok(())
        });
        ended
    }

    #[test]
    fn a_conversation_is_over_when_its_last_socket_has_been_gone_for_the_whole_time() {
        let attended = Attended::new(Some(PATIENCE));
        let (one, other) = (attended.attend(key(1)), attended.attend(key(1)));
        drop(one);
        assert!(ended(&attended, Instant::now() + 2 * PATIENCE).is_empty(), "one attends it still");
        let before = Instant::now();
        drop(other);
        let after = Instant::now();
        assert!(ended(&attended, before + PATIENCE - MOMENT).is_empty());
        assert_eq!(ended(&attended, after + PATIENCE), [1]);
        assert!(ended(&attended, after + 2 * PATIENCE).is_empty(), "it ends once");
        let books = attended.books.lock();
        assert!(books.sockets.is_empty() && books.left.is_empty() && books.line.is_empty());
    }

    #[test]
    fn whoever_comes_back_or_asks_in_time_takes_it_off_the_line_and_its_next_leave_counts_anew() {
        let (attended, begin) = (Attended::new(Some(PATIENCE)), Instant::now());
        (1..=3).for_each(|id| visit(&attended, id, begin));
        let back = attended.attend(key(1));
        attended.hear_of(&key(2));
        // Another tenant's question is about another conversation.
        attended.hear_of(&(TenantId(1), ConversationId(3)));
        assert_eq!(ended(&attended, begin + PATIENCE), [3]);
        back.release();
        visit(&attended, 1, begin + PATIENCE);
        assert!(ended(&attended, begin + 2 * PATIENCE - MOMENT).is_empty());
        assert_eq!(ended(&attended, begin + 2 * PATIENCE), [1]);
    }

    #[test]
    fn a_socket_that_the_server_closed_says_nothing_and_without_a_patience_none_does() {
        let (attended, never) = (Attended::new(Some(PATIENCE)), Attended::new(None));
        attended.attend(key(1)).release();
        drop(never.attend(key(1)));
        for attended in [attended, never] {
            assert!(ended(&attended, Instant::now() + 100 * PATIENCE).is_empty());
            let books = attended.books.lock();
            assert!(books.sockets.is_empty() && books.line.is_empty());
        }
    }

    #[test]
    fn what_an_engine_with_a_full_mailbox_was_not_told_is_told_later() {
        let (attended, begin) = (Attended::new(Some(PATIENCE)), Instant::now());
        (1..=3).for_each(|id| visit(&attended, id, begin));
        let mut told = Vec::new();
        attended.end_those_left(begin + PATIENCE, |key| {
            told.push(key.0);
            if key.0 == 2 { Err(SubmitError::Overloaded { queued: 0 }) } else { Ok(()) }
        });
        assert_eq!(told, [1, 2]);
        assert_eq!(ended(&attended, begin + PATIENCE), [2, 3]);
    }

    #[test]
    fn a_hundred_thousand_that_leave_at_once_are_ended_in_their_order_and_a_bounded_number_at_a_time() {
        const ALL: u128 = 100_000;
        let attended = Attended::new(Some(PATIENCE));
        let sockets: Vec<_> = (0..ALL).map(|id| attended.attend(key(id))).collect();
        drop(sockets);
        let due = Instant::now() + PATIENCE;
        let (mut all, mut ticks) = (Vec::new(), 0);
        while all.len() < 100_000 {
            let some = ended(&attended, due);
            assert!((1..=MOST_AT_ONCE).contains(&some.len()));
            all.extend(some);
            ticks += 1;
        }
        assert!(TICK * ticks <= PATIENCE, "{ticks} ticks");
        assert_eq!(all, Vec::from_iter(0..ALL));
    }

    #[test]
    fn the_line_has_a_bound_and_of_what_is_beyond_it_nothing_is_concluded() {
        let (attended, begin) = (Attended::new(Some(PATIENCE)), Instant::now());
        (0..=MOST_IN_LINE).for_each(|_| visit(&attended, 1, begin));
        visit(&attended, 2, begin);
        let books = attended.books.lock();
        assert_eq!((books.line.len(), books.left.contains_key(&key(2))), (MOST_IN_LINE, false));
        assert!(books.sockets.is_empty());
    }
}
