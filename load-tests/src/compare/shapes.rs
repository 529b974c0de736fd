//! Which pieces of work are both programs timed on?

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, bail};

/// Tokens of a prefill.
pub const PREFILL_TOKENS: usize = 512;
/// Steps of a decode, alone and in a batch.
const ALONE_STEPS: usize = 64;
const BATCH_STEPS: usize = 32;

/// One piece of work: `prefill@2048`, `decode1@0`, `decode16@512`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    pub work: Work,
    /// Tokens of each sequence that are there before.
    pub depth: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Work {
    /// One prompt in one step; logits of the last token.
    Prefill,
    /// Step after step of one token for each sequence, with its logits.
    Decode { sequences: usize },
}

impl Shape {
    pub const PREFILL: Self = Self::prefill(0);
    pub const DECODE_ALONE: Self = Self::decode(1, 0);
    pub const DECODE_BATCH: Self = Self::decode(16, 0);

    const fn prefill(depth: usize) -> Self {
        Self { work: Work::Prefill, depth }
    }

    const fn decode(sequences: usize, depth: usize) -> Self {
        Self { work: Work::Decode { sequences }, depth }
    }

    pub fn sequences(self) -> usize {
        match self.work {
            Work::Prefill => 1,
            Work::Decode { sequences } => sequences,
        }
    }

    pub fn steps(self) -> usize {
        match self.work {
            Work::Prefill => 1,
            Work::Decode { sequences: 1 } => ALONE_STEPS,
            Work::Decode { .. } => BATCH_STEPS,
        }
    }

    /// Tokens that each sequence decodes, if it does.
    pub fn generated(self) -> Option<usize> {
        match self.work {
            Work::Prefill => None,
            Work::Decode { .. } => Some(self.steps()),
        }
    }

    /// Of each sequence in each step.
    pub fn rows(self) -> usize {
        match self.work {
            Work::Prefill => PREFILL_TOKENS,
            Work::Decode { .. } => 1,
        }
    }

    /// Tokens of all steps and sequences.
    pub fn tokens(self) -> usize {
        self.steps() * self.rows() * self.sequences()
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.work {
            Work::Prefill => write!(f, "prefill@{}", self.depth),
            Work::Decode { sequences } => write!(f, "decode{sequences}@{}", self.depth),
        }
    }
}

impl FromStr for Shape {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (work, depth) = text.split_once('@').context("a shape is like `prefill@0` or `decode16@512`")?;
        let depth = depth.parse()?;
        match (work, work.strip_prefix("decode").map(str::parse)) {
            ("prefill", _) => Ok(Self::prefill(depth)),
            (_, Some(Ok(sequences))) if sequences > 0 => Ok(Self::decode(sequences, depth)),
            _ => bail!("`{work}` is neither `prefill` nor `decode` with a number of sequences"),
        }
    }
}

/// Shapes that one process of each program does, since they share what is slow to set up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Group {
    /// One conversation, at its start
    Short,
    /// One conversation, 2,048 tokens in
    Deep,
    /// 4 and 16 conversations that answer at once, at their start
    Batch,
    /// The same, 512 tokens in; for information
    Crowd,
}

impl Group {
    pub const ALL: [Self; 4] = [Self::Short, Self::Deep, Self::Batch, Self::Crowd];

    pub fn shapes(self) -> &'static [Shape] {
        match self {
            Self::Short => const { &[Shape::PREFILL, Shape::DECODE_ALONE] },
            Self::Deep => const { &[Shape::prefill(2048), Shape::decode(1, 2048)] },
            Self::Batch => const { &[Shape::decode(4, 0), Shape::decode(16, 0)] },
            Self::Crowd => const { &[Shape::decode(4, 512), Shape::decode(16, 512)] },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_is_read_as_it_is_written() {
        for shape in Group::ALL.into_iter().flat_map(Group::shapes) {
            assert_eq!(shape.to_string().parse::<Shape>().unwrap(), *shape);
        }
        assert!(["prefill", "decode@1", "decode0@1", "idle@0"].iter().all(|text| text.parse::<Shape>().is_err()));
    }

    #[test]
    fn the_tokens_of_a_shape_are_those_of_all_its_steps() {
        let tokens = ["prefill@2048", "decode1@0", "decode16@512"].map(|text| text.parse::<Shape>().unwrap().tokens());
        assert_eq!(tokens, [512, 64, 512]);
    }
}
