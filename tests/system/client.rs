//! What does a client send, and what does it get back?

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use reqwest::RequestBuilder;
use serde_json::{Value, json};

/// Tokens of an answer: enough to show a difference, few enough to be quick.
pub const ANSWER_TOKENS: u32 = 8;

/// One client of one server.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    url: String,
}

/// An answer, and what it cost.
#[derive(Clone, Debug)]
pub struct Answer {
    pub text: String,
    pub tokens: Vec<Token>,
    pub usage: Usage,
    /// From sending the request to having the answer.
    pub took: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    pub bytes: Vec<u8>,
    pub logprob: f64,
}

/// Where the tokens of a prompt came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub input: u64,
    pub cached: u64,
    pub output: u64,
    pub resident: u64,
    pub shared: u64,
    pub reloaded: u64,
    pub encoded: u64,
    pub reencoded: u64,
    pub ttft_ms: u64,
    pub decision: String,
}

/// One item of a conversation, as a client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    pub id: String,
    pub role: String,
    pub text: String,
}

impl Client {
    pub fn of(url: &str) -> Self {
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { http, url: url.to_owned() }
    }

    /// One that sends this API key.
    pub fn with_key(url: &str, key: &str) -> Self {
        let value = format!("Bearer {key}").parse().unwrap();
        let headers = [(reqwest::header::AUTHORIZATION, value)].into_iter().collect();
        let http = reqwest::Client::builder().no_proxy().default_headers(headers).build().unwrap();
        Self { http, url: url.to_owned() }
    }

    pub fn get(&self, path: &str) -> RequestBuilder {
        self.http.get(format!("{}{path}", self.url))
    }

    pub fn request(&self, method: &str, path: &str) -> RequestBuilder {
        self.http.request(method.parse().unwrap(), format!("{}{path}", self.url))
    }

    pub fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        self.http.post(format!("{}{path}", self.url)).json(body)
    }

    pub fn delete(&self, path: &str) -> RequestBuilder {
        self.http.delete(format!("{}{path}", self.url))
    }

    /// Sends and expects success.
    pub async fn json(&self, request: RequestBuilder) -> Value {
        let response = request.send().await.expect("the server answers");
        let status = response.status();
        let body: Value = response.json().await.expect("the answer is JSON");
        assert!(status.is_success(), "{status}: {body}");
        body
    }

    /// A new conversation's id.
    pub async fn conversation(&self) -> String {
        let made = self.json(self.post("/v1/conversations", &json!({}))).await;
        made["id"].as_str().unwrap().to_owned()
    }

    /// The request of one turn. Without `said` the model answers the history as it stands.
    pub fn turn(&self, conversation: &str, said: Option<&str>) -> RequestBuilder {
        let mut body = json!({
            "conversation": conversation,
            "max_output_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "include": ["message.output_text.logprobs"],
        });
        if let Some(said) = said {
            body["input"] = json!(said);
        }
        self.post("/v1/responses", &body)
    }

    /// One turn that must succeed.
    pub async fn say(&self, conversation: &str, said: &str) -> Answer {
        self.try_turn(conversation, Some(said)).await.expect("the server answers")
    }

    /// One turn; an error if the connection breaks.
    pub async fn try_turn(&self, conversation: &str, said: Option<&str>) -> reqwest::Result<Answer> {
        let started = Instant::now();
        let response = self.turn(conversation, said).send().await?;
        let status = response.status();
        let body: Value = response.json().await?;
        assert!(status.is_success(), "{status}: {body}");
        Ok(Answer::of(&body, started.elapsed()))
    }

    pub async fn offload(&self, conversation: &str, to: &str) -> Value {
        self.json(self.post(&format!("/v1/conversations/{conversation}/offload"), &json!({"to": to}))).await
    }

    /// Deletes a conversation and every copy of its KV.
    pub async fn delete_conversation(&self, conversation: &str) {
        let deleted = self.json(self.delete(&format!("/v1/conversations/{conversation}"))).await;
        assert_eq!((&deleted["deleted"], &deleted["rekindle"]["remaining_bytes"]), (&json!(true), &json!(0)));
    }

    /// All items in their order, page by page.
    pub async fn items(&self, conversation: &str) -> Vec<Item> {
        let (mut items, mut after) = (Vec::new(), String::new());
        loop {
            let page =
                self.json(self.get(&format!("/v1/conversations/{conversation}/items?order=asc&limit=3{after}"))).await;
            items.extend(page["data"].as_array().unwrap().iter().map(Item::of));
            if page["has_more"] == false {
                return items;
            }
            after = format!("&after={}", page["last_id"].as_str().unwrap());
        }
    }

    pub async fn metrics(&self) -> Metrics {
        Metrics::of(&self.get("/metrics").send().await.unwrap().text().await.unwrap())
    }
}

impl Answer {
    fn of(response: &Value, took: Duration) -> Self {
        let part = &response["output"][0]["content"][0];
        let tokens = part["logprobs"].as_array().unwrap().iter().map(|token| Token {
            bytes: serde_json::from_value(token["bytes"].clone()).unwrap(),
            logprob: token["logprob"].as_f64().unwrap(),
        });
        Self {
            text: part["text"].as_str().unwrap().to_owned(),
            tokens: tokens.collect(),
            usage: Usage::of(&response["usage"]),
            took,
        }
    }

    /// Fails unless two answers are the same, token for token and to the last bit of each probability.
    #[track_caller]
    pub fn assert_same(&self, other: &Self, whose: &str) {
        assert_eq!(self.text, other.text, "{whose}: another text");
        assert_eq!(self.tokens, other.tokens, "{whose}: other tokens or probabilities");
    }
}

impl Usage {
    pub fn of(usage: &Value) -> Self {
        let number =
            |path: &str| usage.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path}: {usage}"));
        Self {
            input: number("/input_tokens"),
            cached: number("/input_tokens_details/cached_tokens"),
            output: number("/output_tokens"),
            resident: number("/rekindle/resident_tokens"),
            shared: number("/rekindle/shared_tokens"),
            reloaded: number("/rekindle/reloaded_tokens"),
            encoded: number("/rekindle/encoded_tokens"),
            reencoded: number("/rekindle/reencoded_tokens"),
            ttft_ms: number("/rekindle/ttft_ms"),
            decision: usage["rekindle"]["decision"].as_str().unwrap().to_owned(),
        }
    }

    /// Fails unless the parts make the whole.
    #[track_caller]
    pub fn assert_adds_up(&self) {
        assert_eq!(self.cached, self.resident + self.shared + self.reloaded, "{self:?}");
        assert_eq!(self.input, self.cached + self.encoded, "{self:?}");
        assert!(self.reencoded <= self.encoded, "{self:?}");
    }
}

impl Item {
    fn of(item: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        Self { id: text(&item["id"]), role: text(&item["role"]), text: text(&item["content"][0]["text"]) }
    }
}

/// The metrics page, by name with labels.
#[derive(Debug)]
pub struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    fn of(page: &str) -> Self {
        let lines = page.lines().filter(|line| !line.starts_with('#'));
        Self(
            lines
                .filter_map(|line| Some((line.rsplit_once(' ')?.0.to_owned(), line.rsplit_once(' ')?.1.parse().ok()?)))
                .collect(),
        )
    }

    /// A whole number, such as a count of tokens.
    #[track_caller]
    pub fn count(&self, name: &str) -> u64 {
        let value = *self.0.get(name).unwrap_or_else(|| panic!("{name} is not on the metrics page"));
        assert!(value >= 0.0 && value.fract() == 0.0, "{name} is {value}");
        value as u64
    }

    /// What is counted: a metric's name, with its labels.
    pub fn series(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    pub fn turns(&self, outcome: &str) -> u64 {
        self.count(&format!("rekindle_turns_total{{outcome=\"{outcome}\"}}"))
    }

    pub fn prompt_tokens(&self, source: &str) -> u64 {
        self.count(&format!("rekindle_prompt_tokens_total{{source=\"{source}\"}}"))
    }

    pub fn free_bytes(&self, tier: &str) -> u64 {
        self.count(&format!("rekindle_pool_free_bytes{{tier=\"{tier}\"}}"))
    }

    pub fn pool_bytes(&self, tier: &str) -> u64 {
        self.count(&format!("rekindle_pool_bytes{{tier=\"{tier}\"}}"))
    }
}
