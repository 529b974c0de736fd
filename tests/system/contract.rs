//! Does the server do what its own document says?
//!
//! Real answers are held to `/openapi.json`, in which each of their fields must be. Then schemathesis sends what the
//! document allows and what it doesn't, and looks for statuses, types and bodies that are not in it, and for faults of ours.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::client::Client;
use super::server::{Home, Server, machine};
use super::tenants::Tenants;
use super::workload::BLOCK_BYTES;

/// Seconds that schemathesis takes. A fixed seed draws the same requests each time.
const BUDGET_S: u32 = 100;

/// The document, to hold answers to.
struct Document(Value);

impl Document {
    async fn of(client: &Client) -> Self {
        Self(client.json(client.get("/openapi.json")).await)
    }

    /// Fails unless the value is as the type says, and has no field that the type has not.
    #[track_caller]
    fn holds(&self, name: &str, value: &Value) {
        let fault = self.fault(&json!({"$ref": format!("#/components/schemas/{name}")}), value, name);
        assert_eq!(fault, None, "{name} is not {value}");
    }

    /// Where a value is not as its schema says.
    fn fault(&self, schema: &Value, value: &Value, path: &str) -> Option<String> {
        if let Some(reference) = schema["$ref"].as_str() {
            return self.fault(self.0.pointer(&reference[1..]).unwrap(), value, path);
        }
        for choice in ["oneOf", "anyOf"] {
            if let Some(choices) = schema[choice].as_array() {
                let faults: Vec<_> = choices.iter().map(|choice| self.fault(choice, value, path)).collect();
                let fits = faults.iter().any(Option::is_none);
                return (!fits).then(|| faults.into_iter().flatten().collect::<Vec<_>>().join("; or "));
            }
        }
        if schema["allOf"].is_array() {
            let whole = self.merged(schema);
            return self.fault(&whole, value, path);
        }
        let kinds = match &schema["type"] {
            Value::Array(kinds) => kinds.clone(),
            Value::Null => return None, // anything
            kind => vec![kind.clone()],
        };
        if !kinds.iter().any(|kind| is(value, kind.as_str().unwrap())) {
            return Some(format!("{path} is {value}, and no {kinds:?}"));
        }
        if let Some(possible) = schema["enum"].as_array()
            && !possible.contains(value)
        {
            return Some(format!("{path} is {value}, and none of {possible:?}"));
        }
        if let Some(list) = value.as_array() {
            return list.iter().find_map(|value| self.fault(&schema["items"], value, &format!("{path}[]")));
        }
        let object = value.as_object()?;
        let properties = &schema["properties"];
        let missing = schema["required"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|name| !object.contains_key(name.as_str().unwrap()));
        if let Some(name) = missing {
            return Some(format!("{path} has no {name}"));
        }
        object.iter().find_map(|(name, value)| {
            let path = format!("{path}.{name}");
            match (properties.get(name), schema.get("additionalProperties")) {
                (Some(schema), _) => self.fault(schema, value, &path),
                (None, Some(schema)) => self.fault(schema, value, &path),
                (None, None) => Some(format!("{path} is not in the document")),
            }
        })
    }

    /// The parts of an `allOf` as one object.
    fn merged(&self, schema: &Value) -> Value {
        let mut whole = json!({"type": "object", "properties": {}, "required": []});
        for part in schema["allOf"].as_array().unwrap() {
            let part = part["$ref"].as_str().map_or(part, |reference| self.0.pointer(&reference[1..]).unwrap());
            for (name, schema) in part["properties"].as_object().into_iter().flatten() {
                whole["properties"][name] = schema.clone();
            }
            for name in part["required"].as_array().into_iter().flatten() {
                whole["required"].as_array_mut().unwrap().push(name.clone());
            }
        }
        whole
    }
}

fn is(value: &Value, kind: &str) -> bool {
    match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}

/// A window that long answers soon reach.
fn small(tenants: &Tenants) -> Vec<String> {
    let mut settings = tenants.settings();
    settings.push(format!("kv.device_bytes={}", 16 * BLOCK_BYTES));
    settings.push("api.default_max_tokens=4".to_owned());
    settings
}

async fn events(request: reqwest::RequestBuilder) -> Vec<Value> {
    let text = request.send().await.unwrap().text().await.unwrap();
    let data = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
    data.map(|data| serde_json::from_str(data).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_of_real_answers_is_in_the_document() {
    let _alone = machine().await;
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let server = Server::start(&home, &small(&tenants));
    let client = Client::with_key(&server.url, &tenants.a);
    let document = Document::of(&client).await;
    let post = async |path: &str, body: Value| client.json(client.post(path, &body)).await;
    let get = async |path: &str| client.json(client.get(path)).await;

    let models = get("/v1/models").await;
    document.holds("ModelList", &models);
    let model = &models["data"][0]["id"];
    document.holds("Model", &get(&format!("/v1/models/{}", model.as_str().unwrap())).await);
    document.holds("Health", &get("/healthz").await);
    document.holds("Readiness", &get("/readyz").await);

    let messages = json!([{"role": "user", "content": "Hello."}]);
    let mut chat = json!({"model": model, "messages": messages, "logprobs": true, "top_logprobs": 2});
    document.holds("ChatCompletion", &post("/v1/chat/completions", chat.clone()).await);
    chat["stream"] = json!(true);
    chat["stream_options"] = json!({"include_usage": true});
    let told = events(client.post("/v1/chat/completions", &chat)).await;
    assert!(told.len() > 3, "{told:?}");
    told.iter().for_each(|event| document.holds("ChatEvent", event));

    let conversation = post("/v1/conversations", json!({"metadata": {"a": "b"}})).await;
    document.holds("Conversation", &conversation);
    let id = conversation["id"].as_str().unwrap();
    let include = json!(["message.output_text.logprobs"]);
    let turn = json!({"conversation": id, "input": "Hello.", "include": include, "top_logprobs": 1});
    document.holds("Response", &post("/v1/responses", turn.clone()).await);
    let mut streamed = turn;
    streamed["stream"] = json!(true);
    let told = events(client.post("/v1/responses", &streamed)).await;
    assert!(told.len() > 7, "{told:?}");
    told.iter().for_each(|event| document.holds("ResponseEvent", event));

    let items = format!("/v1/conversations/{id}/items");
    let list = post(&items, json!({"items": [{"role": "user", "content": "x"}]})).await;
    document.holds("ItemList", &list);
    document.holds("ItemList", &get(&items).await);
    document.holds("Item", &get(&format!("{items}/{}", list["first_id"].as_str().unwrap())).await);
    document.holds("Residency", &get(&format!("/v1/conversations/{id}/residency")).await);
    let pin = format!("/v1/conversations/{id}/pin");
    document.holds("Pin", &client.json(client.delete(&pin)).await);
    document.holds("Done", &post(&format!("/v1/conversations/{id}/done"), json!({})).await);
    document.holds("Offload", &client.offload(id, "none").await);
    document.holds("DeletedConversation", &client.json(client.delete(&format!("/v1/conversations/{id}"))).await);
    let refused = client.get(&format!("/v1/conversations/{id}")).send().await.unwrap();
    document.holds("Error", &refused.json().await.unwrap());
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn schemathesis_finds_nothing_that_the_document_does_not_say() {
    let _alone = machine().await;
    // Beside the tests' own scratch folder, wherever the target folder is.
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("sdk").join("schemathesis/bin/schemathesis");
    assert!(program.exists(), "there is no {}; `scripts/setup test` installs it", program.display());
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let server = Server::start(&home, &small(&tenants));
    let url = server.url.clone();
    let key = format!("Authorization: Bearer {}", tenants.a);
    let run = tokio::task::spawn_blocking(move || {
        let budget = BUDGET_S.to_string();
        let checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";
        Command::new(program)
            .args(["run", &format!("{url}/openapi.json"), "--header", &key, "--checks", checks])
            .args(["--max-time", &budget, "--seed", "1", "--generation-deterministic"])
            .args(["--max-failures", "20", "--request-timeout", "60", "--workers", "1", "--no-color"])
            .current_dir(env!("CARGO_TARGET_TMPDIR"))
            .output()
            .unwrap()
    });
    let output = run.await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    server.finish().await;
}
