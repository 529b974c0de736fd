//! How do pages hear of what happens?
//!
//! Events with numbers that rise by one, in a ring for those who come back, and a bounded channel for each who listens. Who
//! reads too slowly is closed with a word and starts anew; nobody is waited for.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// Events that are kept for those who come back.
const RING: usize = 4096;
/// Events that wait for one listener.
const ROOM: usize = 64;
/// So long after the last listener has gone events are made for its return.
const LINGER: Duration = Duration::from_secs(60);
/// Most listeners of one login: a browser has six connections to a server.
const STREAMS: usize = 4;

/// An event as it goes over the wire.
type Text = std::sync::Arc<str>;

struct Listener {
    login: u64,
    channel: mpsc::Sender<Text>,
    watches: Option<String>,
}

struct State {
    seq: u64,
    ring: VecDeque<(u64, Text)>,
    listeners: Vec<Listener>,
    last_seen: Option<Instant>,
}

/// The stream of one process.
pub struct Events {
    boot: String,
    state: Mutex<State>,
}

/// Why nobody is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

impl Events {
    pub fn new(boot: String) -> Self {
        let state = State { seq: 0, ring: VecDeque::new(), listeners: Vec::new(), last_seen: None };
        Self { boot, state: Mutex::new(state) }
    }

    /// Names the process whose numbers these are.
    pub fn boot(&self) -> &str {
        &self.boot
    }

    /// The number of the newest event.
    pub fn seq(&self) -> u64 {
        self.state.lock().seq
    }

    /// Whether somebody listens, or has a moment ago.
    pub fn is_heard(&self) -> bool {
        let state = self.state.lock();
        !state.listeners.is_empty() || state.last_seen.is_some_and(|at| at.elapsed() < LINGER)
    }

    /// Conversations that listeners want to hear of by themselves.
    pub fn watched(&self) -> Vec<String> {
        self.state.lock().listeners.iter().filter_map(|listener| listener.watches.clone()).collect()
    }

    /// Sends an event to everybody, under the next number, which it returns.
    pub fn send(&self, name: &str, mut data: Value) -> u64 {
        let mut state = self.state.lock();
        state.seq += 1;
        let seq = state.seq;
        if let Value::Object(fields) = &mut data {
            fields.insert("seq".into(), seq.into());
        }
        let text: Text = format!("event: {name}\nid: {seq}\ndata: {data}\n\n").into();
        if state.ring.len() == RING {
            state.ring.pop_front();
        }
        state.ring.push_back((seq, Text::clone(&text)));
        state.tell(|_| true, &text);
        seq
    }

    /// Counts an event that nobody hears: whoever comes back later starts anew.
    pub fn pass(&self) {
        let mut state = self.state.lock();
        state.seq += 1;
        state.ring.clear();
    }

    /// Tells those who watch a conversation about it. It has no number: whoever comes back asks for it anyway.
    pub fn send_to_watchers(&self, id: &str, data: &Value) {
        let text: Text = format!("event: session\ndata: {data}\n\n").into();
        self.state.lock().tell(|listener| listener.watches.as_deref() == Some(id), &text);
    }

    /// Lets a listener in: what it hears at once, and then. It begins behind `after`, if that is in the ring; else with a
    /// reset.
    pub fn listen(
        &self,
        login: u64,
        boot: Option<&str>,
        after: Option<u64>,
        watches: Option<String>,
        hz: u32,
    ) -> Result<(Vec<Text>, mpsc::Receiver<Text>), TooMany> {
        let mut state = self.state.lock();
        state.listeners.retain(|listener| !listener.channel.is_closed());
        if state.listeners.iter().filter(|listener| listener.login == login).count() >= STREAMS {
            return Err(TooMany);
        }
        // And one place for the last word.
        let (channel, reader) = mpsc::channel(ROOM + 1);
        let (seq, first) = (state.seq, state.ring.front().map_or(state.seq + 1, |(seq, _)| *seq));
        let is_ours = boot.is_none_or(|boot| boot == self.boot);
        let from = after.filter(|after| is_ours && *after <= seq && *after + 1 >= first);
        let start = from.unwrap_or(seq);
        let hello = json!({"boot": self.boot, "seq": start, "hz": hz});
        let mut texts = vec![Text::from(format!("event: hello\nid: {start}\ndata: {hello}\n\n"))];
        if after.is_some() && from.is_none() {
            texts.push(reset("the events since then are not there any more", seq));
        }
        texts.extend(state.ring.iter().filter(|(seq, _)| *seq > start).map(|(_, text)| Text::clone(text)));
        state.listeners.push(Listener { login, channel, watches });
        state.last_seen = Some(Instant::now());
        Ok((texts, reader))
    }

    /// Says to everybody that the server ends.
    pub fn say_goodbye(&self, why: &str) {
        let text: Text = format!("event: bye\ndata: {}\n\n", json!({"why": why})).into();
        let mut state = self.state.lock();
        state.tell(|_| true, &text);
        state.listeners.clear();
    }
}

fn reset(why: &str, seq: u64) -> Text {
    format!("event: reset\ndata: {}\n\n", json!({"why": why, "seq": seq})).into()
}

impl State {
    /// Whoever has no room left is closed: it sees the end of its stream, and comes back.
    fn tell(&mut self, whom: impl Fn(&Listener) -> bool, text: &Text) {
        let (before, seq) = (self.listeners.len(), self.seq);
        self.listeners.retain(|listener| {
            if !whom(listener) {
                return !listener.channel.is_closed();
            }
            if listener.channel.capacity() <= 1 {
                // Only one that has gone away can't be told any more.
                drop(listener.channel.try_send(reset("you read too slowly", seq)));
                return false;
            }
            listener.channel.try_send(Text::clone(text)).is_ok()
        });
        if before > 0 {
            self.last_seen = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Reader = (Vec<Text>, mpsc::Receiver<Text>);

    fn read((first, reader): &mut Reader) -> Vec<String> {
        let then = std::iter::from_fn(|| reader.try_recv().ok());
        first.drain(..).chain(then).map(|text| text.lines().next().unwrap()[7..].to_owned()).collect()
    }

    #[test]
    fn whoever_comes_back_in_time_misses_nothing_and_later_is_told_to_start_anew() {
        let events = Events::new("b1".into());
        let mut first = events.listen(1, None, None, None, 4).unwrap();
        assert_eq!(read(&mut first), ["hello"]);
        for _ in 0..10 {
            events.send("tick", json!({}));
        }
        assert_eq!(read(&mut first).len(), 10);
        let mut back = events.listen(1, Some("b1"), Some(7), None, 4).unwrap();
        assert_eq!(read(&mut back), ["hello", "tick", "tick", "tick"]);
        for _ in 0..RING {
            events.send("tick", json!({}));
        }
        let mut late = events.listen(2, Some("b1"), Some(7), None, 4).unwrap();
        assert_eq!(read(&mut late), ["hello", "reset"]);
        let mut other = events.listen(2, Some("b0"), Some(4000), None, 4).unwrap();
        assert_eq!(read(&mut other), ["hello", "reset"]);
    }

    #[test]
    fn what_nobody_heard_has_numbers_all_the_same() {
        let events = Events::new("b1".into());
        events.send("tick", json!({}));
        events.pass();
        assert_eq!(events.seq(), 2);
        let mut reader = events.listen(1, None, Some(1), None, 4).unwrap();
        assert_eq!(read(&mut reader), ["hello", "reset"]);
        let mut reader = events.listen(1, None, Some(2), None, 4).unwrap();
        assert_eq!(read(&mut reader), ["hello"]);
    }

    #[test]
    fn a_slow_reader_is_closed_and_the_others_go_on() {
        let events = Events::new("b1".into());
        let mut slow = events.listen(1, None, None, None, 4).unwrap();
        let mut quick = events.listen(1, None, None, None, 4).unwrap();
        for _ in 0..ROOM + 5 {
            events.send("tick", json!({}));
            read(&mut quick);
        }
        let heard = read(&mut slow);
        assert_eq!((heard.len() < ROOM + 5, heard.last().unwrap().as_str()), (true, "reset"));
        events.send("tick", json!({}));
        assert_eq!((read(&mut quick), read(&mut slow).len()), (vec!["tick".to_owned()], 0));
    }

    #[test]
    fn a_login_has_four_streams_and_no_more() {
        let events = Events::new("b1".into());
        let kept: Vec<_> = (0..STREAMS).map(|_| events.listen(1, None, None, None, 4).unwrap()).collect();
        assert!(events.listen(1, None, None, None, 4).is_err());
        assert!(events.listen(2, None, None, None, 4).is_ok());
        drop(kept);
        assert!(events.listen(1, None, None, None, 4).is_ok());
    }

    #[test]
    fn only_watchers_hear_of_a_conversation() {
        let events = Events::new("b1".into());
        let mut watcher = events.listen(1, None, None, Some("conv_1".into()), 4).unwrap();
        let mut other = events.listen(1, None, None, None, 4).unwrap();
        events.send_to_watchers("conv_1", &json!({}));
        assert_eq!(
            (read(&mut watcher), read(&mut other)),
            (vec!["hello".into(), "session".into()], vec!["hello".into()])
        );
        assert_eq!(events.watched(), ["conv_1"]);
    }
}
