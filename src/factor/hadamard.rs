//! Orthonormal Hadamard matrices: the rotation of set 0 and the spread of a fit.
//!
//! An order `n = m * 2^k` with `m` in {1, 12, 20} is `P_m (x) S_k`: Sylvester's matrix of order `2^k` within runs of
//! `2^k` neighbouring channels, Paley's of order `m` (first construction, over the prime 11 or 19) across the runs.
//!
//! Everything here is format: rows in set 0 decode by it. Sums have one fixed order and use no fused multiply-add, so
//! that all CPUs get the same bits.

use crate::shape::{HEAD_DIMS, MAX_DIM};

/// Signs of +1 and -1 before the rotation of `D` channels, times `1 / sqrt(D)`: a constant row must not pile up in one
/// channel. Channel `i` is negative when the top bit of output `i` of SplitMix64 (Steele, Lea and Flood 2014), seeded
/// with `D`, is set.
const fn signs<const D: usize>(unit: f32) -> [f32; D] {
    let mut out = [unit; D];
    let mut state = D as u64;
    let mut i = 0;
    while i < D {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        if (z ^ (z >> 31)) >> 63 == 1 {
            out[i] = -unit;
        }
        i += 1;
    }
    out
}

/// Paley's Hadamard matrix of order `M = p + 1`, `p` a prime that is 3 mod 4, as plus and minus one: the identity plus
/// `[[0, 1], [-1, Q]]` with `Q[i][j]` the Legendre symbol of `j - i`.
const fn paley<const M: usize>() -> [[f32; M]; M] {
    let p = M - 1;
    let mut chi = [-1.0f32; M];
    chi[0] = 0.0;
    let mut i = 1;
    while i < p {
        chi[i * i % p] = 1.0;
        i += 1;
    }
    let mut h = [[0.0; M]; M];
    let mut row = 0;
    while row < M {
        let mut col = 0;
        while col < M {
            h[row][col] = if row == col {
                1.0
            } else if row == 0 {
                1.0
            } else if col == 0 {
                -1.0
            } else {
                chi[(col + p - row) % p]
            };
            col += 1;
        }
        row += 1;
    }
    h
}

static PALEY_12: [[f32; 12]; 12] = paley();
static PALEY_20: [[f32; 20]; 20] = paley();

/// `x = H (signs x) / sqrt(d)` in place; `d = x.len()` is one of [`HEAD_DIMS`]. The way into the coded space of a
/// rotation (about zero: subtract the mean first).
#[inline(always)]
pub fn rotate(x: &mut [f32]) {
    match x.len() {
        64 => rotate_sylvester::<64>(x, &const { signs::<64>(1.0 / 8.0) }),
        128 => rotate_sylvester::<128>(x, &const { signs::<128>(INV_SQRT_128) }),
        256 => rotate_sylvester::<256>(x, &const { signs::<256>(1.0 / 16.0) }),
        80 => rotate_paley::<80, 20, 4>(x, &const { signs::<80>(INV_SQRT_80) }, &PALEY_20),
        96 => rotate_paley::<96, 12, 8>(x, &const { signs::<96>(INV_SQRT_96) }, &PALEY_12),
        192 => rotate_paley::<192, 12, 16>(x, &const { signs::<192>(INV_SQRT_192) }, &PALEY_12),
        d => panic!("no rotation of {d} channels"),
    }
}

/// The inverse of [`rotate`]: `x = signs (H^T x) / sqrt(d)` in place.
#[inline(always)]
pub fn unrotate(x: &mut [f32]) {
    match x.len() {
        64 => unrotate_sylvester::<64>(x, &const { signs::<64>(1.0 / 8.0) }),
        128 => unrotate_sylvester::<128>(x, &const { signs::<128>(INV_SQRT_128) }),
        256 => unrotate_sylvester::<256>(x, &const { signs::<256>(1.0 / 16.0) }),
        80 => unrotate_paley::<80, 20, 4>(x, &const { signs::<80>(INV_SQRT_80) }, &PALEY_20),
        96 => unrotate_paley::<96, 12, 8>(x, &const { signs::<96>(INV_SQRT_96) }, &PALEY_12),
        192 => unrotate_paley::<192, 12, 16>(x, &const { signs::<192>(INV_SQRT_192) }, &PALEY_12),
        d => panic!("no rotation of {d} channels"),
    }
}

const INV_SQRT_80: f32 = 0.111_803_398_874_989_48;
const INV_SQRT_96: f32 = 0.102_062_072_615_965_75;
const INV_SQRT_128: f32 = 0.088_388_347_648_318_44;
const INV_SQRT_192: f32 = 0.072_168_783_648_703_22;

#[inline(always)]
fn rotate_sylvester<const D: usize>(x: &mut [f32], signs: &[f32; D]) {
    let x: &mut [f32; D] = x.try_into().expect("matched on the length");
    for i in 0..D {
        x[i] *= signs[i];
    }
    butterflies::<D>(x);
}

#[inline(always)]
fn unrotate_sylvester<const D: usize>(x: &mut [f32], signs: &[f32; D]) {
    let x: &mut [f32; D] = x.try_into().expect("matched on the length");
    butterflies::<D>(x);
    for i in 0..D {
        x[i] *= signs[i];
    }
}

#[inline(always)]
fn rotate_paley<const D: usize, const M: usize, const RUN: usize>(x: &mut [f32], signs: &[f32; D], h: &[[f32; M]; M]) {
    let x: &mut [f32; D] = x.try_into().expect("matched on the length");
    for i in 0..D {
        x[i] *= signs[i];
    }
    for run in x.as_chunks_mut::<RUN>().0 {
        butterflies::<RUN>(run);
    }
    let before = *x;
    for (row, out) in h.iter().zip(x.as_chunks_mut::<RUN>().0) {
        let mut sum = [0.0; RUN];
        for (sign, run) in row.iter().zip(before.as_chunks::<RUN>().0) {
            for lane in 0..RUN {
                sum[lane] += sign * run[lane];
            }
        }
        *out = sum;
    }
}

#[inline(always)]
fn unrotate_paley<const D: usize, const M: usize, const RUN: usize>(
    x: &mut [f32],
    signs: &[f32; D],
    h: &[[f32; M]; M],
) {
    let x: &mut [f32; D] = x.try_into().expect("matched on the length");
    let before = *x;
    for (col, out) in x.as_chunks_mut::<RUN>().0.iter_mut().enumerate() {
        let mut sum = [0.0; RUN];
        for (row, run) in h.iter().zip(before.as_chunks::<RUN>().0) {
            for lane in 0..RUN {
                sum[lane] += row[col] * run[lane];
            }
        }
        butterflies::<RUN>(&mut sum);
        *out = sum;
    }
    for i in 0..D {
        x[i] *= signs[i];
    }
}

/// Sylvester's matrix of order `N`, not normalised, in place: strides 1, 2, 4, ... in this order.
#[inline(always)]
fn butterflies<const N: usize>(x: &mut [f32; N]) {
    // The first strides stay within eight neighbours, which the compiler holds in registers and shuffles.
    if N >= 8 {
        for x in x.as_chunks_mut::<8>().0 {
            let a = [x[0] + x[1], x[0] - x[1], x[2] + x[3], x[2] - x[3], x[4] + x[5], x[4] - x[5], x[6] + x[7], x[6] - x[7]];
            let b = [a[0] + a[2], a[1] + a[3], a[0] - a[2], a[1] - a[3], a[4] + a[6], a[5] + a[7], a[4] - a[6], a[5] - a[7]];
            *x = [b[0] + b[4], b[1] + b[5], b[2] + b[6], b[3] + b[7], b[0] - b[4], b[1] - b[5], b[2] - b[6], b[3] - b[7]];
        }
    } else if N == 4 {
        let a = [x[0] + x[1], x[0] - x[1], x[2] + x[3], x[2] - x[3]];
        x.copy_from_slice(&[a[0] + a[2], a[1] + a[3], a[0] - a[2], a[1] - a[3]]);
    }
    let mut stride = 8;
    while stride < N {
        for pair in x.chunks_exact_mut(2 * stride) {
            let (low, high) = pair.split_at_mut(stride);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        stride *= 2;
    }
}

/// The rotation as a dense matrix, `[latent][channel]` row-major: `y = R x`. `d` is one of [`HEAD_DIMS`].
pub fn rotation_matrix(d: usize) -> Vec<f64> {
    assert!(HEAD_DIMS.contains(&d), "no rotation of {d} channels");
    fn negative<const D: usize>() -> Vec<bool> {
        signs::<D>(1.0).map(|s| s < 0.0).to_vec()
    }
    let negative = match d {
        64 => negative::<64>(),
        80 => negative::<80>(),
        96 => negative::<96>(),
        128 => negative::<128>(),
        192 => negative::<192>(),
        _ => negative::<256>(),
    };
    let mut r = hadamard(d).expect("every head_dim has one");
    for (i, x) in r.iter_mut().enumerate() {
        if negative[i % d] {
            *x = -*x;
        }
    }
    r
}

/// The orthonormal Hadamard matrix of order `n`, row-major, if this module has one.
fn hadamard(n: usize) -> Option<Vec<f64>> {
    let (m, run) = order(n)?;
    let scale = 1.0 / (n as f64).sqrt();
    let mut h = vec![0.0; n * n];
    for (i, x) in h.iter_mut().enumerate() {
        let (row, col) = (i / n, i % n);
        let odd = ((row % run) & (col % run)).count_ones() % 2 == 1;
        *x = if odd { -scale } else { scale } * paley_sign(m, row / run, col / run);
    }
    Some(h)
}

/// `m` and `2^k` of an order that this module has.
fn order(n: usize) -> Option<(usize, usize)> {
    let power = 1usize << n.trailing_zeros();
    match n / power {
        1 => Some((1, n)),
        3 if power >= 4 => Some((12, power / 4)),
        5 if power >= 4 => Some((20, power / 4)),
        _ => None,
    }
}

fn paley_sign(m: usize, row: usize, col: usize) -> f64 {
    match m {
        12 => f64::from(PALEY_12[row][col]),
        20 => f64::from(PALEY_20[row][col]),
        _ => 1.0,
    }
}

/// Vectors that are spread side by side: a cache line of each channel.
pub const SPREAD: usize = 8;

/// The spread of `n` latent channels (a multiple of 16, at most 256): an orthonormal matrix that shares the variance of
/// its inputs evenly among its outputs, applied to vectors `[n][SPREAD]` in place.
///
/// Where there is no Hadamard matrix of order `n`, two blocks take the place of one: the largest order below `n` that is a
/// multiple of 16 and the rest, the rest's inputs dealt evenly over the (sorted) inputs so that both blocks see the same
/// mix.
pub fn spread(x: &mut [[f64; SPREAD]]) {
    let n = x.len();
    let Some((m, run)) = order(n) else {
        let big = (1..n / 16).rev().map(|i| 16 * i).find(|&i| order(i).is_some()).expect("16 has one");
        deal(x, big);
        let (kept, dealt) = x.split_at_mut(big);
        spread(kept);
        spread(dealt);
        return;
    };
    let scale = 1.0 / (n as f64).sqrt();
    for part in x.chunks_exact_mut(run) {
        sylvester(part);
        part.iter_mut().flatten().for_each(|x| *x *= scale);
    }
    if m > 1 {
        let mut before = [[0.0; SPREAD]; MAX_DIM];
        let before = &mut before[..n];
        before.copy_from_slice(x);
        for (row, out) in x.chunks_exact_mut(run).enumerate() {
            out.fill([0.0; SPREAD]);
            for (col, from) in before.chunks_exact(run).enumerate() {
                let sign = paley_sign(m, row, col);
                for (out, from) in out.iter_mut().flatten().zip(from.iter().flatten()) {
                    *out += sign * from;
                }
            }
        }
    }
}

/// Moves the vectors that are dealt to the second block, all but `big`, behind those of the first; both keep their order.
fn deal(x: &mut [[f64; SPREAD]], big: usize) {
    let (n, small) = (x.len(), x.len() - big);
    let mut dealt = [[0.0; SPREAD]; MAX_DIM];
    let mut n_dealt = 0;
    for j in 0..n {
        if (j + 1) * small / n > n_dealt {
            dealt[n_dealt] = x[j];
            n_dealt += 1;
        } else {
            x[j - n_dealt] = x[j];
        }
    }
    x[big..].copy_from_slice(&dealt[..small]);
}

/// Sylvester's matrix of order `x.len()`, not normalised.
fn sylvester(x: &mut [[f64; SPREAD]]) {
    let mut stride = 1;
    while stride < x.len() {
        for pair in x.chunks_exact_mut(2 * stride) {
            let (low, high) = pair.split_at_mut(stride);
            for (a, b) in low.iter_mut().zip(high) {
                for lane in 0..SPREAD {
                    (a[lane], b[lane]) = (a[lane] + b[lane], a[lane] - b[lane]);
                }
            }
        }
        stride *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn orthonormal_error(m: &[f64], n: usize) -> f64 {
        let mut worst = 0.0f64;
        for a in 0..n {
            for b in 0..n {
                let dot: f64 = (0..n).map(|i| m[a * n + i] * m[b * n + i]).sum();
                worst = worst.max((dot - f64::from(u8::from(a == b))).abs());
            }
        }
        worst
    }

    /// The matrix of [`spread`], row-major.
    fn spread_matrix(n: usize) -> Vec<f64> {
        let mut out = vec![0.0; n * n];
        for first in (0..n).step_by(SPREAD) {
            let mut x: Vec<[f64; SPREAD]> =
                (0..n).map(|j| std::array::from_fn(|lane| f64::from(u8::from(first + lane == j)))).collect();
            spread(&mut x);
            for (i, x) in x.iter().enumerate() {
                out[i * n + first..][..SPREAD].copy_from_slice(x);
            }
        }
        out
    }

    #[test]
    fn spreads_of_one_block_are_the_matrices() {
        for n in [16, 32, 48, 64, 80, 96, 128, 160, 192, 256] {
            let (fast, plain) = (spread_matrix(n), hadamard(n).unwrap());
            assert!(fast.iter().zip(&plain).all(|(a, b)| (a - b).abs() < 1e-15), "{n}");
        }
    }

    #[test]
    fn all_matrices_are_orthonormal() {
        for d in HEAD_DIMS {
            assert!(orthonormal_error(&rotation_matrix(d), d) < 1e-12, "rotation {d}");
        }
        for n in (16..=256).step_by(16) {
            assert!(orthonormal_error(&spread_matrix(n), n) < 1e-12, "spread {n}");
        }
    }

    #[test]
    fn a_spread_of_one_block_is_flat() {
        for n in [16, 32, 48, 64, 80, 96, 128, 160, 192, 256] {
            let h = spread_matrix(n);
            let entry = 1.0 / (n as f64).sqrt();
            assert!(h.iter().all(|x| (x.abs() - entry).abs() < 1e-15), "{n}");
        }
    }

    #[test]
    fn two_blocks_see_the_same_mix() {
        for n in [112, 144, 176, 208, 224, 240] {
            // Variances that fall sixteenfold, as sorted latent channels do.
            let variance: Vec<f64> = (0..n).map(|j| 16f64.powf(-(j as f64) / n as f64)).collect();
            let h = spread_matrix(n);
            let out: Vec<f64> =
                h.chunks_exact(n).map(|row| row.iter().zip(&variance).map(|(a, v)| a * a * v).sum()).collect();
            let (low, high) = out.iter().fold((f64::MAX, 0f64), |(l, h), &x| (l.min(x), h.max(x)));
            assert!(high / low < 1.2, "{n}: {low} to {high}");
        }
    }

    /// The signs are format.
    #[test]
    fn the_rotation_is_pinned() {
        let mut bytes = Vec::new();
        for d in HEAD_DIMS {
            let mut x: Vec<f32> = (0..d).map(|i| (i as f32 * 0.37).sin()).map(|x| (x * 64.0).round()).collect();
            rotate(&mut x);
            bytes.extend(x.iter().flat_map(|x| x.to_le_bytes()));
        }
        assert_eq!(xxhash_rust::xxh3::xxh3_64(&bytes), PINNED);
    }
    const PINNED: u64 = 10_958_765_315_359_484_184;

    #[test]
    fn a_constant_row_does_not_pile_up() {
        for d in HEAD_DIMS {
            let mut x = vec![1.0; d];
            rotate(&mut x);
            assert!(x.iter().all(|y| y.abs() < 4.5), "{d}: {x:?}");
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_matrix_and_comes_back(d in prop::sample::select(&HEAD_DIMS[..]), seed: u64) {
            let x: Vec<f32> = (0..d as u64)
                .map(|i| (xxhash_rust::xxh3::xxh3_64_with_seed(&i.to_le_bytes(), seed) as i64 >> 40) as f32 / 1e5)
                .collect();
            let norm = x.iter().map(|x| x * x).sum::<f32>().sqrt();
            let mut y = x.clone();
            rotate(&mut y);
            for (row, y) in rotation_matrix(d).chunks_exact(d).zip(&y) {
                let want: f64 = row.iter().zip(&x).map(|(r, x)| r * f64::from(*x)).sum();
                prop_assert!((want - f64::from(*y)).abs() < 1e-6 * f64::from(norm));
            }
            unrotate(&mut y);
            for (a, b) in x.iter().zip(&y) {
                prop_assert!((a - b).abs() < 1e-6 * norm);
            }
        }
    }
}
