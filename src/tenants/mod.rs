//! To which tenant does a request belong?
//!
//! `directory` finds a key's tenant, `key` makes and hashes keys, `quota` counts what a tenant asks for, `watch` follows
//! the tenants file, `admin_key` has the key that nobody configured, `secret` makes hash keys.

pub mod admin_key;
pub mod directory;
pub mod key;
pub mod quota;
pub mod secret;
pub mod watch;

use std::sync::Arc;

use crate::types::{TenantId, TenantKey};
use quota::Quota;

/// A tenant as the layers above the engine know it.
#[derive(Clone, Debug)]
pub struct Tenant {
    pub id: TenantId,
    /// Its id in the tenants file, under which the store has its conversations.
    pub name: String,
    /// Keys this tenant's prefix hashes.
    pub key: TenantKey,
    /// The models that it may use; `None`: all.
    pub models: Option<Arc<[String]>>,
    /// What it has asked for, and may.
    pub quota: Arc<Quota>,
}

impl Tenant {
    pub fn may_use(&self, model: &str) -> bool {
        self.models.as_ref().is_none_or(|models| models.iter().any(|allowed| allowed == model))
    }
}
