//! What does it mean for memory that a conversation falls silent, is heard of, or is over?
//!
//! Its blocks come to rest, it goes to its place in line, and what became of its silence is learned, whether or not a tier
//! still holds any of it. So is what becomes of prefixes that conversations share.

use std::sync::Arc;

use super::block::OpenBlock;
use super::manager::Manager;
use super::residency::Activity;
use super::return_rate::{Class, Learned, ReturnRates, TurnShape};
use crate::types::{KvKey, Tick};

impl Manager {
    /// Lays a running sequence's blocks to rest: its turn is over, and the conversation falls silent.
    pub fn rest(&mut self, now: Tick, key: KvKey, turn: TurnShape) {
        self.lay_down(key, now);
        self.fall_silent(now, key, turn);
        self.drop_if_empty(key);
    }

    /// Lays a running sequence's blocks to rest until its turn goes on: it is preempted.
    pub fn set_back(&mut self, now: Tick, key: KvKey) {
        self.lay_down(key, now);
        self.expect(now, key);
        self.drop_if_empty(key);
    }

    fn lay_down(&mut self, key: KvKey, now: Tick) {
        self.tell_time(now);
        let conversation = self.conversations.get_mut(&key).expect("a running sequence is known");
        let Activity::Running(running) = std::mem::replace(&mut conversation.activity, Activity::Idle) else {
            panic!("the conversation runs")
        };
        let later = running.later.filter(|(index, _)| *index == conversation.device.end()).map(|(_, open)| open);
        let end = if conversation.device.back.is_some() { later } else { running.open.or(later) };
        conversation.device.tail = end.and_then(OpenBlock::rest).map(Arc::new);
        // It stopped in the middle of a block that it encoded anew although the host has the whole of it.
        if conversation.host.end() > conversation.device.end() {
            conversation.device.tail = None;
        }
        conversation.last_used = now;
        self.uses += 1;
        conversation.used = self.uses;
        if !self.settings.reuse {
            conversation.device.clear();
        }
        self.touch(key);
        self.settle_pin_of(key);
        if self.settings.background_offload && self.host.total().0 > 0 {
            self.uncopied.push_back(key);
        } else {
            self.wants_store(key);
        }
    }

    /// Told that the turn that waited for this conversation, or ran, is over: it goes in line with those like it. What
    /// becomes of its silence is learned whether or not a tier holds any of it.
    pub fn fall_silent(&mut self, now: Tick, key: KvKey, turn: TurnShape) {
        let class = Class::after(turn);
        self.returns.begin(now, key, class);
        self.use_shared(now, key);
        if let Some(conversation) = self.conversations.get_mut(&key).filter(|conversation| conversation.is_idle()) {
            conversation.activity = Activity::Idle;
            conversation.class = class;
            conversation.silent_since = now;
            conversation.lost_in_silence = false;
            self.back_in_line(key);
        }
    }

    /// Notes that the prefix which a conversation shares with others was used by it, and learns how often such ones are.
    fn use_shared(&mut self, now: Tick, key: KvKey) {
        let Some(conversation) = self.conversations.get(&key) else { return };
        let last = conversation.shared.checked_sub(1).and_then(|last| conversation.device.sealed.get(last));
        if let Some(block) = last {
            block.share(now);
            let prefix = block.hash().as_key();
            self.returns.end(now, prefix);
            self.returns.begin(now, prefix, Class::SHARED);
        }
    }

    /// Told that the turn that has just ended called a tool, so that its answer will come.
    pub fn await_tool(&mut self, key: KvKey) {
        let Some(conversation) = self.conversations.get_mut(&key) else { return };
        conversation.class = conversation.class.awaiting_tool();
        self.returns.reclassify(key, conversation.class);
        if matches!(conversation.activity, Activity::Idle) {
            self.back_in_line(key);
        }
    }

    /// Told that a turn waits for this conversation: its silence is over, and it goes last in line.
    pub fn expect_soon(&mut self, now: Tick, key: KvKey) {
        self.early_returns.come_back(now, key);
        self.returns.end(now, key);
        self.expect(now, key);
    }

    fn expect(&mut self, now: Tick, key: KvKey) {
        if let Some(conversation) = self.conversations.get_mut(&key).filter(|conversation| conversation.is_idle()) {
            conversation.activity = Activity::Expected;
            conversation.silent_since = now;
            self.back_in_line(key);
        }
    }

    /// Puts a conversation last of those like it, as if it had been used just now: its pin has ended, or it is
    /// not over after all.
    pub(super) fn freshen(&mut self, now: Tick, key: KvKey) {
        if let Some(conversation) = self.conversations.get_mut(&key).filter(|conversation| conversation.is_idle()) {
            conversation.silent_since = now;
            self.back_in_line(key);
        }
    }

    /// What was learned of how conversations come back.
    pub fn learned(&self) -> &Learned {
        self.returns.learned()
    }

    /// Whether enough was learned to go by.
    pub fn has_learned_enough(&self) -> bool {
        self.returns.knows_enough()
    }

    /// Goes on from what was learned before a restart.
    pub fn go_on_from(&mut self, learned: Learned) {
        self.returns = ReturnRates::new(learned);
    }

    /// Told that the conversation is over: it goes first, and serves as a shared prefix until then.
    pub fn end(&mut self, key: KvKey) {
        self.returns.forget(key);
        let Some(conversation) = self.conversations.get_mut(&key).filter(|conversation| conversation.is_idle()) else {
            return;
        };
        conversation.activity = Activity::Ended;
        self.back_in_line(key);
    }

    /// Told that it is not over after all: it goes in line with those like it, as if it had been used just now.
    pub fn reopen(&mut self, now: Tick, key: KvKey) {
        let Some(conversation) = self.conversations.get_mut(&key) else { return };
        if matches!(conversation.activity, Activity::Ended) {
            conversation.activity = Activity::Idle;
            self.freshen(now, key);
        }
    }
}
