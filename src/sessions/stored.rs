//! In which JSON does an item lie in the store?
//!
//! The store keeps it as an opaque string; this shape is ours to read for as long as data lives. A field may be added, with
//! a default; none changes its meaning.

#![deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use serde::{Deserialize, Serialize};

use super::messages::{Item, ItemStatus, Message, Part, Role};

#[derive(Serialize, Deserialize)]
struct Body {
    role: StoredRole,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    status: StoredStatus,
    content: Vec<StoredPart>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum StoredRole {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum StoredStatus {
    Completed,
    Incomplete,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum StoredPart {
    Text(String),
    Refusal(String),
}

/// An item's body for the store.
#[expect(clippy::expect_used, reason = "reads nothing from outside")]
pub(super) fn encode(item: &Item) -> String {
    let role = match item.message.role {
        Role::System => StoredRole::System,
        Role::Developer => StoredRole::Developer,
        Role::User => StoredRole::User,
        Role::Assistant => StoredRole::Assistant,
        Role::Tool => StoredRole::Tool,
    };
    let status = match item.status {
        ItemStatus::Completed => StoredStatus::Completed,
        ItemStatus::Incomplete => StoredStatus::Incomplete,
    };
    let content = item.message.content.iter().map(|part| match part {
        Part::Text(text) => StoredPart::Text(text.clone()),
        Part::Refusal(text) => StoredPart::Refusal(text.clone()),
    });
    let body = Body { role, name: item.message.name.clone(), status, content: content.collect() };
    serde_json::to_string(&body).expect("strings and unit variants always serialise")
}

/// An item as the store had it.
pub(super) fn decode(id: String, body: &str) -> Result<Item, serde_json::Error> {
    let body: Body = serde_json::from_str(body)?;
    let role = match body.role {
        StoredRole::System => Role::System,
        StoredRole::Developer => Role::Developer,
        StoredRole::User => Role::User,
        StoredRole::Assistant => Role::Assistant,
        StoredRole::Tool => Role::Tool,
    };
    let status = match body.status {
        StoredStatus::Completed => ItemStatus::Completed,
        StoredStatus::Incomplete => ItemStatus::Incomplete,
    };
    let content = body.content.into_iter().map(|part| match part {
        StoredPart::Text(text) => Part::Text(text),
        StoredPart::Refusal(text) => Part::Refusal(text),
    });
    let message = Message { name: body.name, ..Message::new(role, content.collect()) };
    Ok(Item { id, message, status })
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_item_of_the_first_release_is_read_for_ever() {
        let body = r#"{"role":"assistant","status":"incomplete","content":[{"text":"Hel"},{"refusal":"no"}]}"#;
        let item = decode("msg_1".into(), body).unwrap();
        assert_eq!((item.message.role, item.status), (Role::Assistant, ItemStatus::Incomplete));
        assert_eq!(item.message.content, [Part::Text("Hel".into()), Part::Refusal("no".into())]);
        assert_eq!(encode(&item), body);
    }

    #[test]
    fn a_torn_body_is_an_error() {
        for body in ["", "{}", "[]", r#"{"role":"king","status":"completed","content":[]}"#] {
            assert!(decode("msg_1".into(), body).is_err(), "{body}");
        }
    }

    proptest! {
        #[test]
        fn an_item_comes_back_as_it_was(texts in vec(any::<String>(), 0..4), name in any::<Option<String>>()) {
            let content = texts.into_iter().map(Part::Text).collect();
            let message = Message { name, ..Message::new(Role::User, content) };
            let item = Item { id: "msg_1".into(), message, status: ItemStatus::Completed };
            prop_assert_eq!(decode("msg_1".into(), &encode(&item)).unwrap(), item);
        }
    }
}
