//! What does a product of quantised weights and rows compute? The plain form, which the others equal bit for bit.

use std::ops::Range;

use super::super::activations::Tile;
use super::super::{Out, PANEL};
use super::{BLOCK, Form, Panels};

/// Rows of a tile: more would gain nothing here.
pub const TILE: usize = 4;

/// As `Kernel` says.
///
/// # Safety
/// As `Kernel`, but that every machine has the instructions.
pub unsafe fn multiply(panels: &Panels, range: Range<usize>, tile: &Tile<'_>, out: &Out) {
    for panel in range {
        for row in 0..tile.rows {
            let mut sums = [0.0; PANEL];
            for (lane, sum) in sums.iter_mut().enumerate() {
                for block in 0..panels.blocks {
                    *sum = add_block(panels, panel * panels.blocks + block, lane, tile, row, block, *sum);
                }
            }
            // SAFETY: the caller's promise.
            unsafe { out.put(row, panel, &sums) };
        }
    }
}

/// Adds the product of one block. Whole numbers are multiplied and added exactly, then scaled, first by the row's scale.
fn add_block(panels: &Panels, at: usize, lane: usize, tile: &Tile<'_>, row: usize, block: usize, sum: f32) -> f32 {
    let place = block * tile.rows + row;
    let products = (0..BLOCK).map(|column| {
        let quant = panels.quant(at, lane, column) + i32::from(panels.form.zero());
        quant * i32::from(tile.quant(row, block, column))
    });
    let dot = products.sum::<i32>() as f32;
    let scaled = match panels.form {
        // The zero is taken out here, with the sum that the quantiser kept.
        Form::Four | Form::Five => dot.mul_add(tile.scales[place], f32::from(panels.form.zero()) * -tile.sums[place]),
        Form::Eight | Form::FourAffine | Form::FiveAffine => dot * tile.scales[place],
    };
    let sum = scaled.mul_add(panels.scales[at][lane].to_f32(), sum);
    if panels.form.is_affine() { panels.mins[at][lane].to_f32().mul_add(tile.sums[place], sum) } else { sum }
}
