//! What happens when somebody edits the tenants file?
//!
//! Its text is compared twice a second: that works with every file system, editor and mounted secret, which notices of
//! changes do not. A good edit is in force at once; a bad one is logged and counted, once, and the old one stays.

use std::path::PathBuf;
use std::time::Duration;

use crate::config::Kv;
use crate::config::tenants::{TenantsError, TenantsFile};
use crate::telemetry::metrics::TENANTS_FILE_EDITS;

const EVERY: Duration = Duration::from_millis(500);

/// A tenants file, and the text that was seen in it last.
pub struct Watch {
    path: PathBuf,
    kv: Kv,
    /// A file that can't be read has its error here, so that it is told once.
    seen: Result<String, TenantsError>,
}

impl Watch {
    /// Reads a file for the first time, when there is no old one to keep.
    pub fn begin(path: PathBuf, kv: Kv) -> Result<(Self, TenantsFile), TenantsError> {
        let text = TenantsFile::read(&path)?;
        let file = TenantsFile::parse(&text, &kv)?;
        Ok((Self { path, kv, seen: Ok(text) }, file))
    }

    /// Follows the file for ever, and hands every good edit on.
    pub async fn follow(mut self, apply: impl Fn(TenantsFile)) {
        let mut every = tokio::time::interval(EVERY);
        loop {
            every.tick().await;
            match self.look() {
                None => {}
                Some(Ok(file)) => {
                    let tenants = file.tenants.len();
                    apply(file);
                    TENANTS_FILE_EDITS.add(1, &[("outcome", "applied")]);
                    tracing::info!(path = %self.path.display(), tenants, "the tenants file was edited");
                }
                Some(Err(error)) => {
                    TENANTS_FILE_EDITS.add(1, &[("outcome", "refused")]);
                    tracing::warn!(path = %self.path.display(), %error, "an edit of the tenants file was refused; the old one stays in force");
                }
            }
        }
    }

    /// What is new in the file, if anything is.
    fn look(&mut self) -> Option<Result<TenantsFile, TenantsError>> {
        let text = TenantsFile::read(&self.path);
        if text == self.seen {
            return None;
        }
        let file = text.clone().and_then(|text| TenantsFile::parse(&text, &self.kv));
        self.seen = text;
        Some(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn an_edit_is_seen_once_and_a_bad_one_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tenants.toml");
        let kv = Config::defaults().unwrap().kv;
        assert!(Watch::begin(path.clone(), kv.clone()).is_err(), "there is no file");
        std::fs::write(&path, "[[tenant]]\nid = \"a\"").unwrap();
        let (mut watch, file) = Watch::begin(path.clone(), kv).unwrap();
        assert_eq!(file.tenants.len(), 1);
        assert_eq!(watch.look(), None);
        for (text, good) in [("[[tenant]]\nid = \"b\"", true), ("[[tenant]]\nid = 1", false), ("", true)] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(watch.look().map(|file| file.is_ok()), Some(good), "{text}");
            assert_eq!(watch.look(), None);
        }
        std::fs::remove_file(&path).unwrap();
        assert!(watch.look().unwrap().is_err());
        assert_eq!(watch.look(), None);
    }
}
