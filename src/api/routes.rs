//! Which routes does the server have, what opens each, and who answers?
//!
//! One table, of which the router, `Allow` of a 405 and the document are made.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use actix_web::http::Method;
use actix_web::middleware::from_fn;
use actix_web::web::{self, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};

use super::error::ApiError;
use super::openapi::events::{ChatEvent, ResponseEvent};
use super::openapi::objects::{
    self, ChatCompletion, Conversation, ConversationList, DeletedConversation, DeletedResponse, Done, Fork, Health,
    InputTokens, Item, ItemList, Model, ModelList, Offload, Pin, Readiness, Residency, Warm,
};
use super::openapi::operation::{Doc, doc};
use super::openapi::requests::{
    ChatRequest, ForkRequest, NewConversation, NewItems, NewMetadata, OffloadRequest, PinRequest, ResponseRequest,
    WarmRequest,
};
use super::{
    auth, chat_completions, conversations, idempotency, openapi, ops, pinning, residency, responses, websocket,
};

/// What a request must bring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    Open,
    /// A tenant's key.
    Tenant,
    /// An admin's key, but for a server without a tenants file.
    Reader,
}

/// A resource of the router.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    pub access: Access,
    /// As the router reads it, with `{names}`.
    pub path: &'static str,
    pub methods: &'static [&'static str],
}

macro_rules! table {
    ($($access:ident $path:literal { $($method:ident $handler:path => $doc:expr),+ $(,)? })+) => {
        /// All of them.
        pub const ROUTES: &[Route] =
            &[$(Route { access: Access::$access, path: $path, methods: &[$(stringify!($method)),+] }),+];

        /// What the document says of each, by method.
        pub(super) fn documented() -> impl Iterator<Item = (&'static Route, Vec<(&'static str, Doc)>)> {
            ROUTES.iter().zip([$(vec![$((stringify!($method), $doc)),+]),+])
        }

        /// `bare`: only what is under `/v1`, without it.
        fn resources(config: &mut ServiceConfig, bare: bool) {
            $(
                let path = if bare { $path.strip_prefix("/v1") } else { Some($path) };
                if let Some(path) = path {
                let resource = web::resource(path)
                    $(.route(web::method(Method::$method).to($handler)))+
                    .default_service(web::to(|request: HttpRequest| async move {
                        let allow = concat!($(", ", stringify!($method)),+).trim_start_matches(", ");
                        Err::<HttpResponse, _>(ApiError::method_not_allowed(request.method().as_str(), allow))
                    }));
                config.service(table!(@open $access resource));
                }
            )+
        }
    };
    (@open Open $resource:ident) => { $resource };
    (@open Tenant $resource:ident) => { $resource.wrap(from_fn(idempotency::once)).wrap(from_fn(auth::tenant)) };
    (@open Reader $resource:ident) => { $resource.wrap(from_fn(auth::reader)) };
}

table! {
    Tenant "/v1/chat/completions" {
        POST chat_completions::create => doc("Answers a chat whose messages the client sends all")
            .takes::<ChatRequest>().gives::<ChatCompletion>().streams::<ChatEvent>().turns(),
    }
    Tenant "/v1/responses" {
        GET websocket::upgrade => doc("The WebSocket mode; a socket begins with an upgrade")
            .gives_nothing(101).refuses(websocket::CODES),
        POST responses::create => doc("Answers the next turn of a conversation, or a single one")
            .takes::<ResponseRequest>().gives::<objects::Response>().streams::<ResponseEvent>().turns().stored()
            .refuses(&[
                "conversation_not_found",
                "previous_response_not_found",
                "item_not_found",
                "conversation_locked",
                "duplicate_item",
            ]),
    }
    Tenant "/v1/responses/input_tokens" {
        POST responses::count => doc("How many tokens the prompt of such a create would have")
            .takes::<ResponseRequest>().gives::<InputTokens>().turns().stored()
            .refuses(&["conversation_not_found", "previous_response_not_found", "item_not_found"]),
    }
    Tenant "/v1/responses/{id}" {
        GET responses::get => doc("A response; with `stream=true` its events, replayed and then followed")
            .gives::<objects::Response>().streams::<ResponseEvent>().stored().replays()
            .refuses(RESPONSE),
        DELETE responses::delete => doc("Forgets a response; the items of its conversation stay")
            .gives::<DeletedResponse>().stored().refuses(RESPONSE),
    }
    Tenant "/v1/responses/{id}/cancel" {
        POST responses::cancel => doc("Ends a running response; one that is over comes back as it is")
            .gives::<objects::Response>().stored().refuses(RESPONSE),
    }
    Tenant "/v1/responses/{id}/input_items" {
        GET responses::input_items => doc("The items that a response was given")
            .pages().gives::<ItemList>().stored().refuses(RESPONSE),
    }
    Tenant "/v1/conversations" {
        GET conversations::list => doc("The conversations; `metadata[k]=v` and `state` choose among them")
            .pages().gives::<ConversationList>().stored(),
        POST conversations::create => doc("Makes a conversation")
            .may_take::<NewConversation>().gives::<Conversation>().stored().refuses(&["duplicate_item"]),
    }
    Tenant "/v1/conversations/{id}" {
        GET conversations::get => doc("A conversation").gives::<Conversation>().stored().refuses(CONVERSATION),
        POST conversations::set_metadata => doc("Replaces a conversation's metadata")
            .takes::<NewMetadata>().gives::<Conversation>().stored().refuses(CONVERSATION),
        DELETE conversations::delete => doc("Deletes a conversation and every copy of its KV")
            .gives::<DeletedConversation>().stored().refuses(CONVERSATION),
    }
    Tenant "/v1/conversations/{id}/items" {
        GET conversations::list_items => doc("The items of a conversation")
            .pages().gives::<ItemList>().stored().refuses(CONVERSATION),
        POST conversations::add_items => doc("Adds items to a conversation, after a turn that runs")
            .takes::<NewItems>().gives::<ItemList>().stored().refuses(CONVERSATION).refuses(&["duplicate_item"]),
    }
    Tenant "/v1/conversations/{id}/items/{item}" {
        GET conversations::get_item => doc("An item").gives::<Item>().stored().refuses(ITEM),
        DELETE conversations::delete_item => doc("Deletes an item; the KV from there on is dropped")
            .gives::<Conversation>().stored().refuses(ITEM),
    }
    Tenant "/v1/conversations/{id}/residency" {
        GET residency::residency => doc("Where a conversation's KV is, and what its next turn would cost")
            .gives::<Residency>().stored().refuses(CONVERSATION),
    }
    Tenant "/v1/conversations/{id}/offload" {
        POST residency::offload => doc("Moves a conversation's KV down a tier, or forgets it")
            .may_take::<OffloadRequest>().gives::<Offload>().stored()
            .refuses(CONVERSATION).refuses(&["conversation_busy"]),
    }
    Tenant "/v1/conversations/{id}/warm" {
        POST residency::warm => doc("Brings a conversation's KV to the device before its next turn")
            .may_take::<WarmRequest>().gives::<Warm>().gives_as::<Warm>(202).stored()
            .refuses(CONVERSATION),
    }
    Tenant "/v1/conversations/{id}/pin" {
        POST pinning::pin => doc("Keeps a conversation's KV from the evictor, within the tenant's budget")
            .may_take::<PinRequest>().gives::<Pin>().stored()
            .refuses(CONVERSATION).refuses(&["pin_budget_exceeded"]),
        DELETE pinning::unpin => doc("Gives a conversation's KV back to the evictor")
            .gives::<Pin>().stored().refuses(CONVERSATION),
    }
    Tenant "/v1/conversations/{id}/done" {
        POST residency::done => doc("Says that a conversation is over: its KV is the first to go, and nothing is dropped")
            .gives::<Done>().stored().refuses(CONVERSATION),
    }
    Tenant "/v1/conversations/{id}/fork" {
        POST residency::fork => doc("Branches a conversation; no KV is copied")
            .may_take::<ForkRequest>().gives_as::<Fork>(201).stored()
            .refuses(ITEM).refuses(&["conversation_busy"]),
    }
    Tenant "/v1/models" { GET ops::models => doc("The models that the tenant may use").gives::<ModelList>() }
    Tenant "/v1/models/{id:.+}" {
        GET ops::model => doc("A model; its id may hold `/`")
            .gives::<Model>().refuses(&["model_not_found", "model_not_allowed"]),
    }
    Open "/healthz" {
        GET ops::healthz => doc("Whether the process lives").gives::<Health>(),
        HEAD ops::healthz => doc("The same, without a body").gives_nothing(200),
    }
    Open "/readyz" {
        GET ops::readyz => doc("Whether the server takes work").gives::<Readiness>().gives_as::<Readiness>(503),
        HEAD ops::readyz => doc("The same, without a body").gives_nothing(200).gives_nothing(503),
    }
    Open "/openapi.json" { GET openapi::json => doc("This document").gives_media("application/json") }
    Open "/docs" { GET openapi::page::docs => doc("This document, for people").gives_media("text/html") }
    Reader "/metrics" {
        GET ops::metrics => doc("Numbers for Prometheus").gives_media("text/plain"),
    }
}

const CONVERSATION: &[&str] = &["conversation_not_found"];
const ITEM: &[&str] = &["conversation_not_found", "item_not_found"];
const RESPONSE: &[&str] = &["response_not_found"];

/// Adds every route to an app whose data has an `ApiState`. `bare_paths`: those under `/v1` answer without it too.
pub fn routes(config: &mut ServiceConfig, bare_paths: bool) {
    // A word that is no id: its route is not there.
    config.service(web::resource(["/v1/responses/compact", "/responses/compact"]).to(unknown_url));
    resources(config, false);
    if bare_paths {
        resources(config, true);
    }
    // Nothing is there yet, and only admins are told.
    config.service(web::resource("/admin/api/{route:.*}").to(unknown_url).wrap(from_fn(auth::admin)));
    config.default_service(web::to(unknown_url));
}

async fn unknown_url(request: HttpRequest) -> Result<HttpResponse, ApiError> {
    Err(ApiError::unknown_url(request.method().as_str(), request.path()))
}
