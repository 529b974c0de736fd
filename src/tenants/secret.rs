//! Of what are the tenants' hash keys made?
//!
//! Of a secret that is made at the first start, in a file of the data folder that only the server's user can read, and of
//! the tenant's name: so a tenant has the same key after a restart, and what the disk tier holds is found again. Whoever
//! may read that folder can read the conversations too.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::types::TenantKey;

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
#[error("the secret in {} can't be read or made: {source}; without it the disk tier is lost: remove both", path.display())]
pub struct SecretError {
    path: PathBuf,
    source: std::io::Error,
}

/// What tenants' hash keys are derived from.
#[derive(Clone)]
pub struct Secret([u8; 32]);

impl Secret {
    /// The secret of this data folder, made if there is none.
    pub fn find_or_make(data_dir: &Path) -> Result<Self, SecretError> {
        let path = data_dir.join("kv.key");
        Self::find_or_make_at(&path).map_err(|source| SecretError { path, source })
    }

    /// One that nobody else has, for those who keep nothing.
    pub fn random() -> Self {
        Self(rand::random())
    }

    fn find_or_make_at(path: &Path) -> Result<Self, std::io::Error> {
        match std::fs::read(path) {
            Ok(bytes) => {
                let bytes = <[u8; 32]>::try_from(bytes.as_slice());
                bytes.map(Self).map_err(|_| std::io::Error::new(ErrorKind::InvalidData, "it has not 32 bytes"))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // Whole or not at all: a file that was cut off would lock the tier's blocks away for good.
                let (secret, new) = (Self::random(), path.with_extension("key.new"));
                let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
                file.write_all(&secret.0)?;
                file.sync_all()?;
                std::fs::rename(&new, path)?;
                // Its name must last as long as what is found by it.
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                std::fs::File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
                Ok(secret)
            }
            Err(error) => Err(error),
        }
    }

    /// A tenant's hash key.
    pub fn key_of(&self, tenant: &str) -> TenantKey {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(b"prefix hashes of tenant ");
        hasher.update(tenant.as_bytes());
        TenantKey(*hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_tenant_has_the_same_key_after_a_restart_and_no_other_tenants() {
        let folder = tempfile::tempdir().unwrap();
        let first = Secret::find_or_make(folder.path()).unwrap();
        let second = Secret::find_or_make(folder.path()).unwrap();
        assert_eq!(first.key_of("a"), second.key_of("a"));
        assert_ne!(first.key_of("a"), first.key_of("b"));
        assert_ne!(first.key_of("a"), Secret::random().key_of("a"));
        let path = folder.path().join("kv.key");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::write(&path, "short").unwrap();
        assert!(Secret::find_or_make(folder.path()).err().unwrap().to_string().contains("32 bytes"));
    }
}
