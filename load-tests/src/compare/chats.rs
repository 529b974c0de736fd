//! How do many people chat with a server that both programs could be?
//!
//! Through `/v1/chat/completions`, streamed, each request with all of its conversation, as the stateless API wants it. The
//! messages are the same for every server; the answers that are sent back are the server's own. All conversations have
//! their first turn, then all their second, some at a time: each comes back after all others had theirs.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};

use crate::client::Events;
use crate::text::words;

/// Long enough for a queue of long prompts on a slow machine.
const PATIENCE: Duration = Duration::from_secs(600);
/// Words that a message has beside its frame, and tokens of each answer.
const MESSAGE_WORDS: usize = 80;
const ANSWER_TOKENS: u64 = 32;
/// Tokens of a turn beside the words and the answer: the frame and the template's marks.
const FRAME_TOKENS: u32 = 16;
/// What the template puts before the first message.
const OPENING_TOKENS: u32 = 32;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Workload {
    pub conversations: u32,
    pub turns: u32,
    pub at_a_time: u32,
}

impl Workload {
    /// What a conversation has come to at its end, about.
    pub fn conversation_tokens(self) -> u32 {
        OPENING_TOKENS + self.turns * (MESSAGE_WORDS as u32 + ANSWER_TOKENS as u32 + FRAME_TOKENS)
    }
}

/// A turn as its client saw it.
#[derive(Clone, Debug)]
pub struct Answer {
    /// From sending the request to the first text.
    pub ttft_ms: f64,
    text: String,
    pub prompt_tokens: u64,
    /// Of the prompt, those that the server did not encode again.
    pub cached_tokens: u64,
    pub output_tokens: u64,
}

/// All turns of one run.
#[derive(Default)]
pub struct Played {
    pub wall_s: f64,
    /// Turn by turn; in each, every conversation's.
    pub turns: Vec<Vec<Answer>>,
}

/// Plays all conversations.
pub async fn play(url: &str, workload: Workload) -> anyhow::Result<Played> {
    let client = Client::new(url).await?;
    // Not timed: the first turn of a server touches weights and pools for the first time.
    client.answer(&[said("Hello")]).await?;
    let mut conversations: Vec<Vec<Value>> = vec![Vec::new(); workload.conversations as usize];
    let started = Instant::now();
    let mut turns = Vec::new();
    for turn in 0..workload.turns {
        let all = conversations.iter_mut().zip(0..).map(|(messages, number)| {
            let client = &client;
            async move {
                let seed = u64::from(turn * workload.conversations + number);
                messages.push(said(&format!("Tell me about {}?", words(seed, MESSAGE_WORDS))));
                let answer = client.answer(messages).await?;
                messages.push(json!({"role": "assistant", "content": answer.text}));
                anyhow::Ok(answer)
            }
        });
        turns.push(stream::iter(all).buffer_unordered(workload.at_a_time as usize).try_collect().await?);
    }
    Ok(Played { wall_s: started.elapsed().as_secs_f64(), turns })
}

fn said(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

struct Client {
    http: reqwest::Client,
    url: String,
    /// The name that the server has for its only model.
    model: String,
}

impl Client {
    async fn new(url: &str) -> anyhow::Result<Self> {
        // A connection for each request: llama-server closes those that it kept alive.
        let http = reqwest::Client::builder().no_proxy().timeout(PATIENCE).pool_max_idle_per_host(0).build()?;
        let models = http.get(format!("{url}/v1/models")).send().await?.bytes().await?;
        let models: Value = serde_json::from_slice(&models)?;
        let model = models["data"][0]["id"].as_str().context("the server names no model")?.to_owned();
        Ok(Self { http, url: format!("{url}/v1/chat/completions"), model })
    }

    async fn answer(&self, messages: &[Value]) -> anyhow::Result<Answer> {
        let body = json!({
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": ANSWER_TOKENS,
            "ignore_eos": true,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let sent = Instant::now();
        let response = self.http.post(&self.url).json(&body).send().await?;
        let status = response.status();
        if !status.is_success() {
            bail!("{status}: {}", response.text().await?);
        }
        let mut pieces = response.bytes_stream();
        let mut events = Events::default();
        let (mut first, mut text, mut usage) = (None, String::new(), Value::Null);
        while let Some(piece) = pieces.next().await {
            events.push(&piece?);
            while let Some(mut event) = events.next()? {
                let delta = event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
                if !delta.is_empty() {
                    first.get_or_insert_with(|| sent.elapsed());
                    text.push_str(delta);
                }
                if event["usage"].is_object() {
                    usage = event["usage"].take();
                }
            }
        }
        let first = first.with_context(|| format!("an answer without text; its usage: {usage}"))?;
        let tokens = |value: &Value| value.as_u64().with_context(|| format!("no number of tokens in {usage}"));
        let output_tokens = tokens(&usage["completion_tokens"])?;
        if output_tokens != ANSWER_TOKENS {
            bail!("an answer of {output_tokens} tokens instead of {ANSWER_TOKENS}");
        }
        Ok(Answer {
            ttft_ms: first.as_secs_f64() * 1e3,
            text,
            prompt_tokens: tokens(&usage["prompt_tokens"])?,
            cached_tokens: usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0),
            output_tokens,
        })
    }
}
