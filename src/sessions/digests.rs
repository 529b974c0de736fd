//! By what is a conversation known when a client sends it back as text?
//!
//! Two chains of keyed digests over its messages. One is generous: spaces at a text's ends are not told apart, since clients
//! trim what they show; a digest behind each answer leads to the tokens that were generated. The other is exact: what it says
//! is the same renders to the same text.

use super::messages::{Message, Role};
use super::transcript::text_of;
use crate::types::TenantKey;

pub type Digest = [u8; 32];

/// What the messages of a conversation are known by, up to each answer and to the end.
#[derive(Clone, Debug)]
pub struct Digests {
    key: TenantKey,
    messages: usize,
    answers: Vec<Digest>,
    /// Of all messages; to be continued.
    end: Digest,
    /// Of `exact_from` messages, of one more, and so on up to all.
    exact: Vec<Digest>,
    exact_from: usize,
}

impl Digests {
    /// Of no messages, or of instructions.
    pub fn new(key: &TenantKey, instructions: Option<&str>) -> Self {
        let mut digests =
            Self { key: *key, messages: 0, answers: Vec::new(), end: [0; 32], exact: vec![[0; 32]], exact_from: 0 };
        if let Some(instructions) = instructions {
            let link = digests.link(Role::System, None, instructions);
            digests.push(Role::System, link, &[]);
        }
        digests
    }

    pub fn add(&mut self, message: &Message) {
        let link = self.link(message.role, message.name.as_deref(), &text_of(message));
        let calls = message.calls.iter().flat_map(|call| [call.id.as_str(), &call.name, &call.arguments]);
        let others: Vec<&str> = calls.chain(message.call_id.as_deref()).collect();
        self.push(message.role, link, &others);
    }

    /// The generous digest with a message, and the exact one of its texts.
    fn link(&self, role: Role, name: Option<&str>, text: &str) -> [Digest; 2] {
        let name = name.map_or([""; 2], |name| ["named", name]);
        let exact = self.exact.last().copied().unwrap_or_default();
        let digest = |before: &Digest, text: &str| self.hash(before, &[role.name(), name[1], text]);
        let generous = digest(&self.end, text.trim());
        [generous, self.hash(&exact, &[role.name(), name[0], name[1], text])]
    }

    fn push(&mut self, role: Role, [generous, exact]: [Digest; 2], others: &[&str]) {
        self.messages += 1;
        self.end = generous;
        if role == Role::Assistant {
            self.answers.push(generous);
        }
        self.exact.push(if others.is_empty() { exact } else { self.hash(&exact, others) });
    }

    fn hash(&self, before: &Digest, fields: &[&str]) -> Digest {
        let mut hasher = blake3::Hasher::new_keyed(&self.key.0);
        hasher.update(before);
        for field in fields {
            hasher.update(&(field.len() as u64).to_le_bytes());
            hasher.update(field.as_bytes());
        }
        *hasher.finalize().as_bytes()
    }

    /// How many messages it is of.
    pub fn messages(&self) -> usize {
        self.messages
    }

    /// A digest behind each answer.
    pub fn answers(&self) -> &[Digest] {
        &self.answers
    }

    /// The exact digest of this many messages, if it is still there.
    pub fn exact(&self, messages: usize) -> Option<Digest> {
        self.exact.get(messages.checked_sub(self.exact_from)?).copied()
    }

    /// Forgets the exact digests of fewer messages than this, but for the last.
    pub fn keep_exact_from(&mut self, messages: usize) {
        let messages = messages.clamp(self.exact_from, self.messages);
        self.exact.drain(..messages - self.exact_from);
        self.exact_from = messages;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ToolCall;
    use crate::sessions::fixtures::message;

    const KEY: TenantKey = TenantKey([7; 32]);

    fn of(messages: &[Message]) -> Digests {
        let mut digests = Digests::new(&KEY, None);
        messages.iter().for_each(|message| digests.add(message));
        digests
    }

    #[test]
    fn spaces_at_the_ends_are_told_apart_by_the_exact_chain_alone() {
        let plain = of(&[message(Role::User, "Hi"), message(Role::Assistant, "Hello")]);
        let spaced = of(&[message(Role::User, "Hi"), message(Role::Assistant, " Hello\n")]);
        assert_eq!(plain.answers(), spaced.answers());
        assert_eq!(plain.exact(1), spaced.exact(1));
        assert_ne!(plain.exact(2), spaced.exact(2));
    }

    #[test]
    fn whatever_a_template_may_show_is_in_the_exact_chain() {
        let plain = message(Role::Assistant, "a");
        let call = |arguments: &str| ToolCall { id: "1".into(), name: "f".into(), arguments: arguments.into() };
        let others = [
            message(Role::Assistant, "b"),
            message(Role::User, "a"),
            Message { name: Some(String::new()), ..plain.clone() },
            Message { name: Some("n".into()), ..plain.clone() },
            Message { call_id: Some("1".into()), ..plain.clone() },
            Message { calls: vec![call("{}")], ..plain.clone() },
            Message { calls: vec![call("[]")], ..plain.clone() },
            plain,
        ];
        let mut exact: Vec<_> = others.iter().map(|message| of(std::slice::from_ref(message)).exact(1)).collect();
        exact.sort();
        exact.dedup();
        assert_eq!(exact.len(), others.len());
    }

    #[test]
    fn exact_digests_that_are_not_wanted_any_more_go_and_the_chain_goes_on() {
        let messages = ["a", "b", "c", "d"].map(|text| message(Role::User, text));
        let whole = of(&messages);
        let mut digests = of(&messages[..3]);
        digests.keep_exact_from(2);
        assert_eq!((digests.exact(1), digests.exact(2)), (None, whole.exact(2)));
        digests.keep_exact_from(usize::MAX);
        digests.add(&messages[3]);
        assert_eq!((digests.exact(2), digests.exact(4)), (None, whole.exact(4)));
    }
}
