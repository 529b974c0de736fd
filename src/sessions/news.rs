//! Which conversations have come, branched or gone since somebody last asked?
//!
//! For those who keep books of all conversations. Bounded: what is asked for too late is forgotten, the oldest first.

use std::collections::VecDeque;

use parking_lot::Mutex;

use super::Sessions;
use super::messages::ConversationId;
use crate::types::{TenantId, TokenCount};

/// Most that wait to be asked for.
const MOST: usize = 1 << 16;

/// Something that the engine is not told of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum News {
    Made {
        tenant: TenantId,
        id: ConversationId,
    },
    Deleted(ConversationId),
    /// `fork` has some or all of the history of `of`: so many tokens.
    Forked {
        tenant: TenantId,
        of: ConversationId,
        fork: ConversationId,
        tokens: TokenCount,
    },
}

/// What nobody has asked for yet.
#[derive(Default)]
pub(super) struct Unread(Mutex<VecDeque<News>>);

impl Unread {
    pub fn add(&self, news: News) {
        let mut unread = self.0.lock();
        if unread.len() == MOST {
            unread.pop_front();
        }
        unread.push_back(news);
    }
}

impl Sessions {
    /// What has happened since the last call. For one asker.
    pub fn take_news(&self) -> VecDeque<News> {
        std::mem::take(&mut *self.shared.unread.0.lock())
    }
}
