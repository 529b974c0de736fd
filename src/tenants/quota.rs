//! May a tenant send one more request, begin one more turn, or open one more socket?
//!
//! Requests come out of a bucket that holds a minute's worth and fills evenly, so that the wait told to a refused client is
//! exact. A turn and a socket hold a permit; its `Drop` gives it back. Limits change while both are in use. Cost: O(1), one short lock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::types::counted;

/// The limits' names, as in the tenants file.
pub const REQUESTS_PER_MINUTE: &str = "requests_per_minute";
pub const CONCURRENT_TURNS: &str = "concurrent_turns";
pub const SOCKETS: &str = "sockets";

const MINUTE: Duration = Duration::from_secs(60);

/// What a tenant may ask for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// `None`: no limit.
    pub requests_per_minute: Option<u32>,
    pub concurrent_turns: u32,
    pub sockets: u32,
}

/// How a tenant stands with its requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestsLeft {
    pub limit: u32,
    pub remaining: u32,
    /// Until all are there again.
    pub reset: Duration,
}

/// The tenant's requests of this minute are spent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RateExceeded {
    pub left: RequestsLeft,
    /// Until there is one again; `None`: never, it may send none.
    pub retry_after: Option<Duration>,
}

/// So many turns of the tenant run already.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{} already, its limit `concurrent_turns`; retry when one has ended",
    counted(*limit, "turn of this tenant runs", "turns of this tenant run")
)]
pub struct TurnsExceeded {
    pub limit: u32,
}

/// So many sockets of the tenant are open already.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{} open already, its limit `sockets`; close one, or use fewer",
    counted(*limit, "socket of this tenant is", "sockets of this tenant are")
)]
pub struct SocketsExceeded {
    pub limit: u32,
}

#[derive(Debug)]
struct State {
    limits: Limits,
    /// Requests in the bucket, in parts.
    requests: f64,
    filled: Instant,
    turns: u32,
    sockets: u32,
}

/// What one tenant has asked for, and may.
#[derive(Debug)]
pub struct Quota {
    state: Mutex<State>,
}

/// A turn's leave to run; dropping it says that the turn is over.
#[derive(Debug)]
pub struct TurnPermit {
    quota: Arc<Quota>,
}

impl Drop for TurnPermit {
    fn drop(&mut self) {
        self.quota.state.lock().turns -= 1;
    }
}

/// A socket's leave to be open; dropping it says that it is closed.
#[derive(Debug)]
pub struct SocketPermit {
    quota: Arc<Quota>,
}

impl Drop for SocketPermit {
    fn drop(&mut self) {
        self.quota.state.lock().sockets -= 1;
    }
}

impl Quota {
    pub fn new(limits: Limits, now: Instant) -> Self {
        let requests = limits.requests_per_minute.map_or(0.0, f64::from);
        Self { state: Mutex::new(State { limits, requests, filled: now, turns: 0, sockets: 0 }) }
    }

    /// Sets the limits from now on. What is used stays used: no edit gives a minute's requests anew.
    pub fn set_limits(&self, limits: Limits, now: Instant) {
        let mut state = self.state.lock();
        state.fill(now);
        let (before, after) = (state.limits.requests_per_minute, limits.requests_per_minute);
        state.requests = match (before, after) {
            (Some(before), Some(after)) => (state.requests + f64::from(after) - f64::from(before)).max(0.0),
            (None, Some(after)) => f64::from(after),
            (_, None) => 0.0,
        };
        state.limits = limits;
    }

    /// Takes one request; `None` if the tenant has no such limit.
    pub fn take_request(&self, now: Instant) -> Result<Option<RequestsLeft>, RateExceeded> {
        let mut state = self.state.lock();
        let Some(limit) = state.limits.requests_per_minute else { return Ok(None) };
        state.fill(now);
        if state.requests >= 1.0 {
            state.requests -= 1.0;
            return Ok(Some(state.left(limit)));
        }
        let missing = 1.0 - state.requests;
        let retry_after = (limit > 0).then(|| MINUTE.mul_f64(missing / f64::from(limit)));
        Err(RateExceeded { left: state.left(limit), retry_after })
    }

    /// Lets a turn begin, if the tenant has room for one more.
    pub fn begin_turn(self: &Arc<Self>) -> Result<TurnPermit, TurnsExceeded> {
        let mut state = self.state.lock();
        let limit = state.limits.concurrent_turns;
        if state.turns >= limit {
            return Err(TurnsExceeded { limit });
        }
        state.turns += 1;
        Ok(TurnPermit { quota: Arc::clone(self) })
    }

    /// Lets a socket open, if the tenant has room for one more.
    pub fn open_socket(self: &Arc<Self>) -> Result<SocketPermit, SocketsExceeded> {
        let mut state = self.state.lock();
        let limit = state.limits.sockets;
        if state.sockets >= limit {
            return Err(SocketsExceeded { limit });
        }
        state.sockets += 1;
        Ok(SocketPermit { quota: Arc::clone(self) })
    }
}

impl State {
    fn fill(&mut self, now: Instant) {
        let Some(limit) = self.limits.requests_per_minute.map(f64::from) else { return };
        let minutes = now.saturating_duration_since(self.filled).as_secs_f64() / MINUTE.as_secs_f64();
        self.requests = (self.requests + minutes * limit).min(limit);
        self.filled = now;
    }

    fn left(&self, limit: u32) -> RequestsLeft {
        let missing = f64::from(limit) - self.requests;
        let reset = if limit > 0 { MINUTE.mul_f64(missing / f64::from(limit)) } else { Duration::ZERO };
        RequestsLeft { limit, remaining: self.requests as u32, reset }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(requests_per_minute: Option<u32>, concurrent_turns: u32) -> Limits {
        Limits { requests_per_minute, concurrent_turns, sockets: 1 }
    }

    #[test]
    fn a_minutes_requests_may_come_at_once_and_then_evenly() {
        let start = Instant::now();
        let quota = Quota::new(limits(Some(60), 1), start);
        for left in (0..60).rev() {
            assert_eq!(quota.take_request(start).unwrap().unwrap().remaining, left);
        }
        let refused = quota.take_request(start).unwrap_err();
        assert_eq!((refused.retry_after, refused.left.reset), (Some(Duration::from_secs(1)), MINUTE));
        // The wait that was told is the wait that is needed.
        assert!(quota.take_request(start + Duration::from_millis(990)).is_err());
        assert!(quota.take_request(start + Duration::from_millis(1001)).is_ok());
        assert!(quota.take_request(start + Duration::from_millis(1002)).is_err());
    }

    #[test]
    fn no_limit_counts_nothing_and_0_allows_nothing() {
        let start = Instant::now();
        assert_eq!(Quota::new(limits(None, 1), start).take_request(start), Ok(None));
        let none = Quota::new(limits(Some(0), 0), start);
        assert_eq!(none.take_request(start + MINUTE).unwrap_err().retry_after, None);
        assert_eq!(Arc::new(none).begin_turn().unwrap_err(), TurnsExceeded { limit: 0 });
    }

    #[test]
    fn an_edit_of_the_limit_gives_no_minute_anew() {
        let start = Instant::now();
        let quota = Quota::new(limits(Some(10), 1), start);
        (0..10).for_each(|_| assert!(quota.take_request(start).is_ok()));
        quota.set_limits(limits(Some(10), 1), start);
        assert!(quota.take_request(start).is_err());
        quota.set_limits(limits(Some(12), 1), start);
        assert_eq!(quota.take_request(start).unwrap().unwrap().remaining, 1);
    }

    #[test]
    fn a_turn_that_is_over_makes_room_for_another() {
        let quota = Arc::new(Quota::new(limits(None, 2), Instant::now()));
        let (first, _second) = (quota.begin_turn().unwrap(), quota.begin_turn().unwrap());
        assert_eq!(quota.begin_turn().unwrap_err().limit, 2);
        drop(first);
        assert!(quota.begin_turn().is_ok());
    }

    #[test]
    fn a_socket_that_is_closed_makes_room_for_another() {
        let quota = Arc::new(Quota::new(limits(None, 0), Instant::now()));
        let first = quota.open_socket().unwrap();
        assert_eq!(quota.open_socket().unwrap_err(), SocketsExceeded { limit: 1 });
        drop(first);
        assert!(quota.open_socket().is_ok());
    }
}
