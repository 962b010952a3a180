//! Codes of a tile to 16-bit levels, laid out for the integer products of [`super::product`].

use super::lanes::{SideLanes, TierLanes};
use super::{LOW_STRIDE, MAX_TILE};
use crate::cpu::simd::Simd;

/// Levels of keys as `[pair of channels][tile]`, both channels of a pair in one 32-bit lane.
///
/// `rows[..n]` point at records; `n` is a multiple of 8, at most `tile`.
///
/// # Safety
/// Every row is readable over its record. `out` has room for `head_dim / 2 * tile` lanes, `low` for
/// `MAX_TILE * LOW_STRIDE` bytes.
#[inline(always)]
pub unsafe fn keys<S: Simd>(
    s: S,
    lanes: &SideLanes,
    rows: &[*const u8; MAX_TILE],
    n: usize,
    tile: usize,
    out: *mut i32,
    low: *mut u8,
) {
    for tier in lanes.tiers() {
        // SAFETY: `out` has room for every tier's pairs; the rest is the caller's promise.
        unsafe {
            let out = out.add(tier.first_pair * tile);
            match tier.bits {
                8 => tier_of_keys::<S, 8>(s, tier, rows, n, tile, out, low),
                4 => tier_of_keys::<S, 4>(s, tier, rows, n, tile, out, low),
                3 => {
                    spread_low_bits(tier, rows, n, low);
                    tier_of_keys::<S, 3>(s, tier, rows, n, tile, out, low);
                }
                _ => tier_of_keys::<S, 2>(s, tier, rows, n, tile, out, low),
            }
        }
    }
}

/// Levels of values as `[pair of rows][lane]`, both rows' levels in one 32-bit lane. `n` is even.
///
/// # Safety
/// As for [`keys`], with room for `n / 2 * lanes.lanes` lanes in `out`.
#[inline(always)]
pub unsafe fn values<S: Simd>(
    s: S,
    lanes: &SideLanes,
    rows: &[*const u8; MAX_TILE],
    n: usize,
    out: *mut i32,
    low: *mut u8,
) {
    for tier in lanes.tiers() {
        // SAFETY: a tier's lanes lie within those of the side; the rest is the caller's promise.
        unsafe {
            let out = out.add(tier.first_lane);
            match tier.bits {
                8 => tier_of_values::<S, 8>(s, tier, rows, n, lanes.lanes, out, low),
                4 => tier_of_values::<S, 4>(s, tier, rows, n, lanes.lanes, out, low),
                3 => {
                    spread_low_bits(tier, rows, n, low);
                    tier_of_values::<S, 3>(s, tier, rows, n, lanes.lanes, out, low);
                }
                _ => tier_of_values::<S, 2>(s, tier, rows, n, lanes.lanes, out, low),
            }
        }
    }
}

/// Gives the 1-bit plane the shape of the 2-bit plane above it: byte `j` holds, at bit `2 k`, the low bit of the channel
/// whose upper bits stand at bits `2 k` of byte `j` there. The plane of half as many bytes is followed by itself
/// shifted down by one.
#[inline(always)]
unsafe fn spread_low_bits(tier: &TierLanes, rows: &[*const u8; MAX_TILE], n: usize, low: *mut u8) {
    let bytes = tier.low_bytes;
    for (key, row) in rows[..n].iter().enumerate() {
        // SAFETY: the plane lies within the record; two copies of at most 32 bytes fit a stride.
        unsafe {
            let (from, to) = (row.add(tier.low), low.add(key * LOW_STRIDE));
            let mut at = 0;
            while at + 8 <= bytes {
                let x = from.add(at).cast::<u64>().read_unaligned();
                to.add(at).cast::<u64>().write_unaligned(x);
                to.add(bytes + at).cast::<u64>().write_unaligned(x >> 1);
                at += 8;
            }
            while at + 2 <= bytes {
                let x = from.add(at).cast::<u16>().read_unaligned();
                to.add(at).cast::<u16>().write_unaligned(x);
                to.add(bytes + at).cast::<u16>().write_unaligned(x >> 1);
                at += 2;
            }
        }
    }
}

/// The unfolding proper: one vector of code words to `fields` vectors of levels.
#[derive(Clone, Copy)]
struct Fields<S: Simd, const BITS: u8> {
    tables: [S::I; 2],
    nibble: S::I,
    m66: S::I,
    m11: S::I,
    byte: S::I,
}

impl<S: Simd, const BITS: u8> Fields<S, BITS> {
    #[inline(always)]
    fn new(s: S, tier: &TierLanes) -> Self {
        Self {
            tables: [s.table(&tier.tables[0]), s.table(&tier.tables[1])],
            nibble: s.splat_i(0x000f_000f),
            m66: s.splat_i(0x6666_6666),
            m11: s.splat_i(0x1111_1111),
            byte: s.splat_i(0x00ff_00ff),
        }
    }

    /// Writes field `f` to `out + f * stride`.
    #[inline(always)]
    unsafe fn write(&self, s: S, codes: S::I, low: S::I, out: *mut i32, stride: usize) {
        // SAFETY: the caller leaves room for all fields.
        unsafe {
            match BITS {
                8 => {
                    s.store_i(out, s.and(codes, self.byte));
                    s.store_i(out.add(stride), s.shr16::<8>(codes));
                }
                4 => self.nibbles(s, self.tables[0], codes, out, stride),
                3 => {
                    // Codes of three bits in nibbles: even ones, then odd ones.
                    let even = s.or(s.and(s.shl16::<1>(codes), self.m66), s.and(low, self.m11));
                    let odd = s.or(s.and(s.shr16::<1>(codes), self.m66), s.and(s.shr16::<2>(low), self.m11));
                    self.nibbles(s, self.tables[0], even, out, stride);
                    self.nibbles(s, self.tables[0], odd, out.add(4 * stride), stride);
                }
                _ => {
                    self.nibbles(s, self.tables[0], codes, out, stride);
                    self.nibbles(s, self.tables[1], codes, out.add(4 * stride), stride);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn nibbles(&self, s: S, table: S::I, x: S::I, out: *mut i32, stride: usize) {
        // SAFETY: as for `write`.
        unsafe {
            s.store_i(out, s.lookup(table, s.and(x, self.nibble)));
            s.store_i(out.add(stride), s.lookup(table, s.and(s.shr16::<4>(x), self.nibble)));
            s.store_i(out.add(2 * stride), s.lookup(table, s.and(s.shr16::<8>(x), self.nibble)));
            s.store_i(out.add(3 * stride), s.lookup(table, s.shr16::<12>(x)));
        }
    }
}

#[inline(always)]
unsafe fn tier_of_keys<S: Simd, const BITS: u8>(
    s: S,
    tier: &TierLanes,
    rows: &[*const u8; MAX_TILE],
    n: usize,
    tile: usize,
    out: *mut i32,
    low: *const u8,
) {
    let fields = Fields::<S, BITS>::new(s, tier);
    for first in (0..n).step_by(8) {
        let planes: [*const u8; 8] = std::array::from_fn(|k| rows[first + k].wrapping_add(tier.main));
        let lows: [*const u8; 8] = std::array::from_fn(|k| low.wrapping_add((first + k) * LOW_STRIDE));
        let mut at = 0;
        while at < tier.bytes {
            let left = tier.bytes - at;
            // SAFETY: `left` bytes of the plane remain; spread low bits are read in whole chunks of their stride, which
            // holds them all.
            unsafe {
                let (codes, groups) = match left {
                    16.. => (transpose::<S, 16>(s, &planes, at), 4),
                    8.. => (transpose::<S, 8>(s, &planes, at), 2),
                    _ => (transpose::<S, 4>(s, &planes, at), 1),
                };
                let low = if BITS == 3 { transpose::<S, 16>(s, &lows, at) } else { codes };
                for g in 0..groups {
                    // [pair][key]: group g of this chunk starts pair (at / 4 + g) * fields.
                    let out = out.add((at / 4 + g) * tier.fields * tile + first);
                    fields.write(s, codes[g], low[g], out, tile);
                }
            }
            at += 16;
        }
    }
}

/// 32-bit groups `at / 4 ..` of eight rows: one vector per group, one lane per row.
#[inline(always)]
unsafe fn transpose<S: Simd, const BYTES: usize>(s: S, rows: &[*const u8; 8], at: usize) -> [S::I; 4] {
    // SAFETY: the caller has BYTES bytes at `at` in every row.
    let half = |k: usize| unsafe { s.load_h::<BYTES>(rows[k].add(at)) };
    let x = [
        s.join(half(0), half(4)),
        s.join(half(1), half(5)),
        s.join(half(2), half(6)),
        s.join(half(3), half(7)),
    ];
    let (a, b) = (s.unpack_lo32(x[0], x[1]), s.unpack_lo32(x[2], x[3]));
    let (c, d) = (s.unpack_hi32(x[0], x[1]), s.unpack_hi32(x[2], x[3]));
    [s.unpack_lo64(a, b), s.unpack_hi64(a, b), s.unpack_lo64(c, d), s.unpack_hi64(c, d)]
}

#[inline(always)]
unsafe fn tier_of_values<S: Simd, const BITS: u8>(
    s: S,
    tier: &TierLanes,
    rows: &[*const u8; MAX_TILE],
    n: usize,
    lanes: usize,
    out: *mut i32,
    low: *const u8,
) {
    let fields = Fields::<S, BITS>::new(s, tier);
    for pair in 0..n / 2 {
        let (a, b) = (rows[2 * pair].wrapping_add(tier.main), rows[2 * pair + 1].wrapping_add(tier.main));
        let low = low.wrapping_add(2 * pair * LOW_STRIDE);
        let mut at = 0;
        while at < tier.bytes {
            let left = tier.bytes - at;
            // SAFETY: `left` bytes of the planes remain; low bits as in `tier_of_keys`.
            unsafe {
                let codes = match left {
                    16.. => interleave::<S, 16>(s, a.add(at), b.add(at)),
                    8.. => interleave::<S, 8>(s, a.add(at), b.add(at)),
                    _ => interleave::<S, 4>(s, a.add(at), b.add(at)),
                };
                let low = match BITS {
                    3 => interleave::<S, 16>(s, low.add(at), low.add(LOW_STRIDE + at)),
                    _ => codes,
                };
                // [pair][lane]: this chunk starts lane at / 16 * fields * 8 of the tier.
                fields.write(s, codes, low, out.add(pair * lanes + at / 2 * tier.fields), 8);
            }
            at += 16;
        }
    }
}

#[inline(always)]
unsafe fn interleave<S: Simd, const BYTES: usize>(s: S, a: *const u8, b: *const u8) -> S::I {
    // SAFETY: the caller has BYTES bytes at both.
    unsafe { s.interleave16(s.load_h::<BYTES>(a), s.load_h::<BYTES>(b)) }
}
