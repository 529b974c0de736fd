//! How do the events of streams look?
//!
//! Types for the document alone; a test holds real streams to them.

use serde::Serialize;
use utoipa::ToSchema;

use super::objects::{ChatUsage, ChoiceLogprobs, ErrorBody, FinishReason, Item, Logprob, Part, Response, Role};

/// What a `data:` line of a streamed chat completion holds. The last is `[DONE]`.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum ChatEvent {
    Chunk(Box<ChatChunk>),
    /// The stream failed after its first byte; only `[DONE]` follows.
    Failed {
        error: ErrorBody,
    },
}

#[derive(Serialize, ToSchema)]
pub struct ChatChunk {
    pub id: String,
    #[schema(pattern = "^chat.completion.chunk$")]
    pub object: String,
    pub created: i64,
    pub model: String,
    pub system_fingerprint: String,
    pub service_tier: String,
    pub choices: Vec<ChunkChoice>,
    /// With `include_usage` alone: null until the last chunk.
    pub usage: Option<ChatUsage>,
}

#[derive(Serialize, ToSchema)]
pub struct ChunkChoice {
    pub index: u32,
    pub delta: Delta,
    #[schema(required)]
    pub logprobs: Option<ChoiceLogprobs>,
    #[schema(required)]
    pub finish_reason: Option<FinishReason>,
}

#[derive(Serialize, ToSchema)]
pub struct Delta {
    #[schema(nullable = false)]
    pub role: Option<Role>,
    #[schema(nullable = false)]
    pub content: Option<String>,
}

/// What a `data:` line of a streamed response holds; `event:` names its type. Numbers begin at 0 and rise by one.
#[derive(Serialize, ToSchema)]
#[serde(tag = "type")]
pub enum ResponseEvent {
    #[serde(rename = "response.created")]
    Created { sequence_number: u64, response: Box<Response> },
    #[serde(rename = "response.in_progress")]
    InProgress { sequence_number: u64, response: Box<Response> },
    #[serde(rename = "response.output_item.added")]
    ItemAdded { sequence_number: u64, output_index: u32, item: Item },
    #[serde(rename = "response.content_part.added")]
    PartAdded { sequence_number: u64, item_id: String, output_index: u32, content_index: u32, part: Part },
    #[serde(rename = "response.output_text.delta")]
    TextDelta {
        sequence_number: u64,
        item_id: String,
        output_index: u32,
        content_index: u32,
        delta: String,
        logprobs: Vec<Logprob>,
    },
    #[serde(rename = "response.output_text.done")]
    TextDone {
        sequence_number: u64,
        item_id: String,
        output_index: u32,
        content_index: u32,
        text: String,
        logprobs: Vec<Logprob>,
    },
    #[serde(rename = "response.content_part.done")]
    PartDone { sequence_number: u64, item_id: String, output_index: u32, content_index: u32, part: Part },
    #[serde(rename = "response.output_item.done")]
    ItemDone { sequence_number: u64, output_index: u32, item: Item },
    #[serde(rename = "response.completed")]
    Completed { sequence_number: u64, response: Box<Response> },
    /// Cut off: by a limit, or cancelled.
    #[serde(rename = "response.incomplete")]
    Incomplete { sequence_number: u64, response: Box<Response> },
    #[serde(rename = "response.failed")]
    Failed { sequence_number: u64, response: Box<Response> },
}
