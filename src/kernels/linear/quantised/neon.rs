//! How does NEON multiply panels by a tile of rows?
//!
//! `sdot` multiplies signed bytes by signed bytes, four to a lane: a vector is four rows of a panel's group. A tile is half
//! a panel by up to four rows of input. `sdot` and the widening of halves have no stable intrinsics yet, so they are
//! written as assembly of one instruction each.

use std::arch::aarch64::{
    float32x4_t, int8x16_t, int32x4_t, uint8x16_t, vaddq_f32, vandq_u8, vcvtq_f32_s32, vdupq_n_f32, vdupq_n_s8,
    vdupq_n_s32, vdupq_n_u8, vfmaq_f32, vld1_u16, vld1q_f32, vld1q_u8, vmulq_f32, vorrq_u8, vreinterpretq_s8_s32,
    vreinterpretq_s8_u8, vshlq_u8, vshrq_n_u8, vst1q_f32,
};
use std::ops::Range;

use super::super::activations::Tile;
use super::super::{Out, PANEL};
use super::{GROUP, GROUPS, Packing, Panels, with_packing};

/// Rows of a tile.
pub const TILE: usize = 4;
/// Vectors of half a panel.
const HALF: usize = 2;
/// Weights of a vector.
const LANES: usize = 4;

/// As `Kernel` says.
///
/// # Safety
/// As `Kernel`.
#[target_feature(enable = "neon,dotprod")]
pub unsafe fn multiply(panels: &Panels, range: Range<usize>, tile: &Tile<'_>, out: &Out) {
    with_packing!(panels.form, rows(panels, range, tile, out))
}

/// # Safety
/// As `Kernel`.
#[target_feature(enable = "neon,dotprod")]
unsafe fn rows<F: Packing>(panels: &Panels, range: Range<usize>, tile: &Tile<'_>, out: &Out) {
    for panel in range {
        for half in 0..2 {
            match tile.rows {
                // SAFETY: the caller's promise.
                1 => unsafe { multiply_tile::<F, 1>(panels, panel, half, tile, out) },
                // SAFETY: as above.
                2 => unsafe { multiply_tile::<F, 2>(panels, panel, half, tile, out) },
                // SAFETY: as above.
                3 => unsafe { multiply_tile::<F, 3>(panels, panel, half, tile, out) },
                // SAFETY: as above.
                TILE => unsafe { multiply_tile::<F, TILE>(panels, panel, half, tile, out) },
                rows => unreachable!("a tile of {rows} rows"),
            }
        }
    }
}

/// `T` rows by half a panel.
///
/// # Safety
/// As `Kernel`; the tile has `T` rows.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn multiply_tile<F: Packing, const T: usize>(
    panels: &Panels,
    panel: usize,
    half: usize,
    tile: &Tile<'_>,
    out: &Out,
) {
    let walk = panels.walk(panel);
    let counted = T * panels.blocks;
    assert!(tile.quants.len() == counted * GROUPS * GROUP && tile.scales.len() == counted, "a tile of another shape");
    assert!(tile.sums.len() == counted, "a tile of another shape");
    if T > 1 && half == 0 {
        // SAFETY: the caller's promise.
        unsafe { out.prefetch(T, panel) };
    }
    let mut sums = [[vdupq_n_f32(0.0); HALF]; T];
    for block in 0..panels.blocks {
        // SAFETY: the tile has `T` rows of `panels.blocks` blocks, and the panel as many (above), here and below.
        let quants = unsafe { tile.quants.as_ptr().add(block * T * GROUPS * GROUP) };
        let mut dots = [[vdupq_n_s32(0); HALF]; T];
        let mut fifth = [vdupq_n_u8(0); HALF];
        if F::FIFTH_BIT {
            for (vector, fifth) in fifth.iter_mut().enumerate() {
                let place = (block * F::LINES + GROUPS / 2) * 64 + (half * HALF + vector) * 16;
                // SAFETY: as above: a quarter of the block's last line.
                *fifth = unsafe { vld1q_u8(walk.quants.add(place)) };
            }
        }
        for line in 0..if F::BYTES { GROUPS } else { GROUPS / 2 } {
            let mut weights = [vdupq_n_u8(0); HALF];
            for (vector, weights) in weights.iter_mut().enumerate() {
                // SAFETY: as above: a quarter of a line.
                let at = unsafe { walk.quants.add((block * F::LINES + line) * 64 + (half * HALF + vector) * 16) };
                // SAFETY: 16 bytes.
                *weights = unsafe { vld1q_u8(at) };
            }
            if F::BYTES {
                // SAFETY: as above.
                unsafe { add_group::<T>(&weights, quants, line, &mut dots) };
                continue;
            }
            let (mut low, mut high) = (weights, weights);
            for vector in 0..HALF {
                low[vector] = vandq_u8(weights[vector], vdupq_n_u8(15));
                high[vector] = vshrq_n_u8::<4>(weights[vector]);
                if F::FIFTH_BIT {
                    // Bit 4 of each byte; a shift to the right is one to the left by less than nothing.
                    let bit = |by: usize| vandq_u8(vshlq_u8(fifth[vector], vdupq_n_s8(4 - by as i8)), vdupq_n_u8(16));
                    low[vector] = vorrq_u8(low[vector], bit(line));
                    high[vector] = vorrq_u8(high[vector], bit(line + GROUPS / 2));
                }
            }
            // SAFETY: as above.
            unsafe { add_group::<T>(&low, quants, line, &mut dots) };
            // SAFETY: as above.
            unsafe { add_group::<T>(&high, quants, line + GROUPS / 2, &mut dots) };
        }
        for vector in 0..HALF {
            let at = block * PANEL + (half * HALF + vector) * LANES;
            // SAFETY: as above: four halves.
            let scales = unsafe { widen(walk.scales.add(at).cast()) };
            // SAFETY: as above; without mins, the scales stand in.
            let mins = unsafe { widen(walk.mins.add(at).cast()) };
            for t in 0..T {
                // SAFETY: as above.
                let scale = vdupq_n_f32(unsafe { *tile.scales.as_ptr().add(block * T + t) });
                // SAFETY: as above.
                let sum = unsafe { *tile.sums.as_ptr().add(block * T + t) };
                let dot = vcvtq_f32_s32(dots[t][vector]);
                let scaled = if F::ZERO != 0.0 {
                    vfmaq_f32(vdupq_n_f32(F::ZERO * -sum), dot, scale)
                } else {
                    vmulq_f32(dot, scale)
                };
                sums[t][vector] = vfmaq_f32(sums[t][vector], scaled, scales);
                if F::AFFINE {
                    sums[t][vector] = vfmaq_f32(sums[t][vector], mins, vdupq_n_f32(sum));
                }
            }
        }
    }
    for (t, sums) in sums.iter().enumerate() {
        for (vector, &sums) in sums.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { put(out, t, panel, (half * HALF + vector) * LANES, sums) };
        }
    }
}

/// Adds one group's products.
///
/// # Safety
/// `quants` points at a block of `T` rows.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn add_group<const T: usize>(
    weights: &[uint8x16_t; HALF],
    quants: *const i8,
    group: usize,
    dots: &mut [[int32x4_t; HALF]; T],
) {
    for (t, dots) in dots.iter_mut().enumerate() {
        // SAFETY: inside the block; four bytes that need not be aligned.
        let row = unsafe { quants.add((group * T + t) * GROUP).cast::<i32>().read_unaligned() };
        let row = vreinterpretq_s8_s32(vdupq_n_s32(row));
        for (dot, &weights) in dots.iter_mut().zip(weights) {
            *dot = sdot(*dot, vreinterpretq_s8_u8(weights), row);
        }
    }
}

/// Adds to each lane the products of its four bytes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: works on registers alone, and the machine has the instruction (this function's feature).
    unsafe {
        std::arch::asm!(
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// Four halves as floats.
///
/// # Safety
/// `at` points at four halves.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn widen(at: *const u16) -> float32x4_t {
    // SAFETY: the caller's promise.
    let halves = unsafe { vld1_u16(at) };
    let floats: float32x4_t;
    // SAFETY: works on registers alone; every processor with NEON has the instruction.
    unsafe {
        std::arch::asm!(
            "fcvtl {floats:v}.4s, {halves:v}.4h",
            floats = lateout(vreg) floats,
            halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    floats
}

/// As `Out::put`, from lane `lane` of the panel.
///
/// # Safety
/// As `Out::put`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn put(out: &Out, row: usize, panel: usize, lane: usize, sums: float32x4_t) {
    // SAFETY: the caller's promise.
    if let Some(at) = unsafe { out.whole(row, panel) } {
        let at = at.wrapping_add(lane);
        // SAFETY: four floats that are this thread's alone.
        let sums = if out.adds() { vaddq_f32(unsafe { vld1q_f32(at) }, sums) } else { sums };
        // SAFETY: as above.
        unsafe { vst1q_f32(at, sums) };
    } else {
        let mut lanes = [0.0; LANES];
        // SAFETY: four floats.
        unsafe { vst1q_f32(lanes.as_mut_ptr(), sums) };
        // SAFETY: the caller's promise.
        unsafe { out.put_part(row, panel, lane, &lanes) };
    }
}
