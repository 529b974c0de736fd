//! How does a turn become server-sent events?
//!
//! A `Narrator` knows a protocol's events and their order; `respond` sends what it tells. Dropping the body drops the
//! turn, which cancels it. The client's pace is the stream's: while nobody reads, nobody asks the turn for more.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use tokio::time::{Instant, Sleep};

use super::error::ApiError;
use crate::sessions::TurnStream;
use crate::sessions::messages::{TokenLogprob, TurnDone, TurnError, TurnUpdate};

/// Tells a turn in the events of one protocol. Each call gives whole events, ready to send.
pub trait Narrator {
    /// Before anything: the turn is admitted.
    fn open(&mut self) -> String;
    fn text(&mut self, delta: &str, logprobs: &[TokenLogprob]) -> String;
    /// The last events, after a turn that ended by itself or was cancelled.
    fn done(&mut self, done: TurnDone) -> String;
    /// The last events, after a turn that failed.
    fn failed(&mut self, error: ApiError) -> String;
}

/// The answer: headers now, events as they come.
pub fn respond(turn: TurnStream, narrator: impl Narrator + 'static, keep_alive: Duration) -> HttpResponse {
    HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, "text/event-stream; charset=utf-8"))
        .insert_header((CACHE_CONTROL, "no-cache"))
        .insert_header(("x-accel-buffering", "no"))
        .streaming(KeepAlive::new(narrate(turn, narrator), keep_alive))
}

fn narrate(turn: TurnStream, mut narrator: impl Narrator + 'static) -> impl Stream<Item = Bytes> {
    let opening = Bytes::from(narrator.open());
    let rest = stream::unfold(Some((turn, narrator)), |state| async move {
        let (mut turn, mut narrator) = state?;
        let (events, goes_on) = loop {
            break match turn.next().await {
                Some(TurnUpdate::Started { .. }) => continue,
                Some(TurnUpdate::Text { delta, logprobs }) => (narrator.text(&delta, &logprobs), true),
                Some(TurnUpdate::Done(done)) => (narrator.done(done), false),
                Some(TurnUpdate::Failed(error)) => (narrator.failed(error.into()), false),
                None => (narrator.failed(cut_short().into()), false),
            };
        };
        Some((Bytes::from(events), goes_on.then_some((turn, narrator))))
    });
    stream::once(async { opening }).chain(rest)
}

/// A turn whose updates end without a last word: the session went away under it.
pub fn cut_short() -> TurnError {
    TurnError::Internal("the turn's updates ended without a last one".into())
}

/// Waits for a turn's end, for answers that come in one piece.
pub async fn finish(mut turn: TurnStream) -> Result<TurnDone, TurnError> {
    loop {
        match turn.next().await {
            Some(TurnUpdate::Started { .. } | TurnUpdate::Text { .. }) => {}
            Some(TurnUpdate::Done(done)) => return Ok(done),
            Some(TurnUpdate::Failed(error)) => return Err(error),
            None => return Err(cut_short()),
        }
    }
}

/// Adds a comment after each `silence`, so that proxies and clients know that the stream lives.
struct KeepAlive {
    events: Pin<Box<dyn Stream<Item = Bytes>>>,
    silence: Duration,
    alarm: Pin<Box<Sleep>>,
}

impl KeepAlive {
    fn new(events: impl Stream<Item = Bytes> + 'static, silence: Duration) -> Self {
        Self { events: Box::pin(events), silence, alarm: Box::pin(tokio::time::sleep(silence)) }
    }
}

impl Stream for KeepAlive {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = Instant::now() + self.silence;
        loop {
            if let Poll::Ready(events) = self.events.as_mut().poll_next(context) {
                // Events without bytes would end a chunked body.
                if events.as_ref().is_some_and(Bytes::is_empty) {
                    continue;
                }
                self.alarm.as_mut().reset(next);
                return Poll::Ready(events.map(Ok));
            }
            if self.alarm.as_mut().poll(context).is_ready() {
                self.alarm.as_mut().reset(next);
                return Poll::Ready(Some(Ok(Bytes::from_static(b": keep-alive\n\n"))));
            }
            return Poll::Pending;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[actix_web::test]
    async fn a_silent_stream_says_that_it_lives_and_still_ends() {
        let (sender, receiver) = tokio::sync::mpsc::channel::<Bytes>(2);
        let events = stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
        let mut kept = KeepAlive::new(events, Duration::from_millis(1));
        assert_eq!(kept.next().await.unwrap().unwrap(), ": keep-alive\n\n");
        assert_eq!(kept.next().await.unwrap().unwrap(), ": keep-alive\n\n");
        sender.try_send(Bytes::new()).unwrap();
        sender.try_send(Bytes::from_static(b"data: 1\n\n")).unwrap();
        drop(sender);
        let rest: Vec<_> = kept
            .map(Result::unwrap)
            .filter(|piece| {
                let keep = piece != ": keep-alive\n\n";
                async move { keep }
            })
            .collect()
            .await;
        assert_eq!(rest, ["data: 1\n\n"]);
    }
}
