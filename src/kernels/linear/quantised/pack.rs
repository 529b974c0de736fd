//! How do the blocks of a model file become panels?
//!
//! Straight from the file's bytes, a panel at a time, on all threads. Blocks of 32 columns with one scale are kept as they
//! are; those of K-quants have their two-level scales multiplied out, which rounds by 2^-11. What has scales of another
//! kind is quantised anew from its values, to 8 bits. Layouts of the blocks: ggml (ggml-common.h).

use half::f16;

use super::{BLOCK, Form, GROUP, GROUPS, Line, PANEL, Panels};
use crate::kernels::SharedOut;
use crate::kernels::huge_pages::HugePages;
use crate::kernels::threads::Threads;

/// How a file keeps rows whose blocks become panels without loss.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encoding {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
}

impl Encoding {
    fn form(self) -> Form {
        match self {
            Self::Q4_0 => Form::Four,
            Self::Q4_1 | Self::Q4K => Form::FourAffine,
            Self::Q5_0 => Form::Five,
            Self::Q5_1 | Self::Q5K => Form::FiveAffine,
            Self::Q8_0 => Form::Eight,
        }
    }

    /// Columns of a block in the file.
    fn columns(self) -> usize {
        match self {
            Self::Q4K | Self::Q5K => 256,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => BLOCK,
        }
    }

    /// Bytes of a block in the file.
    fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 => 2 + 16,
            Self::Q4_1 => 4 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 4 + 4 + 16,
            Self::Q8_0 => 2 + 32,
            Self::Q4K => 4 + 12 + 128,
            Self::Q5K => 4 + 12 + 32 + 128,
        }
    }

    /// Bytes of a row in the file.
    pub fn row_bytes(self, inputs: usize) -> usize {
        inputs / self.columns() * self.block_bytes()
    }
}

/// 32 columns of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Block {
    /// As the form has them: 4-bit ones are 0..16, 5-bit ones 0..32.
    pub quants: [i8; BLOCK],
    pub scale: f16,
    /// 0 where the form has none.
    pub min: f16,
}

impl Panels {
    /// Packs a matrix of `outputs` rows and `inputs` columns from the bytes of its rows. Panics if they are too few.
    pub fn pack(
        with: (&mut Threads, &mut HugePages),
        outputs: usize,
        inputs: usize,
        encoding: Encoding,
        bytes: &[u8],
    ) -> Self {
        let row_bytes = encoding.row_bytes(inputs);
        assert!(inputs.is_multiple_of(encoding.columns()), "{inputs} columns are not whole blocks");
        assert_eq!(bytes.len(), outputs * row_bytes, "bytes of another shape");
        Self::from_blocks(with, encoding.form(), outputs, inputs, |row, put| {
            let row = &bytes[row * row_bytes..][..row_bytes];
            (0..inputs / BLOCK).for_each(|block| put(block, &decode(encoding, row, block)));
            Ok::<_, std::convert::Infallible>(())
        })
        .unwrap_or_else(|never| match never {})
    }

    /// Quantises rows to 8 bits: what ggml's `Q8_0` does. `fill(row, values)` writes a row, on any thread.
    pub fn quantise<E: Send>(
        with: (&mut Threads, &mut HugePages),
        outputs: usize,
        inputs: usize,
        fill: impl Fn(usize, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        Self::from_blocks(with, Form::Eight, outputs, inputs, |row, put| {
            let mut values = vec![0.0; inputs];
            fill(row, &mut values)?;
            let (blocks, _) = values.as_chunks::<BLOCK>();
            blocks.iter().enumerate().for_each(|(index, values)| put(index, &quantise(values)));
            Ok(())
        })
    }

    /// Whether all scales are numbers. Scales of K-quants, multiplied out, may leave the range of f16.
    pub fn is_finite(&self) -> bool {
        self.scales.iter().chain(self.mins.iter()).flatten().all(|scale| scale.is_finite())
    }

    fn from_blocks<E: Send>(
        (threads, memory): (&mut Threads, &mut HugePages),
        form: Form,
        outputs: usize,
        inputs: usize,
        row: impl Fn(usize, &mut dyn FnMut(usize, &Block)) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        assert!(outputs > 0 && inputs > 0 && inputs.is_multiple_of(BLOCK), "{outputs} rows of {inputs} columns");
        let blocks = inputs / BLOCK;
        let panels = outputs.div_ceil(PANEL);
        let mut quants = memory.zeroed::<Line>(panels * blocks * form.lines());
        let mut scales = memory.zeroed::<[f16; PANEL]>(panels * blocks);
        let mut mins = memory.zeroed::<[f16; PANEL]>(if form.is_affine() { panels * blocks } else { 0 });
        let failure = std::sync::Mutex::new(None);
        let parts = (SharedOut::new(&mut quants), SharedOut::new(&mut scales), SharedOut::new(&mut mins));
        threads.run(panels, |panel| {
            let first = panel * blocks;
            // SAFETY: borrowed for the whole run; only this call has this panel, here and below.
            let quants = unsafe { parts.0.part(first * form.lines(), blocks * form.lines()) };
            // SAFETY: as above.
            let scales = unsafe { parts.1.part(first, blocks) };
            // SAFETY: as above.
            let mins = unsafe {
                parts.2.part(if form.is_affine() { first } else { 0 }, if form.is_affine() { blocks } else { 0 })
            };
            for lane in 0..PANEL.min(outputs - panel * PANEL) {
                let outcome = row(panel * PANEL + lane, &mut |index, block| {
                    put(form, &mut quants[index * form.lines()..][..form.lines()], lane, &block.quants);
                    scales[index][lane] = block.scale;
                    if let Some(min) = mins.get_mut(index) {
                        min[lane] = block.min;
                    }
                });
                if let Err(error) = outcome {
                    *failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
                    return;
                }
            }
        });
        match failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(Self { form, outputs, blocks, quants, scales, mins }),
        }
    }
}

/// Writes one row's quants into the lines of a block.
fn put(form: Form, lines: &mut [Line], lane: usize, quants: &[i8; BLOCK]) {
    let (groups, _) = quants.as_chunks::<GROUP>();
    for (group, quants) in groups.iter().enumerate() {
        for (column, &quant) in quants.iter().enumerate() {
            let place = lane * GROUP + column;
            let quant = quant.cast_unsigned();
            match form {
                Form::Eight => lines[group].0[place] = quant,
                Form::Four | Form::FourAffine | Form::Five | Form::FiveAffine => {
                    let shift = if group < GROUPS / 2 { 0 } else { 4 };
                    lines[group % (GROUPS / 2)].0[place] |= (quant & 15) << shift;
                    if let Some(fifth) = lines.get_mut(GROUPS / 2) {
                        fifth.0[place] |= quant >> 4 << group;
                    }
                }
            }
        }
    }
}

fn half_at(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Block `index`, counted in blocks of 32, of a row of the file.
pub(super) fn decode(encoding: Encoding, row: &[u8], index: usize) -> Block {
    let per_block = encoding.columns() / BLOCK;
    let bytes = &row[index / per_block * encoding.block_bytes()..][..encoding.block_bytes()];
    let part = index % per_block;
    // 16 bytes: the low nibbles are the first 16 columns, the high ones the others.
    let nibble = |nibbles: &[u8], column: usize| (nibbles[column % 16] >> (column / 16 * 4)) & 15;
    let fifth = |bits: &[u8], column: usize| (bits[column / 8] >> (column % 8) & 1) << 4;
    let quants = |quant: &dyn Fn(usize) -> u8| std::array::from_fn(|column| quant(column).cast_signed());
    let scale = half_at(bytes, 0);
    match encoding {
        Encoding::Q4_0 => Block { quants: quants(&|c| nibble(&bytes[2..], c)), scale, min: f16::ZERO },
        Encoding::Q4_1 => Block { quants: quants(&|c| nibble(&bytes[4..], c)), scale, min: half_at(bytes, 2) },
        Encoding::Q5_0 => {
            let quant = |c| nibble(&bytes[6..], c) | fifth(&bytes[2..6], c);
            Block { quants: quants(&quant), scale, min: f16::ZERO }
        }
        Encoding::Q5_1 => {
            let quant = |c| nibble(&bytes[8..], c) | fifth(&bytes[4..8], c);
            Block { quants: quants(&quant), scale, min: half_at(bytes, 2) }
        }
        Encoding::Q8_0 => Block { quants: quants(&|c| bytes[2 + c]), scale, min: f16::ZERO },
        Encoding::Q4K => {
            let (scale, min) = two_levels(bytes, part);
            let nibbles = &bytes[16 + part / 2 * 32..][..32];
            Block { quants: quants(&|c| (nibbles[c] >> (part % 2 * 4)) & 15), scale, min }
        }
        Encoding::Q5K => {
            let (scale, min) = two_levels(bytes, part);
            let (bits, nibbles) = (&bytes[16..48], &bytes[48 + part / 2 * 32..][..32]);
            let quant = |c: usize| (nibbles[c] >> (part % 2 * 4)) & 15 | (bits[c] >> part & 1) << 4;
            Block { quants: quants(&quant), scale, min }
        }
    }
}

/// Scale and min of part `part` of a K-quant: 6 bits each, times the block's own.
fn two_levels(bytes: &[u8], part: usize) -> (f16, f16) {
    let packed = &bytes[4..16];
    let (scale, min) = if part < 4 {
        (packed[part] & 63, packed[part + 4] & 63)
    } else {
        (packed[part + 4] & 15 | packed[part - 4] >> 6 << 4, packed[part + 4] >> 4 | packed[part] >> 6 << 4)
    };
    let times = |factor: f16, by: u8| f16::from_f32(factor.to_f32() * f32::from(by));
    (times(half_at(bytes, 0), scale), times(-half_at(bytes, 2), min))
}

fn quantise(values: &[f32; BLOCK]) -> Block {
    let largest = values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let scale = f16::from_f32(largest / 127.0);
    let inverse = if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 };
    let quants = values.map(|value| (value * inverse).round_ties_even().clamp(-127.0, 127.0) as i8);
    Block { quants, scale, min: f16::ZERO }
}
