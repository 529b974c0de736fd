//! How is a size in bytes written?
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::fmt;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Error, Visitor};

/// A number of bytes; written as `"512MiB"`, `"1.5GiB"`, or a plain number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Bytes(pub u64);

const UNITS: [(&str, u64); 5] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

impl Bytes {
    /// As a length in memory.
    pub fn get(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || format!("`{text}` is no size; write \"512MiB\", \"1.5GiB\" or a number of bytes");
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit = unit.trim();
        let scale = if unit.is_empty() {
            1
        } else {
            UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or_else(refused)?.1
        };
        let number = number.replace('_', "");
        let (whole, fraction) = number.split_once('.').unwrap_or((&number, ""));
        let whole: u64 = whole.parse().map_err(|_| refused())?;
        let bytes = whole.checked_mul(scale).ok_or_else(|| format!("`{text}` is more than 2^64 bytes"))?;
        if fraction.is_empty() {
            return if number.ends_with('.') { Err(refused()) } else { Ok(Self(bytes)) };
        }
        if scale == 1 || !fraction.bytes().all(|b| b.is_ascii_digit()) || fraction.len() > 9 {
            return Err(refused()); // a part of a byte, a second point, or more digits than mean anything
        }
        let tenths: u64 = fraction.parse().map_err(|_| refused())?;
        let part = u128::from(tenths) * u128::from(scale) / 10u128.pow(fraction.len() as u32);
        let bytes = u128::from(bytes) + part;
        u64::try_from(bytes).map(Self).map_err(|_| format!("`{text}` is more than 2^64 bytes"))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, scale) in UNITS {
            if self.0 >= scale && self.0.is_multiple_of(scale) {
                return write!(f, "{}{unit}", self.0 / scale);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Size;
        impl Visitor<'_> for Size {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"512MiB\", \"1.5GiB\" or a number of bytes")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Bytes, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_i64<E: Error>(self, bytes: i64) -> Result<Bytes, E> {
                u64::try_from(bytes).map(Bytes).map_err(|_| E::custom(format!("{bytes} is less than nothing")))
            }
        }
        deserializer.deserialize_any(Size)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_read_in_binary_units_with_or_without_a_fraction() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1_000", 1000),
            ("256MiB", 256 << 20),
            ("256 mib", 256 << 20),
            ("1.5GiB", 3 << 29),
            ("0.125KiB", 128),
            ("12B", 12),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_an_example() {
        for text in ["", "MiB", "12MB", "1.5", "1.GiB", ".5GiB", "1.2.3GiB", "-1", "1e9", "ten", "99999999TiB", "1 2"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
        assert!("12MB".parse::<Bytes>().unwrap_err().contains("512MiB"));
    }

    proptest! {
        #[test]
        fn a_size_that_is_written_is_read_as_the_same(bytes: u64) {
            prop_assert_eq!(Bytes(bytes).to_string().parse(), Ok(Bytes(bytes)));
        }

        #[test]
        fn no_text_panics(text in ".{0,24}") {
            drop(text.parse::<Bytes>());
        }
    }
}
