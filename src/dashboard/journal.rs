//! What was decided, by the engine and by operators, in the order in which it happened?
//!
//! The engine's own decisions as it words them, what brought conversations back, and what operators did. Bounded: the
//! newest are kept.

use std::collections::VecDeque;

use serde_json::{Value, json};

use crate::engine::status::{Decision, PromptUsage, Why};
use crate::types::{KvKey, TenantId, Tick, Tier, counted};

const KEPT: usize = 10_000;

/// One entry.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Rises by one.
    pub number: u64,
    /// The engine's own number of a decision of its.
    pub decision: Option<u64>,
    pub at: Tick,
    pub kind: &'static str,
    pub rule: &'static str,
    pub session: Option<KvKey>,
    pub tenant: Option<TenantId>,
    pub from: Option<Tier>,
    pub to: Option<Tier>,
    pub freed_bytes: u64,
    pub freed_blocks: u32,
    pub lost_blocks: u32,
    pub for_tenant: Option<TenantId>,
    pub silent_s: Option<u64>,
    pub class: Option<String>,
    pub per_minute: Option<f64>,
    pub sentence: String,
    pub actor: Option<String>,
}

impl Entry {
    fn new(at: Tick, kind: &'static str, rule: &'static str, sentence: String) -> Self {
        Self {
            number: 0,
            decision: None,
            at,
            kind,
            rule,
            session: None,
            tenant: None,
            from: None,
            to: None,
            freed_bytes: 0,
            freed_blocks: 0,
            lost_blocks: 0,
            for_tenant: None,
            silent_s: None,
            class: None,
            per_minute: None,
            sentence,
            actor: None,
        }
    }

    /// A decision of the engine. `block_bytes`: of the tier that lost blocks.
    pub fn decided(why: &Why, block_bytes: u64) -> Self {
        let entry = &why.entry;
        let rule = entry.rule.name();
        let kind = match rule {
            "preempted" => "preempt",
            "requested" => "offload",
            "at_ceiling" | "no_victim" => "refuse",
            "checksum" => "mismatch",
            // What a lower tier gives up goes nowhere.
            _ if entry.from == Tier::Device => "evict",
            _ => "drop",
        };
        let below = match entry.from {
            Tier::Device => Some(Tier::Host),
            Tier::Host => Some(Tier::Disk),
            Tier::Disk => None,
        };
        let takes = matches!(kind, "evict" | "offload" | "drop");
        Self {
            decision: Some(entry.id),
            session: Some(entry.victim),
            tenant: Some(entry.tenant),
            from: Some(entry.from).filter(|_| kind != "refuse"),
            to: below.filter(|_| matches!(kind, "evict" | "offload") && entry.lost.0 < entry.freed.0),
            freed_bytes: u64::from(entry.freed.0) * block_bytes,
            freed_blocks: entry.freed.0,
            lost_blocks: entry.lost.0,
            for_tenant: Some(entry.for_tenant).filter(|_| takes || kind == "preempt"),
            silent_s: Some(entry.reason.silent_ms / 1000).filter(|_| takes && rule != "requested"),
            class: entry.reason.class.map(|class| class.describe()),
            per_minute: entry.reason.rate.map(|rate| rate.per_s() * 60.0),
            ..Self::new(entry.at, kind, rule, why.to_string())
        }
    }

    /// How a conversation came back; `None` if there was nothing to decide. `prefill_per_s`: tokens; 0: not known.
    pub fn came_back(at: Tick, key: KvKey, tenant: TenantId, prompt: &PromptUsage, prefill_per_s: u64) -> Option<Self> {
        let decision = prompt.decision();
        let (kind, from) = match decision {
            Decision::Fresh | Decision::Resident => return None,
            Decision::Reload | Decision::Split if prompt.reloaded_disk.0 > 0 => ("reload", Some(Tier::Disk)),
            Decision::Reload | Decision::Split => ("reload", Some(Tier::Host)),
            Decision::Reencode => ("reencode", None),
        };
        let encoding = |tokens: u32| match (u64::from(tokens) * 1000).checked_div(prefill_per_s) {
            Some(ms) => format!("about {ms} ms"),
            None => "some time".to_owned(),
        };
        let tokens = |tokens: u32| counted(tokens, "token", "tokens");
        let (host, disk, again) = (prompt.reloaded_host, prompt.reloaded_disk, prompt.reencoded);
        let mut parts = Vec::new();
        if host.0 > 0 {
            parts.push(format!("{} from the host", tokens(host.0)));
        }
        if disk.0 > 0 {
            parts.push(format!("{} from disk", tokens(disk.0)));
        }
        let came = parts.join(" and ");
        let sentence = match decision {
            Decision::Reencode => format!(
                "Its turn encoded {} again, since no tier had that part or encoding was quicker: {}.",
                tokens(again.0),
                encoding(again.0)
            ),
            _ => {
                let spared = encoding(host.0 + disk.0);
                let ms = prompt.reload_ms;
                let split = match again.0 {
                    0 => String::new(),
                    again => format!(", and {} encoded again meanwhile", counted(again, "was", "were")),
                };
                format!("It came back: {came} in {ms} ms{split}; encoding that would have taken {spared}.")
            }
        };
        let to = Some(Tier::Device);
        Some(Self {
            session: Some(key),
            tenant: Some(tenant),
            from,
            to,
            ..Self::new(at, kind, decision.name(), sentence)
        })
    }

    /// What an operator did.
    pub fn acted(at: Tick, actor: &str, session: KvKey, tenant: TenantId, sentence: String) -> Self {
        let (session, tenant, actor) = (Some(session), Some(tenant), Some(actor.to_owned()));
        Self { session, tenant, actor, ..Self::new(at, "action", "operator", sentence) }
    }

    /// A decision's is the one that the API gives it; the others' are above all of those.
    pub fn id(&self) -> String {
        let number = self.decision.map_or(u128::from(self.number) | 1 << 64, u128::from);
        format!("jrn_{number:032x}")
    }

    /// As the API tells it.
    pub fn json(&self, name: &dyn Fn(TenantId) -> String, ms: &dyn Fn(Tick) -> i64) -> Value {
        json!({
            "id": self.id(),
            "seq": self.number,
            "ts": ms(self.at),
            "kind": self.kind,
            "session": self.session.map(super::session_id),
            "tenant": self.tenant.map(name),
            "from": self.from.map(Tier::name),
            "to": self.to.map(Tier::name),
            "freed_bytes": self.freed_bytes,
            "freed_blocks": self.freed_blocks,
            "lost_blocks": self.lost_blocks,
            "for": self.for_tenant.map(|tenant| json!({"tenant": name(tenant), "session": null})),
            "rule": self.rule,
            "why": {"silent_s": self.silent_s, "class": self.class, "rate_per_min": self.per_minute},
            "sentence": self.sentence,
            "actor": self.actor,
        })
    }
}

/// Which entries.
#[derive(Clone, Debug, Default)]
pub struct Query {
    pub tenant: Option<TenantId>,
    pub session: Option<KvKey>,
    pub kind: Option<String>,
    pub rule: Option<String>,
    /// Older than the entry of this number.
    pub before: Option<u64>,
    pub since: Option<Tick>,
    pub limit: usize,
}

impl Query {
    fn takes(&self, entry: &Entry) -> bool {
        self.tenant.is_none_or(|tenant| entry.tenant == Some(tenant) || entry.for_tenant == Some(tenant))
            && self.session.is_none_or(|session| entry.session == Some(session))
            && self.kind.as_ref().is_none_or(|kind| entry.kind == kind)
            && self.rule.as_ref().is_none_or(|rule| entry.rule == rule)
            && self.before.is_none_or(|before| entry.number < before)
            && self.since.is_none_or(|since| entry.at >= since)
    }
}

#[derive(Debug, Default)]
pub struct Journal {
    entries: VecDeque<Entry>,
    next: u64,
}

impl Journal {
    pub fn add(&mut self, entry: Entry) -> &Entry {
        if self.entries.len() == KEPT {
            self.entries.pop_front();
        }
        self.entries.push_back(Entry { number: self.next, ..entry });
        self.next += 1;
        &self.entries[self.entries.len() - 1]
    }

    /// The newest first; and whether there are more.
    pub fn find(&self, query: &Query) -> (Vec<&Entry>, bool) {
        let mut found = self.entries.iter().rev().filter(|entry| query.takes(entry));
        let page: Vec<&Entry> = found.by_ref().take(query.limit).collect();
        (page, found.next().is_some())
    }

    /// The newest entries back to a moment.
    pub fn since(&self, since: Tick) -> impl Iterator<Item = &Entry> {
        self.entries.iter().rev().take_while(move |entry| entry.at >= since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::TokenCount;

    #[test]
    fn the_way_back_is_told_with_what_it_spared() {
        let prompt = PromptUsage {
            reloaded_host: TokenCount(1600),
            reloaded_disk: TokenCount(400),
            reload_ms: 12,
            ..PromptUsage::default()
        };
        let entry = Entry::came_back(Tick(5), KvKey(1), TenantId(0), &prompt, 1000).unwrap();
        assert_eq!((entry.kind, entry.rule, entry.from), ("reload", "reload", Some(Tier::Disk)));
        assert_eq!(
            entry.sentence,
            "It came back: 1600 tokens from the host and 400 tokens from disk in 12 ms; encoding that would have taken about 2000 ms."
        );
        let again = PromptUsage { reencoded: TokenCount(50), ..PromptUsage::default() };
        let entry = Entry::came_back(Tick(5), KvKey(1), TenantId(0), &again, 0).unwrap();
        assert_eq!((entry.kind, entry.rule), ("reencode", "reencode"));
        assert!(
            entry.sentence.contains("50 tokens again") && entry.sentence.ends_with("some time."),
            "{}",
            entry.sentence
        );
        assert!(Entry::came_back(Tick(5), KvKey(1), TenantId(0), &PromptUsage::default(), 1).is_none());
    }

    #[test]
    fn pages_go_back_and_filters_hold() {
        let mut journal = Journal::default();
        for at in 0..KEPT as u64 + 50 {
            let sentence = String::from("Something.");
            journal.add(Entry::acted(Tick(at), "key_1", KvKey(u128::from(at % 5)), TenantId(at as u32 % 2), sentence));
        }
        let all = Query { limit: usize::MAX, ..Query::default() };
        assert_eq!(journal.find(&all).0.len(), KEPT);
        let (page, more) = journal.find(&Query { limit: 3, session: Some(KvKey(2)), ..Query::default() });
        let numbers: Vec<u64> = page.iter().map(|entry| entry.number).collect();
        assert_eq!((numbers.as_slice(), more), (&[10_047, 10_042, 10_037][..], true));
        let (older, _) =
            journal.find(&Query { limit: 1, before: Some(10_037), session: Some(KvKey(2)), ..Query::default() });
        assert_eq!(older[0].number, 10_032);
        assert!(journal.find(&Query { kind: Some("evict".into()), ..all }).0.is_empty());
        assert_eq!(journal.since(Tick(KEPT as u64 + 45)).count(), 5);
    }
}
