//! How long does a request take, to the last byte of its answer?
//!
//! A stream's answer begins long before it ends: the clock rides with the body, and stops when the body is gone, read or not.
//! Routes are the router's patterns and methods a list, so that no client makes a series.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::error::Error as StdError;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::http::{Method, StatusCode};
use actix_web::web::Bytes;
use tracing::Span;

use crate::telemetry::metrics::{HTTP_REQUESTS, HTTP_SECONDS, RESOURCES};
use crate::telemetry::trace::{self, Value};

const UNMATCHED: &str = "unmatched";

/// Counts a request when it is dropped, and is in the request's span until then.
pub(super) struct Timer {
    started: Instant,
    span: Span,
    route: String,
    method: &'static str,
    status: StatusCode,
}

impl Timer {
    /// `route`: the pattern that the path was matched by.
    pub fn new(started: Instant, span: Span, method: &Method, route: Option<String>, status: StatusCode) -> Self {
        let (method, route) = (known(method), route.unwrap_or_else(|| UNMATCHED.to_owned()));
        let timer = Self { started, span, route, method, status };
        timer.tell_trace();
        timer
    }

    fn tell_trace(&self) {
        let Self { span, route, method, status, .. } = self;
        trace::rename(span, format!("{method} {route}"));
        trace::annotate(
            span,
            vec![
                ("http.request.method", Value::Text((*method).to_owned())),
                ("http.route", Value::Text(route.clone())),
                ("http.response.status_code", Value::Count(status.as_u16().into())),
            ],
        );
        if status.is_server_error() {
            trace::fail(span, class(*status));
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // A span ends when it was last entered.
        let _entered = self.span.enter();
        let labels = [("route", self.route.as_str()), ("method", self.method), ("status", class(self.status))];
        HTTP_REQUESTS.add(1, &labels);
        HTTP_SECONDS.record(self.started.elapsed().as_secs_f64(), &[("resource", resource(&self.route))]);
    }
}

/// A body that is timed.
pub(super) struct Timed {
    pub body: BoxBody,
    pub timer: Timer,
}

impl MessageBody for Timed {
    type Error = Box<dyn StdError>;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Self::Error>>> {
        Pin::new(&mut self.get_mut().body).poll_next(context)
    }

    /// What is there as a whole is told as good as sent.
    fn try_into_bytes(self) -> Result<Bytes, Self> {
        let Self { body, timer } = self;
        body.try_into_bytes().map_err(|body| Self { body, timer })
    }
}

fn known(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

/// A histogram has many series: not each route has one.
fn resource(route: &str) -> &'static str {
    let is_under = |path: &&str| {
        let bare = path.strip_prefix("/v1").unwrap_or(path);
        [*path, bare]
            .iter()
            .any(|path| route.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
    };
    RESOURCES.iter().copied().find(is_under).unwrap_or("other")
}

fn class(status: StatusCode) -> &'static str {
    match status.as_u16() {
        ..200 => "1xx",
        200..300 => "2xx",
        300..400 => "3xx",
        400..500 => "4xx",
        _ => "5xx",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_sends_makes_no_label() {
        assert_eq!(known(&Method::from_bytes(b"BREW").unwrap()), "other");
        let resources =
            ["/v1/responses/{id}/cancel", "/conversations", "/admin/api/me", "/metrics", "/v1/responsesx", UNMATCHED];
        let under = ["/v1/responses", "/v1/conversations", "/admin", "/metrics", "other", "other"];
        assert_eq!(resources.map(resource), under);
        assert_eq!((class(StatusCode::SWITCHING_PROTOCOLS), class(StatusCode::NOT_FOUND)), ("1xx", "4xx"));
    }
}
