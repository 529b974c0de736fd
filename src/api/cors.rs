//! Which pages of other origins may call the server from a browser?
//!
//! Those that are listed, and no others: an origin is echoed exactly, never `*`, since requests bear keys.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use actix_web::HttpResponse;
use actix_web::http::Method;
use actix_web::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, HeaderMap, HeaderValue, ORIGIN, VARY,
};

const METHODS: HeaderValue = HeaderValue::from_static("GET, POST, DELETE, OPTIONS");
const EXPOSED: HeaderValue = HeaderValue::from_static(
    "x-request-id, retry-after, retry-after-ms, x-should-retry, openai-processing-ms, x-ratelimit-limit-requests, \
     x-ratelimit-limit-tokens, x-ratelimit-remaining-requests, x-ratelimit-remaining-tokens, \
     x-ratelimit-reset-requests, x-ratelimit-reset-tokens",
);
const MAX_AGE_S: HeaderValue = HeaderValue::from_static("600");

/// The origins that may; none of them: CORS is off.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cors {
    pub allow_origins: Vec<String>,
}

impl Cors {
    /// The origin that a request bears, if it may call. Also for an upgrade to a socket, which browsers don't preflight.
    pub fn allowed(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        headers
            .get(ORIGIN)
            .filter(|origin| self.allow_origins.iter().any(|allowed| *origin == allowed.as_str()))
            .cloned()
    }

    /// The answer to a browser's question whether it may send a request; `None` if this is none, or it may not.
    pub fn preflight(&self, method: &Method, headers: &HeaderMap) -> Option<HttpResponse> {
        if method != Method::OPTIONS || !headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD) {
            return None;
        }
        self.allowed(headers)?;
        let mut response = HttpResponse::NoContent().finish();
        let answer = response.headers_mut();
        answer.insert(ACCESS_CONTROL_ALLOW_METHODS, METHODS);
        answer.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE_S);
        if let Some(asked) = headers.get(ACCESS_CONTROL_REQUEST_HEADERS) {
            answer.insert(ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
        }
        Some(response)
    }

    /// Marks an answer for this origin.
    pub fn mark(&self, origin: Option<&HeaderValue>, headers: &mut HeaderMap) {
        if self.allow_origins.is_empty() {
            return;
        }
        headers.append(VARY, HeaderValue::from_static("Origin"));
        if let Some(origin) = origin {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (actix_web::http::header::HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn a_listed_origin_may_and_gets_what_it_asked_for() {
        let cors = Cors { allow_origins: vec!["https://app.example".into()] };
        let asked = headers(&[
            ("origin", "https://app.example"),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "authorization,x-stainless-lang"),
        ]);
        let answer = cors.preflight(&Method::OPTIONS, &asked).unwrap();
        assert_eq!(answer.headers().get(ACCESS_CONTROL_ALLOW_HEADERS).unwrap(), "authorization,x-stainless-lang");
        let mut marked = HeaderMap::new();
        cors.mark(cors.allowed(&asked).as_ref(), &mut marked);
        assert_eq!(marked.get(ACCESS_CONTROL_ALLOW_ORIGIN).unwrap(), "https://app.example");
        assert_eq!(marked.get(VARY).unwrap(), "Origin");
        assert!(cors.preflight(&Method::OPTIONS, &headers(&[("origin", "https://app.example")])).is_none());
    }

    #[test]
    fn others_may_not_and_nobody_may_while_it_is_off() {
        let cors = Cors { allow_origins: vec!["https://app.example".into()] };
        for origin in ["https://app.example.evil", "http://app.example", "null", "https://APP.example"] {
            let asked = headers(&[("origin", origin), ("access-control-request-method", "POST")]);
            assert!(cors.preflight(&Method::OPTIONS, &asked).is_none(), "{origin}");
            assert_eq!(cors.allowed(&asked), None);
        }
        let mut marked = HeaderMap::new();
        Cors::default().mark(None, &mut marked);
        assert!(marked.is_empty());
    }
}
