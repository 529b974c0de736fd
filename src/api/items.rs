//! How do items look in JSON, and how are they paged?
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use serde_json::{Value, json};

use super::error::ApiError;
use crate::sessions::messages::{Item, ItemStatus, Part, Role, TokenLogprob};

const PAGE_DEFAULT: usize = 20;
const PAGE_MAX: usize = 100;

pub fn status(status: ItemStatus) -> &'static str {
    match status {
        ItemStatus::Completed => "completed",
        ItemStatus::Incomplete => "incomplete",
    }
}

/// A message as an item. All keys are always there.
pub fn item(item: &Item) -> Value {
    let is_answer = item.message.role == Role::Assistant;
    let part = |part: &Part| match part {
        Part::Text(text) if is_answer => output_text(text, &[]),
        Part::Text(text) => json!({"type": "input_text", "text": text}),
        Part::Refusal(text) => json!({"type": "refusal", "refusal": text}),
    };
    let content: Vec<_> = item.message.content.iter().map(part).collect();
    message(&item.id, item.message.role.name(), status(item.status), &content)
}

pub fn message(id: &str, role: &str, status: &str, content: &[Value]) -> Value {
    json!({"id": id, "type": "message", "role": role, "status": status, "content": content})
}

/// A part of an answer.
pub fn output_text(text: &str, tokens: &[TokenLogprob]) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs(tokens)})
}

/// Log probabilities as responses have them: natural log, `bytes` of every token.
pub fn logprobs(tokens: &[TokenLogprob]) -> Value {
    let entry = |bytes: &[u8], logprob: f32| json!({"token": String::from_utf8_lossy(bytes), "bytes": bytes, "logprob": logprob});
    let whole = |token: &TokenLogprob| {
        let top: Vec<_> = token.top.iter().map(|(_, bytes, logprob)| entry(bytes, *logprob)).collect();
        json!({"token": String::from_utf8_lossy(&token.bytes), "bytes": token.bytes, "logprob": token.logprob, "top_logprobs": top})
    };
    tokens.iter().map(whole).collect()
}

/// A whole list in one page, in its own order.
pub fn whole_list(data: Vec<Value>) -> Value {
    list(data, false)
}

pub fn list(data: Vec<Value>, has_more: bool) -> Value {
    let id = |item: Option<&Value>| item.and_then(|item| item.get("id")).cloned().unwrap_or_default();
    let (first_id, last_id) = (id(data.first()), id(data.last()));
    json!({"object": "list", "data": data, "first_id": first_id, "last_id": last_id, "has_more": has_more})
}

/// The pairs of a query string.
pub fn pairs(query: &str) -> Result<Vec<(String, String)>, ApiError> {
    let pairs = actix_web::web::Query::<Vec<(String, String)>>::from_query(query);
    let pairs = pairs.map_err(|_| ApiError::invalid_value("query", "the query string can't be read"))?;
    Ok(pairs.into_inner())
}

/// Which page of a list the client wants.
#[derive(Debug, PartialEq, Eq)]
pub struct Page {
    pub limit: usize,
    pub newest_first: bool,
    pub after: Option<String>,
}

impl Page {
    /// Reads `limit`, `order` and `after` of a query string.
    pub fn parse(query: &str) -> Result<Self, ApiError> {
        let mut page = Self { limit: PAGE_DEFAULT, newest_first: true, after: None };
        for (key, value) in pairs(query)? {
            match key.as_str() {
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=PAGE_MAX).contains(limit));
                    let message = || format!("`limit` must be an integer from 1 to {PAGE_MAX}");
                    page.limit = limit.ok_or_else(|| ApiError::invalid_value("limit", message()))?;
                }
                "order" => {
                    page.newest_first = match value.as_str() {
                        "asc" => false,
                        "desc" => true,
                        _ => return Err(ApiError::invalid_value("order", "`order` must be asc or desc")),
                    }
                }
                "after" if !value.is_empty() => page.after = Some(value),
                _ => {}
            }
        }
        Ok(page)
    }

    /// Cuts the page out of a conversation's items, oldest first as they come.
    pub fn cut<I: AsRef<Item>>(&self, items: &[I]) -> Result<Value, ApiError> {
        let mut ordered: Vec<&Item> = items.iter().map(AsRef::as_ref).collect();
        if self.newest_first {
            ordered.reverse();
        }
        let start = match &self.after {
            None => 0,
            Some(after) => {
                let at = ordered.iter().position(|item| item.id == *after);
                at.ok_or_else(|| ApiError::item_not_found(Some("after")))? + 1
            }
        };
        let rest = ordered.get(start..).unwrap_or_default();
        let data = rest.iter().take(self.limit).map(|found| item(found)).collect();
        Ok(list(data, rest.len() > self.limit))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::sessions::messages::Message;

    fn conversation(count: usize) -> Vec<Arc<Item>> {
        let message = |i| Message::new(Role::User, vec![Part::Text(format!("n{i}"))]);
        (0..count)
            .map(|i| Arc::new(Item { id: format!("msg_{i}"), message: message(i), status: ItemStatus::Completed }))
            .collect()
    }

    fn texts(page: &Value) -> Vec<&str> {
        page["data"].as_array().unwrap().iter().map(|item| item["content"][0]["text"].as_str().unwrap()).collect()
    }

    #[test]
    fn pages_follow_each_other_without_gap_or_repeat() {
        let items = conversation(25);
        let (mut seen, mut after) = (Vec::new(), String::new());
        loop {
            let page = Page::parse(&format!("order=asc&limit=10&after={after}")).unwrap().cut(&items).unwrap();
            seen.extend(texts(&page).into_iter().map(str::to_owned));
            after = page["last_id"].as_str().unwrap().to_owned();
            if page["has_more"] == false {
                break;
            }
        }
        assert_eq!(seen, (0..25).map(|i| format!("n{i}")).collect::<Vec<_>>());
    }

    #[test]
    fn the_newest_come_first_unless_asked_otherwise() {
        let page = Page::parse("limit=3").unwrap().cut(&conversation(25)).unwrap();
        assert_eq!(texts(&page), ["n24", "n23", "n22"]);
        assert_eq!(
            (&page["first_id"], &page["last_id"], &page["has_more"]),
            (&json!("msg_24"), &json!("msg_22"), &json!(true))
        );
    }

    #[test]
    fn an_empty_page_has_null_ids_and_an_exact_one_no_more() {
        let page = Page::parse("").unwrap().cut(&conversation(0)).unwrap();
        assert_eq!(page, json!({"object": "list", "data": [], "first_id": null, "last_id": null, "has_more": false}));
        assert_eq!(Page::parse("limit=2").unwrap().cut(&conversation(2)).unwrap()["has_more"], false);
    }

    #[test]
    fn a_bad_page_is_refused_by_its_field() {
        for (query, param) in
            [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("order=up", "order")]
        {
            let error = Page::parse(query).unwrap_err();
            assert_eq!((error.code(), error.param()), ("invalid_value", Some(param)), "{query}");
        }
        let error = Page::parse("after=msg_99").unwrap().cut(&conversation(2)).unwrap_err();
        assert_eq!((error.status().as_u16(), error.param()), (404, Some("after")));
    }

    #[test]
    fn answers_have_output_text_and_questions_input_text() {
        let mut one = Item {
            id: "msg_1".into(),
            message: Message::new(Role::Assistant, vec![Part::Text("a".into())]),
            status: ItemStatus::Incomplete,
        };
        let expected = json!({"id": "msg_1", "type": "message", "role": "assistant", "status": "incomplete",
            "content": [{"type": "output_text", "text": "a", "annotations": [], "logprobs": []}]});
        assert_eq!(item(&one), expected);
        one.message.role = Role::Developer;
        assert_eq!(item(&one)["content"], json!([{"type": "input_text", "text": "a"}]));
    }
}
