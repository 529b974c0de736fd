//! Which error codes are there, with which status, and when?
//!
//! For the document: clients match on codes, so each is here with a sentence, and `ApiError` makes no other.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

/// A stable word for one kind of refusal.
#[derive(Clone, Copy, Debug)]
pub struct Code {
    pub name: &'static str,
    pub status: u16,
    pub when: &'static str,
}

macro_rules! codes {
    ($($status:literal $name:literal $when:literal;)+) => {
        pub const CODES: &[Code] = &[$(Code { name: $name, status: $status, when: $when }),+];
    };
}

codes! {
    400 "websocket_connection_limit_reached" "on a socket: it is too old for new turns";
    400 "invalid_json" "the body is not one JSON object, or nests too deep";
    400 "missing_required_parameter" "a field that must be there is not";
    400 "invalid_type" "a field has another JSON type";
    400 "invalid_value" "a field's value is out of range, or none of those that are possible";
    400 "unknown_parameter" "a field that no such request has, where the server is set to refuse those";
    400 "unsupported_parameter" "a field of OpenAI's API that this server does not offer";
    400 "unsupported_value" "a value of OpenAI's API that this server or the model does not offer";
    400 "mutually_exclusive_parameters" "two fields that exclude each other";
    400 "array_above_max_length" "an array is too long";
    400 "string_above_max_length" "a text is too long";
    400 "context_length_exceeded" "the prompt does not fit the model's window";
    400 "previous_response_not_found" "the response to continue never was, was not stored, or is gone";
    400 "idempotency_key_reused" "the `Idempotency-Key` came with another request before";
    400 "conversation_locked" "a turn of the conversation runs, and enough wait behind it";
    400 "duplicate_item" "the conversation holds an item of this id already";
    401 "invalid_api_key" "no key, or one that is not known or has expired";
    401 "invalid_admin_key" "the dashboard: a login with a key that is no admin's";
    403 "csrf_failed" "the dashboard: a change that does not come from the page";
    403 "read_only" "the dashboard: nothing may be changed from it";
    403 "tenant_suspended" "the tenant may do nothing for now";
    403 "model_not_allowed" "the tenant may not use this model";
    403 "origin_not_allowed" "a page of this origin may not open sockets";
    403 "wrong_key_kind" "an admin's key where a tenant's belongs, or the other way round";
    404 "model_not_found" "no such model is served";
    404 "response_not_found" "the response never was, was not stored, or is gone";
    404 "conversation_not_found" "the conversation never was, or is gone";
    404 "item_not_found" "the conversation holds no such item";
    404 "undo_expired" "the dashboard: what was done can't be taken back any more";
    404 "nothing_recorded" "the dashboard: there is no flight record to replay, or it can't be read";
    404 "unknown_url" "there is no such route";
    405 "method_not_allowed" "the route has other methods; `Allow` names them";
    408 "request_timeout" "the body did not arrive in time";
    409 "idempotency_in_progress" "the request with this `Idempotency-Key` runs still";
    409 "conversation_busy" "a turn of the conversation runs or waits";
    409 "stateless_session" "the dashboard: what is to be acted on is no stored conversation";
    409 "session_changed" "the dashboard: the conversation is not as it was when it was shown";
    409 "not_possible" "the dashboard: there is nothing that could be done so";
    409 "replay_running" "the dashboard: one replay at a time";
    409 "pin_budget_exceeded" "the tenant's pins would keep more than its budget";
    413 "request_too_large" "the body is too large";
    415 "unsupported_media_type" "the body is not plain JSON";
    426 "upgrade_required" "this is the route of the WebSocket mode, which is off";
    429 "rate_limit_exceeded" "the tenant's requests of this minute are spent";
    429 "concurrency_limit_exceeded" "enough turns of the tenant run, or enough of its sockets are open";
    429 "too_many_tries" "the dashboard: enough wrong keys from this address";
    429 "too_many_streams" "the dashboard: enough tabs of this login follow the server";
    429 "too_many_pending" "on a socket: enough waits already";
    431 "headers_too_large" "the request's headers are too large";
    500 "internal_error" "the server's own fault; the log has the request's id";
    503 "engine_overloaded" "too many turns wait in the engine";
    503 "queue_timeout" "the turn waited for its place until its deadline";
    503 "draining" "the server is about to end";
    503 "store_unavailable" "the history can't be read or written";
}

/// Any request that gets as far as a route.
pub const ANY: &[&str] = &["headers_too_large", "internal_error"];
/// Where a request may bear an `Idempotency-Key`: POST and DELETE.
pub const ONCE: &[&str] = &["idempotency_in_progress", "idempotency_key_reused", "invalid_value"];
/// Where a tenant's key is asked for.
pub const KEY: &[&str] = &["invalid_api_key", "tenant_suspended", "wrong_key_kind", "rate_limit_exceeded"];
/// Where an admin's key is asked for.
pub const ADMIN_KEY: &[&str] = &["invalid_api_key", "tenant_suspended", "wrong_key_kind"];
/// Where a body is read.
pub const BODY: &[&str] = &[
    "invalid_json",
    "missing_required_parameter",
    "invalid_type",
    "invalid_value",
    "unknown_parameter",
    "unsupported_parameter",
    "unsupported_value",
    "mutually_exclusive_parameters",
    "array_above_max_length",
    "string_above_max_length",
    "request_timeout",
    "request_too_large",
    "unsupported_media_type",
];
/// Where a turn is run.
pub const TURN: &[&str] = &[
    "context_length_exceeded",
    "model_not_allowed",
    "model_not_found",
    "concurrency_limit_exceeded",
    "engine_overloaded",
    "queue_timeout",
    "draining",
];
/// Where history is read or written.
pub const STORE: &[&str] = &["store_unavailable", "engine_overloaded"];

impl Code {
    /// Whether only the dashboard's API has it, which the document is not about.
    pub fn is_the_dashboards(&self) -> bool {
        self.when.starts_with("the dashboard: ")
    }
}

/// Those that the document is about.
pub fn documented() -> impl Iterator<Item = &'static Code> {
    CODES.iter().filter(|code| !code.is_the_dashboards())
}

/// A code's row.
pub fn find(name: &str) -> Option<&'static Code> {
    CODES.iter().find(|code| code.name == name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Words of the sources that look like codes and are none: types of errors, and what `response.error` says.
    const NO_CODES: &[&str] = &[
        "invalid_request_error",
        "server_error",
        "permission_error",
        "conflict_error",
        "rate_limit_error",
        "invalid_prompt",
        "previous_response_id",
    ];

    #[test]
    fn every_code_that_the_api_has_is_in_the_table_and_every_row_is_used() {
        let sources = [include_str!("error.rs"), include_str!("auth.rs")];
        let code = |source: &'static str| source.split("#[cfg(test)]\nmod tests").next().unwrap();
        let words = sources.into_iter().map(code).flat_map(|source| source.split('"').skip(1).step_by(2));
        let is_code = |word: &&str| {
            (word.contains('_') || find(word).is_some())
                && word.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
                && !NO_CODES.contains(word)
        };
        let used: BTreeSet<&str> = words.filter(is_code).collect();
        let listed: BTreeSet<&str> = CODES.iter().map(|code| code.name).collect();
        assert_eq!(used, listed);
        assert_eq!(listed.len(), CODES.len(), "a code is there twice");
    }

    #[test]
    fn every_group_has_codes_of_the_table() {
        for name in [ANY, ONCE, KEY, ADMIN_KEY, BODY, TURN, STORE].concat() {
            assert!(find(name).is_some(), "{name}");
        }
    }
}
