use std::collections::BTreeSet;

use super::super::fields::{Fields, parse_object};
use super::super::responses::request::{self, Sent};
use super::super::tests::settings;
use super::super::{chat_completions, routes::ROUTES};
use super::*;

/// Names of a type's fields.
fn properties(schema: &str) -> BTreeSet<String> {
    let document = document();
    let all = &document["components"]["schemas"];
    let mut names = BTreeSet::new();
    let mut waiting = vec![&all[schema]];
    while let Some(schema) = waiting.pop() {
        names.extend(schema["properties"].as_object().into_iter().flatten().map(|(name, _)| name.clone()));
        waiting.extend(schema["allOf"].as_array().into_iter().flatten());
        if let Some(name) = schema["$ref"].as_str() {
            waiting.push(&all[name.rsplit('/').next().unwrap()]);
        }
    }
    names
}

/// Fails unless a handler reads the fields of its type, and besides only such as it refuses by name.
fn holds(schema: &str, least: &str, parse: impl Fn(&mut Fields<'_>) -> Option<&'static str>) {
    let listed = properties(schema);
    let object = parse_object(least.as_bytes(), 64).unwrap();
    let mut fields = Fields::of(&object);
    assert_eq!(parse(&mut fields), None, "{least} is refused");
    let read: BTreeSet<String> = fields.asked().iter().map(|name| (*name).to_owned()).collect();
    let unread: Vec<_> = listed.difference(&read).collect();
    assert_eq!(unread, Vec::<&String>::new(), "{schema} has fields that the handler does not read");
    for name in read.difference(&listed) {
        let refused = [json!({"a": "b"}), json!("a")].into_iter().any(|value| {
            let mut object = object.clone();
            object.insert(name.clone(), value);
            parse(&mut Fields::of(&object)) == Some("unsupported_parameter")
        });
        assert!(refused, "{schema} lacks `{name}`");
    }
}

#[test]
fn the_fields_that_a_turn_reads_are_those_of_its_type() {
    let (settings, deadline) = (settings(), std::time::Duration::from_secs(1));
    let least = r#"{"model":"smollm2","messages":[{"role":"user","content":"a"}]}"#;
    holds("ChatRequest", least, |fields| chat_completions::parse(fields, &settings, deadline).err().map(|e| e.code()));
    let text = r#"{"input":"a"}"#;
    let least = parse_object(text.as_bytes(), 64).unwrap();
    holds("ResponseRequest", text, |fields| {
        fields.boolean("stream").unwrap();
        let sent = Sent { digest: [0; 32], is_retry: false, deadline };
        request::parse(&least, fields, &settings, sent).err().map(|e| e.code())
    });
}

#[test]
fn every_route_of_the_router_is_in_the_document_with_its_methods() {
    let document = document();
    let paths = document["paths"].as_object().unwrap();
    assert_eq!(paths.len(), ROUTES.len());
    for route in ROUTES {
        let methods: BTreeSet<_> = paths[&router_names(route.path)].as_object().unwrap().keys().cloned().collect();
        assert_eq!(methods, route.methods.iter().map(|method| method.to_lowercase()).collect(), "{}", route.path);
    }
}

#[test]
fn every_error_code_is_in_the_document_and_those_of_a_route_at_the_route() {
    let document = document();
    let listed = &document["components"]["schemas"]["ErrorBody"]["properties"]["code"];
    let text = document["paths"].to_string();
    // Of these any path may tell.
    let general = ["unknown_url", "method_not_allowed"];
    for code in codes::documented() {
        assert!(listed["enum"].as_array().unwrap().contains(&json!(code.name)), "{}", code.name);
        let told = if general.contains(&code.name) { ABOUT } else { &text };
        assert!(told.contains(&format!("`{}`", code.name)), "no route tells of {}", code.name);
    }
}

#[test]
fn every_reference_leads_somewhere_and_every_operation_has_its_own_name() {
    fn check(value: &Value, document: &Value) {
        match value {
            Value::Object(object) => {
                if let Some(reference) = object.get("$ref") {
                    let pointer = reference.as_str().unwrap().strip_prefix('#').unwrap();
                    assert!(document.pointer(pointer).is_some(), "{pointer} is not there");
                }
                object.values().for_each(|value| check(value, document));
            }
            Value::Array(list) => list.iter().for_each(|value| check(value, document)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    let document = document();
    check(&document, &document);
    let operations =
        document["paths"].as_object().unwrap().values().flat_map(|item| item.as_object().unwrap().values());
    let names: Vec<_> = operations.map(|operation| operation["operationId"].as_str().unwrap()).collect();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
}

#[actix_web::test]
async fn the_page_loads_nothing_and_its_policy_would_not_let_it() {
    let response = page::docs().await;
    let policy = response.headers().get("content-security-policy").unwrap().to_str().unwrap().to_owned();
    assert!(policy.starts_with("default-src 'none'; style-src 'nonce-"), "{policy}");
    let body = actix_web::body::to_bytes(response.into_body()).await.unwrap();
    let text = std::str::from_utf8(&body).unwrap();
    for outside in ["<script", "src=", "http://", "https://", "@import", "url("] {
        assert!(!text.contains(outside), "the page has {outside}");
    }
    for route in ROUTES {
        assert!(text.contains(&router_names(route.path)), "{}", route.path);
    }
}
