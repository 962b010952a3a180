//! The products of [`super::vnni`] on AMX tiles: levels, folded queries and weights lie as there, which is also how tiles
//! want them. Sums are exact, and so the same.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::product::{Finish, Left, Right};
use crate::cpu::simd::LANES;
use crate::cpu::simd::amx::{self, ROW_BYTES, ROWS, Tiles};
use crate::cpu::simd::avx512::Avx512;

/// Lanes of a tile of sums.
const WIDTH: usize = 16;

/// `[upper or lower bytes, of lanes 0.. or 16..][row][lane]`.
#[repr(C, align(64))]
struct Sums([[[i32; WIDTH]; ROWS]; 4]);

/// See [`super::product::product`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
pub unsafe fn product<'a, F: Finish<Avx512<'a>>>(s: Avx512<'a>, tiles: &Tiles, a: Left, b: Right, finish: F) {
    let bytes = 2 * a.depth;
    let steps = (bytes.div_ceil(ROW_BYTES)..).find(|n| bytes % (4 * n) == 0).unwrap_or(bytes / 4);
    let depth = bytes / steps;
    // Blocks of even size; the last begins early where rows are left over, and takes some of the block before again.
    let rows = a.rows.div_ceil(a.rows.div_ceil(ROWS));
    tiles.shape(rows, depth);
    for first in (0..a.rows).step_by(rows) {
        let block = Block { s, a, b, row: first.min(a.rows - rows), first, rows, depth, steps };
        let mut lane = 0;
        // SAFETY: rows and lanes (a multiple of 16) lie within the factors, by the caller.
        unsafe {
            if steps == 1 {
                block.load_left(0);
            }
            while lane + 2 * WIDTH <= b.lanes {
                block.run::<true, F>(lane, finish);
                lane += 2 * WIDTH;
            }
            if lane < b.lanes {
                block.run::<false, F>(lane, finish);
            }
        }
    }
}

/// `rows` rows from `row` on, of which those from `first` on are wanted.
struct Block<'a> {
    s: Avx512<'a>,
    a: Left,
    b: Right,
    row: usize,
    first: usize,
    rows: usize,
    depth: usize,
    steps: usize,
}

impl<'a> Block<'a> {
    /// Upper and lower bytes of a step.
    #[inline(always)]
    unsafe fn load_left(&self, step: usize) {
        // SAFETY: tiles are shaped; a row of the left factor holds `2 * steps * depth` bytes.
        unsafe {
            let p = self.a.data.add(self.row * self.a.stride).cast::<u8>().add(step * self.depth);
            amx::load::<4>(p, 4 * self.a.stride);
            amx::load::<5>(p.add(self.steps * self.depth), 4 * self.a.stride);
        }
    }

    /// 32 lanes, or 16 unless `WIDE`.
    #[inline(always)]
    unsafe fn run<const WIDE: bool, F: Finish<Avx512<'a>>>(&self, lane: usize, finish: F) {
        let mut sums = MaybeUninit::<Sums>::uninit();
        // SAFETY: tiles are shaped for these rows and depth; a tile of sums has at most ROWS rows.
        unsafe {
            amx::zero::<0>();
            amx::zero::<1>();
            if WIDE {
                amx::zero::<2>();
                amx::zero::<3>();
            }
            for step in 0..self.steps {
                if self.steps > 1 {
                    self.load_left(step);
                }
                let right = self.b.data.add(step * self.depth / 4 * self.b.stride + lane);
                amx::load::<6>(right.cast(), 4 * self.b.stride);
                amx::multiply::<0, 4, 6>();
                amx::multiply::<1, 5, 6>();
                if WIDE {
                    amx::load::<7>(right.add(WIDTH).cast(), 4 * self.b.stride);
                    amx::multiply::<2, 4, 7>();
                    amx::multiply::<3, 5, 7>();
                }
            }
            let p = sums.as_mut_ptr().cast::<i32>();
            let plane = ROWS * WIDTH;
            amx::store::<0>(p, 4 * WIDTH);
            amx::store::<1>(p.add(plane), 4 * WIDTH);
            if WIDE {
                amx::store::<2>(p.add(2 * plane), 4 * WIDTH);
                amx::store::<3>(p.add(3 * plane), 4 * WIDTH);
            }
            for row in self.first..self.row + self.rows {
                let start = _mm512_set1_epi32(finish.start(row));
                for half in 0..1 + usize::from(WIDE) {
                    let p = p.add(2 * half * plane + (row - self.row) * WIDTH);
                    let (upper, lower) = (_mm512_load_si512(p.cast()), _mm512_load_si512(p.add(plane).cast()));
                    let sum = _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32::<8>(upper), lower), start);
                    let lane = lane + half * WIDTH;
                    finish.put(self.s, row, lane, _mm512_castsi512_si256(sum));
                    finish.put(self.s, row, lane + LANES, _mm512_extracti64x4_epi64::<1>(sum));
                }
            }
        }
    }
}
