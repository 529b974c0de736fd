//! How do the objects look that the API gives?
//!
//! Types for the document alone: the handlers write their JSON themselves, and a test holds real answers to these.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

/// Every error of every route.
#[derive(Serialize, ToSchema)]
pub struct Error {
    pub error: ErrorBody,
}

#[derive(Serialize, ToSchema)]
pub struct ErrorBody {
    /// What is wrong, and what to do.
    pub message: String,
    #[serde(rename = "type")]
    pub kind: String,
    /// The field, such as `messages[2].role`.
    #[schema(required)]
    pub param: Option<String>,
    pub code: String,
}

/// A list, or one page of it.
#[derive(Serialize, ToSchema)]
pub struct ItemList {
    #[schema(pattern = "^list$")]
    pub object: String,
    pub data: Vec<Item>,
    #[schema(required)]
    pub first_id: Option<String>,
    #[schema(required)]
    pub last_id: Option<String>,
    /// Whether there are more behind `last_id`.
    pub has_more: bool,
}

/// A message of a conversation, or of an answer.
#[derive(Serialize, ToSchema)]
pub struct Item {
    pub id: String,
    #[serde(rename = "type")]
    #[schema(pattern = "^message$")]
    pub kind: String,
    pub role: Role,
    pub status: ItemStatus,
    pub content: Vec<Part>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ItemStatus {
    InProgress,
    Completed,
    /// Cut off: by a limit, or because the turn was cancelled.
    Incomplete,
}

#[derive(Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    InputText { text: String },
    OutputText { text: String, annotations: Vec<Value>, logprobs: Vec<Logprob> },
    Refusal { refusal: String },
}

/// A token and its natural log of the probability in the model's own distribution.
#[derive(Serialize, ToSchema)]
pub struct Logprob {
    pub token: String,
    /// The token's bytes: tokens may end inside a character.
    #[schema(value_type = Vec<u8>)]
    pub bytes: Vec<u8>,
    pub logprob: f64,
    pub top_logprobs: Vec<TopLogprob>,
}

#[derive(Serialize, ToSchema)]
pub struct TopLogprob {
    pub token: String,
    #[schema(value_type = Vec<u8>)]
    pub bytes: Vec<u8>,
    pub logprob: f64,
}

#[derive(Serialize, ToSchema)]
pub struct Conversation {
    pub id: String,
    #[schema(pattern = "^conversation$")]
    pub object: String,
    pub created_at: i64,
    pub metadata: BTreeMap<String, String>,
}

#[derive(Serialize, ToSchema)]
pub struct ConversationList {
    #[schema(pattern = "^list$")]
    pub object: String,
    pub data: Vec<Conversation>,
    #[schema(required)]
    pub first_id: Option<String>,
    #[schema(required)]
    pub last_id: Option<String>,
    pub has_more: bool,
}

#[derive(Serialize, ToSchema)]
pub struct DeletedResponse {
    pub id: String,
    #[schema(pattern = "^response$")]
    pub object: String,
    pub deleted: bool,
}

#[derive(Serialize, ToSchema)]
pub struct InputTokens {
    #[schema(pattern = "^response.input_tokens$")]
    pub object: String,
    pub input_tokens: u64,
}

/// Answered once every tier and the store have let go.
#[derive(Serialize, ToSchema)]
pub struct DeletedConversation {
    pub id: String,
    #[schema(pattern = "^conversation.deleted$")]
    pub object: String,
    pub deleted: bool,
    pub rekindle: DeletionProof,
}

#[derive(Serialize, ToSchema)]
pub struct DeletionProof {
    pub freed: FreedBytes,
    /// Bytes that stay, because other conversations of the tenant share them.
    pub kept_shared_bytes: u64,
    pub remaining_bytes: u64,
    pub nodes: u64,
}

#[derive(Serialize, ToSchema)]
pub struct FreedBytes {
    pub device_bytes: u64,
    pub host_bytes: u64,
    pub disk_bytes: u64,
}

/// Where a conversation's KV is.
#[derive(Serialize, ToSchema)]
pub struct Residency {
    #[schema(pattern = "^conversation.residency$")]
    pub object: String,
    pub conversation: String,
    pub state: ResidencyState,
    pub tokens: u64,
    pub turns: u64,
    pub last_used: i64,
    pub pinned: bool,
    #[schema(required)]
    pub pin_expires_at: Option<i64>,
    pub tiers: Tiers,
    pub predicted: Predicted,
    #[schema(required)]
    pub last_eviction: Option<Eviction>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResidencyState {
    Empty,
    Running,
    Resident,
    Partial,
    Reloading,
    Offloaded,
    /// Only the transcript is left.
    None,
}

#[derive(Serialize, ToSchema)]
pub struct Tiers {
    pub device: TierShare,
    pub host: TierShare,
    pub disk: TierShare,
}

#[derive(Serialize, ToSchema)]
pub struct TierShare {
    pub tokens: u64,
    pub bytes_private: u64,
    /// Counted whole for every conversation that shares them.
    pub bytes_shared: u64,
}

/// What the next turn would cost.
#[derive(Serialize, ToSchema)]
pub struct Predicted {
    #[schema(required)]
    pub reload_ms: Option<u64>,
    #[schema(required)]
    pub reencode_ms: Option<u64>,
    /// `resident`, `reload` or `reencode`.
    #[schema(required)]
    pub choice: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub struct Eviction {
    pub id: String,
    pub at: i64,
    pub rule: String,
    /// `self` or `other`: never a name.
    pub for_tenant: String,
    pub freed_bytes: u64,
}

/// A pinned conversation, or one that is no more.
#[derive(Serialize, ToSchema)]
pub struct Pin {
    #[schema(pattern = "^conversation.pin$")]
    pub object: String,
    pub conversation: String,
    pub pinned: bool,
    #[schema(required)]
    pub expires_at: Option<i64>,
    pub budget: PinBudget,
}

/// Of the device: what the tenant may pin, and what it has pinned.
#[derive(Serialize, ToSchema)]
pub struct PinBudget {
    pub limit_bytes: u64,
    pub used_bytes: u64,
}

#[derive(Serialize, ToSchema)]
pub struct Offload {
    #[schema(pattern = "^conversation.offload$")]
    pub object: String,
    pub conversation: String,
    pub to: String,
    pub bytes: u64,
    pub ms: u64,
}

#[derive(Serialize, ToSchema)]
pub struct Done {
    #[schema(pattern = "^conversation.done$")]
    pub object: String,
    pub conversation: String,
}

#[derive(Serialize, ToSchema)]
pub struct Warm {
    #[schema(pattern = "^conversation.warm$")]
    pub object: String,
    pub conversation: String,
    /// `warming`, `warm`, `skipped` or `refused`.
    pub state: String,
    /// Why it was refused: `budget` or `pressure`.
    pub reason: Option<String>,
    pub cost: WarmCost,
}

#[derive(Serialize, ToSchema)]
pub struct WarmCost {
    /// The tier that has it: `device`, `host` or `none`.
    pub from: String,
    pub reload_tokens: u64,
    pub reencode_tokens: u64,
    pub bytes: u64,
    #[schema(required)]
    pub predicted_ms: Option<u64>,
    #[schema(required)]
    pub elapsed_ms: Option<u64>,
}

/// The branch.
#[derive(Serialize, ToSchema)]
pub struct Fork {
    pub id: String,
    #[schema(pattern = "^conversation$")]
    pub object: String,
    pub created_at: i64,
    pub metadata: BTreeMap<String, String>,
    pub rekindle: ForkedFrom,
}

#[derive(Serialize, ToSchema)]
pub struct ForkedFrom {
    pub forked_from: String,
    /// Tokens of its history whose KV some tier has.
    pub shared_tokens: u64,
    pub items: u64,
}

#[derive(Serialize, ToSchema)]
pub struct ModelList {
    #[schema(pattern = "^list$")]
    pub object: String,
    pub data: Vec<Model>,
}

#[derive(Serialize, ToSchema)]
pub struct Model {
    pub id: String,
    #[schema(pattern = "^model$")]
    pub object: String,
    pub created: i64,
    pub owned_by: String,
    pub name: String,
    /// Tokens that the model was trained for.
    pub context_length: u64,
    /// Tokens of the longest sequence that can run here.
    pub max_model_len: u64,
}

#[derive(Serialize, ToSchema)]
pub struct Health {
    pub status: String,
}

#[derive(Serialize, ToSchema)]
pub struct Readiness {
    pub status: String,
    /// Why it is not ready.
    pub reasons: Vec<String>,
}

#[derive(Serialize, ToSchema)]
pub struct ChatCompletion {
    pub id: String,
    #[schema(pattern = "^chat.completion$")]
    pub object: String,
    pub created: i64,
    pub model: String,
    /// Changes with build, model or kernels.
    pub system_fingerprint: String,
    pub service_tier: String,
    pub choices: Vec<Choice>,
    pub usage: ChatUsage,
}

#[derive(Serialize, ToSchema)]
pub struct Choice {
    pub index: u32,
    pub message: ChatAnswer,
    #[schema(required)]
    pub logprobs: Option<ChoiceLogprobs>,
    pub finish_reason: FinishReason,
}

#[derive(Serialize, ToSchema)]
pub struct ChatAnswer {
    pub role: Role,
    pub content: String,
    #[schema(required)]
    pub refusal: Option<String>,
    pub annotations: Vec<Value>,
}

#[derive(Serialize, ToSchema)]
pub struct ChoiceLogprobs {
    pub content: Vec<Logprob>,
    #[schema(required, value_type = Option<Vec<Logprob>>)]
    pub refusal: Option<Vec<Logprob>>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The end token, or a stop string.
    Stop,
    /// The limit, or the window.
    Length,
}

#[derive(Serialize, ToSchema)]
pub struct ChatUsage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
    pub prompt_tokens_details: InputDetails,
    pub completion_tokens_details: OutputDetails,
    pub rekindle: Account,
}

#[derive(Serialize, ToSchema)]
pub struct Usage {
    /// The whole prompt, history included.
    pub input_tokens: u64,
    pub input_tokens_details: InputDetails,
    pub output_tokens: u64,
    pub output_tokens_details: OutputDetails,
    pub total_tokens: u64,
    pub rekindle: Account,
}

#[derive(Serialize, ToSchema)]
pub struct InputDetails {
    /// What was not encoded again.
    pub cached_tokens: u64,
    pub cache_write_tokens: u64,
}

#[derive(Serialize, ToSchema)]
pub struct OutputDetails {
    pub reasoning_tokens: u64,
}

/// Where the prompt's tokens came from, and what that took.
#[derive(Serialize, ToSchema)]
pub struct Account {
    pub resident_tokens: u64,
    pub shared_tokens: u64,
    pub reloaded_tokens: u64,
    pub encoded_tokens: u64,
    /// The part of the encoded that this conversation had encoded before, and lost.
    pub reencoded_tokens: u64,
    pub reloaded: ReloadedTokens,
    /// `fresh`, `resident`, `reload`, `reencode` or `split`.
    pub decision: String,
    pub queue_ms: u64,
    pub reload_ms: u64,
    pub prefill_ms: u64,
    pub ttft_ms: u64,
    pub decode_ms: u64,
    pub dropped_items: u64,
}

#[derive(Serialize, ToSchema)]
pub struct ReloadedTokens {
    pub host: u64,
    pub disk: u64,
}

/// One answer; every field is always there.
#[derive(Serialize, ToSchema)]
pub struct Response {
    pub id: String,
    #[schema(pattern = "^response$")]
    pub object: String,
    pub created_at: i64,
    #[schema(required)]
    pub completed_at: Option<i64>,
    pub status: ResponseStatus,
    pub background: bool,
    #[schema(required)]
    pub error: Option<ResponseError>,
    #[schema(required)]
    pub incomplete_details: Option<IncompleteDetails>,
    #[schema(required)]
    pub conversation: Option<ConversationReference>,
    #[schema(required)]
    pub previous_response_id: Option<String>,
    #[schema(required)]
    pub instructions: Option<String>,
    pub model: String,
    pub metadata: BTreeMap<String, String>,
    #[schema(required)]
    pub max_output_tokens: Option<u64>,
    #[schema(required)]
    pub max_tool_calls: Option<u64>,
    pub output: Vec<Item>,
    pub parallel_tool_calls: bool,
    pub tool_choice: Value,
    pub tools: Vec<Value>,
    pub temperature: f64,
    pub top_p: f64,
    pub top_logprobs: u64,
    pub truncation: String,
    pub store: bool,
    pub text: TextSettings,
    pub reasoning: ReasoningSettings,
    pub service_tier: String,
    #[schema(required)]
    pub prompt_cache_key: Option<String>,
    #[schema(required)]
    pub safety_identifier: Option<String>,
    #[schema(required)]
    pub user: Option<String>,
    #[schema(required)]
    pub usage: Option<Usage>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResponseStatus {
    Queued,
    InProgress,
    Completed,
    Incomplete,
    Cancelled,
    Failed,
}

#[derive(Serialize, ToSchema)]
pub struct ResponseError {
    /// `server_error`, `rate_limit_exceeded` or `invalid_prompt`; ours is in the message.
    pub code: String,
    pub message: String,
}

#[derive(Serialize, ToSchema)]
pub struct IncompleteDetails {
    pub reason: String,
}

#[derive(Serialize, ToSchema)]
pub struct ConversationReference {
    pub id: String,
}

#[derive(Serialize, ToSchema)]
pub struct TextSettings {
    pub format: TextFormat,
    pub verbosity: String,
}

#[derive(Serialize, ToSchema)]
pub struct TextFormat {
    #[serde(rename = "type")]
    pub kind: String,
}

#[derive(Serialize, ToSchema)]
pub struct ReasoningSettings {
    #[schema(required)]
    pub effort: Option<String>,
    #[schema(required)]
    pub summary: Option<String>,
}
