//! Which tenant is given which floor and ceiling in a replay?
//!
//! The engine, and so its record, knows tenants by numbers. A name's number is its place in the tenants file with which the
//! server started: the record has no names.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::config::Bytes;
use crate::config::tenants::TenantsFile;
use crate::engine::replay::Given;
use crate::engine::replay::trace::Trace;
use crate::types::TenantId;

/// What one `--tenant` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    whose: Whose,
    given: Given,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Whose {
    Number(TenantId),
    Name(String),
}

impl std::str::FromStr for Asked {
    type Err = String;

    /// `acme=1GiB:4GiB` or `3=1GiB:4GiB`, of which either size may be left out.
    fn from_str(text: &str) -> Result<Self, String> {
        let shape = || format!("`{text}` is no TENANT=FLOOR:CEILING; write acme=1GiB:4GiB, acme=1GiB: or 3=:4GiB");
        let (whose, sizes) = text.split_once('=').ok_or_else(shape)?;
        let (floor, ceiling) = sizes.split_once(':').ok_or_else(shape)?;
        if whose.is_empty() {
            return Err(shape());
        }
        let whose =
            whose.parse().map_or_else(|_| Whose::Name(whose.to_owned()), |number| Whose::Number(TenantId(number)));
        let bytes = |size: &str| (!size.is_empty()).then(|| size.parse().map(|Bytes(bytes)| bytes)).transpose();
        let given = Given { floor: bytes(floor)?, ceiling: bytes(ceiling)? };
        if given == Given::default() {
            return Err(shape());
        }
        if given.floor.zip(given.ceiling).is_some_and(|(floor, ceiling)| floor > ceiling) {
            return Err(format!("`{text}` has a floor above its ceiling"));
        }
        Ok(Self { whose, given })
    }
}

/// What is asked for, by the numbers of what is replayed. `tenants`: the tenants file.
pub fn by_number(asked: &[Asked], tenants: Option<&Path>, trace: &Trace) -> Result<BTreeMap<TenantId, Given>> {
    let names = match tenants {
        Some(path) => TenantsFile::ids(&TenantsFile::read(path)?).with_context(|| path.display().to_string())?,
        None => Vec::new(),
    };
    let mut given = BTreeMap::new();
    for Asked { whose, given: sizes } in asked {
        let tenant = match whose {
            Whose::Number(tenant) => *tenant,
            Whose::Name(name) => number(name, &names, tenants)?,
        };
        if !trace.knows(tenant) {
            let named = match whose {
                Whose::Number(_) => String::new(),
                Whose::Name(name) => format!(", which `{name}` would be"),
            };
            bail!("there is no tenant {tenant}{named} in what is replayed; its tenants are numbered from 0");
        }
        ensure!(given.insert(tenant, *sizes).is_none(), "tenant {tenant} is given something twice");
    }
    Ok(given)
}

fn number(name: &str, names: &[String], file: Option<&Path>) -> Result<TenantId> {
    let Some(file) = file else {
        bail!("only the tenants file says which number `{name}` has; name it with --tenants FILE, or give the number");
    };
    let Some((_, number)) = names.iter().zip(0..).find(|(known, _)| *known == name) else {
        bail!("there is no tenant `{name}` in {}; it has {}", file.display(), names.join(", "));
    };
    Ok(TenantId(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "t,tenant,conv,turn,in,out,ref,shared,stop\n0,0,1,1,64,6,-1,0,e\n9,1,2,1,64,6,-1,0,e\n";
    const TENANTS: &str = "[[tenant]]\nid = \"acme\"\n[[tenant]]\nid = \"north\"\nfloor = { device = \"900GiB\" }\n[[tenant]]\nid = \"new\"\n";

    fn given(asked: &[&str], tenants: Option<&Path>) -> Result<BTreeMap<TenantId, Given>> {
        let asked: Vec<Asked> = asked.iter().map(|text| text.parse().unwrap()).collect();
        by_number(&asked, tenants, &Trace::read(TRACE.as_bytes()).unwrap())
    }

    #[test]
    fn a_size_that_is_left_out_stays_and_nobody_knows_a_stranger() {
        let of = |text: &str| given(&[text], None).unwrap();
        assert_eq!(of("0=1KiB:4096")[&TenantId(0)], Given { floor: Some(1024), ceiling: Some(4096) });
        assert_eq!(of("1=:7")[&TenantId(1)], Given { floor: None, ceiling: Some(7) });
        assert!(given(&["5=1:"], None).unwrap_err().to_string().contains("no tenant 5 in"));
        assert!(given(&["0=1:", "0=2:"], None).unwrap_err().to_string().contains("twice"));
        for (wrong, says) in
            [("0", "FLOOR:CEILING"), ("=1:2", "FLOOR:CEILING"), ("0=:", "acme=1GiB:"), ("0=9:2", "above")]
        {
            assert!(wrong.parse::<Asked>().unwrap_err().contains(says), "{wrong}");
        }
    }

    #[test]
    fn a_name_is_its_place_in_the_tenants_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tenants.toml");
        std::fs::write(&file, TENANTS).unwrap();
        let both = given(&["north=5:", "acme=:9"], Some(&file)).unwrap();
        let expected = [(TenantId(0), (None, Some(9))), (TenantId(1), (Some(5), None))];
        assert_eq!(both, expected.map(|(tenant, (floor, ceiling))| (tenant, Given { floor, ceiling })).into());
        for (asked, tenants, says) in [
            ("north=5:", None, "--tenants FILE"),
            ("south=5:", Some(file.as_path()), "it has acme, north, new"),
            ("new=5:", Some(file.as_path()), "no tenant 2, which `new` would be"),
        ] {
            let error = given(&[asked], tenants).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        std::fs::write(&file, "[[tenant]]\nid = 1").unwrap();
        assert!(format!("{:#}", given(&["acme=5:"], Some(&file)).unwrap_err()).contains("tenant[0].id"));
    }
}
