//! The u16 row header: an f16 scale without its sign bit and with 7 of its 10 mantissa bits, then four bits of set id.

use half::f16;

const SCALE_MASK: u16 = 0xFFF0;
/// The largest finite scale, 65,280.
const LARGEST: u16 = 0xF7F0;

/// A header and whether the scale had to be cut to the largest one. `scale` is finite and not negative.
pub fn pack(scale: f32, set: u8) -> (u16, bool) {
    debug_assert!(scale >= 0.0 && set < 16);
    let half = u32::from(f16::from_f32(scale).to_bits());
    // Half of the last kept place, so that the cut rounds to nearest.
    let rounded = (half << 1) + 8;
    let saturates = rounded >= u32::from(LARGEST) + 16;
    (rounded.min(u32::from(LARGEST)) as u16 & SCALE_MASK | u16::from(set), saturates)
}

/// The next larger scale of the format than `header`'s, the set unchanged; the largest scale stays.
pub fn next_up(header: u16) -> u16 {
    if header & SCALE_MASK >= LARGEST { header } else { header + 16 }
}

pub fn scale(header: u16) -> f32 {
    f16::from_bits((header & SCALE_MASK) >> 1).to_f32()
}

pub fn set(header: u16) -> u8 {
    (header & 15) as u8
}

/// The same scale under another set id.
pub fn with_set(header: u16, set: u8) -> u16 {
    debug_assert!(set < 16);
    header & SCALE_MASK | u16::from(set)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rounds_to_nearest_and_keeps_the_set(s in 1e-4f32..6e4, id in 0u8..16) {
            let (h, saturates) = pack(s, id);
            prop_assert_eq!(set(h), id);
            prop_assert!(!saturates);
            // Half a place of seven bits, and half of one of f16's ten.
            prop_assert!((scale(h) - s).abs() <= s * (1.0 / 256.0 + 1.0 / 2048.0));
        }
    }

    #[test]
    fn zero_and_the_largest_are_exact() {
        assert_eq!((pack(0.0, 3), scale(3)), ((3, false), 0.0));
        assert_eq!(scale(pack(65_280.0, 0).0), 65_280.0);
        for huge in [65_500.0, 7e4, f32::MAX] {
            let (h, saturates) = pack(huge, 15);
            assert!(saturates && scale(h) == 65_280.0 && set(h) == 15);
            assert_eq!(next_up(h), h);
        }
    }

    #[test]
    fn next_up_is_the_neighbour() {
        let h = pack(1.0, 5).0;
        assert_eq!((scale(next_up(h)), set(next_up(h))), (1.0 + 1.0 / 128.0, 5));
    }
}
