//! Whose is this key?
//!
//! One table, swapped whole when the tenants file changes, read without a lock. Without a tenants file there is one tenant,
//! `default`, for any key or none. Invariant: a tenant keeps its engine id, its hash key and its quota for as long as the
//! process lives, also if it is gone from the file for a while.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use super::Tenant;
use super::key::KeyHash;
use super::quota::{Limits, Quota};
use super::secret::Secret;
use crate::config::tenants::{KeyEntry, Status, TenantEntry, TenantsFile};
use crate::types::{Grant, TenantId, TenantKey};

/// Why a key opens nothing here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KeyError {
    #[error("no API key was given; send one as `Authorization: Bearer <key>`")]
    Missing,
    #[error("the API key is not known here; check it, or ask who runs this server for one")]
    Unknown,
    #[error("the API key has expired; ask who runs this server for a new one")]
    Expired,
    #[error("this tenant is suspended; ask who runs this server")]
    Suspended,
    #[error("this is a tenant's key, and the route takes an admin's")]
    TenantOnAdminRoute,
    #[error("this is an admin's key, and the route takes a tenant's")]
    AdminOnTenantRoute,
}

enum Holder {
    Admin,
    Tenant(Tenant, Status),
}

struct Known {
    hash: KeyHash,
    expires_at: Option<i64>,
    holder: Holder,
}

/// What one version of the tenants file comes to.
#[derive(Default)]
struct Table {
    /// By the hashes' places; two keys in one are possible, and next to never.
    keys: HashMap<u64, Vec<Known>>,
    /// The tenant of any key or none.
    open: Option<Tenant>,
    by_id: HashMap<TenantId, Tenant>,
}

/// What a tenant keeps while the process lives.
struct Lasting {
    id: TenantId,
    key: TenantKey,
    quota: Arc<Quota>,
}

/// All tenants and their keys.
pub struct Directory {
    table: ArcSwap<Table>,
    lasting: Mutex<HashMap<String, Lasting>>,
    /// The limits of a tenant whose entry sets none.
    usual: Limits,
    secret: Secret,
}

impl Directory {
    /// One tenant, `default`, for any key or none; admins by this key.
    pub fn open_to_all(admin: KeyHash, usual: Limits, secret: Secret) -> Self {
        let directory = Self::empty(usual, secret);
        let tenant = directory.tenant_named("default", usual, None);
        let mut table = Table { open: Some(tenant.clone()), ..Table::default() };
        table.by_id.insert(tenant.id, tenant);
        table.insert(admin, None, Holder::Admin);
        directory.table.store(Arc::new(table));
        directory
    }

    /// The tenants of a file. `admin` is the admins' key if the file names none.
    pub fn of_file(file: &TenantsFile, admin: KeyHash, usual: Limits, secret: Secret) -> (Self, Vec<Grant>) {
        let directory = Self::empty(usual, secret);
        let grants = directory.apply(file, admin);
        (directory, grants)
    }

    fn empty(usual: Limits, secret: Secret) -> Self {
        Self { table: ArcSwap::default(), lasting: Mutex::default(), usual, secret }
    }

    /// Puts a file in force, and says what the engine must know of it.
    pub fn apply(&self, file: &TenantsFile, admin: KeyHash) -> Vec<Grant> {
        let mut table = Table::default();
        let insert = |table: &mut Table, key: &KeyEntry, holder| {
            table.insert(KeyHash(key.sha256), key.expires_at, holder);
        };
        file.admin_keys.iter().for_each(|key| insert(&mut table, key, Holder::Admin));
        if file.admin_keys.is_empty() {
            table.insert(admin, None, Holder::Admin);
        }
        let mut grants = Vec::new();
        for entry in &file.tenants {
            let tenant = self.tenant(entry);
            table.by_id.insert(tenant.id, tenant.clone());
            // One that is suspended asks for nothing, so that the others share what it had.
            if entry.status == Status::Active {
                let (device, host, disk) = (entry.device(), entry.host(), entry.disk());
                grants.push(Grant { tenant: tenant.id, weight: entry.weight, device, host, disk });
            }
            entry.keys.iter().for_each(|key| insert(&mut table, key, Holder::Tenant(tenant.clone(), entry.status)));
        }
        self.table.store(Arc::new(table));
        grants
    }

    fn tenant(&self, entry: &TenantEntry) -> Tenant {
        let limits = Limits {
            requests_per_minute: entry.limits.requests_per_minute.or(self.usual.requests_per_minute),
            concurrent_turns: entry.limits.concurrent_turns.unwrap_or(self.usual.concurrent_turns),
            sockets: entry.limits.sockets.unwrap_or(self.usual.sockets),
        };
        self.tenant_named(&entry.id, limits, entry.models.as_deref().map(Arc::from))
    }

    /// A tenant as it has been since the process began, with these limits.
    fn tenant_named(&self, name: &str, limits: Limits, models: Option<Arc<[String]>>) -> Tenant {
        let mut lasting = self.lasting.lock();
        // Bounded by the tenants file, and by memory long before 2^32.
        let next = TenantId(u32::try_from(lasting.len()).unwrap_or(u32::MAX));
        let now = Instant::now();
        let Lasting { id, key, quota } = lasting.entry(name.to_owned()).or_insert_with(|| Lasting {
            id: next,
            key: self.secret.key_of(name),
            quota: Arc::new(Quota::new(limits, now)),
        });
        quota.set_limits(limits, now);
        Tenant { id: *id, name: name.to_owned(), key: *key, models, quota: Arc::clone(quota) }
    }

    /// The names of all tenants that there have been since the process began.
    pub fn names(&self) -> HashMap<TenantId, String> {
        self.lasting.lock().iter().map(|(name, lasting)| (lasting.id, name.clone())).collect()
    }

    /// The hash keys of all tenants that there have been since the process began.
    pub fn hash_keys(&self) -> Vec<(TenantId, TenantKey)> {
        self.lasting.lock().values().map(|lasting| (lasting.id, lasting.key)).collect()
    }

    /// Whether any key or none will do for what tenants do.
    pub fn is_open(&self) -> bool {
        self.table.load().open.is_some()
    }

    /// The tenant that a key names. `now`: seconds since 1970.
    pub fn tenant_of(&self, key: Option<&str>, now: i64) -> Result<Tenant, KeyError> {
        let table = self.table.load();
        if let Some(tenant) = &table.open {
            return Ok(tenant.clone());
        }
        match &table.find(key, now)?.holder {
            Holder::Tenant(tenant, Status::Active) => Ok(tenant.clone()),
            Holder::Tenant(_, Status::Suspended) => Err(KeyError::Suspended),
            Holder::Admin => Err(KeyError::AdminOnTenantRoute),
        }
    }

    /// A tenant that there is now, by the engine's id.
    pub fn tenant_by_id(&self, id: TenantId) -> Option<Tenant> {
        self.table.load().by_id.get(&id).cloned()
    }

    /// Whether a key is an admin's.
    pub fn check_admin(&self, key: Option<&str>, now: i64) -> Result<(), KeyError> {
        match &self.table.load().find(key, now)?.holder {
            Holder::Admin => Ok(()),
            Holder::Tenant(..) => Err(KeyError::TenantOnAdminRoute),
        }
    }
}

impl Table {
    fn insert(&mut self, hash: KeyHash, expires_at: Option<i64>, holder: Holder) {
        self.keys.entry(hash.place()).or_default().push(Known { hash, expires_at, holder });
    }

    fn find(&self, key: Option<&str>, now: i64) -> Result<&Known, KeyError> {
        let hash = KeyHash::of(key.ok_or(KeyError::Missing)?);
        let known = self.keys.get(&hash.place()).into_iter().flatten().find(|known| known.hash.is(&hash));
        let known = known.ok_or(KeyError::Unknown)?;
        if known.expires_at.is_some_and(|expires_at| expires_at <= now) { Err(KeyError::Expired) } else { Ok(known) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::types::Weight;

    const NOW: i64 = 1_790_000_000;
    const USUAL: Limits = Limits { requests_per_minute: None, concurrent_turns: 64, sockets: 256 };

    fn file(text: &str) -> TenantsFile {
        let sha = |key: &str| format!("sha256 = \"{}\"", KeyHash::of(key).hex());
        let text = ["web", "old", "ops", "off"]
            .iter()
            .fold(text.to_owned(), |text, key| text.replace(&format!("<{key}>"), &sha(key)));
        TenantsFile::parse(&text, &Config::defaults().unwrap().kv).unwrap()
    }

    const FILE: &str = r#"
        admin_key = [{ <ops> }]
        [[tenant]]
        id = "a"
        weight = 2
        keys = [{ <web> }, { <old>, expires_at = 2026-01-01 }]
        [[tenant]]
        id = "b"
        status = "suspended"
        keys = [{ <off> }]
    "#;

    #[test]
    fn a_key_opens_what_it_is_for_and_nothing_else() {
        let (directory, grants) = Directory::of_file(&file(FILE), KeyHash::of("made"), USUAL, Secret::random());
        assert_eq!(grants.iter().map(|grant| grant.weight).collect::<Vec<_>>(), [Weight(2000)]);
        assert_eq!(directory.tenant_of(Some("web"), NOW).unwrap().name, "a");
        for (key, why) in [
            (None, KeyError::Missing),
            (Some(""), KeyError::Unknown),
            (Some("Web"), KeyError::Unknown),
            (Some("old"), KeyError::Expired),
            (Some("off"), KeyError::Suspended),
            (Some("ops"), KeyError::AdminOnTenantRoute),
        ] {
            assert_eq!(directory.tenant_of(key, NOW).err(), Some(why), "{key:?}");
        }
        assert_eq!(directory.check_admin(Some("ops"), NOW), Ok(()));
        assert_eq!(directory.check_admin(Some("web"), NOW), Err(KeyError::TenantOnAdminRoute));
        assert_eq!(directory.check_admin(None, NOW), Err(KeyError::Missing));
        assert_eq!(directory.tenant_of(Some("old"), 0).unwrap().name, "a", "it had not expired then");
    }

    #[test]
    fn an_edit_keeps_who_a_tenant_is_and_ends_removed_keys() {
        let (directory, _) = Directory::of_file(&file(FILE), KeyHash::of("made"), USUAL, Secret::random());
        let before = directory.tenant_of(Some("web"), NOW).unwrap();
        directory.apply(&file("[[tenant]]\nid = \"c\"\nkeys = [{ <off> }]"), KeyHash::of("made"));
        assert_eq!(directory.tenant_of(Some("web"), NOW).err(), Some(KeyError::Unknown));
        assert_eq!(directory.check_admin(Some("ops"), NOW), Err(KeyError::Unknown));
        assert_eq!(directory.check_admin(Some("made"), NOW), Ok(()));
        let other = directory.tenant_of(Some("off"), NOW).unwrap();
        assert!(other.id != before.id && other.key != before.key);
        directory.apply(&file(FILE), KeyHash::of("made"));
        let after = directory.tenant_of(Some("web"), NOW).unwrap();
        assert!(after.id == before.id && after.key == before.key && Arc::ptr_eq(&after.quota, &before.quota));
        assert_eq!(directory.check_admin(Some("made"), NOW), Err(KeyError::Unknown), "the file names its own");
    }

    #[test]
    fn without_a_file_any_key_or_none_is_the_default_tenant_and_admins_need_theirs() {
        let directory = Directory::open_to_all(KeyHash::of("ops"), USUAL, Secret::random());
        for key in [None, Some("anything")] {
            assert_eq!(directory.tenant_of(key, NOW).unwrap().name, "default");
            assert!(directory.check_admin(key, NOW).is_err());
        }
        assert_eq!(directory.check_admin(Some("ops"), NOW), Ok(()));
    }
}
