//! What do `/openapi.json` and `/docs` say?
//!
//! Made from the router's own table, the table of codes, and the types in `requests` and `objects`, whose comments are the
//! descriptions: a route is in the document because it is in the router.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

pub mod events;
pub mod objects;
pub mod operation;
pub mod page;
pub mod requests;

use std::collections::BTreeMap;
use std::sync::OnceLock;

use actix_web::HttpResponse;
use actix_web::http::header::CONTENT_TYPE;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::codes;
use super::routes::{self, Access};
use operation::Doc;

/// GET `/openapi.json`.
pub async fn json() -> HttpResponse {
    static TEXT: OnceLock<String> = OnceLock::new();
    let text = TEXT.get_or_init(|| document().to_string());
    HttpResponse::Ok().insert_header((CONTENT_TYPE, "application/json")).body(text.as_str())
}

/// The document, after OpenAPI 3.1.
pub fn document() -> Value {
    let mut schemas = BTreeMap::new();
    add::<objects::Error>(&mut schemas);
    let mut paths = Map::new();
    for (route, docs) in routes::documented() {
        let path = router_names(route.path);
        let mut item = Map::new();
        for (method, doc) in docs {
            for (name, schema) in doc.schemas() {
                schemas.entry(name).or_insert(schema);
            }
            item.insert(method.to_ascii_lowercase(), operation(method, &path, route.access, &doc));
        }
        paths.insert(path, Value::Object(item));
    }
    let mut schemas: Map<String, Value> = schemas.into_iter().collect();
    list_codes(&mut schemas);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "rekindle",
            "version": env!("CARGO_PKG_VERSION"),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": ABOUT,
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    })
}

const ABOUT: &str = "A chat server whose conversations keep their KV cache. Speaks OpenAI's chat completions, responses and \
    conversations; what is ours besides is under `rekindle` or has routes of its own.\n\nEvery answer has `x-request-id` \
    and `openai-processing-ms`. Every error has the same body, with a stable `code`; refusals that pass with time have \
    `Retry-After` and `retry-after-ms`. A tenant with a limit of requests sees `x-ratelimit-limit-requests`, \
    `x-ratelimit-remaining-requests` and `x-ratelimit-reset-requests`. Optional fields may be null, which is as if they \
    were left out; unknown ones are ignored and named in `x-rekindle-ignored`. A method that a route does not have is 405 \
    `method_not_allowed`, and a route that is not there 404 `unknown_url`.";

/// A path without the router's patterns: `{id:.+}` is `{id}`.
fn router_names(path: &str) -> String {
    let part = |part: &str| match part.split_once(':') {
        Some((name, _)) if name.starts_with('{') => format!("{name}}}"),
        Some(_) | None => part.to_owned(),
    };
    path.split('/').map(part).collect::<Vec<_>>().join("/")
}

fn operation(method: &str, path: &str, access: Access, doc: &Doc) -> Value {
    let names = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let in_path = names.map(
        |name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}}),
    );
    let parameters: Vec<Value> = in_path.chain(doc.query()).collect();
    let key_codes = match access {
        Access::Open => &[],
        Access::Tenant => codes::KEY,
        Access::Reader => codes::ADMIN_KEY,
    };
    let once = if access == Access::Tenant && ["POST", "DELETE"].contains(&method) { codes::ONCE } else { &[] };
    let security = match access {
        Access::Open => json!([]),
        Access::Tenant | Access::Reader => json!([{"key": []}]),
    };
    let mut object = json!({
        "operationId": format!("{}{}", method.to_ascii_lowercase(), path.replace(['/', '.', '-'], "_").replace(['{', '}'], "")),
        "summary": doc.summary,
        "tags": [tag(path)],
        "security": security,
        "parameters": parameters,
        "responses": doc.responses(codes::ANY.iter().chain(once).chain(key_codes).copied()),
    });
    if let (Some(body), Value::Object(object)) = (doc.body(), &mut object) {
        object.insert("requestBody".to_owned(), body);
    }
    object
}

/// Where the page puts a route: the first word that is no version.
fn tag(path: &str) -> &str {
    path.split('/').find(|part| !part.is_empty() && *part != "v1").unwrap_or_default()
}

/// Adds a type and all that it is made of.
fn add<T: ToSchema>(schemas: &mut BTreeMap<String, Value>) {
    schemas.extend(operation::schemas_of::<T>());
}

/// The codes are a closed set, so that a client can match on them.
fn list_codes(schemas: &mut Map<String, Value>) {
    let names: Vec<_> = codes::documented().map(|code| code.name).collect();
    let list = codes::documented().map(|code| format!("- `{}` ({}): {}\n", code.name, code.status, code.when));
    if let Some(code) = schemas.get_mut("ErrorBody").and_then(|schema| schema.pointer_mut("/properties/code")) {
        *code = json!({"type": "string", "enum": names, "description": list.collect::<String>()});
    }
}

#[cfg(test)]
mod tests;
