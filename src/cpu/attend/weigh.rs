//! From products of a tile of keys to its weights in one go, on AVX-512, wherever the tile has one set of keys and one of
//! values: scores never leave L1, and what waits for a row's largest score runs beside the other rows of its block.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::MAX_TILE;
use super::engine::Tile;
use super::fold::{LARGEST, ROUND};
use super::row::{EXP2, LEAST_WEIGHT, SOFTMAX_ROWS};
use super::vnni::{exp2, upper_floats};

/// Lanes of a vector.
pub const WIDTH: usize = 16;
/// Most rows of a block.
pub const ROWS: usize = 16;
/// Rows whose softmax is computed together.
const GROUP: usize = SOFTMAX_ROWS;

/// Where scores come from.
///
/// # Safety
/// Of the [`Span`] that it returns, `scores` has put every row with [`put_scores`]. There is one at least; all are below
/// [`ROWS`], and rows of the tile when `first` is added.
pub unsafe trait Products {
    /// Puts the scores of the next rows, `16 V` of each, where phases expect them ([`put_scores`]).
    ///
    /// # Safety
    /// The tile holds what its fields say; `V` is as many vectors as it has keys.
    unsafe fn scores<const V: usize>(&mut self, tile: &Tile, phases: *mut Phases) -> Option<Span>;
}

/// Rows of a block; the row of the tile that would be its row 0.
pub struct Span {
    pub first: usize,
    pub rows: Range<usize>,
}

/// What one phase leaves the next, of the rows of a block.
#[repr(C, align(64))]
pub struct Phases {
    /// `[row][key / 16]`: scores, then weights.
    x: [[__m512; MAX_TILE / WIDTH]; ROWS],
    /// Lanes whose largest, or whose sum, is the row's.
    most: [__m512; ROWS],
    sum: [__m512; ROWS],
    largest: [f32; ROWS],
    inverse: [f32; ROWS],
}

/// In phases over all rows of a block: within a row, every step waits for the one before.
///
/// # Safety
/// As for [`Products::scores`].
#[inline(always)]
pub unsafe fn phases_of<const V: usize>(tile: &Tile, mut products: impl Products) {
    let mut phases = MaybeUninit::<Phases>::uninit();
    let phases = phases.as_mut_ptr();
    // SAFETY: rows lie within the phases and the tile's arrays by the contract of `Products`, lanes by the caller's word;
    // each phase reads what the one before wrote.
    unsafe {
        while let Some(Span { first, rows }) = products.scores::<V>(tile, phases) {
            let groups = rows.clone().step_by(GROUP).map(|row| Group::new(row, rows.end));
            for group in groups.clone() {
                largest(tile, first, group, phases);
            }
            for row in rows.clone().step_by(2) {
                probabilities::<V>(tile, [row, (row + 1).min(rows.end - 1)], phases);
            }
            for group in groups.clone() {
                let (worth, inverse) = steps(across::<true>(group.of(&raw const (*phases).most)));
                group.put(tile.worth.add(first), worth);
                group.put((&raw mut (*phases).inverse).cast(), inverse);
                group.put(tile.sum.add(first), totals(group.of(&raw const (*phases).sum)));
            }
            for row in rows.clone() {
                weights::<V>(tile, row, first + row, phases);
            }
            for group in groups {
                let sum = across::<false>(group.of(&raw const (*phases).sum));
                group.put(tile.weights_sum.add(first).cast(), sum);
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
///
/// # Safety
/// As for [`Products::scores`].
#[inline(always)]
pub unsafe fn put_scores<const V: usize>(tile: &Tile, sums: [__m512i; V], at: usize, row: usize, phases: *mut Phases) {
    // SAFETY: rows and lanes lie within the tile's arrays.
    unsafe {
        let (step, constant) = (_mm512_set1_ps(tile.step.add(at).read()), _mm512_set1_ps(tile.constant.add(at).read()));
        let mut y = [constant; V];
        for v in 0..V {
            let x = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[v]), step);
            y[v] = _mm512_add_ps(_mm512_mul_ps(x, _mm512_loadu_ps(tile.k_scale.add(v * WIDTH))), constant);
        }
        if let Some(mask) = tile.mask {
            let mask = mask.add(tile.query(at) * tile.stride);
            for v in 0..V {
                y[v] = _mm512_add_ps(y[v], _mm512_loadu_ps(mask.add(v * WIDTH)));
            }
        }
        let mut most = _mm512_set1_ps(tile.largest.add(at).read());
        for v in 0..V {
            most = _mm512_max_ps(y[v], most);
            (*phases).x[row][v] = y[v];
        }
        (*phases).most[row] = most;
    }
}

/// Largest scores of a group of the block that begins with row `first` of the tile, and what their growth leaves.
#[inline(always)]
unsafe fn largest(tile: &Tile, first: usize, group: Group, phases: *mut Phases) {
    // SAFETY: as in `put_scores`.
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
    // SAFETY: as in `put_scores`.
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
    // SAFETY: as in `put_scores`.
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
