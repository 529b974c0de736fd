//! Which of the machine's instructions may the kernels use?
//!
//! Found once, when a model is loaded; every kernel is then called through what was found. One build for all machines.

use std::fmt;
use std::str::FromStr;

/// Defines a function that is compiled for each set of instructions, and takes the set as its first argument. The compiler
/// vectorises each; the operations and their order are the same in all, and so are the bits of the result.
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        $vis fn $name(isa: $crate::kernels::isa::Isa, $($arg: $type),*) {
            #[inline(always)]
            fn plain($($arg: $type),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
            fn avx512($($arg: $type),*) {
                plain($($arg),*);
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $type),*) {
                plain($($arg),*);
            }
            #[cfg(target_arch = "x86_64")]
            match isa {
                $crate::kernels::isa::Isa::Avx512 => {
                    // SAFETY: whoever chose the instructions checked for them.
                    unsafe { avx512($($arg),*) };
                    return;
                }
                $crate::kernels::isa::Isa::AvxVnni | $crate::kernels::isa::Isa::Avx2 => {
                    // SAFETY: as above.
                    unsafe { avx2($($arg),*) };
                    return;
                }
                $crate::kernels::isa::Isa::Neon | $crate::kernels::isa::Isa::Scalar => {}
            }
            #[cfg(not(target_arch = "x86_64"))]
            let _ = isa;
            plain($($arg),*);
        }
    };
}
pub(super) use vectorised;

/// A set of instructions that kernels are written for. What a machine has is the first of `Isa::available`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Isa {
    /// AVX-512 F, BW, VL and VNNI, beside all of `Avx2`.
    Avx512,
    /// AVX-VNNI, beside all of `Avx2`.
    AvxVnni,
    /// AVX2, FMA and F16C.
    Avx2,
    /// NEON with the dot product of bytes.
    Neon,
    /// Plain Rust: the reference of all others.
    Scalar,
}

/// Why no set of instructions was chosen.
#[derive(Debug, thiserror::Error)]
pub enum IsaError {
    #[error("`{name}` is no set of instructions; known are {}", names(&Isa::ALL))]
    Unknown { name: String },
    #[error("this machine has no {isa}; it has {}", names(&Isa::available()))]
    NotHere { isa: Isa },
}

fn names(sets: &[Isa]) -> String {
    sets.iter().map(|isa| format!("`{isa}`")).collect::<Vec<_>>().join(", ")
}

impl Isa {
    pub const ALL: [Self; 5] = [Self::Avx512, Self::AvxVnni, Self::Avx2, Self::Neon, Self::Scalar];

    /// What this machine has, the fastest first. Never empty.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_here()).collect()
    }

    /// The fastest that this machine has.
    pub fn best() -> Self {
        Self::ALL.into_iter().find(|isa| isa.is_here()).expect("plain Rust runs everywhere")
    }

    /// Errors if this machine lacks it.
    pub fn check(self) -> Result<Self, IsaError> {
        if self.is_here() { Ok(self) } else { Err(IsaError::NotHere { isa: self }) }
    }

    /// Whether kernels of the set `Avx2` may run.
    pub(super) fn has_avx2(self) -> bool {
        matches!(self, Self::Avx512 | Self::AvxVnni | Self::Avx2)
    }

    #[cfg(target_arch = "x86_64")]
    fn is_here(self) -> bool {
        let avx2 =
            || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        match self {
            Self::Avx512 => {
                avx2()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            Self::AvxVnni => avx2() && is_x86_feature_detected!("avxvnni"),
            Self::Avx2 => avx2(),
            Self::Neon => false,
            Self::Scalar => true,
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn is_here(self) -> bool {
        match self {
            Self::Avx512 | Self::AvxVnni | Self::Avx2 => false,
            Self::Neon => std::arch::is_aarch64_feature_detected!("dotprod"),
            Self::Scalar => true,
        }
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn is_here(self) -> bool {
        match self {
            Self::Avx512 | Self::AvxVnni | Self::Avx2 | Self::Neon => false,
            Self::Scalar => true,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Avx512 => "avx512",
            Self::AvxVnni => "avxvnni",
            Self::Avx2 => "avx2",
            Self::Neon => "neon",
            Self::Scalar => "scalar",
        })
    }
}

impl FromStr for Isa {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Self, IsaError> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.to_string() == name)
            .ok_or_else(|| IsaError::Unknown { name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_set_is_the_first_of_those_that_are_here_and_plain_rust_is_always_the_last() {
        let available = Isa::available();
        assert_eq!((available[0], *available.last().unwrap()), (Isa::best(), Isa::Scalar));
        assert!(available.iter().all(|isa| isa.check().is_ok()));
    }

    #[test]
    fn every_set_is_found_by_its_name_and_others_are_refused_with_those_that_there_are() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse::<Isa>().unwrap(), isa);
        }
        let error = "sse9".parse::<Isa>().unwrap_err().to_string();
        assert!(error.contains("`sse9`") && error.contains("`avx2`"), "{error}");
    }
}
