use std::io::Write;

use super::*;

fn defaults() -> Layers {
    Layers::defaults().unwrap()
}

fn set(pair: &str) -> Result<Config, ConfigError> {
    defaults().pairs([pair])?.build()
}

fn in_file(text: &str) -> Result<Config, ConfigError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    defaults().file(file.path())?.build()
}

fn variable(name: &str, value: &str) -> Result<Config, ConfigError> {
    defaults().environment([(name.to_owned(), value.to_owned())])?.build()
}

#[test]
fn the_defaults_are_possible_and_say_what_they_should() {
    let config = Config::defaults().unwrap();
    assert_eq!(config.server.listen, "127.0.0.1:8080".parse().unwrap());
    assert_eq!(config.kv.device_bytes, Bytes(512 << 20));
    assert_eq!(config.model.name, None);
    assert_eq!(config.api.limits.body_bytes, Bytes(8 << 20));
    assert!(config.engine.thread_count() >= 1);
}

#[test]
fn every_key_of_the_struct_is_in_the_defaults_and_nothing_else_is() {
    // Neither holds unless the file has exactly the struct's keys: no field has a default of its own.
    let table = DEFAULTS.parse::<toml::Table>().unwrap();
    for key in layers::keys(&table) {
        let (section, name) = key.rsplit_once('.').unwrap();
        let mut without = table.clone();
        let inner = section.split('.').fold(&mut without, |t, s| t.get_mut(s).unwrap().as_table_mut().unwrap());
        inner.remove(name);
        assert!(toml::Value::Table(without).try_into::<Config>().is_err(), "`{key}` is not read from the defaults");
    }
}

#[test]
fn every_key_has_a_comment_above_it() {
    let lines: Vec<&str> = DEFAULTS.lines().collect();
    for (n, line) in lines.iter().enumerate() {
        assert!(line.chars().count() <= 120, "line {} is too long", n + 1);
        if line.contains(" = ") && !line.starts_with('#') {
            assert!(lines[n - 1].starts_with("# "), "`{line}` has no comment above it");
        }
    }
}

#[test]
fn a_later_source_wins_over_an_earlier_one() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    write!(file, "[kv]\ndevice_bytes = \"64MiB\"\nhost_bytes = 0\n[api.limits]\npost_items = 7").unwrap();
    let layers = defaults().file(file.path()).unwrap();
    let layers = layers.environment([("REKINDLE__KV__DEVICE_BYTES".into(), "128MiB".into())]).unwrap();
    let layers = layers.pairs(["kv.device_bytes=256MiB", "engine.reuse=false"]).unwrap();
    let config = layers.flag("--listen", "server.listen", Some("[::1]:0")).unwrap().build().unwrap();
    assert_eq!((config.kv.device_bytes, config.kv.host_bytes), (Bytes(256 << 20), Bytes(0)));
    assert_eq!((config.api.limits.post_items, config.api.limits.json_depth), (7, 64));
    assert!(!config.engine.reuse);
    assert_eq!(config.server.listen, "[::1]:0".parse().unwrap());
}

#[test]
fn values_of_the_environment_are_read_in_the_settings_own_type() {
    assert_eq!(variable("REKINDLE__MODEL__NAME", "123").unwrap().model.name.as_deref(), Some("123"));
    assert_eq!(variable("REKINDLE__KV__HOST_BYTES", "4096").unwrap().kv.host_bytes, Bytes(4096));
    assert_eq!(variable("REKINDLE__API__LIMITS__POST_ITEMS", "5").unwrap().api.limits.post_items, 5);
    assert_eq!(variable("REKINDLE__API__UNKNOWN_FIELDS", "refuse").unwrap().api.unknown_fields, UnknownFields::Refuse);
    assert_eq!(variable("REKINDLE_TEST_MODEL", "x").unwrap(), Config::defaults().unwrap());
}

/// The sentence names all of these.
fn says(result: Result<Config, ConfigError>, parts: &[&str]) {
    let sentence = result.unwrap_err().to_string();
    for part in parts {
        assert!(sentence.contains(part), "`{part}` is not in: {sentence}");
    }
}

#[test]
fn an_unknown_key_is_refused_with_its_full_name_its_source_and_what_was_meant() {
    says(set("kv.blok_size=16"), &["`kv.blok_size`", "--set", "did you mean `kv.block_size`"]);
    says(in_file("[api.limits]\nbody_byte = 3"), &["`api.limits.body_byte`", "in /", "`api.limits.body_bytes`"]);
    says(variable("REKINDLE__KV_DEVICE_BYTES", "1"), &["REKINDLE__KV_DEVICE_BYTES", "`kv.device_bytes`"]);
    says(set("listen=127.0.0.1:1"), &["`listen`", "did you mean `server.listen`"]);
    says(in_file("[colour]\nred = 1"), &["`colour`", "config/default.toml"]);
    says(set("kv=3"), &["`kv`", "section"]);
    says(in_file("kv = 3"), &["`kv`", "section"]);
    says(in_file("[engine.threads]\nx = 1"), &["`engine.threads`", "not a section"]);
    says(set("kv.device_bytes"), &["`kv.device_bytes`", "key=value"]);
}

#[test]
fn an_impossible_value_is_refused_with_its_key_its_source_and_the_reason() {
    says(set("kv.device_bytes=12MB"), &["`kv.device_bytes`", "--set", "`12MB`", "512MiB"]);
    says(set("kv.device_bytes=4096"), &["`kv.device_bytes`", "4KiB", "1MiB"]);
    says(in_file("[kv]\ndevice_bytes = -1"), &["`kv.device_bytes`", "less than nothing"]);
    says(set("kv.disk_bytes=512TiB"), &["`kv.disk_bytes`", "256TiB"]);
    says(set("kv.block_size=32"), &["`kv.block_size`", "16 tokens"]);
    says(set("kv.eviction_policy=fifo"), &["`kv.eviction_policy`", "fifo", "lru"]);
    says(variable("REKINDLE__ENGINE__THREADS", "many"), &["`engine.threads`", "REKINDLE__ENGINE__THREADS"]);
    says(set("engine.max_running=0"), &["`engine.max_running`", "1 to 4096"]);
    says(set("engine.reuse=perhaps"), &["`engine.reuse`", "boolean"]);
    says(set("server.listen=here"), &["`server.listen`"]);
    says(set("server.data_dir="), &["`server.data_dir`", "empty"]);
    says(set("log.level=loud"), &["`log.level`", "loud"]);
    for address in ["collector:4318", "http://", "ftp://collector", "http:///v1/traces", "http://collector?x=1"] {
        says(
            set(&format!("telemetry.otlp_endpoint={address}")),
            &["`telemetry.otlp_endpoint`", "http://127.0.0.1:4318"],
        );
    }
    says(set("telemetry.trace_ratio=1.5"), &["`telemetry.trace_ratio`", "0 to 1"]);
    says(set("telemetry.trace_ratio=nan"), &["`telemetry.trace_ratio`"]);
}

#[test]
fn an_address_that_others_can_reach_is_refused_while_there_are_no_keys() {
    for address in ["0.0.0.0:8080", "192.168.1.5:80", "[::]:8080"] {
        says(set(&format!("server.listen={address}")), &["`server.listen`", "anyone"]);
    }
    assert!(set("server.listen=127.0.0.9:1").is_ok());
}

#[test]
fn a_file_that_is_missing_or_no_toml_is_named() {
    let missing = defaults().file(std::path::Path::new("/nowhere/x.toml")).map(|_| ());
    assert!(missing.unwrap_err().to_string().contains("/nowhere/x.toml"));
    says(in_file("[kv\n"), &["not TOML", "line 1"]);
}

#[test]
fn an_unknown_dtype_and_one_that_is_not_stored_as_int8_below_are_refused_by_their_key() {
    assert_eq!(set("kv.dtype=int8").unwrap().kv.dtype, KvDtype::Int8);
    let error = set("kv.dtype=int4").unwrap_err().to_string();
    assert!(error.contains("`kv.dtype`") && error.contains("`int4`") && error.contains("`fp8`"), "{error}");
    assert_eq!(set("kv.cold_dtype=int8").unwrap().kv.cold_dtype, ColdDtype::Int8);
    let error = set("kv.cold_dtype=fp8").unwrap_err().to_string();
    assert!(error.contains("`kv.cold_dtype`") && error.contains("int8"), "{error}");
    let both = defaults().pairs(["kv.dtype=bf16", "kv.cold_dtype=int8"]).unwrap().build();
    let error = both.unwrap_err().to_string();
    assert!(error.contains("`kv.cold_dtype`") && error.contains("bf16"), "{error}");
}
