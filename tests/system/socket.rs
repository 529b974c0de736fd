//! How does a client speak WebSocket, well or badly?
//!
//! Frames are made by hand, so that a test can send what no library would.

use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Longest silence of a server that owes something.
const PATIENCE: Duration = Duration::from_secs(60);

pub const CONTINUATION: u8 = 0;
pub const TEXT: u8 = 1;
pub const BINARY: u8 = 2;
const CLOSE: u8 = 8;
pub const PING: u8 = 9;
const PONG: u8 = 10;
/// Of a frame that ends its message.
pub const FIN: u8 = 0x80;

/// An open socket.
pub struct Socket {
    stream: BufReader<TcpStream>,
    /// The subprotocol that the server chose.
    pub protocol: Option<String>,
}

/// What comes in.
#[derive(Debug, PartialEq)]
pub enum Heard {
    Event(Value),
    Pong(Vec<u8>),
    /// The server's goodbye.
    Close(u16),
    /// The connection ended without one.
    End,
}

impl Socket {
    /// Opens one at a server such as `http://127.0.0.1:8080`.
    pub async fn open(url: &str) -> Self {
        Self::try_open(url, "/v1/responses", &[]).await.expect("the upgrade succeeds")
    }

    /// The same with headers; a refusal's status and body if it fails.
    pub async fn try_open(url: &str, path: &str, headers: &[(&str, &str)]) -> Result<Self, (u16, Value)> {
        let host = url.strip_prefix("http://").unwrap();
        let mut stream = BufReader::new(TcpStream::connect(host).await.unwrap());
        let more: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            timeout(PATIENCE, stream.read_line(&mut line)).await.expect("the server answers").unwrap();
            if line.trim().is_empty() {
                break;
            }
            head.push(line.trim().to_ascii_lowercase());
        }
        let header =
            |name: &str| head.iter().find_map(|line| line.strip_prefix(&format!("{name}: ")).map(str::to_owned));
        let status = head[0].split(' ').nth(1).unwrap().parse().unwrap();
        if status != 101 {
            let mut body = vec![0; header("content-length").unwrap().parse().unwrap()];
            stream.read_exact(&mut body).await.unwrap();
            return Err((status, serde_json::from_slice(&body).unwrap()));
        }
        assert!(header("x-request-id").is_some_and(|id| id.starts_with("req_")), "{head:?}");
        Ok(Self { stream, protocol: header("sec-websocket-protocol") })
    }

    /// The client's own port.
    pub fn port(&self) -> u16 {
        self.stream.get_ref().local_addr().unwrap().port()
    }

    /// Sends an event as one frame.
    pub async fn send(&mut self, event: &Value) {
        self.frame(FIN | TEXT, event.to_string().as_bytes()).await;
    }

    /// Sends a masked frame, whatever its first byte says.
    pub async fn frame(&mut self, first: u8, payload: &[u8]) {
        let mut frame = vec![first];
        match payload.len() {
            len @ 0..126 => frame.push(0x80 | len as u8),
            len @ 126..65_536 => {
                frame.push(0x80 | 126);
                frame.extend((len as u16).to_be_bytes());
            }
            len => {
                frame.push(0x80 | 127);
                frame.extend((len as u64).to_be_bytes());
            }
        }
        let mask = [1, 2, 3, 4];
        frame.extend(mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        self.raw(&frame).await;
    }

    /// Sends bytes that need be no frame. A server that has closed the socket may refuse them.
    pub async fn raw(&mut self, bytes: &[u8]) {
        drop(self.stream.write_all(bytes).await);
    }

    /// The next thing that comes; pings are answered.
    pub async fn next(&mut self) -> Heard {
        timeout(PATIENCE, self.read()).await.expect("the server says something").unwrap_or(Heard::End)
    }

    async fn read(&mut self) -> std::io::Result<Heard> {
        loop {
            let [first, len] = [self.stream.read_u8().await?, self.stream.read_u8().await?];
            assert_eq!(first & FIN, FIN, "the server sends whole messages");
            let len = match len {
                126 => usize::from(self.stream.read_u16().await?),
                127 => self.stream.read_u64().await? as usize,
                len => usize::from(len),
            };
            let mut payload = vec![0; len];
            self.stream.read_exact(&mut payload).await?;
            match first & 15 {
                TEXT => return Ok(Heard::Event(serde_json::from_slice(&payload).expect("an event is JSON"))),
                PING => self.frame(FIN | PONG, &payload).await,
                PONG => return Ok(Heard::Pong(payload)),
                CLOSE => return Ok(Heard::Close(payload.first_chunk().map_or(0, |code| u16::from_be_bytes(*code)))),
                other => panic!("a frame of kind {other}"),
            }
        }
    }

    /// The next event; fails on anything else.
    pub async fn event(&mut self) -> Value {
        match self.next().await {
            Heard::Event(event) => event,
            other => panic!("no event but {other:?}"),
        }
    }

    /// The next event of a server that may be busy for longer.
    pub async fn event_within(&mut self, patience: Duration) -> Value {
        match timeout(patience, self.read()).await.expect("the server says something") {
            Ok(Heard::Event(event)) => event,
            other => panic!("no event but {other:?}"),
        }
    }

    /// All events up to the first of one of these kinds.
    pub async fn until(&mut self, kinds: &[&str]) -> Vec<Value> {
        let mut events = Vec::new();
        loop {
            events.push(self.event().await);
            if kinds.contains(&kind(events.last().unwrap())) {
                return events;
            }
        }
    }

    /// All events of the next response to end, if no other runs beside it.
    pub async fn response(&mut self) -> Vec<Value> {
        self.until(&["response.completed", "response.incomplete", "response.failed", "error"]).await
    }

    /// Reads to the end of the connection; the code of the goodbye, if there was one.
    pub async fn goodbye(&mut self) -> Option<u16> {
        let mut code = None;
        loop {
            match self.next().await {
                Heard::Close(said) => code = Some(said),
                Heard::End => return code,
                Heard::Event(_) | Heard::Pong(_) => {}
            }
        }
    }
}

/// `type` of an event.
pub fn kind(event: &Value) -> &str {
    event["type"].as_str().expect("an event has a type")
}
