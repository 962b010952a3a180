//! The products of [`super::fours`] on AMX tiles, for blocks of many rows. Levels, folded queries and weights lie as
//! [`super::vnni`] puts them, which is also how tiles want them. Sums are exact, and so the same.
//!
//! The next block's products run beside what [`super::weigh`] does with the last one's.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::MAX_TILE;
use super::engine::Tile;
use super::fours::{add_output, start_of};
use super::product::{Left, Outputs, Right};
use super::weigh::{Phases, Products, Span, WIDTH, phases_of, put_scores};
use crate::cpu::simd::amx::{self, ROW_BYTES, ROWS, Tiles};

/// Fewest rows for which tiles are faster than vectors.
pub const LEAST_ROWS: usize = 8;

/// `[lanes / 16][upper or lower bytes][row][16]`.
#[repr(C, align(64))]
struct Sums([[[[i32; WIDTH]; ROWS]; 2]; MAX_TILE / WIDTH]);

/// Some rows of a left factor, `depth` bytes at a time.
struct Block {
    a: Left,
    /// First row in the tiles, and the first that is wanted.
    row: usize,
    wanted: usize,
    rows: usize,
    /// Bytes of a row's upper half.
    half: usize,
    depth: usize,
}

/// Blocks of the rows of `a`, of even size; the last begins early where rows are left over, and has some twice.
#[inline(always)]
fn blocks(tiles: &Tiles, a: Left) -> impl Iterator<Item = Block> {
    let half = 2 * a.depth;
    let steps = (half.div_ceil(ROW_BYTES)..).find(|n| half % (4 * n) == 0).unwrap_or(1);
    let rows = a.rows.div_ceil(a.rows.div_ceil(ROWS));
    let depth = half / steps;
    tiles.shape(rows, depth);
    (0..a.rows).step_by(rows).map(move |wanted| {
        let row = wanted.min(a.rows - rows);
        Block { a, row, wanted, rows, half, depth }
    })
}

impl Block {
    /// Products with lanes `lane..` of `b`, 32 of them or 16 unless `WIDE`, to the first two entries of `out`.
    #[inline(always)]
    unsafe fn multiply<const WIDE: bool>(&self, b: Right, lane: usize, out: *mut i32) {
        // SAFETY: tiles are shaped for these rows and depth; rows, lanes and bytes lie within the factors.
        unsafe {
            amx::zero::<0>();
            amx::zero::<1>();
            if WIDE {
                amx::zero::<2>();
                amx::zero::<3>();
            }
            for at in (0..self.half).step_by(self.depth) {
                let left = self.a.data.add(self.row * self.a.stride).cast::<u8>().add(at);
                let right = b.data.add(at / 4 * b.stride + lane);
                amx::load::<4>(left, 4 * self.a.stride);
                amx::load::<6>(right.cast(), 4 * b.stride);
                amx::multiply::<0, 4, 6>();
                amx::load::<5>(left.add(self.half), 4 * self.a.stride);
                amx::multiply::<1, 5, 6>();
                if WIDE {
                    amx::load::<7>(right.add(WIDTH).cast(), 4 * b.stride);
                    amx::multiply::<2, 4, 7>();
                    amx::multiply::<3, 5, 7>();
                }
            }
            let plane = ROWS * WIDTH;
            amx::store::<0>(out, 4 * WIDTH);
            amx::store::<1>(out.add(plane), 4 * WIDTH);
            if WIDE {
                amx::store::<2>(out.add(2 * plane), 4 * WIDTH);
                amx::store::<3>(out.add(3 * plane), 4 * WIDTH);
            }
        }
    }

    /// Products with the first `16 V` lanes of `b`.
    #[inline(always)]
    unsafe fn multiply_all<const V: usize>(&self, b: Right, out: *mut i32) {
        // SAFETY: as in `multiply`.
        unsafe {
            for v in (0..V - V % 2).step_by(2) {
                self.multiply::<true>(b, v * WIDTH, out.add(2 * v * ROWS * WIDTH));
            }
            if V % 2 == 1 {
                self.multiply::<false>(b, (V - 1) * WIDTH, out.add(2 * (V - 1) * ROWS * WIDTH));
            }
        }
    }
}

/// Sum `v` of a row of `Sums`.
#[inline(always)]
unsafe fn sum(sums: *const i32, row: usize, v: usize, start: i32) -> __m512i {
    // SAFETY: within `Sums`, by the caller.
    unsafe {
        let p = sums.add((2 * v * ROWS + row) * WIDTH);
        let (upper, lower) = (_mm512_load_si512(p.cast()), _mm512_load_si512(p.add(ROWS * WIDTH).cast()));
        _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32::<8>(upper), lower), _mm512_set1_epi32(start))
    }
}

/// See [`super::engine::Engine::weighed_outputs`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
pub unsafe fn outputs(tiles: &Tiles, a: Left, b: Right, to: Outputs) {
    let mut sums = MaybeUninit::<Sums>::uninit();
    let sums = sums.as_mut_ptr().cast::<i32>();
    // Weights beyond the keys are zeros: no other shape for the last few.
    for block in blocks(tiles, Left { depth: a.stride, ..a }) {
        for lane in (0..b.lanes).step_by(MAX_TILE) {
            // SAFETY: rows and lanes (a multiple of 16) lie within the factors and the result.
            unsafe {
                match (b.lanes - lane) / WIDTH {
                    1 => some_outputs::<1>(&block, b, lane, to, sums),
                    2 => some_outputs::<2>(&block, b, lane, to, sums),
                    3 => some_outputs::<3>(&block, b, lane, to, sums),
                    _ => some_outputs::<4>(&block, b, lane, to, sums),
                }
            }
        }
    }
}

/// `16 V` lanes from `lane` on.
#[inline(always)]
unsafe fn some_outputs<const V: usize>(block: &Block, b: Right, lane: usize, to: Outputs, sums: *mut i32) {
    // SAFETY: as in `outputs`.
    unsafe {
        block.multiply_all::<V>(Right { data: b.data.add(lane), ..b }, sums);
        for row in block.wanted..block.row + block.rows {
            let start = start_of(to, row);
            add_output(to, row, lane, std::array::from_fn::<_, V, _>(|v| sum(sums, row - block.row, v, start)));
        }
    }
}

/// See [`super::engine::Engine::weigh`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
pub unsafe fn weigh(tiles: &Tiles, tile: &Tile) {
    // SAFETY: the caller's promise.
    unsafe {
        match tile.keys.lanes / WIDTH {
            1 => phases_of::<1>(tile, Ahead::new::<1>(tiles, tile, &mut MaybeUninit::uninit())),
            2 => phases_of::<2>(tile, Ahead::new::<2>(tiles, tile, &mut MaybeUninit::uninit())),
            3 => phases_of::<3>(tile, Ahead::new::<3>(tiles, tile, &mut MaybeUninit::uninit())),
            _ => phases_of::<4>(tile, Ahead::new::<4>(tiles, tile, &mut MaybeUninit::uninit())),
        }
    }
}

/// Products of a block ahead of what is done with them.
struct Ahead<B> {
    blocks: B,
    next: Option<Block>,
    sums: *mut i32,
}

impl Ahead<()> {
    #[inline(always)]
    unsafe fn new<const V: usize>(
        tiles: &Tiles,
        tile: &Tile,
        sums: &mut MaybeUninit<Sums>,
    ) -> Ahead<impl Iterator<Item = Block>> {
        let mut out = Ahead { blocks: blocks(tiles, tile.queries), next: None, sums: sums.as_mut_ptr().cast() };
        // SAFETY: rows and lanes lie within the tile's factors.
        unsafe { out.multiply::<V>(tile) };
        out
    }
}

impl<B: Iterator<Item = Block>> Ahead<B> {
    #[inline(always)]
    unsafe fn multiply<const V: usize>(&mut self, tile: &Tile) {
        self.next = self.blocks.next();
        if let Some(block) = &self.next {
            // SAFETY: as in `new`.
            unsafe { block.multiply_all::<V>(tile.keys, self.sums) };
        }
    }
}

// SAFETY: [`blocks`] are at most ROWS rows of the queries, some of them wanted; each of those is put.
unsafe impl<B: Iterator<Item = Block>> Products for Ahead<B> {
    #[inline(always)]
    unsafe fn scores<const V: usize>(&mut self, tile: &Tile, phases: *mut Phases) -> Option<Span> {
        let block = self.next.take()?;
        let span = Span { first: block.row, rows: block.wanted - block.row..block.rows };
        // SAFETY: the block's sums are there; rows lie within the tile's arrays.
        unsafe {
            for row in span.rows.clone() {
                let start = tile.start.add(block.row + row).read();
                let sums = std::array::from_fn::<_, V, _>(|v| sum(self.sums, row, v, start));
                put_scores(tile, sums, block.row + row, row, phases);
            }
            self.multiply::<V>(tile);
        }
        Some(span)
    }
}
