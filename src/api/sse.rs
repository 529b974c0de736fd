//! How do events become a body of server-sent events?
//!
//! Dropping the body drops the events' source, and with it the turn, which cancels it. The client's pace is the stream's:
//! while nobody reads, nobody asks the turn for more.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use tokio::time::{Instant, Sleep};

use crate::sessions::TurnStream;
use crate::sessions::messages::{TurnDone, TurnError, TurnUpdate};

/// The answer: headers now, whole events as they come.
pub fn respond(events: impl Stream<Item = String> + 'static, keep_alive: Duration) -> HttpResponse {
    HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, "text/event-stream; charset=utf-8"))
        .insert_header((CACHE_CONTROL, "no-cache"))
        .insert_header(("x-accel-buffering", "no"))
        .streaming(KeepAlive::new(events.map(Bytes::from), keep_alive))
}

/// A turn whose updates end without a last word: the session went away under it.
pub fn cut_short() -> TurnError {
    TurnError::Internal("the turn's updates ended without a last one".into())
}

/// Waits for a turn's end, for answers that come in one piece.
pub async fn finish(turn: &mut TurnStream) -> Result<TurnDone, TurnError> {
    turn.finished().await;
    match turn.end() {
        Some(TurnUpdate::Done(done)) => Ok(done),
        Some(TurnUpdate::Failed(error)) => Err(error),
        Some(TurnUpdate::Started { .. } | TurnUpdate::Text { .. }) | None => Err(cut_short()),
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
    use futures_util::stream;

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
