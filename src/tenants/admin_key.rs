//! Which key is the admins' if the configuration names none?
//!
//! One that is made at the first start, in a file of the data folder that only the server's user can read. It is kept
//! there as it is, so that whoever may read that folder can use it.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::key::{KeyHash, KeyKind, generate};

/// Why there is no admin key.
#[derive(Debug, thiserror::Error)]
#[error("the admin key in {} can't be read or made: {source}; remove it to get a new one", path.display())]
pub struct AdminKeyError {
    path: PathBuf,
    source: std::io::Error,
}

/// The hash of the key in this data folder, made if there is none.
pub fn find_or_make(data_dir: &Path) -> Result<KeyHash, AdminKeyError> {
    let path = data_dir.join("admin.key");
    find_or_make_at(&path).map_err(|source| AdminKeyError { path, source })
}

fn find_or_make_at(path: &Path) -> Result<KeyHash, std::io::Error> {
    let key = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(mut file) => {
            let key = generate(KeyKind::Admin);
            writeln!(file, "{key}")?;
            file.sync_all()?;
            tracing::info!(path = %path.display(), "made an admin key");
            key
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => std::fs::read_to_string(path)?,
        Err(error) => return Err(error),
    };
    match key.trim() {
        // An empty key would open the door to a request with an empty one.
        "" => Err(std::io::Error::new(ErrorKind::InvalidData, "it is empty")),
        key => Ok(KeyHash::of(key)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_key_is_made_once_for_the_servers_user_alone() {
        let folder = tempfile::tempdir().unwrap();
        let made = find_or_make(folder.path()).unwrap();
        let path = folder.path().join("admin.key");
        let key = std::fs::read_to_string(&path).unwrap();
        assert!(KeyHash::of(key.trim()).is(&made));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(find_or_make(folder.path()).unwrap().is(&made), "a second start makes no other");
        std::fs::write(&path, "\n").unwrap();
        assert!(find_or_make(folder.path()).unwrap_err().to_string().contains("it is empty"));
    }
}
