//! Which events does a response have, and which number does each bear?
//!
//! A pure function of the turn's updates: each reader of a turn, now or from the store, over SSE or a socket, gets the same
//! events with the same numbers, from 0 without gaps. Exactly one terminal event, always last.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::collections::VecDeque;

use serde_json::{Map, Value, json};

use super::super::error::ApiError;
use super::super::{items, sse};
use super::object::{Echo, Outcome, answer};
use crate::sessions::Turn;
use crate::sessions::messages::{FinishReason, ResponseId, TokenLogprob, TurnDone, TurnUpdate};

/// One event, whatever carries it.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub sequence: u64,
    pub kind: &'static str,
    /// The whole object, `type` and `sequence_number` included.
    pub body: Map<String, Value>,
}

impl Event {
    pub fn to_sse(&self) -> String {
        format!("event: {}\ndata: {}\n\n", self.kind, Value::from(self.body.clone()))
    }
}

/// The events of one response, as they come.
pub struct Events {
    turn: Turn,
    narrator: Narrator,
    waiting: VecDeque<Event>,
    ended: bool,
    /// Events up to this number are not wanted.
    after: Option<u64>,
}

impl Events {
    /// From the beginning, or after the event with this number.
    pub fn of(turn: Turn, after: Option<u64>) -> Result<Self, ApiError> {
        let mut narrator = Narrator::new(Echo::from_about(&turn.about)?, turn.id, turn.stream.item_id());
        let waiting = narrator.open().into();
        Ok(Self { turn, narrator, waiting, ended: false, after })
    }

    /// The next event; `None` after the terminal one.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            while let Some(event) = self.waiting.pop_front() {
                if self.after.is_none_or(|after| event.sequence > after) {
                    return Some(event);
                }
            }
            if self.ended {
                return None;
            }
            let update = self.turn.stream.next().await;
            self.ended = !matches!(update, Some(TurnUpdate::Started { .. } | TurnUpdate::Text { .. }));
            self.waiting.extend(match update {
                Some(TurnUpdate::Started { .. }) => Vec::new(),
                Some(TurnUpdate::Text { delta, logprobs }) => self.narrator.text(&delta, &logprobs),
                Some(TurnUpdate::Done(done)) => self.narrator.done(&done),
                Some(TurnUpdate::Failed(error)) => self.narrator.failed(&error.into()),
                None => self.narrator.failed(&sse::cut_short().into()),
            });
        }
    }
}

/// Tells a turn in events.
struct Narrator {
    echo: Echo,
    id: ResponseId,
    item_id: String,
    /// The deltas so far.
    text: String,
    /// Whether the answer's item has been opened.
    begun: bool,
    sequence: u64,
}

impl Narrator {
    fn new(echo: Echo, id: ResponseId, item_id: &str) -> Self {
        Self { echo, id, item_id: item_id.to_owned(), text: String::new(), begun: false, sequence: 0 }
    }

    fn event(&mut self, kind: &'static str, body: Value) -> Event {
        let sequence = self.sequence;
        self.sequence += 1;
        let mut event = Map::new();
        event.insert("type".into(), json!(kind));
        event.insert("sequence_number".into(), json!(sequence));
        if let Value::Object(body) = body {
            event.extend(body);
        }
        Event { sequence, kind, body: event }
    }

    /// An event about the answer's only part.
    fn part_event(&mut self, kind: &'static str, body: Value) -> Event {
        let mut about = json!({"item_id": self.item_id, "output_index": 0, "content_index": 0});
        if let (Value::Object(about), Value::Object(body)) = (&mut about, body) {
            about.extend(body);
        }
        self.event(kind, about)
    }

    /// Opens the answer's item, once.
    fn begin(&mut self) -> Vec<Event> {
        if std::mem::replace(&mut self.begun, true) {
            return Vec::new();
        }
        let item = items::message(&self.item_id, "assistant", "in_progress", &[]);
        let added = self.event("response.output_item.added", json!({"output_index": 0, "item": item}));
        vec![added, self.part_event("response.content_part.added", json!({"part": items::output_text("", &[])}))]
    }

    /// Before anything: the turn is admitted.
    fn open(&mut self) -> Vec<Event> {
        let response = json!({"response": self.echo.response(self.id, &Outcome::Running)});
        vec![self.event("response.created", response.clone()), self.event("response.in_progress", response)]
    }

    fn text(&mut self, delta: &str, tokens: &[TokenLogprob]) -> Vec<Event> {
        let mut events = self.begin();
        self.text += delta;
        let body = json!({"delta": delta, "logprobs": items::logprobs(tokens)});
        events.push(self.part_event("response.output_text.delta", body));
        events
    }

    /// The last events, after a turn that ended by itself or was cancelled.
    fn done(&mut self, done: &TurnDone) -> Vec<Event> {
        let mut events = Vec::new();
        if self.text != done.text {
            // As after the deletion of the answer's item, whose text is nowhere else.
            tracing::debug!(item = self.item_id, "the deltas of an answer are not its text");
        }
        if let Some(item) = answer(done) {
            events = self.begin();
            let tokens = items::logprobs(&done.logprobs);
            events.push(self.part_event("response.output_text.done", json!({"text": done.text, "logprobs": tokens})));
            let part = items::output_text(&done.text, &done.logprobs);
            events.push(self.part_event("response.content_part.done", json!({"part": part})));
            events.push(self.event("response.output_item.done", json!({"output_index": 0, "item": item})));
        }
        let last = match done.finish {
            FinishReason::Stop => "response.completed",
            FinishReason::Length | FinishReason::Cancelled => "response.incomplete",
        };
        let response = self.echo.response(self.id, &Outcome::Ended(done));
        events.push(self.event(last, json!({"response": response})));
        events
    }

    /// The last event, after a turn that failed.
    fn failed(&mut self, error: &ApiError) -> Vec<Event> {
        let response = self.echo.response(self.id, &Outcome::Failed(error));
        vec![self.event("response.failed", json!({"response": response}))]
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::settings;
    use super::super::super::usage::tests::done;
    use super::*;
    use crate::sessions::messages::{Goal, Place, TurnError};

    fn narrator() -> Narrator {
        Narrator::new(Echo::of(&Map::new(), Place::NewChain, &settings()), ResponseId(1), "msg_1")
    }

    fn read(events: Vec<Vec<Event>>) -> Vec<Value> {
        let read = |event: Event| {
            let sse = event.to_sse();
            let (kind, data) = sse.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
            let data: Value = serde_json::from_str(data.strip_suffix("\n\n").unwrap()).unwrap();
            assert_eq!((&data["type"], &data["sequence_number"]), (&json!(kind), &json!(event.sequence)));
            data
        };
        events.into_iter().flatten().map(read).collect()
    }

    const ORDER: [&str; 8] = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ];

    #[test]
    fn events_come_in_order_numbered_and_add_up_to_the_response() {
        for (finish, last, status, item_status) in [
            (FinishReason::Stop, "response.completed", "completed", "completed"),
            (FinishReason::Length, "response.incomplete", "incomplete", "incomplete"),
            (FinishReason::Cancelled, "response.incomplete", "cancelled", "incomplete"),
        ] {
            let mut narrator = narrator();
            let told = read(vec![
                narrator.open(),
                narrator.text("Hel", &[]),
                narrator.text("lo!", &[]),
                narrator.done(&TurnDone { finish, ..done() }),
            ]);
            let mut kinds: Vec<_> = told.iter().map(|event| event["type"].as_str().unwrap()).collect();
            kinds.dedup();
            assert_eq!(kinds, [&ORDER[..], &[last]].concat());
            let numbers: Vec<_> = told.iter().map(|event| event["sequence_number"].as_u64().unwrap()).collect();
            assert_eq!(numbers, (0..told.len() as u64).collect::<Vec<_>>());
            let text: String = told.iter().filter_map(|event| event["delta"].as_str()).collect();
            let response = &told.last().unwrap()["response"];
            assert_eq!(response["output"][0]["content"][0]["text"], text.as_str());
            assert_eq!(response["output"][0], told[told.len() - 2]["item"]);
            assert_eq!(response["output"][0]["id"], told[2]["item"]["id"]);
            assert_eq!((&response["status"], &response["output"][0]["status"]), (&json!(status), &json!(item_status)));
            assert_eq!(response["incomplete_details"].is_null(), finish != FinishReason::Length);
            assert_eq!(response["id"], told[0]["response"]["id"]);
        }
    }

    #[test]
    fn an_answer_without_text_still_has_its_item_and_a_turn_without_an_answer_none() {
        let kinds = |done: &TurnDone| {
            let mut narrator = narrator();
            let told = read(vec![narrator.open(), narrator.done(done)]);
            told.iter().map(|event| event["type"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let silent = TurnDone { text: String::new(), ..done() };
        assert_eq!(kinds(&silent)[2..4], ORDER[2..4]);
        let encoded = TurnDone { goal: Goal::Encode, ..silent.clone() };
        assert_eq!(kinds(&encoded), ["response.created", "response.in_progress", "response.completed"]);
        let cancelled = TurnDone { finish: FinishReason::Cancelled, ..silent };
        assert_eq!(kinds(&cancelled), ["response.created", "response.in_progress", "response.incomplete"]);
    }

    #[test]
    fn a_failure_ends_the_stream_with_the_sdks_own_error_code() {
        let mut narrator = narrator();
        let told = read(vec![narrator.open(), narrator.failed(&TurnError::QueueTimeout("late".into()).into())]);
        let last = told.last().unwrap();
        assert_eq!((&last["type"], &last["sequence_number"]), (&json!("response.failed"), &json!(2)));
        assert_eq!(last["response"]["error"], json!({"code": "server_error", "message": "late (queue_timeout)"}));
        assert_eq!(last["response"]["status"], "failed");
    }
}
