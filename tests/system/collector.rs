//! What does a collector of traces receive?
//!
//! A small HTTP server that takes OTLP in protobuf, and the spans as a test reads them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// A span as it came.
#[derive(Clone, Debug)]
pub struct Told {
    pub trace: String,
    pub id: String,
    /// Empty at the root.
    pub parent: String,
    pub name: String,
    pub is_of_a_server: bool,
    pub failed: bool,
    /// Nanoseconds since 1970.
    pub from: u64,
    pub to: u64,
    pub attributes: BTreeMap<String, String>,
    /// Names of events in it.
    pub events: Vec<String>,
}

impl Told {
    fn of(span: Span) -> Self {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let attributes = span.attributes.into_iter().map(|about| (about.key, text(about.value)));
        Self {
            trace: hex(&span.trace_id),
            id: hex(&span.span_id),
            parent: hex(&span.parent_span_id),
            name: span.name,
            is_of_a_server: span.kind == 2,
            failed: span.status.is_some_and(|status| status.code == 2),
            from: span.start_time_unix_nano,
            to: span.end_time_unix_nano,
            attributes: attributes.collect(),
            events: span.events.into_iter().map(|event| event.name).collect(),
        }
    }

    #[track_caller]
    pub fn says(&self, key: &str) -> &str {
        self.attributes.get(key).unwrap_or_else(|| panic!("no `{key}` in {self:?}"))
    }
}

fn text(value: Option<AnyValue>) -> String {
    match value.and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::BoolValue(yes)) => yes.to_string(),
        Some(Value::ArrayValue(list)) => list.values.into_iter().map(|value| text(Some(value))).collect(),
        other => format!("{other:?}"),
    }
}

/// A collector on a free port.
pub struct Collector {
    pub url: String,
    spans: Arc<Mutex<Vec<Told>>>,
}

impl Collector {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let spans = Arc::<Mutex<Vec<Told>>>::default();
        let taken = Arc::clone(&spans);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(take(stream, Arc::clone(&taken)));
            }
        });
        Self { url, spans }
    }

    pub fn spans(&self) -> Vec<Told> {
        self.spans.lock().unwrap().clone()
    }

    /// The spans of a trace that there is.
    pub fn trace(&self, id: &str) -> Vec<Told> {
        self.spans().into_iter().filter(|span| span.trace == id).collect()
    }
}

/// Takes what comes over one connection. What is not as the protocol says fails the task, and with it what waits for spans.
async fn take(stream: TcpStream, spans: Arc<Mutex<Vec<Told>>>) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await.unwrap() == 0 {
                return;
            }
            if line.trim().is_empty() {
                break;
            }
            head.push(line.trim().to_ascii_lowercase());
        }
        assert!(head[0].starts_with("post /v1/traces "), "{head:?}");
        assert!(head.contains(&"content-type: application/x-protobuf".to_owned()), "{head:?}");
        let length = head.iter().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        let mut body = vec![0; length.parse().unwrap()];
        stream.read_exact(&mut body).await.unwrap();
        let request = ExportTraceServiceRequest::decode(body.as_slice()).unwrap();
        for of_resource in request.resource_spans {
            let about = of_resource.resource.unwrap().attributes;
            let service = about.into_iter().find(|about| about.key == "service.name").unwrap();
            assert_eq!(text(service.value), "rekindle");
            let told = of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans).map(Told::of);
            spans.lock().unwrap().extend(told);
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    }
}
