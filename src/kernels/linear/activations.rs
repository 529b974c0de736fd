//! In which form do rows enter a linear layer?
//!
//! Quantised weights take rows of int8: blocks of 32 columns, each with the scale `largest / 127`, after ggml's `Q8_1`.
//! Rows lie in the tiles that the kernel works on, `[tile][block][group][row][4]`: what a kernel reads for all rows of a
//! tile lies together. AVX2 multiplies 8-bit weights by the same quants as words. Float weights take the rows as they are.
//! Invariant: a row's quants are its own, whatever else is in the batch. A row with a value that is not finite gives
//! outputs that are not finite, rather than wrong ones.

use std::marker::PhantomData;
use std::ops::Range;

use super::SharedOut;
use super::quantised::{BLOCK, GROUP, GROUPS};
use crate::kernels::elementwise::ROUND;
use crate::kernels::isa::Isa;
use crate::kernels::prefetch::{Near, prefetch};
use crate::kernels::threads::Threads;

/// Rows that a thread takes at a time, at the least.
const ROWS_A_CHUNK: usize = 8;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Which forms of the rows the weights of a layer read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Wants {
    pub quantised: bool,
    /// The quants as words, besides: where bytes by bytes take longer.
    pub words: bool,
    pub float: bool,
}

impl Wants {
    /// What two layers want that read the same rows.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            quantised: self.quantised || other.quantised,
            words: self.words || other.words,
            float: self.float || other.float,
        }
    }
}

/// Rows of input. Its memory is used again by the next layer.
pub struct Activations {
    isa: Isa,
    /// Rows of a tile; the last may have fewer.
    tile: usize,
    rows: usize,
    inputs: usize,
    wants: Wants,
    /// `[tile][block][group][row][4]`.
    quants: Vec<i8>,
    /// As `quants`, if they are wanted; even columns of a group before odd ones. Anything where a tile has a single row.
    words: Vec<i16>,
    /// `[tile][block][row]`.
    scales: Vec<f32>,
    /// As `scales`: the sum of a block's quants.
    counts: Vec<i32>,
    /// As `scales`: the same sum, scaled.
    sums: Vec<f32>,
    /// `[rows, inputs]`.
    floats: Vec<f32>,
    /// What each thread works in.
    scratch: Vec<Vec<f32>>,
}

/// Some quantised rows.
#[derive(Clone, Copy)]
pub struct Tile<'a> {
    pub rows: usize,
    /// `[block][group][row][4]`.
    pub quants: &'a [i8],
    /// As `quants`, or none, if nobody wanted them: of several rows, columns 0, 2, 1, 3 of each group.
    pub words: &'a [i16],
    /// `[block][row]`.
    pub scales: &'a [f32],
    /// As `scales`.
    pub counts: &'a [i32],
    /// As `scales`.
    pub sums: &'a [f32],
}

impl Tile<'_> {
    pub(super) fn quant(&self, row: usize, block: usize, column: usize) -> i8 {
        self.quants[((block * GROUPS + column / GROUP) * self.rows + row) * GROUP + column % GROUP]
    }
}

impl Activations {
    /// For kernels of these instructions on so many threads.
    pub fn new(isa: Isa, threads: usize) -> Self {
        Self {
            isa,
            tile: super::quantised::kernel(isa).1,
            rows: 0,
            inputs: 0,
            wants: Wants::default(),
            quants: Vec::new(),
            words: Vec::new(),
            scales: Vec::new(),
            counts: Vec::new(),
            sums: Vec::new(),
            floats: Vec::new(),
            scratch: vec![Vec::new(); threads],
        }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn inputs(&self) -> usize {
        self.inputs
    }

    pub(super) fn wants(&self) -> Wants {
        self.wants
    }

    /// Takes `rows` rows of `inputs` values. `make(row, values)` writes a row, and is called once for each, on any thread.
    pub fn fill(
        &mut self,
        threads: &mut Threads,
        rows: usize,
        inputs: usize,
        wants: Wants,
        make: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let chunk = ROWS_A_CHUNK.next_multiple_of(self.tile);
        let (places, scratch) = self.places(rows, inputs, wants);
        scratch.iter_mut().for_each(|row| row.resize(inputs, 0.0));
        threads.run_with(scratch, rows.div_ceil(chunk), |scratch, index| {
            for row in index * chunk..rows.min((index + 1) * chunk) {
                make(row, scratch);
                // SAFETY: borrowed for the whole run; only this call has this row.
                unsafe { places.put(row..row + 1, 0..inputs, scratch, inputs) };
            }
        });
    }

    /// Takes rows that lie somewhere already, `[rows, inputs]`.
    pub fn take(&mut self, threads: &mut Threads, values: &[f32], inputs: usize, wants: Wants) {
        let (rows, chunk) = (values.len() / inputs, ROWS_A_CHUNK.next_multiple_of(self.tile));
        assert_eq!(values.len(), rows * inputs, "a part of a row");
        let (places, _) = self.places(rows, inputs, wants);
        threads.run(rows.div_ceil(chunk), |index| {
            let rows = index * chunk..rows.min((index + 1) * chunk);
            let values = &values[rows.start * inputs..rows.end * inputs];
            // SAFETY: borrowed for the whole run; only this call has these rows.
            unsafe { places.put(rows, 0..inputs, values, inputs) };
        });
    }

    /// Makes room for rows that are put in by parts, and what each thread may work in. What is not put in is anything.
    pub(super) fn places(&mut self, rows: usize, inputs: usize, wants: Wants) -> (Places<'_>, &mut [Vec<f32>]) {
        (self.rows, self.inputs, self.wants) = (rows, inputs, wants);
        if wants.quantised {
            assert!(inputs.is_multiple_of(BLOCK), "{inputs} columns are not whole blocks");
            self.quants.resize(rows * inputs, 0);
            self.scales.resize(rows * inputs / BLOCK, 0.0);
            self.counts.resize(rows * inputs / BLOCK, 0);
            self.sums.resize(rows * inputs / BLOCK, 0.0);
        }
        if wants.words {
            self.words.resize(rows * inputs, 0);
        }
        if wants.float {
            self.floats.resize(rows * inputs, 0.0);
        }
        let places = Places {
            isa: self.isa,
            tile: self.tile,
            rows,
            inputs,
            wants,
            quants: SharedOut::new(&mut self.quants),
            words: SharedOut::new(&mut self.words),
            scales: SharedOut::new(&mut self.scales),
            counts: SharedOut::new(&mut self.counts),
            sums: SharedOut::new(&mut self.sums),
            floats: SharedOut::new(&mut self.floats),
            borrowed: PhantomData,
        };
        (places, &mut self.scratch)
    }

    /// The tile with this number.
    #[inline]
    pub(super) fn tile(&self, index: usize) -> Tile<'_> {
        let first = index * self.tile;
        let rows = self.tile.min(self.rows - first);
        let (start, blocks) = (first * self.inputs, self.inputs / BLOCK);
        let (per_block, count) = (first * blocks, rows * blocks);
        Tile {
            rows,
            quants: &self.quants[start..][..rows * self.inputs],
            words: if self.wants.words { &self.words[start..][..rows * self.inputs] } else { &[] },
            scales: &self.scales[per_block..][..count],
            counts: &self.counts[per_block..][..count],
            sums: &self.sums[per_block..][..count],
        }
    }

    /// Rows of a whole tile.
    pub(super) fn tile_rows(&self) -> usize {
        self.tile
    }

    /// Whether both hold the same rows in the same forms, bit for bit.
    #[cfg(test)]
    pub(super) fn equals(&self, other: &Self) -> bool {
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let of = |rows: &Self| {
            let (quants, counts) = ((rows.quants.clone(), rows.words.clone()), rows.counts.clone());
            (
                rows.rows,
                rows.inputs,
                rows.wants,
                quants,
                counts,
                [&rows.scales, &rows.sums, &rows.floats].map(|f| bits(f)),
            )
        };
        of(self) == of(other)
    }

    /// `[rows, inputs]`.
    pub(super) fn floats(&self) -> &[f32] {
        &self.floats[..self.rows * self.inputs]
    }
}

/// Where rows are put, from several threads.
pub(super) struct Places<'a> {
    isa: Isa,
    tile: usize,
    rows: usize,
    inputs: usize,
    wants: Wants,
    quants: SharedOut<i8>,
    words: SharedOut<i16>,
    scales: SharedOut<f32>,
    counts: SharedOut<i32>,
    sums: SharedOut<f32>,
    floats: SharedOut<f32>,
    borrowed: PhantomData<&'a mut Activations>,
}

impl Places<'_> {
    /// Puts in some columns of some rows, which start every `stride` values of `values`; whole blocks of columns, if they
    /// are quantised.
    ///
    /// # Safety
    /// No other thread has these columns of these rows.
    pub(super) unsafe fn put(&self, rows: Range<usize>, columns: Range<usize>, values: &[f32], stride: usize) {
        if self.wants.float {
            for (row, values) in rows.clone().zip(values.chunks(stride)) {
                // SAFETY: the caller's promise.
                unsafe { self.floats.write(row * self.inputs + columns.start, &values[..columns.len()]) };
            }
        }
        if self.wants.quantised {
            // SAFETY: the caller's promise.
            unsafe { self.quantise(rows, columns, values, stride) };
        }
    }

    /// # Safety
    /// As `put`.
    unsafe fn quantise(&self, rows: Range<usize>, columns: Range<usize>, values: &[f32], stride: usize) {
        #[cfg(target_arch = "x86_64")]
        match self.isa {
            // SAFETY: whoever chose the instructions checked for them; the rest is the caller's promise.
            Isa::Avx512 => return unsafe { self.quantise_avx512(rows, columns, values, stride) },
            // SAFETY: as above.
            Isa::AvxVnni | Isa::Avx2 => return unsafe { self.quantise_avx2(rows, columns, values, stride) },
            _ => {}
        }
        // SAFETY: the caller's promise.
        unsafe { self.quantise_plain(rows, columns, values, stride) }
    }

    /// The same code as `quantise_plain`; the compiler vectorises it for the features named here.
    ///
    /// # Safety
    /// As `put`.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
    unsafe fn quantise_avx512(&self, rows: Range<usize>, columns: Range<usize>, values: &[f32], stride: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.quantise_plain(rows, columns, values, stride) }
    }

    /// As above.
    ///
    /// # Safety
    /// As `put`.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn quantise_avx2(&self, rows: Range<usize>, columns: Range<usize>, values: &[f32], stride: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.quantise_plain(rows, columns, values, stride) }
    }

    /// Has the lines brought that a block of the tile from row `first` on will be written to, if there is one: a few bytes
    /// here and there, for which the processor would wait row by row.
    #[inline(always)]
    fn prefetch(&self, first: usize, block: usize) {
        if first >= self.rows {
            return;
        }
        let rows = self.tile.min(self.rows - first);
        let quants = self.quants.at(first * self.inputs + block * BLOCK * rows, BLOCK * rows);
        (0..BLOCK * rows).step_by(LINE).for_each(|at| prefetch(quants.wrapping_add(at), Near::First));
        let at = first * self.inputs / BLOCK + block * rows;
        prefetch(self.scales.at(at, rows), Near::First);
        prefetch(self.counts.at(at, rows), Near::First);
        prefetch(self.sums.at(at, rows), Near::First);
    }

    /// # Safety
    /// As `put`.
    #[inline(always)]
    unsafe fn quantise_plain(&self, rows: Range<usize>, columns: Range<usize>, values: &[f32], stride: usize) {
        for (row, values) in rows.zip(values.chunks(stride)) {
            let first = row / self.tile * self.tile;
            let (rows, place) = (self.tile.min(self.rows - first), row - first);
            let (blocks, _) = values[..columns.len()].as_chunks::<BLOCK>();
            for (block, values) in (columns.start / BLOCK..).zip(blocks) {
                if place == 0 {
                    self.prefetch(first + self.tile, block);
                }
                let Block { quants, scale, count } = quantise_block(values);
                let at = first * self.inputs + block * BLOCK * rows;
                // The tile's block, of which the row has a group every `rows`.
                let bytes = self.quants.at(at, BLOCK * rows).wrapping_add(place * GROUP);
                let (groups, _) = quants.as_chunks::<GROUP>();
                for (group, quants) in groups.iter().enumerate() {
                    let to = bytes.wrapping_add(group * rows * GROUP).cast::<[i8; GROUP]>();
                    // SAFETY: inside the block (`at` looked), and this thread's alone by the caller's promise.
                    unsafe { to.write(*quants) };
                }
                if self.wants.words && rows > 1 {
                    let words = self.words.at(at, BLOCK * rows).wrapping_add(place * GROUP);
                    for (group, &[a, b, c, d]) in groups.iter().enumerate() {
                        let to = words.wrapping_add(group * rows * GROUP).cast::<[i16; GROUP]>();
                        // SAFETY: as above.
                        unsafe { to.write([a, c, b, d].map(i16::from)) };
                    }
                }
                let at = first * self.inputs / BLOCK + block * rows + place;
                // SAFETY: the caller's promise.
                unsafe { self.scales.write(at, &[scale]) };
                // SAFETY: the caller's promise.
                unsafe { self.counts.write(at, &[count]) };
                // SAFETY: the caller's promise.
                unsafe { self.sums.write(at, &[scale * count as f32]) };
            }
        }
    }
}

/// A quantised block.
struct Block {
    quants: [i8; BLOCK],
    scale: f32,
    count: i32,
}

/// Rounds to the nearest of 255 steps, even ones at ties.
#[inline(always)]
fn quantise_block(values: &[f32; BLOCK]) -> Block {
    /// Blocks of smaller values are zeros: the inverse of their scale would overflow.
    const SMALLEST: f32 = 1e-30;
    // As bits, so that NaN counts as larger than all.
    let largest = values.iter().fold(0, |largest, value| (value.to_bits() & 0x7fff_ffff).max(largest));
    let largest = f32::from_bits(largest);
    let (scale, inverse) = if largest < SMALLEST { (0.0, 0.0) } else { (largest / 127.0, 127.0 / largest) };
    let mut quants = [0; BLOCK];
    let mut count = 0;
    for (quant, value) in quants.iter_mut().zip(values) {
        *quant = (value * inverse + ROUND).to_bits() as u8 as i8;
        count += i32::from(*quant);
    }
    // Infinite or NaN: so are the scale and with it every product.
    Block { quants, scale, count }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_its_quants_times_its_scale_within_half_a_step() {
        let values: [f32; BLOCK] = std::array::from_fn(|i| ((i * 37 + 11) % 64) as f32 / 9.0 - 3.0);
        let Block { quants, scale, count } = quantise_block(&values);
        assert_eq!(count, quants.iter().map(|q| i32::from(*q)).sum::<i32>());
        assert!(quants.iter().any(|q| q.unsigned_abs() == 127), "the largest uses the whole range");
        for (quant, value) in quants.iter().zip(values) {
            assert!((f32::from(*quant) * scale - value).abs() <= scale * 0.500_01, "{quant} for {value}");
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_not_finite_stays_so() {
        let block = quantise_block(&[0.0; BLOCK]);
        assert_eq!((block.quants, block.scale, block.count), ([0; BLOCK], 0.0, 0));
        let tiny = quantise_block(&[1e-38; BLOCK]);
        assert_eq!((tiny.scale, tiny.count), (0.0, 0));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = [1.0; BLOCK];
            values[7] = bad;
            assert!(!quantise_block(&values).scale.is_finite(), "{bad}");
        }
    }

    #[test]
    fn a_row_has_the_same_quants_alone_and_in_any_place_of_a_batch() {
        let inputs = 96;
        let row = |row: usize, values: &mut [f32]| {
            values.iter_mut().enumerate().for_each(|(i, v)| *v = ((row * 31 + i * 17) % 101) as f32 - 50.5);
        };
        let wants = Wants { quantised: true, words: true, float: true };
        for isa in Isa::available() {
            let (mut one, mut two) = (Threads::new(1).unwrap(), Threads::new(2).unwrap());
            let (mut alone, mut batch) = (Activations::new(isa, 1), Activations::new(isa, 2));
            batch.fill(&mut two, 45, inputs, wants, row);
            for at in 0..45 {
                alone.fill(&mut one, 1, inputs, wants, |_, values| row(at, values));
                let (ours, tile) = (alone.tile(0), batch.tile(at / batch.tile));
                let place = at % batch.tile;
                for block in 0..inputs / BLOCK {
                    let there = block * tile.rows + place;
                    assert_eq!(ours.scales[block].to_bits(), tile.scales[there].to_bits());
                    assert_eq!((ours.counts[block], ours.sums[block]), (tile.counts[there], tile.sums[there]));
                    for column in 0..BLOCK {
                        assert_eq!(ours.quant(0, block, column), tile.quant(place, block, column));
                        let group = (block * GROUPS + column / GROUP) * tile.rows + place;
                        let word = tile.words[group * GROUP + [0, 2, 1, 3][column % GROUP]];
                        assert!(tile.rows == 1 || word == i16::from(tile.quant(place, block, column)));
                    }
                }
                assert_eq!(alone.floats(), &batch.floats()[at * inputs..][..inputs]);
            }
            let mut taken = Activations::new(isa, 2);
            taken.take(&mut two, batch.floats(), inputs, wants);
            assert!(taken.equals(&batch), "{isa}");
        }
    }
}
