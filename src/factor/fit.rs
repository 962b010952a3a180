//! Moments to factors.
//!
//! With `C` the covariance of the rows about their mean and `S` the second moment of the queries (identity for values),
//! both shrunk, take any root `S = R^T R` and `R C R^T = U diag(s^2) U^T`, `s` descending. Then
//!
//! ```text
//! encode = Spread diag(s^-1/2) U^T R      decode = R^-1 U diag(s^1/2) Spread^T
//! ```
//!
//! does not depend on the root taken (another one turns `U` along), and minimises the error of the scores under a white
//! coding error over all gauges of the product (Cauchy-Schwarz: `(sum s)^2 / d` against `tr(S) tr(C + mean mean^T) / d`
//! for a plain rotation). With tiers of latent channels each tier has a spread of its own and a multiplier that gives all
//! tiers the same rms, so that one row scale serves them all.
//!
//! Within a tier that leaves the channels' errors of unlike weight: with `M` the tier's block of `decode^T S decode`, the
//! scores lose `e^T M e`. Rows of plans with tiers are therefore rounded one latent after the other, each carrying the
//! errors before it on: `M = L^T W L` with L unit lower triangular and W diagonal makes the loss a sum of squares of what
//! each rounding leaves, and with it `det M` counts where the trace did. Feedback wants a gauge nearer to white latents,
//! `s^-SKEW` in place of `s^-1/2`.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, SelfAdjointEvdParams, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::matmul::triangular::{self, BlockStructure, BlockStructure::*};
use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Accum, Auto, Mat, MatRef, Par, Side};
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::hadamard::{SPREAD, spread};
use super::sets::TierWeights;
use crate::code::codebook::codebook;
use crate::shape::{MAX_DIM, MAX_TIERS, Tier};

/// Part of the mean variance that is added to every channel; times `1 + pull / rows`, so that few rows lean towards the
/// plain rotation.
const SHRINK: f64 = 0.1;
/// `pull` when the latents have tiers. These trust the spectrum more: with a pull of `head_dim`, as without tiers, a fit
/// of 512 rows codes rows of another text no better than one width for all does.
const PULL_TIERS: f64 = 1024.0;
/// Exponent of the gauge where roundings feed back; balanced is 0.5. 0.8 to 1 measured alike.
const SKEW: f64 = 0.85;
/// Tridiagonal eigenproblems of this size and more are split in two.
const DIVIDE_FROM: usize = 32;

/// What a fit starts from.
pub struct FitInput<'a> {
    /// Rows behind the moments.
    pub rows: u64,
    /// `[d]`, already rounded: the set's mean.
    pub mean: &'a [f16],
    /// `[d][d]`, second moment of the rows about `mean`.
    pub covariance: &'a [f64],
    /// `[d][d]`, second moment of the queries about zero; `None` for values.
    pub query: Option<&'a [f64]>,
    /// Latent channels, in order.
    pub tiers: &'a [Tier],
}

/// The linear part of a fitted set.
pub struct Fitted {
    /// `[channel][latent]`.
    pub decode: Box<[f16]>,
    /// `[channel][latent]`: `y[j] = sum over i of encode[i][j] (x - mean)[i]`. Then, for plans with tiers, the feedback: per
    /// tier the packed lower triangle of L, row `j` at `j (j + 1) / 2`, with `W[j]` over the tier's mean for its diagonal.
    pub encode: Box<[f32]>,
    /// Mean of `(decode^T S decode)[j][j]`, with feedback of `W[j]`, over a tier's latents `j`, relative to `tr(S) / d`.
    pub kappa: TierWeights,
}

/// Rounds a mean to f16, cut to its range.
pub fn round_mean(mean: impl IntoIterator<Item = f64>) -> Box<[f16]> {
    let largest = f16::MAX.to_f64();
    mean.into_iter().map(|x| f16::from_f64(x.clamp(-largest, largest))).collect()
}

/// `None` when the moments do not give matrices that f16 can hold; the rotation about the mean then takes its place.
pub fn fit(input: &FitInput) -> Option<Fitted> {
    let d = input.mean.len();
    let pull = if input.tiers.len() > 1 { PULL_TIERS } else { d as f64 };
    let shrink = SHRINK * (1.0 + pull / input.rows.max(1) as f64);
    let mut product = shrunk(input.covariance, d, shrink)?;
    let query = match input.query {
        Some(q) if trace(q, d) > 0.0 => Some(Query::new(&shrunk(q, d, shrink)?)?),
        _ => None,
    };
    if let Some(query) = &query {
        product = query.weigh(&product);
    }
    // Matrices go as soon as they have served: what the heap gives back to the system comes back page by page.
    let (s, u) = descending_eigen(product)?;
    let s: Vec<f64> = s.iter().map(|w| w.max(1e-24).sqrt()).collect();
    let (mut encode, mut decode) = tiered_spread(&s, u, input.tiers);
    if let Some(query) = &query {
        encode = query.times_left(&encode);
        solve_upper_triangular_in_place(query.left.transpose(), decode.as_mut(), Par::Seq);
    }
    // faer's own norm guards against overflow, and takes as long as two products.
    let energy: f64 = encode.col_iter().flat_map(|column| column.iter()).map(|x| x * x).sum();
    let unit = (d as f64 / energy).sqrt();
    encode *= faer::Scale(unit);
    decode *= faer::Scale(1.0 / unit);
    rounded(encode, decode, query.as_ref(), input.tiers)
}

fn trace(m: &[f64], d: usize) -> f64 {
    (0..d).map(|i| m[i * (d + 1)]).sum()
}

/// `m + shrink * tr(m) / d * I` of a symmetric `m`; `None` unless finite.
fn shrunk(m: &[f64], d: usize, shrink: f64) -> Option<Mat<f64>> {
    if !m.iter().all(|x| x.is_finite()) {
        return None;
    }
    let extra = shrink * trace(m, d) / d as f64;
    Some(Mat::from_fn(d, d, |i, j| m[j * d + i] + if i == j { extra } else { 0.0 }))
}

/// The second moment of the queries by its root: `S = R^T R`, R upper triangular.
struct Query {
    /// `R^T`.
    left: Mat<f64>,
    trace: f64,
}

impl Query {
    /// What [`shrunk`] adds keeps `S` far from singular.
    fn new(s: &Mat<f64>) -> Option<Self> {
        let left = s.llt(Side::Lower).ok()?.L().to_owned();
        Some(Self { left, trace: s.diagonal().column_vector().sum() })
    }

    /// The lower triangle of `R C R^T`.
    fn weigh(&self, c: &Mat<f64>) -> Mat<f64> {
        let d = c.nrows();
        let (mut right, mut out) = (Mat::zeros(d, d), Mat::zeros(d, d));
        product((&mut right, Rectangular), (c.as_ref(), Rectangular), (self.left.as_ref(), TriangularLower));
        product((&mut out, TriangularLower), (self.left.transpose(), TriangularUpper), (right.as_ref(), Rectangular));
        out
    }

    /// `R^T m`.
    fn times_left(&self, m: &Mat<f64>) -> Mat<f64> {
        let mut out = Mat::zeros(m.nrows(), m.ncols());
        product((&mut out, Rectangular), (self.left.as_ref(), TriangularLower), (m.as_ref(), Rectangular));
        out
    }

    /// `R m`.
    fn times_root(&self, m: MatRef<f64>) -> Mat<f64> {
        let mut out = Mat::zeros(m.nrows(), m.ncols());
        product((&mut out, Rectangular), (self.left.transpose(), TriangularUpper), (m, Rectangular));
        out
    }
}

/// The named parts of a product of the named parts of two matrices: half the work where one is a triangle.
fn product(out: (&mut Mat<f64>, BlockStructure), a: (MatRef<f64>, BlockStructure), b: (MatRef<f64>, BlockStructure)) {
    triangular::matmul(out.0, out.1, Accum::Replace, a.0, a.1, b.0, b.1, 1.0, Par::Seq);
}

/// Eigenvalues, largest first, and their vectors as columns, of a matrix whose lower triangle is read. The largest entry
/// of a vector is positive: the sign is free, and a fixed choice makes equal moments give equal factors.
fn descending_eigen(m: Mat<f64>) -> Option<(Vec<f64>, Mat<f64>)> {
    let d = m.nrows();
    let mut params = <SelfAdjointEvdParams as Auto<f64>>::auto();
    params.recursion_threshold = DIVIDE_FROM;
    let mut memory = MemBuffer::new(self_adjoint_evd_scratch::<f64>(d, ComputeEigenvectors::Yes, Par::Seq, params.into()));
    let (mut s, mut u) = (Diag::zeros(d), Mat::zeros(d, d));
    let stack = MemStack::new(&mut memory);
    self_adjoint_evd(m.as_ref(), s.as_mut(), Some(u.as_mut()), Par::Seq, stack, params.into()).ok()?;
    let values: Vec<f64> = (0..d).rev().map(|i| s[i]).collect();
    for j in 0..d {
        let column = u.col_as_slice_mut(j);
        let largest = max_abs(column);
        if column.iter().find(|x| x.abs() == largest).is_some_and(|x| *x < 0.0) {
            column.iter_mut().for_each(|x| *x = -*x);
        }
    }
    let (low, high) = u.as_mut().split_at_col_mut(d / 2);
    for (low, high) in low.col_iter_mut().zip(high.reverse_cols_mut().col_iter_mut()) {
        low.iter_mut().zip(high.iter_mut()).for_each(|(a, b)| std::mem::swap(a, b));
    }
    values.iter().all(|x| x.is_finite()).then_some((values, u))
}

/// The largest magnitude of numbers as many as a multiple of 8, which have lanes of their own: one would wait for itself.
fn max_abs(x: &[f64]) -> f64 {
    let larger = |a: f64, b: f64| if b > a { b } else { a };
    let mut lanes = [0.0; 8];
    for x in x.as_chunks::<8>().0 {
        lanes.iter_mut().zip(x).for_each(|(lane, x)| *lane = larger(*lane, x.abs()));
    }
    lanes.into_iter().fold(0.0, larger)
}

/// The transpose of `Spread diag(s^-skew) U^T`, and its inverse `U diag(s^skew) Spread^T`, block by block of the tiers.
fn tiered_spread(s: &[f64], u: Mat<f64>, tiers: &[Tier]) -> (Mat<f64>, Mat<f64>) {
    let d = s.len();
    let skew = if tiers.len() > 1 { SKEW } else { 0.5 };
    let (mut into, mut back) = (Mat::zeros(d, d), Mat::zeros(d, d));
    for tier in tiers {
        let (first, n) = (tier.first, tier.channels);
        let of_tier = &s[first..first + n];
        // A latent channel has variance s^(2 - 2 skew): this gives every tier an rms of one over the widening, which the
        // encoder takes back when it picks codes. Decoded rows are longer by it, and unbiased.
        let widening = if tiers.len() > 1 { f64::from(codebook(tier.bits).widening()) } else { 1.0 };
        let rms = (of_tier.iter().map(|s| s.powf(2.0 - 2.0 * skew)).sum::<f64>() / n as f64).sqrt();
        let root: Vec<f64> = of_tier.iter().map(|s| s.powf(skew) * rms * widening).collect();
        spread_columns(&u, first, &root.iter().map(|root| 1.0 / root).collect::<Vec<f64>>(), &mut into);
        spread_columns(&u, first, &root, &mut back);
    }
    (into, back)
}

/// Columns of `out` from `first` on: those of `u`, each times its `by`, spread along every row.
fn spread_columns(u: &Mat<f64>, first: usize, by: &[f64], out: &mut Mat<f64>) {
    let mut lines = [[0.0; SPREAD]; MAX_DIM];
    let lines = &mut lines[..by.len()];
    for row in (0..u.nrows()).step_by(SPREAD) {
        for (j, (line, by)) in lines.iter_mut().zip(by).enumerate() {
            let from = &u.col_as_slice(first + j)[row..row + SPREAD];
            line.iter_mut().zip(from).for_each(|(to, from)| *to = from * by);
        }
        spread(lines);
        for (j, line) in lines.iter().enumerate() {
            out.col_as_slice_mut(first + j)[row..row + SPREAD].copy_from_slice(line);
        }
    }
}

/// Both matrices, `[channel][latent]`, as they are kept.
fn rounded(encode: Mat<f64>, decode: Mat<f64>, query: Option<&Query>, tiers: &[Tier]) -> Option<Fitted> {
    let d = encode.nrows();
    let mut half = vec![f16::ZERO; d * d].into_boxed_slice();
    half.convert_from_f64_slice(&transposed(|j| decode.col_as_slice(j), d));
    drop(decode);
    let lines = transposed(|j| encode.col_as_slice(j), d);
    drop(encode);
    let mut encode: Vec<f32> = lines.iter().map(|x| *x as f32).collect();
    drop(lines);
    if !half.iter().all(|x| x.is_finite()) || !encode.iter().all(|x| x.is_finite()) {
        return None;
    }
    let mut kept = vec![0.0; d * d];
    half.convert_to_f64_slice(&mut kept);
    let kept = transposed(|i| &kept[i * d..(i + 1) * d], d);
    let kept = MatRef::from_column_major_slice(&kept, d, d);
    // The metric of the scores is the square of this.
    let weighed;
    let (root, whole) = match query {
        Some(query) => {
            weighed = query.times_root(kept);
            (weighed.as_ref(), query.trace)
        }
        None => (kept, d as f64),
    };
    let mut kappa = [1.0; MAX_TIERS];
    for (kappa, tier) in kappa.iter_mut().zip(tiers) {
        let n = tier.channels;
        let columns = root.subcols(tier.first, n);
        let weights = if tiers.len() > 1 {
            let mut metric = Mat::zeros(n, n);
            product((&mut metric, TriangularLower), (columns.transpose(), Rectangular), (columns, Rectangular));
            push_feedback(metric, &mut encode)?
        } else {
            columns.col_iter().map(|column| column.squared_norm_l2()).collect()
        };
        *kappa = (weights.iter().sum::<f64>() / n as f64 * d as f64 / whole) as f32;
    }
    let fine = kappa.iter().all(|k| k.is_finite() && *k > 0.0);
    fine.then_some(Fitted { decode: half, encode: encode.into(), kappa })
}

/// Line `j` of a matrix, `[d][d]`, becomes column `j` of the result: eight at a time, so that whole cache lines are written.
fn transposed<'a>(line: impl Fn(usize) -> &'a [f64], d: usize) -> Vec<f64> {
    const SIDE: usize = 8;
    let mut out = vec![0.0; d * d];
    for first in (0..d).step_by(SIDE) {
        let lines: [&[f64]; SIDE] = std::array::from_fn(|k| &line(first + k)[..d]);
        for (i, row) in out.chunks_exact_mut(d).enumerate() {
            for (x, line) in row[first..first + SIDE].iter_mut().zip(lines) {
                *x = line[i];
            }
        }
    }
    out
}

/// Appends L of `m = L^T W L`, its diagonal W over W's mean, as a packed triangle; returns W. The lower triangle of `m` is
/// read.
fn push_feedback(m: Mat<f64>, out: &mut Vec<f32>) -> Option<Vec<f64>> {
    let n = m.nrows();
    // Row by row, each up to its diagonal.
    let mut m: Vec<Vec<f64>> = (0..n).map(|i| (0..=i).map(|j| m[(i, j)]).collect()).collect();
    // From the last latent up: what is left of m after its row and column are explained.
    for j in (0..n).rev() {
        let (above, this) = m.split_at_mut(j);
        let this = &this[0];
        let w = this[j];
        if !(w > 0.0) {
            return None;
        }
        for (row, x) in above.iter_mut().zip(this) {
            let r = x / w;
            row.iter_mut().zip(this).for_each(|(m, x)| *m -= r * x);
        }
    }
    let weights: Vec<f64> = m.iter().enumerate().map(|(j, row)| row[j]).collect();
    let mean = weights.iter().sum::<f64>() / n as f64;
    let first = out.len();
    for (j, row) in m.iter().enumerate() {
        out.extend(row[..j].iter().map(|x| (x / weights[j]) as f32));
        out.push((weights[j] / mean) as f32);
    }
    out[first..].iter().all(|x| x.is_finite()).then_some(weights)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::factor::hadamard;
    use crate::factor::moments::Moments;
    use crate::shape::Plan;

    /// Standard normal numbers from SplitMix64 (sum of twelve uniforms: its tails do not matter here, and a fixture can
    /// be generated with the same few lines elsewhere).
    pub(crate) struct Normal(u64);

    impl Normal {
        pub(crate) fn new(seed: u64) -> Self {
            Self(seed)
        }

        fn uniform(&mut self) -> f64 {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
        }

        pub(crate) fn next(&mut self) -> f64 {
            (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
        }
    }

    /// `[t][d]` rows of steep spectrum (8 to 0.05), channel 7 `offset` away from zero.
    pub(crate) fn rows(t: usize, d: usize, offset: f64, seed: u64) -> Vec<f32> {
        let mut basis_noise = Normal::new(1000 + d as u64);
        let basis: Vec<f64> = (0..d * d)
            .map(|i| basis_noise.next() * 8.0 * (0.05f64 / 8.0).powf((i / d) as f64 / (d - 1) as f64))
            .collect();
        let mut noise = Normal::new(seed);
        let mut out = Vec::with_capacity(t * d);
        for _ in 0..t {
            let mut row = vec![0.0; d];
            for b in basis.chunks_exact(d) {
                let z = noise.next();
                row.iter_mut().zip(b).for_each(|(x, b)| *x += z * b);
            }
            row[7] += offset;
            out.extend(row.iter().map(|&x| x as f32));
        }
        out
    }

    pub(crate) fn queries(n: usize, d: usize, seed: u64) -> Vec<f32> {
        let mut noise = Normal::new(seed);
        (0..n * d).map(|i| (noise.next() * (1.0 + (i % d) as f64 / 16.0)) as f32).collect()
    }

    fn fit_rows(x: &[f32], q: Option<&[f32]>, d: usize, tiers: &[Tier]) -> (Vec<f64>, Fitted) {
        let mut m = Moments::centred(d, true);
        x.chunks_exact(d).for_each(|row| m.push(row));
        m.flush();
        let query = q.map(|q| {
            let mut m = Moments::about_zero(d);
            q.chunks_exact(d).for_each(|row| m.push(row));
            m.flush();
            m.second_about(&vec![0.0; d])
        });
        let mean = round_mean(m.mean());
        let exact: Vec<f64> = mean.iter().map(|x| x.to_f64()).collect();
        let covariance = m.second_about(&exact);
        let input =
            FitInput { rows: m.rows(), mean: &mean, covariance: &covariance, query: query.as_deref(), tiers };
        (exact, fit(&input).expect("finite"))
    }

    fn one_tier(d: usize) -> Vec<Tier> {
        Plan::new(4, d).unwrap().tiers
    }

    fn relative(a: f64, b: f64) -> f64 {
        (a / b - 1.0).abs()
    }

    /// Entries of `encode^T encode` (free of the signs of eigenvectors) and kappa from the reference's `fit`.
    #[test]
    fn agrees_with_the_reference() {
        for f in FIXTURES {
            let (x, q) = (rows(f.t, f.d, 20.0, 1), queries(f.t, f.d, 2));
            let (_, fitted) = fit_rows(&x, f.query.then_some(&q[..]), f.d, &one_tier(f.d));
            let gram = |a: usize, b: usize| -> f64 {
                let row = |i: usize| &fitted.encode[i * f.d..(i + 1) * f.d];
                row(a).iter().zip(row(b)).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
            };
            let got = [gram(0, 0), gram(7, 7), gram(f.d - 1, f.d - 1), gram(0, 1), gram(3, 7)];
            for (got, want) in got.iter().zip(&f.gram) {
                assert!((got - want).abs() < 1e-3 * f.gram[1].abs().max(want.abs()), "{} {}: {got} {want}", f.d, f.t);
            }
            assert!(relative(f64::from(fitted.kappa[0]), f.kappa) < 1e-3, "{} {}: {} {}", f.d, f.t, fitted.kappa[0], f.kappa);
        }
    }

    struct Fixture {
        d: usize,
        t: usize,
        query: bool,
        gram: [f64; 5],
        kappa: f64,
    }

    include!("fit_fixture.rs");

    #[test]
    fn decode_inverts_encode() {
        for (d, t) in [(64, 16), (64, 512), (80, 512), (256, 700)] {
            let (_, f) = fit_rows(&rows(t, d, 100.0, 1), Some(&queries(t, d, 2)), d, &one_tier(d));
            for (i, row) in f.decode.chunks_exact(d).enumerate() {
                for k in 0..d {
                    let column = &f.encode[k * d..(k + 1) * d];
                    let sum: f64 = row.iter().zip(column).map(|(a, b)| a.to_f64() * f64::from(*b)).sum();
                    assert!((sum - f64::from(u8::from(i == k))).abs() < 0.02, "d {d}: [{i}][{k}] is {sum}");
                }
            }
        }
    }

    /// Rms error of the scores when the latents of each row get a white error of 0.1 of the row's rms.
    fn score_error(x: &[f32], q: &[f32], d: usize, mean: &[f64], encode: &dyn Fn(usize, usize) -> f64, decode: &dyn Fn(usize, usize) -> f64) -> f64 {
        let mut noise = Normal::new(9);
        let (mut sum, mut count) = (0.0, 0.0);
        for row in x.chunks_exact(d).take(100) {
            let y: Vec<f64> =
                (0..d).map(|j| (0..d).map(|i| encode(i, j) * (f64::from(row[i]) - mean[i])).sum()).collect();
            let rms = (y.iter().map(|y| y * y).sum::<f64>() / d as f64).sqrt();
            let e: Vec<f64> = (0..d).map(|_| 0.1 * rms * noise.next()).collect();
            let dx: Vec<f64> = (0..d).map(|i| (0..d).map(|j| decode(i, j) * e[j]).sum()).collect();
            for q in q.chunks_exact(d).take(50) {
                sum += q.iter().zip(&dx).map(|(q, e)| f64::from(*q) * e).sum::<f64>().powi(2);
                count += 1.0;
            }
        }
        (sum / count).sqrt()
    }

    /// The reference has 32.57 here at both offsets, other noise than this.
    #[test]
    fn score_errors_are_the_reference_ones() {
        let d = 64;
        let r = hadamard::rotation_matrix(d);
        for (offset, gain) in [(20.0, 1.5), (100.0, 1.7), (1000.0, 3.0)] {
            let (x, q) = (rows(512, d, offset, 1), queries(512, d, 2));
            let (mean, f) = fit_rows(&x, Some(&q), d, &one_tier(d));
            let fitted = score_error(&x, &q, d, &mean, &|i, j| f64::from(f.encode[i * d + j]), &|i, j| {
                f.decode[i * d + j].to_f64()
            });
            let plain = score_error(&x, &q, d, &vec![0.0; d], &|i, j| r[j * d + i], &|i, j| r[j * d + i]);
            println!("offset {offset}: rotation {plain:.3}, fitted {fitted:.3}");
            assert!(relative(fitted, 32.57) < 0.04 && fitted * gain < plain, "offset {offset}: {fitted} against {plain}");
        }
    }

    #[test]
    fn tiers_have_one_widened_rms_and_the_first_the_largest_singular_values() {
        let d = 64;
        let tiers = [
            Tier { first: 0, channels: 16, bits: 6 },
            Tier { first: 16, channels: 16, bits: 4 },
            Tier { first: 32, channels: 32, bits: 3 },
        ];
        let (x, q) = (rows(2048, d, 20.0, 1), queries(512, d, 2));
        let (mean, f) = fit_rows(&x, Some(&q), d, &tiers);
        let mut m = Moments::centred(d, true);
        x.chunks_exact(d).for_each(|row| m.push(row));
        m.flush();
        let c = shrunk(&m.second_about(&mean), d, SHRINK * (1.0 + PULL_TIERS / 2048.0)).unwrap();
        // Mean over a tier's latents of a quadratic form of their encode or decode column.
        let over = |tier: &Tier, value: &dyn Fn(usize) -> f64| -> f64 {
            (tier.first..tier.first + tier.channels).map(value).sum::<f64>() / tier.channels as f64
        };
        let power = |j: usize| -> f64 {
            let e = |i: usize| f64::from(f.encode[i * d + j]);
            (0..d).map(|a| (0..d).map(|b| e(a) * c[(a, b)] * e(b)).sum::<f64>()).sum()
        };
        let widened = |t: &Tier| over(t, &power) * f64::from(codebook(t.bits).widening()).powi(2);
        let powers: Vec<f64> = tiers.iter().map(widened).collect();
        assert!(powers.iter().all(|p| relative(*p, powers[0]) < 1e-3), "{powers:?}");
        let cost = |j: usize| -> f64 { (0..d).map(|i| f.decode[i * d + j].to_f64().powi(2)).sum() };
        let costs: Vec<f64> = tiers.iter().map(|t| over(t, &cost)).collect();
        assert!(costs[0] > costs[1] && costs[1] > costs[2], "{costs:?}");
    }

    /// L^T W L is the tier's block of decode^T S decode, up to the rounding of decode and one factor for the whole.
    #[test]
    fn feedback_factors_the_metric_of_the_scores() {
        let d = 64;
        let tiers = Plan::new(104, d).unwrap().tiers;
        let (_, f) = fit_rows(&rows(2048, d, 20.0, 1), None, d, &tiers);
        let mut triangle = &f.encode[d * d..];
        for (tier, kappa) in tiers.iter().zip(f.kappa) {
            let (this, rest) = triangle.split_at(tier.channels * (tier.channels + 1) / 2);
            triangle = rest;
            let at = |j: usize, k: usize| f64::from(this[j * (j + 1) / 2 + k]);
            let r = |j: usize, k: usize| if k < j { at(j, k) } else { f64::from(u8::from(k == j)) };
            let decode = |i: usize, j: usize| f.decode[i * d + tier.first + j].to_f64();
            for (a, b) in [(0, 0), (3, 3), (15, 15), (2, 9), (14, 15)] {
                let got: f64 = (0..tier.channels).map(|j| f64::from(kappa) * at(j, j) * r(j, a) * r(j, b)).sum();
                let want: f64 = (0..d).map(|i| decode(i, a) * decode(i, b)).sum();
                assert!((got - want).abs() < 1e-3 * f64::from(kappa), "{tier:?}, [{a}][{b}]: {got} for {want}");
            }
        }
        assert!(triangle.is_empty());
    }

    #[test]
    fn degenerate_moments_give_finite_factors_or_none() {
        for d in [64, 80, 256] {
            let mean = vec![f16::ZERO; d];
            let zero = vec![0.0; d * d];
            let mut rank_one = zero.clone();
            rank_one[0] = 1e9;
            let tiny: Vec<f64> = zero.iter().enumerate().map(|(i, _)| if i % (d + 1) == 0 { 1e-80 } else { 0.0 }).collect();
            for covariance in [&zero, &rank_one, &tiny] {
                for query in [None, Some(&zero), Some(&rank_one), Some(&tiny)] {
                    for rows in [0, 1, 16] {
                        let input = FitInput {
                            rows,
                            mean: &mean,
                            covariance,
                            query: query.map(|q| &q[..]),
                            tiers: &one_tier(d),
                        };
                        if let Some(f) = fit(&input) {
                            assert!(f.decode.iter().all(|x| x.is_finite()) && f.encode.iter().all(|x| x.is_finite()));
                        }
                    }
                }
            }
            let input = FitInput { rows: 9, mean: &mean, covariance: &vec![f64::NAN; d * d], query: None, tiers: &one_tier(d) };
            assert!(fit(&input).is_none());
        }
    }

    #[test]
    #[ignore = "prints a speed"]
    fn speed() {
        for d in [64, 128, 256] {
            let (x, q) = (rows(512, d, 20.0, 1), queries(512, d, 2));
            let start = std::time::Instant::now();
            fit_rows(&x, Some(&q), d, &one_tier(d));
            println!("d {d}: observe and fit {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
        }
    }
}
