//! What of the generated tokens may the client see, and where does the answer end?
//!
//! Bytes become whole characters; text that may still turn into a stop string is held back; control tokens are silent.
//! Invariant: the deltas add up to the answer's text, however the tokens fall. The stop string that completes first wins,
//! so the cut doesn't depend on how the text was split.

use crate::engine::{Language, TextDecoder, Token};
use crate::store::LogToken;

use super::messages::TokenLogprob;

/// Finds the first stop string in a text that comes in pieces.
#[derive(Debug, Default)]
pub(super) struct StopFinder {
    stops: Vec<String>,
    held: String,
}

/// What a piece of text released, and whether a stop string ended it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Released {
    pub text: String,
    pub stopped: bool,
}

impl StopFinder {
    /// Empty strings never match.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self { stops, held: String::new() }
    }

    /// Takes the next piece. After a match there is no more to come.
    pub fn push(&mut self, piece: &str) -> Released {
        self.held.push_str(piece);
        let matches = self.stops.iter().filter_map(|stop| self.held.find(stop).map(|at| (at + stop.len(), at)));
        if let Some((_, at)) = matches.min() {
            self.held.truncate(at);
            return Released { text: std::mem::take(&mut self.held), stopped: true };
        }
        let rest = self.held.split_off(self.held.len() - self.undecided());
        Released { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The text held back, which no stop string will come out of any more.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of `held` that may still become a stop string.
    fn undecided(&self) -> usize {
        let begun = |stop: &String| {
            let mut ends = stop.char_indices().rev().map(|(at, _)| at);
            ends.find(|&at| self.held.ends_with(&stop[..at])).unwrap_or(0)
        };
        self.stops.iter().map(begun).max().unwrap_or(0)
    }
}

/// An answer as it grows.
pub(super) struct Speech {
    decoder: TextDecoder,
    stops: StopFinder,
    said: Said,
    /// Bytes of text decoded so far, held back or not.
    decoded: usize,
    /// Log probabilities of tokens whose text is held back, with where their text begins.
    held: Vec<(usize, TokenLogprob)>,
}

/// What was generated, and what of it is the answer's text.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Said {
    /// All tokens, control and cut ones included: what the KV holds.
    pub tokens: Vec<LogToken>,
    /// The bytes that `tokens` stand for.
    pub bytes: Vec<u8>,
    pub text: String,
    pub logprobs: Vec<TokenLogprob>,
}

/// What a token added to what the client sees.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Delta {
    pub text: String,
    pub logprobs: Vec<TokenLogprob>,
    pub stopped: bool,
}

impl Speech {
    pub fn new(stops: Vec<String>) -> Self {
        Self {
            decoder: TextDecoder::default(),
            stops: StopFinder::new(stops),
            said: Said::default(),
            decoded: 0,
            held: Vec::new(),
        }
    }

    /// Takes the next token. After `stopped` no more may come.
    pub fn push(&mut self, language: &Language, token: Token) -> Delta {
        let bytes = language.token_bytes(token.id);
        let length = u16::try_from(bytes.len()).expect("a longer token is refused when the model is loaded");
        self.said.tokens.push(LogToken { id: token.id, bytes: length });
        self.said.bytes.extend_from_slice(bytes);
        if language.is_control(token.id) {
            return Delta::default();
        }
        if let Some(logprob) = token.logprob {
            let top = logprob.top.into_iter().map(|(id, value)| (id, language.token_bytes(id).to_vec(), value));
            let shown =
                TokenLogprob { token: token.id, bytes: bytes.to_vec(), logprob: logprob.logprob, top: top.collect() };
            self.held.push((self.decoded, shown));
        }
        let text = self.decoder.push(bytes);
        self.release(&text)
    }

    /// Ends the answer where it is: what was held back is said, unless it ends in a stop string after all.
    pub fn finish(mut self) -> (Delta, Said) {
        let text = self.decoder.finish();
        let mut last = self.release(&text);
        if !last.stopped {
            let held = self.stops.finish();
            self.said.text.push_str(&held);
            last.text.push_str(&held);
            self.show(usize::MAX, &mut last);
        }
        (last, self.said)
    }

    /// What was said, when a stop string has ended it.
    pub fn stopped(self) -> Said {
        self.said
    }

    fn release(&mut self, text: &str) -> Delta {
        self.decoded += text.len();
        let released = self.stops.push(text);
        self.said.text.push_str(&released.text);
        let mut delta = Delta { text: released.text, logprobs: Vec::new(), stopped: released.stopped };
        self.show(self.said.text.len(), &mut delta);
        delta
    }

    /// Gives a delta the log probabilities of the tokens that begin before `shown`. One that begins in the cut goes nowhere.
    fn show(&mut self, shown: usize, delta: &mut Delta) {
        let ready = self.held.iter().take_while(|(begins, _)| *begins < shown).count();
        for (_, logprob) in self.held.drain(..ready) {
            self.said.logprobs.push(logprob.clone());
            delta.logprobs.push(logprob);
        }
    }
}
