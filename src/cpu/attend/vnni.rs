//! Levels and integers in fours of bytes, for AVX-512 VNNI and VBMI.
//!
//! `vpdpbusd` multiplies four unsigned bytes of each 32-bit lane, the levels, with four signed ones. Folded queries and
//! weights have 16 bits: two products with their upper and (signed) lower bytes give the same sum, and levels take half
//! the room that 16 bits do. `vpermb` looks levels up among 64, so that codes need no masking, and puts the bytes of four
//! rows side by side.

use std::arch::x86_64::*;

use super::engine::{Engine, Tile, by_rows};
use super::fold::ROUND;
use super::lanes::{SideLanes, TierLanes};
use super::product::{Finish, Left, Outputs, Right};
use super::row::{EXP2, Softmax, Weights, steps};
use super::{LOW_STRIDE, MAX_TILE, fours, tiles};
use crate::cpu::simd::avx512::Avx512;
use crate::shape::MAX_DIM;

type Rows = [*const u8; MAX_TILE];

// SAFETY of all blocks below: a value of `Avx512` exists only where its `new` found the instructions; memory is the
// caller's promise.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Engine for Avx512<'_> {
    #[inline(always)]
    fn key_order(self, lanes: &SideLanes, order: &mut [u16]) {
        lanes.key_quads(order);
    }

    #[inline(always)]
    fn value_order(self, lanes: &SideLanes, order: &mut [u16]) {
        lanes.value_bytes(order);
    }

    /// All upper bytes, then all lower ones, both signed: `256 * upper + lower`.
    #[inline(always)]
    unsafe fn put_query(self, levels: &[i32; MAX_DIM], order: &[u16], out: *mut i32) {
        let mut bytes = [[0u8; MAX_DIM]; 2];
        for at in (0..order.len()).step_by(16) {
            unsafe {
                let x = _mm512_loadu_si512(levels.as_ptr().add(at).cast());
                let upper = _mm512_srai_epi32::<8>(_mm512_add_epi32(x, _mm512_set1_epi32(128)));
                _mm_storeu_si128(bytes[0].as_mut_ptr().add(at).cast(), _mm512_cvtepi32_epi8(upper));
                _mm_storeu_si128(bytes[1].as_mut_ptr().add(at).cast(), _mm512_cvtepi32_epi8(x));
            }
        }
        // The channels of a four follow each other.
        for (i, four) in order.as_chunks::<4>().0.iter().enumerate() {
            let first = usize::from(four[0]) % MAX_DIM;
            for (half, bytes) in bytes.iter().enumerate() {
                let four = bytes[first..].first_chunk::<4>().map_or(0, |four| i32::from_ne_bytes(*four));
                unsafe { out.add(half * order.len() / 4 + i).write(four) };
            }
        }
    }

    /// `[four channels][tile]`.
    #[inline(always)]
    unsafe fn keys(
        self,
        lanes: &SideLanes,
        rows: &Rows,
        n: usize,
        tile: usize,
        out: *mut i32,
        low: *mut u8,
    ) {
        for tier in lanes.tiers() {
            unsafe {
                let out = out.add(tier.first_pair / 2 * tile);
                match tier.bits {
                    8 => tier_of_keys::<8>(tier, rows, n, tile, out, low),
                    6 => tier_of_keys::<6>(tier, rows, n, tile, out, low),
                    5 => tier_of_keys::<5>(tier, rows, n, tile, out, low),
                    4 => tier_of_keys::<4>(tier, rows, n, tile, out, low),
                    3 => tier_of_keys::<3>(tier, rows, n, tile, out, low),
                    _ => tier_of_keys::<2>(tier, rows, n, tile, out, low),
                }
            }
        }
    }

    /// `[four rows][lane]`.
    #[inline(always)]
    unsafe fn values(self, lanes: &SideLanes, rows: &Rows, n: usize, out: *mut i32, low: *mut u8) {
        for tier in lanes.tiers() {
            unsafe {
                let out = out.add(tier.first_lane);
                match tier.bits {
                    8 => tier_of_values::<8>(tier, rows, n, lanes.lanes, out, low),
                    6 => tier_of_values::<6>(tier, rows, n, lanes.lanes, out, low),
                    5 => tier_of_values::<5>(tier, rows, n, lanes.lanes, out, low),
                    4 => tier_of_values::<4>(tier, rows, n, lanes.lanes, out, low),
                    3 => tier_of_values::<3>(tier, rows, n, lanes.lanes, out, low),
                    _ => tier_of_values::<2>(tier, rows, n, lanes.lanes, out, low),
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn softmax(self, block: &mut Softmax, rows: usize) {
        by_rows!(rows, R => unsafe { softmax::<R>(block) })
    }

    /// All upper bytes of a row, then all lower ones.
    #[inline(always)]
    unsafe fn weights(self, w: Weights) {
        let mut row = 0;
        while row < w.rows {
            row += by_rows!(w.rows - row, R => unsafe { weights::<R>(w, row) });
        }
    }

    #[inline(always)]
    unsafe fn product(self, a: Left, b: Right, finish: impl Finish<Self>) {
        unsafe { fours::product(self, a, b, finish) }
    }

    const WEIGHS: bool = true;

    #[inline(always)]
    unsafe fn weigh(self, tile: &Tile) {
        unsafe {
            match self.1.filter(|_| tile.queries.rows >= tiles::LEAST_ROWS) {
                Some(tiles) => tiles::weigh(tiles, tile),
                None => fours::weigh(tile),
            }
        }
    }

    #[inline(always)]
    unsafe fn weighed_outputs(self, weights: Left, values: Right, to: Outputs) {
        unsafe {
            match self.1.filter(|_| weights.rows >= tiles::LEAST_ROWS) {
                Some(tiles) => tiles::outputs(tiles, weights, values, to),
                None => fours::outputs(weights, values, to),
            }
        }
    }
}

/// Codes to levels, a vector at a time.
struct Fields<const BITS: u8> {
    levels: __m512i,
    /// Where the upper bits stand once the code is put together.
    upper: __m512i,
    /// From one field's low bits to the next one's.
    step: __m512i,
}

impl<const BITS: u8> Fields<BITS> {
    /// Codes of a byte of the main plane.
    const COUNT: usize = match BITS {
        8 => 1,
        2 | 3 => 4,
        _ => 2,
    };
    const HAS_LOW: bool = matches!(BITS, 3 | 5 | 6);
    /// Low bits of a code.
    const LOW_BITS: u8 = if BITS == 6 { 2 } else { 1 };

    #[inline(always)]
    unsafe fn new(tier: &TierLanes) -> Self {
        let parts = if Self::HAS_LOW { (tier.bytes / tier.low_bytes) as u8 } else { 0 };
        // SAFETY: the caller's CPU has AVX-512 BW.
        unsafe {
            Self {
                levels: _mm512_loadu_si512(tier.levels.as_ptr().cast()),
                upper: _mm512_set1_epi8(match BITS {
                    3 => 0x06,
                    5 => 0x1e,
                    _ => 0x3c,
                }),
                step: _mm512_set1_epi8((parts * Self::LOW_BITS) as i8),
            }
        }
    }

    /// Writes field `f` to `out + f * stride`. `shifts` says for each byte where its first code's low bits stand in the
    /// quadword of `low`.
    #[inline(always)]
    unsafe fn write(&self, codes: __m512i, low: __m512i, shifts: __m512i, out: *mut i32, stride: usize) {
        // SAFETY: the caller leaves room for all fields and has the instructions.
        unsafe {
            let mut shifts = shifts;
            for f in 0..Self::COUNT {
                let level = match BITS {
                    8 => codes,
                    _ if !Self::HAS_LOW => {
                        let bits = (f * usize::from(BITS)) as u32;
                        _mm512_permutexvar_epi8(_mm512_srl_epi32(codes, count(bits)), self.levels)
                    }
                    _ => {
                        // The main plane's bits of the code to their place above the low bits.
                        let at = f as i32 * (8 / Self::COUNT as i32) - i32::from(Self::LOW_BITS);
                        let upper = match at {
                            at if at < 0 => _mm512_sll_epi32(codes, count(-at as u32)),
                            at => _mm512_srl_epi32(codes, count(at as u32)),
                        };
                        let low = _mm512_multishift_epi64_epi8(shifts, low);
                        shifts = _mm512_add_epi8(shifts, self.step);
                        // upper where the mask has ones, else low
                        let code = _mm512_ternarylogic_epi32::<0xca>(self.upper, upper, low);
                        _mm512_permutexvar_epi8(code, self.levels)
                    }
                };
                _mm512_storeu_si512(out.add(f * stride).cast(), level);
            }
        }
    }
}

#[inline(always)]
fn count(bits: u32) -> __m128i {
    // SAFETY: SSE2.
    unsafe { _mm_cvtsi32_si128(bits as i32) }
}

/// Low bits of the codes of 16 bytes of a main plane: where they are read, and how they get to their bytes.
struct Low {
    /// Offset in the row, of bytes that are readable `mask` at a time.
    at: usize,
    mask: u16,
    byte: [u8; 16],
    shift: [u8; 16],
}

impl Low {
    /// For bytes `at ..` of the main plane.
    #[inline(always)]
    fn new<const BITS: u8>(tier: &TierLanes, at: usize) -> Self {
        // Planes of 16 bytes and more repeat on multiples of 16, those of `doubled` aside.
        let start = if tier.low_bytes < 16 { 0 } else { at % tier.low_bytes };
        let n = tier.low_bytes.min(16);
        Self {
            at: start,
            mask: (0xffff_u32 >> (16 - n)) as u16,
            byte: std::array::from_fn(|i| if n < 16 { tier.low_byte[(at + i) % 64] } else { i as u8 }),
            shift: std::array::from_fn(|i| tier.low_part[(at + i) % 64] * Fields::<BITS>::LOW_BITS),
        }
    }
}

/// Planes of low bits that 16 bytes do not divide: twice in a row, at `low`, so that 16 can be read from any of them.
#[inline(always)]
unsafe fn doubled(tier: &TierLanes, rows: &Rows, n: usize, low: *mut u8) -> Option<Rows> {
    if tier.low_bytes <= 16 || tier.low_bytes % 16 == 0 {
        return None;
    }
    let mut out = [std::ptr::null(); MAX_TILE];
    for (key, row) in rows[..n].iter().enumerate() {
        // SAFETY: the plane lies within the record; twice a plane of low bits is less than LOW_STRIDE.
        unsafe {
            let to = low.add(key * LOW_STRIDE);
            for copy in 0..2 {
                std::ptr::copy_nonoverlapping(row.add(tier.low), to.add(copy * tier.low_bytes), tier.low_bytes);
            }
            out[key] = to;
        }
    }
    Some(out)
}

/// 16 bytes at `at` of rows `first`, `first + STEP` and so on, a row in each quarter. Only the bytes of `mask` are read if
/// `MASKED`.
#[inline(always)]
unsafe fn four_rows<const STEP: usize, const MASKED: bool>(rows: &Rows, first: usize, at: usize, mask: u16) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let load = |i: usize| {
            let p = rows[(first + i * STEP) % MAX_TILE].add(at);
            if MASKED { _mm_maskz_loadu_epi8(mask, p.cast()) } else { _mm_loadu_si128(p.cast()) }
        };
        let x = _mm512_castsi128_si512(load(0));
        let x = _mm512_inserti32x4::<1>(x, load(1));
        let x = _mm512_inserti32x4::<2>(x, load(2));
        _mm512_inserti32x4::<3>(x, load(3))
    }
}

/// Words of four vectors of four rows each, one vector per word and one lane per row.
#[inline(always)]
unsafe fn transpose(x: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: the caller's CPU has AVX-512 F.
    unsafe {
        let (a, b) = (_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpacklo_epi32(x[2], x[3]));
        let (c, d) = (_mm512_unpackhi_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[2], x[3]));
        [
            _mm512_unpacklo_epi64(a, b),
            _mm512_unpackhi_epi64(a, b),
            _mm512_unpacklo_epi64(c, d),
            _mm512_unpackhi_epi64(c, d),
        ]
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
unsafe fn tier_of_keys<const BITS: u8>(
    tier: &TierLanes,
    rows: &Rows,
    n: usize,
    tile: usize,
    out: *mut i32,
    low: *mut u8,
) {
    // SAFETY: rows are readable over their records, `out` has room for the tier's fours of channels.
    unsafe {
        let copies = if Fields::<BITS>::HAS_LOW { doubled(tier, rows, n, low) } else { None };
        let (low_rows, low_at) = copies.as_ref().map_or((rows, tier.low), |rows| (rows, 0));
        for at in (0..tier.bytes).step_by(16) {
            let out = out.add(at / 4 * Fields::<BITS>::COUNT * tile);
            match (tier.bytes - at) / 4 {
                1 => words_of_keys::<BITS, 1>(tier, rows, low_rows, low_at, n, at, tile, out),
                2 => words_of_keys::<BITS, 2>(tier, rows, low_rows, low_at, n, at, tile, out),
                3 => words_of_keys::<BITS, 3>(tier, rows, low_rows, low_at, n, at, tile, out),
                _ => words_of_keys::<BITS, 4>(tier, rows, low_rows, low_at, n, at, tile, out),
            }
        }
    }
}

/// `WORDS` words of four bytes, from byte `at` of the main plane on.
#[inline(always)]
unsafe fn words_of_keys<const BITS: u8, const WORDS: usize>(
    tier: &TierLanes,
    rows: &Rows,
    low_rows: &Rows,
    low_at: usize,
    n: usize,
    at: usize,
    tile: usize,
    out: *mut i32,
) {
    // SAFETY: as in `tier_of_keys`. A plane of keys may be read beyond its end: those of values follow, 16 bytes at least.
    unsafe {
        let fields = Fields::<BITS>::new(tier);
        let mut spread = _mm512_setzero_si512();
        let mut shifts = [_mm512_setzero_si512(); 4];
        let mut low_from = 0;
        if Fields::<BITS>::HAS_LOW {
            let low = Low::new::<BITS>(tier, at);
            low_from = low_at + low.at;
            spread = _mm512_broadcast_i32x4(_mm_loadu_si128(low.byte.as_ptr().cast()));
            for (w, shifts) in shifts.iter_mut().enumerate().take(WORDS) {
                let of_byte = |i: usize| (8 * i + usize::from(low.shift[4 * w + i])) as u64;
                let word = of_byte(0) | of_byte(1) << 8 | of_byte(2) << 16 | of_byte(3) << 24;
                *shifts = _mm512_set1_epi64((word | (word + 0x2020_2020) << 32) as i64);
            }
        }
        for first in (0..n).step_by(16) {
            let codes = transpose(std::array::from_fn(|j| four_rows::<4, false>(rows, first + j, tier.main + at, 0)));
            let low = if Fields::<BITS>::HAS_LOW {
                let bytes = |j| four_rows::<4, false>(low_rows, first + j, low_from, 0);
                transpose(std::array::from_fn(|j| _mm512_shuffle_epi8(bytes(j), spread)))
            } else {
                codes
            };
            for w in 0..WORDS {
                let out = out.add(w * Fields::<BITS>::COUNT * tile + first);
                fields.write(codes[w], low[w], shifts[w], out, tile);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
unsafe fn tier_of_values<const BITS: u8>(
    tier: &TierLanes,
    rows: &Rows,
    n: usize,
    lanes: usize,
    out: *mut i32,
    low: *mut u8,
) {
    // SAFETY: rows are readable over their records, `out` has room for the tier's lanes of every four rows.
    unsafe {
        let copies = if Fields::<BITS>::HAS_LOW { doubled(tier, rows, n, low) } else { None };
        let (low_rows, low_at) = copies.as_ref().map_or((rows, tier.low), |rows| (rows, 0));
        for at in (0..tier.bytes).step_by(16) {
            let out = out.add(at * Fields::<BITS>::COUNT);
            if tier.bytes - at >= 16 {
                chunk_of_values::<BITS, false>(tier, rows, low_rows, low_at, n, at, lanes, out);
            } else {
                chunk_of_values::<BITS, true>(tier, rows, low_rows, low_at, n, at, lanes, out);
            }
        }
    }
}

/// 16 bytes of the main plane, or what is left of it (`TAIL`).
#[inline(always)]
unsafe fn chunk_of_values<const BITS: u8, const TAIL: bool>(
    tier: &TierLanes,
    rows: &Rows,
    low_rows: &Rows,
    low_at: usize,
    n: usize,
    at: usize,
    lanes: usize,
    out: *mut i32,
) {
    // SAFETY: as in `tier_of_values`.
    unsafe {
        let fields = Fields::<BITS>::new(tier);
        // Byte i of each of the four rows to lane i.
        let side_by_side: [u8; 64] = std::array::from_fn(|at| (16 * (at % 4) + at / 4) as u8);
        let side_by_side = _mm512_loadu_si512(side_by_side.as_ptr().cast());
        let (mut spread, mut shifts) = (side_by_side, side_by_side);
        let (mut low_from, mut low_mask) = (0, 0);
        if Fields::<BITS>::HAS_LOW {
            let low = Low::new::<BITS>(tier, at);
            (low_from, low_mask) = (low_at + low.at, low.mask);
            let byte: [u8; 64] = std::array::from_fn(|at| 16 * (at as u8 % 4) + low.byte[at / 4]);
            spread = _mm512_loadu_si512(byte.as_ptr().cast());
            let shift: [u8; 64] = std::array::from_fn(|at| 8 * (at as u8 % 8) + low.shift[at / 4]);
            shifts = _mm512_loadu_si512(shift.as_ptr().cast());
        }
        let mask = (0xffff_u32 >> (16 - (tier.bytes - at).min(16))) as u16;
        for four in 0..n / 4 {
            let codes = four_rows::<1, TAIL>(rows, 4 * four, tier.main + at, mask);
            let codes = _mm512_permutexvar_epi8(side_by_side, codes);
            let low = if Fields::<BITS>::HAS_LOW {
                _mm512_permutexvar_epi8(spread, four_rows::<1, true>(low_rows, 4 * four, low_from, low_mask))
            } else {
                codes
            };
            fields.write(codes, low, shifts, out.add(four * lanes), 16);
        }
    }
}

/// [`super::row::exp2`] of 16 numbers.
#[inline(always)]
pub unsafe fn exp2(x: __m512) -> __m512 {
    // SAFETY: the caller's CPU has AVX-512 F.
    unsafe {
        let round = _mm512_set1_ps(ROUND);
        let shifted = _mm512_add_ps(x, round);
        let f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, round));
        let mut p = _mm512_set1_ps(EXP2[0]);
        for c in &EXP2[1..] {
            p = _mm512_add_ps(_mm512_mul_ps(p, f), _mm512_set1_ps(*c));
        }
        let whole = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
        let some = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(x, _mm512_set1_ps(-126.0));
        _mm512_castsi512_ps(_mm512_maskz_add_epi32(some, _mm512_castps_si512(p), whole))
    }
}

/// The larger of each two, the second where either is NaN, down to one.
#[inline(always)]
unsafe fn largest_of(x: __m512) -> f32 {
    // SAFETY: the caller's CPU has AVX-512 F and VL. No lane is NaN here, so that the order does not matter.
    unsafe {
        let x = _mm256_max_ps(_mm512_castps512_ps256(x), upper_floats(x));
        let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
    }
}

#[inline(always)]
pub unsafe fn upper_floats(x: __m512) -> __m256 {
    // SAFETY: the caller's CPU has AVX-512 F.
    unsafe { _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x))) }
}

/// [`super::row::softmax`] of `R` rows. Sums have sixteen lanes as there, added in the same order.
#[target_feature(enable = "avx2,avx512f,avx512vl")]
unsafe fn softmax<const R: usize>(block: &mut Softmax) {
    // SAFETY: scores and masks hold `n` floats a row, a multiple of 16.
    unsafe {
        let rows: [*mut f32; R] = std::array::from_fn(|r| block.scores.add(r * block.stride));
        let mut most: [__m512; R] = std::array::from_fn(|r| _mm512_set1_ps(block.before[r]));
        for at in (0..block.n).step_by(16) {
            for r in 0..R {
                let mut x = _mm512_loadu_ps(rows[r].add(at));
                if let Some(mask) = block.mask[r] {
                    x = _mm512_add_ps(x, _mm512_loadu_ps(mask.add(at)));
                    _mm512_storeu_ps(rows[r].add(at), x);
                }
                most[r] = _mm512_max_ps(x, most[r]);
            }
        }
        let mut growth = [0.0; 16];
        for r in 0..R {
            block.largest[r] = largest_of(most[r]);
            growth[r] = block.before[r] - block.largest[r];
        }
        let mut keep = [0.0; 16];
        _mm512_storeu_ps(keep.as_mut_ptr(), exp2(_mm512_loadu_ps(growth.as_ptr())));
        let mut sums = [_mm512_setzero_ps(); R];
        for at in (0..block.n).step_by(16) {
            for r in 0..R {
                let x = _mm512_sub_ps(_mm512_loadu_ps(rows[r].add(at)), _mm512_set1_ps(block.largest[r]));
                let p = exp2(x);
                _mm512_storeu_ps(rows[r].add(at), p);
                sums[r] = _mm512_add_ps(sums[r], p);
            }
        }
        for r in 0..R {
            if block.largest[r] > block.before[r] {
                block.keep[r] = keep[r];
            }
            let x = _mm256_add_ps(_mm512_castps512_ps256(sums[r]), upper_floats(sums[r]));
            // ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            block.sum[r] = _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
        }
    }
}

/// [`super::row::weights`] of `R` rows: the same integers, upper bytes in the first half of a row's stride, lower ones in the
/// second.
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
unsafe fn weights<const R: usize>(w: Weights, row: usize) -> usize {
    // SAFETY: `p` and `scale` hold `n` floats a row, a multiple of 16, and `out` `2 n` bytes.
    unsafe {
        let p: [*const f32; R] = std::array::from_fn(|r| w.p.add((row + r) * w.stride));
        let weight = |r: usize, at: usize, scale: __m512| _mm512_mul_ps(_mm512_loadu_ps(p[r].add(at)), scale);
        let mut most = [_mm512_setzero_ps(); R];
        for at in (0..w.n).step_by(16) {
            let scale = _mm512_loadu_ps(w.scale.add(at));
            for r in 0..R {
                most[r] = _mm512_max_ps(weight(r, at, scale), most[r]);
            }
        }
        let mut inverse = [_mm512_setzero_ps(); R];
        for r in 0..R {
            let (step, inverse_step) = steps(largest_of(most[r]));
            w.step.add(row + r).write(step);
            inverse[r] = _mm512_set1_ps(inverse_step);
        }
        let round = _mm512_set1_ps(ROUND);
        let mut sum = [_mm512_setzero_si512(); R];
        for at in (0..w.n).step_by(16) {
            let scale = _mm512_loadu_ps(w.scale.add(at));
            for r in 0..R {
                let out = w.out.add((row + r) * w.stride).cast::<i8>();
                let x = _mm512_add_ps(_mm512_mul_ps(weight(r, at, scale), inverse[r]), round);
                let x = _mm512_sub_epi32(_mm512_castps_si512(x), _mm512_castps_si512(round));
                sum[r] = _mm512_add_epi32(sum[r], x);
                let upper = _mm512_srai_epi32::<8>(_mm512_add_epi32(x, _mm512_set1_epi32(128)));
                _mm_storeu_si128(out.add(at).cast(), _mm512_cvtepi32_epi8(upper));
                _mm_storeu_si128(out.add(w.stride + at).cast(), _mm512_cvtepi32_epi8(x));
            }
        }
        for r in 0..R {
            w.sum.add(row + r).write(_mm512_reduce_add_epi32(sum[r]));
        }
    }
    R
}

