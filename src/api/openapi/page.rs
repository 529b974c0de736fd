//! How does `/docs` look?
//!
//! One page of plain HTML, made of the document, without scripts: nothing to load from another host, and a policy that
//! would forbid it.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::sync::OnceLock;

use actix_web::HttpResponse;
use actix_web::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName};
use serde_json::Value;

/// Allows the page's own style, which names this word, and nothing else.
fn policy(nonce: &str) -> String {
    format!(
        "default-src 'none'; style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
}

/// GET `/docs`.
pub async fn docs() -> HttpResponse {
    static BODY: OnceLock<String> = OnceLock::new();
    let body = BODY.get_or_init(|| body(&super::document()));
    // New for every answer, so that nobody can put in a style that knows it.
    let nonce = format!("{:032x}", rand::random::<u128>());
    let page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>rekindle API</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style nonce=\"{nonce}\">{STYLE}</style></head>\n\
         <body>{body}</body></html>\n"
    );
    HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, "text/html; charset=utf-8"))
        .insert_header((CONTENT_SECURITY_POLICY, policy(&nonce)))
        .insert_header((HeaderName::from_static("x-content-type-options"), "nosniff"))
        .body(page)
}

const STYLE: &str = "\
:root{color-scheme:light dark;font:15px/1.5 system-ui,sans-serif}body{max-width:56rem;margin:2rem auto;padding:0 1rem}\
code,pre{font:13px/1.5 ui-monospace,monospace}pre{overflow-x:auto}summary{cursor:pointer;padding:.3rem 0}\
details{border-bottom:1px solid #8884}details>*:not(summary){margin-left:1.2rem}summary b{display:inline-block;min-width:4.5rem}\
table{border-collapse:collapse}td{padding:.15rem .8rem .15rem 0;vertical-align:top}";

fn body(document: &Value) -> String {
    let text =
        |value: &Value, pointer: &str| escaped(value.pointer(pointer).and_then(Value::as_str).unwrap_or_default());
    let objects = |pointer: &str| document.pointer(pointer).and_then(Value::as_object).into_iter().flatten();
    let about = text(document, "/info/description").replace("\n\n", "</p><p>");
    let mut page = format!(
        "<h1>rekindle {}</h1><p>{about}</p><p>For programs: <a href=\"/openapi.json\">/openapi.json</a></p><h2>Routes</h2>",
        text(document, "/info/version")
    );
    for (path, item) in objects("/paths") {
        for (method, operation) in item.as_object().into_iter().flatten() {
            let (method, path, summary) = (method.to_uppercase(), escaped(path), text(operation, "/summary"));
            page += &format!("<details><summary><b>{method}</b> <code>{path}</code> {summary}</summary>");
            let keyed = operation.get("security").and_then(Value::as_array).is_some_and(|list| !list.is_empty());
            page += &format!("<p>{}</p><table>", if keyed { "Takes a key." } else { "Takes no key." });
            for parameter in operation.get("parameters").and_then(Value::as_array).into_iter().flatten() {
                let (name, place) = (text(parameter, "/name"), text(parameter, "/in"));
                let about = text(parameter, "/description");
                page += &format!("<tr><td>{place}</td><td><code>{name}</code></td><td>{about}</td></tr>");
            }
            if let Some(body) = operation.get("requestBody") {
                page += &format!("<tr><td>body</td><td>{}</td><td></td></tr>", schemas(body));
            }
            for (status, response) in operation.get("responses").and_then(Value::as_object).into_iter().flatten() {
                let (about, schema) = (text(response, "/description"), schemas(response));
                page += &format!("<tr><td>{status}</td><td>{schema}</td><td>{about}</td></tr>");
            }
            page.push_str("</table></details>");
        }
    }
    page.push_str("<h2>Objects</h2>");
    for (name, schema) in objects("/components/schemas") {
        let (name, about) = (escaped(name), text(schema, "/description"));
        let json = escaped(&serde_json::to_string_pretty(schema).unwrap_or_default());
        page += &format!(
            "<details id=\"{name}\"><summary><code>{name}</code> {about}</summary><pre>{json}</pre></details>"
        );
    }
    page
}

/// Links to the types of a body, one a media type.
fn schemas(body: &Value) -> String {
    let content = body.get("content").and_then(Value::as_object).into_iter().flatten();
    let links = content.map(|(media_type, content)| {
        let reference = content.pointer("/schema/$ref").and_then(Value::as_str).unwrap_or_default();
        match reference.rsplit('/').next().filter(|name| !name.is_empty()) {
            Some(name) => format!("<a href=\"#{0}\">{0}</a>", escaped(name)),
            None => escaped(media_type),
        }
    });
    links.collect::<Vec<_>>().join(", ")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
