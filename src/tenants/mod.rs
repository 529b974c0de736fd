//! To which tenant does a request belong?
//!
//! Without a tenants file there is one tenant, `default`, that takes any key or none, on a loopback listener only.

use crate::types::{TenantId, TenantKey};

/// A tenant as the layers above the engine know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    pub id: TenantId,
    pub name: String,
    /// Keys this tenant's prefix hashes.
    pub key: TenantKey,
}

impl Tenant {
    /// The one tenant of a server without a tenants file. Its hash key is random: the tiers that exist die with the process.
    pub fn default_tenant() -> Self {
        Self { id: TenantId(0), name: "default".into(), key: TenantKey(rand::random()) }
    }
}
