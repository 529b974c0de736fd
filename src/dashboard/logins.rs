//! Who is logged in?
//!
//! A login is 128 random bits, of which only the hash is kept, for twelve hours, or until nobody has used it for one. Tries
//! with wrong keys are counted by address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::tenants::key::KeyHash;

const LASTS: Duration = Duration::from_secs(12 * 3600);
const IDLE: Duration = Duration::from_secs(3600);
/// Wrong keys from one address in a minute.
const TRIES: usize = 5;
const MINUTE: Duration = Duration::from_secs(60);
/// Most logins, and most addresses that are remembered.
const MOST: usize = 10_000;

/// Somebody who may look, and perhaps act.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Actor {
    /// Names the key, not its bearer: the beginning of its hash.
    pub name: String,
    /// Of this login, in this process.
    pub login: u64,
    /// What a page must send along with what it asks to be done; `None`: a script with the key itself.
    pub csrf: Option<String>,
}

struct Login {
    actor: Actor,
    since: Instant,
    used: Instant,
}

#[derive(Default)]
struct State {
    logins: HashMap<[u8; 32], Login>,
    failures: HashMap<IpAddr, Vec<Instant>>,
    next: u64,
}

#[derive(Default)]
pub struct Logins(Mutex<State>);

impl Logins {
    /// How long an address has to wait before its next try, if it has to.
    pub fn must_wait(&self, address: IpAddr, now: Instant) -> Option<Duration> {
        let mut state = self.0.lock();
        let failures = state.failures.get_mut(&address)?;
        failures.retain(|at| now.duration_since(*at) < MINUTE);
        let oldest = failures.first().filter(|_| failures.len() >= TRIES)?;
        Some(MINUTE.saturating_sub(now.duration_since(*oldest)))
    }

    /// Notes a wrong key.
    pub fn note_failure(&self, address: IpAddr, now: Instant) {
        let mut state = self.0.lock();
        if state.failures.len() >= MOST {
            state.failures.retain(|_, failures| failures.iter().any(|at| now.duration_since(*at) < MINUTE));
        }
        state.failures.entry(address).or_default().push(now);
    }

    /// Logs somebody in who has the right key: the secret of the cookie.
    pub fn begin(&self, key: &str, address: IpAddr, now: Instant) -> String {
        let secret = format!("{:032x}", rand::random::<u128>());
        let mut state = self.0.lock();
        state.failures.remove(&address);
        state.logins.retain(|_, login| login.is_valid(now));
        if state.logins.len() >= MOST {
            let oldest = state.logins.iter().min_by_key(|(_, login)| login.used).map(|(hash, _)| *hash);
            oldest.map(|hash| state.logins.remove(&hash));
        }
        state.next += 1;
        let csrf = Some(format!("{:032x}", rand::random::<u128>()));
        let actor = Actor { name: actor_name(key), login: state.next, csrf };
        state.logins.insert(KeyHash::of(&secret).0, Login { actor, since: now, used: now });
        secret
    }

    /// Whose cookie this is.
    pub fn find(&self, secret: &str, now: Instant) -> Option<Actor> {
        let mut state = self.0.lock();
        // A look-up by a hash says nothing of the secret.
        let hash = KeyHash::of(secret).0;
        let login = state.logins.get_mut(&hash)?;
        if !login.is_valid(now) {
            state.logins.remove(&hash);
            return None;
        }
        login.used = now;
        Some(login.actor.clone())
    }

    pub fn end(&self, secret: &str) {
        self.0.lock().logins.remove(&KeyHash::of(secret).0);
    }
}

impl Login {
    fn is_valid(&self, now: Instant) -> bool {
        now.duration_since(self.since) < LASTS && now.duration_since(self.used) < IDLE
    }
}

/// How the journal and the log name a key.
pub fn actor_name(key: &str) -> String {
    format!("admin-{}", KeyHash::of(key).hex().chars().take(8).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[test]
    fn a_login_ends_after_an_hour_of_silence_after_twelve_or_when_it_is_ended() {
        let (logins, start) = (Logins::default(), Instant::now());
        let after = |minutes: u64| start + Duration::from_secs(60 * minutes);
        let secret = logins.begin("key", HOME, start);
        let actor = logins.find(&secret, after(59)).unwrap();
        assert!(actor.name.starts_with("admin-") && actor.name.len() == 14 && actor.csrf.is_some());
        assert_eq!(logins.find(&secret, after(59 + 60)), None);
        let secret = logins.begin("key", HOME, start);
        for hour in 1..=14 {
            assert_eq!(logins.find(&secret, after(50 * hour)).is_some(), hour <= 14, "{hour}");
        }
        assert_eq!(logins.find(&secret, after(50 * 15)), None);
        let secret = logins.begin("key", HOME, start);
        logins.end(&secret);
        assert_eq!(logins.find(&secret, start), None);
        assert_eq!(logins.find("", start), None);
    }

    #[test]
    fn after_five_wrong_keys_an_address_waits_and_a_right_one_clears_it() {
        let (logins, start) = (Logins::default(), Instant::now());
        for second in 0..5 {
            assert_eq!(logins.must_wait(HOME, start), None);
            logins.note_failure(HOME, start + Duration::from_secs(second));
        }
        let at = start + Duration::from_secs(10);
        assert_eq!(logins.must_wait(HOME, at), Some(Duration::from_secs(50)));
        assert_eq!(logins.must_wait("10.0.0.1".parse().unwrap(), at), None);
        assert_eq!(logins.must_wait(HOME, start + Duration::from_secs(61)), None);
        logins.begin("key", HOME, at);
        assert_eq!(logins.must_wait(HOME, at), None);
    }
}
