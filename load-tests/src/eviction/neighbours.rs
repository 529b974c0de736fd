//! What do bad neighbours do to a trace?
//!
//! One more tenant from a fifth of the time on: one that scans asks once in each conversation, one that hogs has 40 endless
//! ones of the longest kind. Drawn by a fixed seed.

use rekindle::engine::replay::trace::{End, Request, Trace};
use rekindle::types::{KvKey, TenantId, Tick, TokenCount};

/// Tokens of an answer, and of what a hog says.
const SAID: u32 = 64;
const HOGGED: u64 = 40;

/// SplitMix64 (Steele et al., OOPSLA '14).
struct Luck(u64);

impl Luck {
    /// From 0 to 1.
    fn draw(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// One that comes beside the trace's own: a request, and which of these it follows.
type Added = (Request, Option<usize>);

struct Frame {
    tenant: TenantId,
    first_key: u128,
    begins: u64,
    ends: u64,
}

/// As many prompts as 0.8 of all requests, of median length, each asked once.
pub fn with_scan(trace: &Trace) -> Trace {
    let (frame, mut luck) = (frame(trace), Luck(3));
    let prompt = prompt_of(trace, 0.5);
    let count = trace.requests.len() as u128 * 4 / 5;
    let added = (0..count).map(|number| {
        let at = frame.begins + (luck.draw() * (frame.ends - frame.begins) as f64) as u64;
        (turn(&frame, at, number, 1, prompt), None)
    });
    merged(trace, added.collect())
}

/// 40 conversations of the 99th percentile's length that go on for ever, a turn each minute or so, slower in a long trace.
pub fn with_hog(trace: &Trace) -> Trace {
    let (frame, mut luck) = (frame(trace), Luck(4));
    let first = prompt_of(trace, 0.99);
    let span_us =
        trace.requests.last().map_or(0, |last| last.at.0) - trace.requests.first().map_or(0, |first| first.at.0);
    let slower = (span_us as f64 / 3.6e9).max(1.0);
    let mut added: Vec<Added> = Vec::new();
    for conversation in 0..HOGGED {
        let mut at = frame.begins + (luck.draw() * 60e6) as u64;
        let (mut history, mut before, mut number) = (TokenCount(0), None, 1);
        while at < frame.ends {
            let prompt = if number == 1 { first } else { TokenCount(history.0 + SAID) };
            added.push((turn(&frame, at, conversation.into(), number, prompt), before));
            (history, before) = (TokenCount(prompt.0 + SAID), Some(added.len() - 1));
            number += 1;
            at += ((30e6 + luck.draw() * 60e6) * slower) as u64;
        }
    }
    merged(trace, added)
}

fn frame(trace: &Trace) -> Frame {
    let (first, last) = (trace.requests.first(), trace.requests.last());
    let (first, ends) = (first.map_or(0, |first| first.at.0), last.map_or(0, |last| last.at.0));
    Frame {
        tenant: TenantId(trace.requests.iter().map(|request| request.tenant.0).max().unwrap_or(0) + 1),
        first_key: trace.requests.iter().map(|request| request.conversation.0).max().unwrap_or(0) + 1,
        begins: first + (ends - first) / 5,
        ends,
    }
}

fn prompt_of(trace: &Trace, rank: f64) -> TokenCount {
    let mut prompts: Vec<TokenCount> = trace.requests.iter().map(|request| request.prompt).collect();
    prompts.sort_unstable();
    prompts.get((prompts.len() as f64 * rank) as usize).copied().unwrap_or_default()
}

fn turn(frame: &Frame, at: u64, conversation: u128, turn: u32, prompt: TokenCount) -> Request {
    Request {
        at: Tick(at),
        tenant: frame.tenant,
        conversation: KvKey(frame.first_key + conversation),
        turn,
        prompt,
        answer: TokenCount(SAID),
        follows: None,
        end: End::Other,
    }
}

/// Both in the order of time, each following what it followed.
fn merged(trace: &Trace, added: Vec<Added>) -> Trace {
    let own = trace.requests.len();
    let follows = |number: usize| match number.checked_sub(own) {
        None => trace.requests[number].follows,
        Some(index) => added[index].1.map(|before| {
            let shared = added[before].0.sequence();
            (own + before, shared)
        }),
    };
    let request =
        |number: usize| number.checked_sub(own).map_or_else(|| trace.requests[number], |index| added[index].0);
    let mut order: Vec<usize> = (0..own + added.len()).collect();
    order.sort_by_key(|number| request(*number).at);
    let mut places = vec![0; order.len()];
    order.iter().enumerate().for_each(|(place, number)| places[*number] = place);
    let requests = order.into_iter().map(|number| {
        let follows = follows(number).map(|(before, shared)| (places[before], shared));
        Request { follows, ..request(number) }
    });
    Trace { requests: requests.collect(), ..Trace::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_is_another_tenants_and_everyone_follows_whom_they_followed() {
        let lines: String = (0..100)
            .map(|n| format!("{},0,{},1,100,20,{},{},e\n", n * 60_000, n, n as i64 - 1, if n > 0 { 64 } else { 0 }))
            .collect();
        let trace = Trace::read(format!("t,tenant,conv,turn,in,out,ref,shared,stop\n{lines}").as_bytes()).unwrap();
        for (crowd, least) in [(with_scan(&trace), 180), (with_hog(&trace), 1000)] {
            assert!(crowd.requests.len() >= least, "{}", crowd.requests.len());
            assert!(crowd.requests.is_sorted_by_key(|request| request.at));
            for (number, request) in crowd.requests.iter().enumerate() {
                let Some((before, shared)) = request.follows else { continue };
                assert!(before < number && crowd.requests[before].tenant == request.tenant);
                assert!(shared <= crowd.requests[before].sequence());
            }
        }
    }
}
