//! What is a key, and how is it kept?
//!
//! 256 random bits, kept as their SHA-256. That is right for random keys: a hash that is fast to compute is weak only where
//! guesses are few, as with what people choose, and nobody guesses 256 bits. So nothing is salted, one look-up finds a key
//! among thousands, and a request costs a microsecond rather than the tenth of a second of a password hash.

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};

/// What a key opens. The prefix of a key is for people and for scanners of secrets; what counts is where its hash is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeyKind {
    Tenant,
    Admin,
}

/// A new key, as its holder gets it.
pub fn generate(kind: KeyKind) -> String {
    let prefix = match kind {
        KeyKind::Tenant => "rk_",
        KeyKind::Admin => "rk_admin_",
    };
    let secret: [u8; 32] = rand::random();
    format!("{prefix}{}", hex(&secret))
}

/// A key's SHA-256.
#[derive(Clone, Copy, Debug)]
pub struct KeyHash(pub [u8; 32]);

impl KeyHash {
    pub fn of(key: &str) -> Self {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, key.as_bytes()).as_ref());
        Self(hash)
    }

    /// Whether it is the same, in a time that does not tell how much of it is.
    pub fn is(&self, other: &KeyHash) -> bool {
        verify_slices_are_equal(&self.0, &other.0).is_ok()
    }

    pub fn hex(&self) -> String {
        hex(&self.0)
    }

    /// Where a table keeps it. Whoever learns from the time of a look-up that these bits match learns nothing of the key.
    pub(super) fn place(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_256_random_bits_and_its_hash_is_sha_256() {
        let (a, b) = (generate(KeyKind::Tenant), generate(KeyKind::Tenant));
        assert_eq!((a.len(), &a[..3]), (3 + 64, "rk_"));
        assert_ne!(a, b);
        assert!(KeyHash::of(&a).is(&KeyHash::of(&a)) && !KeyHash::of(&a).is(&KeyHash::of(&b)));
        // The example of FIPS 180-2.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(KeyHash::of("abc").hex(), abc);
    }
}
