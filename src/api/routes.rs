//! Which routes does the server have, what opens each, and who answers?
//!
//! One table, of which the router and `Allow` of a 405 are made.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use actix_web::http::Method;
use actix_web::middleware::from_fn;
use actix_web::web::{self, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};

use super::error::ApiError;
use super::{auth, chat_completions, conversations, idempotency, ops, responses};

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
    ($($access:ident $path:literal { $($method:ident $handler:path),+ $(,)? })+) => {
        /// All of them.
        pub const ROUTES: &[Route] =
            &[$(Route { access: Access::$access, path: $path, methods: &[$(stringify!($method)),+] }),+];

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
        POST chat_completions::create,
    }
    Tenant "/v1/responses" {
        GET responses::upgrade,
        POST responses::create,
    }
    Tenant "/v1/responses/input_tokens" {
        POST responses::count,
    }
    Tenant "/v1/responses/{id}" {
        GET responses::get,
        DELETE responses::delete,
    }
    Tenant "/v1/responses/{id}/cancel" {
        POST responses::cancel,
    }
    Tenant "/v1/responses/{id}/input_items" {
        GET responses::input_items,
    }
    Tenant "/v1/conversations" {
        GET conversations::list,
        POST conversations::create,
    }
    Tenant "/v1/conversations/{id}" {
        GET conversations::get,
        POST conversations::set_metadata,
        DELETE conversations::delete,
    }
    Tenant "/v1/conversations/{id}/items" {
        GET conversations::list_items,
        POST conversations::add_items,
    }
    Tenant "/v1/conversations/{id}/items/{item}" {
        GET conversations::get_item,
        DELETE conversations::delete_item,
    }
    Tenant "/v1/conversations/{id}/residency" {
        GET conversations::residency,
    }
    Tenant "/v1/conversations/{id}/offload" {
        POST conversations::offload,
    }
    Tenant "/v1/models" { GET ops::models }
    Tenant "/v1/models/{id:.+}" {
        GET ops::model,
    }
    Open "/healthz" {
        GET ops::healthz,
        HEAD ops::healthz,
    }
    Open "/readyz" {
        GET ops::readyz,
        HEAD ops::readyz,
    }
    Reader "/metrics" {
        GET ops::metrics,
    }
}

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
