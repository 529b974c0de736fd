//! How do turns become steps of the model?
//!
//! `handle` is what the layers above hold; `thread` is the one loop; `core` decides, purely.

mod accounting;
mod answers;
pub mod batch;
pub mod core;
pub mod fairness;
pub mod flight;
pub mod gains;
pub mod handle;
mod metrics;
mod movers;
mod odds;
pub mod prompt;
pub mod replay;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod status;
pub mod thread;

pub use handle::{EngineHandle, KvHandle, SubmitError, TurnEvents, TurnHandle};
pub use prompt::HashedPrompt;
pub use sampler::Sampling;

pub use crate::kv::evictor::Policy;
pub use crate::kv::return_rate::TurnShape;

use std::sync::Arc;
use std::time::Duration;

pub use crate::model::language::{
    Argument, ChatMessage, Front, History, Language, RESERVED, Rendered, TemplateError, TextDecoder, ToolCall,
};
use crate::types::{TokenCount, TokenId};

/// A turn as the engine takes it: the whole prompt in tokens, and how to answer.
#[derive(Clone, Debug)]
pub struct TurnRequest {
    /// The whole prompt, history included. What of it is in a tier already is found by hash, never by trust.
    pub prompt: Arc<[TokenId]>,
    /// Tokens at the prompt's front that an earlier turn of this conversation encoded: what of them is not found in any
    /// tier is counted as re-encoded.
    pub encoded_before: TokenCount,
    /// What it tells of whether the conversation goes on.
    pub shape: TurnShape,
    pub sampling: Sampling,
    /// Most tokens to generate, at least 1. The window may cut it shorter.
    pub max_tokens: TokenCount,
    /// Tokens that end the answer. The one that did is part of the answer's tokens.
    pub stop_tokens: Arc<[TokenId]>,
    /// Longest wait in the queue.
    pub queue_deadline: Duration,
    /// How many alternatives to report with each token; `None`: no log probabilities at all.
    pub logprobs: Option<u8>,
}

/// What a turn tells its listener, in this order: one `Started`, any number of `Token`, one `Finished` or `Failed`.
#[derive(Clone, Debug, PartialEq)]
pub enum TurnEvent {
    /// The prompt is encoded; the first token follows.
    Started(PromptUsage),
    Token(Token),
    Finished {
        reason: FinishReason,
        usage: TurnUsage,
    },
    Failed(TurnFailure),
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    pub id: TokenId,
    /// Natural log of the model's raw probability; asked for by `TurnRequest::logprobs`.
    pub logprob: Option<Logprob>,
}

/// The model's own (raw) log probability of a token and of the likeliest ones.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprob {
    pub logprob: f32,
    /// Likeliest first.
    pub top: Vec<(TokenId, f32)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token.
    Stop,
    /// The turn's limit, or the window.
    Length,
    /// The listener went away, or asked for it.
    Cancelled,
}

/// Why a turn ended without an answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TurnFailure {
    #[error(
        "the turn waited {waited_ms} ms for memory or its place, its deadline; retry, or give the server more `kv.device_bytes`"
    )]
    QueueTimeout { waited_ms: u64 },
    /// While memory is short it may displace its own conversations alone, and its running turns hold them.
    #[error(
        "the turn waited {waited_ms} ms for memory, its deadline: memory is short, and its tenant's own turns hold all that \
         the tenant's `ceiling` leaves it; retry when one has ended, or raise the ceiling"
    )]
    AtCeiling { waited_ms: u64 },
    #[error("the model failed in this step: {0}")]
    Model(String),
}

/// Where the prompt's tokens came from. `resident + shared + reloaded + encoded` is the prompt's length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptUsage {
    /// On the device, of this conversation.
    pub resident: TokenCount,
    /// On the device, of another conversation of the tenant with the same prefix.
    pub shared: TokenCount,
    /// Copied back from the host pool.
    pub reloaded_host: TokenCount,
    /// Loaded back from disk.
    pub reloaded_disk: TokenCount,
    /// Run through the model.
    pub encoded: TokenCount,
    /// The part of `encoded` that this conversation had encoded before and lost.
    pub reencoded: TokenCount,
    pub queue_ms: u64,
    pub reload_ms: u64,
    pub prefill_ms: u64,
}

/// How the known part of a prompt came to be on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing of it was known.
    Fresh,
    /// It was there.
    Resident,
    /// It came back from below.
    Reload,
    /// It was encoded again.
    Reencode,
    /// Some of it came back, and some was encoded again.
    Split,
}

impl Decision {
    pub fn name(self) -> &'static str {
        match self {
            Decision::Fresh => "fresh",
            Decision::Resident => "resident",
            Decision::Reload => "reload",
            Decision::Reencode => "reencode",
            Decision::Split => "split",
        }
    }
}

/// How a turn that has history found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// It has none: a conversation's first turn, or one of whose history nothing was known.
    Fresh,
    Hot,
    Reloaded,
    Reencoded,
}

impl Path {
    pub const ALL: [Path; 4] = [Path::Fresh, Path::Hot, Path::Reloaded, Path::Reencoded];

    /// Of a conversation's turn of this number, from 1.
    pub fn of(decision: Decision, turn: u32) -> Self {
        match decision {
            _ if turn <= 1 => Path::Fresh,
            Decision::Fresh => Path::Fresh,
            Decision::Resident => Path::Hot,
            Decision::Reload | Decision::Split => Path::Reloaded,
            Decision::Reencode => Path::Reencoded,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Path::Fresh => "fresh",
            Path::Hot => "hot",
            Path::Reloaded => "reloaded",
            Path::Reencoded => "reencoded",
        }
    }
}

impl PromptUsage {
    /// How its known part came to be on the device.
    pub fn decision(&self) -> Decision {
        match (self.reloaded().0 > 0, self.reencoded.0 > 0) {
            (true, true) => Decision::Split,
            (true, false) => Decision::Reload,
            (false, true) => Decision::Reencode,
            (false, false) if self.cached().0 > 0 => Decision::Resident,
            (false, false) => Decision::Fresh,
        }
    }

    /// What was not encoded again.
    pub fn cached(&self) -> TokenCount {
        TokenCount(self.resident.0 + self.shared.0 + self.reloaded().0)
    }

    /// What came back from a lower tier.
    pub fn reloaded(&self) -> TokenCount {
        TokenCount(self.reloaded_host.0 + self.reloaded_disk.0)
    }
}

/// A finished turn's account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TurnUsage {
    pub prompt: PromptUsage,
    pub generated: TokenCount,
    pub ttft_ms: u64,
    pub decode_ms: u64,
}
