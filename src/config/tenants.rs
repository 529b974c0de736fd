//! What does a tenants file say?
//!
//! `[[tenant]]` with the names that the admin API has, keys by their hash, and `[[admin_key]]`. An unknown name or an
//! impossible value is an error that names it: a file is taken whole or not at all.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, Error as _};
use toml::value::Datetime;

use super::{Bytes, Kv};
use crate::types::{PoolPart, TierBudget, Weight};

const ID_MAX: usize = 63;
const WEIGHTS: std::ops::RangeInclusive<f64> = 0.001..=1000.0;

/// Why a tenants file is not taken.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum TenantsError {
    #[error("the tenants file {} can't be read: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("the tenants file is not TOML: {0}")]
    Syntax(String),
    #[error("`{key}` can't be that: {reason}")]
    Impossible { key: String, reason: String },
}

fn impossible(key: impl Into<String>, reason: impl Into<String>) -> TenantsError {
    TenantsError::Impossible { key: key.into(), reason: reason.into().trim_end().to_owned() }
}

/// A tenants file, checked.
#[derive(Clone, PartialEq, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantsFile {
    #[serde(default, rename = "admin_key")]
    pub admin_keys: Vec<KeyEntry>,
    #[serde(default, rename = "tenant")]
    pub tenants: Vec<TenantEntry>,
}

#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantEntry {
    pub id: String,
    /// For people; the id if there is none.
    pub name: Option<String>,
    #[serde(default = "ordinary", deserialize_with = "weight")]
    pub weight: Weight,
    #[serde(default)]
    pub status: Status,
    /// The models that it may use; `None`: all.
    pub models: Option<Vec<String>>,
    #[serde(default)]
    pub floor: ByTier,
    #[serde(default)]
    pub ceiling: ByTier,
    #[serde(default)]
    pub pin_budget: ByTier,
    #[serde(default)]
    pub keys: Vec<KeyEntry>,
    #[serde(default)]
    pub limits: TenantLimits,
}

impl TenantEntry {
    pub fn device(&self) -> TierBudget {
        TierBudget { floor: self.floor.device, ceiling: self.ceiling.device, pins: self.pin_budget.device }
    }

    pub fn host(&self) -> TierBudget {
        TierBudget { floor: self.floor.host, ceiling: self.ceiling.host, pins: self.pin_budget.host }
    }

    pub fn disk(&self) -> TierBudget {
        TierBudget { floor: self.floor.disk, ceiling: self.ceiling.disk, pins: self.pin_budget.disk }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    #[default]
    Active,
    Suspended,
}

/// A part of each tier's pool.
#[derive(Clone, Copy, PartialEq, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ByTier {
    #[serde(default, deserialize_with = "part")]
    pub device: Option<PoolPart>,
    #[serde(default, deserialize_with = "part")]
    pub host: Option<PoolPart>,
    #[serde(default, deserialize_with = "part")]
    pub disk: Option<PoolPart>,
}

/// What a tenant may ask for; `None` is no limit of its own. 0 allows nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantLimits {
    pub requests_per_minute: Option<u32>,
    pub concurrent_turns: Option<u32>,
    pub sockets: Option<u32>,
}

/// A key, by its hash.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyEntry {
    /// For people.
    #[serde(default)]
    pub name: String,
    #[serde(deserialize_with = "sha256")]
    pub sha256: [u8; 32],
    /// Seconds since 1970; from then on the key is refused.
    #[serde(default, deserialize_with = "moment")]
    pub expires_at: Option<i64>,
}

impl TenantsFile {
    /// The file's text.
    pub fn read(path: &Path) -> Result<String, TenantsError> {
        let reason = |error: std::io::Error| TenantsError::Unreadable { path: path.into(), reason: error.to_string() };
        std::fs::read_to_string(path).map_err(reason)
    }

    /// The tenants of a text, which must fit pools of these sizes.
    pub fn parse(text: &str, kv: &Kv) -> Result<Self, TenantsError> {
        let file = Self::of_any_pool(text)?;
        file.check_pool("device", kv.device_bytes, TenantEntry::device)?;
        file.check_pool("host", kv.host_bytes, TenantEntry::host)?;
        file.check_pool("disk", kv.disk_bytes, TenantEntry::disk)?;
        Ok(file)
    }

    /// The tenants' ids in the order of a text, whatever the pools' sizes are.
    pub fn ids(text: &str) -> Result<Vec<String>, TenantsError> {
        Ok(Self::of_any_pool(text)?.tenants.into_iter().map(|tenant| tenant.id).collect())
    }

    fn of_any_pool(text: &str) -> Result<Self, TenantsError> {
        let table: toml::Table =
            text.parse().map_err(|error: toml::de::Error| TenantsError::Syntax(error.to_string()))?;
        let file: Self = serde_path_to_error::deserialize(toml::Value::Table(table))
            .map_err(|error| impossible(error.path().to_string(), error.inner().message()))?;
        file.check_names()?;
        Ok(file)
    }

    fn check_names(&self) -> Result<(), TenantsError> {
        let (mut ids, mut hashes) = (HashSet::new(), HashSet::new());
        for (index, tenant) in self.tenants.iter().enumerate() {
            let key = format!("tenant[{index}].id");
            if !is_id(&tenant.id) {
                let reason = "it needs 1 to 63 of a-z, 0-9, _ and -, and begins with a letter or digit";
                return Err(impossible(key, reason));
            }
            if !ids.insert(&tenant.id) {
                return Err(impossible(key, format!("there are two tenants `{}`", tenant.id)));
            }
        }
        let of_tenants =
            self.tenants.iter().flat_map(|tenant| tenant.keys.iter().map(move |key| (key, tenant.id.as_str())));
        for (key, whose) in of_tenants.chain(self.admin_keys.iter().map(|key| (key, "the admins"))) {
            if !hashes.insert(key.sha256) {
                let reason = format!("a key of {whose} is there twice; each belongs to one, so that its requests do");
                return Err(impossible("sha256", reason));
            }
        }
        Ok(())
    }

    /// Floors and pin budgets that are fixed fit under their ceilings, and the floors together into the pool.
    fn check_pool(&self, tier: &str, pool: Bytes, of: fn(&TenantEntry) -> TierBudget) -> Result<(), TenantsError> {
        let mut floors = 0_u64;
        for (index, tenant) in self.tenants.iter().enumerate() {
            let TierBudget { floor, ceiling, pins } = of(tenant);
            let bytes = |part: Option<PoolPart>| part.map(|part| part.bytes(pool.0));
            let (floor, ceiling, pins) = (bytes(floor), bytes(ceiling), bytes(pins));
            floors = floors.saturating_add(floor.unwrap_or(0));
            if let (Some(floor), Some(ceiling)) = (floor, ceiling)
                && floor > ceiling
            {
                let reason = format!("the floor of {} is above the ceiling of {}", Bytes(floor), Bytes(ceiling));
                return Err(impossible(format!("tenant[{index}].floor.{tier}"), reason));
            }
            if let (Some(pins), Some(ceiling)) = (pins, ceiling)
                && pins > ceiling
            {
                let reason = format!("the pin budget of {} is above the ceiling of {}", Bytes(pins), Bytes(ceiling));
                return Err(impossible(format!("tenant[{index}].pin_budget.{tier}"), reason));
            }
            if floors > pool.0 {
                let reason = format!("with it the floors are more than the pool's {pool}");
                return Err(impossible(format!("tenant[{index}].floor.{tier}"), reason));
            }
        }
        Ok(())
    }
}

fn is_id(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    (1..=ID_MAX).contains(&text.len())
        && text.bytes().next().is_some_and(plain)
        && text.bytes().all(|byte| plain(byte) || matches!(byte, b'_' | b'-'))
}

fn ordinary() -> Weight {
    Weight::ORDINARY
}

fn weight<'de, D: Deserializer<'de>>(value: D) -> Result<Weight, D::Error> {
    let weight = f64::deserialize(value)?;
    if !WEIGHTS.contains(&weight) {
        return Err(D::Error::custom(format!("{weight} is not within {} to {}", WEIGHTS.start(), WEIGHTS.end())));
    }
    Ok(Weight((weight * 1000.0).round() as u32))
}

/// A size, or a percentage of the pool.
fn part<'de, D: Deserializer<'de>>(value: D) -> Result<Option<PoolPart>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Text(String),
        Bytes(u64),
    }
    let text = match Written::deserialize(value).map_err(|_| D::Error::custom(NO_PART))? {
        Written::Bytes(bytes) => return Ok(Some(PoolPart::Bytes(bytes))),
        Written::Text(text) => text,
    };
    let part = match text.strip_suffix('%') {
        Some(number) => percent(number.trim()),
        None => text.parse::<Bytes>().ok().map(|bytes| PoolPart::Bytes(bytes.0)),
    };
    part.map(Some).ok_or_else(|| D::Error::custom(NO_PART))
}

const NO_PART: &str = "write a size such as \"256MiB\", a number of bytes, or a part of the pool such as \"30%\"";

fn percent(number: &str) -> Option<PoolPart> {
    let percent: f64 = number.parse().ok()?;
    (0.0..=100.0).contains(&percent).then(|| PoolPart::Permille((percent * 10.0).round() as u32))
}

fn sha256<'de, D: Deserializer<'de>>(value: D) -> Result<[u8; 32], D::Error> {
    let text = String::deserialize(value)?;
    let mut bytes = [0; 32];
    let is_hex = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_hex {
        return Err(D::Error::custom("it needs the 64 hex digits that `rekindle key` prints, not the key itself"));
    }
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digits = std::str::from_utf8(digits).map_err(D::Error::custom)?;
        *byte = u8::from_str_radix(digits, 16).map_err(D::Error::custom)?;
    }
    Ok(bytes)
}

fn moment<'de, D: Deserializer<'de>>(value: D) -> Result<Option<i64>, D::Error> {
    let written = Datetime::deserialize(value)?;
    let refused = || D::Error::custom("write a date such as 2027-01-31, or a time such as 2027-01-31T12:00:00Z");
    unix_seconds(&written).map(Some).ok_or_else(refused)
}

/// Seconds since 1970; a date without time is its first moment, and a time without zone is UTC.
fn unix_seconds(written: &Datetime) -> Option<i64> {
    use toml::value::Offset;
    let date = written.date?;
    let (hour, minute, second) =
        written.time.map_or((0, 0, 0), |time| (time.hour, time.minute, time.second.unwrap_or(0)));
    let offset_minutes = match written.offset {
        None | Some(Offset::Z) => 0,
        Some(Offset::Custom { minutes }) => i64::from(minutes),
    };
    // Years begin in March, so that the leap day is a year's last.
    let (year, month) = (i64::from(date.year), i64::from(date.month));
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + i64::from(date.day) - 1;
    const DAYS_TO_1970: i64 = 719_468;
    let minutes = i64::from(hour) * 60 + i64::from(minute) - offset_minutes;
    Some((days - DAYS_TO_1970) * 86_400 + minutes * 60 + i64::from(second))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn parse(text: &str) -> Result<TenantsFile, TenantsError> {
        TenantsFile::parse(text, &Config::defaults().unwrap().kv)
    }

    /// Where a text is refused, and why.
    fn refused(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn the_example_is_a_tenants_file() {
        let file = parse(include_str!("../../config/tenants.example.toml")).unwrap();
        let acme = file.tenants.iter().find(|tenant| tenant.id == "acme").unwrap();
        assert_eq!((acme.weight, acme.keys.len()), (Weight(2000), 2));
        assert_eq!(acme.device().ceiling, Some(PoolPart::Permille(500)));
        assert!(!file.admin_keys.is_empty());
    }

    #[test]
    fn an_id_alone_makes_a_tenant_with_the_defaults() {
        let file = parse("[[tenant]]\nid = \"a\"").unwrap();
        let tenant = &file.tenants[0];
        assert_eq!(
            (tenant.weight, tenant.status, tenant.limits),
            (Weight(1000), Status::Active, TenantLimits::default())
        );
        assert_eq!((tenant.device(), tenant.host()), (TierBudget::default(), TierBudget::default()));
    }

    #[test]
    fn what_can_not_be_is_refused_by_its_name() {
        let hash = "0".repeat(64);
        for (text, said) in [
            ("[[tenant]]\nname = \"a\"".to_owned(), "missing field `id`"),
            ("[[tenant]]\nid = \"A\"".into(), "`tenant[0].id` can't be that"),
            ("[[tenant]]\nid = \"a\"\n[[tenant]]\nid = \"a\"".into(), "two tenants `a`"),
            ("[[tenant]]\nid = \"a\"\ncolour = 1".into(), "colour"),
            ("[[tenant]]\nid = \"a\"\nweight = 0".into(), "`tenant[0].weight`"),
            ("[[tenant]]\nid = \"a\"\nweight = -1.0".into(), "0.001 to 1000"),
            ("[[tenant]]\nid = \"a\"\nstatus = \"gone\"".into(), "`tenant[0].status`"),
            ("[[tenant]]\nid = \"a\"\nfloor.device = \"lots\"".into(), "\"30%\""),
            ("[[tenant]]\nid = \"a\"\nfloor.device = \"101%\"".into(), "`tenant[0].floor.device`"),
            ("[[tenant]]\nid = \"a\"\nfloor.device = -1".into(), "`tenant[0].floor.device`"),
            (
                "[[tenant]]\nid = \"a\"\nfloor.disk = 1".into(),
                "`tenant[0].floor.disk` can't be that: with it the floors are more",
            ),
            ("[[tenant]]\nid = \"a\"\nfloor.device = \"50%\"\nceiling.device = \"40%\"".into(), "above the ceiling"),
            (
                "[[tenant]]\nid = \"a\"\nfloor.host = \"60%\"\n[[tenant]]\nid = \"b\"\nfloor.host = \"50%\"".into(),
                "`tenant[1].floor.host` can't be that: with it the floors are more than the pool's 2GiB",
            ),
            (
                "[[tenant]]\nid = \"a\"\nlimits.requests_per_minute = -1".into(),
                "`tenant[0].limits.requests_per_minute`",
            ),
            ("[[tenant]]\nid = \"a\"\nlimits.tokens_per_minute = 1".into(), "tokens_per_minute"),
            ("[[tenant]]\nid = \"a\"\nkeys = [{ sha256 = \"rk_1\" }]".into(), "not the key itself"),
            ("[[tenant]]\nid = \"a\"\nkeys = [{ key = \"rk_1\" }]".into(), "unknown field `key`"),
            (
                format!(
                    "[[tenant]]\nid = \"a\"\nkeys = [{{ sha256 = \"{hash}\" }}]\n[[admin_key]]\nsha256 = \"{hash}\""
                ),
                "twice",
            ),
            (format!("[[admin_key]]\nsha256 = \"{hash}\"\nexpires_at = \"soon\""), "expires_at"),
            ("[[tenant".into(), "not TOML"),
        ] {
            let found = refused(&text);
            assert!(found.contains(said), "{text}: {found}");
        }
    }

    #[test]
    fn dates_are_seconds_since_1970() {
        for (text, seconds) in [
            ("1970-01-01", 0),
            ("1970-01-01T00:00:01Z", 1),
            ("2000-02-29T12:00:00Z", 951_825_600),
            ("2000-03-01", 951_868_800),
            ("2027-01-01T01:00:00+01:00", 1_798_761_600),
            ("2100-12-31T23:59:59Z", 4_133_980_799),
        ] {
            assert_eq!(unix_seconds(&text.parse().unwrap()), Some(seconds), "{text}");
        }
    }
}
