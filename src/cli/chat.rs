//! How does a person talk to a running server from a terminal?
//!
//! A conversation of the server's own, so that each turn sends only the new message; a dim line after each answer says
//! what that saved. Also reads from a pipe, a message a line.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use futures_util::StreamExt;
use rustyline::error::ReadlineError;
use serde_json::{Value, json};

use crate::types::counted;

/// `rekindle chat`
#[derive(Args, Clone, Debug)]
pub struct ChatArgs {
    /// Where the server is
    #[arg(long, default_value = "http://127.0.0.1:8080", env = "REKINDLE_URL")]
    pub url: String,
    /// The tenant's API key, if the server wants one
    #[arg(long, env = "REKINDLE_API_KEY", hide_env_values = true, default_value = "")]
    pub api_key: String,
    /// Go on with this conversation (conv_…) instead of starting one
    #[arg(long)]
    pub conversation: Option<String>,
    /// A system message for the new conversation
    #[arg(long, conflicts_with = "conversation")]
    pub system: Option<String>,
    /// The model to name in requests; the server's only one if left out
    #[arg(long)]
    pub model: Option<String>,
}

const HELP: &str = "\
/new        start another conversation
/history    show this one from its start
/residency  where its KV cache is now
/offload    move its KV cache to the host's memory (/offload none: drop it)
/quit       leave; the conversation stays on the server
Ctrl-C stops an answer, Ctrl-D leaves.";

/// Dim on a terminal, plain in a pipe.
fn dim(text: &str) -> String {
    if std::io::stdout().is_terminal() { format!("\x1b[2m{text}\x1b[0m") } else { text.to_owned() }
}

/// Talks until the input ends.
pub async fn run(args: ChatArgs) -> anyhow::Result<()> {
    let server = Server::new(&args)?;
    let mut chat = match &args.conversation {
        Some(id) => {
            server.get(&format!("/v1/conversations/{id}")).await?;
            Chat { server, id: id.clone(), system: args.system.clone() }
        }
        None => Chat::start(server, args.system.clone()).await?,
    };
    let mut input = Input::open()?;
    if input.is_terminal() {
        println!("{}", dim(&format!("{} — /help for commands", chat.id)));
    }
    loop {
        let (back, line) = input.line().await?;
        input = back;
        let Some(line) = line else { return Ok(()) };
        let said = match line.trim() {
            "" => Ok(()),
            "/quit" | "/exit" => return Ok(()),
            "/help" => {
                println!("{HELP}");
                Ok(())
            }
            "/new" => chat.renew().await,
            "/history" => chat.history().await,
            "/residency" => chat.residency().await,
            "/offload" => chat.offload("host").await,
            "/offload none" => chat.offload("none").await,
            command if command.starts_with('/') && !command.contains(char::is_whitespace) => {
                println!("there is no {command}; /help has the commands");
                Ok(())
            }
            _ => chat.turn(&line).await,
        };
        if let Err(error) = said {
            // A pipe has nobody who could try again.
            if !input.is_terminal() {
                return Err(error);
            }
            println!("{error:#}");
        }
    }
}

/// Where lines come from.
enum Input {
    Terminal { editor: Box<rustyline::DefaultEditor>, history: Option<PathBuf> },
    Pipe,
}

impl Input {
    fn open() -> anyhow::Result<Self> {
        if !std::io::stdin().is_terminal() {
            return Ok(Self::Pipe);
        }
        let mut editor = Box::new(rustyline::DefaultEditor::new()?);
        let history = history_file();
        if let Some(path) = &history {
            // There is none at the first start.
            drop(editor.load_history(path));
        }
        Ok(Self::Terminal { editor, history })
    }

    fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal { .. })
    }

    /// The next line; `None` at the end. Reads on a thread of its own, so that the runtime goes on.
    async fn line(self) -> anyhow::Result<(Self, Option<String>)> {
        tokio::task::spawn_blocking(|| match self {
            Self::Pipe => {
                let mut line = String::new();
                let read = std::io::stdin().lock().read_line(&mut line)?;
                Ok((Self::Pipe, (read > 0).then(|| line.trim_end_matches(['\r', '\n']).to_owned())))
            }
            Self::Terminal { mut editor, history } => {
                let line = match editor.readline("> ") {
                    Ok(line) => Some(line),
                    Err(ReadlineError::Interrupted) => Some(String::new()),
                    Err(ReadlineError::Eof) => None,
                    Err(error) => return Err(error.into()),
                };
                if let (Some(line), Some(path)) = (line.as_ref().filter(|line| !line.trim().is_empty()), &history) {
                    editor.add_history_entry(line)?;
                    // A history that can't be kept is no reason to stop talking.
                    drop(editor.save_history(path));
                }
                Ok((Self::Terminal { editor, history }, line))
            }
        })
        .await?
    }
}

fn history_file() -> Option<PathBuf> {
    let home = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder =
        home("XDG_STATE_HOME").or_else(|| home("HOME").map(|home| home.join(".local/state")))?.join("rekindle");
    std::fs::create_dir_all(&folder).ok()?;
    Some(folder.join("chat_history"))
}

/// A running server.
struct Server {
    client: reqwest::Client,
    url: String,
    key: String,
    model: Option<String>,
}

impl Server {
    fn new(args: &ChatArgs) -> anyhow::Result<Self> {
        let url = args.url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let client = reqwest::Client::builder().connect_timeout(Duration::from_secs(5)).build()?;
        Ok(Self { client, url, key: args.api_key.clone(), model: args.model.clone() })
    }

    async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.answer(self.client.get(format!("{}{path}", self.url))).await
    }

    async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.answer(self.client.post(format!("{}{path}", self.url)).json(body)).await
    }

    async fn answer(&self, request: reqwest::RequestBuilder) -> anyhow::Result<Value> {
        Ok(self.send(request).await?.json().await?)
    }

    /// Sends; a refusal becomes an error with the server's own sentence.
    async fn send(&self, request: reqwest::RequestBuilder) -> anyhow::Result<reqwest::Response> {
        let request = if self.key.is_empty() { request } else { request.bearer_auth(&self.key) };
        let sent = request.send().await;
        let response =
            sent.with_context(|| format!("no server answers at {}; start one with `rekindle serve`", self.url))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body: Value = response.json().await.unwrap_or_default();
        match body.pointer("/error/message").and_then(Value::as_str) {
            Some(message) => Err(anyhow!("{message} ({status})")),
            None => Err(anyhow!("the server answered {status}")),
        }
    }
}

/// A conversation in progress.
struct Chat {
    server: Server,
    id: String,
    system: Option<String>,
}

impl Chat {
    async fn start(server: Server, system: Option<String>) -> anyhow::Result<Self> {
        let items: Vec<_> = system.iter().map(|text| json!({"role": "system", "content": text})).collect();
        let made = server.post("/v1/conversations", &json!({"items": items})).await?;
        let id = made.get("id").and_then(Value::as_str).context("the server's conversation has no id")?.to_owned();
        Ok(Self { server, id, system })
    }

    async fn renew(&mut self) -> anyhow::Result<()> {
        let items: Vec<_> = self.system.iter().map(|text| json!({"role": "system", "content": text})).collect();
        let made = self.server.post("/v1/conversations", &json!({"items": items})).await?;
        self.id = made.get("id").and_then(Value::as_str).context("the server's conversation has no id")?.to_owned();
        println!("{}", dim(&self.id));
        Ok(())
    }

    /// Sends one message and shows the answer as it comes. Ctrl-C drops the connection, which cancels the turn.
    async fn turn(&self, text: &str) -> anyhow::Result<()> {
        let mut body = json!({"conversation": self.id, "input": text, "stream": true});
        if let (Some(model), Some(body)) = (&self.server.model, body.as_object_mut()) {
            body.insert("model".into(), json!(model));
        }
        let request = self.server.client.post(format!("{}/v1/responses", self.server.url)).json(&body);
        let talk = async {
            let mut pieces = self.server.send(request).await?.bytes_stream();
            let mut events = Events::default();
            while let Some(piece) = pieces.next().await {
                events.feed(&piece.context("the connection broke off in the middle of an answer")?);
                while let Some(event) = events.next() {
                    if show(&event)? {
                        return Ok(());
                    }
                }
            }
            bail!("the answer ended without a last word")
        };
        tokio::select! {
            told = talk => told,
            pressed = tokio::signal::ctrl_c() => {
                pressed?;
                println!("\n{}", dim("stopped; what was said is kept"));
                Ok(())
            }
        }
    }

    async fn history(&self) -> anyhow::Result<()> {
        let mut after = String::new();
        loop {
            let path = format!("/v1/conversations/{}/items?order=asc&limit=100&after={after}", self.id);
            let page = self.server.get(&path).await?;
            for item in page.get("data").and_then(Value::as_array).into_iter().flatten() {
                let role = item.get("role").and_then(Value::as_str).unwrap_or("?");
                let parts = item.get("content").and_then(Value::as_array).into_iter().flatten();
                let text: Vec<_> = parts.filter_map(|part| part.get("text").and_then(Value::as_str)).collect();
                println!("{} {}", dim(&format!("{role}:")), text.join("\n"));
            }
            match page.get("last_id").and_then(Value::as_str) {
                Some(last) if page.get("has_more") == Some(&Value::Bool(true)) => after = last.to_owned(),
                _ => return Ok(()),
            }
        }
    }

    async fn residency(&self) -> anyhow::Result<()> {
        let shown = self.server.get(&format!("/v1/conversations/{}/residency", self.id)).await?;
        println!("{}", residency_line(&shown));
        Ok(())
    }

    async fn offload(&self, to: &str) -> anyhow::Result<()> {
        let path = format!("/v1/conversations/{}/offload", self.id);
        let moved = self.server.post(&path, &json!({"to": to})).await?;
        let number = |name: &str| moved.get(name).and_then(Value::as_u64).unwrap_or(0);
        println!(
            "{}",
            dim(&format!("{} left the device in {} ms", counted(number("bytes"), "byte", "bytes"), number("ms")))
        );
        Ok(())
    }
}

/// Shows one event; true if it was the last.
fn show(event: &Value) -> anyhow::Result<bool> {
    match event.get("type").and_then(Value::as_str) {
        Some("response.output_text.delta") => {
            print!("{}", event.get("delta").and_then(Value::as_str).unwrap_or_default());
            std::io::stdout().flush()?;
            Ok(false)
        }
        Some("response.completed" | "response.incomplete") => {
            let response = event.get("response").cloned().unwrap_or_default();
            println!("\n{}", dim(&usage_line(&response)));
            Ok(true)
        }
        Some("response.failed") => {
            let message = event.pointer("/response/error/message").and_then(Value::as_str);
            bail!("{}", message.unwrap_or("the turn failed"))
        }
        _ => Ok(false),
    }
}

/// What a turn reused, reloaded and encoded, and how long that took.
fn usage_line(response: &Value) -> String {
    let number = |path: &str| response.pointer(path).and_then(Value::as_u64).unwrap_or(0);
    let ours = |name: &str| number(&format!("/usage/rekindle/{name}"));
    let tokens = |number: u64| counted(number, "token", "tokens");
    let mut parts = vec![format!("{} reused", tokens(ours("resident_tokens") + ours("shared_tokens")))];
    if ours("reloaded_tokens") > 0 {
        parts.push(format!("{} reloaded in {} ms", ours("reloaded_tokens"), ours("reload_ms")));
    }
    parts.push(format!("{} encoded in {} ms", ours("encoded_tokens"), ours("prefill_ms")));
    if ours("reencoded_tokens") > 0 {
        parts.push(format!("{} of them again", ours("reencoded_tokens")));
    }
    parts.push(format!("first token {} ms", ours("ttft_ms")));
    parts.push(format!("{} in {} ms", tokens(number("/usage/output_tokens")), ours("decode_ms")));
    match response.get("status").and_then(Value::as_str) {
        Some("incomplete") => parts.push("cut at the limit".to_owned()),
        Some("cancelled") => parts.push("cancelled".to_owned()),
        _ => {}
    }
    parts.join(" · ")
}

fn residency_line(shown: &Value) -> String {
    let tier = |name: &str| shown.pointer(&format!("/tiers/{name}/tokens")).and_then(Value::as_u64).unwrap_or(0);
    let state = shown.get("state").and_then(Value::as_str).unwrap_or("?");
    let tokens = shown.get("tokens").and_then(Value::as_u64).unwrap_or(0);
    dim(&format!(
        "{state}: {} of history; device {}, host {}, disk {}",
        counted(tokens, "token", "tokens"),
        tier("device"),
        tier("host"),
        tier("disk")
    ))
}

/// Server-sent events out of the pieces that a connection gives.
#[derive(Default)]
struct Events {
    bytes: Vec<u8>,
}

impl Events {
    fn feed(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
    }

    /// The JSON of the next whole event that has some.
    fn next(&mut self) -> Option<Value> {
        loop {
            let end = self.bytes.windows(2).position(|pair| pair == b"\n\n")?;
            let event: Vec<u8> = self.bytes.drain(..end + 2).collect();
            let lines = event.split(|byte| *byte == b'\n');
            let data = lines.filter_map(|line| line.strip_prefix(b"data: ")).next();
            if let Some(value) = data.and_then(|data| serde_json::from_slice(data).ok()) {
                return Some(value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_found_wherever_the_pieces_are_cut() {
        let stream =
            ": keep-alive\n\nevent: a\ndata: {\"type\":\"a\",\"x\":\"é\"}\n\nevent: b\ndata: {\"type\":\"b\"}\n\n";
        for size in 1..stream.len() {
            let (mut events, mut seen) = (Events::default(), Vec::new());
            for piece in stream.as_bytes().chunks(size) {
                events.feed(piece);
                seen.extend(std::iter::from_fn(|| events.next()));
            }
            assert_eq!(seen, [json!({"type": "a", "x": "é"}), json!({"type": "b"})], "pieces of {size}");
        }
    }

    #[test]
    fn the_line_after_an_answer_tells_what_was_reused_reloaded_and_encoded_again() {
        let response = json!({"status": "incomplete", "usage": {"output_tokens": 64, "rekindle": {
            "resident_tokens": 3072, "shared_tokens": 256, "reloaded_tokens": 512, "encoded_tokens": 41,
            "reencoded_tokens": 7, "reload_ms": 9, "prefill_ms": 19, "ttft_ms": 31, "decode_ms": 640}}});
        assert_eq!(
            usage_line(&response),
            "3328 tokens reused · 512 reloaded in 9 ms · 41 encoded in 19 ms · 7 of them again · first token 31 ms · \
             64 tokens in 640 ms · cut at the limit"
        );
    }
}
