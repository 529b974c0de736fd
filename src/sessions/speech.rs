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
pub struct Said {
    /// All tokens, control and cut ones included: what the KV holds.
    pub tokens: Vec<LogToken>,
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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::engine::Logprob;
    use crate::sessions::fixtures::{language, token, tokens_of};

    fn run(stops: &[String], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut finder = StopFinder::new(stops.to_vec());
        let mut texts = Vec::new();
        for piece in pieces {
            let released = finder.push(piece);
            texts.push(released.text);
            if released.stopped {
                return (texts, true);
            }
        }
        texts.push(finder.finish());
        (texts, false)
    }

    #[test]
    fn a_stop_string_over_three_pieces_is_never_shown() {
        let (texts, stopped) = run(&["</end>".into()], &["well </", "en", "d> more"]);
        assert_eq!(texts, ["well ", "", ""]);
        assert!(stopped);
    }

    #[test]
    fn what_only_looked_like_a_stop_string_is_said_after_all() {
        let (texts, stopped) = run(&["abcd".into()], &["xab", "ca", "bc"]);
        assert_eq!(texts, ["x", "abc", "", "abc"]);
        assert!(!stopped);
    }

    /// The text before the stop string that completes first, found the slow way.
    fn cut(text: &str, stops: &[String]) -> (String, bool) {
        for end in (0..=text.len()).filter(|end| text.is_char_boundary(*end)) {
            let matched =
                stops.iter().filter(|stop| text[..end].ends_with(stop.as_str())).max_by_key(|stop| stop.len());
            if let Some(stop) = matched {
                return (text[..end - stop.len()].into(), true);
            }
        }
        (text.into(), false)
    }

    proptest! {
        #[test]
        fn the_cut_does_not_depend_on_how_the_text_is_split(
            pieces in vec("[abé]{0,3}", 0..12),
            stops in vec("[abé]{1,4}", 0..4),
        ) {
            let whole = pieces.concat();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (texts, stopped) = run(&stops, &pieces);
            prop_assert_eq!((texts.concat(), stopped), cut(&whole, &stops));
        }

        #[test]
        fn deltas_add_up_to_the_answer_and_logprobs_to_its_tokens(text in "[ab😀é<]{0,12}", stop in "[ab😀]{1,3}") {
            let language = language();
            let mut speech = Speech::new(vec![stop]);
            let (mut shown, mut logprobs, mut stopped) = (String::new(), Vec::new(), false);
            for id in tokens_of(&language, &text) {
                let logprob = Some(Logprob { logprob: -1.0, top: vec![(id, -1.0)] });
                let delta = speech.push(&language, Token { id, logprob });
                shown += &delta.text;
                logprobs.extend(delta.logprobs);
                stopped = delta.stopped;
                if stopped {
                    break;
                }
            }
            let said = if stopped {
                speech.stopped()
            } else {
                let (last, said) = speech.finish();
                shown += &last.text;
                logprobs.extend(last.logprobs);
                said
            };
            prop_assert_eq!(&shown, &said.text);
            prop_assert_eq!(&logprobs, &said.logprobs);
            let joined: Vec<u8> = logprobs.iter().flat_map(|entry| entry.bytes.clone()).collect();
            prop_assert_eq!(joined, said.text.as_bytes());
        }
    }

    #[test]
    fn a_character_of_several_tokens_is_shown_whole() {
        let language = language();
        let mut speech = Speech::new(Vec::new());
        let deltas: Vec<String> =
            tokens_of(&language, "a😀").into_iter().map(|id| speech.push(&language, token(id)).text).collect();
        assert_eq!(deltas, ["a", "", "", "", "😀"]);
    }

    #[test]
    fn an_answer_cut_inside_a_character_ends_with_a_replacement() {
        let language = language();
        let mut speech = Speech::new(Vec::new());
        for id in tokens_of(&language, "a😀").into_iter().take(3) {
            speech.push(&language, token(id));
        }
        let (last, said) = speech.finish();
        assert_eq!((last.text.as_str(), said.text.as_str()), ("\u{FFFD}", "a\u{FFFD}"));
        assert_eq!(said.tokens.len(), 3);
    }

    #[test]
    fn control_tokens_are_kept_and_not_shown() {
        let language = language();
        let mut speech = Speech::new(Vec::new());
        let stop = language.stop_tokens()[0];
        assert_eq!(speech.push(&language, token(stop)), Delta::default());
        let (_, said) = speech.finish();
        assert_eq!((said.text.as_str(), said.tokens.len()), ("", 1));
    }
}
