//! Products of fours of bytes on vectors, for AVX-512 VNNI.
//!
//! A row of a left factor has its upper bytes in the first half of its stride and its lower ones in the second: what they
//! give is summed apart, and put together at the end. Three rows by four vectors of lanes keep 24 sums in registers, beside
//! the four of a depth's levels.

use std::arch::x86_64::*;

use super::engine::Tile;
use super::product::{Finish, Left, Outputs, Right};
use super::weigh::{Phases, Products, ROWS, Span, WIDTH, phases_of, put_scores};
use crate::cpu::simd::{LANES, avx512::Avx512};

/// Sums of rows `row..row + R` with lanes `lane..lane + 16 V`, from `start` on.
#[inline(always)]
unsafe fn sums<const R: usize, const V: usize>(a: Left, b: Right, row: usize, lane: usize, start: [i32; R]) -> [[__m512i; V]; R] {
    // SAFETY: rows and lanes are within the factors, by the caller; depth is theirs.
    unsafe {
        let (mut upper, mut lower) = ([[_mm512_setzero_si512(); V]; R], [[_mm512_setzero_si512(); V]; R]);
        for r in 0..R {
            lower[r] = [_mm512_set1_epi32(start[r]); V];
        }
        let left = a.data.add(row * a.stride);
        let mut right = b.data.add(lane);
        for depth in 0..a.depth / 2 {
            let mut levels = [_mm512_setzero_si512(); V];
            for (v, x) in levels.iter_mut().enumerate() {
                *x = _mm512_loadu_si512(right.add(v * WIDTH).cast());
            }
            for r in 0..R {
                let at = left.add(r * a.stride + depth);
                let (x, y) = (_mm512_set1_epi32(at.read()), _mm512_set1_epi32(at.add(a.stride / 2).read()));
                for v in 0..V {
                    upper[r][v] = _mm512_dpbusd_epi32(upper[r][v], levels[v], x);
                    lower[r][v] = _mm512_dpbusd_epi32(lower[r][v], levels[v], y);
                }
            }
            right = right.add(b.stride);
        }
        for r in 0..R {
            for v in 0..V {
                lower[r][v] = _mm512_add_epi32(_mm512_slli_epi32::<8>(upper[r][v]), lower[r][v]);
            }
        }
        lower
    }
}

/// See [`super::engine::Engine::weigh`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
pub unsafe fn weigh(tile: &Tile) {
    let products = Rows { next: 0 };
    // SAFETY: the caller's promise.
    unsafe {
        match tile.keys.lanes / WIDTH {
            1 => phases_of::<1>(tile, products),
            2 => phases_of::<2>(tile, products),
            3 => phases_of::<3>(tile, products),
            _ => phases_of::<4>(tile, products),
        }
    }
}

/// The rows of a tile, a block at a time.
struct Rows {
    next: usize,
}

/// Rows of a block: a multiple of those that [`sums`] takes together and of those of a softmax.
const BLOCK: usize = 12;
const _: () = assert!(BLOCK <= ROWS);

// SAFETY: blocks have at most BLOCK rows, what the tile has left of them; each is put by one call of `some_scores`.
unsafe impl Products for Rows {
    #[inline(always)]
    unsafe fn scores<const V: usize>(&mut self, tile: &Tile, phases: *mut Phases) -> Option<Span> {
        let first = self.next;
        let rows = BLOCK.min(tile.queries.rows - first);
        self.next += rows;
        let mut row = 0;
        while row < rows {
            // SAFETY: as many rows are left in each arm.
            row += unsafe {
                match rows - row {
                    1 => some_scores::<1, V>(tile, first, row, phases),
                    2 | 4 => some_scores::<2, V>(tile, first, row, phases),
                    _ => some_scores::<3, V>(tile, first, row, phases),
                }
            };
        }
        (rows > 0).then_some(Span { first, rows: 0..rows })
    }
}

/// `R` rows from `row` of the block on, which begins with row `first` of the tile; returns how many.
#[inline(always)]
unsafe fn some_scores<const R: usize, const V: usize>(tile: &Tile, first: usize, row: usize, phases: *mut Phases) -> usize {
    let at = first + row;
    // SAFETY: rows lie within the tile's arrays, and the block's within the phases.
    unsafe {
        let start = std::array::from_fn(|r| tile.start.add(at + r).read());
        let sums = sums::<R, V>(tile.queries, tile.keys, at, 0, start);
        for r in 0..R {
            put_scores(tile, sums[r], at + r, row + r, phases);
        }
    }
    R
}

/// See [`super::engine::Engine::weighed_outputs`]. Beside [`product`] for what three rows by four
/// vectors, and sums put sixteen at a time, gain: on an Emerald Rapids without AMX, 128 queries on 4096 keys take 4%
/// (head_dim 64 and 128) to 8% (256) less time.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub unsafe fn outputs(a: Left, b: Right, to: Outputs) {
    let mut row = 0;
    while row < a.rows {
        // SAFETY: as many rows are left in each arm.
        row += unsafe {
            match a.rows - row {
                1 => some_outputs::<1>(a, b, row, to),
                2 | 4 => some_outputs::<2>(a, b, row, to),
                _ => some_outputs::<3>(a, b, row, to),
            }
        };
    }
}

/// `R` rows by all lanes; returns how many.
#[inline(always)]
unsafe fn some_outputs<const R: usize>(a: Left, b: Right, row: usize, to: Outputs) -> usize {
    // SAFETY: rows and lanes lie within the factors and the result.
    unsafe {
        let start = std::array::from_fn(|r| start_of(to, row + r));
        let mut lane = 0;
        while lane + 4 * WIDTH <= b.lanes {
            put_outputs(to, row, lane, sums::<R, 4>(a, b, row, lane, start));
            lane += 4 * WIDTH;
        }
        while lane < b.lanes {
            put_outputs(to, row, lane, sums::<R, 1>(a, b, row, lane, start));
            lane += WIDTH;
        }
    }
    R
}

#[inline(always)]
unsafe fn put_outputs<const R: usize, const V: usize>(to: Outputs, row: usize, lane: usize, sums: [[__m512i; V]; R]) {
    for r in 0..R {
        // SAFETY: the caller's promise.
        unsafe { add_output(to, row + r, lane, sums[r]) };
    }
}

/// Where the sums of a row begin.
///
/// # Safety
/// `row` is one of the result's.
#[inline(always)]
pub unsafe fn start_of(to: Outputs, row: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { to.weights.add(row).read() }.wrapping_mul(-to.offset)
}

/// [`Finish::put`] of outputs, sixteen lanes at a time.
///
/// # Safety
/// Row and lanes are among the result's.
#[inline(always)]
pub unsafe fn add_output<const V: usize>(to: Outputs, row: usize, lane: usize, sums: [__m512i; V]) {
    // SAFETY: the caller's promise.
    unsafe {
        let step = _mm512_set1_ps(to.step.add(row).read());
        let keep = _mm512_set1_ps(to.keep.add(row).read());
        for v in 0..V {
            let at = to.out.add(row * to.stride + lane + v * WIDTH);
            let kept = _mm512_mul_ps(_mm512_loadu_ps(at), keep);
            _mm512_storeu_ps(at, _mm512_add_ps(kept, _mm512_mul_ps(_mm512_cvtepi32_ps(sums[v]), step)));
        }
    }
}

/// See [`super::product::product`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub unsafe fn product<'a, F: Finish<Avx512<'a>>>(s: Avx512<'a>, a: Left, b: Right, finish: F) {
    let mut row = 0;
    while row < a.rows {
        // SAFETY: `row + MR <= rows` in each arm.
        unsafe {
            row += match a.rows - row {
                1 => panel::<1, 4, F>(s, a, b, row, finish),
                2 => panel::<2, 4, F>(s, a, b, row, finish),
                3 => panel::<3, 4, F>(s, a, b, row, finish),
                4 | 7 | 8 => panel::<4, 2, F>(s, a, b, row, finish),
                5 => panel::<5, 2, F>(s, a, b, row, finish),
                _ => panel::<6, 2, F>(s, a, b, row, finish),
            };
        }
    }
}

/// `MR` rows by all lanes.
#[inline(always)]
unsafe fn panel<'a, const MR: usize, const NR: usize, F: Finish<Avx512<'a>>>(
    s: Avx512<'a>,
    a: Left,
    b: Right,
    row: usize,
    finish: F,
) -> usize {
    let mut lane = 0;
    // SAFETY: blocks stay below `lanes`, a multiple of 16.
    unsafe {
        while lane + 16 * NR <= b.lanes {
            block::<MR, NR, F>(s, a, b, row, lane, finish);
            lane += 16 * NR;
        }
        while lane < b.lanes {
            block::<MR, 1, F>(s, a, b, row, lane, finish);
            lane += 16;
        }
    }
    MR
}

/// `MR` rows by `16 NR` lanes.
#[inline(always)]
unsafe fn block<'a, const MR: usize, const NR: usize, F: Finish<Avx512<'a>>>(
    s: Avx512<'a>,
    a: Left,
    b: Right,
    row: usize,
    lane: usize,
    finish: F,
) {
    // SAFETY: rows and lanes are within the factors, by the caller.
    unsafe {
        let sums = sums::<MR, NR>(a, b, row, lane, std::array::from_fn(|r| finish.start(row + r)));
        for r in 0..MR {
            for n in 0..NR {
                let at = lane + n * WIDTH;
                finish.put(s, row + r, at, _mm512_castsi512_si256(sums[r][n]));
                finish.put(s, row + r, at + LANES, _mm512_extracti64x4_epi64::<1>(sums[r][n]));
            }
        }
    }
}
