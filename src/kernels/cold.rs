//! How do blocks lie below the device, where they may take less room?
//!
//! Either as on the device, or f16 as int8 with a scale for each token and head, in the very layout that a device of int8
//! has. Narrowing rounds; widening gives the nearest f16. What went down and up once goes down to the same codes again, so
//! that a conversation that is reloaded often loses no more than one that was reloaded once.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::attention::{BLOCK_TOKENS, KvLayout, code_of, extent, scale_of};
use super::isa::Isa;
use super::memory::Arena;
use crate::types::KvDtype;

#[cfg(target_arch = "x86_64")]
mod avx2;

/// The form of blocks on host and disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ColdForm {
    /// As on the device.
    Same,
    Int8(Int8Form),
}

/// What f16 blocks of one layout become.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Int8Form {
    /// Of the device.
    layout: KvLayout,
    isa: Isa,
}

impl ColdForm {
    /// Int8 below a device with this layout; `None` if that has another dtype than f16.
    pub fn int8(layout: KvLayout) -> Option<Self> {
        (layout.dtype == KvDtype::F16).then(|| Self::Int8(Int8Form { layout, isa: Isa::best() }))
    }

    /// Bytes of a block that has `device_bytes` on the device.
    pub fn block_bytes(self, device_bytes: usize) -> usize {
        match self {
            Self::Same => device_bytes,
            Self::Int8(form) => form.cold().block_bytes(),
        }
    }

    /// A digest that bytes of this form may be known by, of that of the device's.
    pub fn fingerprint(self, of_device: [u8; 32]) -> [u8; 32] {
        match self {
            Self::Same => of_device,
            Self::Int8(form) => {
                let mut hasher = blake3::Hasher::new();
                hasher.update(&of_device);
                hasher.update(&form.cold().version().to_le_bytes());
                *hasher.finalize().as_bytes()
            }
        }
    }

    /// Brings a block down from the device. Returns the CRC-32C of what is below now.
    pub fn offload(self, device: &Arena, from: u32, host: &Arena, to: u32) -> u32 {
        match self {
            Self::Same => host.copy_from(to, device, from),
            Self::Int8(form) => host.with_bytes_mut(to, |to| {
                form.narrow(device.bytes(from), to);
                crc_fast::crc32_iscsi(to)
            }),
        }
    }

    /// Brings a block up to the device. Returns the CRC-32C of what was below.
    pub fn reload(self, host: &Arena, from: u32, device: &Arena, to: u32) -> u32 {
        match self {
            Self::Same => device.copy_from(to, host, from),
            Self::Int8(form) => device.with_bytes_mut(to, |to| {
                form.widen(host.bytes(from), to);
                crc_fast::crc32_iscsi(host.bytes(from))
            }),
        }
    }

    /// The bytes of a device's block as they lie below; `room` is where they are made if they are others.
    pub fn narrow<'a>(self, device: &'a [u8], room: &'a mut Vec<u8>) -> &'a [u8] {
        match self {
            Self::Same => device,
            Self::Int8(form) => {
                room.resize(form.cold().block_bytes(), 0);
                form.narrow(device, room);
                room
            }
        }
    }

    /// Makes a device's block of the bytes of one below.
    pub fn widen(self, below: &[u8], device: &mut [u8]) {
        match self {
            Self::Same => device.copy_from_slice(below),
            Self::Int8(form) => form.widen(below, device),
        }
    }
}

impl Int8Form {
    fn cold(self) -> KvLayout {
        KvLayout { dtype: KvDtype::Int8, ..self.layout }
    }

    /// Numbers of a head's keys, or values, in a block.
    fn numbers(self) -> usize {
        BLOCK_TOKENS * self.layout.head_dim
    }

    /// Where the tokens are in the plane with this number of a block: beside one another in keys, which come first in a
    /// layer, and one after the other in values.
    fn order(self, plane: usize) -> Order {
        if (plane / self.layout.kv_heads).is_multiple_of(2) { Order::Keys } else { Order::Values }
    }

    fn narrow(self, device: &[u8], below: &mut [u8]) {
        let mut numbers = vec![0.0; self.numbers()];
        let halves = bytemuck::cast_slice::<u8, f16>(device).chunks_exact(numbers.len());
        let planes = halves.zip(below.chunks_exact_mut(self.cold().plane_bytes()));
        for (index, (halves, below)) in planes.enumerate() {
            let (codes, scales) = below.split_at_mut(numbers.len());
            let (codes, scales) = (bytemuck::cast_slice_mut(codes), bytemuck::cast_slice_mut(scales));
            let order = self.order(index);
            #[cfg(target_arch = "x86_64")]
            if self.isa.has_avx2() {
                // SAFETY: whoever chose the instructions checked for them.
                unsafe {
                    match order {
                        Order::Keys => avx2::narrow_keys(halves, codes, scales),
                        Order::Values => avx2::narrow_values(halves, codes, scales),
                    }
                }
                continue;
            }
            halves.convert_to_f32_slice(&mut numbers);
            match order {
                Order::Keys => narrow_keys(&numbers, codes, scales),
                Order::Values => narrow_values(&numbers, codes, scales),
            }
        }
    }

    fn widen(self, below: &[u8], device: &mut [u8]) {
        let mut numbers = vec![0.0; self.numbers()];
        let halves = bytemuck::cast_slice_mut::<u8, f16>(device).chunks_exact_mut(numbers.len());
        let planes = halves.zip(below.chunks_exact(self.cold().plane_bytes()));
        for (index, (halves, below)) in planes.enumerate() {
            let (codes, scales) = below.split_at(numbers.len());
            let (codes, scales) = (bytemuck::cast_slice(codes), bytemuck::cast_slice(scales));
            let order = self.order(index);
            #[cfg(target_arch = "x86_64")]
            if self.isa.has_avx2() {
                // SAFETY: as above.
                unsafe {
                    match order {
                        Order::Keys => avx2::widen_keys(codes, scales, halves),
                        Order::Values => avx2::widen_values(codes, scales, halves),
                    }
                }
                continue;
            }
            match order {
                Order::Keys => widen_keys(codes, scales, &mut numbers),
                Order::Values => widen_values(codes, scales, &mut numbers),
            }
            halves.convert_from_f32_slice(&numbers);
        }
    }
}

enum Order {
    /// `[head_dim][16]`.
    Keys,
    /// `[16][head_dim]`.
    Values,
}

fn narrow_keys(numbers: &[f32], codes: &mut [i8], scales: &mut [f16]) {
    let mut highest = [0.0_f32; BLOCK_TOKENS];
    for numbers in numbers.as_chunks::<BLOCK_TOKENS>().0 {
        highest.iter_mut().zip(numbers).for_each(|(highest, number)| *highest = extent(*number).max(*highest));
    }
    scales.iter_mut().zip(highest).for_each(|(scale, highest)| *scale = scale_of(highest));
    let mut divisors = [0.0; BLOCK_TOKENS];
    divisors.iter_mut().zip(scales).for_each(|(divisor, scale)| *divisor = scale.to_f32());
    let (numbers, codes) = (numbers.as_chunks::<BLOCK_TOKENS>().0, codes.as_chunks_mut::<BLOCK_TOKENS>().0);
    for (numbers, codes) in numbers.iter().zip(codes) {
        *codes = std::array::from_fn(|token| code_of(numbers[token] / divisors[token]));
    }
}

fn narrow_values(numbers: &[f32], codes: &mut [i8], scales: &mut [f16]) {
    let head_dim = numbers.len() / BLOCK_TOKENS;
    let tokens = numbers.chunks_exact(head_dim).zip(codes.chunks_exact_mut(head_dim));
    for ((numbers, codes), scale) in tokens.zip(scales) {
        // Eight side by side: heads are a multiple of that wide, and one maximum would wait for the other.
        let mut highest = [0.0_f32; 8];
        for numbers in numbers.as_chunks::<8>().0 {
            highest.iter_mut().zip(numbers).for_each(|(highest, number)| *highest = extent(*number).max(*highest));
        }
        *scale = scale_of(highest.into_iter().fold(0.0, f32::max));
        let divisor = scale.to_f32();
        codes.iter_mut().zip(numbers).for_each(|(code, number)| *code = code_of(number / divisor));
    }
}

fn widen_keys(codes: &[i8], scales: &[f16], numbers: &mut [f32]) {
    let mut factors = [0.0; BLOCK_TOKENS];
    factors.iter_mut().zip(scales).for_each(|(factor, scale)| *factor = scale.to_f32());
    let (numbers, codes) = (numbers.as_chunks_mut::<BLOCK_TOKENS>().0, codes.as_chunks::<BLOCK_TOKENS>().0);
    for (numbers, codes) in numbers.iter_mut().zip(codes) {
        *numbers = std::array::from_fn(|token| within_f16(f32::from(codes[token]) * factors[token]));
    }
}

fn widen_values(codes: &[i8], scales: &[f16], numbers: &mut [f32]) {
    let head_dim = numbers.len() / BLOCK_TOKENS;
    let tokens = numbers.chunks_exact_mut(head_dim).zip(codes.chunks_exact(head_dim));
    for ((numbers, codes), scale) in tokens.zip(scales) {
        let factor = scale.to_f32();
        numbers.iter_mut().zip(codes).for_each(|(number, code)| *number = within_f16(f32::from(*code) * factor));
    }
}

/// A scale that was rounded up may lead past the highest number.
#[inline(always)]
fn within_f16(number: f32) -> f32 {
    number.clamp(f16::MIN.to_f32(), f16::MAX.to_f32())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LAYOUT: KvLayout = KvLayout { layers: 2, kv_heads: 3, head_dim: 24, dtype: KvDtype::F16 };

    fn form() -> Int8Form {
        match ColdForm::int8(LAYOUT) {
            Some(ColdForm::Int8(form)) => form,
            other => panic!("{other:?}"),
        }
    }

    /// A block of numbers that are drawn around a size of each token's own.
    fn block(seed: u64, sizes: &[f32]) -> Vec<u8> {
        let mut state = seed;
        let mut halves = vec![f16::ZERO; LAYOUT.block_bytes() / 2];
        let numbers = form().numbers();
        for (plane, halves) in halves.chunks_exact_mut(numbers).enumerate() {
            for (index, half) in halves.iter_mut().enumerate() {
                let token = token_of(plane, index);
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let drawn = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
                *half = f16::from_f32((drawn * sizes[token % sizes.len()]).clamp(-65504.0, 65504.0));
            }
        }
        bytemuck::cast_slice(&halves).to_vec()
    }

    fn token_of(plane: usize, index: usize) -> usize {
        match form().order(plane) {
            Order::Keys => index % BLOCK_TOKENS,
            Order::Values => index / LAYOUT.head_dim,
        }
    }

    fn down(block: &[u8]) -> Vec<u8> {
        let mut below = vec![0; form().cold().block_bytes()];
        form().narrow(block, &mut below);
        below
    }

    fn up(below: &[u8]) -> Vec<u8> {
        let mut block = vec![0xff; LAYOUT.block_bytes()];
        form().widen(below, &mut block);
        block
    }

    proptest! {
        #[test]
        fn what_comes_back_is_within_half_a_step_of_each_tokens_highest(
            seed in any::<u64>(),
            sizes in proptest::collection::vec(0.01_f32..60_000.0, 16),
        ) {
            let before = block(seed, &sizes);
            let after = up(&down(&before));
            let planes = |block: &[u8]| -> Vec<f16> { bytemuck::cast_slice(block).to_vec() };
            let (before, after) = (planes(&before), planes(&after));
            let numbers = form().numbers();
            for (plane, (before, after)) in before.chunks_exact(numbers).zip(after.chunks_exact(numbers)).enumerate() {
                let mut highest = [0.0_f32; BLOCK_TOKENS];
                for (index, number) in before.iter().enumerate() {
                    let highest = &mut highest[token_of(plane, index)];
                    *highest = highest.max(number.to_f32().abs());
                }
                for (index, (before, after)) in before.iter().zip(after).enumerate() {
                    let highest = highest[token_of(plane, index)];
                    let off = (before.to_f32() - after.to_f32()).abs();
                    prop_assert!(off <= highest * (0.5 / 127.0 + 0.001), "{before} became {after} beside {highest}");
                }
            }
        }

        #[test]
        fn all_instructions_give_the_same_bytes(
            seed in any::<u64>(),
            sizes in proptest::collection::vec(0.0_f32..60_000.0, 16),
            odd in proptest::collection::vec((0..LAYOUT.block_bytes() / 2, any::<u16>()), 0..100),
            odd_codes in proptest::collection::vec((0..LAYOUT.block_bytes() / 2, any::<u8>()), 0..100),
        ) {
            let mut block = block(seed, &sizes);
            let halves: &mut [u16] = bytemuck::cast_slice_mut(&mut block);
            odd.into_iter().for_each(|(at, bits)| halves[at] = bits);
            let plain = Int8Form { isa: Isa::Scalar, ..form() };
            let (mut below, mut above) = (vec![0; plain.cold().block_bytes()], vec![0; LAYOUT.block_bytes()]);
            plain.narrow(&block, &mut below);
            let mut damaged = below.clone();
            odd_codes.into_iter().for_each(|(at, bits)| damaged[at] = bits);
            plain.widen(&damaged, &mut above);
            for isa in Isa::available() {
                let form = Int8Form { isa, ..form() };
                let (mut down, mut up) = (vec![1; below.len()], vec![1; above.len()]);
                form.narrow(&block, &mut down);
                prop_assert!(down == below, "{isa} narrows otherwise");
                form.widen(&damaged, &mut up);
                prop_assert!(up == above, "{isa} widens otherwise");
            }
        }

        #[test]
        fn what_went_down_once_goes_down_to_the_same_again(
            seed in any::<u64>(),
            sizes in proptest::collection::vec(0.1_f32..1000.0, 16),
        ) {
            let first = down(&block(seed, &sizes));
            let mut again = first.clone();
            for _ in 0..5 {
                again = down(&up(&again));
            }
            let (first, again) = (up(&first), up(&again));
            let halves = |block: &[u8]| -> Vec<f16> { bytemuck::cast_slice(block).to_vec() };
            for (first, again) in halves(&first).iter().zip(halves(&again)) {
                // A tie of the scale may fall to either side, once.
                prop_assert!((first.to_f32() - again.to_f32()).abs() <= first.to_f32().abs() * 0.002, "{first}, {again}");
            }
        }
    }

    #[test]
    fn what_is_no_number_spoils_itself_alone_and_the_highest_does_not_become_infinite() {
        let good = block(3, &[2.0]);
        let mut odd = good.clone();
        let halves: &mut [f16] = bytemuck::cast_slice_mut(&mut odd);
        (halves[0], halves[16], halves[32]) = (f16::NAN, f16::INFINITY, f16::MAX);
        let (good, odd) = (up(&down(&good)), up(&down(&odd)));
        let (good, odd): (&[f16], &[f16]) = (bytemuck::cast_slice(&good), bytemuck::cast_slice(&odd));
        assert_eq!((odd[0], odd[16], odd[32]), (f16::ZERO, f16::MAX, f16::MAX));
        for (index, (good, odd)) in good.iter().zip(odd).enumerate() {
            // The first token's keys of the first head have the highest number's scale.
            let spoilt = index < form().numbers() && token_of(0, index) == 0;
            assert!(spoilt || good == odd, "{index}: {good} became {odd}");
            assert!(odd.is_finite(), "{index}");
        }
    }

    #[test]
    fn a_block_goes_down_and_comes_up_through_arenas_and_its_sums_are_of_what_is_below() {
        let cold = ColdForm::int8(LAYOUT).unwrap();
        let device = Arena::new(2, LAYOUT.block_bytes()).unwrap();
        let host = Arena::new(1, cold.block_bytes(LAYOUT.block_bytes())).unwrap();
        let block = block(5, &[1.0]);
        device.with_bytes_mut(0, |bytes| bytes.copy_from_slice(&block));
        let down_sum = cold.offload(&device, 0, &host, 0);
        assert_eq!((down_sum, host.bytes(0)), (crc_fast::crc32_iscsi(&down(&block)), &down(&block)[..]));
        assert_eq!(cold.reload(&host, 0, &device, 1), down_sum);
        assert_eq!(device.bytes(1), up(&down(&block)));
        let mut room = Vec::new();
        assert_eq!(cold.narrow(&block, &mut room), host.bytes(0));
        let usual = KvLayout { head_dim: 64, ..LAYOUT };
        let bytes = ColdForm::int8(usual).unwrap().block_bytes(usual.block_bytes());
        assert!(bytes * 100 <= usual.block_bytes() * 53, "{bytes} of {}", usual.block_bytes());
        assert_ne!(cold.fingerprint([1; 32]), ColdForm::Same.fingerprint([1; 32]));
        assert_eq!(ColdForm::int8(KvLayout { dtype: KvDtype::Bf16, ..LAYOUT }), None);
    }
}
