//! In which JSON does a response lie in the store?
//!
//! What it was asked with, which items are its input, and how it ended. Its text is its item's alone, so that it goes with
//! it. The shape is ours to read for as long as data lives: a field may be added, with a default; none changes its meaning.

#![deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use serde::{Deserialize, Serialize};

use super::messages::{
    FinishReason, Goal, NewResponse, ResponseId, TokenLogprob, TurnDone, TurnError, TurnUpdate, TurnUsage,
};
use super::stream::{Cut, Stop};
use super::unix_now;
use crate::engine::PromptUsage;
use crate::store::ResponseRecord;
use crate::types::{TokenCount, TokenId};

/// A retry comes within this time, and what only retries look for is forgotten then.
pub(super) const RETRY_WINDOW_S: i64 = 600;

/// A response as sessions know it, and its row.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    record: ResponseRecord,
    pub body: Body,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Body {
    pub about: String,
    /// The items of its own input.
    pub input: Vec<String>,
    /// The newest item when it ended, or when it began: what is said next comes behind it.
    pub tip: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<End>,
}

/// How a turn ended. None: it runs, or the server went down under it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum End {
    Done(Done),
    Failed { kind: Failure, message: String },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Done {
    finish: Finish,
    /// Its readers went away.
    #[serde(default)]
    pub abandoned: bool,
    #[serde(default)]
    encode_only: bool,
    item_id: String,
    prompt_tokens: u32,
    usage: Usage,
    dropped_items: usize,
    ended_at: i64,
    /// Where the deltas ended: bytes of text, log probabilities.
    cuts: Vec<(usize, usize)>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Finish {
    Stop,
    Length,
    Cancelled,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Failure {
    Overloaded,
    QueueTimeout,
    Store,
    Internal,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Usage {
    resident: u32,
    shared: u32,
    reloaded_host: u32,
    #[serde(default)]
    reloaded_disk: u32,
    encoded: u32,
    reencoded: u32,
    queue_ms: u64,
    reload_ms: u64,
    prefill_ms: u64,
    generated: u32,
    ttft_ms: u64,
    decode_ms: u64,
}

#[derive(Serialize, Deserialize)]
struct Logprob {
    token: u32,
    bytes: Vec<u8>,
    logprob: f32,
    top: Vec<(u32, Vec<u8>, f32)>,
}

impl Kept {
    /// A response that begins now.
    pub fn new(asked: NewResponse, previous: Option<u128>, ttl_s: i64) -> Self {
        let created_at = unix_now();
        let record = ResponseRecord {
            id: asked.id.0,
            created_at,
            expires_at: created_at.saturating_add(if asked.kept { ttl_s } else { RETRY_WINDOW_S }),
            kept: asked.kept,
            request: asked.request,
            previous,
            body: String::new(),
            answer: None,
            logprobs: None,
        };
        Self { record, body: Body { about: asked.about, input: Vec::new(), tip: None, end: None } }
    }

    pub fn read(record: ResponseRecord) -> Result<Self, serde_json::Error> {
        let body = serde_json::from_str(&record.body)?;
        Ok(Self { record, body })
    }

    pub fn id(&self) -> ResponseId {
        ResponseId(self.record.id)
    }

    /// The digest of its request.
    pub fn request(&self) -> [u8; 32] {
        self.record.request
    }

    /// Whether it can be retrieved.
    pub fn is_kept(&self) -> bool {
        self.record.kept
    }

    /// The answer's item.
    pub fn answer(&self) -> Option<&str> {
        self.record.answer.as_deref()
    }

    /// The row as it is now.
    #[expect(clippy::expect_used, reason = "reads nothing from outside")]
    pub fn record(&self) -> ResponseRecord {
        let body = serde_json::to_string(&self.body).expect("strings, numbers and unit variants always serialise");
        ResponseRecord { body, ..self.record.clone() }
    }

    /// The row with its end. `item`: whether the answer is one.
    pub fn done(mut self, done: &TurnDone, cuts: &[Cut], stopped: Option<Stop>, item: bool) -> ResponseRecord {
        if item {
            self.record.answer = Some(done.item_id.clone());
            self.body.tip = Some(done.item_id.clone());
        }
        if !done.logprobs.is_empty() {
            self.record.logprobs = write_logprobs(&done.logprobs);
        }
        let PromptUsage {
            resident,
            shared,
            reloaded_host,
            reloaded_disk,
            encoded,
            reencoded,
            queue_ms,
            reload_ms,
            prefill_ms,
        } = done.usage.prompt;
        self.body.end = Some(End::Done(Done {
            finish: match done.finish {
                FinishReason::Stop => Finish::Stop,
                FinishReason::Length => Finish::Length,
                FinishReason::Cancelled => Finish::Cancelled,
            },
            abandoned: stopped == Some(Stop::Abandoned),
            encode_only: done.goal == Goal::Encode,
            item_id: done.item_id.clone(),
            prompt_tokens: done.prompt_tokens.0,
            usage: Usage {
                resident: resident.0,
                shared: shared.0,
                reloaded_host: reloaded_host.0,
                reloaded_disk: reloaded_disk.0,
                encoded: encoded.0,
                reencoded: reencoded.0,
                queue_ms,
                reload_ms,
                prefill_ms,
                generated: done.usage.generated.0,
                ttft_ms: done.usage.ttft_ms,
                decode_ms: done.usage.decode_ms,
            },
            dropped_items: done.dropped_items,
            ended_at: done.ended_at,
            cuts: cuts.iter().map(|cut| (cut.text, cut.logprobs)).collect(),
        }));
        self.record()
    }

    /// The row of a turn that failed.
    pub fn failed(mut self, error: &TurnError) -> ResponseRecord {
        let kind = match error {
            TurnError::Overloaded(_) | TurnError::TooManyTurns(_) | TurnError::Draining => Failure::Overloaded,
            TurnError::QueueTimeout(_) => Failure::QueueTimeout,
            TurnError::Store(_) => Failure::Store,
            TurnError::NoConversation
            | TurnError::NoPrevious
            | TurnError::TooManyItems { .. }
            | TurnError::Locked { .. }
            | TurnError::DuplicateItem(_)
            | TurnError::NothingToAnswer
            | TurnError::ContextLength { .. }
            | TurnError::Template(_)
            | TurnError::Lost(_)
            | TurnError::Internal(_) => Failure::Internal,
        };
        // What went wrong inside is for the log.
        let message = match kind {
            Failure::Store | Failure::Internal => "the server failed in this turn; its log says why".to_owned(),
            Failure::Overloaded | Failure::QueueTimeout => error.to_string(),
        };
        self.body.end = Some(End::Failed { kind, message });
        self.record()
    }

    /// How the turn ended, as its readers heard it; `text` is its item's. Where its deltas ended, and the item's id.
    pub fn told(&self, text: String) -> (String, TurnUpdate, Vec<Cut>) {
        let done = match &self.body.end {
            Some(End::Done(done)) => done,
            Some(End::Failed { kind, message }) => return (String::new(), failure(*kind, message), Vec::new()),
            None => {
                let message = "the server went down in the middle of this response";
                return (String::new(), failure(Failure::Internal, message), Vec::new());
            }
        };
        let usage = done.usage;
        let update = TurnUpdate::Done(TurnDone {
            text,
            finish: match done.finish {
                Finish::Stop => FinishReason::Stop,
                Finish::Length => FinishReason::Length,
                Finish::Cancelled => FinishReason::Cancelled,
            },
            prompt_tokens: TokenCount(done.prompt_tokens),
            usage: TurnUsage {
                prompt: PromptUsage {
                    resident: TokenCount(usage.resident),
                    shared: TokenCount(usage.shared),
                    reloaded_host: TokenCount(usage.reloaded_host),
                    reloaded_disk: TokenCount(usage.reloaded_disk),
                    encoded: TokenCount(usage.encoded),
                    reencoded: TokenCount(usage.reencoded),
                    queue_ms: usage.queue_ms,
                    reload_ms: usage.reload_ms,
                    prefill_ms: usage.prefill_ms,
                },
                generated: TokenCount(usage.generated),
                ttft_ms: usage.ttft_ms,
                decode_ms: usage.decode_ms,
            },
            item_id: done.item_id.clone(),
            logprobs: self.record.logprobs.as_deref().map(read_logprobs).unwrap_or_default(),
            goal: if done.encode_only { Goal::Encode } else { Goal::Answer },
            dropped_items: done.dropped_items,
            ended_at: done.ended_at,
        });
        let cuts = done.cuts.iter().map(|&(text, logprobs)| Cut { text, logprobs }).collect();
        (done.item_id.clone(), update, cuts)
    }
}

fn failure(kind: Failure, message: &str) -> TurnUpdate {
    let message = message.to_owned();
    TurnUpdate::Failed(match kind {
        Failure::Overloaded => TurnError::Overloaded(message),
        Failure::QueueTimeout => TurnError::QueueTimeout(message),
        Failure::Store | Failure::Internal => TurnError::Lost(message),
    })
}

fn write_logprobs(tokens: &[TokenLogprob]) -> Option<String> {
    let stored: Vec<_> = tokens
        .iter()
        .map(|token| Logprob {
            token: token.token.0,
            bytes: token.bytes.clone(),
            logprob: token.logprob,
            top: token.top.iter().map(|(id, bytes, logprob)| (id.0, bytes.clone(), *logprob)).collect(),
        })
        .collect();
    serde_json::to_string(&stored).ok()
}

/// What can't be read is as good as what was not asked for.
fn read_logprobs(stored: &str) -> Vec<TokenLogprob> {
    let stored: Vec<Logprob> = serde_json::from_str(stored).unwrap_or_default();
    let read = |Logprob { token, bytes, logprob, top }: Logprob| TokenLogprob {
        token: TokenId(token),
        bytes,
        logprob,
        top: top.into_iter().map(|(id, bytes, logprob)| (TokenId(id), bytes, logprob)).collect(),
    };
    stored.into_iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sessions::messages::ResponseId;

    fn kept() -> Kept {
        let asked =
            NewResponse { id: ResponseId(1), about: "{}".into(), kept: true, request: [1; 32], is_retry: false };
        Kept::new(asked, Some(7), 100)
    }

    #[test]
    fn a_response_comes_back_as_it_was_told() {
        let top = vec![(TokenId(4), b"lo".to_vec(), -0.5)];
        let logprobs = vec![TokenLogprob { token: TokenId(3), bytes: b"Hel".to_vec(), logprob: -0.25, top }];
        let mut usage = TurnUsage { generated: TokenCount(2), ttft_ms: 3, ..TurnUsage::default() };
        usage.prompt.resident = TokenCount(16);
        let done = TurnDone {
            text: "Hello".into(),
            finish: FinishReason::Length,
            prompt_tokens: TokenCount(20),
            usage,
            item_id: "msg_1".into(),
            logprobs,
            goal: Goal::Answer,
            dropped_items: 2,
            ended_at: 1_790_000_000,
        };
        let cuts = [Cut { text: 3, logprobs: 1 }, Cut { text: 5, logprobs: 1 }];
        let record = kept().done(&done, &cuts, None, true);
        assert_eq!((record.answer.as_deref(), record.previous), (Some("msg_1"), Some(7)));
        assert!(!record.body.contains("Hello"), "the text is the item's alone");
        let back = Kept::read(record).unwrap();
        assert_eq!(back.body.tip.as_deref(), Some("msg_1"));
        assert_eq!(back.told("Hello".into()), ("msg_1".to_owned(), TurnUpdate::Done(done), cuts.to_vec()));
    }

    #[test]
    fn a_response_without_an_end_was_cut_off() {
        let back = Kept::read(kept().record()).unwrap();
        assert!(matches!(back.told(String::new()).1, TurnUpdate::Failed(TurnError::Lost(_))));
        let failed = Kept::read(kept().failed(&TurnError::QueueTimeout("late".into()))).unwrap();
        assert_eq!(failed.told(String::new()).1, TurnUpdate::Failed(TurnError::QueueTimeout("late".into())));
    }
}
