//! Which models can the decoder run, and how do their families differ?
//!
//! One decoder, and a table of switches. A family is in the table only if a test compares its logits with an independent
//! implementation; whatever a file asks for beyond the switches is refused, not guessed.
#![deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use super::weights::gguf::{Metadata, MetadataError};
use crate::kernels::elementwise::RopePairs;
use crate::types::TokenCount;

/// The widest head that can be run.
pub const MAX_HEAD_DIM: usize = 512;

/// What sets a family apart.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    /// `general.architecture`, and the prefix of the family's keys.
    pub architecture: &'static str,
    pub rope: RopePairs,
    /// Queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Queries and keys are normed head by head before they are turned.
    pub qk_norm: bool,
}

/// SmolLM2 and Mistral come as `llama`.
static FAMILIES: [Family; 2] = [
    Family { architecture: "llama", rope: RopePairs::Interleaved, qkv_bias: false, qk_norm: false },
    Family { architecture: "qwen2", rope: RopePairs::Halves, qkv_bias: true, qk_norm: false },
];

/// The sizes of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Sizes {
    pub layers: usize,
    pub hidden: usize,
    pub feed_forward: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// The longest sequence, in tokens.
    pub context_length: u32,
    pub rms_epsilon: f32,
    pub rope_base: f32,
}

impl Sizes {
    /// Multiply-adds of all layers' weights with one row; the embedding and the head are not among them.
    pub fn multiply_adds_a_row(&self) -> usize {
        let attention = self.hidden * (2 * self.heads + 2 * self.kv_heads) * self.head_dim;
        self.layers * (attention + 3 * self.hidden * self.feed_forward)
    }

    /// Position at which attending costs a row as many multiply-adds as all layers' weights.
    pub fn doubles_at(&self) -> TokenCount {
        let for_each_before = self.layers * 2 * self.heads * self.head_dim;
        TokenCount(u32::try_from(self.multiply_adds_a_row() / for_each_before.max(1)).unwrap_or(u32::MAX))
    }
}

/// Why a model can't be run.
#[derive(Debug, thiserror::Error)]
pub enum FamilyError {
    #[error("models of the architecture {found:?} are not supported; supported are {}", supported())]
    Unknown { found: String },
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    #[error("metadata key `{key}` is {found}: {reason}")]
    Value { key: String, found: String, reason: &'static str },
}

fn supported() -> String {
    FAMILIES.iter().map(|family| format!("`{}`", family.architecture)).collect::<Vec<_>>().join(", ")
}

/// The family of a file and the sizes of its model, each checked.
pub fn read(metadata: &Metadata) -> Result<(&'static Family, Sizes), FamilyError> {
    let found = metadata.str("general.architecture")?;
    let family = FAMILIES
        .iter()
        .find(|family| family.architecture == found)
        .ok_or_else(|| FamilyError::Unknown { found: found.chars().take(40).collect() })?;
    let keys = Keys { metadata, prefix: family.architecture };
    keys.refuse_variants()?;
    let (hidden, heads) = (keys.size("embedding_length")?, keys.size("attention.head_count")?);
    let kv_heads = keys.optional_size("attention.head_count_kv")?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        return Err(keys.refuse("attention.head_count_kv", kv_heads, "it doesn't divide the number of heads"));
    }
    let head_dim = match keys.optional_size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(keys.refuse("attention.head_count", heads, "it doesn't divide the embedding's length")),
    };
    if !head_dim.is_multiple_of(8) || head_dim > MAX_HEAD_DIM {
        return Err(keys.refuse("attention.key_length", head_dim, "heads must be a multiple of 8 wide, 512 at most"));
    }
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(found) = keys.optional_size(key)?.filter(|&found| found != head_dim) {
            return Err(keys.refuse(key, found, "it must be the width of a head"));
        }
    }
    let mut context_length = keys.size("context_length")?;
    // Within its window, attention over a sliding window is full attention; what is beyond is not supported.
    if let Some(window) = keys.optional_size("attention.sliding_window")? {
        context_length = context_length.min(window);
    }
    let rms_epsilon = keys.positive("attention.layer_norm_rms_epsilon", None)?;
    let rope_base = keys.positive("rope.freq_base", Some(10_000.0))?;
    let sizes = Sizes {
        layers: keys.size("block_count")?,
        hidden,
        feed_forward: keys.size("feed_forward_length")?,
        heads,
        kv_heads,
        head_dim,
        context_length: u32::try_from(context_length).unwrap_or(u32::MAX),
        rms_epsilon,
        rope_base,
    };
    Ok((family, sizes))
}

/// The keys of one family.
struct Keys<'a> {
    metadata: &'a Metadata,
    prefix: &'static str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn refuse(&self, key: &str, found: impl ToString, reason: &'static str) -> FamilyError {
        FamilyError::Value { key: self.key(key), found: found.to_string(), reason }
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, FamilyError> {
        match self.metadata.optional(&self.key(key), Metadata::u32)? {
            Some(found) if !(1..=1 << 24).contains(&found) => {
                Err(self.refuse(key, found, "sizes are between 1 and 16777216"))
            }
            found => Ok(found.map(|found| found as usize)),
        }
    }

    fn size(&self, key: &str) -> Result<usize, FamilyError> {
        let missing = || FamilyError::Metadata(MetadataError::Missing { key: self.key(key) });
        self.optional_size(key)?.ok_or_else(missing)
    }

    fn positive(&self, key: &str, default: Option<f32>) -> Result<f32, FamilyError> {
        let found = match (self.metadata.optional(&self.key(key), Metadata::f32)?, default) {
            (Some(found), _) | (None, Some(found)) => found,
            (None, None) => return Err(MetadataError::Missing { key: self.key(key) }.into()),
        };
        if found.is_finite() && found > 0.0 {
            Ok(found)
        } else {
            Err(self.refuse(key, found, "it must be a positive number"))
        }
    }

    /// Refuses what would change the maths in a way that the decoder doesn't follow.
    fn refuse_variants(&self) -> Result<(), FamilyError> {
        let scaling = self.metadata.optional(&self.key("rope.scaling.type"), Metadata::str)?;
        if let Some(found) = scaling.filter(|&found| found != "none") {
            return Err(self.refuse(
                "rope.scaling.type",
                found.escape_debug(),
                "scaled rotary positions are not supported",
            ));
        }
        for key in ["rope.scale_linear", "rope.scaling.factor"] {
            let factor = self.metadata.optional(&self.key(key), Metadata::f32)?;
            if let Some(found) = factor.filter(|&found| found != 1.0 && found != 0.0) {
                return Err(self.refuse(key, found, "scaled rotary positions are not supported"));
            }
        }
        let experts = self.metadata.optional(&self.key("expert_count"), Metadata::u32)?;
        if let Some(found) = experts.filter(|&found| found > 0) {
            return Err(self.refuse("expert_count", found, "mixtures of experts are not supported"));
        }
        for key in
            ["attention.clamp_kqv", "attention.max_alibi_bias", "logit_scale", "residual_scale", "embedding_scale"]
        {
            if self.metadata.contains(&self.key(key)) {
                return Err(self.refuse(key, "set", "this variant is not supported"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::gguf::Value;

    fn file(changes: &[(&str, Option<Value>)]) -> Metadata {
        let mut pairs: Vec<(String, Value)> = vec![("general.architecture".to_owned(), "llama".into())];
        for (key, value) in [
            ("block_count", Value::from(2)),
            ("context_length", 8192.into()),
            ("embedding_length", 64.into()),
            ("feed_forward_length", 96.into()),
            ("attention.head_count", 4.into()),
            ("attention.head_count_kv", 2.into()),
            ("attention.layer_norm_rms_epsilon", 1e-5.into()),
        ] {
            pairs.push((format!("llama.{key}"), value));
        }
        for (key, value) in changes {
            pairs.retain(|(name, _)| name != key);
            pairs.extend(value.clone().map(|value| ((*key).to_owned(), value)));
        }
        pairs.into_iter().collect()
    }

    #[test]
    fn sizes_are_read_with_the_defaults_that_the_format_leaves_out() {
        let (family, sizes) = read(&file(&[])).unwrap();
        assert_eq!(family.architecture, "llama");
        assert_eq!((sizes.head_dim, sizes.kv_heads, sizes.rope_base), (16, 2, 10_000.0));
        let (_, sizes) = read(&file(&[("llama.attention.head_count_kv", None)])).unwrap();
        assert_eq!(sizes.kv_heads, 4, "without groups each head has its own keys");
        let (_, sizes) = read(&file(&[("llama.attention.sliding_window", Some(4096.into()))])).unwrap();
        assert_eq!(sizes.context_length, 4096, "a sequence must stay inside the window");
    }

    #[test]
    fn what_the_decoder_cannot_run_is_refused_by_its_key() {
        for (key, value, wanted) in [
            (
                "general.architecture",
                Some("mamba".into()),
                "\"mamba\" are not supported; supported are `llama`, `qwen2`",
            ),
            ("general.architecture", None, "`general.architecture` is missing"),
            ("llama.block_count", None, "`llama.block_count` is missing"),
            ("llama.block_count", Some(0.into()), "`llama.block_count` is 0"),
            ("llama.embedding_length", Some("many".into()), "`llama.embedding_length` is a string"),
            ("llama.attention.head_count", Some(5.into()), "it doesn't divide"),
            ("llama.attention.head_count_kv", Some(3.into()), "`llama.attention.head_count_kv` is 3"),
            ("llama.attention.key_length", Some(20.into()), "`llama.attention.key_length` is 20"),
            ("llama.attention.value_length", Some(8.into()), "`llama.attention.value_length` is 8"),
            ("llama.rope.dimension_count", Some(8.into()), "`llama.rope.dimension_count` is 8"),
            ("llama.rope.scaling.type", Some("yarn".into()), "`llama.rope.scaling.type` is yarn"),
            ("llama.rope.scale_linear", Some(4.0.into()), "`llama.rope.scale_linear` is 4"),
            ("llama.expert_count", Some(8.into()), "mixtures of experts"),
            ("llama.attention.layer_norm_rms_epsilon", Some(f32::NAN.into()), "must be a positive number"),
            ("llama.rope.freq_base", Some((-1.0).into()), "`llama.rope.freq_base` is -1"),
        ] {
            let error = read(&file(&[(key, value)])).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error:?} doesn't say {wanted:?}");
        }
    }
}
