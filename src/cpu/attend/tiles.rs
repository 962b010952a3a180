//! The two products of [`super::vnni`] on AMX tiles, for blocks of many rows. Levels, folded queries and weights lie as
//! there, which is also how tiles want them. Sums are exact, and so the same.
//!
//! Products are then cheap beside what is done with each of them, so that scores go to weights without leaving registers
//! in between, wherever a tile of keys has one set of keys and one of values.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::MAX_TILE;
use super::engine::Tile;
use super::fold::{LARGEST, ROUND};
use super::product::{Left, Outputs, Right};
use super::row::{EXP2, LEAST_WEIGHT, SOFTMAX_ROWS};
use super::vnni::{exp2, upper_floats};
use crate::cpu::simd::amx::{self, ROW_BYTES, ROWS, Tiles};

/// Fewest rows for which tiles are faster than vectors.
pub const LEAST_ROWS: usize = 8;
/// Lanes of a tile of sums.
const WIDTH: usize = 16;
/// Rows whose softmax is computed together.
const GROUP: usize = SOFTMAX_ROWS;

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
    for block in blocks(tiles, a) {
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
            let start = to.weights.add(row).read().wrapping_mul(-to.offset);
            let step = _mm512_set1_ps(to.step.add(row).read());
            let keep = _mm512_set1_ps(to.keep.add(row).read());
            for v in 0..V {
                let x = _mm512_cvtepi32_ps(sum(sums, row - block.row, v, start));
                let at = to.out.add(row * to.stride + lane + v * WIDTH);
                let kept = _mm512_mul_ps(_mm512_loadu_ps(at), keep);
                _mm512_storeu_ps(at, _mm512_add_ps(kept, _mm512_mul_ps(x, step)));
            }
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
        match (tile.keys.lanes / WIDTH, tile.mask.is_some()) {
            (1, false) => weigh_vectors::<1, false>(tiles, tile),
            (1, true) => weigh_vectors::<1, true>(tiles, tile),
            (2, false) => weigh_vectors::<2, false>(tiles, tile),
            (2, true) => weigh_vectors::<2, true>(tiles, tile),
            (3, false) => weigh_vectors::<3, false>(tiles, tile),
            (3, true) => weigh_vectors::<3, true>(tiles, tile),
            (_, false) => weigh_vectors::<4, false>(tiles, tile),
            (_, true) => weigh_vectors::<4, true>(tiles, tile),
        }
    }
}

/// What one phase leaves the next, of the rows of a block.
#[repr(C, align(64))]
struct Phases {
    /// `[row][key / 16]`: scores, then weights.
    x: [[__m512; MAX_TILE / WIDTH]; ROWS],
    /// Lanes whose largest, or whose sum, is the row's.
    most: [__m512; ROWS],
    sum: [__m512; ROWS],
    largest: [f32; ROWS],
    inverse: [f32; ROWS],
}

/// In phases over all rows of a block: within a row, every step waits for the one before. The next block's products run
/// beside them.
#[inline(always)]
unsafe fn weigh_vectors<const V: usize, const MASKED: bool>(tiles: &Tiles, tile: &Tile) {
    let (mut sums, mut phases) = (MaybeUninit::<Sums>::uninit(), MaybeUninit::<Phases>::uninit());
    let (sums, phases) = (sums.as_mut_ptr().cast::<i32>(), phases.as_mut_ptr());
    let mut blocks = blocks(tiles, tile.queries);
    let mut next = blocks.next();
    // SAFETY: rows and lanes lie within the tile's arrays; each phase reads what the one before wrote.
    unsafe {
        if let Some(block) = &next {
            block.multiply_all::<V>(tile.keys, sums);
        }
        while let Some(block) = next {
            let rows = block.wanted - block.row..block.rows;
            for row in rows.clone() {
                scores::<V, MASKED>(tile, sums, row, block.row + row, phases);
            }
            next = blocks.next();
            if let Some(block) = &next {
                block.multiply_all::<V>(tile.keys, sums);
            }
            for first in rows.clone().step_by(GROUP) {
                let group = Group::new(first, rows.end);
                largest(tile, block.row, group, phases);
            }
            for row in rows.clone().step_by(2) {
                probabilities::<V>(tile, [row, (row + 1).min(rows.end - 1)], phases);
            }
            for first in rows.clone().step_by(GROUP) {
                let group = Group::new(first, rows.end);
                let (worth, inverse) = steps(across::<true>(group.of(&raw const (*phases).most)));
                group.put(tile.worth.add(block.row), worth);
                group.put((&raw mut (*phases).inverse).cast(), inverse);
                group.put(tile.sum.add(block.row), totals(group.of(&raw const (*phases).sum)));
            }
            for row in rows.clone() {
                weights::<V>(tile, row, block.row + row, phases);
            }
            for first in rows.clone().step_by(GROUP) {
                let group = Group::new(first, rows.end);
                let sum = across::<false>(group.of(&raw const (*phases).sum));
                group.put(tile.weights_sum.add(block.row).cast(), sum);
            }
        }
    }
}

/// Four rows of a block; those beyond its last repeat that.
#[derive(Clone, Copy)]
struct Group([usize; GROUP]);

impl Group {
    #[inline(always)]
    fn new(first: usize, end: usize) -> Self {
        let last = end - 1;
        Self([first, (first + 1).min(last), (first + 2).min(last), (first + 3).min(last)])
    }

    #[inline(always)]
    unsafe fn of(self, x: *const [__m512; ROWS]) -> [__m512; GROUP] {
        let [a, b, c, d] = self.0;
        // SAFETY: rows of a block are below ROWS.
        unsafe { [(*x)[a % ROWS], (*x)[b % ROWS], (*x)[c % ROWS], (*x)[d % ROWS]] }
    }

    /// What [`across`] left of each row.
    #[inline(always)]
    unsafe fn put(self, out: *mut f32, x: __m512) {
        // SAFETY: one entry per row.
        unsafe {
            let mut each = [0.0; 16];
            _mm512_storeu_ps(each.as_mut_ptr(), x);
            for (r, row) in self.0.into_iter().enumerate() {
                out.add(row).write(each[4 * r]);
            }
        }
    }
}

/// Scores of row `at` of the tile, row `row` of the block, with their mask.
#[inline(always)]
unsafe fn scores<const V: usize, const MASKED: bool>(tile: &Tile, sums: *const i32, row: usize, at: usize, phases: *mut Phases) {
    // SAFETY: rows and lanes lie within the tile's arrays.
    unsafe {
        let mut most = _mm512_set1_ps(tile.largest.add(at).read());
        let start = tile.start.add(at).read();
        let (step, constant) = (_mm512_set1_ps(tile.step.add(at).read()), _mm512_set1_ps(tile.constant.add(at).read()));
        for v in 0..V {
            let y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum(sums, row, v, start)), step);
            let mut y = _mm512_add_ps(_mm512_mul_ps(y, _mm512_loadu_ps(tile.k_scale.add(v * WIDTH))), constant);
            if let (true, Some(mask)) = (MASKED, tile.mask) {
                y = _mm512_add_ps(y, _mm512_loadu_ps(mask.add(tile.query(at) * tile.stride + v * WIDTH)));
            }
            most = _mm512_max_ps(y, most);
            (*phases).x[row][v] = y;
        }
        (*phases).most[row] = most;
    }
}

/// Largest scores of a group of the block that begins with row `first` of the tile, and what their growth leaves.
#[inline(always)]
unsafe fn largest(tile: &Tile, first: usize, group: Group, phases: *mut Phases) {
    // SAFETY: as in `scores`.
    unsafe {
        let largest = across::<true>(group.of(&raw const (*phases).most));
        let mut before = [0.0; GROUP];
        for r in 0..GROUP {
            before[r] = tile.largest.add(first + group.0[r]).read();
        }
        let before = each_of(before);
        let grown = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(largest, before);
        let mut keep = _mm512_set1_ps(1.0);
        if grown != 0 {
            keep = _mm512_mask_mov_ps(keep, grown, exp2(_mm512_sub_ps(before, largest)));
            group.put(tile.largest.add(first), largest);
        }
        group.put(tile.keep.add(first), keep);
        group.put((&raw mut (*phases).largest).cast(), largest);
    }
}

/// Probabilities of two rows of a block, and their products with the scales of the values.
#[inline(always)]
unsafe fn probabilities<const V: usize>(tile: &Tile, rows: [usize; 2], phases: *mut Phases) {
    // SAFETY: as in `scores`.
    unsafe {
        let mut p = [[_mm512_setzero_ps(); V]; 2];
        for i in 0..2 {
            let largest = _mm512_set1_ps((*phases).largest[rows[i]]);
            for v in 0..V {
                p[i][v] = _mm512_sub_ps((*phases).x[rows[i]][v], largest);
            }
        }
        exp2_of_two(&mut p);
        for i in 0..2 {
            let (mut total, mut most) = (_mm512_setzero_ps(), _mm512_setzero_ps());
            for v in 0..V {
                total = _mm512_add_ps(total, p[i][v]);
                let weight = _mm512_mul_ps(p[i][v], _mm512_loadu_ps(tile.v_scale.add(v * WIDTH)));
                most = _mm512_max_ps(weight, most);
                (*phases).x[rows[i]][v] = weight;
            }
            (*phases).sum[rows[i]] = total;
            (*phases).most[rows[i]] = most;
        }
    }
}

/// Integer weights of row `at` of the tile, row `row` of the block.
#[inline(always)]
unsafe fn weights<const V: usize>(tile: &Tile, row: usize, at: usize, phases: *mut Phases) {
    // SAFETY: as in `scores`.
    unsafe {
        let inverse = _mm512_set1_ps((*phases).inverse[row]);
        let mut bits = [_mm512_setzero_si512(); MAX_TILE / WIDTH];
        for v in 0..V {
            let x = _mm512_mul_ps((*phases).x[row][v], inverse);
            bits[v] = _mm512_castps_si512(_mm512_add_ps(x, _mm512_set1_ps(ROUND)));
        }
        (*phases).sum[row] = _mm512_castsi512_ps(put_weights(bits, tile.weights.add(at * 2 * MAX_TILE)));
    }
}

/// [`exp2`] of two rows, one operation for all of them after the other: chains of their own, one behind the other, are more
/// than the CPU looks ahead.
#[inline(always)]
unsafe fn exp2_of_two<const V: usize>(x: &mut [[__m512; V]; 2]) {
    // SAFETY: the caller's CPU has AVX-512 F.
    unsafe {
        let round = _mm512_set1_ps(ROUND);
        let (mut shifted, mut f) = (*x, *x);
        for i in 0..2 * V {
            shifted[i % 2][i / 2] = _mm512_add_ps(x[i % 2][i / 2], round);
        }
        for i in 0..2 * V {
            f[i % 2][i / 2] = _mm512_sub_ps(shifted[i % 2][i / 2], round);
        }
        for i in 0..2 * V {
            f[i % 2][i / 2] = _mm512_sub_ps(x[i % 2][i / 2], f[i % 2][i / 2]);
        }
        let mut p = [[_mm512_set1_ps(EXP2[0]); V]; 2];
        for c in &EXP2[1..] {
            for i in 0..2 * V {
                p[i % 2][i / 2] = _mm512_mul_ps(p[i % 2][i / 2], f[i % 2][i / 2]);
            }
            for i in 0..2 * V {
                p[i % 2][i / 2] = _mm512_add_ps(p[i % 2][i / 2], _mm512_set1_ps(*c));
            }
        }
        for i in 0..2 * V {
            let some = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(x[i % 2][i / 2], _mm512_set1_ps(-126.0));
            let whole = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted[i % 2][i / 2]));
            let y = _mm512_castps_si512(p[i % 2][i / 2]);
            x[i % 2][i / 2] = _mm512_castsi512_ps(_mm512_maskz_add_epi32(some, y, whole));
        }
    }
}

/// Writes the weights of a row, integers in the low 16 bits of their lanes: upper bytes, then lower ones. Returns lanes that
/// add up to their sum.
#[inline(always)]
unsafe fn put_weights(bits: [__m512i; MAX_TILE / WIDTH], out: *mut u8) -> __m512i {
    // SAFETY: the caller leaves room for twice MAX_TILE bytes.
    unsafe {
        // 16 bits of two vectors, the second's above the first's.
        let a = _mm512_mask_mov_epi16(bits[0], 0xaaaa_aaaa, _mm512_slli_epi32::<16>(bits[1]));
        let b = _mm512_mask_mov_epi16(bits[2], 0xaaaa_aaaa, _mm512_slli_epi32::<16>(bits[3]));
        let (half, byte) = (_mm512_set1_epi16(128), _mm512_set1_epi16(255));
        let (upper_a, upper_b) = (_mm512_add_epi16(a, half), _mm512_add_epi16(b, half));
        let upper = _mm512_packs_epi16(_mm512_srai_epi16::<8>(upper_a), _mm512_srai_epi16::<8>(upper_b));
        let lower = _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte));
        let order = _mm512_loadu_si512(KEY_ORDER.as_ptr().cast());
        _mm512_storeu_si512(out.cast(), _mm512_permutexvar_epi8(order, upper));
        _mm512_storeu_si512(out.add(MAX_TILE).cast(), _mm512_permutexvar_epi8(order, lower));
        let one = _mm512_set1_epi16(1);
        _mm512_dpwssd_epi32(_mm512_madd_epi16(a, one), b, one)
    }
}

/// Where [`put_weights`] finds the byte of each key: bytes of quarter q are of keys `4 q + i` of vectors 0 and 1 in turn,
/// then of 2 and 3.
const KEY_ORDER: [u8; MAX_TILE] = {
    let mut out = [0; MAX_TILE];
    let mut at = 0;
    while at < MAX_TILE {
        let (v, key) = (at / WIDTH, at % WIDTH);
        out[at] = (key / 4 * 16 + v / 2 * 8 + key % 4 * 2 + v % 2) as u8;
        at += 1;
    }
    out
};

/// The largest of all lanes of each of four vectors, or (unless `MAX`) the sum of all, integers then: the first's in the first
/// four lanes, and so on.
#[inline(always)]
unsafe fn across<const MAX: bool>(x: [__m512; GROUP]) -> __m512 {
    // SAFETY: the caller's CPU has AVX-512 F.
    unsafe {
        let a = both::<MAX>(_mm512_shuffle_f32x4::<0x44>(x[0], x[1]), _mm512_shuffle_f32x4::<0xee>(x[0], x[1]));
        let b = both::<MAX>(_mm512_shuffle_f32x4::<0x44>(x[2], x[3]), _mm512_shuffle_f32x4::<0xee>(x[2], x[3]));
        let x = both::<MAX>(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        let x = both::<MAX>(x, _mm512_permute_ps::<0x4e>(x));
        both::<MAX>(x, _mm512_permute_ps::<0xb1>(x))
    }
}

#[inline(always)]
unsafe fn both<const MAX: bool>(a: __m512, b: __m512) -> __m512 {
    // SAFETY: the caller's CPU has AVX-512 F.
    unsafe {
        match MAX {
            true => _mm512_max_ps(a, b),
            false => _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b))),
        }
    }
}

/// Four numbers as [`across`] leaves them.
#[inline(always)]
unsafe fn each_of(x: [f32; GROUP]) -> __m512 {
    // SAFETY: the caller's CPU has AVX-512 F.
    unsafe {
        let index = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        _mm512_permutexvar_ps(index, _mm512_castps128_ps512(_mm_loadu_ps(x.as_ptr())))
    }
}

/// [`super::row::steps`] of each lane.
#[inline(always)]
unsafe fn steps(largest: __m512) -> (__m512, __m512) {
    // SAFETY: the caller's CPU has AVX-512 F.
    unsafe {
        let (some, most) = (_mm512_cmp_ps_mask::<_CMP_GT_OQ>(largest, _mm512_set1_ps(LEAST_WEIGHT)), _mm512_set1_ps(LARGEST));
        (_mm512_maskz_div_ps(some, largest, most), _mm512_maskz_div_ps(some, most, largest))
    }
}

/// The sums of four vectors, added as in [`super::row::exponentials`], as [`across`] leaves them.
#[inline(always)]
unsafe fn totals(x: [__m512; GROUP]) -> __m512 {
    // SAFETY: the caller's CPU has AVX-512 F and VL.
    unsafe {
        let mut halves = [_mm_setzero_ps(); GROUP];
        for r in 0..GROUP {
            let x = _mm256_add_ps(_mm512_castps512_ps256(x[r]), upper_floats(x[r]));
            halves[r] = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        }
        // (0 + 4) + (2 + 6) of two rows, then (1 + 5) + (3 + 7) of both
        let [a, b, c, d] = halves;
        let a = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
        let b = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
        let mut out = [0.0; GROUP];
        _mm_storeu_ps(out.as_mut_ptr(), _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a)));
        each_of(out)
    }
}
