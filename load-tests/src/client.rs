//! How does a client see a turn?
//!
//! Over HTTP, as any other client: what it measures includes the network stack, the parsing and the store.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures_util::StreamExt;
use reqwest::{RequestBuilder, Response};
use serde_json::{Value, json};

/// Long enough for a long prompt on a slow machine.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long background copies may take to settle, and how often to look.
const SETTLE_DEADLINE: Duration = Duration::from_secs(10);
const SETTLE_EVERY: Duration = Duration::from_millis(20);

/// A client of one server. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    url: String,
    key: Option<String>,
}

/// A turn as its client saw it, and the server's account of it.
#[derive(Clone, Debug)]
pub struct Turn {
    /// From sending the request to the first text.
    pub ttft_ms: f64,
    pub text: String,
    pub usage: Usage,
}

/// The server's account of a turn; API.md §6.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub resident_tokens: u64,
    pub shared_tokens: u64,
    pub reloaded_tokens: u64,
    pub encoded_tokens: u64,
    pub reload_ms: f64,
    pub prefill_ms: f64,
    pub ttft_ms: f64,
}

impl Usage {
    fn parse(usage: &Value) -> Option<Self> {
        let ours = &usage["rekindle"];
        Some(Self {
            input_tokens: usage["input_tokens"].as_u64()?,
            output_tokens: usage["output_tokens"].as_u64()?,
            resident_tokens: ours["resident_tokens"].as_u64()?,
            shared_tokens: ours["shared_tokens"].as_u64()?,
            reloaded_tokens: ours["reloaded_tokens"].as_u64()?,
            encoded_tokens: ours["encoded_tokens"].as_u64()?,
            reload_ms: ours["reload_ms"].as_f64()?,
            prefill_ms: ours["prefill_ms"].as_f64()?,
            ttft_ms: ours["ttft_ms"].as_f64()?,
        })
    }
}

impl Client {
    pub fn new(url: &str) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build()?;
        Ok(Self { http, url: url.to_owned(), key: None })
    }

    /// The same with a key.
    pub fn with_key(self, key: &str) -> Self {
        Self { key: Some(key.to_owned()), ..self }
    }

    async fn send(&self, request: RequestBuilder) -> anyhow::Result<Response> {
        let request = self.key.iter().fold(request, |request, key| request.bearer_auth(key));
        let response = request.send().await?;
        if response.status().is_success() {
            return Ok(response);
        }
        bail!("{}: {}", response.status(), response.text().await.unwrap_or_default())
    }

    async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let sent = self.send(self.http.post(format!("{}{path}", self.url)).json(body)).await;
        Ok(sent.with_context(|| format!("POST {path}"))?.json().await?)
    }

    pub async fn get(&self, path: &str) -> anyhow::Result<Value> {
        Ok(self.open(path).await?.json().await?)
    }

    /// An answer's beginning; the rest is read as it comes.
    pub async fn open(&self, path: &str) -> anyhow::Result<Response> {
        self.send(self.http.get(format!("{}{path}", self.url))).await.with_context(|| format!("GET {path}"))
    }

    /// The longest sequence that the server runs, in tokens.
    pub async fn window(&self) -> anyhow::Result<u64> {
        let models = self.get("/v1/models").await?;
        models["data"][0]["max_model_len"].as_u64().context("the model has no `max_model_len`")
    }

    /// Makes a conversation, with one item if there is something to say. Returns its id.
    pub async fn create(&self, said: Option<&str>) -> anyhow::Result<String> {
        let items: Vec<Value> = said.map(|text| json!({"role": "user", "content": text})).into_iter().collect();
        let made = self.post("/v1/conversations", &json!({"items": items})).await?;
        Ok(made["id"].as_str().context("a conversation without an id")?.to_owned())
    }

    /// Moves a conversation's KV to `host`, or drops it (`none`).
    pub async fn offload(&self, conversation: &str, to: &str) -> anyhow::Result<()> {
        self.post(&format!("/v1/conversations/{conversation}/offload"), &json!({"to": to})).await?;
        Ok(())
    }

    /// Where a conversation's KV is; makes its session live.
    pub async fn residency(&self, conversation: &str) -> anyhow::Result<Value> {
        self.get(&format!("/v1/conversations/{conversation}/residency")).await
    }

    /// Waits until a conversation's copy in the background is done, so that it disturbs nothing that is timed.
    pub async fn settle(&self, conversation: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + SETTLE_DEADLINE;
        while Instant::now() < deadline {
            let residency = self.residency(conversation).await?;
            let tokens = |tier: &str| residency["tiers"][tier]["tokens"].as_u64().unwrap_or(0);
            if residency["state"] != "running" && tokens("host") >= tokens("device") {
                return Ok(());
            }
            tokio::time::sleep(SETTLE_EVERY).await;
        }
        bail!("{conversation} was still not copied to the host after {SETTLE_DEADLINE:?}")
    }

    /// Begins a turn of exactly `output_tokens` tokens, greedy, streamed.
    pub async fn begin(&self, conversation: &str, said: &str, output_tokens: u32) -> anyhow::Result<Response> {
        let body = json!({
            "conversation": conversation,
            "input": said,
            "temperature": 0,
            "max_output_tokens": output_tokens,
            "min_tokens": output_tokens,
            "stream": true,
        });
        self.send(self.http.post(format!("{}/v1/responses", self.url)).json(&body)).await.context("POST /v1/responses")
    }

    /// Such a turn, to its end.
    pub async fn turn(&self, conversation: &str, said: &str, output_tokens: u32) -> anyhow::Result<Turn> {
        let sent = Instant::now();
        let response = self.begin(conversation, said, output_tokens).await?;
        let mut stream = response.bytes_stream();
        let mut events = Events::default();
        let (mut first, mut text) = (None, String::new());
        while let Some(piece) = stream.next().await {
            events.push(&piece?);
            while let Some(event) = events.next()? {
                match event["type"].as_str() {
                    Some("response.output_text.delta") => {
                        first.get_or_insert_with(|| sent.elapsed());
                        text.push_str(event["delta"].as_str().unwrap_or_default());
                    }
                    Some("response.completed" | "response.incomplete") => {
                        let usage = Usage::parse(&event["response"]["usage"]).context("a usage without its fields")?;
                        let first: Duration = first.context("the answer has no text")?;
                        return Ok(Turn { ttft_ms: first.as_secs_f64() * 1e3, text, usage });
                    }
                    Some("response.failed") => bail!("the turn failed: {}", event["response"]["error"]),
                    _ => {}
                }
            }
        }
        bail!("the stream ended before the turn did")
    }
}

/// Cuts a byte stream into server-sent events.
#[derive(Default)]
pub struct Events {
    buffer: Vec<u8>,
}

impl Events {
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole event's data, if it is there already; the mark at a stream's end is none.
    pub fn next(&mut self) -> anyhow::Result<Option<Value>> {
        while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            if let Some(data) = line.strip_prefix(b"data: ")
                && data.trim_ascii() != b"[DONE]"
            {
                return Ok(Some(serde_json::from_slice(data)?));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_whole_however_the_bytes_were_cut() {
        let stream =
            b"event: a\ndata: {\"type\":\"a\"}\n\n: keep-alive\n\nevent: b\ndata: {\"type\":\"b\"}\n\ndata: [DONE]\n\n";
        for cut in 0..stream.len() {
            let mut events = Events::default();
            let mut seen = Vec::new();
            for piece in [&stream[..cut], &stream[cut..]] {
                events.push(piece);
                while let Some(event) = events.next().unwrap() {
                    seen.push(event["type"].as_str().unwrap().to_owned());
                }
            }
            assert_eq!(seen, ["a", "b"], "cut at {cut}");
        }
    }

    #[test]
    fn an_account_without_one_of_its_fields_is_none() {
        let mut usage = json!({
            "input_tokens": 40, "output_tokens": 4,
            "rekindle": {
                "resident_tokens": 32, "shared_tokens": 0, "reloaded_tokens": 5, "encoded_tokens": 3,
                "reload_ms": 1, "prefill_ms": 2, "ttft_ms": 4,
            },
        });
        assert_eq!(Usage::parse(&usage).unwrap().reloaded_tokens, 5);
        usage["rekindle"]["ttft_ms"].take();
        assert_eq!(Usage::parse(&usage), None);
    }
}
