//! Codes of a tile to 16-bit levels, laid out for the integer products of [`super::product`].

use super::lanes::{SideLanes, TierLanes};
use super::{LOW_STRIDE, MAX_TILE};
use crate::cpu::simd::Simd;

/// Levels of keys as `[pair of channels][tile]`, both channels of a pair in one 32-bit lane.
///
/// `rows[..n]` point at records; `n` is a multiple of 8, at most `tile`. The codes `ahead` bytes further on will be needed
/// next: asking for them here, a few rows at a time, spreads the waiting.
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
    ahead: usize,
) {
    for tier in lanes.tiers() {
        // SAFETY: `out` has room for every tier's pairs; the rest is the caller's promise.
        unsafe {
            let out = out.add(tier.first_pair * tile);
            match tier.bits {
                8 => tier_of_keys::<S, 8>(s, tier, rows, n, tile, out, low, ahead),
                4 => tier_of_keys::<S, 4>(s, tier, rows, n, tile, out, low, ahead),
                2 => tier_of_keys::<S, 2>(s, tier, rows, n, tile, out, low, ahead),
                3 => {
                    spread_low_bits::<3>(tier, rows, n, low);
                    tier_of_keys::<S, 3>(s, tier, rows, n, tile, out, low, ahead);
                }
                5 => {
                    spread_low_bits::<5>(tier, rows, n, low);
                    tier_of_keys::<S, 5>(s, tier, rows, n, tile, out, low, ahead);
                }
                _ => {
                    spread_low_bits::<6>(tier, rows, n, low);
                    tier_of_keys::<S, 6>(s, tier, rows, n, tile, out, low, ahead);
                }
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
    ahead: usize,
) {
    for tier in lanes.tiers() {
        // SAFETY: a tier's lanes lie within those of the side; the rest is the caller's promise.
        unsafe {
            let out = out.add(tier.first_lane);
            match tier.bits {
                8 => tier_of_values::<S, 8>(s, tier, rows, n, lanes.lanes, out, low, ahead),
                4 => tier_of_values::<S, 4>(s, tier, rows, n, lanes.lanes, out, low, ahead),
                2 => tier_of_values::<S, 2>(s, tier, rows, n, lanes.lanes, out, low, ahead),
                3 => {
                    spread_low_bits::<3>(tier, rows, n, low);
                    tier_of_values::<S, 3>(s, tier, rows, n, lanes.lanes, out, low, ahead);
                }
                5 => {
                    spread_low_bits::<5>(tier, rows, n, low);
                    tier_of_values::<S, 5>(s, tier, rows, n, lanes.lanes, out, low, ahead);
                }
                _ => {
                    spread_low_bits::<6>(tier, rows, n, low);
                    tier_of_values::<S, 6>(s, tier, rows, n, lanes.lanes, out, low, ahead);
                }
            }
        }
    }
}

/// Gives the plane of low bits the shape of the main plane: as many bytes, and the low bits of a code at the place of its
/// upper bits (3 bits: at bit 0 of each two; 5 and 6 bits: at bit 0 of each nibble). The low plane repeats to do so,
/// each copy shifted down by one code more.
#[inline(always)]
unsafe fn spread_low_bits<const BITS: u8>(tier: &TierLanes, rows: &[*const u8; MAX_TILE], n: usize, low: *mut u8) {
    let (copies, shift) = match BITS {
        3 => (2, 1),
        5 => (4, 1),
        _ => (2, 2),
    };
    let bytes = tier.low_bytes;
    for (key, row) in rows[..n].iter().enumerate() {
        // SAFETY: the plane lies within the record; its copies fill as much as the main plane of a tier of more than 2
        // bits, at most 128 bytes.
        unsafe {
            let (from, to) = (row.add(tier.low), low.add(key * LOW_STRIDE));
            let mut at = 0;
            while at + 8 <= bytes {
                let x = from.add(at).cast::<u64>().read_unaligned();
                for copy in 0..copies {
                    to.add(copy * bytes + at).cast::<u64>().write_unaligned(x >> (copy * shift));
                }
                at += 8;
            }
            while at + 2 <= bytes {
                let x = from.add(at).cast::<u16>().read_unaligned();
                for copy in 0..copies {
                    to.add(copy * bytes + at).cast::<u16>().write_unaligned(x >> (copy * shift));
                }
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
    /// Of a nibble, the low bits of a code, and the upper ones that choose among `fine` with them.
    below: S::I,
    above: S::I,
    byte: S::I,
}

impl<S: Simd, const BITS: u8> Fields<S, BITS> {
    /// Words of levels that one word of codes gives.
    const COUNT: usize = match BITS {
        8 => 2,
        2 | 3 => 8,
        _ => 4,
    };
    const HAS_LOW: bool = matches!(BITS, 3 | 5 | 6);

    #[inline(always)]
    fn new(s: S, tier: &TierLanes) -> Self {
        let below = if BITS == 6 { 0x3333_3333 } else { 0x1111_1111 };
        Self {
            tables: tier.tables.each_ref().map(|table| s.table(table)),
            nibble: s.splat_i(0x000f_000f),
            m66: s.splat_i(0x6666_6666),
            m11: s.splat_i(0x1111_1111),
            below: s.splat_i(below),
            above: s.splat_i(!below),
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
                2 => {
                    self.nibbles(s, self.tables[0], codes, out, stride);
                    self.nibbles(s, self.tables[1], codes, out.add(4 * stride), stride);
                }
                _ => self.sums(s, codes, s.or(s.and(codes, self.above), s.and(low, self.below)), out, stride),
            }
        }
    }

    /// Levels of 5 or 6 bits. Code 0 is worth 0, in the words' upper bytes too, and no sum carries.
    #[inline(always)]
    unsafe fn sums(&self, s: S, codes: S::I, index: S::I, out: *mut i32, stride: usize) {
        let [base, fine] = self.tables;
        let level = |code, index| s.add_i(s.lookup(base, code), s.lookup(fine, index));
        let masked = |code, index| level(s.and(code, self.nibble), s.and(index, self.nibble));
        // SAFETY: as for `write`.
        unsafe {
            s.store_i(out, masked(codes, index));
            s.store_i(out.add(stride), masked(s.shr16::<4>(codes), s.shr16::<4>(index)));
            s.store_i(out.add(2 * stride), masked(s.shr16::<8>(codes), s.shr16::<8>(index)));
            s.store_i(out.add(3 * stride), level(s.shr16::<12>(codes), s.shr16::<12>(index)));
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
    ahead: usize,
) {
    let fields = Fields::<S, BITS>::new(s, tier);
    for first in (0..n).step_by(8) {
        let planes: [*const u8; 8] = std::array::from_fn(|k| rows[first + k].wrapping_add(tier.main));
        let lows: [*const u8; 8] = std::array::from_fn(|k| low.wrapping_add((first + k) * LOW_STRIDE));
        planes.iter().for_each(|p| s.prefetch(p.wrapping_add(ahead)));
        let mut out = out.wrapping_add(first);
        let mut at = 0;
        // SAFETY: bytes `at ..` of the planes remain in each step; spread low bits are read in whole chunks of their
        // stride, which holds them all. Group g of the planes starts pair `g * COUNT` of `[pair][key]`.
        unsafe {
            while at + 16 <= tier.bytes {
                out = groups::<S, BITS, 16>(s, &fields, &planes, &lows, at, out, tile);
                at += 16;
            }
            match tier.bytes - at {
                4 => _ = groups::<S, BITS, 4>(s, &fields, &planes, &lows, at, out, tile),
                8 => _ = groups::<S, BITS, 8>(s, &fields, &planes, &lows, at, out, tile),
                12 => _ = groups::<S, BITS, 12>(s, &fields, &planes, &lows, at, out, tile),
                _ => {}
            }
        }
    }
}

/// Levels of `BYTES / 4` groups of eight rows; returns where the next go.
#[inline(always)]
unsafe fn groups<S: Simd, const BITS: u8, const BYTES: usize>(
    s: S,
    fields: &Fields<S, BITS>,
    planes: &[*const u8; 8],
    lows: &[*const u8; 8],
    at: usize,
    mut out: *mut i32,
    tile: usize,
) -> *mut i32 {
    // SAFETY: as in `tier_of_keys`.
    unsafe {
        let codes = transpose::<S, BYTES>(s, planes, at);
        let low = if Fields::<S, BITS>::HAS_LOW { transpose::<S, 16>(s, lows, at) } else { codes };
        for g in 0..BYTES / 4 {
            fields.write(s, codes[g], low[g], out, tile);
            out = out.add(Fields::<S, BITS>::COUNT * tile);
        }
    }
    out
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
    ahead: usize,
) {
    let fields = Fields::<S, BITS>::new(s, tier);
    for pair in 0..n / 2 {
        let (a, b) = (rows[2 * pair].wrapping_add(tier.main), rows[2 * pair + 1].wrapping_add(tier.main));
        s.prefetch(a.wrapping_add(ahead));
        s.prefetch(b.wrapping_add(ahead));
        let low = low.wrapping_add(2 * pair * LOW_STRIDE);
        let mut out = out.wrapping_add(pair * lanes);
        let mut at = 0;
        // SAFETY: as in `tier_of_keys`. Chunk c (16 bytes) of the planes starts lane `c * COUNT * 8` of the tier.
        unsafe {
            while at + 32 <= tier.bytes {
                // Words 0..4 and 8..12 of both rows, then 4..8 and 12..16: shuffles stay within half vectors.
                let (lo, hi) = interleave_32(s, a.add(at), b.add(at));
                let (low_lo, low_hi) = match Fields::<S, BITS>::HAS_LOW {
                    true => interleave_32(s, low.add(at), low.add(LOW_STRIDE + at)),
                    false => (lo, hi),
                };
                fields.write(s, lo, low_lo, out, 8);
                fields.write(s, hi, low_hi, out.add(8 * Fields::<S, BITS>::COUNT), 8);
                out = out.add(16 * Fields::<S, BITS>::COUNT);
                at += 32;
            }
            if at + 16 <= tier.bytes {
                out = chunk::<S, BITS, 16>(s, &fields, a.add(at), b.add(at), low.wrapping_add(at), out);
                at += 16;
            }
            let (a, b, low) = (a.wrapping_add(at), b.wrapping_add(at), low.wrapping_add(at));
            match tier.bytes - at {
                4 => _ = chunk::<S, BITS, 4>(s, &fields, a, b, low, out),
                8 => _ = chunk::<S, BITS, 8>(s, &fields, a, b, low, out),
                12 => _ = chunk::<S, BITS, 12>(s, &fields, a, b, low, out),
                _ => {}
            }
        }
    }
}

/// Levels of one chunk of a pair of rows; returns where the next go.
#[inline(always)]
unsafe fn chunk<S: Simd, const BITS: u8, const BYTES: usize>(
    s: S,
    fields: &Fields<S, BITS>,
    a: *const u8,
    b: *const u8,
    low: *const u8,
    out: *mut i32,
) -> *mut i32 {
    // SAFETY: as in `tier_of_values`.
    unsafe {
        let codes = interleave::<S, BYTES>(s, a, b);
        let low = match Fields::<S, BITS>::HAS_LOW {
            true => interleave::<S, 16>(s, low, low.add(LOW_STRIDE)),
            false => codes,
        };
        fields.write(s, codes, low, out, 8);
        out.add(8 * Fields::<S, BITS>::COUNT)
    }
}

#[inline(always)]
unsafe fn interleave_32<S: Simd>(s: S, a: *const u8, b: *const u8) -> (S::I, S::I) {
    // SAFETY: the caller has 32 bytes at both.
    let (a, b) = unsafe { (s.load_i(a.cast()), s.load_i(b.cast())) };
    (s.unpack_lo16(a, b), s.unpack_hi16(a, b))
}

#[inline(always)]
unsafe fn interleave<S: Simd, const BYTES: usize>(s: S, a: *const u8, b: *const u8) -> S::I {
    // SAFETY: the caller has BYTES bytes at both.
    unsafe { s.interleave16(s.load_h::<BYTES>(a), s.load_h::<BYTES>(b)) }
}
