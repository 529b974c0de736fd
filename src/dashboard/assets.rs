//! Which files is the page made of, and how do they get to the browser?
//!
//! Embedded in the program, and packed once. Under a path that names their contents, so that a browser asks for each once
//! and never mixes two builds; the page itself is asked for each time.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::LazyLock;

use actix_web::http::header::{
    ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, VARY,
};
use actix_web::{HttpRequest, HttpResponse, HttpResponseBuilder, web};
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use rust_embed::RustEmbed;

use crate::api::error::ApiError;

#[derive(RustEmbed)]
#[folder = "src/dashboard/page"]
struct Files;

/// Nothing but what the page brings, and nobody around it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
                      base-uri 'none'; form-action 'self'; frame-ancestors 'none'";
const PLACE: &str = "/admin/assets/";

struct File {
    kind: &'static str,
    plain: Bytes,
    packed: Bytes,
}

struct Packed {
    files: BTreeMap<String, File>,
    index: File,
    build: String,
}

static PACKED: LazyLock<Packed> = LazyLock::new(pack);

fn pack() -> Packed {
    let mut hash = blake3::Hasher::new();
    let names: Vec<_> = Files::iter().collect();
    let contents = names.iter().filter_map(|name| Some((name.to_string(), Files::get(name)?.data)));
    let contents: BTreeMap<String, _> = contents.collect();
    for (name, bytes) in &contents {
        hash.update(name.as_bytes());
        hash.update(bytes);
    }
    let build = hash.finalize().to_hex()[..12].to_owned();
    let text = contents.get("index.html").map(|bytes| String::from_utf8_lossy(bytes).into_owned()).unwrap_or_default();
    let index = file("text/html; charset=utf-8", Bytes::from(text.replace(PLACE, &format!("{PLACE}{build}/"))));
    let files = contents.into_iter().map(|(name, bytes)| {
        let kind = kind(&name);
        (name, file(kind, Bytes::from(bytes.into_owned())))
    });
    Packed { files: files.collect(), index, build }
}

fn file(kind: &'static str, plain: Bytes) -> File {
    let mut packer = GzEncoder::new(Vec::new(), Compression::best());
    // Writing to memory does not fail; were it to, the plain form is there.
    let packed = packer.write_all(&plain).and_then(|()| packer.finish()).unwrap_or_default();
    File { kind, plain, packed: Bytes::from(packed) }
}

fn kind(name: &str) -> &'static str {
    match name.rsplit_once('.').map(|(_, ending)| ending) {
        Some("html") => "text/html; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "text/plain; charset=utf-8",
    }
}

fn send(request: &HttpRequest, file: &File, mut response: HttpResponseBuilder) -> HttpResponse {
    let accepted = request.headers().get(ACCEPT_ENCODING).and_then(|value| value.to_str().ok());
    let packed = accepted.is_some_and(|accepted| accepted.contains("gzip")) && !file.packed.is_empty();
    response
        .insert_header((CONTENT_TYPE, file.kind))
        .insert_header((VARY, "accept-encoding"))
        .insert_header(("x-content-type-options", "nosniff"))
        .insert_header(("referrer-policy", "no-referrer"))
        .insert_header((CONTENT_SECURITY_POLICY, POLICY));
    if packed {
        response.insert_header((CONTENT_ENCODING, "gzip"));
    }
    response.body(if packed { file.packed.clone() } else { file.plain.clone() })
}

/// GET `/admin`: the page.
pub async fn page(request: HttpRequest) -> HttpResponse {
    let mut response = HttpResponse::Ok();
    response.insert_header((CACHE_CONTROL, "no-cache"));
    send(&request, &PACKED.index, response)
}

/// GET `/admin/assets/{build}/{path}`.
pub async fn asset(request: HttpRequest, path: web::Path<(String, String)>) -> Result<HttpResponse, ApiError> {
    let (build, name) = path.into_inner();
    let found = PACKED.files.get(&name).filter(|_| build == PACKED.build);
    let file = found.ok_or_else(|| ApiError::unknown_url("GET", request.path()))?;
    let mut response = HttpResponse::Ok();
    response.insert_header((CACHE_CONTROL, "public, max-age=31536000, immutable"));
    Ok(send(&request, file, response))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_small_whole_and_asks_nobody_else() {
        let packed = &*PACKED;
        let bytes: usize = packed.files.values().map(|file| file.packed.len()).sum();
        assert!(bytes < 150_000, "{bytes} bytes packed");
        let index = String::from_utf8(packed.index.plain.to_vec()).unwrap();
        assert!(index.contains(&format!("{PLACE}{}/", packed.build)), "{index}");
        for name in index.split(&format!("{PLACE}{}/", packed.build)).skip(1) {
            let name = name.split(['"', '\'']).next().unwrap();
            assert!(packed.files.contains_key(name), "{name} is not there");
        }
        for (name, file) in &packed.files {
            let text = String::from_utf8_lossy(&file.plain);
            let is_ours = !name.starts_with("vendor/");
            assert!(!is_ours || !text.contains("https://"), "{name} names another host");
            assert_eq!(kind(name), file.kind);
        }
        assert!(packed.files.keys().any(|name| name.starts_with("vendor/") && name.ends_with(".txt")), "licences");
    }
}
