//! How does one get an API key?
//!
//! Prints a new key, once, and the lines for the tenants file, which has only its hash. Nothing is written anywhere.

use std::io::{self, Write};

use clap::Args;

use crate::tenants::key::{KeyHash, KeyKind, generate};

/// Makes a key, prints it this once, and prints what to paste into the tenants file.
#[derive(Args)]
#[command(after_help = "\
Examples:
  rekindle key --name web                 a tenant's key; paste the lines under its [[tenant]]
  rekindle key --name batch --expires 2027-01-31
  rekindle key --admin --name ops         for /metrics and /admin/api; paste the lines at the file's beginning
  rekindle key | head -1 > key.txt        the key alone is the first line

Use it:  curl -H \"Authorization: Bearer $KEY\" http://127.0.0.1:8080/v1/models")]
pub struct KeyArgs {
    /// A name for people, such as who will use it
    #[arg(long, default_value = "")]
    name: String,
    /// A date such as 2027-01-31, or a time such as 2027-01-31T12:00:00Z, from which on it is refused
    #[arg(long, value_name = "DATE")]
    expires: Option<toml::value::Datetime>,
    /// An admin's key rather than a tenant's
    #[arg(long)]
    admin: bool,
}

pub fn run(arguments: &KeyArgs) -> io::Result<()> {
    let kind = if arguments.admin { KeyKind::Admin } else { KeyKind::Tenant };
    let key = generate(kind);
    io::stdout().lock().write_all(text(arguments, kind, &key).as_bytes())
}

fn text(arguments: &KeyArgs, kind: KeyKind, key: &str) -> String {
    let section = match kind {
        KeyKind::Tenant => "tenant.keys",
        KeyKind::Admin => "admin_key",
    };
    let name = if arguments.name.is_empty() { String::new() } else { format!("name = {}\n", quoted(&arguments.name)) };
    let expires = arguments.expires.map(|date| format!("expires_at = {date}\n")).unwrap_or_default();
    let hash = KeyHash::of(key).hex();
    format!(
        "{key}\n\nThe key is shown this once. For the tenants file:\n\n[[{section}]]\n{name}sha256 = \"{hash}\"\n{expires}"
    )
}

fn quoted(name: &str) -> toml::Value {
    toml::Value::String(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::config::tenants::TenantsFile;

    #[test]
    fn what_is_printed_can_be_pasted() {
        let kv = Config::defaults().unwrap().kv;
        for (kind, head) in [(KeyKind::Tenant, "[[tenant]]\nid = \"a\"\n"), (KeyKind::Admin, "")] {
            let expires = Some("2027-01-31".parse().unwrap());
            let arguments = KeyArgs { name: "the \"web\"".into(), expires, admin: kind == KeyKind::Admin };
            let printed = text(&arguments, kind, "rk_1");
            assert_eq!(printed.lines().next(), Some("rk_1"));
            let pasted = &printed[printed.find("[[").unwrap()..];
            let file = TenantsFile::parse(&format!("{head}{pasted}"), &kv).unwrap();
            let entry = file.admin_keys.first().unwrap_or_else(|| &file.tenants[0].keys[0]);
            assert_eq!((entry.name.as_str(), entry.sha256), ("the \"web\"", KeyHash::of("rk_1").0));
            assert!(entry.expires_at.is_some());
        }
    }
}
