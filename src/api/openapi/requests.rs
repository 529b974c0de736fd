//! How do the bodies look that the API takes?
//!
//! Types for the document alone: the handlers read JSON field by field, so that every refusal names its field. A test holds
//! the fields that they read to the ones here. What is refused by name is not here.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

/// Metadata: 16 pairs, names of 64 and values of 512 characters.
type Metadata = BTreeMap<String, String>;

#[derive(Serialize, ToSchema)]
pub struct ChatRequest {
    pub model: String,
    #[schema(min_items = 1, max_items = 4096)]
    pub messages: Vec<ChatMessage>,
    /// Default: what the window still holds, at most the server's own limit.
    #[schema(minimum = 1, maximum = 4294967295u64)]
    pub max_completion_tokens: Option<u64>,
    /// The same limit under its old name.
    #[schema(minimum = 1, maximum = 4294967295u64)]
    pub max_tokens: Option<u64>,
    /// 0 is greedy.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// The same build, model, seed, prompt and parameters give the same tokens.
    pub seed: Option<i64>,
    pub stop: Option<Stop>,
    /// Answers; they share the prompt.
    #[schema(minimum = 1, maximum = 8)]
    pub n: Option<u32>,
    pub logprobs: Option<bool>,
    /// Needs `logprobs: true`.
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<u32>,
    /// Token ids to −100…100; at most 1024.
    pub logit_bias: Option<BTreeMap<String, f64>>,
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f64>,
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f64>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    /// None yet.
    #[schema(max_items = 0)]
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<ToolChoice>,
    pub parallel_tool_calls: Option<bool>,
    pub response_format: Option<Format>,
    #[schema(max_items = 1)]
    pub modalities: Option<Vec<Modality>>,
    pub metadata: Option<Metadata>,
    /// `none` turns thinking off, where the model's template can.
    pub reasoning_effort: Option<String>,
    /// Without effect.
    pub service_tier: Option<String>,
    /// Without effect: chat completions are not kept.
    pub store: Option<bool>,
    /// Without effect.
    pub user: Option<String>,
    /// Without effect.
    pub safety_identifier: Option<String>,
    /// Without effect: equal prefixes are found unasked.
    pub prompt_cache_key: Option<String>,
    /// Without effect.
    pub prompt_cache_retention: Option<String>,
    /// Without effect.
    pub prompt_cache_options: Option<Value>,
    /// Without effect.
    pub prediction: Option<Value>,
    /// Without effect.
    pub verbosity: Option<String>,
    #[serde(flatten)]
    pub ours: OurSampling,
}

/// Sampling fields beside OpenAI's.
#[derive(Serialize, ToSchema)]
pub struct OurSampling {
    /// 0 and −1: all.
    #[schema(minimum = -1, maximum = 4294967295u64)]
    pub top_k: Option<i64>,
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f64>,
    /// 1 is none.
    #[schema(exclusive_minimum = 0, maximum = 100)]
    pub repetition_penalty: Option<f64>,
    #[schema(minimum = 0, maximum = 4294967295u64)]
    pub min_tokens: Option<u64>,
    pub ignore_eos: Option<bool>,
    /// Values for variables of the model's chat template.
    pub chat_template_kwargs: Option<BTreeMap<String, Value>>,
}

#[derive(Serialize, ToSchema)]
pub struct ChatMessage {
    pub role: ChatRole,
    /// Assistants may leave it out.
    pub content: Option<Content>,
    pub name: Option<String>,
    pub refusal: Option<String>,
    /// Of an assistant, where the model's template renders them.
    pub tool_calls: Option<Vec<Value>>,
    /// Of a tool's message.
    pub tool_call_id: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ChatRole {
    System,
    /// Rendered as `system` where the model has no such role.
    Developer,
    User,
    Assistant,
    /// Where the model's template renders it.
    Tool,
}

/// A text, or parts.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum Content {
    Text(String),
    Parts(Vec<InputPart>),
}

#[derive(Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum InputPart {
    Text { text: String },
    InputText { text: String },
    OutputText { text: String },
    Refusal { refusal: String },
}

/// At most 16. The text is cut before the first match.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum Stop {
    One(String),
    Any(Vec<String>),
}

#[derive(Serialize, ToSchema)]
pub struct StreamOptions {
    /// A last chunk with the usage.
    pub include_usage: Option<bool>,
    /// Without effect.
    pub include_obfuscation: Option<bool>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ToolChoice {
    Auto,
    None,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Modality {
    Text,
}

#[derive(Serialize, ToSchema)]
pub struct Format {
    #[serde(rename = "type")]
    pub kind: FormatKind,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FormatKind {
    Text,
}

#[derive(Serialize, ToSchema)]
pub struct ResponseRequest {
    /// The only one served if left out.
    pub model: Option<String>,
    /// Required, unless there is a conversation: then the model answers the history as it stands.
    pub input: Option<Input>,
    pub conversation: Option<ConversationId>,
    /// Continues that response; excludes `conversation`. Continuing an older one branches.
    pub previous_response_id: Option<String>,
    /// Runs without a client; needs `store: true`.
    pub background: Option<bool>,
    /// One system message before everything, for this response only. Changing it re-encodes the history.
    pub instructions: Option<String>,
    #[schema(minimum = 1, maximum = 4294967295u64)]
    pub max_output_tokens: Option<u64>,
    /// 0 is greedy.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<u32>,
    pub seed: Option<i64>,
    pub stop: Option<Stop>,
    pub logit_bias: Option<BTreeMap<String, f64>>,
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f64>,
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f64>,
    pub stream: Option<bool>,
    /// Without effect.
    pub stream_options: Option<Value>,
    /// Such as `message.output_text.logprobs`.
    pub include: Option<Vec<String>>,
    pub truncation: Option<Truncation>,
    pub text: Option<TextRequest>,
    pub reasoning: Option<ReasoningRequest>,
    /// None yet.
    #[schema(max_items = 0)]
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<ToolChoice>,
    pub parallel_tool_calls: Option<bool>,
    #[schema(minimum = 1, maximum = 4294967295u64)]
    pub max_tool_calls: Option<u64>,
    /// False: the input is encoded, and nothing is said.
    pub generate: Option<bool>,
    pub metadata: Option<Metadata>,
    pub store: Option<bool>,
    pub user: Option<String>,
    pub safety_identifier: Option<String>,
    pub prompt_cache_key: Option<String>,
    pub prompt_cache_retention: Option<Value>,
    pub prompt_cache_options: Option<CacheOptions>,
    pub service_tier: Option<String>,
    pub rekindle: Option<OurRequest>,
    #[serde(flatten)]
    pub ours: OurSampling,
}

/// A text, or 1 to 1024 items.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum Input {
    Text(String),
    Items(Vec<InputItem>),
}

/// A message, or a reference to an item. Everything that the server returns as an item is taken back.
#[derive(Serialize, ToSchema)]
pub struct InputItem {
    #[serde(rename = "type")]
    pub kind: Option<ItemKind>,
    /// Of a message.
    pub role: Option<ChatRole>,
    /// Of a message.
    pub content: Option<Content>,
    /// Kept if it is 1 to 128 of letters, digits, `_` and `-`.
    pub id: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ItemKind {
    Message,
    /// An item of the tenant, by its `id`.
    ItemReference,
}

/// Its id, or an object that has it.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum ConversationId {
    Id(String),
    Object { id: String },
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// What is too long is refused.
    Disabled,
    /// The oldest whole turns are left out.
    Auto,
}

#[derive(Serialize, ToSchema)]
pub struct TextRequest {
    pub format: Option<Format>,
    pub verbosity: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub struct ReasoningRequest {
    pub effort: Option<String>,
    pub summary: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub struct CacheOptions {
    /// As `generate: false`.
    pub prewarm: Option<bool>,
}

/// What is ours.
#[derive(Serialize, ToSchema)]
pub struct OurRequest {
    /// What to do while another turn of the conversation runs.
    pub on_conflict: Option<OnConflict>,
    /// Longest wait for its place.
    #[schema(minimum = 1, maximum = 4294967295u64)]
    pub timeout_ms: Option<u64>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnConflict {
    Queue,
    Reject,
}

#[derive(Serialize, ToSchema)]
pub struct NewConversation {
    pub metadata: Option<Metadata>,
    #[schema(max_items = 20)]
    pub items: Option<Vec<InputItem>>,
}

#[derive(Serialize, ToSchema)]
pub struct NewMetadata {
    /// Replaces all; null is none.
    #[schema(required)]
    pub metadata: Option<Metadata>,
}

#[derive(Serialize, ToSchema)]
pub struct NewItems {
    #[schema(min_items = 1, max_items = 20)]
    pub items: Vec<InputItem>,
}

#[derive(Serialize, ToSchema)]
pub struct WarmRequest {
    /// Whether to answer only when it is warm.
    pub wait: Option<bool>,
    pub tier: Option<WarmTier>,
    /// Those that the next turn will have.
    pub instructions: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WarmTier {
    Device,
}

#[derive(Serialize, ToSchema)]
pub struct ForkRequest {
    /// The last item of the branch; the newest if left out.
    pub after_item_id: Option<String>,
    pub metadata: Option<Metadata>,
}

#[derive(Serialize, ToSchema)]
pub struct PinRequest {
    /// Default: an hour. At most `tenants.max_pin_ttl_s`.
    #[schema(minimum = 1)]
    pub ttl_seconds: Option<i64>,
}

#[derive(Serialize, ToSchema)]
pub struct OffloadRequest {
    /// Default: host.
    pub to: Option<OffloadTo>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OffloadTo {
    Host,
    /// Full blocks; the tokens after the last are encoded again.
    Disk,
    /// Forget the KV; the transcript stays.
    None,
}
