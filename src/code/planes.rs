//! Codes of one row into and out of the bit planes of a record. See [`Plane`] for the order of bits.

use crate::shape::Plane;

/// Writes one head's `codes` (one byte each, all channels of the row) into a record. `record` is one slot.
pub fn pack(planes: &[Plane], head: usize, codes: &[u8], record: &mut [u8]) {
    for plane in planes {
        pack_head(plane, codes, &mut record[plane.of_head(head)]);
    }
}

/// Writes a head's part of one plane, `bytes`, from the codes of its row.
#[inline(always)]
pub fn pack_head(plane: &Plane, codes: &[u8], bytes: &mut [u8]) {
    let codes = &codes[plane.first..plane.first + plane.channels];
    match plane.bits {
        8 => pack_plane::<8>(bytes, codes, plane.shift),
        4 => pack_plane::<4>(bytes, codes, plane.shift),
        2 => pack_plane::<2>(bytes, codes, plane.shift),
        _ => pack_plane::<1>(bytes, codes, plane.shift),
    }
}

#[inline(always)]
fn pack_plane<const BITS: usize>(bytes: &mut [u8], codes: &[u8], shift: u8) {
    let mask = (0xFFu16 >> (8 - BITS)) as u8;
    let stride = bytes.len();
    bytes.fill(0);
    for k in 0..8 / BITS {
        for (byte, code) in bytes.iter_mut().zip(&codes[k * stride..(k + 1) * stride]) {
            *byte |= (code >> shift & mask) << (k * BITS);
        }
    }
}

/// Reads one head's codes out of a record: the inverse of [`pack`].
pub fn unpack(planes: &[Plane], head: usize, record: &[u8], codes: &mut [u8]) {
    codes.fill(0);
    for plane in planes {
        let bytes = &record[plane.of_head(head)];
        let mask = ((1u16 << plane.bits) - 1) as u8;
        for (j, byte) in bytes.iter().enumerate() {
            for k in 0..8 / plane.bits as usize {
                let part = byte >> (k * plane.bits as usize) & mask;
                codes[plane.first + j + k * plane.head_bytes] |= part << plane.shift;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::{Gauge, HEAD_DIMS, LayerShape, SideDesc};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_packed_comes_back(d in 0usize..6, plan in prop::sample::select(vec![2u32, 3, 4, 8]), seed: u64) {
            let d = HEAD_DIMS[d];
            let desc = SideDesc { head_dim: d, plan, gauge: Gauge::Rotation };
            let shape = LayerShape::new(2, 2, desc, desc).unwrap();
            let row = |salt: u64| -> Vec<u8> {
                (0..d as u64).map(|i| (xxhash_rust::xxh3::xxh3_64_with_seed(&i.to_le_bytes(), seed ^ salt) >> (64 - plan)) as u8).collect()
            };
            let rows = [row(1), row(2), row(3), row(4)];
            let mut record = vec![0xAA; shape.slot_bytes];
            for head in 0..2 {
                pack(&shape.k.planes, head, &rows[head], &mut record);
                pack(&shape.v.planes, head, &rows[2 + head], &mut record);
            }
            let mut back = vec![0; d];
            for head in 0..2 {
                unpack(&shape.k.planes, head, &record, &mut back);
                prop_assert_eq!(&back, &rows[head]);
                unpack(&shape.v.planes, head, &record, &mut back);
                prop_assert_eq!(&back, &rows[2 + head]);
            }
        }
    }
}
